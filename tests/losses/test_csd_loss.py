"""CSD's ratio against a sum by hand over slices of VGG19, whose weights are random: what is tested is the formula."""

import pytest
import torch
from basicsr.losses import build_loss
from torch import nn

from dckd_sr.errors import UserError

WEIGHTS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1]


def loss(**arguments):
    return build_loss({'type': 'CSDLoss', 'allow_random': True, **arguments})


def slices(criterion, images):
    """Outputs of layers 1, 6, 11, 20 and 29 of torchvision's VGG19, for images up to 255 as they are."""
    found = []
    h = images * 255
    for index, layer in enumerate(criterion.vgg.features):
        h = nn.functional.relu(h) if isinstance(layer, nn.ReLU) else layer(h)
        if index in (1, 6, 11, 20, 29):
            found.append(h)
    return found


def by_hand(criterion, student, teacher, negatives, weights=WEIGHTS):
    """sum_i v_i |f_i(S) - f_i(T)| / (sum_k |f_i(S) - f_i(N_k)| + 1e-7), each |.| a mean over all elements."""
    total = 0
    levels = [slices(criterion, images) for images in (student, teacher, negatives)]
    for weight, s, t, n in zip(weights, *levels):
        below = sum((s - n[k]).abs().mean() for k in range(len(n)))
        total = total + weight * (s - t).abs().mean() / (below + 1e-7)
    return total


def images(batch=3, size=16):
    return (
        torch.rand(batch, 3, 2 * size, 2 * size),
        torch.rand(batch, 3, 2 * size, 2 * size),
        torch.rand(batch, 3, size, size),
    )


@pytest.mark.parametrize('num_neg', [1, 2, 3])
def test_values_and_gradients_equal_the_sum_by_hand(num_neg):
    criterion = loss(loss_weight=0.5, num_neg=num_neg)
    student, teacher, lq = images()
    student.requires_grad_()
    # The first images of the batch, each for all: as torch.nn.Upsample enlarges them.
    negatives = nn.Upsample(scale_factor=2, mode='bicubic', align_corners=False)(lq)[:num_neg]
    value = criterion.contrast(student, teacher, lq)
    wanted = 0.5 * by_hand(criterion, student, teacher, negatives)
    assert value.shape == () and torch.allclose(value, wanted, rtol=1e-4)
    (ours,), (theirs,) = torch.autograd.grad(value, student), torch.autograd.grad(wanted, student)
    assert theirs.abs().max() > 0 and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_the_order_of_the_negatives_is_nothing_and_one_more_lowers_the_ratio():
    student, teacher, lq = images()
    criterion = loss(num_neg=3)
    value = criterion.contrast(student, teacher, lq)
    assert torch.allclose(criterion.contrast(student, teacher, lq[[2, 0, 1]]), value, rtol=1e-5)
    fewer = loss(num_neg=2)
    fewer.vgg = criterion.vgg
    assert fewer.contrast(student, teacher, lq) > 1.2 * value


def test_it_is_zero_where_the_student_is_the_teacher():
    student, _, lq = images()
    assert loss().contrast(student, student.clone(), lq) == 0


def test_only_the_student_gets_a_gradient_and_vgg_none():
    criterion = loss(num_neg=2)
    tensors = [tensor.requires_grad_() for tensor in images(2)]
    criterion.contrast(*tensors).backward()
    assert [tensor.grad is None for tensor in tensors] == [False, True, True]
    assert not any(parameter.requires_grad for parameter in criterion.parameters())


def test_the_weight_is_that_of_images_up_to_255_for_images_up_to_1():
    criterion, tensors = loss(num_neg=2), images(2)
    alone = loss(num_neg=2, loss_weight=1)
    alone.vgg = criterion.vgg
    assert torch.allclose(criterion.contrast(*tensors), 200 / 255 * alone.contrast(*tensors))


def test_never_without_weights_unless_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(UserError, match='no weights of vgg19 at .*download them from https://download.pytorch.org'):
        build_loss({'type': 'CSDLoss'})
    with pytest.raises(UserError, match='weights of CSDLoss has 2 entries'):
        loss(weights=[1, 1])
