"""Networks in a form that does not depend on the size of the image they are exported with.

Export records the operations of one call. Where a forward decides by the size (which mask, how much padding, which of
two ways to a mean), the record holds for that size alone. Here such steps are replaced, in a copy of the network, by
ones that compute the same from the size, whatever it is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dckd_sr.archs.nafnet_arch import LocalMean
from dckd_sr.compat import hold_constants
from dckd_sr.inference import padding_of
from dckd_sr.ops import swin


class Exportable(nn.Module):
    """(B, C, h, w) float32 -> (B, C', h * scale, w * scale) float32, unclamped, any h and w.

    Args:
        net: the network; it is copied.
        scale: output size over input size.
        half: weights and computation in float16.
    """

    def __init__(self, net: nn.Module, scale: int, half: bool = False):
        super().__init__()
        net = hold_constants(copy.deepcopy(net).eval().requires_grad_(False))  # export and half() look for buffers
        for module in net.modules():
            if isinstance(module, LocalMean):
                module.forward = functools.partial(_local_mean, module)
            elif swin.is_block(module):
                module.forward = functools.partial(_swin_block, module)
        self.net = net.half() if half else net
        self.scale, self.half_precision, self.multiple = scale, half, padding_of(net)

    def forward(self, lq):
        height, width = lq.shape[2], lq.shape[3]
        x = lq.half() if self.half_precision else lq
        if self.multiple > 1:
            x = x.index_select(2, _mirrored(height, self.multiple, lq.device))
            x = x.index_select(3, _mirrored(width, self.multiple, lq.device))
        return self.net(x)[..., : height * self.scale, : width * self.scale].float()


@contextlib.contextmanager
def recorded():
    """While a network is recorded: its `torch.autograd.Function` are the operations in them, which files can hold."""
    kinds, before = _subclasses(torch.autograd.Function), {}
    for kind in kinds:
        if 'forward' in vars(kind):
            before[kind] = vars(kind).get('apply')
            kind.apply = functools.partial(_apply, kind)
    try:
        yield
    finally:
        for kind, apply in before.items():
            if apply is None:
                del kind.apply
            else:
                kind.apply = apply


def _subclasses(kind):
    return [each for child in kind.__subclasses__() for each in (child, *_subclasses(child))]


class _Context(types.SimpleNamespace):
    """What forward keeps for the backward pass, which there is none of."""

    needs_input_grad = ()

    def _nothing(self, *args):
        pass

    save_for_backward = save_for_forward = mark_dirty = mark_non_differentiable = set_materialize_grads = _nothing


def _apply(kind, *args):
    context = () if kind.setup_context is not torch.autograd.Function.setup_context else (_Context(),)
    return kind.forward(*context, *args)


class SizeFree(TorchFunctionMode):
    """Adaptive pooling and Tensor.unfold by indices that follow from the image's size: ONNX's own need numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, '__name__', '')
        if name in ('adaptive_avg_pool2d', 'adaptive_max_pool2d') and not kwargs.get('return_indices'):
            return _adaptive_pool(func, name == 'adaptive_max_pool2d', *args, **kwargs)
        if name == 'unfold' and isinstance(func, _METHOD):
            return _unfold(*args, **kwargs)
        return func(*args, **kwargs)


_METHOD = type(torch.Tensor.unfold)  # torch.nn.functional.unfold has the same name, and is a function


def _adaptive_pool(func, takes_largest, input, output_size, **kwargs):
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    if input.dim() != 4 or all(type(size) is int and size == 1 for size in sizes):
        return func(input, output_size, **kwargs)
    for axis, size in zip((2, 3), sizes):
        if size is not None:
            input = _pool_axis(input, axis, size, takes_largest)
    return input


def _pool_axis(x, axis, size, takes_largest):
    """Adaptive pooling along one axis: windows from floor(i * side / size) to ceil((i + 1) * side / size)."""
    side, numbers = x.shape[axis], torch.arange(size, device=x.device)
    first, end = numbers * side // size, ((numbers + 1) * side + size - 1) // size
    places = first[:, None] + torch.arange((side + size - 1) // size + 1, device=x.device)
    inside = places < end[:, None]
    places = torch.minimum(places, end[:, None] - 1)
    x = _select(x, axis, places)
    if takes_largest:
        return x.amax(axis + 1)
    weights = (inside / inside.sum(1, keepdim=True)).to(x.dtype)
    return (x * weights.view(*weights.shape, *[1] * (3 - axis))).sum(axis + 1)


def _unfold(x, dimension, size, step):
    axis = dimension % x.dim()
    numbers = torch.arange((x.shape[axis] - size) // step + 1, device=x.device)
    x = _select(x, axis, numbers[:, None] * step + torch.arange(size, device=x.device))
    return x.movedim(axis + 1, -1)


def _select(x, axis, places):
    """The parts of an axis at places (n, k), which become two axes."""
    shape = [*x.shape[:axis], *places.shape, *x.shape[axis + 1 :]]
    return x.index_select(axis, places.reshape(-1)).reshape(shape)


def _mirrored(side, multiple, device):
    """Which row each row of ``ops.padding.pad_to_multiple`` is a copy of."""
    places = torch.arange((side + multiple - 1) // multiple * multiple, device=device)
    own = torch.arange(side, device=device)
    last = own[-1]
    reach = (places[-1] - last) <= last  # else mirroring would need more rows than there are: the last is repeated
    beyond = torch.where(reach, 2 * last - places, last)
    return torch.where(places <= last, places, beyond)


def _swin_block(block, x, x_size):
    """SwinTransformerBlock.forward; sides are multiples of the window."""
    height, width = x_size
    side, shift = block.window_size, block.shift_size
    batch, _, channels = x.shape
    windows = block.norm1(x).view(batch, height, width, channels)
    mask = None
    if shift:
        windows = torch.roll(windows, (-shift, -shift), (1, 2))
        mask = swin.mask(height, width, side, shift, x)
    windows = windows.view(batch, height // side, side, width // side, side, channels).transpose(2, 3)
    windows = block.attn(windows.reshape(-1, side * side, channels), mask=mask)
    windows = windows.view(batch, height // side, width // side, side, side, channels).transpose(2, 3)
    windows = windows.reshape(batch, height, width, channels)
    if shift:
        windows = torch.roll(windows, (shift, shift), (1, 2))
    x = x + block.drop_path(windows.reshape(batch, height * width, channels))
    return x + block.drop_path(block.mlp(block.norm2(x)))


def _local_mean(module, x):
    """LocalMean.forward without its way for windows that hold the whole image."""
    x, kind = x.float(), x.dtype  # running sums are much larger than the means
    for axis, window in ((3, module.window[1]), (2, module.window[0])):
        sums = torch.cat([torch.zeros_like(x.narrow(axis, 0, 1)), x.cumsum(axis)], axis)
        places = torch.arange(x.shape[axis], device=x.device)
        end = places[-1] + 1
        first = torch.minimum((places - (window - 1) // 2).clamp(min=0), (end - window).clamp(min=0))
        last = torch.minimum(first + window, end)
        count = (last - first).to(x.dtype).view(-1, *[1] * (3 - axis))
        x = (sums.index_select(axis, last) - sums.index_select(axis, first)) / count
    return x.to(kind)
