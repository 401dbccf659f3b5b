"""MATLAB's bicubic ``imresize``, equal to the last bit: benchmark scores depend on how the LR images were made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

CONVENTIONS = ('uint8', 'double')


def modcrop(image: np.ndarray, scale: int) -> np.ndarray:
    """Cut (h, w[, c]) at the bottom and right to multiples of ``scale`` (a view)."""
    height, width = image.shape[:2]
    return image[: height - height % scale, : width - width % scale]


def imresize(
    image: np.ndarray, scale: float, convention: str = 'uint8', region: Sequence[int] | None = None
) -> np.ndarray:
    """Bicubic resize with antialiasing, as MATLAB's ``imresize(image, scale)``.

    Cubic kernel a = -0.5, widened by 1 / scale when shrinking; weights in float64, normalised per output pixel; borders
    mirrored with the edge pixel repeated; height first, then width.

    Args:
        image: (h, w) or (h, w, c); integers (uint8, uint16) or floating point.
        scale: output size over input size; the output has ceil(scale * size) pixels.
        convention: for integer images. 'uint8': rounded half up and clipped after either pass, what ``imresize`` does
            with integer images and how the LR images of the usual benchmarks were made. 'double': rounded once at the
            end, as after im2double (BasicSR's MATLAB script). Floating point images are neither rounded nor clipped.
        region: (top, left, height, width) of the output; only that part is computed, with the same values.

    Returns:
        Array of the image's dtype.

    Raises:
        ValueError: a wrong argument.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f'convention is one of {CONVENTIONS}, got {convention!r}')
    if image.ndim not in (2, 3) or not (image.dtype.kind == 'f' or image.dtype in (np.uint8, np.uint16)):
        raise ValueError(f'image is (h, w[, c]) of uint8, uint16 or float, got {image.shape} {image.dtype}')
    if scale <= 0:
        raise ValueError(f'scale is positive, got {scale}')
    weights_y, rows = contributions(image.shape[0], float(scale))
    weights_x, columns = contributions(image.shape[1], float(scale))
    if region is not None:
        top, left, height, width = region
        if top < 0 or left < 0 or height < 1 or width < 1 or top + height > len(rows) or left + width > len(columns):
            raise ValueError(f'region {tuple(region)} outside the output {len(rows)}x{len(columns)}')
        weights_y, rows = weights_y[top : top + height], rows[top : top + height]
        weights_x, columns = weights_x[left : left + width], columns[left : left + width]
        first = columns.min()
        image, columns = image[:, first : columns.max() + 1], columns - first

    integers = image.dtype if image.dtype.kind == 'u' else None
    between = integers if convention == 'uint8' else None
    tall = _round(_weighted_sum(image, weights_y, rows), between)
    wide = _weighted_sum(tall.swapaxes(0, 1), weights_x, columns).swapaxes(0, 1)
    return np.ascontiguousarray(_round(wide, integers).astype(image.dtype))


def _weighted_sum(image, weights, rows):
    """out[i] = sum_k weights[i, k] * image[rows[i, k]], tap by tap as MATLAB adds: the order decides rounding ties."""
    shape = (-1,) + (1,) * (image.ndim - 1)
    image = image.astype(np.float64)
    out = np.zeros((len(rows), *image.shape[1:]))
    for k in range(rows.shape[1]):
        out += weights[:, k].reshape(shape) * image[rows[:, k]]
    return out


def _round(values, dtype):
    """Half up, then clipped to the integer type; unchanged where there is none."""
    return values if dtype is None else np.clip(np.floor(values + 0.5), 0, np.iinfo(dtype).max)


@lru_cache(maxsize=64)
def contributions(length: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights and 0-based input indices of every output pixel along one axis, both (output length, taps); read-only."""
    out_length = math.ceil(length * scale)
    width = 4 / min(scale, 1)
    # Position of every output pixel on the input's axis, pixels counted from 1 as MATLAB does.
    centre = np.arange(1, out_length + 1) / scale + 0.5 * (1 - 1 / scale)
    left = np.floor(centre - width / 2)
    indices = left[:, None] + np.arange(math.ceil(width) + 2)
    shrink = min(scale, 1)
    weights = shrink * _cubic(shrink * (centre[:, None] - indices))
    weights /= weights.sum(axis=1, keepdims=True)
    mirror = np.concatenate([np.arange(length), np.arange(length)[::-1]])
    indices = mirror[np.mod(indices.astype(np.int64) - 1, 2 * length)]
    used = np.any(weights != 0, axis=0)
    weights, indices = weights[:, used], indices[:, used]
    weights.flags.writeable = indices.flags.writeable = False
    return weights, indices


def _cubic(x):
    """Keys' cubic convolution kernel, a = -0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0))
