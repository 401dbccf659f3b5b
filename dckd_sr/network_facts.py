"""What a network takes and gives, found by running it: its first convolution and its options tell only of some."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dckd_sr.errors import UserError, reason

_SIDES = (16, 64, 256)  # of the images that are tried, the small ones first: they take no time
CHANNELS = (3, 1)


def measure(
    net: Callable[[torch.Tensor], torch.Tensor],
    grid: int = 1,
    device: str | torch.device = 'cpu',
    channels: tuple[int, ...] = CHANNELS,
    smallest: int | None = None,
    fixed: tuple[int, int] | None = None,
) -> tuple[int, int, int]:
    """What a network restores.

    Args:
        net: (B, C, h, w) -> (B, C, h * scale, w * scale).
        grid: its sides must be multiples of it.
        device: where it runs.
        channels: the numbers of channels to try.
        smallest: its smallest side, where that is known; it is not run on smaller ones then.
        fixed: height and width of the one size that it takes.

    Returns:
        (channels of its images; scale; the smallest side that it takes, a multiple of ``grid``).

    Raises:
        UserError: it restores no image, of whatever size and channels.
    """
    problem, least = None, max(smallest or 1, 1)
    sides = dict.fromkeys(-(-max(side, least) // grid) * grid for side in _SIDES)
    for size in [fixed] if fixed else [(side, side) for side in sides]:
        for count in channels:
            try:
                scale = _scale(net, count, size, device)
            except UserError as error:
                # What channels of a colour image lead to is the more telling.
                problem = error if problem is None or count == channels[0] else problem
                continue
            if fixed or smallest:
                return count, scale, least
            return count, scale, smallest_side(net, count, scale, size[0], grid, device)
    raise problem


def _scale(net, channels, size, device):
    (height, width), image = size, _image(channels, *size, device)
    try:
        with torch.inference_mode():
            out = net(image.clone())  # some networks write into their input
    except UserError:
        raise
    except Exception as error:  # whatever a network raises on an image that it cannot take
        raise UserError(f'this network cannot restore an image of {width}x{height}: {reason(error)}') from error
    shape = tuple(getattr(out, 'shape', ()))
    scale = shape[2] // height if len(shape) == 4 else 0
    if not scale or shape != (1, channels, height * scale, width * scale):
        raise UserError(f'this network turns {tuple(image.shape)} into {shape}, no whole multiple of the size')
    return scale


def smallest_side(
    net: Callable[[torch.Tensor], torch.Tensor],
    channels: int,
    scale: int,
    works: int,
    grid: int = 1,
    device: str | torch.device = 'cpu',
) -> int:
    """The smallest multiple of ``grid`` that a network takes as a side; pooling and mirrored borders need some pixels.

    Args:
        works: a side that it takes.
    """
    finite = _fine(net, channels, scale, works, device, True)

    def fine(count):
        return _fine(net, channels, scale, count * grid, device, finite)

    low, high = 0, works // grid  # times grid: does not work, does
    if fine(1):
        return grid
    low = 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fine(middle) else (middle, high)
    return high * grid


def _fine(net, channels, scale, side, device, finite):
    try:
        with torch.inference_mode():
            out = net(_image(channels, side, side, device))
        fits = tuple(out.shape[2:]) == (side * scale, side * scale)
        return fits and (not finite or bool(torch.isfinite(out).all()))
    except Exception:  # whatever a network raises on an image that it cannot take
        return False


def _image(channels, height, width, device):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, channels, height, width, generator=generator).to(device)
