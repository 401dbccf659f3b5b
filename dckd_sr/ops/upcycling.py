"""Inputs that a super-resolution student can be taught on besides its own (DUKD): pieces of GT, and smaller LQ."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from dckd_sr.ops.resize import contributions
from dckd_sr.ops.seeding import seed_of


def draw_tiles(count: int, scale: int, seed: int, *numbers: int) -> list[int]:
    """``count`` different ones of the ``scale`` * ``scale`` tiles of `tiles`, as a function of the other arguments."""
    return random.Random(seed_of(seed, 'dukd tiles', *numbers)).sample(range(scale * scale), count)


def tiles(gt: torch.Tensor, scale: int, chosen: Sequence[int]) -> torch.Tensor:
    """Zoom in: tiles of GT as inputs, which have the size of LQ.

    Args:
        gt: (B, C, scale * h, scale * w).
        chosen: tiles of the scale x scale grid, numbered row by row; the same ones of every image.

    Returns:
        (len(chosen) * B, C, h, w); rows k*B to k*B + B - 1 are tile ``chosen[k]`` of each image.
    """
    height, width = gt.shape[2] // scale, gt.shape[3] // scale
    corners = [(number // scale * height, number % scale * width) for number in chosen]
    return torch.cat([gt[:, :, top : top + height, left : left + width] for top, left in corners])


def shrink(images: torch.Tensor, scale: int) -> torch.Tensor:
    """Zoom out: MATLAB's bicubic, (B, C, scale * h, scale * w) to (B, C, h, w), neither rounded nor clipped.

    The weights are those of `ops.resize.imresize`, with its mirrored borders, which torch's own antialiased bicubic
    does not have; the sums are in the images' precision.
    """
    down, across = (
        _matrix(length, 1 / scale).to(images.dtype).to(images.device, non_blocking=True) for length in images.shape[2:]
    )
    return down @ images @ across.T


@lru_cache(maxsize=64)
def _matrix(length, scale):
    """(output length, length): a mirrored tap is added to the pixel that it mirrors."""
    weights, indices = contributions(length, scale)
    matrix = np.zeros((len(weights), length))
    np.add.at(matrix, (np.arange(len(weights))[:, None], indices), weights)
    return torch.from_numpy(matrix)
