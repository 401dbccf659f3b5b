"""PSNRLoss against PSNR itself, as BasicSR measures it, and against NAFNet's limits."""

import math

import numpy as np
import pytest
import torch
from basicsr.losses import build_loss
from basicsr.metrics import calculate_psnr

from dckd_sr.errors import UserError


def loss(**arguments):
    return build_loss({'type': 'PSNRLoss', **arguments})


def images(seed, batch=2):
    return np.random.default_rng(seed).integers(0, 256, (batch, 8, 6, 3)).astype(np.uint8)


def tensor(bgr):
    return torch.from_numpy(bgr[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize('on_y', [False, True])
def test_it_is_the_mean_of_the_images_negative_psnr(on_y):
    pred, target = images(1), images(2)
    target[1] = pred[1] + (target[1] > 127)  # another error per image: the mean of PSNRs is no PSNR of the mean
    wanted = [calculate_psnr(p, t, crop_border=0, test_y_channel=on_y) for p, t in zip(pred, target)]
    assert loss(toY=on_y)(tensor(pred), tensor(target)).item() == pytest.approx(-np.mean(wanted), abs=2e-3)


def test_the_weight_scales_and_equal_images_give_80_db():
    x = torch.rand(2, 3, 4, 4)
    assert loss(loss_weight=0.5)(x, x).item() == pytest.approx(-40, abs=1e-3)


def test_gradients_are_finite_at_equal_images_and_follow_the_formula():
    pred = torch.rand(2, 3, 4, 4, requires_grad=True)
    target = torch.rand(2, 3, 4, 4)
    loss()(pred, target).backward()
    mse = (pred - target).pow(2).mean((1, 2, 3), keepdim=True)
    wanted = 10 / math.log(10) / (mse + 1e-8) * 2 * (pred - target) / 48 / 2
    torch.testing.assert_close(pred.grad, wanted.detach())
    same = target.clone().requires_grad_()
    loss()(same, target).backward()
    assert same.grad.abs().max() == 0


def test_other_reductions_and_gray_images_on_y_are_refused():
    with pytest.raises(UserError, match="reduction of PSNRLoss must be mean, not 'sum'"):
        loss(reduction='sum')
    with pytest.raises(UserError, match='1 channels'):
        loss(toY=True)(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4))


def test_the_state_of_a_model_does_not_grow():
    assert loss().state_dict() == {}
