"""What a network takes and gives, found by running it: its first convolution and its options tell only of some."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dckd_sr.errors import UserError, reason
from dckd_sr.inference import padding_of

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


def find_smallest_side(net: torch.nn.Module, channels: int, scale: int, device: str | torch.device) -> int | None:
    """As `smallest_side`, of a network of which no working side is known; None: it takes none that is tried.

    The caller holds the network's eval mode and ``torch.no_grad()``.
    """
    side = next((side for side in (32, 64, 128, 256) if _runs(net, channels, side, side, device)), None)
    return side and smallest_side(net, channels, scale, side, padding_of(net), device)


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


# ---------------------------------------------------------------------------------------------------------------------
# A network and the data that it is to be trained on


def problem_with(
    net: torch.nn.Module, lq: torch.Tensor, gt: torch.Tensor, scale: int, color: str, sizes: str
) -> str | None:
    """What is wrong between a network and a training sample, in words that follow the network's name; or None.

    The network is run once in eval mode, and once or a few times more where it fails, to tell why.

    Args:
        net: (B, C, h, w) -> (B, C', h * scale, w * scale).
        lq, gt: (C, h, w) and (C', h * scale, w * scale).
        scale: of the option file.
        color: how the dataset is told to give one channel.
        sizes: where the size of lq comes from, such as 'gt_size 32 / scale 4'.
    """
    training, device = net.training, next(net.parameters(), lq).device
    net.eval()
    try:
        # torch's generator is the student's, which training starts from.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return _problem(net, lq[None].to(device), tuple(gt.shape), scale, color, sizes)
    finally:
        net.train(training)


def _problem(net, lq, wanted, scale, color, sizes):
    _, count, height, width = lq.shape
    try:
        out = net(lq.clone())
    except (MemoryError, torch.cuda.OutOfMemoryError):
        return None  # which training says
    except Exception as error:  # whatever a network raises on an image that it cannot take
        other = next((c for c in CHANNELS if c != count and _runs(net, c, height, width, lq.device)), None)
        if other is not None:
            cure = _cure(other, count, color)
            return f'takes images of {_channels(other)}, datasets.train gives {count}: {cure}, or change the network'
        smallest = find_smallest_side(net, count, scale, lq.device)
        if smallest and smallest > min(height, width):
            return f'takes images of at least {smallest}x{smallest}, datasets.train gives {width}x{height} ({sizes})'
        return f'fails on an image of datasets.train, {_channels(count)} of {width}x{height} ({sizes}): {reason(error)}'
    if not isinstance(out, torch.Tensor) or out.dim() != 4:
        return None  # models that know such networks
    found = tuple(out.shape[1:])
    if found == wanted:
        return None
    if found[0] != wanted[0] and found[1:] == wanted[1:]:
        cure = _cure(found[0], wanted[0], color)
        return f'gives {_channels(found[0])}, the ground truth of datasets.train has {wanted[0]}: {cure}, or change it'
    if found[1] % height == 0 and found[1] // height == found[2] / width != scale:
        return f'enlarges {found[1] // height} times, but scale = {scale}{" (its default)" if scale == 1 else ""}'
    return f'turns {width}x{height} into {found[2]}x{found[1]}, the ground truth is {wanted[2]}x{wanted[1]}'


def _cure(network, data, color):
    return color if network == 1 else 'drop color: y there' if (network, data) == (3, 1) else 'give it such images'


def _runs(net, channels, height, width, device):
    try:
        net(_image(channels, height, width, device))
    except Exception:  # see above
        return False
    return True


def _channels(count):
    return f'{count} channel{"" if count == 1 else "s"}'
