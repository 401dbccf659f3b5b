"""``python -m dckd_sr.compare -opt RECIPE --methods scratch,logits,dckd --seeds 3``: methods side by side, fairly.

A recipe is an option file with everything that any of the methods needs. Each method is the recipe without the blocks
of the others: networks, data, initial weights (by seed), order of the samples, schedule and number of iterations are
the same for all. Runs are ordinary ones under ``experiments/``; finished ones stay and those that were cut off continue
as long as what they are made from is the same by content (see `sources`).
"""

from __future__ import annotations

import copy
import csv
import itertools
import json
import logging
import math
import os
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from basicsr.utils import get_time_str

from dckd_sr import evaluation, logs, option_files, options, safe_yaml, sources, test
from dckd_sr.commands import Parser
from dckd_sr.errors import UserError, entry_point, nearest
from dckd_sr.option_checks import Report
from dckd_sr.option_keys import DROP_IN_LOSSES

# Name -> blocks of `train`. Names are joined by +.
METHODS = {
    'scratch': (),
    'logits': ('logits_opt',),
    'dcr': ('logits_opt', 'cl_opt'),
    'dmm': ('logits_opt', 'ce_opt'),
    'dckd': ('logits_opt', 'cl_opt', 'ce_opt'),
    'lcr': ('logits_opt', 'lcr_opt'),
    'fakd': ('logits_opt', 'fakd_opt'),
    'csd': ('csd_opt',),
    'mclir': ('mclir_opt',),
    'dukd': ('logits_opt', 'dukd_opt'),
}
# What is left out where none of these blocks is there.
NETWORKS = {
    'network_t': tuple(block for block in DROP_IN_LOSSES if block != 'mclir_opt'),
    'network_his': ('cl_opt', 'mclir_opt'),
    'network_vqgan': ('cl_opt', 'ce_opt', 'mclir_opt'),
}
SHOWN = {'scratch': 'Scratch', 'logits': 'Logits'}  # the others are capitals
TEACHER = 'Teacher'
# What is counted in iterations, and shrinks and grows with --steps.
_COUNTED = {
    'train': ('step', 'step_period'),
    'scheduler': ('milestones', 'periods', 'restarts', 'T_max', 'total_steps', 'step_size', 'total_iters'),
    'val': ('val_freq',),
    'logger': ('print_freq', 'save_checkpoint_freq'),
}
_LINE = 60  # seconds between two lines about what trains, where there is no terminal


@dataclass
class Run:
    """One training: a method with a seed.

    Attributes:
        method: its column name, as asked for.
        options: the whole option file.
        path: where it is written.
        made_from: what its weights depend on, see `sources.of_training`.
    """

    method: str
    seed: int
    options: dict
    path: Path
    made_from: dict = field(default_factory=dict)

    @property
    def name(self):
        return self.options['name']

    @property
    def folder(self):
        return Path('experiments') / self.name

    @property
    def log(self):
        return self.path.with_suffix('.log')


@entry_point('interrupted; the same command continues')
def main(argv=None):
    """Command line entry point.

    Returns:
        exit code: 0 done, 2 a mistake in options, paths or images (one message, no traceback), 130 interrupted.
    """
    about = 'Train and test distillation methods side by side, as a recipe says.'
    parser = Parser(prog='python -m dckd_sr.compare', description=about)
    add = parser.add_argument
    add('-opt', '--opt', required=True, metavar='RECIPE', help='option file with the blocks of all methods')
    add('--methods', default='scratch,logits,dckd', help=f'of {", ".join(METHODS)}, joined by + and of compare.methods')
    add('--seeds', type=int, default=3, metavar='N', help='trainings of each method: manual_seed, manual_seed + 1, ...')
    add('--steps', type=int, metavar='N', help='iterations; schedules and history steps shrink or grow with it')
    add('--jobs', type=int, metavar='N', help='trainings at a time (default: one a GPU; one on the CPU)')
    add('--force_yml', nargs='+', metavar='A:B=VALUE', help='set keys of the recipe; values are YAML')
    args = parser.parse_args(argv)
    for path in compare(args.opt, args.methods.split(','), args.seeds, args.steps, args.jobs, args.force_yml):
        print(f'  {path}')


def compare(recipe, methods, seeds=3, steps=None, jobs=None, overrides=()):
    """Train, test and tabulate.

    Args:
        recipe: path of the option file, or the name of a shipped one.
        methods: names, see `METHODS`; ``compare.methods`` of the recipe adds names of its own.
        seeds: trainings a method.
        steps: iterations of each, or None for the recipe's.
        jobs: trainings at a time.
        overrides: as --force_yml.

    Returns:
        paths of the tables.

    Raises:
        UserError: a mistake in the recipe, an unknown method, or a training that failed.
    """
    if seeds < 1 or (steps is not None and steps < 1) or (jobs is not None and jobs < 1):
        raise UserError('--seeds, --steps and --jobs are at least 1')
    file = option_files.read(recipe)
    option_files.apply_overrides(file.options, overrides)
    runs = plan(file.options, methods, seeds, steps)
    folder = Path('results') / f'compare_{file.options.get("name")}'
    for run in runs:
        run.path = folder / 'options' / f'{run.name}.yml'
        if run.path.exists() and run.path.samefile(file.path):
            raise UserError(f'-opt {recipe}: the option file of {run.name} would be written over it: copy it elsewhere')
        run.options = safe_yaml.parse(safe_yaml.dump(run.options))  # as the training will read it
        report, tested = Report(), Report()
        trained = options.resolve(run.options, True, report)
        problems, resolved = report.problems, options.resolve(run.options, False, tested)
        # What would stop the test is better told before the training; the weights are what that makes.
        for problem in tested.problems:
            if problem not in problems and not problem.startswith('path.pretrain_network_g'):
                problems.append(problem)
        if problems:
            raise option_files.OptionError(problems, f'{recipe}, method {run.method}')
        run.made_from = sources.of_training(trained)
    refuse(runs, steps)
    for note in test.split_sets(resolved['datasets'])[1].values():  # every run has the same sets
        print(note)
    archive_tables(folder, runs)
    for run in runs:
        record(run, steps)
    train_all(runs, jobs)
    return write_tables(folder, *score(runs), runs)


# ---------------------------------------------------------------------------------------------------------------------
# What is run


def plan(recipe, methods, seeds, steps):
    """The runs, seed by seed, so that what is there when time is up compares all methods."""
    recipe = copy.deepcopy(recipe)
    own = _own_methods(recipe.pop('compare', None))
    methods = list(dict.fromkeys(method.strip() for method in methods if method.strip()))
    if not methods:
        raise UserError('--methods: no name given')
    if steps is not None:
        rescale(recipe, steps)
    base = recipe.get('manual_seed') or 0
    runs = []
    for number, method in itertools.product(range(seeds), methods):
        opt, seed = method_options(recipe, method, own), base + number
        opt.update(name=f'{recipe.get("name")}_{slug(method)}_s{seed}', manual_seed=seed)
        for key, path in (opt.get('path') or {}).items():  # weights of each seed's own
            if isinstance(path, str):
                opt['path'][key] = path.replace('{seed}', str(seed))
        runs.append(Run(method, seed, opt, Path()))
    names = {}
    for run in runs:  # folders of one name are one folder on some file systems
        other = names.setdefault(run.name.casefold(), run)
        if other is not run:
            text = f"'{other.method}' and '{run.method}' would both be trained as {run.name}: rename one"
            raise UserError(f'--methods: {text}')
    for run in runs:
        if _scored_by(run.options) != _scored_by(runs[0].options):
            text = f"'{run.method}' and '{runs[0].method}' would not be scored alike"
            raise UserError(f'--methods: {text}: set scale, the sets and val.metrics in the recipe, not in one method')
    return runs


def _scored_by(opt):
    sets = {name: block for name, block in (opt.get('datasets') or {}).items() if name != 'train'}
    return opt.get('scale'), sets, (opt.get('val') or {}).get('metrics')


def _own_methods(block):
    """compare.methods of a recipe.

    Raises:
        UserError: not names with lists of texts.
    """
    form = 'expected names, each with uses: [METHOD, ...] and, perhaps, force_yml: [...]'
    if block is not None and not isinstance(block, dict):
        raise UserError(f'compare = {safe_yaml.inline(block)}: expected a block with methods:')
    own = (block or {}).get('methods') or {}
    if not isinstance(own, dict) or not all(isinstance(entry, dict) for entry in own.values()):
        raise UserError(f'compare.methods: {form}')
    parts = ('uses', 'force_yml')
    for name, key, value in ((name, key, value) for name, entry in own.items() for key, value in entry.items()):
        if key not in parts:
            raise UserError(f'compare.methods.{name}.{key}: unknown{nearest(key, parts)}; {form}')
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise UserError(f'compare.methods.{name}.{key} = {safe_yaml.inline(value)}: {form}')
    return own


def method_options(recipe, method, own=None):
    """The recipe with the blocks of one method.

    Raises:
        UserError: no such method, or the recipe lacks one of its blocks.
    """
    own, opt = own or {}, copy.deepcopy(recipe)
    entry = own.get(method, {})
    parts = entry.get('uses', []) if method in own else method.split('+')
    unknown = [part for part in parts if part not in METHODS]
    if unknown:
        known = [*METHODS, *own]
        hint = nearest(unknown[0], known)
        raise UserError(f"--methods: no method named '{unknown[0]}'{hint}; known: {', '.join(known)}")
    used = set(itertools.chain.from_iterable(METHODS[part] for part in parts))
    train = opt.get('train') or {}
    lacking = sorted(block for block in used if not train.get(block))
    if lacking:
        raise UserError(f'the recipe has no train.{lacking[0]}, which the method {method} needs')
    for block in DROP_IN_LOSSES:
        if block not in used:
            train.pop(block, None)
    shares = {block: share for block, share in (train.get('gradient_shares') or {}).items() if block in used}
    train.pop('gradient_shares', None)
    train.update({'gradient_shares': shares} if shares else {})
    for network, needed_by in NETWORKS.items():
        if not used & set(needed_by):
            opt.pop(network, None)
            letter = network.rpartition('_')[2]
            for key in ('pretrain_network', 'strict_load', 'param_key'):
                (opt.get('path') or {}).pop(f'{key}_{letter}', None)
    if 'network_t' not in opt:
        ((opt.get('datasets') or {}).get('train') or {}).pop('teacher_cache', None)
    option_files.apply_overrides(opt, entry.get('force_yml'))
    return opt


def rescale(opt, steps):
    """Set total_iter, and everything that is counted in iterations with it, in place."""
    train, total = opt.get('train') or {}, (opt.get('train') or {}).get('total_iter')
    if not isinstance(total, int) or total < 1:
        raise UserError('--steps: train.total_iter of the recipe is missing, or no whole number')

    def scaled(value):
        return max(1, round(value * steps / total)) if isinstance(value, (int, float)) else value

    blocks = {'train': train, 'scheduler': train.get('scheduler'), 'val': opt.get('val'), 'logger': opt.get('logger')}
    for name, keys in _COUNTED.items():
        block = blocks[name] or {}
        for key in keys:
            if key in block:
                block[key] = [scaled(v) for v in block[key]] if isinstance(block[key], list) else scaled(block[key])
    periods = (train.get('scheduler') or {}).get('periods')
    if isinstance(periods, list):
        periods[-1] += max(0, steps - sum(periods))  # rounding must not end the schedule early
    train['total_iter'] = steps
    if train.get('warmup_iter', -1) > 0:
        train['warmup_iter'] = scaled(train['warmup_iter'])


def slug(method):
    """A method's name as a part of file names."""
    return re.sub(r'[^\w.-]+', '_', method).strip('_')


def label(method):
    """A method's name in tables."""
    if '+' not in method and method not in METHODS:
        return method
    return '+'.join(SHOWN.get(part, part.upper()) for part in method.split('+'))


# ---------------------------------------------------------------------------------------------------------------------
# Running


def refuse(runs, steps):
    """Nothing that is finished gives way to another number of steps, and nothing that a run reads is moved aside.

    Args:
        steps: as `compare`.

    Raises:
        UserError: it would; the message names what helps.
    """
    todo = [run for run in runs if not finished(run)]
    for run in todo:
        former, wanted = sources.read(run.folder), run.options['train']['total_iter']
        if not former and list(run.folder.glob('models/net_g_latest.*')):
            raise UserError(
                f'{run.folder} has no {sources.RECORD}, which would say what it was made from (an earlier version of '
                'dckd_sr wrote none): move it away, or give this comparison another name with --force_yml name=NAME'
            )
        count = former['made_from']['options'].get('train.total_iter') if former.get('weights') else wanted
        if count != wanted and (steps is not None or _steps_of(run)):
            name = run.path.parents[1].name.removeprefix('compare_')
            raise UserError(
                f'{f"--steps {steps}" if steps is not None else f"{wanted} iterations"}: {run.name} is finished with '
                f'{count} iterations, and would be moved aside with its table; give this comparison a name of its own: '
                f'--force_yml name={name}_{wanted}'
            )
    for run, other in itertools.product(runs, todo):
        for key, (path, _) in run.made_from.get('contents', {}).items():
            if other.folder.resolve() in Path(path).resolve().parents:
                raise UserError(
                    f'{run.name}: {key} = {path} is of {other.name}, which this comparison trains, too: '
                    'make what is read first, by a comparison of its own'
                )


def train_all(runs, jobs=None):
    """Train what is not finished: as many at a time as there are GPUs, each with one of its own.

    Raises:
        UserError: a training failed; the others that were under way have ended, and no further one was started.
    """
    todo, gpus = queue.SimpleQueue(), visible_gpus() if runs[0].options.get('num_gpu') != 0 else []
    waiting = [run for run in runs if not finished(run)]
    for run in waiting:
        todo.put(run)
    jobs = jobs or max(1, len(gpus))
    print(f'{len(runs)} trainings, {len(runs) - len(waiting)} of them finished, {jobs} at a time', flush=True)
    failed, stop, began, done = [], threading.Event(), time.monotonic(), itertools.count(1)
    live = Live()

    def work(slot):
        environment = {**os.environ, **({'CUDA_VISIBLE_DEVICES': gpus[slot % len(gpus)]} if gpus else {})}
        while not stop.is_set():
            try:
                run = todo.get_nowait()
            except queue.Empty:
                return
            started = time.monotonic()
            live.begin(run, how_it_starts(run))
            code, message = train(run, environment)
            if code:
                failed.append((code, f'{run.name}: {message}'))
                live.end(run, f'{run.name}: failed')
                stop.set()
                return
            count, now = next(done), time.monotonic()
            left = _duration((now - began) / count * (len(waiting) - count))
            took = _duration(now - started)
            live.end(run, f'{run.name}: {took}; {count} of {len(waiting)}, about {left} left')

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(min(jobs, len(waiting)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # waits for seconds only, so that Ctrl-C is heard
                live.show()
    except KeyboardInterrupt:
        stop.set()  # the trainings have heard the signal, too, and save
        for thread in threads:
            thread.join()
        raise
    if any(code in (130, 143) for code, _ in failed):
        raise KeyboardInterrupt
    if failed:
        raise UserError(failed[0][1])


def visible_gpus():
    """What CUDA_VISIBLE_DEVICES is to be for a training on each of the GPUs that the user lets this process see.

    They may be named by index, UUID or MIG device, of which last CUDA shows one process the first one only.
    """
    count, named = torch.cuda.device_count(), os.environ.get('CUDA_VISIBLE_DEVICES')
    if named is None or not count:
        return [str(index) for index in range(count)]
    named = list(dict.fromkeys(name.strip() for name in named.split(',')))
    return named if all(name.startswith('MIG-') for name in named) else named[:count]


class Live:
    """What trains now: a line that changes on a terminal, elsewhere one a minute."""

    def __init__(self):
        self.runs, self.lock, self.shown, self.printed = {}, threading.Lock(), '', time.monotonic()

    def begin(self, run, how):
        with self.lock:
            self._clear()
            print(f'{run.name}: {how}; log: {run.log}', flush=True)
            self.runs[run.name] = run, time.time()

    def end(self, run, text):
        with self.lock:
            self._clear()
            del self.runs[run.name]
            print(text, flush=True)

    def show(self):
        with self.lock:
            terminal, now = sys.stdout.isatty(), time.monotonic()
            if now - self.printed < (1 if terminal else _LINE) or not self.runs:
                return
            self.printed = now
            text = '; '.join(f'{run.name} {_progress(run, start)}' for run, start in self.runs.values())
            if terminal:
                self._clear()
                self.shown = text[: shutil.get_terminal_size().columns - 1]
                print(self.shown, end='', flush=True)
            else:
                print(text, flush=True)

    def _clear(self):
        if self.shown:
            print('\r' + ' ' * len(self.shown), end='\r')
            self.shown = ''


def _progress(run, began):
    """'1,200 of 50,000, 1 h 02 min left', by the last row of its metrics that was written since ``began``."""
    path, total = run.folder / 'metrics.jsonl', run.options['train']['total_iter']
    try:
        written = path.stat().st_mtime >= began
        rows = [row for row in logs.read_metrics(path) if 'time' in row] if written else []
    except OSError:
        rows = []
    if not rows:
        return 'starts'
    left = _duration((total - rows[-1]['iter']) * rows[-1]['time'])
    return f'{rows[-1]["iter"]:,} of {total:,}, {left} left'


def finished(run):
    """Whether this very training, by what it is made from, is at its end, and its weights are as it left them."""
    return sources.lacking(run.folder, run.made_from) is None and sources.final_weights(run.folder) is not None


def how_it_starts(run):
    """In words; a folder of this name that holds another training is moved aside by the training itself."""
    why = sources.lacking(run.folder, run.made_from) if run.folder.exists() else 'new'
    if why in (None, 'new'):
        return 'training' if why else 'continues'
    return f'training anew, the run that is there is moved aside ({why})'


def record(run, steps=None):
    """Write the run's option file, with which it is trained and tested; what it was made from is in its own folder."""
    text = _steps_of(run) if finished(run) else f'{_BY_STEPS}{steps}\n' if steps is not None else ''
    run.path.parent.mkdir(parents=True, exist_ok=True)
    run.path.write_text(text + safe_yaml.dump(run.options), encoding='utf-8')


_BY_STEPS = '# compare --steps '


def _steps_of(run):
    """The line of the run's option file that says that --steps was given, or ''."""
    try:
        first = run.path.read_text(encoding='utf-8', errors='replace').partition('\n')[0]
    except OSError:
        return ''
    return f'{first}\n' if first.startswith(_BY_STEPS) else ''


def archive_tables(folder, runs):
    """Give the tables of another recipe, whose finished runs are about to be moved aside, a name of their own."""
    if any(sources.read(run.folder).get('weights') and not finished(run) for run in runs):
        now = get_time_str()
        for path in sorted(folder.glob('compare.*')):
            path.rename(path.with_name(f'compare_archived_{now}{path.suffix}'))
        print(f'{folder}: tables of what was trained before are now compare_archived_{now}.*')


def train(run, environment):
    """One training as a process of its own.

    Returns:
        (exit code, its last message).
    """
    again = sources.lacking(run.folder, run.made_from) is None
    command = [sys.executable, '-m', 'dckd_sr.train', '-opt', str(run.path), *(['--auto_resume'] if again else [])]
    with open(run.log, 'ab') as file:
        start = file.seek(0, os.SEEK_END)
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    lines = run.log.read_bytes()[start:].decode(errors='replace').strip().splitlines()
    errors = [line.removeprefix('error: ') for line in lines if line.startswith('error: ')]
    if code < 0:
        errors.append(f'ended by {_signal(-code)}')
    elif code == 0 and sources.final_weights(run.folder) is None:
        code = 130  # by SIGUSR1, which is no failure: it has saved
    message = (errors or lines or ['no message'])[-1]
    return code, f'{message} (all of it: {run.log})'


def _signal(number):
    try:
        return signal.Signals(number).name
    except ValueError:
        return f'signal {number}'


def _duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours} h {minutes:02} min' if hours else f'{minutes} min {seconds:02} s' if minutes else f'{seconds} s'


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score(runs):
    """Test every run, the teacher and bicubic once.

    Returns:
        (method -> (set, metric) -> seed -> mean; row -> (set, metric) -> [mean] for teacher and bicubic).
    """
    scores, fixed = {}, {}
    teacher = next((run for run in runs if run.options.get('network_t')), None)
    for run in runs:
        whole = run is teacher or (teacher is None and run is runs[0])
        results = tested(run, whole, run.seed == runs[0].seed)
        for network, sets in results.items():
            means = {(name, metric): value for name, part in sets.items() for metric, value in part['means'].items()}
            if network == 'student':
                for column, value in means.items():
                    scores.setdefault(run.method, {}).setdefault(column, {})[run.seed] = float(value)
            elif whole:
                row = TEACHER if network == 'teacher' else network
                fixed[row] = {column: [float(value)] for column, value in means.items()}
    return scores, fixed


def tested(run, whole, pictures):
    """A run's results by set, from its file where what they are made from is the same.

    They lie beside the tables: what is in ``results/RUN`` is of tests that the user runs.

    Args:
        whole: with the rows of bicubic and of the teacher.
        pictures: keep the images, to look at.
    """
    weights, folder = sources.final_weights(run.folder), run.path.parents[1] / 'tests' / run.name
    if weights is None:
        raise UserError(f'{run.folder}: its final weights are not those of its training any more')
    teacher = whole and bool(run.options.get('network_t'))
    # The run's file says how the weights that it began with are read.
    argv = ['-opt', str(run.path), '--force_yml', f'path:pretrain_network_g={weights}']
    argv += ['path:param_key_g=~', 'path:strict_load_g=~']
    argv += (['--with_teacher'] if teacher else []) if whole else ['--no_bicubic']
    argv += ['--save_img'] if pictures else []
    opt, args, _ = options.parse(argv, is_train=False, command=test.parser())
    opt['path'].update(results_root=str(folder), log=str(folder), visualization=str(folder / 'visualization'))
    kept = folder / 'results.json'
    try:
        content = json.loads(kept.read_text(encoding='utf-8'))
        needed = {'student', *(['teacher'] if teacher else []), *(['bicubic'] if whole and opt['scale'] > 1 else [])}
        changed = sources.difference(content['made_from'], test.made_from(opt, args))
        if changed is None and needed <= set(content['results']):
            return content['results']
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or not a whole one
    logging.disable(logging.INFO)  # the table is what the user asked for
    try:
        test.test(opt, args)
    finally:
        logging.disable(logging.NOTSET)
    return json.loads(kept.read_text(encoding='utf-8'))['results']


def seconds_per_step(runs):
    """Method -> median of what an iteration took, in seconds; absent where its runs have written nothing."""
    times = {}
    for run in runs:
        rows = logs.read_metrics(run.folder / 'metrics.jsonl')
        times.setdefault(run.method, []).extend(row['time'] for row in rows if 'time' in row)
    return {method: statistics.median(values) for method, values in times.items() if values}


def write_tables(folder, scores, fixed, runs):
    """``compare.md``, ``.tex`` and ``.csv`` in the layout of the paper's Table 2, and ``.json`` with every number.

    Mean and standard deviation (of the sample) over the seeds; the best method bold, the second underlined, the teacher
    on top.

    Args:
        scores, fixed: see `score`.

    Returns:
        the paths.
    """
    columns = list(dict.fromkeys(column for means in [*fixed.values(), *scores.values()] for column in means))
    lower, seeds = _lower(runs), sorted({run.seed for run in runs})
    best = {column: _ranked(column, scores, lower) for column in columns}
    listed = {m: {c: list(by_seed.values()) for c, by_seed in means.items()} for m, means in scores.items()}
    rows = [(name, fixed[name], {}) for name in (TEACHER, 'bicubic') if name in fixed]
    rows += [(label(method), means, {c: best[c].get(method) for c in columns}) for method, means in listed.items()]
    seconds, paired = seconds_per_step(runs), _paired(scores, columns)
    counts = {run.method: run.options['train']['total_iter'] for run in runs}
    iterations = f'{runs[0].options["train"]["total_iter"]} iterations'
    others = [f'{label(m)} {count}' for m, count in counts.items() if count != counts[runs[0].method]]
    iterations += f' ({", ".join(others)})' if others else ''
    if len(seeds) > 1:
        about = [f'{iterations}, seeds {", ".join(map(str, seeds))}', 'mean and standard deviation over seeds']
    else:
        about = [f'{iterations}, seed {seeds[0]} alone: how far seeds differ is not known']
    about[-1] += '; best bold, second underlined'
    about += [
        *_other_teachers(runs),
        *(f'{label(m)}: {s:.3f} s an iteration' for m, s in seconds.items()),
        *(
            f'{label(m)}, {" ".join(column)}: seeds {", ".join(map(str, sorted(by_seed)))} only'
            for m, means in scores.items()
            for column, by_seed in means.items()
            if len(by_seed) < len({run.seed for run in runs if run.method == m})
        ),
        *paired,
    ]
    kinds = {'md': _markdown, 'tex': _latex}
    paths = [folder / f'compare.{kind}' for kind in (*kinds, 'csv', 'json')]
    content = {
        'seeds': seeds,  # the order of the values below; null where there is none
        'methods': {
            m: {f'{s} {k}': [by_seed.get(seed) for seed in seeds] for (s, k), by_seed in means.items()}
            for m, means in scores.items()
        },
        'fixed': {n: {f'{s} {k}': values[0] for (s, k), values in means.items()} for n, means in fixed.items()},
        'seconds_per_step': seconds,
        'table': {
            'columns': columns,
            'rows': [
                {
                    'name': name,
                    'cells': [_cell(column[1], means.get(column), ' ± ') for column in columns],
                    'places': [places.get(column) for column in columns],  # 1 the best, 2 the second
                }
                for name, means, places in rows
            ],
            'notes': about,
        },
        'runs': {
            run.name: {'method': run.method, 'seed': run.seed, 'weights': sources.read(run.folder).get('weights')}
            for run in runs
        },
    }
    try:
        for path, write in zip(paths, kinds.values()):
            path.write_text(write(columns, rows, about), encoding='utf-8')
        with open(paths[2], 'w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file)
            writer.writerow(['method', 'set', 'metric', 'mean', 'std', 'seeds'])
            for name, means in [*fixed.items(), *((label(m), means) for m, means in listed.items())]:
                for (set_name, metric), values in means.items():
                    writer.writerow([name, set_name, metric, statistics.mean(values), _spread(values), len(values)])
        paths[3].write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    except OSError as error:
        raise UserError(f'cannot write the tables to {folder}: {error}') from error
    print(paths[0].read_text(encoding='utf-8'))
    return paths


def _spread(values):
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def _lower(runs):
    """Names of the metrics of which less is better: by their option ``better``, and NIQE."""
    metrics = {}
    for run in runs:
        metrics.update((run.options.get('val') or {}).get('metrics') or {})
    niqe = {name for name, metric in metrics.items() if 'niqe' in str(metric.get('type')).lower()}
    better = {name: metric.get('better') or ('lower' if name in niqe else 'higher') for name, metric in metrics.items()}
    return {name for name, which in better.items() if which == 'lower'}


def _ranked(column, scores, lower):
    """Method -> 1 or 2, by the mean as it is printed."""
    sign = -1 if column[1] in lower else 1
    means = {
        m: sign * float(evaluation.format_value(column[1], statistics.mean(values[column].values())))
        for m, values in scores.items()
        if column in values
    }
    places = sorted(set(means.values()), reverse=True)
    return {method: places.index(value) + 1 for method, value in means.items()} if len(means) > 1 else {}


def _paired(scores, columns):
    """Differences to scratch (or the first method) with the same seeds: their spread is what a gain must exceed."""
    reference = 'scratch' if 'scratch' in scores else next(iter(scores))
    lines = []
    for method, column in itertools.product(scores, columns):
        ours, theirs = scores[method].get(column, {}), scores[reference].get(column, {})
        differences = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
        if method == reference or 'psnr' not in column[1].lower() or not differences:
            continue
        gain, what = f'{statistics.mean(differences):+.3f}', 'one seed'
        if len(differences) > 1:
            gain, what = f'{gain} ± {_spread(differences):.3f}', 'paired by seed'
        lines.append(f'{label(method)} against {label(reference)}, {column[0]}: {gain} dB, {what}')
    return lines


def _other_teachers(runs):
    """A line about each method whose teacher is not the one of the teacher's row."""

    def teacher(run):
        parts = [run.made_from.get(part, {}) for part in ('options', 'contents')]
        keys = ('network_t', 'path.pretrain_network_t', 'path.param_key_t')
        found = [{k: v for k, v in part.items() if k.startswith(keys)} for part in parts]
        return found[0], {key: content[1] for key, content in found[1].items()}

    taught = [run for run in runs if run.options.get('network_t')]
    methods = dict.fromkeys(run.method for run in taught if teacher(run) != teacher(taught[0]))
    return [f'{label(method)}: its teacher is another than that of the row above' for method in methods]


def _cell(metric, values, plus_minus):
    if not values:
        return '-'
    digits = 2 if 'psnr' in metric.lower() else 4
    spread = f'{plus_minus}{_spread(values):.{digits}f}' if len(values) > 1 else ''
    return evaluation.format_value(metric, statistics.mean(values)) + spread


def _markdown(columns, rows, about):
    lines = ['| Method | ' + ' | '.join(f'{name} {metric.upper()}' for name, metric in columns) + ' |']
    lines.append('| --- |' + ' ---: |' * len(columns))
    for name, means, places in rows:
        cells = [_cell(column[1], means.get(column), ' ± ') for column in columns]
        marks = {1: '**%s**', 2: '<u>%s</u>'}
        cells = [marks.get(places.get(column), '%s') % cell for column, cell in zip(columns, cells)]
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join([*lines, '', *(f'- {line}' for line in about)]) + '\n'


def _latex(columns, rows, about):
    def escape(text):
        return re.sub(r'([&%$#_{}])', r'\\\1', text)

    sets = [(name, len(list(group))) for name, group in itertools.groupby(columns, lambda column: column[0])]
    lines = ['% needs the package booktabs', *(f'% {line}' for line in about)]
    lines += [rf'\begin{{tabular}}{{l{"c" * len(columns)}}}', r'\toprule']
    lines.append(' & '.join(['Method', *(rf'\multicolumn{{{n}}}{{c}}{{{escape(name)}}}' for name, n in sets)]) + r' \\')
    lines.append(' & '.join(['', *(escape(metric.upper()) for _, metric in columns)]) + r' \\')
    lines.append(r'\midrule')
    for name, means, places in rows:
        cells = [_cell(column[1], means.get(column), r' $\pm$ ') for column in columns]
        marks = {1: r'\textbf{%s}', 2: r'\underline{%s}'}
        cells = [marks.get(places.get(column), '%s') % cell for column, cell in zip(columns, cells)]
        lines.append(' & '.join([escape(name), *cells]) + r' \\')
    return '\n'.join([*lines, r'\bottomrule', r'\end{tabular}']) + '\n'


if __name__ == '__main__':
    sys.exit(main())
