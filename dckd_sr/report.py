"""``python -m dckd_sr.report RUN... [-o FILE.html]``: one page, readable offline, about trainings and comparisons.

What is there is shown, what is not is named: scores and curves come from the files of the runs; pictures, the overlap
of code distributions and the costs from their networks, where weights and validation images are at hand.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

import dckd_sr
from dckd_sr import compare, evaluation, logs, report_networks, safe_yaml, sources
from dckd_sr.errors import UserError, entry_point, looked_in, nearest, reason


@entry_point()
def main(argv=None):
    """Command line entry point.

    Returns:
        exit code: 0 done, 2 a mistake in arguments or files (one message, no traceback), 130 interrupted.
    """
    about = 'Write one HTML page about trainings and comparisons, and its figures as PNG and PDF.'
    parser = argparse.ArgumentParser(prog='python -m dckd_sr.report', description=about)
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help="a run's folder or name, or a folder of dckd_sr.compare")
    add('-o', '--output', metavar='FILE.html', help='default: report.html in the folder of the first RUN')
    add('--images', type=int, default=4, metavar='N', help='validation images to look at (default: 4; 0: none)')
    args = parser.parse_args(argv)
    for path in report(args.runs, args.output, args.images):
        print(f'  {path}')


def report(arguments, output=None, images=4):
    """Write the page and its figures.

    Args:
        arguments: folders or names of runs, folders of comparisons.
        output: the HTML file; None: ``report.html`` in the folder of the first of them.
        images: how many validation images the networks are run on.

    Returns:
        [path of the page, folder of the figures].

    Raises:
        UserError: no such run, one without a log, a file that cannot be written, or a missing library.
    """
    try:
        import jinja2

        from dckd_sr import report_figures
    except ImportError as error:
        raise UserError(f'the report needs {error.name}: pip install "dckd_sr[report]"') from error
    if images < 0:
        raise UserError(f'--images {images}: expected 0 or more')
    folders = [find(argument) for argument in arguments]
    output = Path(output) if output else folders[0] / 'report.html'
    if output.is_dir():
        raise UserError(f'-o {output}: a folder; expected the name of the HTML file')
    if output.suffix.lower() not in ('.html', '.htm'):  # it may be a file of the run
        raise UserError(f'-o {output}: expected a name that ends in .html')
    figures = report_figures.Figures(output.with_name(f'{output.stem}_figures'))
    try:
        figures.folder.mkdir(parents=True, exist_ok=True)
        tables, runs = read_all(folders)
        scores, notes = {label: means for table in tables for label, means in table['scores'].items()}, []
        shown = report_networks.restore(runs, images, notes) if images else {}
        report_figures.draw(figures, runs, scores, shown.get('costs', {}))
        if shown:
            figures.crops([(name, [part[:3] for part in parts]) for name, parts in shown['crops']])
        jinja = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        jinja.policies['json.dumps_kwargs'] = {}  # labels stay in their order
        template = jinja.from_string((Path(__file__).parent / 'report.html').read_text(encoding='utf-8'))
        page = template.render(
            title=', '.join(folder.name for folder in folders),
            made=f'{datetime.datetime.now():%Y-%m-%d %H:%M}',
            tables=tables,
            runs=[summary(run) for run in runs],
            figures=figures.drawn,
            bounds=bounds(runs),
            differences=differences(runs),
            options=[(run.name, run.text) for run in runs if run.text],
            environment=environment(runs),
            notes=list(dict.fromkeys(notes)),
            **shown,
        )
        output.write_text(page, encoding='utf-8')
    except OSError as error:
        raise UserError(f'cannot write {output} and its figures: {reason(error)}') from error
    return [output, figures.folder]


# ---------------------------------------------------------------------------------------------------------------------
# What runs have written


@dataclass
class Log:
    """What a run's ``metrics.jsonl`` says.

    Attributes:
        losses: iteration -> name -> value.
        scores: iteration -> (set, metric) -> value of the validation.
        seconds: of an iteration.
        total: iterations that were asked for, None where the file does not say.
        about: what -> batch, device, versions, ... of the training.
        contrast: rows with the sums of the contrastive loss.
    """

    losses: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)
    seconds: list = field(default_factory=list)
    total: int | None = None
    finished: bool = False
    about: dict = field(default_factory=dict)
    contrast: list = field(default_factory=list)


@dataclass
class Run:
    """One training; runs of one ``label``, a method, differ in their seeds."""

    label: str
    path: Path
    options: dict
    text: str
    log: Log

    @property
    def name(self):
        return self.path.name


def find(argument):
    """The folder of a run or of a comparison."""
    places = (Path(argument), Path('experiments') / argument, Path('results') / argument)
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        known = [path.parent.name for path in sorted(Path('experiments').glob('*/metrics.jsonl'))]
        raise UserError(f'{argument}: no such run or folder{looked_in(argument)}{nearest(argument, known)}')
    folder = folder.resolve() if folder.name in ('', '..') else folder
    if not (folder / 'compare.json').is_file() and not (folder / 'metrics.jsonl').is_file():
        raise UserError(f'{folder} has neither a metrics.jsonl nor a compare.json: no run, and no finished comparison')
    return folder


def read_all(folders):
    """(tables with ``title``, ``rows`` of (text, mark) and ``scores``: label -> (set, metric) -> values; runs)."""
    tables, runs, alone = [], [], []
    folders = list(dict.fromkeys(folders))
    for folder in folders:
        if (folder / 'compare.json').is_file():
            start = f'{folder.name}: ' if len(folders) > 1 else ''
            table, found = read_comparison(folder, start)
            tables.append(table)
            runs += found
        else:
            same = [other for other in folders if other.name == folder.name]
            alone.append(read_run(folder, folder.name if len(same) == 1 else str(folder)))
    return tables + ([table_of(alone)] if alone else []), runs + alone


_MARKS = {1: 'best', 2: 'second'}


def read_comparison(folder, start=''):
    try:
        content = json.loads((folder / 'compare.json').read_text(encoding='utf-8'))
        table = content['table']
        rows = [[('Method', ''), *((f'{name} {metric.upper()}', '') for name, metric in table['columns'])]]
        for row in table['rows']:
            marks = (_MARKS.get(place, '') for place in row['places'])
            rows.append([(row['name'], ''), *zip(row['cells'], marks)])
        notes = list(table['notes'])
        methods = {start + compare.label(name): means for name, means in content['methods'].items()}
        named = [(name, start + compare.label(run['method'])) for name, run in content['runs'].items()]
        fixed = {start + name: {key: [v] for key, v in means.items()} for name, means in content['fixed'].items()}
        scores = {
            label: {tuple(key.rsplit(' ', 1)): [v for v in values if v is not None] for key, values in means.items()}
            for label, means in {**fixed, **methods}.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{folder}/compare.json: not what dckd_sr.compare writes ({reason(error)}); the same command writes it anew'
        ) from error
    experiments = folder.parent.parent / 'experiments'
    runs = [read_run(experiments / name, label) for name, label in named]
    changed = [run.name for run in runs if not _still(run, content['runs'][run.name].get('weights'))]
    if changed:
        notes.append(f'other weights than when the table was made: {", ".join(changed)}; compare makes it anew')
    return {'title': folder.name, 'rows': rows, 'notes': notes, 'scores': scores}, runs


def table_of(runs):
    """Of runs that no comparison put side by side: the scores of their last test, or of their last validation."""
    scores, fixed, notes = {}, {}, []
    for run in runs:
        file, results, means = *last_test(run, notes), {}
        try:
            for network, sets in results.items():
                found = {(s, m): float(v) for s, part in sets.items() for m, v in part['means'].items()}
                if network == 'student':
                    means = found
                else:
                    fixed[compare.TEACHER if network == 'teacher' else network] = found
            notes.append(f'{run.label}: tested, {file}')
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            if run.log.scores:
                last = max(run.log.scores)
                means = run.log.scores[last]
                notes.append(f'{run.label}: validation at iteration {last:,}')
        if means:
            scores[run.label] = means
        else:
            notes.append(f'{run.label}: neither tested nor validated')
    scores = {**{name: fixed[name] for name in (compare.TEACHER, 'bicubic') if name in fixed}, **scores}
    columns = list(dict.fromkeys(column for means in scores.values() for column in means))
    rows = [['Run', *(f'{name} {metric.upper()}' for name, metric in columns)]]
    for label, means in scores.items():
        rows.append([label, *(evaluation.format_value(metric, means.get((name, metric))) for name, metric in columns)])
    scores = {label: {column: [value] for column, value in means.items()} for label, means in scores.items()}
    return {'title': 'Runs', 'rows': [[(cell, '') for cell in row] for row in rows], 'notes': notes, 'scores': scores}


def last_test(run, notes):
    """(results.json of the last test of weights that the run has, its content); of a comparison's tests, too.

    Tests of other weights, under the run's name or of a former training, are noted.
    """
    results = run.path.parent.parent / 'results'
    files = [results / run.name / 'results.json', *results.glob(f'compare_*/tests/{run.name}/results.json')]
    for file in sorted(filter(Path.is_file, files), key=lambda file: -file.stat().st_mtime):
        try:
            content = json.loads(file.read_text(encoding='utf-8'))
            path, digest = content['made_from']['contents']['path.pretrain_network_g']
            if _still(run, {Path(path).name: digest}):
                return file, content['results']
            notes.append(f'{run.label}: {file} is left out, it is of other weights than those in {run.path}')
        except (OSError, ValueError, KeyError, TypeError):
            notes.append(f'{run.label}: {file} is left out, it does not say which weights it is of')
    return None, None


def _still(run, weights):
    """Whether files of a run (name -> digest) are there and the same; True where nothing is known."""
    try:
        return all(sources.digest(run.path / 'models' / name) == known for name, known in (weights or {}).items())
    except OSError:
        return False


def read_run(folder, label):
    resolved, opt = folder / 'resolved.yml', {}
    text = resolved.read_text(encoding='utf-8', errors='replace') if resolved.is_file() else ''
    if text:
        try:
            opt = safe_yaml.parse(text)
        except UserError as error:
            raise UserError(f'{resolved}: {error}') from error
    opt = opt if isinstance(opt, dict) else {}
    return Run(label, folder, opt, text, read_log(folder / 'metrics.jsonl'))


def read_log(path):
    """A `Log` of what is in a ``metrics.jsonl``; what a validation that was repeated says counts."""
    log = Log()
    for row in logs.read_metrics(path):
        if isinstance(row.get('start'), dict):
            log.about, log.finished = row['start'], False
            log.total = row['start'].get('total_iter')
        elif isinstance(row.get('validation'), dict):
            scores = log.scores.setdefault(row['iter'], {})
            scores.update({(name, m): v for name, values in row['validation'].items() for m, v in values.items()})
        elif 'end' in row:
            log.finished = True
        else:
            beside = ('epoch', 'iter', 'time', 'data_time')
            numbers = {name: v for name, v in row.items() if isinstance(v, (int, float)) and name not in beside}
            log.losses[row['iter']] = numbers
            log.seconds += [row['time']] if 'time' in row else []
            log.contrast += [row] if row.get('numerator') else []
    return log


def summary(run):
    """A row about a run: name, label, iterations, state, seconds of an iteration, best PSNR of its validation."""
    log, last = run.log, max(run.log.losses, default=0)
    state = 'finished' if log.finished else f'stopped at {last:,}' + (f' of {log.total:,}' if log.total else '')
    seconds = f'{statistics.median(log.seconds):.3f}' if log.seconds else '-'
    psnr = [
        (value, i, name)
        for i, values in log.scores.items()
        for (name, metric), value in values.items()
        if 'psnr' in metric.lower() and value is not None
    ]
    value, i, name = max(psnr, default=(None, None, None))
    best = '-' if value is None else f'{value:.4f} ({name}, iteration {i:,})'
    return [run.name, run.label, f'{last:,}', state, seconds, best]


def differences(runs):
    """Rows of (key, value of each label) where the options of the labels' first runs differ, under a row of heads."""
    first = {run.label: flat(run.options) for run in reversed(runs) if run.options}
    labels = list(dict.fromkeys(run.label for run in runs if run.label in first))
    keys = dict.fromkeys(key for label in labels for key in first[label])
    rows = [(key, *(first[label].get(key, '') for label in labels)) for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1 and row[0] not in ('name', 'manual_seed')]
    return [('key', *labels), *rows] if rows else []


def flat(options):
    """'train.cl_opt' -> text of the value; networks, and blocks in blocks, stay whole."""
    values = {}
    for key, value in options.items():
        whole = not isinstance(value, dict) or key.startswith('network_')
        for name, part in ({'': value} if whole else value).items():
            values[f'{key}.{name}'.rstrip('.')] = json.dumps(part, default=str)
    return values


def environment(runs):
    """(what, value) about the machine of the trainings, as the first log says, and about this one."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    trained = dict(next((run.log.about for run in runs if run.log.about), {}))
    trained.update(trained.pop('versions', {}))
    return [
        *((f'training: {key}', value) for key, value in trained.items()),
        ('report: dckd_sr', dckd_sr.__version__),
        ('report: Python, PyTorch', f'{platform.python_version()}, {torch.__version__}'),
        ('report: machine', f'{platform.platform()}, {device}, {torch.get_num_threads()} threads'),
    ]


def bounds(runs):
    """Rows of (label, level, numerator at first, at last, factor, denominator likewise, part left out).

    At first and at last are means of a tenth each.
    """
    rows = []
    for label, group in grouped(run for run in runs if run.log.contrast):
        for level in range(len(group[0].log.contrast[0]['numerator'])):
            row = [label, str(level + 1)]
            for part in ('numerator', 'denominator'):
                series = [[r[part][level] for r in run.log.contrast if r[part][level] is not None] for run in group]
                series = [values or [math.nan] for values in series]
                tenths = [max(1, len(values) // 10) for values in series]
                first = statistics.fmean(v for values, n in zip(series, tenths) for v in values[:n])
                last = statistics.fmean(v for values, n in zip(series, tenths) for v in values[-n:])
                row += [f'{first:.4g}', f'{last:.4g}', f'×{last / first:.2f}' if first else '-']
            left_out = [r['left_out'][level] for run in group for r in run.log.contrast if r.get('left_out')]
            rows.append([*row, f'{statistics.fmean(left_out):.0%}' if left_out else '-'])
    return rows


def grouped(runs):
    """[(label, its runs)] in order of appearance."""
    groups = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return list(groups.items())


if __name__ == '__main__':
    sys.exit(main())
