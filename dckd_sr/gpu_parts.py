"""What `python -m dckd_sr.doctor --gpu` proves, part by part: each raises where what it says is not so.

No part needs data, weights or a network: networks are random, images are made. Every part runs on the CPU as well, at a
reduced size, so that the first real card does not meet a slip of the pen.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dckd_sr import benchmark, checkpoint, option_files, safe_yaml
from dckd_sr.evaluation import write_image

LOSSES, GRADIENT = 1e-4, 1e-2  # largest relative differences where only the order of sums differs
HALF_LOSSES, HALF_GRADIENT = 5e-2, 0.5  # and where 16 bits are multiplied


class Failed(Exception):
    """What a part proves is not so; the message says what was found."""


@dataclass(frozen=True)
class Place:
    """Where a part runs.

    Attributes:
        device: cuda or cpu.
        small: at a reduced size.
        folder: an empty one, for the part alone.
    """

    device: torch.device
    small: bool
    folder: Path


@dataclass(frozen=True)
class Part:
    """One row of the proof.

    Attributes:
        title: what is shown.
        run: takes a `Place`, returns figures by name; raises where it fails.
        seconds: after which it is given up, on a GPU.
        group: parts of a group follow each other in one process.
    """

    title: str
    run: Callable[[Place], dict[str, Any]]
    seconds: int
    group: str


# ---------------------------------------------------------------------------------------------------------------------
# Configurations: every method of the package and every mode, on small networks

_EDSR = ['network_g:num_feat=8', 'network_g:num_block=2', 'network_t:num_feat=16', 'network_t:num_block=2']
_SWINIR = [
    f'network_{role}:{key}={value}'
    for role in 'gt'
    for key, value in {'depths': [2, 2], 'num_heads': [2, 2], 'embed_dim': 12}.items()
]
_RCAN = [f'network_{role}:{key}=2' for role in 'gt' for key in ('num_group', 'num_block')]
_SIZE = ['network_vqgan:ddconfig:ch=32', 'datasets:train:batch_size_per_gpu=2', 'datasets:train:gt_size=64']
_SIZE += ['train:step=[1]']  # the history moves in every step
_FAKD = ["train:fakd_opt={type: SpatialAffinityLoss, student: [body.0, 'upsample:input'], "]
_FAKD[0] += "teacher: [body.0, 'upsample:input']}"
_CSD = ['train:csd_opt={type: CSDLoss, num_neg: 2, allow_random: true}']
_MCLIR = ['train:mclir_opt={type: HistoryNegativeLoss, layer_weights: {conv3_1: 1.0}, allow_random: true}']
_MCLIR_VQGAN = ['train:mclir_opt={type: HistoryNegativeLoss, features: vqgan, weights: [0.1, 0.1, 0.1, 0.5, 1.0]}']
_DUKD = ['train:dukd_opt={type: UpcyclingLoss, n_gt_sub: 2, prob: 0.5}']
_LCR = ['train:lcr_opt={type: L1Loss}', 'train:noisy={prob: 0.5}']
_DAMAGE = [f'train:{key}=1' for key in ('gaussian_blur_prob', 'resize_prob', 'gaussian_noise_prob')]
_DAMAGE += ['train:gray_noise_prob=0.5']
_ALL = [*_FAKD, *_CSD, *_MCLIR, *_DUKD, *_LCR, *_DAMAGE]
_SHARES = ['train:gradient_shares={cl_opt: 0.1, ce_opt: 0.1}', 'logger:gradients=true', 'logger:print_freq=2']
_ACCUMULATED = ['train:accum_iter=2', 'train:grad_clip=0.1', 'train:negatives_micro_batch=2']
_FP16, _BF16 = ['use_amp=true'], ['use_amp=true', 'amp_bf16=true']
_LAST, _AGAIN = ['use_channels_last=true'], ['use_checkpoint=true']
_BARE = ['train:cl_opt=null', 'train:ce_opt=null', 'network_vqgan=null', 'network_his=null']


def _edsr(*more):
    return 'train_edsr_x4', [*_EDSR, *_SIZE, *(word for words in more for word in words)]


def _restoration(file, width, *more):
    return file, [f'network_g:{width}=8', *_SIZE, *(word for words in more for word in words)]


def _optimiser(block):
    return _edsr([f'train:optim_g={{{block}, lr: 0.0001}}'])


METHODS = {
    'DCKD': _edsr(),
    'logits': ('train_edsr_x4', [*_EDSR, *_SIZE[1:3], *_BARE]),
    'all losses': _edsr(_ALL),
    'all losses, fp16': _edsr(_ALL, _FP16),
    'all losses, bf16, channels-last, checkpointing': _edsr(_ALL, _BF16, _LAST, _AGAIN),
    'MCLIR with the encoder, fp16': _edsr(_MCLIR_VQGAN, _FP16),
    'shares and logged gradients, fp16': _edsr(_DAMAGE, _FP16, _SHARES),
    'clipped, accumulated, negatives in parts': _edsr(_DAMAGE, _ACCUMULATED),
    'clipped, accumulated, negatives in parts, fp16': _edsr(_DAMAGE, _FP16, _ACCUMULATED),
    'RMSprop': _optimiser('type: RMSprop'),
    'Adagrad': _optimiser('type: Adagrad'),
    'SGD with momentum': _optimiser('type: SGD, momentum: 0.9'),
    'AdamW with amsgrad': _optimiser('type: AdamW, amsgrad: true'),
    'NAdam': _optimiser('type: NAdam'),
    'SwinIR, all losses': ('train_swinir_x4', [*_SWINIR, *_SIZE, *_CSD, *_MCLIR, *_DUKD, *_LCR, *_DAMAGE]),
    'SwinIR, fp16, checkpointing': ('train_swinir_x4', [*_SWINIR, *_SIZE, *_LCR, *_DAMAGE, *_FP16, *_AGAIN]),
    'RCAN x2, fp16, channels-last': ('train_rcan_x2', [*_RCAN, *_SIZE, *_FP16, *_LAST]),
    'NAFNet': _restoration('train_nafnet_deblur', 'width'),
    'NAFNet, fp16, channels-last, checkpointing': _restoration('train_nafnet_deblur', 'width', _FP16, _LAST, _AGAIN),
    'Restormer': _restoration('train_restormer_derain', 'dim'),
    'Restormer, fp16, mixup': _restoration(
        'train_restormer_derain', 'dim', _FP16, _AGAIN, ['train:mixing_augs={mixup: true}']
    ),
    'Restormer without biases, bf16': _restoration(
        'train_restormer_derain', 'dim', _BF16, _AGAIN, ['network_g:LayerNorm_type=BiasFree']
    ),
}


def build(file: str, overrides: list[str], device: torch.device | str) -> tuple[dict, Any, dict]:
    """(options, model, a batch on the host) of a shipped option file and what changes it; see `benchmark.load`."""
    opt = benchmark.load(file, overrides, torch.device(device).type)
    for word in overrides:  # which a benchmark's step leaves out
        if word.startswith('train:accum_iter='):
            opt['train']['accum_iter'] = int(word.partition('=')[2])
    return opt, benchmark.build(opt), benchmark.batch_of(opt)


def step(model, batch: dict[str, torch.Tensor], iteration: int) -> None:
    """One whole iteration, as the training loop runs it."""
    for micro in range(model.steps.accum_iter):
        model.steps.begin(iteration, micro)
        model.feed_data(batch)
        model.optimize_parameters(iteration)


def weights_of(model) -> dict[str, torch.Tensor]:
    """Copies of what a step changes: student, EMA, history, the optimisers' averages."""
    found = {}
    for name in ('net_g', 'net_g_ema', 'net_his'):
        net = getattr(model, name, None)
        if net is not None:
            found.update((f'{name}.{key}', value.detach().clone()) for key, value in net.state_dict().items())
    for optimizer in model.optimizers:
        for index, state in enumerate(optimizer.state.values()):
            tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
            found.update((f'optimizer.{index}.{key}', value.detach().clone()) for key, value in tensors.items())
    return found


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same, bit for bit."""
    names = [name for name in before if name in after and not bool((before[name] == after[name]).all())]
    return names + [name for name in before if name not in after]


def losses_of(model) -> dict[str, float]:
    """The losses of the last step, all finite.

    Raises:
        Failed: one is not.
    """
    losses = {name: float(value) for name, value in model.log_dict.items()}
    wrong = [f'{name} = {value}' for name, value in losses.items() if not math.isfinite(value)]
    if wrong or not losses:
        raise Failed(f'{", ".join(wrong) or "no loss"}')
    return losses


def gradient_of(model) -> torch.Tensor:
    """The student's gradient of the last step as one vector on the host."""
    parameters = model.get_bare_model(model.net_g).parameters()
    return torch.cat([p.grad.flatten().float().cpu() for p in parameters if p.grad is not None])


def differences(ours: tuple, theirs: tuple, bounds: tuple[float, float]) -> dict[str, float]:
    """Largest relative differences of (losses, gradient) to others.

    Raises:
        Failed: they are beyond the bounds, or not of the same losses.
    """
    if ours[0].keys() != theirs[0].keys():
        raise Failed(f'losses {", ".join(ours[0])} instead of {", ".join(theirs[0])}')
    off = {name: abs(value - theirs[0][name]) / max(abs(theirs[0][name]), 1e-12) for name, value in ours[0].items()}
    worst = max(off, key=off.get)
    gradient = float((ours[1] - theirs[1]).norm() / theirs[1].norm())
    if not (off[worst] <= bounds[0] and gradient <= bounds[1]):
        raise Failed(
            f'{worst} differs by {off[worst]:.1e}, the gradient by {gradient:.1e}; allowed {bounds[0]:g}, {bounds[1]:g}'
        )
    return {'losses': off[worst], 'gradient': gradient}


@contextlib.contextmanager
def no_waits(device: torch.device):
    """Inside, every operation for which the host would wait for a GPU raises."""
    if device.type != 'cuda':
        yield
        return
    torch.cuda.synchronize()
    former = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(former)


class Warnings(logging.Handler):
    """The warnings of a run, while it is entered."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __enter__(self):
        logging.getLogger('basicsr').addHandler(self)
        return self

    def __exit__(self, *exc):
        logging.getLogger('basicsr').removeHandler(self)


def clean(device: torch.device) -> None:
    """After a part: what it held goes.

    Raises:
        RuntimeError: the GPU does not answer any more.
    """
    gc.collect()
    if device.type == 'cuda' and torch.cuda.is_initialized():  # else its processes had the GPU, not this one
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def agreement(place: Place, file: str, overrides: list[str]) -> dict[str, Any]:
    """The device's float32 against the CPU's: one step from the same weights on the same batch."""
    plain = [
        *overrides,
        'use_tf32=false',
        'train:gaussian_noise_prob=0',
        'train:gaussian_blur_prob=1',
    ]  # no device's draws
    found = []
    for device in ('cpu', place.device):
        _, model, batch = build(file, plain, device)
        before = {name: value.cpu() for name, value in weights_of(model).items()}
        step(model, batch, 1)
        found.append((before, (losses_of(model), gradient_of(model))))
    (first, theirs), (second, ours) = found
    if changed(first, second):
        raise Failed(f'the networks do not begin alike: {changed(first, second)[0]}')
    return differences(ours, theirs, (LOSSES, GRADIENT))


def method(place: Place, file: str, overrides: list[str]) -> dict[str, Any]:
    """Steps of a method: finite, without a wait of the host, and they move the weights."""
    instead = place.device.type == 'cpu' and 'use_amp=true' in overrides and 'amp_bf16=true' not in overrides
    if instead:  # float16 takes minutes there
        overrides = [*overrides, 'amp_bf16=true']
    _, model, batch = build(file, overrides, place.device)
    before = weights_of(model)
    for iteration in (1, 2):
        step(model, batch, iteration)
    with no_waits(place.device):
        for iteration in (3, 4, 7):  # the first five measure gradients, too
            step(model, batch, iteration)
    losses = losses_of(model)
    iteration = 8
    # In float16 the first steps may overflow until the scale is found.
    while _still(model, before) and model.steps.scaler is not None and iteration < 40:
        step(model, batch, iteration)
        iteration += 1
    if _still(model, before):
        raise Failed('no step has moved a weight')
    bad, _ = model.steps.take()
    if bad:
        raise Failed(f'iteration {bad[0].iteration} is not finite: {bad[0].terms}')
    for name, value in weights_of(model).items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise Failed(f'{name} is not finite')
    model.get_current_log()
    figures = {'losses': len(losses), 'iterations': iteration - 1}
    return {**figures, 'in place of fp16': 'bf16'} if instead else figures


def _still(model, before):
    """Whether no weight of the student has moved."""
    for name, value in model.net_g.state_dict().items():
        if value.is_floating_point() and float((value - before[f'net_g.{name}']).abs().max()) > 0:
            return False
    return True


def mode(place: Place, options: list[str], bounds: tuple[float, float]) -> dict[str, Any]:
    """One step in a mode against float32 on the same device, and more that move the weights."""
    found, plain = [], ['use_tf32=false']
    for more in (plain, [*plain, *options]):
        opt, model, batch = build(*_edsr(more), place.device)
        if model.steps.scaler is not None:
            # As after the first steps of a training, which look for the scale.
            model.steps.scaler = model.run.scaler = torch.amp.GradScaler(place.device.type, init_scale=256.0)
        before = weights_of(model)
        step(model, batch, 1)
        found.append((losses_of(model), gradient_of(model)))
        if _still(model, before):
            raise Failed('the step has not moved the weights')
    return differences(found[1], found[0], bounds)


def overflow(place: Place, options: list[str]) -> dict[str, Any]:
    """A batch that overflows leaves everything bit-equal; the next one moves it."""
    _, model, batch = build(*_edsr(options), place.device)
    for iteration in (1, 2):
        step(model, batch, iteration)
    scale = model.steps.scaler.get_scale() if model.steps.scaler else None
    huge = {name: torch.full_like(value, torch.finfo(torch.float32).max) for name, value in batch.items()}
    model.steps.take()
    before = weights_of(model)
    step(model, huge, 3)
    moved = changed(before, weights_of(model))
    if moved:
        raise Failed(f'{len(moved)} tensors changed, such as {moved[0]}')
    if bool(model.steps.ok):
        raise Failed('the step says that its gradient was finite')
    figures = {'bit-equal': len(before)}
    if scale is not None:
        figures['scale'] = f'{scale:g} to {model.steps.scaler.get_scale():g}'
        if not model.steps.scaler.get_scale() < scale:
            raise Failed(f'the scale stays at {scale:g}')
    for iteration in range(4, 40):
        step(model, batch, iteration)
        if changed(before, weights_of(model)):
            losses_of(model)
            return figures
    raise Failed('later steps do not move the weights either')


# ---------------------------------------------------------------------------------------------------------------------
# Trainings: real processes of our command on made images


def _run_file(place, name, total, *more):
    """Write images and an option file into the place's folder; returns the file's name."""
    rng = np.random.default_rng(0)
    for index in range(4):
        image = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((12, 12, 1))).astype(np.uint8)
        write_image(place.folder / 'HR' / f'{index}.png', image)
        write_image(place.folder / 'LR' / f'{index}.png', image[2::4, 2::4])
    raw = option_files.read('train_edsr_x4').options
    sets = [
        f'datasets:{part}:{key}={value}'
        for part in ('train', 'val')
        for key, value in {'dataroot_gt': 'HR', 'dataroot_lq': 'LR', 'filename_tmpl': "'{}'"}.items()
    ]
    option_files.apply_overrides(
        raw,
        [
            *_EDSR,
            *_SIZE,
            *sets,
            f'name={name}',
            'datasets:train:num_worker_per_gpu=1',
            'network_t:allow_random=true',
            'network_vqgan:allow_random=true',
            'path:pretrain_network_t=null',
            'path:pretrain_network_vqgan=null',
            'train:check_teacher=false',
            f'train:total_iter={total}',
            'val:val_freq=1000000',
            'logger:print_freq=1',
            'logger:save_checkpoint_freq=4',
            'logger:use_tb_logger=false',
            'logger:wandb=null',
            *more,
        ],
    )
    file = f'{name}.yml'
    (place.folder / file).write_text(safe_yaml.dump(raw), encoding='utf-8')
    return file


def environment() -> dict[str, str]:
    """For processes of this package, from whatever folder they start."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get('PYTHONPATH')])])
    return {**os.environ, 'PYTHONPATH': path, 'PYTHONUNBUFFERED': '1'}


def _command(*words, launcher=()):
    return [sys.executable, *launcher, '-m', 'dckd_sr.train', *words]


def _train(place, *words, launcher=(), device=None):
    """Run a training to its end; returns what it printed.

    Raises:
        Failed: its exit code is not 0, or it ran elsewhere than on the device.
    """
    done = subprocess.run(
        _command(*words, launcher=launcher),
        cwd=place.folder,
        env={**environment(), 'NCCL_DEBUG': 'VERSION'},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding='utf-8',
        errors='replace',
    )
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()] or ['']
        told = next((line for line in lines if line.startswith('error: ')), lines[-1])
        raise Failed(f'the training ended with {done.returncode}: {told}')
    wanted = device or place.device.type
    if f' on {wanted}' not in done.stdout:
        raise Failed(f'the training did not run on {wanted}')
    return done.stdout


def _latest(place, name):
    """The weights that a training ended with."""
    content = checkpoint.read_file(place.folder / 'experiments' / name / 'models' / 'net_g_latest.pth')
    return {f'{entry}.{key}': value for entry, weights in content.items() for key, value in weights.items()}


def _resumed(text, iteration, state=''):
    if f'{state}.state, iteration {iteration}.' not in text:
        raise Failed(f'it did not go on from iteration {iteration}')


def killed_and_resumed(place: Place) -> dict[str, Any]:
    """A training that is killed and continued ends with the weights of one that was not."""
    total = 8 if place.small else 60
    one, two = (_run_file(place, name, total) for name in ('undisturbed', 'killed'))
    _train(place, '-opt', one)
    states = place.folder / 'experiments' / 'killed' / 'training_states'
    with open(place.folder / 'killed.txt', 'wb') as output:
        process = subprocess.Popen(
            _command('-opt', two),
            cwd=place.folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None and not (states / '4.state').is_file():
                time.sleep(0.002)
            code = process.poll()
        finally:
            process.kill()
            process.wait()
    if code is not None:
        raise Failed(f'it ended with {code} before it was killed')
    text = _train(place, '-opt', two, '--auto_resume')
    if 'Resuming from ' not in text:
        raise Failed('it began anew')
    ours, theirs = _latest(place, 'killed'), _latest(place, 'undisturbed')
    apart = changed(theirs, ours)
    off = max(
        float((ours[name] - value).abs().max() / value.abs().max().clamp(min=1e-6)) for name, value in theirs.items()
    )
    if off > (0 if place.device.type == 'cpu' else 1e-2):
        raise Failed(f'{apart[0]} and {len(apart) - 1} more differ by {off:.1e} from the undisturbed run')
    return {'weights': 'bit-equal' if not apart else f'within {off:.1e}'}


def moved_between_devices(place: Place, first: str, second: str) -> dict[str, Any]:
    """A state of one device is continued on another."""
    name = 'moved'
    file = _run_file(place, name, 4, f'num_gpu={int(first != "cpu")}')
    _train(place, '-opt', file, device=first)
    more = ['--force_yml', f'num_gpu={int(second != "cpu")}', 'train:total_iter=8']
    _resumed(_train(place, '-opt', file, '--auto_resume', *more, device=second), 4)
    return _finite(place, name)


def basicsr_state(place: Place) -> dict[str, Any]:
    """A state as BasicSR writes it, of a CPU run with torch's defaults of those days, is continued on the device."""
    file = _run_file(place, 'theirs', 4, 'num_gpu=0')
    _train(place, '-opt', file, device='cpu')
    folder = place.folder / 'experiments' / 'theirs'
    path = folder / 'training_states' / '4.state'
    state = checkpoint.read_file(path)
    del state['dckd_sr']
    for optimizer in state['optimizers']:
        for group in optimizer['param_groups']:
            group.update(fused=None, foreach=None, capturable=False)
    torch.save(state, path)
    shutil.move(folder, place.folder / 'old')
    more = _run_file(place, 'ours', 8, f'num_gpu={int(place.device.type != "cpu")}')
    words = ['--force_yml', 'path:resume_state=old/training_states/4.state']
    _resumed(_train(place, '-opt', more, *words), 4)
    return _finite(place, 'ours')


def _finite(place, name):
    weights = _latest(place, name)
    if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
        raise Failed('the weights are not finite')
    return {'finite': len(weights)}


def launched(place: Place) -> dict[str, Any]:
    """torchrun with one process: nccl on a GPU, gloo on a CPU."""
    file = _run_file(place, 'launched', 4, f'num_gpu={int(place.device.type != "cpu")}')
    launcher = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1')
    text = _train(place, '-opt', file, '--launcher', 'pytorch', launcher=launcher)
    version = next((line.partition('NCCL version ')[2] for line in text.splitlines() if 'NCCL version ' in line), None)
    if place.device.type == 'cuda' and version is None and torch.distributed.is_nccl_available():
        version = 'not told'
    return {'backend': f'nccl {version}' if version else 'gloo', **_finite(place, 'launched')}


# ---------------------------------------------------------------------------------------------------------------------
# Compilation


def compiled(place: Place, kind: str, overrides: list[str], graphs: bool = False) -> dict[str, Any]:
    """Compiled networks against plain ones, several steps; everything is really compiled, with CUDA graphs or not."""
    more = [*overrides, 'use_tf32=false']
    if place.small:
        more += ['network_vqgan:ddconfig:num_res_blocks=1', 'network_g:num_block=1', 'network_t:num_block=1']
        more += ['network_vqgan:ddconfig:ch_mult=[1, 1]', 'train:cl_opt:weights=[0.5, 1.0]']
    found = []
    for options in (more, [*more, 'use_compile=true', f'compile_mode={kind}']):
        _, model, batch = build(*_edsr(options), place.device)
        with Warnings() as warnings:
            begin = time.perf_counter()
            first = 101  # the first five measure gradients, for which there are no CUDA graphs
            step(model, batch, first)
            found.append((losses_of(model), gradient_of(model)))
            seconds = time.perf_counter() - begin
            for iteration in range(first + 1, first + (4 if place.small else 9)):
                step(model, batch, iteration)
            losses_of(model)
        told = [line for line in warnings.lines if 'compile' in line]
        if told:
            raise Failed(told[0])
    compiler = model.run.compiler
    if not compiler.counts:
        raise Failed('nothing was compiled')
    if compiler.cuda_graphs != (graphs and place.device.type == 'cuda'):
        raise Failed(f'it runs as {compiler.mode}, CUDA graphs: {compiler.cuda_graphs}')
    figures = {'seconds': seconds, 'as': compiler.mode, 'compiled': sum(compiler.counts.values())}
    return {**figures, **differences(found[1], found[0], (1e-3, 5e-2))}


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def speed(place: Place, options: list[str]) -> dict[str, Any]:
    """`benchmark step` of SwinIR x4, batch 16, beside the released order."""
    overrides, size = [*options], 16
    if place.small:
        overrides, size = [*_SWINIR, *_SIZE, *overrides], 1
    result = benchmark.step('train_swinir_x4', size, place.device.type, 5, overrides)
    whole = result['step']
    figures = {
        'ms': whole['seconds'] * 1e3,
        'ratio': result['ratio_to_released'],
        'peak_gb': whole['peak_memory'] / 1e9,
        'floor_ms': whole['floor_seconds'] * 1e3,
        'times_floor': whole['times_floor'],
        'batch': size,
        'details': result,
    }
    if result['refused']:
        raise Failed(f'{result["refused"]}; {figures["ms"]:.1f} ms a step')
    return figures


def inference(place: Place, options: list[str]) -> dict[str, Any]:
    """`benchmark infer` of SwinIR x4, 1280x720 out."""
    overrides = [*_SWINIR, *options] if place.small else options
    result = benchmark.infer('train_swinir_x4', 1, place.device.type, overrides)
    networks = result['networks']
    figures = {f'{role}_ms': row['latency'] * 1e3 for role, row in networks.items()}
    figures.update((f'{role}_peak_gb', row['peak_memory'] / 1e9) for role, row in networks.items())
    return {**figures, 'details': result}


# ---------------------------------------------------------------------------------------------------------------------
# The list


def _parts():
    exact, half = (LOSSES, GRADIENT), (HALF_LOSSES, HALF_GRADIENT)
    parts = {
        'agree-edsr': Part(
            'EDSR, DCKD: as on the CPU',
            lambda place: agreement(place, *_edsr(_LCR, ['train:resize_prob=1'])),
            40,
            'steps',
        ),
        'agree-swinir': Part(
            'SwinIR, DCKD: as on the CPU',
            lambda place: agreement(place, 'train_swinir_x4', [*_SWINIR, *_SIZE]),
            40,
            'steps',
        ),
    }
    for index, (name, configuration) in enumerate(METHODS.items(), 1):
        parts[f'method-{index}'] = Part(
            f'{name}: finite, no wait', lambda place, c=configuration: method(place, *c), 30, 'steps'
        )
    for name, title, options, bounds in (
        ('fp16', 'float16', _FP16, half),
        ('bf16', 'bfloat16', _BF16, half),
        ('channels-last', 'channels-last', _LAST, exact),
        ('checkpointing', 'checkpointing', _AGAIN, exact),
        ('all-modes', 'bfloat16, channels-last, checkpointing', [*_BF16, *_LAST, *_AGAIN], half),
    ):
        parts[f'mode-{name}'] = Part(
            f'{title}: as float32', lambda place, o=options, b=bounds: mode(place, o, b), 30, 'steps'
        )
    for name, title, options in (
        ('float32', 'float32', []),
        ('fp16', 'float16', _FP16),
        ('accumulated', 'accumulated', ['train:accum_iter=2']),
        ('sgd', 'SGD with momentum', ['train:optim_g={type: SGD, lr: 0.0001, momentum: 0.9}']),
    ):
        parts[f'overflow-{name}'] = Part(
            f'overflow, {title}: bit-equal', lambda place, o=options: overflow(place, o), 30, 'steps'
        )
    parts['killed'] = Part('train, kill, --auto_resume', killed_and_resumed, 90, 'killed')
    parts['state-from-cpu'] = Part(
        'a state of the CPU, continued here',
        lambda place: moved_between_devices(place, 'cpu', place.device.type),
        60,
        'states',
    )
    parts['state-to-cpu'] = Part(
        'a state from here, continued on the CPU',
        lambda place: moved_between_devices(place, place.device.type, 'cpu'),
        60,
        'states',
    )
    parts['state-basicsr'] = Part('a state of BasicSR, continued here', basicsr_state, 60, 'states')
    parts['torchrun'] = Part('torchrun, one process', launched, 60, 'torchrun')
    for precision, options in (
        ('float32', ['use_tf32=false']),
        ('tf32', ['use_tf32=true']),
        ('bf16', ['use_tf32=true', *_BF16]),
    ):
        parts[f'speed-{precision}'] = Part(
            f'step of SwinIR x4, {precision}', lambda place, o=options: speed(place, o), 60, f'speed-{precision}'
        )
    for precision, options in (('float32', ['use_tf32=false']), ('bf16', ['use_tf32=true', *_BF16])):
        parts[f'infer-{precision}'] = Part(
            f'inference of SwinIR x4, {precision}', lambda place, o=options: inference(place, o), 40, 'infer'
        )
    accumulated = [*_SHARES, 'train:accum_iter=2']
    for name, title, kind, options, graphs in (
        ('default', 'shares, accumulated', 'default', accumulated, False),
        ('graphs', 'CUDA graphs', 'reduce-overhead', [], True),
        # Which these keep from CUDA graphs.
        ('graphs-accumulated', 'shares, accumulated', 'reduce-overhead', accumulated, False),
    ):
        parts[f'compile-{name}'] = Part(
            f'compiled, {kind}, {title}',
            lambda place, k=kind, o=options, g=graphs: compiled(place, k, o, g),
            100,
            f'compile-{name}',
        )
    parts['speed-compiled'] = Part(
        'step of SwinIR x4, bf16, channels-last, compiled',
        lambda place: speed(place, ['use_tf32=true', *_BF16, *_LAST, 'use_compile=true']),
        180,
        'speed-compiled',
    )
    return parts


PARTS = _parts()
