import math

import pytest
import torch
import torch.nn.functional as F
from basicsr.data import degradations as basicsr_degradations
from torch.utils._python_dispatch import TorchDispatchMode

from dckd_sr.ops import degradations
from dckd_sr.ops.augment import augment, draw_flags, invert
from dckd_sr.ops.degradations import Degradation, Plan, SampleNoise, apply, degrade, draw

ALL = Degradation(0.5, 0.5, 0.5, 0.5)


class Calls(TorchDispatchMode):
    """Names of the operators called; a GPU would make the host wait at some of them."""

    WAITING = {'_local_scalar_dense', 'nonzero', '_to_copy', 'masked_select', 'equal'}

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.split('::')[1])
        return func(*args, **(kwargs or {}))


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def slow_blur(x, kernel, sigma):
    """The definition: weighted mean over a window of the image mirrored about its border pixels, in float64."""

    def mirror(i, n):
        i = abs(i)
        return i if i < n else 2 * (n - 1) - i

    def taps(size, s):
        values = [math.exp(-(o**2) / (2 * s**2)) for o in range(-(size // 2), size // 2 + 1)]
        return [v / sum(values) for v in values]

    height, width = x.shape[-2:]
    out = torch.zeros_like(x, dtype=torch.float64)
    for i, wy in enumerate(taps(kernel[0], sigma[0])):
        for j, wx in enumerate(taps(kernel[1], sigma[1])):
            rows = [mirror(r + i - kernel[0] // 2, height) for r in range(height)]
            columns = [mirror(c + j - kernel[1] // 2, width) for c in range(width)]
            out += wy * wx * x.double()[..., rows, :][..., columns]
    return out


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('kernel, sigma', [((3, 11), (0.1, 2.0)), ((11, 3), (2.0, 0.7)), ((7, 5), (1.3, 0.4))])
def test_blur_is_the_mirrored_gaussian_height_first(channels, kernel, sigma):
    x = images(2, channels, 13, 17)
    ours = degradations.gaussian_blur(x, kernel, sigma)
    assert torch.allclose(ours.double(), slow_blur(x, kernel, sigma), atol=1e-6)


@pytest.mark.parametrize('size', [(48, 48), (20, 31)])
def test_blur_equals_kornia(size):
    kornia = pytest.importorskip('kornia')
    for kernel, sigma in [((3, 11), (0.15, 2.0)), ((9, 5), (1.9, 0.5))]:
        x = images(2, 3, *size)
        reference = kornia.filters.gaussian_blur2d(x, kernel, sigma)
        assert torch.allclose(degradations.gaussian_blur(x, kernel, sigma), reference, atol=1e-6)


def test_blur_of_images_smaller_than_the_padding():
    flat = torch.full((1, 3, 2, 9), 0.25)
    assert torch.allclose(degradations.gaussian_blur(flat, (11, 11), (2.0, 2.0)), flat)
    assert torch.isfinite(degradations.gaussian_blur(images(1, 1, 1, 1), (3, 11), (1.0, 1.0))).all()


@pytest.mark.parametrize('channels', [1, 3])
def test_noise_is_basicsrs_for_given_draws(monkeypatch, channels):
    """BasicSR's add_gaussian_noise_pt, fed with our sigmas, gray flags and normal values, gives our output."""
    x = images(3, channels, 12, 10)
    noise = [SampleNoise(30.0, False, 1), SampleNoise(5.5, True, 2), SampleNoise(1.0, False, 3)]
    draws = {}
    for index, sample in enumerate(noise):
        planes = 1 if sample.gray else channels
        generator = torch.Generator().manual_seed(sample.seed)
        draws[index] = torch.empty(planes, 12, 10).normal_(0, 1, generator=generator)

    def randn(*shape, **kwargs):
        if len(shape) == 2:  # its gray noise: one plane, broadcast with sigma; needs a batch of one here
            return draws[current]
        return draws[current].expand(channels, -1, -1)[None]

    ours = degradations.add_noise(x, noise)
    monkeypatch.setattr(basicsr_degradations.torch, 'randn', randn)
    for current, sample in enumerate(noise):
        reference = basicsr_degradations.add_gaussian_noise_pt(
            x[current : current + 1],
            sigma=torch.tensor([sample.sigma]),
            gray_noise=torch.tensor([float(sample.gray)]),
            clip=True,
            rounds=False,
        )
        assert torch.allclose(ours[current], reference[0], atol=1e-6)


def test_noise_has_the_strength_asked_for_and_is_clipped():
    x = torch.full((2, 3, 200, 200), 0.5)
    out = degradations.add_noise(x, [SampleNoise(20.0, False, 5), SampleNoise(20.0, True, 6)])
    assert out.sub(0.5).std(dim=(1, 2, 3)).mul(255).sub(20).abs().max() < 0.2
    assert torch.equal(out[1, 0], out[1, 2]) and not torch.equal(out[0, 0], out[0, 2])
    dark = degradations.add_noise(torch.zeros(1, 3, 50, 50), [SampleNoise(30.0, False, 7)])
    assert dark.min() == 0 and dark.max() > 0.1
    with pytest.raises(ValueError, match='2 noise entries for a batch of 3'):
        degradations.add_noise(images(3, 3, 4, 4), [SampleNoise(1.0, False, 0)] * 2)


@pytest.mark.parametrize('mode', ['area', 'bilinear', 'bicubic'])
def test_apply_runs_blur_resize_noise_resize_back(mode):
    kornia = pytest.importorskip('kornia')
    x = images(2, 3, 24, 20)
    noise = (SampleNoise(10.0, False, 1), SampleNoise(20.0, True, 2))
    plan = Plan((5, 9), (0.9, 1.7), (17, 14), mode, 'bicubic', noise)
    reference = kornia.filters.gaussian_blur2d(x, (5, 9), (0.9, 1.7))
    reference = F.interpolate(reference, size=(17, 14), mode=mode, align_corners=None if mode == 'area' else False)
    planes = torch.empty(2, 3, 17, 14)
    planes[0].normal_(0, 10 / 255, generator=torch.Generator().manual_seed(1))
    planes[1] = torch.empty(1, 17, 14).normal_(0, 20 / 255, generator=torch.Generator().manual_seed(2))
    reference = (reference + planes).clamp(0, 1)
    reference = F.interpolate(reference, size=(24, 20), mode='bicubic', align_corners=False)
    kept = x.clone()
    out = apply(x, [Plan(), plan])
    assert torch.equal(out[:2], x) and torch.equal(x, kept)
    assert torch.allclose(out[2:], reference, atol=1e-6)


def test_draws_have_the_released_ranges_and_rates():
    plans = [p for t in range(400) for p in draw(ALL, 5, (48, 48), 0, t, 0, 2)]
    blurred, resized = [p for p in plans if p.blur_kernel], [p for p in plans if p.size]
    noisy = [p for p in plans if p.noise]
    for some in (blurred, resized, noisy):
        assert abs(len(some) / len(plans) - 0.5) < 0.05
    # All eight combinations occur: the three decisions are independent.
    assert len({(p.blur_kernel is None, p.size is None, p.noise is None) for p in plans}) == 8
    assert {p.blur_kernel for p in blurred} == {(a, b) for a in (3, 5, 7, 9, 11) for b in (3, 5, 7, 9, 11)}
    sigmas = torch.tensor([p.blur_sigma for p in blurred])
    assert sigmas.min() >= 0.1 and sigmas.max() <= 2 and abs(sigmas.mean() - 1.05) < 0.05
    assert {(p.mode, p.mode_back) for p in resized} == {(a, b) for a in degradations.MODES for b in degradations.MODES}
    sizes = torch.tensor([p.size[0] for p in resized])
    assert sizes.min() == 24 and sizes.max() in (70, 71) and abs((sizes >= 48).float().mean() - 0.25) < 0.05
    samples = torch.tensor([(n.sigma, n.gray) for p in noisy for n in p.noise])
    assert samples[:, 0].min() >= 1 and samples[:, 0].max() <= 30 and abs(samples[:, 0].mean() - 15.5) < 0.7
    assert abs(samples[:, 1].mean() - 0.5) < 0.05


def test_released_defaults_and_certain_probabilities():
    assert Degradation() == Degradation(blur_prob=1, resize_prob=0, noise_prob=0, gray_prob=0)
    (plan,) = draw(Degradation(), 1, (8, 8), 0, 1, 0, 2)
    assert plan.blur_kernel and not plan.size and not plan.noise
    x = images(2, 3, 8, 8)
    assert torch.equal(degrade(x, 3, Degradation(0, 0, 0, 0), 0, 1), x.repeat(3, 1, 1, 1))
    assert degrade(x, 0, ALL, 0, 1).shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match='noise_prob'):
        Degradation(noise_prob=1.5)


def test_changing_one_probability_leaves_the_other_steps_alone():
    for iteration in range(20):
        (a,) = draw(Degradation(1, 1, 1), 1, (48, 48), 3, iteration, 0, 1)
        (b,) = draw(Degradation(0, 1, 1), 1, (48, 48), 3, iteration, 0, 1)
        assert (a.size, a.mode, a.mode_back, a.noise) == (b.size, b.mode, b.mode_back, b.noise)


@pytest.mark.parametrize('channels', [1, 3])
def test_splitting_the_batch_changes_nothing(channels):
    """Two processes with two samples each see what one process with four sees."""
    x = images(4, channels, 24, 24)
    for iteration in range(6):
        whole = degrade(x, 3, ALL, 7, iteration).unflatten(0, (3, 4))
        parts = [degrade(x[r : r + 2], 3, ALL, 7, iteration, r).unflatten(0, (3, 2)) for r in (0, 2)]
        assert torch.allclose(whole, torch.cat(parts, dim=1), atol=1e-6)


def test_draws_depend_on_seed_iteration_negative_and_sample_only():
    x, noise = images(2, 3, 16, 16), Degradation(0, 0, 1, 0)
    before = torch.get_rng_state()
    out = degrade(x, 2, noise, 1, 5)
    assert torch.equal(out, degrade(x, 2, noise, 1, 5)) and torch.equal(torch.get_rng_state(), before)
    same = x[:1].repeat(2, 1, 1, 1)
    rows = degrade(same, 2, noise, 1, 5)
    others = [degrade(same, 2, noise, 2, 5)[0], degrade(same, 2, noise, 1, 6)[0], rows[1], rows[2], rows[3]]
    assert all(not torch.equal(rows[0], other) for other in others)
    every = Degradation(1, 1, 1)
    plans = [p for s in (0, 1) for t in (1, 2) for p in draw(every, 3, (16, 16), s, t, 0, 2)]
    assert len({p.blur_sigma for p in plans}) == len({n.sigma for p in plans for n in p.noise}) / 2 == 12
    assert len({n.seed for p in plans for n in p.noise}) == 24


def test_the_host_never_waits_for_the_device():
    x, flags = images(4, 3, 16, 16), draw_flags(0.5, 4, 0, 1)
    with Calls() as calls:
        degrade(x, 4, Degradation(1, 1, 1, 0.5), 0, 1)
        invert(augment(x, flags), flags)
    assert {'normal_', 'where', 'convolution'} <= calls.names and not calls.names & Calls.WAITING


def test_autocast_of_the_training_step_does_not_reach_in():
    x = images(1, 3, 32, 32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = degrade(x, 2, Degradation(1, 1, 1), 0, 1)
    assert out.dtype == torch.float32 and torch.equal(out, degrade(x, 2, Degradation(1, 1, 1), 0, 1))
