"""Mixup: what is mixed with what, how strongly, and from which draws."""

import numpy as np
import pytest
import torch

from dckd_sr.ops.mixup import missing_partners, mixup

# Sample i is 10 ** i: its share can be read off a mixed one.
LQ = torch.tensor([1.0, 10, 100, 1000]).view(4, 1, 1, 1).expand(4, 3, 2, 2)


def test_every_sample_is_mixed_with_its_partner_with_one_weight():
    weights = []
    for iteration in range(40):
        lq, gt = mixup(LQ, -LQ, 1.2, False, 7, iteration)
        assert torch.equal(gt, -lq)
        weight = (lq[0] - 10) / (1 - 10)
        others = LQ[[1, 0, 3, 2]]
        torch.testing.assert_close(lq, weight * LQ + (1 - weight) * others)
        weights.append(weight.mean().item())
    assert all(0 <= weight <= 1 for weight in weights) and len(set(weights)) == 40


def test_the_last_of_an_odd_batch_stays():
    lq, _ = mixup(LQ[:3], LQ[:3], 1.2, False, 7, 1)
    assert torch.equal(lq[2], LQ[2]) and not torch.equal(lq[0], LQ[0])
    one, _ = mixup(LQ[:1], LQ[:1], 1.2, False, 7, 1)
    assert torch.equal(one, LQ[:1])


def test_a_part_of_a_batch_is_mixed_as_in_the_whole():
    whole, _ = mixup(LQ, LQ, 1.2, False, 7, 1)
    assert missing_partners([1, 2], 4) == [0, 3] and missing_partners([2, 3], 4) == [] == missing_partners([2], 3)
    part, _ = mixup(LQ[[1, 2, 0, 3]], LQ[[1, 2, 0, 3]], 1.2, False, 7, 1, rows=[1, 2], total=4)
    assert torch.equal(part, whole[[1, 2]])
    # Where nothing is mixed, partners go as well.
    kept = [mixup(LQ[[1, 2, 0, 3]], LQ, 1.2, True, 0, n, rows=[1, 2], total=4)[0] for n in range(20)]
    assert {len(lq) for lq in kept} == {2} and any(torch.equal(lq, LQ[[1, 2]]) for lq in kept)


@pytest.mark.parametrize('beta, variance', [(1.2, 1 / (4 * 3.4)), (50, 1 / (4 * 101))])
def test_weights_follow_the_beta_distribution(beta, variance):
    pair = torch.tensor([0.0, 1.0]).view(2, 1)
    weights = [mixup(pair, pair, beta, False, 0, n)[0][1].item() for n in range(1500)]
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
