"""The parts of a training step: when they begin and end, what they compute, move and keep.

A model is watched from outside, at the seams that its step has: `Speed`, its losses, its optimiser.
"""

from __future__ import annotations

import contextlib
import statistics
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dckd_sr import precision
from dckd_sr.complexity import Living
from dckd_sr.ops import winograd

PARTS = {
    'data': 'data',
    'student': 'student forward',
    'teacher': 'teacher',
    'history': 'degradation + history',
    'encoder_no_grad': 'encoder without gradient',
    'encoder_grad': 'encoder with gradient',
    'losses': 'losses',
    'backward': 'backward',
    'optimizer': 'optimiser + EMA',
}


class Borders:
    """Where the parts of a step end.

    Args:
        stamp: called without arguments at every border; what it returns is kept.

    Attributes:
        marks: (part that ended, or None; stamp) in order.
    """

    def __init__(self, stamp):
        self.stamp, self.part, self.marks = stamp, None, []

    def enter(self, part):
        """The present part ends, and another one begins; returns the former."""
        self.marks.append((self.part, self.stamp()))
        former, self.part = self.part, part
        return former

    def around(self, part, function):
        """The function as a part of its own."""

        def inside(*args, **kwargs):
            former = self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(former)

        return inside

    def sums(self, difference):
        """part -> sum of ``difference(earlier stamp, later stamp)`` over its stretches."""
        totals = {}
        for (_, earlier), (part, later) in zip(self.marks, self.marks[1:]):
            if part is not None:
                totals[part] = totals.get(part, 0) + difference(earlier, later)
        return totals


class _Seam:
    """A model's `Speed`, with a border before and after every network."""

    def __init__(self, run, borders):
        self._run, self._borders = run, borders

    def __getattr__(self, name):
        return getattr(self._run, name)

    def __call__(self, role, *args, **kwargs):
        if role == 'encoder':
            part = 'encoder_grad' if torch.is_grad_enabled() else 'encoder_no_grad'
        else:
            part = role if role in PARTS else 'losses'
        return self._borders.around(part, self._run)(role, *args, **kwargs)


@contextlib.contextmanager
def watched(model, borders):
    """Let a model's steps cross the borders; afterwards it is as before."""
    step, run, steps = model.optimizer_g.step, model.run, model.steps
    scaled = steps.scaled

    def backward(loss):
        borders.enter('backward')
        return scaled(loss)

    def optimize(*args, **kwargs):
        borders.enter('optimizer')
        return step(*args, **kwargs)

    parts = {'terms': 'losses', 'teach': 'teacher', 'negative_inputs': 'history'}
    model.run, steps.scaled, model.optimizer_g.step = _Seam(run, borders), backward, optimize
    for name, part in parts.items():
        if hasattr(model, name):
            setattr(model, name, borders.around(part, getattr(model, name)))
    try:
        yield
    finally:
        model.run, model.optimizer_g.step = run, step
        del steps.scaled
        for name in parts:
            vars(model).pop(name, None)


def parts_of_step(model, batch, iteration, stamp):
    """Run one step with a stamp at every border between its parts; returns the `Borders`."""
    borders = Borders(stamp)
    with watched(model, borders):
        borders.enter('data')
        model.feed_data(batch)
        borders.enter('optimizer')  # which begins by dropping the gradients
        model.optimize_parameters(iteration)
        borders.enter(None)
    return borders


class Ledger(Living):
    """What passes through memory while a step runs.

    Attributes:
        moved: bytes so far that no implementation of the parts could leave out: of every stretch between two calls of
            `close`, what was there before and was read, and what was made or changed and is there after it.
    """

    def __init__(self, known):
        super().__init__(known)
        self.moved, self._read, self._written = 0, {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        changes = func._schema.is_mutable
        there = {_key(tensor) for tensor in inputs}
        if changes or not outputs or not all(_key(tensor) in there for tensor in outputs):  # else a view
            self._note(inputs, outputs if outputs else inputs[:1] if changes else [])
        return out

    def _note(self, inputs, outputs):
        for table, tensors in ((self._read, inputs), (self._written, outputs)):
            for tensor in tensors:
                if table is self._read and _key(tensor) in self._written:
                    continue  # made in this stretch
                size = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
                table.setdefault(_key(tensor), {})[tensor.storage_offset(), tensor.numel()] = size

    def _free(self, key, size):
        super()._free(key, size)
        self._written.pop(key, None)

    def close(self):
        """End a stretch; returns ``moved``."""
        self.moved += sum(sum(views.values()) for views in self._read.values())
        self.moved += sum(max(views.values()) for key, views in self._written.items() if key in self.seen)
        self._read, self._written = {}, {}
        return self.moved


def _key(tensor):
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def counting(run):
    """Count FLOPs; what a `Speed` compiles runs as it is written meanwhile. Gives torch's counter."""
    compiles = run.compile_mode is not None and hasattr(torch.compiler, 'set_stance')  # since torch 2.6
    eager = torch.compiler.set_stance('force_eager') if compiles else contextlib.nullcontext()
    mode, run.compile_mode = run.compile_mode, None
    try:
        # Fused attention is not counted on every device by every torch.
        with eager, winograd.plain(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        run.compile_mode = mode


def account(model, batch, iteration):
    """FLOPs of a step's parts, and the bytes that they cannot but move; see `Ledger`.

    Returns:
        (part -> {'convolutions': FLOPs, 'products': those of all else}, part -> bytes).
    """
    ledger = Ledger({_key(tensor) for tensor in tensors_of(model)})
    model.optimizer_g.zero_grad()
    with counting(model.run) as counter, ledger:
        borders = parts_of_step(model, batch, iteration, lambda: (*_kinds(counter), ledger.close()))
    convolutions, products, moved = (borders.sums(lambda a, b, i=i: b[i] - a[i]) for i in range(3))
    flops = {part: {'convolutions': count, 'products': products[part]} for part, count in convolutions.items()}
    return flops, moved


def _kinds(counter):
    """FLOPs so far: of convolutions, and of all else."""
    counts = counter.get_flop_counts().get('Global', {})
    convolutions = sum(count for operation, count in counts.items() if 'convolution' in str(operation))
    return convolutions, sum(counts.values()) - convolutions


def tensors_of(holder):
    """The tensors that an object's networks, optimisers and attributes hold from step to step, gradients apart."""
    found = []
    for value in vars(holder).values():
        if isinstance(value, torch.nn.Module):
            found += [*value.parameters(), *value.buffers()]
        elif isinstance(value, torch.optim.Optimizer):
            found += [leaf for leaf in tree_leaves(list(value.state.values())) if isinstance(leaf, torch.Tensor)]
        elif isinstance(value, torch.Tensor):
            found.append(value)
    return found


def peak_memory(step, held, device, others=()):
    """Most bytes at a time in a step: the tensors that it holds, and those that it makes.

    On CUDA as the allocator counts. Elsewhere the tensors that live at the same time, without what an operation uses
    inside: what a process holds depends on what its C library keeps of earlier steps.

    Args:
        step: runs it; gradients have been dropped before.
        held: tensors that are its own and stay.
        others: tensors that are there, too, and are not counted.
    """
    known = {_key(tensor): tensor.untyped_storage().nbytes() for tensor in held}
    if device.type == 'cuda':
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        wait(device)
        return sum(known.values()) + torch.cuda.max_memory_allocated(device) - before
    with Living({*known, *map(_key, others)}) as living:
        step()
    return sum(known.values()) + living.peak


def wait(device):
    """Until the device has done what it was asked to."""
    getattr(torch, device.type).synchronize()


def times(model, batch, iterations):
    """Seconds of a step's parts, medians over the iterations; by the device's events where it has some."""
    device, rows = model.device, []
    for iteration in iterations:
        if device.type == 'cuda':

            def stamp():
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                return event

            borders = parts_of_step(model, batch, iteration, stamp)
            wait(device)
            rows.append(borders.sums(lambda a, b: a.elapsed_time(b) / 1e3))
        else:
            borders = parts_of_step(model, batch, iteration, time.perf_counter)
            rows.append(borders.sums(lambda a, b: b - a))
    return {part: statistics.median(row.get(part, 0) for row in rows) for part in PARTS if part in rows[0]}


# ---------------------------------------------------------------------------------------------------------------------
# What the device can do


def matmul_peak(device, dtype=torch.float32, tf32=False):
    """FLOP/s of the fastest of several large matrix products."""
    size = 8192 if device.type == 'cuda' else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    with precision.tf32_as(tf32):
        return 2 * size**3 / fastest(lambda: torch.mm(a, b), device)


def copy_peak(device):
    """Bytes per second, read and written, of the fastest of several large copies."""
    source = torch.ones(2**28 if device.type == 'cuda' else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), device)


def fastest(function, device, repeats=10):
    """Seconds of the fastest of several calls, after two that do not count."""
    seconds = []
    for _ in range(repeats + 2):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def peaks(run):
    """Name -> FLOP/s or bytes per second, of a `Speed`'s device now; of precisions that it may use."""
    device = run.device
    found = {'float32': matmul_peak(device)}
    if device.type == 'cuda':
        found['tf32'] = matmul_peak(device, tf32=True)
    if device.type == 'cuda' or run.amp:
        found['bfloat16'] = matmul_peak(device, torch.bfloat16)
    found['copy'] = copy_peak(device)
    return found


def precisions(run, part):
    """'convolutions' and 'products' -> the fastest precision that a `Speed` lets those of a part have."""
    roles = {'backward': ('student', 'encoder'), 'encoder_grad': ('encoder',), 'encoder_no_grad': ('encoder',)}
    if set(roles.get(part, (part,))) & set(run.amp):
        return dict.fromkeys(precision.TF32._fields, 'bfloat16')  # float16's products take as long
    rounded = precision.rounds(run.device)._asdict()
    return {kind: 'tf32' if used else 'float32' for kind, used in rounded.items()}
