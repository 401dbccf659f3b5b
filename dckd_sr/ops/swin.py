"""The attention mask of SwinIR's shifted windows, made on the device that needs it, and once for a size.

BasicSR's block makes it on the CPU, in every layer of every forward of another size than ``img_size``: 36 times 14 MiB
for the large SwinIR on an LQ image of 184x320, each copied to a GPU that waits for it.
"""

from __future__ import annotations

import collections
import functools
import threading

import torch
from torch import nn

_LARGEST = 2**26  # bytes of the masks that are kept; the latest is kept in any case
_kept, _lock = collections.OrderedDict(), threading.Lock()


def is_block(module: nn.Module) -> bool:
    """Whether it is SwinIR's block, BasicSR's or another copy of the same code, such as spandrel's."""
    parts = ('norm1', 'attn', 'norm2', 'mlp', 'drop_path', 'window_size', 'shift_size', 'calculate_mask')
    return type(module).__name__ == 'SwinTransformerBlock' and all(hasattr(module, part) for part in parts)


def share_masks(cls: type[nn.Module]):
    """Let all blocks of a class have their masks from here."""
    make = cls.calculate_mask
    if hasattr(make, '__wrapped__'):  # they do
        return

    @functools.wraps(make)
    def calculate_mask(self, x_size):
        if 'attn_mask' not in self._buffers:  # the constructor asks, for a tensor that is this block's own
            return make(self, x_size)
        return shared_mask(*x_size, self.window_size, self.shift_size, next(self.attn.parameters()))

    cls.calculate_mask = calculate_mask


def mask(height: int, width: int, side: int, shift: int, like: torch.Tensor) -> torch.Tensor:
    """0 between pixels of one region, -100 between those that only the shift brought into one window.

    Regions along an axis: all but the last window, the last window, and of it what came around.

    Args:
        height, width: of the image; multiples of ``side``, that of the windows.
        shift: of the windows; 0: none.
        like: a tensor with the mask's device and type.

    Returns:
        (windows, side * side, side * side).
    """

    def regions(size):
        backwards = torch.arange(size, device=like.device).flip(0)  # 0 at the last one
        return (backwards < side).to(like.dtype) + (backwards < shift).to(like.dtype)

    regions = regions(height)[:, None] * 3 + regions(width)
    regions = regions.view(height // side, side, width // side, side).transpose(1, 2).reshape(-1, side * side)
    return (regions[:, None, :] != regions[:, :, None]).to(like.dtype) * -100.0


def shared_mask(height: int, width: int, side: int, shift: int, like: torch.Tensor) -> torch.Tensor:
    """As `mask`, for reading only: the same tensor for the same size, as long as it is among the latest."""
    # What is recorded or compiled has the operations in it, and a fake tensor is of use to its own mode alone.
    plain = type(like) in (torch.Tensor, nn.Parameter)
    if not plain or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return mask(height, width, side, shift, like)
    key = height, width, side, shift, like.dtype, like.device
    with _lock:
        found = _kept.pop(key, None)
        if found is None:
            with torch.inference_mode(False):  # a training may be the next to use it
                if shift or height % side or width % side:
                    found = mask(height, width, side, shift, like)
                else:  # all zeros, for which one will do
                    windows = height // side * (width // side)
                    found = torch.zeros((), dtype=like.dtype, device=like.device).expand(windows, side**2, side**2)
        if type(found) is torch.Tensor:
            _kept[key] = found
        while len(_kept) > 1 and sum(each.untyped_storage().nbytes() for each in _kept.values()) > _LARGEST:
            _kept.popitem(last=False)
    return found
