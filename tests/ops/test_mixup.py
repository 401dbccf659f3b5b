"""Mixup: what is mixed with what, how strongly, and from which draws."""

import numpy as np
import pytest
import torch

from dckd_sr.ops.mixup import mixup

# Sample i is 10 ** i: its share can be read off a mixed one.
LQ = torch.tensor([1.0, 10, 100, 1000]).view(4, 1, 1, 1).expand(4, 3, 2, 2)


def weight_of(numbers, beta=1.2, **options):
    """The weight of the samples' own values, and each one's partner."""
    lq, gt = mixup(LQ, -LQ, beta, options.get('use_identity', False), 7, *numbers)
    assert torch.equal(gt, -lq)
    values, own = lq[:, 0, 0, 0].double().numpy(), LQ[:, 0, 0, 0].double().numpy()
    for partners in np.array(np.meshgrid(*[range(4)] * 4)).T.reshape(-1, 4):
        others = own[partners]
        moved = others != own
        weights = (values - others)[moved] / (own - others)[moved]
        if sorted(partners) == [0, 1, 2, 3] and moved.any() and np.ptp(weights) < 1e-5:
            if np.allclose(values[~moved], own[~moved]):
                return weights.mean(), tuple(partners)
    return None, None


def test_every_sample_is_mixed_with_a_sample_of_the_batch_with_one_weight():
    found = [weight_of((iteration,)) for iteration in range(40)]
    weights = [weight for weight, _ in found if weight is not None]
    assert len(weights) >= 36  # one order in 24 changes nothing
    assert len({partners for _, partners in found}) > 8 and all(0 <= weight <= 1 for weight in weights)


@pytest.mark.parametrize('beta, variance', [(1.2, 1 / (4 * 3.4)), (50, 1 / (4 * 101))])
def test_weights_follow_the_beta_distribution(beta, variance):
    pair = torch.tensor([0.0, 1.0]).view(2, 1)
    mixed = [mixup(pair, pair, beta, False, 0, n)[0][1].item() for n in range(3000)]
    weights = [value for value in mixed if value != 1]  # every other order changes nothing
    assert 1350 < len(weights) < 1650
    assert np.mean(weights) == pytest.approx(0.5, abs=0.02) and np.var(weights) == pytest.approx(variance, rel=0.1)


def test_with_identity_every_other_batch_stays():
    kept = [mixup(LQ, LQ, 1.2, True, 0, n)[0] is LQ for n in range(400)]
    assert 160 < sum(kept) < 240
    assert not any(mixup(LQ, LQ, 1.2, False, 0, n)[0] is LQ for n in range(20))


def test_draws_follow_from_seed_and_numbers_alone():
    first = mixup(LQ, LQ, 1.2, False, 3, 5, 0)[0]
    np.random.seed(1), torch.manual_seed(1)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(mixup(LQ, LQ, 1.2, False, 3, 5, 0)[0], first)
    assert torch.equal(torch.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])
    others = [mixup(LQ, LQ, 1.2, False, *numbers)[0] for numbers in ((4, 5, 0), (3, 6, 0), (3, 5, 1))]
    assert not any(torch.equal(other, first) for other in others)
