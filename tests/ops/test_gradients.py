import math

import pytest
import torch

from dckd_sr.ops.gradients import against_first


@pytest.fixture
def weights():
    return [torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor(2.0, requires_grad=True)]


def test_norm_and_cosine_of_known_gradients(weights):
    a, b = weights
    terms = {
        'first': 2 * a.sum() + b,  # (2, 2), 1
        'same': 6 * a.sum() + 3 * b,
        'opposite': -a.sum() - b / 2,
        'square': (a**2).sum() / 2,  # (3, 4), 0
        'across': a[0] - a[1],
    }
    found = {name: float(value) for name, value in against_first(terms, weights).items()}
    expected = {'same': (3, 1), 'opposite': (0.5, -1), 'square': (5 / 3, 14 / 15), 'across': (math.sqrt(2) / 3, 0)}
    assert found.keys() == {f'{name}_{what}' for name in expected for what in ('grad', 'cos')}
    for name, (norm, cosine) in expected.items():
        assert found[f'{name}_grad'] == pytest.approx(norm) and found[f'{name}_cos'] == pytest.approx(cosine)


def test_the_graph_and_the_gradients_stay(weights):
    terms = {'first': weights[0].sum(), 'other': (weights[1] * weights[0][0]) ** 2}
    against_first(terms, weights)
    assert all(weight.grad is None for weight in weights)
    sum(terms.values()).backward()
    assert weights[1].grad == 2 * 2 * 9


def test_a_loss_scale_cancels_and_terms_without_gradient_are_no_matter(weights):
    terms = {
        'constant': torch.tensor(1.0),
        'first': weights[0].sum(),
        'other': weights[0][0] * 5,
        'none': weights[1] * 0,
    }
    plain, scaled = against_first(terms, weights), against_first(terms, weights, lambda loss: 1024 * loss)
    assert plain == scaled and plain['none_grad'] == plain['none_cos'] == 0
    assert against_first({'first': weights[0].sum()}, weights) == {}
