"""The distribution loss, in both forms, against the authors' numbers and formulas written out."""

import golden_data
import numpy as np
import pytest
import torch
from basicsr.losses import build_loss
from small_run import TINY_VQGAN
from torch._subclasses.fake_tensor import FakeTensorMode

from dckd_sr.archs.vqgan_arch import VQGAN
from dckd_sr.errors import UserError
from dckd_sr.losses.distribution_loss import DistributionMappingLoss

ENCODER = {'type': 'VQGAN', **TINY_VQGAN, 'allow_random': True}


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def per_position(student, teacher, form):
    """Eq. 9 per position in numpy; the released form takes one more softmax."""
    student, teacher = (softmax(x.detach().double().numpy()) for x in (student, teacher))
    return -(teacher * np.log(softmax(student) if form == 'released' else student)).sum(1)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('form', ['released', 'paper'])
def test_released_and_paper_value_and_gradient(form, dtype):
    data, config = golden_data.arrays('losses')
    net = golden_data.fill.fill_(VQGAN(**config['arch'])).to(dtype).eval().requires_grad_(False)

    def image(seed):
        return golden_data.fill.image(config['shape'], seed).to(dtype)

    anchor = image(config['anchor_seed']).requires_grad_()
    options = {'type': 'CELoss', 'loss_weight': config[f'ce_{form}_loss_weight'], 'reduction': 'mean'}
    loss = build_loss(options if form == 'released' else {**options, 'form': form})
    teacher = net(image(config['positive_seed']), levels=False).logits
    value = loss.from_logits(net(anchor, levels=False).logits, teacher)
    value.backward()
    expected = data[f'ce_{form}' if dtype == torch.float32 else f'ce_{form}_f64']
    np.testing.assert_allclose(value.detach(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12)
    gradient = data[f'ce_{form}_grad']
    assert (anchor.grad - torch.from_numpy(gradient)).abs().max() <= 2e-5 * np.abs(gradient).max()


@pytest.mark.parametrize('form', ['released', 'paper'])
@pytest.mark.parametrize('reduction, reduce', [('mean', np.mean), ('sum', np.sum)])
def test_formulas(form, reduction, reduce):
    student = 3 * torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    teacher = 3 * torch.randn(6, 9, dtype=torch.float64)
    loss = build_loss({'type': 'DistributionMappingLoss', 'loss_weight': 0.5, 'reduction': reduction, 'form': form})
    value = loss.from_logits(student, teacher)
    assert value.shape == ()
    np.testing.assert_allclose(value.item(), 0.5 * reduce(per_position(student, teacher, form)), rtol=1e-12)


def test_paper_form_is_least_at_the_teacher_and_the_released_is_not():
    teacher = torch.randn(5, 7, dtype=torch.float64)
    paper, released = DistributionMappingLoss(form='paper'), DistributionMappingLoss()
    same = teacher.clone().requires_grad_()
    entropy = -(teacher.softmax(1) * teacher.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(paper.from_logits(same, teacher), entropy)
    assert torch.autograd.grad(paper.from_logits(same, teacher), same)[0].abs().max() < 1e-12
    assert torch.autograd.grad(released.from_logits(same, teacher), same)[0].abs().max() > 1e-4


def test_teacher_gets_no_gradient():
    student, teacher = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    for form in ('released', 'paper'):
        DistributionMappingLoss(form=form).from_logits(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize('form', ['released', 'paper'])
def test_distant_codes_stay_finite(form):
    student = torch.tensor([[0.0, -1e4, -2e4]], requires_grad=True)
    value = DistributionMappingLoss(form=form).from_logits(student, torch.tensor([[-1e4, 0.0, -1e4]]))
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()
    if form == 'paper':
        assert value.item() == 1e4


def test_on_images():
    loss = build_loss({'type': 'CELoss', 'loss_weight': 2, 'reduction': 'mean', 'form': 'paper', 'encoder': ENCODER})
    torch.nn.init.normal_(loss.encoder.quantize.embedding.weight)
    pred, target = torch.rand(2, 3, 9, 8, requires_grad=True), torch.rand(2, 3, 9, 8, requires_grad=True)
    value = loss(pred, target)
    student, teacher = loss.encoder.encode(pred), loss.encoder.encode(target)
    torch.testing.assert_close(value, -2 * (teacher * student.log()).sum(1).mean(), rtol=1e-4, atol=1e-5)
    value.backward()
    assert pred.grad.abs().sum() > 0 and target.grad is None
    assert all(parameter.grad is None for parameter in loss.encoder.parameters())


def test_waits_for_no_device():
    """Fake tensors have no values: reading one on the host would fail."""
    with FakeTensorMode():
        loss = build_loss({'type': 'CELoss', 'encoder': ENCODER})
        assert loss.from_logits(torch.empty(6, 8), torch.empty(6, 8)).shape == ()
        assert loss(torch.empty(2, 3, 8, 8), torch.empty(2, 3, 8, 8)).shape == ()


@pytest.mark.parametrize(
    'options, message',
    [
        ({'form': 'papr'}, "form .* released or paper, not 'papr'"),
        ({'reduction': 'none'}, "reduction .* mean or sum, not 'none'"),
        ({'encoder': {**ENCODER, 'allow_random': False}}, 'pretrain'),
    ],
)
def test_mistakes_in_options(options, message):
    with pytest.raises(UserError, match=message):
        DistributionMappingLoss(**options)


def test_images_need_an_encoder():
    with pytest.raises(UserError, match='encoder block'):
        DistributionMappingLoss()(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))
