"""Images filled up to sizes that networks can halve or cut into windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pad_to_multiple(x: torch.Tensor, multiple: int, smallest: tuple[int, int] = (1, 1)) -> torch.Tensor:
    """Pad the last two axes at their ends to multiples of a number, and to a smallest height and width.

    Mirrored as BasicSR's SwinIRModel does; the border is repeated along an axis shorter than its padding.

    Args:
        x: (B, C, H, W).
    """
    bottom, right = (max(-side % multiple, least - side) for side, least in zip(x.shape[2:], smallest))
    x = F.pad(x, (0, right, 0, 0), mode='reflect' if right < x.shape[3] else 'replicate')
    return F.pad(x, (0, 0, 0, bottom), mode='reflect' if bottom < x.shape[2] else 'replicate')
