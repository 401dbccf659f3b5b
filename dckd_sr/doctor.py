"""What any user runs first: what is installed, what this machine is good at, and what an option file lacks here.

    python -m dckd_sr.doctor                   versions, devices, and how fast a convolution is in each precision
    python -m dckd_sr.doctor -opt FILE         also what a training or a test of this file would stop at, and its room
    python -m dckd_sr.doctor --gpu             also a proof, in less than 8 minutes, that all works on this GPU

Nothing is written but the file of --json.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import shlex
import shutil
import sys
import time
import warnings
from pathlib import Path

if __name__ == '__main__':
    # Run as a file, Python puts this folder first on the path, where test.py hides the standard library's `test`.
    sys.path[:] = [entry for entry in sys.path if Path(entry or '.').resolve() != Path(__file__).resolve().parent]
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dckd_sr  # --help is answered before torch is loaded

# isort: split
import torch
from basicsr.archs import build_network
from basicsr.utils import set_random_seed
from torch import nn

from dckd_sr import (
    benchmark,
    checkpoint,
    complexity,
    devices,
    gpu_proof,
    logs,
    option_files,
    options,
    precision,
    step_parts,
    test,
    train,
)
from dckd_sr.commands import doctor_parser
from dckd_sr.data import build_train_loader, build_val_loader
from dckd_sr.errors import SeveralErrors, UserError, entry_point, reason

PACKAGES = {'torch': 'torch', 'torchvision': 'torchvision', 'basicsr': 'basicsr', 'numpy': 'numpy', 'cv2': 'opencv'}
GIB = 2**30
# Seconds of a convolution over those in bfloat16: from where on it is worth a word, and below which a warning.
FASTER, SLOWER = 1.5, 0.8


@entry_point()
def main(argv=None):
    """Command line entry point.

    Returns:
        exit code: 0 nothing is missing and all of the proof holds, 1 something does not, 2 a mistake in the arguments
        (one message, no traceback).
    """
    args = doctor_parser().parse_args(argv)
    if args.force_yml and not args.opt:
        raise UserError('--force_yml sets keys of an option file: -opt is missing')
    for key in ('device', 'small', 'only'):
        if getattr(args, key) and not args.gpu:
            raise UserError(f'--{key} is of the proof: --gpu is missing')
    benchmark.check_json(args.json, args.opt)
    device = proof_device(args.device) if args.gpu else None
    small = args.small or device == 'cpu'
    if args.worker:
        return gpu_proof.work(args.only, device, small, args.worker)
    if args.gpu:
        gpu_proof.names_of(args.only)
    if args.opt:
        _read(args.opt, args.force_yml)  # before seconds are spent
    proof = None
    if args.gpu:  # before this process holds the GPU, which some machines give to one process at a time
        tell = functools.partial(print, file=sys.stderr, flush=True)
        proof = gpu_proof.prove(device, small, args.only, tell)
    result = {'command': 'doctor', 'versions': versions(), 'machine': machine(), 'file': None, 'proof': proof}
    if args.opt:
        result['file'] = look_at(args.opt, args.force_yml or (), result['machine'])
    result['advice'] = advice(result['machine'], result['file'])
    page = text(result)
    if args.gpu:
        page += '\n\n' + gpu_proof.table(result['proof'], device, small)
    benchmark.write(result, page, args.json)
    lacking = result['file'] is not None and bool(result['file']['problems'])
    return int(lacking or not all(row['ok'] for row in result['proof'] or ()))


def proof_device(name):
    """The device of --gpu.

    Raises:
        UserError: there is no GPU, and the CPU was not asked for.
    """
    if name != 'cpu' and not torch.cuda.is_available():
        why = gpu_problem() or 'there is none here'
        raise UserError(f'--gpu: {why}; --device cpu tries the proof itself, at reduced size')
    return name or 'cuda'


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def versions():
    """Name -> version of Python and of the packages that results depend on."""
    found = {'python': platform.python_version(), 'dckd_sr': dckd_sr.__version__}
    for module, name in PACKAGES.items():
        loaded = sys.modules.get(module)
        found[name] = getattr(loaded, '__version__', None) or importlib.metadata.version(name)
    built = torch.version.cuda and f'CUDA {torch.version.cuda}' or torch.version.hip and f'ROCm {torch.version.hip}'
    found['torch is built for'] = built or 'CPUs'
    return found


def machine():
    """Everything about this machine that decides how fast a training is, as plain values."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    return {
        'system': platform.platform(),
        'processor': benchmark.processor(),
        'instructions': instructions(),
        'cores': cores(),
        'threads': torch.get_num_threads(),
        'workers': sensible_workers(device.type),
        'memory_free': memory_free(),
        'shared_memory_free': shared_memory_free(),
        'disk_free': shutil.disk_usage(Path.cwd()).free,
        'gpus': gpus(),
        'gpu_problem': gpu_problem(),
        'other_devices': other_devices(),
        'device': device.type,
        'convolution': convolution(device),
    }


def instructions():
    """What the processor has for 16 bits, and the widest vectors that torch uses."""
    flags = ''
    with contextlib.suppress(OSError):
        found = re.search(r'^flags\s*: (.+)$', Path('/proc/cpuinfo').read_text(encoding='utf-8'), flags=re.M)
        flags = found[1] if found else ''
    if not flags and hasattr(torch.cpu, 'get_capabilities'):
        flags = ' '.join(name for name, there in torch.cpu.get_capabilities().items() if there is True)
    names = {'amx_bf16': 'AMX bf16', 'amx_fp16': 'AMX fp16', 'avx512_bf16': 'AVX-512 bf16', 'bf16': 'Arm bf16'}
    return [torch.backends.cpu.get_cpu_capability(), *(text for flag, text in names.items() if flag in flags.split())]


def cores():
    """Processors that this process may use: of the machine, of its affinity, of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path('/sys/fs/cgroup/cpu.max').read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))  # 'max': no quota
    return count


def sensible_workers(device):
    """Loader processes: as many as the machine has cores to spare, and no more than a step was seen to need."""
    spare = cores() - 1
    if device == 'cpu':
        return min(spare, 2)  # the training itself needs the cores
    return max(0, min(spare // max(1, torch.cuda.device_count()), 8))


def memory_free():
    """Bytes that this process may still have, or None where nothing says so."""
    found = []
    with contextlib.suppress(OSError):
        line = re.search(r'MemAvailable:\s+(\d+) kB', Path('/proc/meminfo').read_text())
        found += [int(line[1]) * 1024] if line else []
    with contextlib.suppress(OSError, ValueError):
        group = Path('/sys/fs/cgroup')
        found.append(int((group / 'memory.max').read_text()) - int((group / 'memory.current').read_text()))
    if not found:
        with contextlib.suppress(AttributeError, OSError, ValueError):  # macOS: what there is at all
            found.append(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    return min(found, default=None)


def shared_memory_free():
    """Bytes in which loader processes hand over batches, or None where that is no folder."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage('/dev/shm').free
    return None


def gpus():
    """What torch can use of CUDA or ROCm, one dict each."""
    found, known = [], torch.cuda.get_arch_list() if torch.cuda.is_available() else []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        row = {'name': torch.cuda.get_device_name(index), 'capability': list(torch.cuda.get_device_capability(index))}
        try:
            row['memory_free'], row['memory'] = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            row['problem'] = reason(error)
        modern = torch.version.hip is not None or row['capability'] >= [8, 0]
        row.update(bf16=modern, tf32=modern and torch.version.hip is None)
        majors = {name.rpartition('_')[2].rstrip('af')[:-1] for name in known if name.startswith(('sm_', 'compute_'))}
        if torch.version.hip is None and majors and str(row['capability'][0]) not in majors:
            row['problem'] = f'this torch has no kernels for sm_{"".join(map(str, row["capability"]))}'
        found.append(row)
    return found


def gpu_problem():
    """Why torch does not use a GPU that seems to be there, or None."""
    if torch.cuda.is_available():
        return None
    there = any(map(os.path.exists, ('/proc/driver/nvidia/version', '/dev/nvidia0'))) or shutil.which('nvidia-smi')
    there = there or os.path.exists('/dev/kfd')
    if torch.version.cuda is None and torch.version.hip is None:
        return 'there is a GPU, and this torch is built for CPUs' if there else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return reason(error)
    return 'torch finds no GPU'


def other_devices():
    """Names of torch's devices beside CPU and CUDA that are there."""
    return [kind for kind in devices.available() if kind not in ('cpu', 'cuda')]


def convolution(device):
    """Seconds of one 3x3 convolution of 128 channels, forward, in each precision that a training can have.

    On a CPU by one thread: several wait for each other where other work is done beside them.

    Returns:
        dict: float32, bfloat16, float16 and, on CUDA, tf32 -> seconds, or why it does not run.
    """
    on_gpu, found, threads = device.type == 'cuda', {}, torch.get_num_threads()
    names = ('float32', *(['tf32'] if on_gpu else []), 'bfloat16', 'float16')
    torch.set_num_threads(1)
    for name in 3 * names:  # in turn: what else the machine does hits all of them
        half = getattr(torch, name) if name.endswith('16') else None
        try:
            net = nn.Conv2d(128, 128, 3, padding=1).to(device, memory_format=torch.channels_last)
            x = torch.rand(64 if on_gpu else 1, 128, 48, 48, device=device).to(memory_format=torch.channels_last)
            autocast = torch.autocast(device.type, half, enabled=half is not None)
            with torch.no_grad(), precision.tf32_as(name == 'tf32'), autocast:
                seconds = step_parts.fastest(lambda net=net, x=x: net(x), device)
            found[name] = min(found.get(name, seconds), seconds)
        except RuntimeError as error:
            found[name] = reason(error)
    torch.set_num_threads(threads)
    return found


def ratio(found, name):
    """How many times as fast the convolution is as in float32, or None where it does not run."""
    times = found.get('float32'), found.get(name)
    return times[0] / times[1] if all(isinstance(value, float) for value in times) else None


# ---------------------------------------------------------------------------------------------------------------------
# An option file


class _Lines(logging.Handler):
    """Keeps what a training would write into its log: warnings, and what the first look saw."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def emit(self, record):
        line = record.getMessage()
        if record.levelno == logging.WARNING or line.startswith('First look'):
            self.notes.append(line)


def look_at(path, overrides, facts):
    """What a training or a test of a file would stop at: its own checks, in its own order, as far as they go.

    Args:
        path, overrides: see `options.load`.
        facts: see `machine`.

    Returns:
        dict: problems, notes (lists of lines), checked (what was looked at), and the room that checkpoints need.

    Raises:
        UserError: there is no such file, it is no option file, or an override is none.
    """
    raw = _read(path, overrides)
    is_train = isinstance(raw.get('train'), dict)
    logs.start()
    logger, lines = logging.getLogger('basicsr'), _Lines()
    logger.handlers[:] = [lines]
    found = {
        'option_file': str(path),
        'overrides': list(overrides),
        'is_train': is_train,
        'checked': [],
        'problems': [],
        'checkpoints': None,
    }
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's, about BasicSR's networks
        opt = _tried(found, 'options', lambda: options.load(path, overrides, is_train))
        if opt is not None:
            opt, lines.notes[:0] = opt
            (_try_training if is_train else _try_test)(found, opt)
        if is_train:
            found['checkpoints'] = room(path, overrides)
            _check_room(found, raw)
        _check_modes(found, raw, facts, lines.notes)
    found['notes'] = list(dict.fromkeys(lines.notes))
    return found


def _read(path, overrides):
    raw = option_files.read(path).options
    option_files.apply_overrides(raw, overrides)
    return raw


def _tried(found, what, function):
    """The function's value, or None after its mistakes went to the problems."""
    try:
        with logs.explained(what):
            value = function()
    except UserError as error:
        lines = error.problems if isinstance(error, SeveralErrors) else [str(error)]
        found['problems'] += [line for line in lines if line not in found['problems']]
        return None
    found['checked'].append(what)
    return value


def _try_training(found, opt):
    """As `train.prepare`, up to where it would begin to write."""
    set_random_seed(opt['manual_seed'])
    names = [name for name in opt['datasets'] if name.split('_')[0] in ('val', 'test')]
    data = _tried(found, 'training images', lambda: build_train_loader(opt, opt['manual_seed']))
    loaders = [_tried(found, f'images of datasets.{name}', lambda n=name: build_val_loader(opt, n)) for name in names]
    model = _tried(found, 'networks and weights', lambda: train.build(opt))
    if data is None or model is None or None in loaders:
        return
    loader, sampler = data
    _tried(found, 'first sample', lambda: train.try_networks(model, loader.dataset, sampler, loaders, opt))
    _tried(found, 'first look', lambda: train.look_first(model, loaders, opt))


def _try_test(found, opt):
    sets = _tried(found, 'sets', lambda: test.split_sets(opt['datasets']))
    for name in sets[0] if sets else ():
        _tried(found, f'images of datasets.{name}', lambda n=name: build_val_loader(opt, n))
    _tried(found, 'weights', lambda: test.load_network(opt, 'g'))


def room(path, overrides):
    """Bytes that the checkpoints of a training need, and that are free where it writes; needs no file but this one.

    Returns:
        dict: each, count, total, free, folder; None where the networks cannot be built.
    """
    try:
        opt = benchmark.load(path, overrides, 'cpu')
        nets = [build_network({**opt[f'network_{name}']}) for name in checkpoint.trained_networks(opt)]
    except Exception:  # the problems name it already
        return None
    sizes = [4 * complexity.parameters(net) for net in nets]
    averages = bool(opt['train'].get('ema_decay')) + bool(opt.get('network_his'))
    moments = {'SGD': 1}.get((opt['train'].get('optim_g') or {}).get('type'), 2)
    each = sum(sizes) * (1 + moments) + sizes[0] * averages
    logger, total = opt['logger'], int(opt['train']['total_iter'])
    count = -(-total // int(logger['save_checkpoint_freq']))
    count = min(count, logger.get('keep_checkpoints') or count)
    folder = Path(opt['path']['experiments_root']).absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return {'each': each, 'count': count, 'total': each * count, 'free': free, 'folder': str(folder)}


def _check_room(found, raw):
    need = found['checkpoints']
    if need is None:
        return
    if not os.access(need['folder'], os.W_OK):
        found['problems'].append(f'{need["folder"]} cannot be written: start where the run may write its folder')
    if need['total'] > need['free']:
        found['problems'].append(
            f'{need["count"]} checkpoints of {_size(need["each"])} need {_size(need["total"])}, {need["folder"]} has '
            f'{_size(need["free"])} free: logger.keep_checkpoints keeps the last ones'
        )


def _check_modes(found, raw, facts, notes):
    """What the file asks of the machine: precision, a compiler, loader processes, packages that a run loads late."""
    problems, times = found['problems'], facts['convolution']
    if raw.get('use_amp') is True:
        kind = 'bfloat16' if raw.get('amp_bf16') is True else 'float16'
        gain, native = ratio(times, kind), facts['gpus'][0]['bf16'] if facts['gpus'] else True
        if gain is None:
            problems.append(f'use_amp: {kind} does not run here: {times[kind]}')
        elif kind == 'bfloat16' and not native:
            problems.append(f'amp_bf16: {facts["gpus"][0]["name"]} has no bfloat16; leave amp_bf16 out for float16')
        elif gain < SLOWER:
            better = ratio(times, 'bfloat16') or 0
            cure = f'; amp_bf16: true makes it {better:.1f} times as fast' if better >= FASTER and native else ''
            problems.append(
                f'use_amp: a convolution in {kind} takes {1 / gain:.1f} times as long here as in float32{cure}'
            )
    if raw.get('use_compile') is True:
        seconds = _tried(found, 'use_compile', lambda: compiles(facts['device'], raw.get('compile_mode')))
        if seconds is not None:
            notes.append(f'use_compile: a small network is compiled, forward and backward, in {seconds:.0f} s')
    block = raw['datasets'].get('train') if isinstance(raw.get('datasets'), dict) else None
    workers = block.get('num_worker_per_gpu') if isinstance(block, dict) else None
    if isinstance(workers, int) and found['is_train'] and workers > max(1, facts['cores']):
        notes.append(
            f'datasets.train.num_worker_per_gpu = {workers}: {facts["cores"]} cores here; {facts["workers"]} will do'
        )
    logger = raw.get('logger') if isinstance(raw.get('logger'), dict) else {}
    wandb = (logger.get('wandb') or {}).get('project') if isinstance(logger.get('wandb') or {}, dict) else None
    for wanted, key, package in (
        (wandb is not None, 'logger.wandb.project', 'wandb'),
        (logger.get('use_tb_logger') is True, 'logger.use_tb_logger', 'tensorboard'),
    ):
        if wanted and found['is_train'] and importlib.util.find_spec(package) is None:
            problems.append(f'{key}: {package} is not installed: pip install {package}')


def compiles(device, mode):
    """Compile a small network, forward and backward, as use_compile does; returns the seconds.

    Raises:
        whatever torch's compiler raises: no C++ compiler, no Triton, no Python headers.
    """
    begin = time.perf_counter()
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1)).to(device)
    out = torch.compile(net, mode=mode or 'default', dynamic=False)(torch.rand(1, 3, 16, 16, device=device))
    out.square().mean().backward()
    devices.wait(torch.device(device))
    return time.perf_counter() - begin


# ---------------------------------------------------------------------------------------------------------------------
# Words


def advice(facts, file=None):
    """Plain sentences about what to do; numbers in them were measured here, just now.

    Args:
        facts: see `machine`.
        file: see `look_at`; None without a file.
    """
    found, times, on_gpu = [], facts['convolution'], facts['device'] == 'cuda'
    if facts['gpu_problem']:
        found.append(f'{facts["gpu_problem"]}: install the torch that pytorch.org names for your driver.')
    for gpu in facts['gpus']:
        if 'problem' in gpu:
            found.append(f'{gpu["name"]}: {gpu["problem"]}; install a torch that fits it, as pytorch.org says.')
    if not isinstance(times['float32'], float):
        found.append(f'The {"GPU" if on_gpu else "CPU"} does not compute: {times["float32"]}')
    gains = {name: ratio(times, name) for name in ('bfloat16', 'float16', 'tf32')}
    with_amx = ' (this processor has AMX)' if 'AMX bf16' in facts['instructions'] and not on_gpu else ''
    gain = gains['bfloat16']
    if gain and gain >= FASTER and (not on_gpu or facts['gpus'][0]['bf16']):
        found.append(
            f'bfloat16{with_amx}: a wide convolution is {gain:.1f} times as fast as in float32. use_amp: true with '
            'amp_bf16: true lets the networks have it, and pays most where teacher and encoder are large.'
        )
    elif gains['float16'] and gains['float16'] >= FASTER and on_gpu:
        found.append(
            f'float16: a wide convolution is {gains["float16"]:.1f} times as fast as in float32: use_amp: true. This '
            'GPU has no bfloat16 of its own.'
        )
    elif not on_gpu:
        found.append(
            'bfloat16 '
            + (
                'does not run here'
                if not gain
                else 'is no faster than float32 here'
                if gain >= SLOWER
                else f'takes {1 / gain:.1f} times as long as float32 here'
            )
            + ': leave use_amp out.'
        )
    if gains['tf32'] and gains['tf32'] >= FASTER:
        found.append(
            f'TF32: a wide convolution is {gains["tf32"]:.1f} times as fast as in float32. Convolutions have it unless '
            'use_tf32 is false; use_tf32: true lets matrix products have it, too.'
        )
    if not on_gpu:
        found.append(
            'No GPU: python -m dckd_sr.benchmark step -opt FILE --batch 1 says what a step takes here, and '
            'python -m dckd_sr.demo trains small networks in minutes.'
        )
    if facts['threads'] > facts['cores']:
        found.append(f'{facts["threads"]} threads on {facts["cores"]} cores: set OMP_NUM_THREADS={facts["cores"]}.')
    shared = facts['shared_memory_free']
    if shared is not None and shared < GIB:
        found.append(
            f'/dev/shm has {_size(shared)} free, in which loader processes hand over batches: start the container with '
            '--shm-size=8g, or set num_worker_per_gpu: 0.'
        )
    if file is None:
        found.append('python -m dckd_sr.doctor -opt FILE says what an option file lacks here.')
    elif not file['problems']:
        verb = 'train' if file['is_train'] else 'test'
        words = ['-opt', file['option_file'], *(['--force_yml', *file['overrides']] if file['overrides'] else [])]
        found.append(f'Nothing is missing: python -m dckd_sr.{verb} {shlex.join(words)}')
    return found


def text(result):
    """The page that the command prints."""
    facts, lines = result['machine'], []

    def section(title, rows):
        lines.extend([title, *(f'  {row}'.rstrip() for row in rows), ''])

    def table(rows):
        width = max(len(name) for name, _ in rows)
        return [f'{name.ljust(width)}  {value}' for name, value in rows]

    section('Versions', table(list(result['versions'].items())))
    memory, shared = facts['memory_free'], facts['shared_memory_free']
    rows = [
        ('system', facts['system']),
        ('processor', f'{facts["processor"]} ({", ".join(facts["instructions"])})'),
        ('cores', f'{facts["cores"]}, of which torch uses {facts["threads"]}; loader processes: {facts["workers"]}'),
        ('free memory', 'not known' if memory is None else _size(memory)),
        *([] if shared is None else [('free in /dev/shm', _size(shared))]),
        ('free on disk', f'{_size(facts["disk_free"])} in this folder'),
    ]
    for index, gpu in enumerate(facts['gpus']):
        having = ', '.join(name for name in ('bf16', 'tf32') if gpu[name]) or 'neither bf16 nor TF32'
        free = f'{_size(gpu["memory_free"])} of {_size(gpu["memory"])} free, ' if 'memory' in gpu else ''
        rows.append(
            (f'GPU {index}', f'{gpu["name"]}, capability {".".join(map(str, gpu["capability"]))}, {free}{having}')
        )
    if not facts['gpus']:
        rows.append(('GPU', facts['gpu_problem'] or 'none'))
    rows += [(name.upper(), 'there') for name in facts['other_devices']]
    times, told = facts['convolution'], []
    for name, value in times.items():
        gain = '' if name == 'float32' or ratio(times, name) is None else f' ({ratio(times, name):.1f} times as fast)'
        told.append(f'{name} {value * 1e3:.2f} ms{gain}' if isinstance(value, float) else f'{name} {value}')
    rows.append((f'convolution, {"one core" if facts["device"] == "cpu" else facts["device"]}', ', '.join(told)))
    section('This machine', table(rows))
    file = result['file']
    if file:
        verb = 'training' if file['is_train'] else 'test'
        head = f'{file["option_file"]}, a {verb}: '
        count = len(file['problems'])
        section(head + (f'{count} problem{"s" * (count != 1)}' if count else 'nothing is missing'), file['problems'])
        if file['checkpoints']:
            need = file['checkpoints']
            room = f'{need["count"]} of {_size(need["each"])}, {_size(need["total"])} together'
            section('Checkpoints', [f'{room}; {_size(need["free"])} are free'])
        if file['checked']:
            section('In order', [', '.join(file['checked'])])
        if file['notes']:
            section('Notes', file['notes'])
    section('Advice', result['advice'])
    return '\n'.join(lines).rstrip()


def _size(count):
    return f'{count / GIB:.1f} GiB' if count >= GIB / 10 else f'{count / 2**20:.1f} MiB'


if __name__ == '__main__':
    sys.exit(main())
