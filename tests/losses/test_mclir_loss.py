"""The history's push against BasicSR's PerceptualLoss, which the method's code subtracts, and against plain sums."""

from types import SimpleNamespace

import pytest
import torch
from basicsr.archs import vgg_arch
from basicsr.losses import build_loss

from dckd_sr.errors import UserError
from dckd_sr.losses.mclir_loss import HistoryNegativeLoss

LAYERS = {'relu2_1': 0.5, 'conv1_2': 2.0, 'conv3_1': 1.0}


def push(**arguments):
    return build_loss({'type': 'HistoryNegativeLoss', 'allow_random': True, **arguments})


def perceptual(criterion, layers, monkeypatch):
    """BasicSR's loss, with the weights of ours."""
    built = SimpleNamespace(features=criterion.vgg.features)
    monkeypatch.setattr(vgg_arch, 'vgg', SimpleNamespace(vgg19=lambda **_: built))
    return build_loss({'type': 'PerceptualLoss', 'layer_weights': layers, 'perceptual_weight': 1.0})


@pytest.mark.parametrize('layers', [LAYERS, None], ids=['some layers', 'default'])
def test_it_is_minus_the_perceptual_distance(layers, monkeypatch):
    criterion = push(loss_weight=0.3, layer_weights=layers)
    theirs = perceptual(criterion, layers or {'conv5_4': 1.0}, monkeypatch)
    student, history = torch.rand(2, 3, 32, 32, requires_grad=True), torch.rand(2, 3, 32, 32)
    value, wanted = criterion.push(student, history), -0.3 * theirs(student, history)[0]
    assert value < 0 and torch.allclose(value, wanted, rtol=1e-5)
    (ours,), (reference,) = torch.autograd.grad(value, student), torch.autograd.grad(wanted, student)
    assert torch.allclose(ours, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


def test_it_pushes_away_and_only_the_student():
    criterion = push(loss_weight=1.0, layer_weights=LAYERS)
    student, history = (torch.rand(1, 3, 16, 16, requires_grad=True) for _ in range(2))
    value = criterion.push(student, history)
    value.backward()
    assert history.grad is None and criterion.push(student.detach(), student.detach()) == 0
    farther = student.detach() - 1e-2 * student.grad / student.grad.abs().max()  # a step downhill
    assert criterion.push(farther, history) < value


def test_levels_of_an_encoder():
    criterion = push(features='vqgan', weights=[0.5, 2.0], loss_weight=0.1)
    assert criterion.vgg is None
    student, history = ([torch.rand(2, 4, 6, 6), torch.rand(2, 8, 3, 3)] for _ in range(2))
    wanted = -0.1 * sum(w * (s - h).abs().mean() for w, s, h in zip([0.5, 2.0], student, history))
    assert torch.allclose(criterion.from_features(student, history), wanted)
    with pytest.raises(UserError, match='2 entries, but the encoder has 1 levels'):
        criterion.from_features(student[:1], history[:1])


def test_what_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(UserError, match='no weights of vgg19'):
        HistoryNegativeLoss()
    with pytest.raises(UserError, match="vgg or vqgan, not 'resnet'"):
        HistoryNegativeLoss(features='resnet')
