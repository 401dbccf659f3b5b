import math

import pytest
import torch

from dckd_sr.ops.gradients import Watch, against_first, with_shares


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


@pytest.mark.parametrize('scale', [1, 1024])
def test_shares_are_norms_at_the_output(weights, scale):
    """The output is a - b; losses whose gradients at the output are known without autograd."""
    a, b = weights
    output = a - b  # (1, 2)
    terms = {'rest': 2 * output.sum(), 'more': output[0] * 4, 'ce': (output**2).sum() * 1e-6, 'elsewhere': a.sum()}
    result = with_shares(terms, output, {'ce': 0.5, 'not there': 3}, lambda loss: scale * loss)
    assert result.keys() == terms.keys() and all(result[name] is terms[name] for name in ('rest', 'more', 'elsewhere'))
    # (6, 2) is the others' gradient, of norm sqrt(40); (1, 2) / sqrt(5) the direction of ce's.
    expected = 0.5 * math.sqrt(40 / 5) * torch.tensor([1.0, 2.0])
    sum(result.values()).backward()
    assert torch.allclose(a.grad, torch.tensor([6.0, 2.0]) + expected + 1)
    assert torch.allclose(b.grad, -(torch.tensor([6.0, 2.0]) + expected).sum())


def test_shares_of_nothing_and_of_losses_without_gradient_are_nothing(weights):
    output = weights[0] * 2
    terms = {'rest': output.sum(), 'cl': (output * 0).sum(), 'ce': weights[1] * 1}
    result = with_shares(terms, output, {'cl': 1, 'ce': 1})
    assert [float(gradient.abs().sum()) for gradient in torch.autograd.grad(result['cl'], output)] == [0]
    assert with_shares(terms, output, {}) is terms
    alone = with_shares({'cl': (output**2).sum()}, output, {'cl': 1})
    alone['cl'].backward()
    assert not weights[0].grad.any()


def fed(watch, iterations, along=1.0):
    """A watch that got the gradient of one term: of size i in iteration i, and of this cosine."""
    for iteration in iterations:
        if watch.wants(iteration):
            watch.add(iteration, {'l_cl_grad': torch.tensor(float(iteration)), 'l_cl_cos': torch.tensor(along)})
    return watch


@pytest.mark.parametrize(
    'total, expected',
    [
        (1, [('1', 1)]),
        (3, [('1 to 3', 2)]),
        (7, [('1 to 5', 3), ('6 to 7', 6.5)]),
        (1000, [('1 to 5', 3), ('100 to 104', 102)]),
    ],
)
def test_watch_measures_the_first_iterations_and_once_more_at_a_tenth(total, expected):
    report = fed(Watch(total), range(1, total + 1), -0.5).report()
    assert [(span, sizes['l_cl'][0]) for span, sizes in report] == expected
    assert all(sizes['l_cl'][1] == -0.5 for _, sizes in report)


def test_watch_waits_for_the_first_history_update():
    for settled, start in ((50, 100), (300, 301), (2000, 100)):
        assert Watch(1000, settled).starts == [1, start]


def test_watch_reports_each_window_once_and_not_before_its_end():
    watch = fed(Watch(1000), range(1, 5))
    assert watch.report() == []
    assert len(fed(watch, range(5, 6)).report()) == 1
    assert fed(watch, range(6, 103)).report() == []  # in the midst of the second
    resumed = Watch(1000)
    resumed.found = watch.found
    assert fed(resumed, range(103, 200)).report() == [('100 to 104', {'l_cl': (102, 1)})]
    assert Watch(1000).report() == []


def test_watch_weighs_the_cosine_by_the_size():
    watch = Watch(2)
    for iteration, size, cosine in ((1, 9.0, -1.0), (2, 1.0, 1.0)):
        watch.add(iteration, {'l_cl_grad': torch.tensor(size), 'l_cl_cos': torch.tensor(cosine)})
    assert watch.report() == [('1 to 2', {'l_cl': (5, -0.8)})]
