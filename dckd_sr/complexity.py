"""What a network costs: parameters, operations, time and memory of a forward pass."""

from __future__ import annotations

import copy
import math
import statistics
import time
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dckd_sr.inference import padding_of

PAPERS_OUTPUT = (720, 1280)  # height and width at which tables of super-resolution papers count


def paper_shape(scale: int, channels: int = 3) -> tuple[int, int, int, int]:
    """(1, channels, h, w) of the input whose output is 1280x720, rounded up where ``scale`` does not divide it."""
    return (1, channels, *(math.ceil(side / scale) for side in PAPERS_OUTPUT))


def padded_shape(net: Callable[[torch.Tensor], torch.Tensor], shape: Sequence[int]) -> tuple[int, int, int, int]:
    """``shape``, (B, C, h, w), with h and w raised to the multiples that the network needs (`inference.padding_of`)."""
    batch, channels, height, width = shape
    multiple = padding_of(net)
    return (batch, channels, *(-(-side // multiple) * multiple for side in (height, width)))


def parameters(net: nn.Module) -> int:
    """How many numbers a network learns; buffers do not count, shared parameters count once.

    Tables of Swin networks differ here: SwinIR's own (897K at x4, lightweight) leaves the position bias tables out.
    """
    return sum(parameter.numel() for parameter in net.parameters())


def flops(net: nn.Module, shape: Sequence[int]) -> int:
    """Floating point operations of one forward pass: those of convolutions, linear layers and attention.

    A multiplication and an addition are two operations; papers print ``multiply_adds``, half of it. Nothing is
    computed, only shapes are followed; a network whose path depends on values is run.

    Args:
        shape: (B, C, h, w) of the input, padded here to what the network needs.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import

    net = copy.deepcopy(net).eval()  # networks that keep a tensor of their forward pass must not keep a fake one
    shape = padded_shape(net, shape)
    first = next(net.parameters(), torch.empty(0))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        return _count(fake, net, shape, first)
    except Exception:  # an operation without a shape rule, a branch on values: whatever the network's own code raises
        return _count(torch.no_grad(), net, shape, first)


def _count(mode, net, shape, like):
    counter = FlopCounterMode(display=False)
    # Fused attention is not counted on every device by every torch.
    with torch.no_grad(), mode, sdpa_kernel(SDPBackend.MATH), counter:
        net(torch.empty(shape, dtype=like.dtype, device=like.device).fill_(0.5))
    return counter.get_total_flops()


def multiply_adds(net: nn.Module, shape: Sequence[int]) -> int:
    """Multiplications that are followed by an addition, as papers count ("Multi-Adds", at ``paper_shape``)."""
    return flops(net, shape) // 2


def latency(
    net: Callable[[torch.Tensor], torch.Tensor],
    shape: Sequence[int],
    device: torch.device | str = 'cpu',
    repeats: int = 10,
) -> float:
    """Seconds of one forward pass without gradient, the median of ``repeats`` after two that do not count.

    Args:
        net: a network on ``device`` in the mode it is to be timed in, or a callable around one.
        shape: (B, C, h, w) of the input, padded here to what the network needs.
    """
    device, seconds = torch.device(device), []
    wait = getattr(torch, device.type).synchronize
    x = torch.rand(padded_shape(net, shape), device=device)
    with torch.no_grad():
        for _ in range(2 + repeats):
            wait()
            start = time.perf_counter()
            net(x)
            wait()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def throughput(
    net: Callable[[torch.Tensor], torch.Tensor],
    shape: Sequence[int],
    device: torch.device | str = 'cpu',
    repeats: int = 10,
) -> float:
    """Images per second in batches of ``shape[0]``; arguments as for ``latency``."""
    return shape[0] / latency(net, shape, device, repeats)


def peak_memory(net: nn.Module, shape: Sequence[int], device: torch.device | str = 'cpu') -> int:
    """Most bytes at a time in a forward pass without gradient: weights, input and activations.

    On CUDA as the allocator counts, with the workspaces of its libraries; elsewhere the tensors that live at the same
    time, which leaves out what an operation uses inside.

    Args:
        net: a network on ``device``, in the mode it is to be measured in.
        shape: (B, C, h, w) of the input, padded here to what the network needs.
    """
    device, shape = torch.device(device), padded_shape(net, shape)
    weights = [*net.parameters(), *net.buffers()]
    held = sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in weights}.values())
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.no_grad():
            net(torch.rand(shape, device=device))
        torch.cuda.synchronize(device)
        return held + torch.cuda.max_memory_allocated(device) - before
    known = {tensor.untyped_storage()._cdata for tensor in weights}
    with torch.no_grad(), Living(known) as living:
        net(torch.rand(shape, device=device))
    return held + living.peak


class Living(TorchDispatchMode):
    """Bytes of the storages that operations return, until they are freed; ``peak`` is the most at a time."""

    def __init__(self, known):
        super().__init__()
        self.seen, self.now, self.peak = set(known), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:  # a view, or written in place
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self.seen.discard(key)
        self.now -= size
