"""Degradations of the low-quality batch that make the negatives of the contrastive loss (DCKD, "Dynamic Contrastive").

Released order (dckd_model.py of the authors' code): blur, resize, noise, resize back. ``draw`` decides, ``apply``
computes. What is decided once per negative holds for the whole batch and on every process; the noise's strength and
values belong to the sample, so splitting a batch over processes changes nothing.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dckd_sr.ops.seeding import seed_of

MODES = ('area', 'bilinear', 'bicubic')


@dataclass(frozen=True)
class Degradation:
    """Probabilities, all in [0, 1]; the defaults are those of the released code.

    Raises:
        ValueError: a probability outside [0, 1].
    """

    blur_prob: float = 1.0
    resize_prob: float = 0.0
    noise_prob: float = 0.0
    gray_prob: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f'{name} is a probability in [0, 1], got {value}')


@dataclass(frozen=True)
class SampleNoise:
    """Gaussian noise of one sample: ``sigma`` in levels of 255, one plane for all channels if ``gray``."""

    sigma: float
    gray: bool
    seed: int


@dataclass(frozen=True)
class Plan:
    """What happens to the whole batch for one negative; None where a step is left out. Pairs are (height, width)."""

    blur_kernel: tuple[int, int] | None = None
    blur_sigma: tuple[float, float] | None = None
    size: tuple[int, int] | None = None
    mode: str | None = None
    mode_back: str | None = None
    noise: tuple[SampleNoise, ...] | None = None


def draw(
    options: Degradation, num_neg: int, size: Sequence[int], seed: int, iteration: int, first_index: int, batch: int
) -> list[Plan]:
    """Decide ``num_neg`` degradations for samples ``first_index .. first_index + batch - 1`` of the global batch.

    Args:
        size: height and width of the low-quality patches.
        first_index: position of this process's first sample in the global batch (rank * batch).
    """
    return [_draw_one(options, size, seed, iteration, j, first_index, batch) for j in range(num_neg)]


def _draw_one(options, size, seed, iteration, j, first_index, batch):
    # Only random(): the one method whose sequence Python keeps over versions. Every number is drawn whether it is used
    # or not, so that changing one probability does not change the other steps.
    u = random.Random(seed_of(seed, 'neg', iteration, j)).random
    plan = {}

    happens, kernel, sigma = u(), (_odd(u()), _odd(u())), (0.1 + 1.9 * u(), 0.1 + 1.9 * u())
    if happens < options.blur_prob:
        plan.update(blur_kernel=kernel, blur_sigma=sigma)

    happens, up, amount, mode, mode_back = u(), u() < 0.25, u(), _mode(u()), _mode(u())
    if happens < options.resize_prob:
        factor = 1 + 0.5 * amount if up else 0.5 + 0.5 * amount
        new_size = tuple(max(1, int(n * factor)) for n in size)
        plan.update(size=new_size, mode=mode, mode_back=mode_back)

    if u() < options.noise_prob:
        samples = range(first_index, first_index + batch)
        plan.update(noise=tuple(_draw_noise(options, seed, iteration, j, sample) for sample in samples))
    return Plan(**plan)


def _draw_noise(options, seed, iteration, j, sample):
    u = random.Random(seed_of(seed, 'neg.noise', iteration, j, sample)).random
    return SampleNoise(
        sigma=1 + 29 * u(), gray=u() < options.gray_prob, seed=seed_of(seed, 'neg.values', iteration, j, sample)
    )


def _odd(u):
    return 3 + 2 * int(5 * u)  # 3, 5, 7, 9, 11


def _mode(u):
    return MODES[int(len(MODES) * u)]


@torch.no_grad()
def apply(lq: torch.Tensor, plans: Sequence[Plan]) -> torch.Tensor:
    """Degrade a batch once per plan.

    Args:
        lq: (B, C, h, w) in [0, 1], any device, floating point.
        plans: N plans; a plan's noise has B entries.

    Returns:
        (N * B, C, h, w), negative j in rows j * B .. j * B + B - 1. Noise is clipped to [0, 1]; resizing is not.
    """
    batch, _, height, width = lq.shape
    out = torch.empty((len(plans) * batch, *lq.shape[1:]), dtype=lq.dtype, device=lq.device)
    with _without_autocast(lq.device):
        for j, plan in enumerate(plans):
            x = lq
            if plan.blur_kernel is not None:
                x = gaussian_blur(x, plan.blur_kernel, plan.blur_sigma)
            if plan.size is not None:
                x = resize(x, plan.size, plan.mode)
            if plan.noise is not None:
                x = add_noise(x, plan.noise)
            if plan.size is not None:
                x = resize(x, (height, width), plan.mode_back)
            out[j * batch : (j + 1) * batch] = x
    return out


def degrade(
    lq: torch.Tensor, num_neg: int, options: Degradation, seed: int, iteration: int, first_index: int = 0
) -> torch.Tensor:
    """``draw`` and ``apply``: (B, C, h, w) in [0, 1] -> (num_neg * B, C, h, w)."""
    return apply(lq, draw(options, num_neg, lq.shape[-2:], seed, iteration, first_index, lq.shape[0]))


def gaussian_blur(x: torch.Tensor, kernel: Sequence[int], sigma: Sequence[float]) -> torch.Tensor:
    """Separable Gaussian blur with mirrored borders, equal to kornia's ``gaussian_blur2d(x, kernel, sigma)``.

    Args:
        x: (B, C, h, w).
        kernel, sigma: odd size and standard deviation, height first, then width.
    """
    batch, channels, height, width = x.shape
    x = x.reshape(batch * channels, 1, height, width)
    taps_y, taps_x = (_gaussian(k, s, x) for k, s in zip(kernel, sigma))
    x = F.conv2d(_pad(x, (kernel[1] // 2,) * 2 + (0, 0)), taps_x.view(1, 1, 1, -1))
    x = F.conv2d(_pad(x, (0, 0) + (kernel[0] // 2,) * 2), taps_y.view(1, 1, -1, 1))
    return x.view(batch, channels, height, width)


def _gaussian(size, sigma, like):
    # Made on the device: a copy from the host would wait for it.
    offsets = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    taps = torch.exp(offsets.square() * (-0.5 / sigma**2))
    return taps / taps.sum()


def _pad(x, pad):
    # A mirror needs more pixels than it pads; patches that small repeat their border pixel.
    mirror = max(pad[:2]) < x.shape[-1] and max(pad[2:]) < x.shape[-2]
    return F.pad(x, pad, mode='reflect' if mirror else 'replicate')


def resize(x: torch.Tensor, size: Sequence[int], mode: str) -> torch.Tensor:
    """``F.interpolate`` to ``size`` (height, width); mode 'area', 'bilinear' or 'bicubic', no aligned corners."""
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=None if mode == 'area' else False)


def add_noise(x: torch.Tensor, noise: Sequence[SampleNoise]) -> torch.Tensor:
    """Add Gaussian noise per sample and clip to [0, 1], not rounded (BasicSR's ``add_gaussian_noise_pt``).

    Raises:
        ValueError: not one entry of ``noise`` per sample of x (B, C, h, w).
    """
    if len(noise) != x.shape[0]:
        raise ValueError(f'{len(noise)} noise entries for a batch of {x.shape[0]}')
    values = torch.empty_like(x, memory_format=torch.contiguous_format)
    generator = torch.Generator(device=x.device)
    for plane, sample in zip(values, noise):
        generator.manual_seed(sample.seed)
        drawn = plane[:1] if sample.gray else plane
        drawn.normal_(0, sample.sigma / 255, generator=generator)
        if sample.gray:
            plane[1:] = plane[:1]
    return values.add_(x).clamp_(0, 1)


def _without_autocast(device):
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()
