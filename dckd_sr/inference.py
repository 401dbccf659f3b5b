"""Run a network on images of any size: padding to what it needs, overlapping tiles, self-ensemble."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from dckd_sr.errors import UserError, out_of_memory
from dckd_sr.ops.padding import pad_to_multiple

# Option keys that are arguments of infer.
VAL_KEYS = ('window_size', 'tile_size', 'tile_overlap', 'tile_batch_size', 'self_ensemble')


def padding_of(net: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """What the sides of a network's input must be multiples of.

    Its attribute ``window_size``; else the least common multiple of those of its parts (BasicSR's SwinIR keeps it in
    its blocks); 1 where there is none: the network takes any size.
    """
    own = _sides(net)
    if own or not isinstance(net, torch.nn.Module):
        return math.lcm(*own)
    return math.lcm(*(side for module in net.modules() for side in _sides(module)))


def _sides(module):
    sides = getattr(module, 'window_size', None)
    sides = sides if isinstance(sides, (tuple, list)) else (sides,)
    return [side for side in sides if isinstance(side, int) and side > 0]


def infer(
    net: Callable[[torch.Tensor], torch.Tensor],
    lq: torch.Tensor,
    scale: int,
    window_size: int | None = None,
    tile_size: int | None = None,
    tile_overlap: int | None = None,
    tile_batch_size: int | None = None,
    self_ensemble: bool | None = False,
    run: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Restore ``lq``; the caller holds ``torch.no_grad()`` and the network's eval mode.

    Tiles lie on the grid of the network's windows and halvings, and where two of them meet, the outer quarters of their
    overlap are dropped and the middle half is blended linearly. So tiles give what the whole image gives, up to
    rounding, if the overlap is at least four times the farthest that an output pixel looks, in LQ pixels. EDSR with n
    blocks at x4 looks 2n + 4 pixels far and hardly uses the farthest: the demo's teacher (8 blocks) is exact from an
    overlap of 80 and differs by less than 0.005 / 255 at 32. Networks that use
    statistics of the whole image (NAFNet, Restormer, channel attention) see those of the tile, as in training.

    Args:
        net: (B, C, h, w) -> (B, C', h * scale, w * scale).
        lq: (B, C, h, w).
        window_size: h and w are padded to multiples of it and of `padding_of` the network, at the bottom and right,
            mirrored as BasicSR's SwinIRModel does (the border pixel repeated where the image is smaller than the
            padding), and cropped after. The same is done to images below the network's ``smallest_side``, which is
            measured, and kept as that attribute, where the network fails and does not have it. A network with a
            ``fixed_size`` (height, width) gets tiles of it, whatever ``tile_size`` says.
        tile_size: side of the tiles in LQ pixels, rounded up to the network's grid; empty or 0: the whole image.
        tile_overlap: LQ pixels shared by neighbouring tiles, rounded up likewise; default a quarter of the tile, at
            most 32.
        tile_batch_size: tiles in one forward pass, default 1: the same result up to rounding, sooner where one tile
            does not fill the device.
        self_ensemble: mean over the 8 flips and transpositions of ``lq``: 8 times the work.
        run: called as ``run(net, x)`` in place of ``net(x)``, such as ``functools.partial(speed.Speed(...), role)``.

    Returns:
        (B, C', h * scale, w * scale), on lq's device.

    Raises:
        UserError: the overlap is not smaller than the tile, or the network does not enlarge by ``scale``.
    """
    if self_ensemble:
        return _mean_of_8(
            lambda x: infer(net, x, scale, window_size, tile_size, tile_overlap, tile_batch_size, run=run), lq
        )
    sizes = window_size, tile_size, tile_overlap, tile_batch_size, run
    try:
        return _infer(net, lq, scale, *sizes)
    except Exception as error:  # whatever a network raises on an image that it cannot take
        if isinstance(error, UserError) or out_of_memory(error) or not isinstance(net, torch.nn.Module):
            raise
        if getattr(net, 'smallest_side', None) or getattr(net, 'fixed_size', None):
            raise
        from dckd_sr import network_facts  # which needs this module

        smallest = network_facts.find_smallest_side(net, lq.shape[1], scale, lq.device)
        if smallest is None or smallest == 1:
            raise
        net.smallest_side = smallest
    return _infer(net, lq, scale, *sizes)


def _infer(net, lq, scale, window_size, tile_size, tile_overlap, tile_batch_size, run):
    height, width = lq.shape[-2:]
    window = math.lcm(window_size or 1, padding_of(net))
    smallest, fixed = _round_up(getattr(net, 'smallest_side', None) or 1, window), getattr(net, 'fixed_size', None)
    lq = pad_to_multiple(lq, window, fixed or (smallest, smallest))
    forward = net if run is None else partial(run, net)
    if fixed is not None:
        overlap = min(32, min(fixed) // 4) if tile_overlap is None else min(tile_overlap, min(fixed) - 1)
        out = _run_tiles(forward, lq, scale, fixed, overlap, 1, 1)
    elif not tile_size:
        out = _run(forward, lq, scale)
    else:
        # NAFNet pads by itself, to multiples of padder_size: tiles must halve at the same pixels as the whole image.
        grid = math.lcm(window, getattr(net, 'padder_size', 1))
        tile = _round_up(max(tile_size, smallest), grid)
        if tile_overlap is None:
            overlap = min(_round_up(min(32, tile_size // 4), grid), tile - grid)
        else:
            overlap = _round_up(tile_overlap, grid)
        if not 0 <= overlap < tile:
            raise UserError(
                f'tile_overlap {tile_overlap} must be smaller than tile_size {tile_size} '
                f'(in steps of {grid}, which the network needs: {overlap} and {tile})'
            )
        out = _run_tiles(forward, lq, scale, (tile, tile), overlap, grid, tile_batch_size or 1)
    return out[..., : height * scale, : width * scale]


def _mean_of_8(run, lq):
    total = 0
    for transposed, *flipped in product((False, True), repeat=3):
        axes = [axis for axis, flip in zip((-2, -1), flipped) if flip]
        out = run((lq.transpose(-2, -1) if transposed else lq).flip(axes)).flip(axes)
        total = total + (out.transpose(-2, -1) if transposed else out).float()
    return (total / 8).to(out.dtype)


def _round_up(value, multiple):
    return -(-value // multiple) * multiple


def _run(forward, x, scale):
    out = forward(x)
    expected = (x.shape[-2] * scale, x.shape[-1] * scale)
    if tuple(out.shape[-2:]) != expected:
        raise UserError(
            f'the network turns {x.shape[-1]}x{x.shape[-2]} into {out.shape[-1]}x{out.shape[-2]}, but scale {scale} '
            f'means {expected[1]}x{expected[0]}: check scale and the network options'
        )
    return out


def _run_tiles(forward, x, scale, tile, overlap, grid, batch_size):
    """Weighted mean of the tiles; see `_ramp` for the weights."""
    height, width = x.shape[-2:]
    total, weights = None, None
    spans = product(_spans(height, tile[0], overlap, grid), _spans(width, tile[1], overlap, grid))
    for tiles in _batches(spans, batch_size):
        outs = _run(forward, torch.cat([x[..., slice(*rows), slice(*columns)] for rows, columns in tiles]), scale)
        if total is None:
            total = outs.new_zeros((len(x), *outs.shape[1:-2], height * scale, width * scale), dtype=torch.float32)
            weights = total.new_zeros(total.shape[-2:])
        for (rows, columns), out in zip(tiles, outs.split(len(x))):
            place = (..., *(slice(start * scale, end * scale) for start, end in (rows, columns)))
            weight = _ramp(*rows, height, overlap, scale, x)[:, None] * _ramp(*columns, width, overlap, scale, x)
            total[place] += out * weight
            weights[place] += weight
    return (total / weights).to(outs.dtype)


def _batches(spans, size):
    """Tiles of one size, at most ``size`` at a time."""
    alike = {}
    for rows, columns in spans:
        alike.setdefault((rows[1] - rows[0], columns[1] - columns[0]), []).append((rows, columns))
    for tiles in alike.values():
        for first in range(0, len(tiles), size):
            yield tiles[first : first + size]


def _spans(size, tile, overlap, grid):
    """Start and end of the tiles along one axis; the last one is moved back, on the grid, to end at the border."""
    if size <= tile:
        return [(0, size)]
    last = _round_up(size - tile, grid)
    return [(start, min(start + tile, size)) for start in [*range(0, size - tile, tile - overlap), last]]


def _ramp(start, end, size, overlap, scale, like):
    """Weights along one axis: at a border inside the image 0 for a quarter of the overlap, then rising over a half."""
    weight = torch.ones((end - start) * scale, dtype=torch.float32, device=like.device)
    dropped = overlap // 4 * scale
    length = overlap * scale - 2 * dropped
    if length:
        rise = (torch.arange(length, dtype=torch.float32, device=like.device) + 0.5) / length
        rise = torch.cat([rise.new_zeros(dropped), rise])
        if start > 0:
            weight[: len(rise)] *= rise
        if end < size:
            weight[-len(rise) :] *= rise.flip(0)
    return weight
