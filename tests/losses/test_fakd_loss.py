"""The affinity loss against cosines computed one pair of positions at a time."""

import pytest
import torch
from basicsr.losses import build_loss
from torch.nn import functional as F

from dckd_sr.errors import UserError
from dckd_sr.losses import fakd_loss
from dckd_sr.losses.fakd_loss import SpatialAffinityLoss, affinity_distance


def cosines(feature_map):
    """A of one image: the cosine of every pair of positions of (C, h, w)."""
    columns = feature_map.flatten(1).T
    return torch.stack([torch.stack([F.cosine_similarity(p, q, dim=0) for q in columns]) for p in columns])


def reference(student, teacher):
    """Mean over images and pairs of |A_S - A_T|."""
    return torch.stack([(cosines(s) - cosines(t)).abs().mean() for s, t in zip(student, teacher)]).mean()


def loss(count=1, **arguments):
    paths = [f'body.{index}' for index in range(count)]
    return build_loss({'type': 'SpatialAffinityLoss', 'student': paths, 'teacher': paths, **arguments})


def maps(*shapes):
    return [torch.randn(shape) for shape in shapes]


def test_the_reference_is_a_matrix_of_cosines():
    a = cosines(torch.randn(5, 3, 2))
    assert a.shape == (6, 6) and torch.allclose(a, a.T) and torch.allclose(a.diagonal(), torch.ones(6))


@pytest.mark.parametrize('block', [2**20, 1, 40], ids=['one block', 'row by row', 'with a rest'])
def test_values_and_gradients_equal_the_reference(block, monkeypatch):
    monkeypatch.setattr(fakd_loss, '_BLOCK', {'cpu': block})  # 40: three of eight rows, twice, and two
    student, teacher = maps((2, 5, 4, 2), (2, 7, 4, 2))  # another number of channels
    student.requires_grad_()
    value = loss(loss_weight=3.0).from_maps([student], [teacher])
    wanted = 3 * reference(student, teacher)
    assert value.shape == () and torch.allclose(value, wanted, atol=1e-6)
    (ours,), (theirs,) = torch.autograd.grad(2 * value, student), torch.autograd.grad(2 * wanted, student)
    assert theirs.abs().max() > 1e-3 and torch.allclose(ours, theirs, atol=1e-6)


def test_maps_are_summed_and_of_any_size():
    ours, theirs = maps((2, 4, 3, 3), (2, 4, 2, 5)), maps((2, 6, 3, 3), (2, 3, 2, 5))
    wanted = sum(reference(s, t) for s, t in zip(ours, theirs))
    assert torch.allclose(loss(2, loss_weight=1).from_maps(ours, theirs), wanted, atol=1e-6)


def test_the_weight_is_that_of_images_up_to_255_for_images_up_to_1():
    (s, t) = maps((1, 4, 3, 3), (1, 4, 3, 3))
    # 10 beside 0.5 |S - y| + 0.5 |S - T| on 0-255; beside 1 and 1 on 0-1 that is 2 * 10 / 255.
    assert torch.allclose(loss().from_maps([s], [t]), 2 * 10 / 255 * reference(s, t), rtol=1e-4)


def test_it_is_zero_for_equal_maps_and_blind_to_the_length_of_columns():
    s, t = maps((2, 5, 3, 3), (2, 5, 3, 3))
    assert loss().from_maps([s], [s.clone()]) < 1e-8
    value, lengths = loss().from_maps([s], [t]), torch.rand(2, 1, 3, 3) + 0.1
    assert torch.allclose(loss().from_maps([s * lengths], [t * 1000]), value, rtol=1e-4)
    assert value > 1e-3


def test_tokens_are_maps_and_pooling_averages_squares():
    s, t = maps((2, 5, 6, 4), (2, 3, 6, 4))
    tokens = [value.flatten(2).transpose(1, 2) for value in (s, t)]
    for size in (1, 2, 4):  # 4 does not divide 6
        criterion = loss(loss_weight=1, pool_size=size)
        wanted = reference(*(F.avg_pool2d(value, size, ceil_mode=True) for value in (s, t)))
        assert torch.allclose(criterion.from_maps([s], [t]), wanted, atol=1e-6)
        assert torch.allclose(criterion.from_maps([tokens[0]], [tokens[1]], (6, 4)), wanted, atol=1e-6)
        assert torch.allclose(criterion.from_maps([s], [tokens[1]], (6, 4)), wanted, atol=1e-6)


def test_more_images_of_the_teacher_are_passed_over_and_it_gets_no_gradient():
    s, t = maps((2, 5, 3, 3), (4, 5, 3, 3))
    s.requires_grad_(), t.requires_grad_()
    value = loss(loss_weight=1).from_maps([s], [t])
    assert torch.allclose(value, reference(s, t[:2]), atol=1e-6)
    value.backward()
    assert t.grad is None and s.grad.abs().max() > 0


def test_half_precision_is_compared_in_float32():
    s, t = maps((1, 8, 6, 6), (1, 8, 6, 6))
    half = s.half().requires_grad_()
    value = affinity_distance(half.flatten(2), t.half().flatten(2))
    value.backward()
    assert value.dtype == torch.float32 and half.grad.dtype == torch.float16
    assert value.item() == pytest.approx(reference(s, t).item(), rel=2e-3)


def test_what_does_not_fit_is_told():
    criterion = loss()
    with pytest.raises(UserError, match='body.0 of the student has 9 of them, and body.0 of the teacher 16'):
        criterion.from_maps(maps((1, 4, 3, 3)), maps((1, 4, 4, 4)))
    with pytest.raises(UserError, match=r'body.0 gives \(1, 4\), which is no feature map'):
        criterion.from_maps(maps((1, 4)), maps((1, 4)))
    with pytest.raises(UserError, match='no feature map'):
        loss(pool_size=2).from_maps(maps((1, 9, 4)), maps((1, 9, 4)), (2, 2))
    for paths in (['a', 'b'], []):
        with pytest.raises(UserError, match='fakd_opt compares as many maps'):
            SpatialAffinityLoss('a', paths)
    assert SpatialAffinityLoss('body.1', ['body.3']).student == ['body.1']
