"""Run a network on images of any size: padding to a multiple of its window, overlapping tiles, cropping."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dckd_sr.errors import UserError


def infer(
    net: torch.nn.Module,
    lq: torch.Tensor,
    scale: int,
    window_size: int | None = None,
    tile_size: int | None = None,
    tile_overlap: int | None = None,
) -> torch.Tensor:
    """Restore ``lq``; the caller holds ``torch.no_grad()`` and the network's eval mode.

    Args:
        net: (B, C, h, w) -> (B, C', h * scale, w * scale).
        lq: (B, C, h, w).
        window_size: h and w are padded to multiples of it at the bottom and right, mirrored as BasicSR's SwinIRModel
            does (the border pixel repeated where the image is smaller than the padding), and cropped after.
        tile_size: side of the tiles in LQ pixels, rounded up to multiples of the window; empty or 0: the whole image.
        tile_overlap: LQ pixels shared by neighbouring tiles, blended linearly; rounded up to multiples of the window;
            default a quarter of the tile, at most 32.

    Returns:
        (B, C', h * scale, w * scale), on lq's device.

    Raises:
        UserError: the overlap is not smaller than the tile, or the network does not enlarge by ``scale``.
    """
    height, width = lq.shape[-2:]
    window = window_size or 1
    lq = _pad_to_multiple(lq, window)
    if not tile_size:
        out = _run(net, lq, scale)
    else:
        tile = _round_up(tile_size, window)
        if tile_overlap is None:
            overlap = min(_round_up(min(32, tile_size // 4), window), tile - window)
        else:
            overlap = _round_up(tile_overlap, window)
        if not 0 <= overlap < tile:
            raise UserError(
                f'tile_overlap {tile_overlap} must be smaller than tile_size {tile_size} '
                f'(with windows of {window}: {overlap} and {tile})'
            )
        out = _run_tiles(net, lq, scale, tile, overlap)
    return out[..., : height * scale, : width * scale]


def _round_up(value, multiple):
    return -(-value // multiple) * multiple


def _pad_to_multiple(x, window):
    for axis in (-1, -2):
        size = x.shape[axis]
        missing = -size % window
        if missing:
            pad = (0, missing, 0, 0) if axis == -1 else (0, 0, 0, missing)
            x = F.pad(x, pad, mode='reflect' if missing < size else 'replicate')
    return x


def _run(net, x, scale):
    out = net(x)
    expected = (x.shape[-2] * scale, x.shape[-1] * scale)
    if tuple(out.shape[-2:]) != expected:
        raise UserError(
            f'the network turns {x.shape[-1]}x{x.shape[-2]} into {out.shape[-1]}x{out.shape[-2]}, but scale {scale} '
            f'means {expected[1]}x{expected[0]}: check scale and the network options'
        )
    return out


def _run_tiles(net, x, scale, tile, overlap):
    """Weighted mean of the tiles; a tile's weight falls linearly to its borders inside the image."""
    height, width = x.shape[-2:]
    total, weights = None, None
    for top, bottom in _spans(height, tile, overlap):
        ramp_y = _ramp(top, bottom, height, overlap, scale, x)
        for left, right in _spans(width, tile, overlap):
            ramp_x = _ramp(left, right, width, overlap, scale, x)
            out = _run(net, x[..., top:bottom, left:right], scale)
            if total is None:
                total = out.new_zeros((*out.shape[:-2], height * scale, width * scale), dtype=torch.float32)
                weights = total.new_zeros((height * scale, width * scale))
            place = (..., slice(top * scale, bottom * scale), slice(left * scale, right * scale))
            weight = ramp_y[:, None] * ramp_x
            total[place] += out * weight
            weights[place] += weight
    return (total / weights).to(out.dtype)


def _spans(size, tile, overlap):
    """Start and end of the tiles along one axis; the last one is moved back to end at the border."""
    if size <= tile:
        return [(0, size)]
    starts = list(range(0, size - tile, tile - overlap)) + [size - tile]
    return [(start, start + tile) for start in starts]


def _ramp(start, end, size, overlap, scale, like):
    weight = torch.ones((end - start) * scale, dtype=torch.float32, device=like.device)
    length = overlap * scale
    if length:
        rise = (torch.arange(length, dtype=torch.float32, device=like.device) + 0.5) / length
        if start > 0:
            weight[:length] *= rise
        if end < size:
            weight[-length:] *= rise.flip(0)
    return weight
