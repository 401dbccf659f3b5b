"""What a training step needs of a GPU's memory, told without one: ``benchmark step --memory``.

The step runs on tensors without values (`fake_gpu`), and the bytes of those that live at the same time are counted, in
blocks of 512 as torch's allocator has them. What is not counted is `MARGIN`'s.
"""

from __future__ import annotations

import logging
import math
import sys
import traceback
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dckd_sr import benchmark, complexity, fake_gpu, option_files, option_keys
from dckd_sr.data.files import image_names
from dckd_sr.data.pair_sizes import header_size
from dckd_sr.errors import UserError, reason
from dckd_sr.inference import VAL_KEYS, infer
from dckd_sr.ops.gradients import Watch

GIB = 2**30
CARDS = 8, 12, 16, 24  # GB that are printed on cards, which have about as many GiB
CONTEXT, SPARE = 0.7 * GIB, 1.1  # of CUDA and its libraries; for workspaces of convolutions, and gaps between blocks
_BLOCK = 512
# What needs less, each alone and all together; of a step, in the order of what it costs.
SAVINGS = (
    ('train:negatives_micro_batch=1',),
    ('use_checkpoint=true',),
    ('use_amp=true', 'amp_bf16=true'),
)


class Living(TorchDispatchMode):
    """Bytes on the GPU that is not there.

    Attributes:
        now, peak: bytes that live, and the most at a time since ``peak`` was set.
        expected: about the peak, where a step before tells it.
        where: the line of this package or of BasicSR that reached it, 'backward' in a backward pass.
    """

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak, self.where, self.expected = {}, 0, 0, '', math.inf

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == 'cuda':
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage):
        key = storage._cdata
        if key in self.sizes:  # a view, or written in place
            return
        self.sizes[key] = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self.now += self.sizes[key]
        weakref.finalize(storage, self._free, key)
        if self.now > self.peak:
            self.peak = self.now
            if self.now > 0.97 * self.expected:
                self.where = _place()

    def _free(self, key):
        self.now -= self.sizes.pop(key)


def _place():
    lines = [f for f in traceback.extract_stack() if '/dckd_sr/' in f.filename or '/basicsr/' in f.filename]
    lines = [f for f in lines if Path(f.filename) not in (Path(__file__), Path(fake_gpu.__file__))]
    return f'{Path(lines[-1].filename).name}:{lines[-1].lineno} {lines[-1].line}' if lines else 'backward'


def fits(peak: float) -> float:
    """GB that a card has at least, on which a step with this predicted peak in bytes is expected to run."""
    return (peak * SPARE + CONTEXT) / GIB


def stages(data: dict[str, Any]) -> tuple[int, int]:
    """(batch, gt_size) of the stage of a progressive schedule with the most pixels; of other files, theirs."""
    batch, side = data.get('batch_size_per_gpu') or 1, data.get('gt_size')
    batches, sides = data.get('mini_batch_sizes') or [batch], data.get('gt_sizes') or [side]
    if len(batches) == 1:
        batches = batches * len(sides)
    if len(sides) == 1:
        sides = sides * len(batches)
    return max(zip(batches, sides), key=lambda pair: pair[0] * (pair[1] or 0) ** 2)


def predict(
    path: str, batch_size: int | None = None, overrides: tuple[str, ...] = (), validates: bool = False
) -> dict[str, Any]:
    """Bytes of one training step.

    Args:
        path, overrides: see `benchmark.load`.
        batch_size: images of a batch; None: as the file says, for its largest stage.
        validates: predict validation, too.

    Returns:
        dict: ``batch``, ``gt_size``, ``held`` (name -> bytes that stay), ``peak``, ``where`` (see `Living`),
        ``peak_measuring`` (of the first iterations, which measure the gradient of each loss), ``guessed`` (lines that
        decide by values, of which there are none), ``validation`` (None, or ``lq``, (h, w) of an image, whether it
        ``is_there``, and ``peak``).

    Raises:
        UserError: mistakes in options, or a network that cannot run on tensors without values.
    """
    logging.disable(logging.WARNING)
    try:
        with fake_gpu.fake_gpu(), fake_gpu.Waits() as waits, Living() as living:
            opt = benchmark.load(path, overrides)
            raw = _options(path, overrides)
            data, accum_iter = raw['datasets']['train'], raw['train'].get('accum_iter') or 1
            batch, side = stages({**data, **opt['datasets']['train'], **_given(data)})
            if side is None:
                raise UserError('datasets.train.gt_size: missing; the images of a step are of this size')
            batch = batch_size or batch
            opt['datasets']['train'].update(batch_size_per_gpu=batch, gt_size=side)
            opt['train']['accum_iter'] = accum_iter
            opt['use_compile'] = False
            model = benchmark.build(opt)

            def step(iteration):
                for micro in sorted({0, accum_iter - 1}):
                    model.steps.begin(iteration, micro)
                    model.feed_data(_batch(opt, batch, side, data.get('teacher_cache')))
                    model.optimize_parameters(iteration)
                for name in ('lq', 'gt', 'output', 'cached_teacher'):
                    vars(model).pop(name, None)

            waits.found.clear()  # of building
            watch, peaks = model.watch, []
            model.watch = Watch(0)  # which measures nothing
            for iteration in (1, 2, 1):  # the optimiser has its state from the second one on
                living.peak, living.expected = living.now, peaks[0] if len(peaks) == 1 else math.inf
                step(iteration)
                peaks.append(living.peak)
                model.watch = watch if iteration == 2 else model.watch
            held = _held(model)
            held['other'] = living.now - sum(held.values())
            # Its gate reads one value where an optimiser is not fused: whether to take the step.
            places = {place for what, place in waits.found if what == 'item' and not place.startswith('stepping.py')}
            validation = _validation(model, opt, raw, living) if validates else None
    except UserError:
        raise
    except Exception as error:  # an operation without a rule for shapes, a branch on values: whatever a network raises
        raise UserError(f'{path}: its step cannot run on tensors without values: {reason(error)}') from error
    finally:
        logging.disable(logging.NOTSET)
    return {
        'batch': batch,
        'gt_size': side,
        'accum_iter': accum_iter,
        'held': {name: size for name, size in held.items() if size > 0},
        'peak': peaks[1],
        'where': living.where,
        'peak_measuring': peaks[2],
        'guessed': sorted(places),
        'validation': validation,
    }


def _given(data):
    return {key: data[key] for key in ('mini_batch_sizes', 'gt_sizes') if data.get(key)}


def _options(path, overrides):
    """The file's options as they are written."""
    file = option_files.read(path)
    option_files.apply_overrides(file.options, overrides)
    return file.options


def _batch(opt, batch, side, cached):
    shapes = {'lq': ('input', side // opt['scale']), 'gt': ('output', side)}
    shapes.update({'teacher': ('output', side)} if cached else {})
    return {key: torch.rand(batch, benchmark.channels(opt, end), n, n) for key, (end, n) in shapes.items()}


def _validation(model, opt, raw, living):
    """The peak with the largest LQ image of the file's sets, or one of the papers' size where none of them is there."""
    sets = [block for name, block in raw['datasets'].items() if name.split('_')[0] == 'val' and isinstance(block, dict)]
    if not sets:
        return None
    sizes = [size for block in sets for size in _sizes(block, opt['scale'])]
    size = max(sizes, key=math.prod) if sizes else complexity.paper_shape(opt['scale'])[2:]
    living.peak, net, val = living.now, getattr(model, 'net_g_ema', None) or model.net_g, raw.get('val') or {}
    lq = torch.rand(1, benchmark.channels(opt, 'input'), *size).to(model.device)
    with torch.no_grad():
        infer(net.eval(), lq, opt['scale'], **{key: val.get(key) for key in VAL_KEYS})
    return {'lq': list(size), 'is_there': bool(sizes), 'peak': living.peak}


def _sizes(block, scale):
    """(height, width) of a set's LQ images, by their headers; nothing of what is not there."""
    for key, factor in (('dataroot_lq', 1), ('dataroot_gt', scale)):
        folder = Path(option_keys.expand(str(block.get(key) or '')))
        if block.get(key) and folder.is_dir() and folder.suffix != '.lmdb':
            found = [header_size('', str(folder / name)) for name in image_names(str(folder))]
            return [(size[0] // factor, size[1] // factor) for size in found if size]
    return []


def _held(model):
    """Name -> bytes of what stays from step to step."""
    found = {}
    for attribute, net in vars(model).items():
        if isinstance(net, torch.nn.Module) and attribute.startswith('net_'):
            found[attribute] = _bytes([*net.parameters(), *net.buffers()])
    states = [value for optimizer in model.optimizers for state in optimizer.state.values() for value in state.values()]
    found['optimiser'] = _bytes(value for value in states if isinstance(value, torch.Tensor))
    gradients = [p.grad for p in model.net_g.parameters() if p.grad is not None]
    found['gradients'] = _bytes(gradients)
    return found


def _bytes(tensors):
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(-(-size // _BLOCK) * _BLOCK for size in storages.values())


def variants(path: str, batch_size: int | None = None, overrides: tuple[str, ...] = ()):
    """Yields (overrides beside the given ones, `predict` with them): the file as it is, each of `SAVINGS`, all of them.

    Last, half a batch with twice as many micro-batches, in addition to all of them.
    """
    first = predict(path, batch_size, overrides, validates=True)
    yield (), first
    train = _options(path, overrides)['train']
    savings = [saving for saving in SAVINGS if train.get('cl_opt') or 'negatives' not in saving[0]]
    for saving in savings:
        yield saving, predict(path, batch_size, (*overrides, *saving))
    every = tuple(key for saving in savings for key in saving)
    if len(savings) > 1:
        yield every, predict(path, batch_size, (*overrides, *every))
    if first['batch'] > 1:
        half = -(-first['batch'] // 2)
        halved = (*every, f'train:accum_iter={2 * first["accum_iter"]}')
        yield (f'batch {half}', *halved), predict(path, half, (*overrides, *halved))


def table(result: dict[str, Any]) -> str:
    """What `predict` found with the options of `variants`, for a terminal."""
    rows = [['with', 'GiB at the peak', 'held', *(f'{size} GB' for size in CARDS)]]
    for variant in result['variants']:
        peak = variant['peak']
        cells = ['yes' if fits(peak) <= size else '-' for size in CARDS]
        held = sum(variant['held'].values())
        names = ', '.join(variant['with']) or 'the file as it is'
        rows.append([names, f'{peak / GIB:.2f}', f'{held / GIB:.2f}', *cells])
    first = result['variants'][0]
    lines = [
        f'{result["option_file"]}: batch {first["batch"]}, gt_size {first["gt_size"]}, on a GPU that is not there',
        '',
        *benchmark.aligned(rows),
        '',
        f'most at a time: {first["where"]}',
        'held: ' + ', '.join(f'{name} {size / 2**20:.0f} MiB' for name, size in first['held'].items()),
        f'the first iterations, which measure the gradient of each loss: {first["peak_measuring"] / GIB:.2f} GiB; '
        'where that is too much, a training goes on without',
        f'"yes": {SPARE} times the peak and {CONTEXT / GIB:.1f} GiB fit, for libraries, workspaces and gaps: an '
        'assumption, not measured on a card; compiled networks may need more or less',
    ]
    if first['guessed']:
        places = '; '.join(first['guessed'])
        lines.append(f'a guess: there are no values here, and the step decides by some: {places}')
    if first['validation']:
        (height, width), there = first['validation']['lq'], first['validation']['is_there']
        which = 'the largest of its sets' if there else 'assumed, its sets are not there'
        lines.append(f'validation: {first["validation"]["peak"] / GIB:.2f} GiB, LQ {width}x{height} ({which})')
    return '\n'.join(lines)


def run(path: str, batch_size: int | None, overrides: tuple[str, ...], progress: bool) -> dict[str, Any]:
    """Everything that the command reports, as plain values; `progress` tells what is being tried."""
    found = []
    for names, prediction in variants(path, batch_size, overrides):
        found.append({'with': list(names), **prediction, 'card_gb': round(fits(prediction['peak']), 2)})
        if progress:
            print(f'{prediction["peak"] / GIB:.2f} GiB: {", ".join(names) or "the file as it is"}', file=sys.stderr)
    return {'command': 'step --memory', 'option_file': str(path), 'torch': torch.__version__, 'variants': found}
