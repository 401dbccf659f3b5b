"""Frozen 3x3 convolutions on the CPU by Winograd's minimal filtering, F(4x4, 3x3), where that is sooner.

4x4 outputs of a convolution are products of polynomials, for which 36 multiplications a pair of channels are enough,
in place of 144 (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, section 4.3), at the
price of transforming images and weights, and of rounding errors about ten times as large. GPUs need none of this: their
libraries choose such algorithms themselves. torch's CPU library computes the plain sums.
"""

from __future__ import annotations

import contextlib
import types

import torch
from torch import nn
from torch.nn import functional as F

_CHANNELS, _PIXELS = 96, 2000  # below, transforming takes what the products save (docs/performance.md)
_BLOCK = 2**20  # numbers of a transformed part of an image, which are to stay in the processor's cache
_off = False


def _twice(rows):
    """The transform of both axes of flattened squares."""
    matrix = torch.tensor(rows, dtype=torch.float64)
    return torch.kron(matrix, matrix).float()


_IMAGE = _twice(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_WEIGHT = _twice(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
_RESULT = _twice([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


def speed_up(net: nn.Module) -> nn.Module:
    """Let the frozen 3x3 convolutions of a network run so, in place, wherever it pays; gradients go to images only."""
    for module in net.modules():
        if type(module) is nn.Conv2d and _fits(module):
            module.forward = types.MethodType(_forward, module)
    return net


@contextlib.contextmanager
def plain():
    """Convolutions as torch computes them, to count their operations."""
    global _off
    _off, former = True, _off
    try:
        yield
    finally:
        _off = former


def _fits(module):
    return (
        (module.kernel_size, module.stride, module.dilation) == ((3, 3), (1, 1), (1, 1))
        and module.padding == (1, 1)
        and module.padding_mode == 'zeros'
        and module.groups == 1
        and min(module.in_channels, module.out_channels) >= _CHANNELS
    )


def _forward(module, x):
    pays = (
        x.device.type == 'cpu'
        and x.dtype == module.weight.dtype == torch.float32
        and x.dim() == 4
        and x.shape[0] * x.shape[2] * x.shape[3] >= _PIXELS
        and not module.weight.requires_grad
    )
    if not pays or _off or torch.is_autocast_enabled('cpu') or torch.compiler.is_compiling():
        return nn.Conv2d.forward(module, x)
    out = _Convolution.apply(x, module.weight)
    return out if module.bias is None else out + module.bias.view(-1, 1, 1)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return convolve(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return convolve(gradient, weight.flip(2, 3).transpose(0, 1)), None


def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``conv2d(x, weight, padding=1)``.

    Args:
        x: (B, C, h, w), float32.
        weight: (K, C, 3, 3).

    Returns:
        (B, K, h, w), channels last in memory.
    """
    batch, channels, height, width = x.shape
    weights = (_WEIGHT @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, channels, -1)
    down, across, count = -(-height // 4), -(-width // 4), weights.shape[2]
    # Squares of 6x6 begin at every fourth pixel.
    image = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 4 * across + 1 - width, 1, 4 * down + 1 - height)).contiguous()
    _, row, pixel, _ = image.stride()
    strides = (row, pixel, 4 * row, 4 * pixel, 1)
    out = x.new_empty(batch, down, 4, across, 4, count)
    rows = max(1, _BLOCK // (36 * across * max(channels, count)))
    for each, target in zip(image, out):
        for top in range(0, down, rows):
            end = min(top + rows, down)
            squares = each[4 * top :].as_strided((6, 6, end - top, across, channels), strides)
            products = torch.bmm((_IMAGE @ squares.reshape(36, -1)).view(36, -1, channels), weights)
            result = (_RESULT @ products.view(36, -1)).view(4, 4, end - top, across, count)
            target[top:end] = result.permute(2, 0, 3, 1, 4)
    out = out.view(batch, 4 * down, 4 * across, count)[:, :height, :width].permute(0, 3, 1, 2)
    return out.contiguous(memory_format=torch.channels_last)
