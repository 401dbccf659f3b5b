"""How fast a training step and its networks are here, and how far from what the device can do.

    python -m dckd_sr.benchmark step -opt FILE      parts of a step, and the step in the released code's order beside it
    python -m dckd_sr.benchmark infer -opt FILE     student and teacher side by side

Neither data nor weights are needed: batches come from a seed, and weights that are not there are random.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import platform
import re
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import dckd_sr  # noqa: F401  (everything registers)

# isort: split
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from dckd_sr import (
    complexity,
    devices,
    logs,
    option_checks,
    option_files,
    option_keys,
    options,
    precision,
    processes,
    step_parts,
    train,
)
from dckd_sr.commands import Parser
from dckd_sr.data import build_train_loader
from dckd_sr.errors import UserError, entry_point
from dckd_sr.models.dckd_model import DCKDModel
from dckd_sr.models.kd_model import KDModel
from dckd_sr.ops.seeding import generator
from dckd_sr.released import ReleasedStep
from dckd_sr.speed import Speed

# Architectures of weights files that network_t reads them from, for where the file is not there.
_TEACHERS = {
    r'RCAN_BIX(?P<upscale>[2348])\.pt': {
        'type': 'RCAN', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 64, 'num_group': 10, 'num_block': 20,
        'squeeze_factor': 16,
    },
}  # fmt: skip
_NEEDED = {'amp_bf16': 'use_amp', 'amp_networks': 'use_amp', 'compile_mode': 'use_compile'}
_DATA = {'name': 'synthetic', 'type': 'SRImageDataset', 'dataroot_gt': '.'}
_LEAST_PAIRS = 5
_SLICE = 0.5  # seconds of steps that one time stands for, at least
# Largest relative differences to the reference: of a loss, and of the gradient's norm.
_EXACT, _FAST = (1e-4, 1e-2), (5e-2, 0.5)


@entry_point()
def main(argv=None):
    """Command line entry point.

    Returns:
        exit code: 0 done, 1 done, but the step differs from the reference, so that no ratio is given, 2 a mistake in
        options or arguments (one message, no traceback), 130 interrupted.
    """
    args = _parser().parse_args(argv)
    check_json(args.json, args.opt)
    return args.run(args)


def check_json(path, option_file=None):
    """Raises UserError where --json cannot be written, or is the option file itself."""
    if path not in (None, '-') and not Path(path).absolute().parent.is_dir():
        raise UserError(f'--json {path}: no such folder')
    if option_file is not None:
        target, read = Path(path or '-'), option_files.find(option_file)[0]
        if target.is_file() and read.is_file() and target.samefile(read):
            raise UserError(f'--json {target}: the option file itself; name another file')


class _Parser(Parser):
    def error(self, message):
        raise UserError(f'{message}{self.hint(message)}; {self.prog} --help')


def _parser():
    parser = _Parser(prog='python -m dckd_sr.benchmark', description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        add = sub.add_argument
        add('-opt', '--opt', required=True, metavar='FILE', help='option file of a training, or a shipped one by name')
        add('--device', help='cuda or cpu; default: a GPU if there is one')
        add('--json', metavar='FILE', help='write the figures there; - prints them in place of the table')
        add('--force_yml', nargs='+', metavar='A:B=VALUE', help='set keys of the file, such as use_amp=true')
        return add

    add = command('step', _step, 'time, FLOPs and memory of a training step, part by part')
    add('--batch', type=int, metavar='N', help="images of a batch; default: the file's batch_size_per_gpu")
    add('--pairs', type=int, default=5, metavar='N', help='steps timed in turn with the released order; 0: without it')
    add('--data', action='store_true', help="feed the file's own data; 'data' is then the wait for its loader")
    add('--memory', action='store_true', help='predict what a GPU needs to hold, in place of timing; takes no GPU')
    add = command('infer', _infer, 'latency, throughput and cost of student and teacher')
    add('--batch', type=int, default=1, metavar='N', help='images of a batch, for the throughput; default 1')
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Options


def load(path, overrides=(), device=None, keep_data=False, networks_only=False):
    """Options of a training that needs no files, unless they are there.

    Args:
        path, overrides: see `options.load`.
        device: 'cpu', 'cuda' or None.
        keep_data: leave the training data in.
        networks_only: a file without training serves, too.

    Returns:
        dict: as `options.load`, for one process, without validation; one micro-batch is a step.

    Raises:
        UserError: what is wrong with the file, but for files that are not there, or with the device.
    """
    if device not in (None, 'cpu', 'cuda'):
        raise UserError(f'--device {device}: expected cuda or cpu')
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: there is no GPU here')
    file, report = option_files.read(path), option_checks.Report()
    raw = file.options
    option_files.apply_overrides(raw, overrides)
    option_checks.resolve_zoo(report, raw)
    is_train = not networks_only or raw.get('train') is not None
    if is_train and not keep_data:
        _check_data(raw, report)
    if raw.get('device') in devices.KINDS:
        del raw['device']  # --device says it
    _without_files(raw, keep_data)
    if not is_train:
        raw['datasets'] = {'test_1': _DATA}
    opt = options.resolve(raw, is_train, report)
    if report.problems:
        raise option_files.OptionError(report.problems, path)
    opt['num_gpu'] = 0 if device == 'cpu' or not torch.cuda.is_available() else 1
    if is_train:
        opt['train']['accum_iter'] = 1
    return opt


def _check_data(raw, report):
    """What is wrong with the training data's keys, which go before the rest is checked, but for files."""
    whole = option_checks.Report()
    options.resolve(copy.deepcopy(raw), True, whole)
    sizes = r'scale\b|datasets\.train\.(batch_size_per_gpu|gt_sizes?|mini_batch_sizes|iters)\b'
    for problem in whole.problems:
        if re.match(sizes, problem) or (problem.startswith('datasets.train.') and 'unknown key' in problem):
            report.problems.append(problem)


def _without_files(raw, keep_data):
    """Take from a file's options what names other files, in place."""
    paths = raw.get('path')
    if isinstance(paths, dict):
        raw['path'] = {key: value for key, value in paths.items() if not key.startswith(('pretrain_', 'resume_'))}
    for key in ('network_t', 'network_vqgan'):
        if isinstance(raw.get(key), dict):
            raw[key]['allow_random'] = True
    teacher = raw.get('network_t')
    if isinstance(teacher, dict) and teacher.get('type') == 'spandrel':
        raw['network_t'] = {**_stand_in(teacher), 'allow_random': True}
    for block in (raw.get('train') or {}).values() if isinstance(raw.get('train'), dict) else ():
        if isinstance(block, dict) and isinstance(block.get('encoder'), dict):
            block['encoder'] = {**block['encoder'], 'pretrain': None, 'allow_random': True}
    datasets = raw.get('datasets')
    if isinstance(datasets, dict):
        datasets = {name: block for name, block in datasets.items() if name == 'train'}
        if not keep_data and isinstance(datasets.get('train'), dict):
            kept = ('gt_size', 'batch_size_per_gpu')
            block = {key: value for key, value in datasets['train'].items() if key in kept}
            datasets['train'] = {**_DATA, **block}
        raw['datasets'] = datasets
    raw.pop('val', None)


def _stand_in(block):
    """A network of the architecture that a weights file holds; the file itself where it is there."""
    path = Path(option_keys.expand(str(block.get('path'))))
    if path.is_file():
        return block
    for pattern, network in _TEACHERS.items():
        match = re.fullmatch(pattern, path.name)
        if match:
            extra = {key: value for key, value in block.items() if key not in ('type', 'path', 'param_key')}
            return {**network, 'upscale': int(match['upscale']), **extra}
    raise UserError(f'network_t.path = {path}: no such file, and the network is read from it')


# ---------------------------------------------------------------------------------------------------------------------
# The command `step`


def _step(args):
    if args.batch is not None and args.batch < 1:
        raise UserError(f'--batch {args.batch}: expected at least 1')
    if args.pairs != 0 and args.pairs < _LEAST_PAIRS:
        raise UserError(f'--pairs {args.pairs}: expected at least {_LEAST_PAIRS}, or 0 for none')
    if args.memory and (args.device or args.data):
        raise UserError('--memory is for a GPU that is not there: leave --device and --data out')
    if args.memory:
        from dckd_sr import step_memory  # it is for this alone

        result = step_memory.run(args.opt, args.batch, tuple(args.force_yml or ()), args.json != '-')
        write(result, step_memory.table(result), args.json)
        return 0
    result = step(args.opt, args.batch, args.device, args.pairs, args.force_yml, args.data)
    write(result, step_table(result), args.json)
    return 1 if result['refused'] else 0


def step(path, batch_size=None, device=None, pairs=5, overrides=(), use_data=False):
    """Everything that the command `step` reports, as plain values: seconds, FLOPs, bytes.

    Args:
        path, overrides, device: see `load`.
        batch_size: images of a batch; None: as the file says.
        pairs: steps of this and of the released order that are timed in turn; 0 for none of the latter.
        use_data: also time the wait for the file's own data.

    Raises:
        UserError: mistakes in options, or a model without parts.
    """
    logs.start()
    opt = load(path, overrides, device, use_data)
    if batch_size is not None:
        opt['datasets']['train']['batch_size_per_gpu'] = batch_size
    batch = batch_of(opt)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's, about BasicSR's networks
        model = build(opt)
        model.feed_data(batch)
        reference = ReleasedStep(model) if pairs and type(model) is DCKDModel else None
        differences, refused = compare(model, reference, 1) if reference is not None else (None, None)
        columns = {}
        if reference is not None and not refused:
            modes = ['released'] if _runs_as_released(model) else ['released', 'model']
            columns = {mode: functools.partial(reference, mode=mode) for mode in modes}
        rows, iteration = alternate(model, columns.values(), batch, max(pairs, _LEAST_PAIRS), 2)
        times = step_parts.times(model, batch, range(iteration, iteration + 3))
        iteration += 3
        flops, moved = step_parts.account(model, batch, iteration)
        memory = _memory(model, lambda: model.optimize_parameters(iteration + 1), model)
        beside = {
            mode: _released(reference, column, [(row[number], row[-1]) for row in rows], memory, iteration + 2)
            for number, (mode, column) in enumerate(columns.items())
        }
        released, equal = beside.get('released'), beside.get('model')
        peaks = step_parts.peaks(model.run)
        wait = _wait_for_data(model, opt, iteration) if use_data else None
    times['data'] += wait or 0
    parts = {}
    for part, seconds in times.items():
        kinds = step_parts.precisions(model.run, part)
        counts = flops.get(part, {})
        products = sum(count / max(peaks['float32'], peaks[kinds[kind]]) for kind, count in counts.items())
        floor, work = max(products, moved.get(part, 0) / peaks['copy']), sum(counts.values())
        parts[part] = {
            'seconds': seconds,
            'flops': work,
            'tflops': work / seconds / 1e12 if seconds else 0,
            'bytes': moved.get(part, 0),
            'precision': ' and '.join(dict.fromkeys(kinds.values())),
            'floor_seconds': floor,
            'times_floor': seconds / floor if floor else None,
        }
    size, seconds = len(batch['lq']), statistics.median(row[-1] for row in rows)
    work, floor = (sum(part[key] for part in parts.values()) for key in ('flops', 'floor_seconds'))
    return {
        'command': 'step',
        'option_file': str(path),
        'model_type': type(model).__name__,
        **_machine(opt, model.device),
        'batch': size,
        **{name: list(value.shape) for name, value in batch.items()},
        'parts': parts,
        'step': {
            'seconds': seconds,
            'seconds_of_parts': sum(times.values()),
            'images_per_second': size / seconds,
            'flops': work,
            'tflops': work / seconds / 1e12,
            'floor_seconds': floor,
            'times_floor': seconds / floor,
            'peak_memory': memory,
        },
        'peaks': peaks,
        'wait_for_data': wait,
        'released': released,
        'released_at_equal_precision': equal,
        'differences': differences,
        'refused': refused,
        'ratio_to_released': None if released is None else released['ratio'],
        'ratio_at_equal_precision': None if released is None else (equal or released)['ratio'],
    }


def build(opt):
    """The model of a training, its history moved away from its student as after some iterations.

    Raises:
        UserError: not one of the package's models with a student, or options that do not fit.
    """
    torch.manual_seed(opt['manual_seed'])
    _set_up(opt)
    logger = logging.getLogger('basicsr')
    logger.setLevel(logging.ERROR)  # it would say that the teacher is random
    model = train.build(opt)
    logger.setLevel(logging.WARNING)
    if not isinstance(model, KDModel):
        raise UserError(
            f'{opt["model_type"]} is not known to the benchmark; it takes KDModel, DCKDModel and models made of them'
        )
    history = getattr(model, 'net_his', None)
    for parameter in history.parameters() if history is not None else ():
        parameter.data.mul_(0.9)
    return model


def batch_of(opt):
    """A batch of random images from the run's seed, in memory as a loader gives them."""
    data, scale = opt['datasets']['train'], opt['scale']
    if data.get('gt_size') is None:
        raise UserError('datasets.train.gt_size: missing; the images of the benchmark are of this size')
    draw, batch = generator('cpu', opt['manual_seed'], 'benchmark'), {}
    for name, end, side in (('lq', 'input', data['gt_size'] // scale), ('gt', 'output', data['gt_size'])):
        images = torch.rand(data['batch_size_per_gpu'], channels(opt, end), side, side, generator=draw)
        batch[name] = images.pin_memory() if opt['num_gpu'] else images
    return batch


def channels(opt: dict[str, Any], end: str) -> int:
    """Of the student's images at an end, 'input' or 'output'."""
    cls = ARCH_REGISTRY.get(opt['network_g']['type'])
    return option_checks.argument(cls, opt['network_g'], option_keys.CHANNEL_KEYS[end])[1] or 3


def compare(model, reference, iteration):
    """One step of both, from the same state: the model as its options say, the reference in float32 without TF32.

    Returns:
        ({'losses': name -> relative difference, 'gradient': relative difference}, why they are not the same or None).
    """
    # What a compiled network draws, nobody else draws.
    draws, losses = model.run.compile_mode is None, []
    plain = functools.partial(reference, mode='float32')
    for column, net in ((plain, reference.net_g), (model.optimize_parameters, model.net_g)):
        net.train(draws)
        torch.manual_seed(iteration)
        losses.append(column(iteration))
        net.train()
    theirs, ours = losses[0], {name: float(value) for name, value in model.log_dict.items()}
    if ours.keys() != theirs.keys():
        return None, f'it has {", ".join(ours)}; the released code has {", ".join(theirs)}'
    expected, found = (
        torch.cat([p.grad.flatten().float() for p in net.parameters() if p.grad is not None])
        for net in (reference.net_g, model.get_bare_model(model.net_g))
    )
    losses = {name: abs(ours[name] - value) / max(abs(value), 1e-12) for name, value in theirs.items()}
    gradient = float((found - expected).norm() / expected.norm())
    exact = not model.run.amp and not any(precision.rounds(model.device))
    bounds = _EXACT if exact else _FAST
    refused = None
    if not (max(losses.values()) <= bounds[0] and gradient <= bounds[1]):
        refused = (
            f'losses differ by {max(losses.values()):.1e}, gradients by {gradient:.1e} '
            f'(allowed: {bounds[0]:g} and {bounds[1]:g})'
        )
    return {'losses': losses, 'gradient': gradient}, refused


def _runs_as_released(model):
    """Whether the model's step has the precision that torch gives by itself."""
    return not model.run.amp and (model.device.type != 'cuda' or precision.tf32() == precision.DEFAULT)


def alternate(model, references, batch, pairs, first):
    """Time whole steps, from the data to the EMA, in turn.

    Args:
        references: functions of an iteration, each a step of its own.

    Returns:
        (list of (seconds of each reference, seconds of the model), the next iteration).
    """
    iterations = iter(range(first, 10**9))

    def ours():
        model.feed_data(batch)
        model.optimize_parameters(next(iterations))

    def fed(reference):
        def step():
            model.feed_data(batch)
            reference(next(iterations))

        return step

    def seconds(step, count):
        step_parts.wait(model.device)
        start = time.perf_counter()
        for _ in range(count):
            step()
        step_parts.wait(model.device)
        return (time.perf_counter() - start) / count

    steps = (*map(fed, references), ours)
    for step in steps:
        seconds(step, 1)  # compiles, chooses kernels
    counts = {step: max(1, round(_SLICE / seconds(step, 1))) for step in steps}
    rows = []
    for turn in range(pairs):
        order = steps if turn % 2 == 0 else steps[::-1]  # what drifts hits both
        times = {step: seconds(step, counts[step]) for step in order}
        rows.append(tuple(times[step] for step in steps))
    return rows, next(iterations)


def _released(reference, column, rows, memory, iteration):
    """What is reported of the reference, in one of its modes."""
    with step_parts.counting(reference.model.run) as counter:
        column(iteration)
    theirs = _memory(reference, lambda: column(iteration), reference.model)
    ratios = [released / ours for released, ours in rows]
    return {
        'seconds': statistics.median(row[0] for row in rows),
        'flops': counter.get_total_flops(),
        'peak_memory': theirs,
        'memory_ratio': memory / theirs,
        'ratio': statistics.median(ratios),
        'ratio_min': min(ratios),
        'ratio_max': max(ratios),
        'pairs': [list(row) for row in rows],
    }


def _memory(holder, step, model):
    """Peak memory of a step of a model, or of the reference beside it."""
    holder.optimizer_g.zero_grad()
    own = {id(tensor): tensor for tensor in (*step_parts.tensors_of(holder), model.lq, model.gt)}
    return step_parts.peak_memory(step, own.values(), model.device, step_parts.tensors_of(model))


def _wait_for_data(model, opt, iteration, count=20):
    """Seconds that a step waits for the file's own loader, the mean but for the first steps."""
    loader, _ = build_train_loader(opt, opt['manual_seed'])
    batches, waits = iter(loader), []
    for turn in range(count):
        start = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - start)
        model.feed_data(batch)
        model.optimize_parameters(iteration + turn)
        step_parts.wait(model.device)
    return statistics.fmean(waits[count // 4 :])


# ---------------------------------------------------------------------------------------------------------------------
# The command `infer`


def _infer(args):
    if args.batch < 1:
        raise UserError(f'--batch {args.batch}: expected at least 1')
    result = infer(args.opt, args.batch, args.device, args.force_yml)
    write(result, infer_table(result), args.json)
    return 0


class _Run(nn.Module):
    """A network, run as the option file says."""

    def __init__(self, run, role, net):
        super().__init__()
        self.run, self.role, self.net = run, role, run.prepare(role, net)

    def forward(self, x):
        return self.run(self.role, self.net, x)


def infer(path, batch_size=1, device=None, overrides=()):
    """Everything that the command `infer` reports, as plain values; `complexity` says what they are."""
    logs.start().setLevel(logging.WARNING)
    opt = load(path, overrides, device, networks_only=True)
    _set_up(opt)
    device = torch.device('cuda' if opt['num_gpu'] else 'cpu')
    run = Speed(opt, device)
    shape, repeats = complexity.paper_shape(opt['scale'], channels(opt, 'input')), 10 if opt['num_gpu'] else 3
    networks = {}
    for role, key in (('student', 'network_g'), ('teacher', 'network_t')):
        if opt.get(key) is None:
            continue
        block = {name: value for name, value in opt[key].items() if name != 'allow_random'}
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            net = build_network(block).to(device).eval().requires_grad_(False)
            flops = complexity.flops(net, shape)
            net = _Run(run, role, net)
            latency = complexity.latency(net, shape, device, repeats)
            many = (batch_size, *shape[1:])
            networks[role] = {
                'type': opt[key]['type'],
                'parameters': complexity.parameters(net),
                'flops': flops,
                'multiply_adds': flops // 2,
                'latency': latency,
                'images_per_second': complexity.throughput(net, many, device, repeats)
                if batch_size > 1
                else 1 / latency,
                'peak_memory': complexity.peak_memory(net, many, device),
            }
        del net
    return {
        'command': 'infer',
        'option_file': str(path),
        **_machine(opt, device),
        'batch': batch_size,
        'input': list(shape),
        'output': [shape[2] * opt['scale'], shape[3] * opt['scale']],
        'networks': networks,
    }


def _set_up(opt):
    """As a training does."""
    torch.backends.cudnn.benchmark = True
    if opt['num_gpu'] == 0:
        processes.keep_freed_memory()


def _machine(opt, device):
    keys = [key for key in option_keys.SPEED_KEYS if opt.get(key)]
    keys += ['use_tf32'] if opt.get('use_tf32') is not None else []
    keys += [key for key in ('amp_bf16', 'amp_networks', 'compile_mode') if opt.get(key) and opt[_NEEDED[key]]]
    return {
        'device': device.type,
        'machine': torch.cuda.get_device_name(device) if device.type == 'cuda' else processor(),
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'options': {key: opt[key] for key in keys},
    }


def processor():
    """The name of this machine's processor."""
    with contextlib.suppress(OSError):
        found = re.search(r'model name\s*: (.+)', Path('/proc/cpuinfo').read_text(encoding='utf-8'))
        if found:
            return found[1]
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def step_table(result):
    """The text that `step` prints."""
    parts, whole, peaks, released = (result[key] for key in ('parts', 'step', 'peaks', 'released'))
    rows = [('', 'ms', '', 'GFLOP', 'TFLOP/s', 'GB', 'floor ms', 'x floor')]
    moved = sum(row['bytes'] for row in parts.values())
    for name, row in [*parts.items(), ('whole step', {**whole, 'bytes': moved})]:
        share = f'{row["seconds"] / whole["seconds_of_parts"]:.1%}' if name in parts else ''
        rows.append(
            (
                step_parts.PARTS.get(name, name),
                _ms(row['seconds']),
                share,
                _giga(row['flops']),
                f'{row["tflops"]:.3f}',
                _giga(row['bytes']),
                _ms(row['floor_seconds']),
                '' if row['times_floor'] is None else f'{row["times_floor"]:.2f}',
            )
        )
    lines = [_heading(result), f'batch {result["batch"]}, LQ {_sides(result["lq"])}, GT {_sides(result["gt"])}', '']
    lines += aligned(rows)
    peak = ', '.join(f'{name} {value / 1e12:.3f} TFLOP/s' for name, value in peaks.items() if name != 'copy')
    lines += [
        '',
        f'{whole["images_per_second"]:.2f} images per second; peak memory {_giga(whole["peak_memory"])} GB',
        f'peaks measured here: {peak} (matrix products), {peaks["copy"] / 1e9:.1f} GB/s (copy)',
    ]
    if result['wait_for_data'] is not None:
        share = result['wait_for_data'] / (whole['seconds'] + result['wait_for_data'])
        lines.append(f'the loader is waited for {_ms(result["wait_for_data"])} ms a step, {share:.1%} of it')
    if result['refused']:
        lines.append(f'no ratio to the released order: {result["refused"]}')
    equal = result['released_at_equal_precision']
    for name, label, row in (
        ('ratio_to_released', 'released order', released),
        ('ratio_at_equal_precision', 'released order in the precision of this step', equal),
    ):
        if row is not None:
            lines += [
                f'{label}: {_ms(row["seconds"])} ms, {_giga(row["flops"])} GFLOP, '
                f'peak memory {_giga(row["peak_memory"])} GB',
                f'{name} {row["ratio"]:.2f} (median of {len(row["pairs"])} alternating pairs, '
                f'{row["ratio_min"]:.2f} to {row["ratio_max"]:.2f}), memory {row["memory_ratio"]:.2f}',
            ]
    if released is not None:
        off = result['differences']
        lines.append(
            f'losses differ by {max(off["losses"].values()):.1e}, gradients by {off["gradient"]:.1e} from those of the '
            'released order in float32'
        )
    return '\n'.join(lines)


def infer_table(result):
    """The text that `infer` prints."""
    networks = result['networks']
    rows = [('', *(f'{role}, {row["type"]}' for role, row in networks.items()))]
    for label, key, shown in (
        ('parameters, M', 'parameters', lambda value: f'{value / 1e6:.3f}'),
        ('GFLOP', 'flops', _giga),
        ('multiply-adds, G', 'multiply_adds', _giga),
        ('latency, ms', 'latency', _ms),
        ('images per second', 'images_per_second', lambda value: f'{value:.2f}'),
        ('peak memory, GB', 'peak_memory', _giga),
    ):
        rows.append((label, *(shown(row[key]) for row in networks.values())))
    height, width = result['output']
    text = (
        f'input {_sides(result["input"])}, output {width}x{height}; images per second in batches of {result["batch"]}'
    )
    return '\n'.join([_heading(result), text, '', *aligned(rows)])


def _heading(result):
    fast = ', '.join(f'{key} {value}' for key, value in result['options'].items()) or 'float32'
    where = result['machine'] if result['device'] == 'cuda' else f'{result["machine"]}, {result["threads"]} threads'
    return f'{result["option_file"]} on {where} (torch {result["torch"]}), {fast}'


def aligned(rows):
    """Lines of a table: rows of texts, all columns but the first flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        '  '.join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def _sides(shape):
    return f'{shape[-1]}x{shape[-2]}'


def _ms(seconds):
    return f'{seconds * 1e3:.2f}' if seconds < 0.1 else f'{seconds * 1e3:.0f}'


def _giga(number):
    return f'{number / 1e9:.{3 if number < 1e10 else 1}f}'


def write(result, table, path):
    """Print the table; with a path also write the result there as JSON, or with '-' print that in its place."""
    text = json.dumps(result, indent=2)
    if path == '-':
        print(text)
        return
    print(table)
    if path:
        try:
            Path(path).write_text(text + '\n', encoding='utf-8')
        except OSError as error:
            raise UserError(f'--json {path}: {error.strerror}') from error


if __name__ == '__main__':
    sys.exit(main())
