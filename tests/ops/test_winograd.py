"""Winograd's convolutions against plain sums in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dckd_sr.ops import winograd
from dckd_sr.speed import Speed

WIDE, SIDE = 96, 45  # channels and side of an image for which it pays


@pytest.fixture
def calls(monkeypatch):
    found, true = [], winograd.convolve
    monkeypatch.setattr(winograd, 'convolve', lambda *a: found.append(tuple(a[0].shape)) or true(*a))
    return found


@pytest.fixture(scope='module')
def layer():
    torch.manual_seed(0)
    return nn.Conv2d(WIDE, WIDE, 3, 1, 1).requires_grad_(False)


@pytest.mark.parametrize('shape', [(2, 5, 13, 18), (1, 3, 4, 4), (3, 8, 1, 2), (1, 40, 70, 23)])
@pytest.mark.parametrize('block', [1, 3000, 2**20])  # a row of squares at a time, some, all
def test_it_is_the_convolution(shape, block, monkeypatch):
    monkeypatch.setattr(winograd, '_BLOCK', block)
    x, weight = torch.randn(shape), torch.randn(7, shape[1], 3, 3)
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    found = winograd.convolve(x, weight)
    assert found.shape == expected.shape and found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_gradients_to_the_image(layer, calls):
    fast, x = winograd.speed_up(copy.deepcopy(layer)), torch.rand(1, WIDE, SIDE, SIDE, requires_grad=True)
    weights = torch.randn(1, WIDE, SIDE, SIDE)
    gradients = [torch.autograd.grad((net(x) * weights).sum(), x)[0] for net in (layer, fast)]
    assert len(calls) == 2  # forward and backward
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=2e-5 * float(gradients[0].abs().max()))


def test_bias_is_added(layer):
    x = torch.rand(1, WIDE, SIDE, SIDE)
    torch.testing.assert_close(winograd.speed_up(copy.deepcopy(layer))(x), layer(x), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    'changed',
    [
        {'stride': 2},
        {'padding': 0},
        {'dilation': 2, 'padding': 2},
        {'groups': 2},
        {'kernel_size': 1, 'padding': 0},
        {'out_channels': 3},
        {'padding_mode': 'reflect'},
    ],
)
def test_other_convolutions_stay(changed, calls):
    given = {'in_channels': WIDE, 'out_channels': WIDE, 'kernel_size': 3, 'padding': 1, **changed}
    conv = nn.Conv2d(**given).requires_grad_(False)
    x = torch.rand(1, WIDE, SIDE, SIDE)
    expected = conv(x)
    assert torch.equal(winograd.speed_up(conv)(x), expected) and not calls


def test_other_tensors_stay(layer, calls):
    fast, large = winograd.speed_up(copy.deepcopy(layer)), torch.rand(1, WIDE, SIDE, SIDE)
    fast(large[..., :20])  # small
    with torch.autocast('cpu', torch.bfloat16):
        fast(large)
    with winograd.plain():
        fast(large)
    copy.deepcopy(fast).double()(large.double())
    copy.deepcopy(fast).requires_grad_()(large)
    assert not calls
    fast(large)
    assert len(calls) == 1


def test_frozen_networks_of_a_step_run_so(layer, calls):
    x = torch.rand(1, WIDE, SIDE, SIDE)
    speed = Speed({}, 'cpu')
    for role in ('teacher', 'history', 'encoder'):
        speed(role, speed.prepare(role, copy.deepcopy(layer)), x)
    assert len(calls) == 3
    speed('student', speed.prepare('student', copy.deepcopy(layer)), x)
    assert len(calls) == 3
