"""The figures of `report`: as files for papers, and as SVG for the page."""

from __future__ import annotations

import io
import itertools
import math
import re
import statistics

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from dckd_sr import compare
from dckd_sr.ops.history import update_interval

BINS, POINTS = 80, 300  # of a curve of losses, which are averaged so far, and of scores
MOST_TICKS = 60  # history updates that are drawn one by one
INK, COLORS = '#1f2430', ('#3b82c4', '#e0701a', '#2f9e6e', '#c4557f', '#8a6fd1', '#a08a1e', '#3aa6b9', '#b0483a')
STYLE = {
    **dict.fromkeys(('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color'), INK),
    **{'font.size': 11, 'axes.titlesize': 12, 'axes.spines.top': False, 'axes.spines.right': False},
    **{'text.parse_math': False, 'svg.fonttype': 'none', 'legend.frameon': False},
}
# Of an SVG file: its head, metadata, ids that figures share, names of XML.
_UNWANTED = r'\A.*?(?=<svg)|<metadata>.*?</metadata>|(?<=<g) id="[^"]*"| xmlns(:xlink)?="[^"]*"'


class Figures:
    """Draws figures into ``folder`` as PNG and PDF.

    Attributes:
        drawn: section -> list of (title, SVG in the colour of the text around it).
    """

    def __init__(self, folder):
        self.folder, self.drawn = folder, {}

    def draw(self, section, title, plot, **axes_options):
        """``plot(axes)``, under a title, with a legend of what has a label."""
        figures = self.drawn.setdefault(section, [])
        name = f'{section}{len(figures) + 1}_{compare.slug(title)}'
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, 'svg.hashsalt': name}):
            figure = Figure(figsize=(4.8, 3.7), layout='constrained')
            axes = figure.add_subplot()
            axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
            plot(axes)
            axes.set(title=title, **axes_options)
            axes.grid(alpha=0.25)
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc='outside lower center', ncols=3, fontsize=10)
            self._save(figure, name)
            svg = io.StringIO()
            figure.savefig(svg, format='svg', transparent=True)
        text = svg.getvalue().replace(INK, 'currentColor')
        text = re.sub(_UNWANTED, '', text, flags=re.S)
        figures.append((title, text.replace('xlink:href', 'href')))

    def crops(self, rows):
        """A grid of images: rows of (name, list of (label, text, uint8 BGR or gray))."""
        count = max(len(parts) for _, parts in rows)
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
            figure = Figure(figsize=(1.7 * count, 2.1 * len(rows)), layout='constrained')
            grid = figure.subplots(len(rows), count, squeeze=False)
            for cells, (_, parts) in zip(grid, rows):
                for axes, (label, text, image) in zip(cells, parts):
                    axes.imshow(image if image.ndim == 2 else image[..., ::-1], 'gray', vmin=0, vmax=255)
                    axes.set_title(f'{label}\n{text}', fontsize=8)
                    axes.axis('off')
            self._save(figure, 'crops')

    def _save(self, figure, name):
        for kind in ('png', 'pdf'):
            figure.savefig(self.folder / f'{name}.{kind}', dpi=150)
            figure.set_layout_engine('none')  # what takes most of the time is done


def draw(figures, runs, scores, costs):
    """Scores, losses and the contrastive sums over iterations, and scores against costs.

    Args:
        figures: `Figures`.
        runs: list of `report.Run`.
        scores: label -> (set, metric) -> values.
        costs: label -> `report_networks.Cost`.
    """
    colors = dict(zip(dict.fromkeys(run.label for run in runs), itertools.cycle(COLORS)))

    def curves(axes, pick, limit, **style):
        """Each run thin, and the mean over a label's runs where all of them are; returns all values."""
        lines = {}
        for run in runs:
            line = {i: value for i, value in pick(run) if value is not None and math.isfinite(value)}
            if line:
                lines.setdefault(run.label, []).append(line)
        for label, several in lines.items():
            for line in several if len(several) > 1 else ():
                axes.plot(*thin(line, limit), color=colors[label], lw=0.8, alpha=0.5, **style)
            together = [i for i in several[0] if all(i in line for line in several)]
            mean = {i: statistics.fmean(line[i] for line in several) for i in together}
            axes.plot(*(thin(mean, limit) if mean else ([], [])), color=colors[label], label=label, **style)
        return [value for several in lines.values() for line in several for value in line.values()]

    def over_iterations(rows, key):
        return ((i, values.get(key)) for i, values in sorted(rows.items()))

    def sums(rows, part, level):
        return ((row['iter'], row[part][level]) for row in rows if part in row)

    for key in dict.fromkeys(key for run in runs for values in run.log.scores.values() for key in values):

        def plot(axes, key=key):
            values = curves(axes, lambda one: over_iterations(one.log.scores, key), POINTS)
            # The first scores are far below all others, between which the differences are.
            end = max(i for run in runs for i in run.log.scores)
            late = [run.log.scores[i].get(key, math.nan) for run in runs for i in run.log.scores if i > end / 4]
            late = [value for value in late if value is not None and math.isfinite(value)]
            if late and min(late) < max(values):
                margin = 0.05 * (max(values) - min(late))
                axes.set_ylim(min(late) - margin, max(values) + margin)

        figures.draw('curves', f'{key[1].upper()}, {key[0]}', plot, xlabel='iteration')
    for key in dict.fromkeys(key for run in runs for values in run.log.losses.values() for key in values):

        def plot(axes, key=key):
            values = curves(axes, lambda one: over_iterations(one.log.losses, key), BINS)
            if values and min(values) > 0 and max(values) > 30 * min(values):
                log_axis(axes)

        figures.draw('curves', key, plot, xlabel='iteration')
    contrasting = [run for run in runs if run.log.contrast]
    for level in range(max((len(run.log.contrast[0]['numerator']) for run in contrasting), default=0)):

        def plot(axes, level=level):
            for part, style in (('numerator', '-'), ('denominator', '--')):
                curves(axes, lambda one, part=part: sums(one.log.contrast, part, level), BINS, ls=style)
            for line in axes.get_lines():
                if line.get_linestyle() == '--':
                    line.set_label('')  # the solid one is in the legend
            axes.plot([], [], color=INK, ls='--', label='denominator')
            log_axis(axes)
            for i in history_updates(contrasting[0]):
                axes.axvline(i, color=INK, lw=0.4, alpha=0.5, ls=':')

        figures.draw('contrast', f'Level {level + 1}', plot, xlabel='iteration')
    rows = [row for run in contrasting for row in run.log.contrast if row.get('left_out')]
    for level in range(max((len(row['left_out']) for row in rows), default=0)):

        def plot(axes, level=level):
            curves(axes, lambda one: sums(one.log.contrast, 'left_out', level), BINS)
            axes.set_ylim(-0.05, 1.05)

        if any(row['left_out'][level] for row in rows):
            figures.draw('contrast', f'Level {level + 1}, part left out', plot, xlabel='iteration')
    column = next((c for means in scores.values() for c in means if 'psnr' in c[1].lower()), None)
    points = {label: means[column] for label, means in scores.items() if label in costs and column in means}
    for what in ('parameters', 'multiply-adds', 'seconds') if points else ():

        def plot(axes, what=what):
            for label, values in points.items():
                at = getattr(costs[label], what.replace('-', '_'))
                axes.plot(at, statistics.fmean(values), 'o', color=colors.get(label, INK), label=label)
            log_axis(axes, 'x', '{x:g}' if what == 'seconds' else ticker.EngFormatter(sep=''))

        figures.draw('costs', f'{column[1].upper()}, {column[0]}, by {what}', plot, xlabel=what)


def log_axis(axes, which='y', form='{x:g}'):
    """Logarithmic, with plain numbers at 1, 2 and 5."""
    axes.set(**{f'{which}scale': 'log'})
    axis = getattr(axes, f'{which}axis')
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=6))
    axis.set_major_formatter(form)
    axis.set_minor_locator(ticker.NullLocator())


def history_updates(run):
    """Iterations at which the history network moved, if they are few."""
    train, last = run.options.get('train') or {}, max(run.log.losses, default=0)
    step, period = train.get('step') or [1000, 2000, 3000], train.get('step_period', 100000)
    found = (i for i in range(1, last + 1) if i % update_interval(step, i, period) == 0)
    found = list(itertools.islice(found, MOST_TICKS + 1))
    return found if len(found) <= MOST_TICKS else []


def thin(line, limit):
    """(iterations, values) of a dict, averaged in at most ``limit`` bins of equal count."""
    parts = np.array_split(np.array(list(line.items())), min(limit, len(line)))
    return np.array([part.mean(0) for part in parts]).T
