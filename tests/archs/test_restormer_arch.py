"""Restormer against the authors' numbers, the public checkpoints' layout, and a plain reference for attention."""

import golden_data
import pytest
import torch
from basicsr.archs import build_network
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from dckd_sr.archs.restormer_arch import Attention, BiasFree, Restormer, WithBias
from dckd_sr.errors import UserError

SMALL = {'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'heads': [1, 2, 2, 4]}


def small(**changes):
    return Restormer(**{**SMALL, **changes}).eval()


@pytest.mark.parametrize('norm', ['WithBias', 'BiasFree'])
@torch.no_grad()
def test_official_outputs(norm):
    data, configs = golden_data.arrays('restormer_small')
    net = golden_data.fill.fill_(build_network({'type': 'Restormer', **configs[f'config_{norm}']})).eval()
    out = net(golden_data.fill.image((1, 3, 48, 40), 3))
    torch.testing.assert_close(out, torch.from_numpy(data[f'out_{norm}']), rtol=1e-4, atol=5e-5)


def test_layout_of_the_public_checkpoints():
    for variant in golden_data.manifest('restormer')['variants'].values():
        with torch.device('meta'):
            net = Restormer(**variant['config'])
        assert {key: list(value.shape) for key, value in net.state_dict().items()} == variant['keys']


@torch.no_grad()
def test_attention_of_channels():
    """Per image and head: softmax over channels of the cosines times the temperature, in plain matrices."""
    attention = Attention(6, 2, bias=True).double()
    attention.temperature.copy_(torch.tensor([2.0, 0.5])[:, None, None])
    x = torch.rand(2, 6, 5, 4, dtype=torch.float64)
    parts = attention.qkv_dwconv(attention.qkv(x))
    expected = torch.empty_like(x)
    for image in range(2):
        for head, temperature in enumerate((2.0, 0.5)):
            rows = slice(3 * head, 3 * head + 3)
            q, k, v = (parts[image, 6 * i : 6 * i + 6][rows].reshape(3, 20) for i in range(3))
            cosines = torch.stack([torch.stack([a @ b / (a.norm() * b.norm()) for b in k]) for a in q])
            expected[image, rows] = (torch.softmax(cosines * temperature, 1) @ v).reshape(3, 5, 4)
    torch.testing.assert_close(attention(x), attention.project_out(expected))


@torch.no_grad()
def test_norms():
    x = 3 * torch.rand(2, 6, 5, 4, dtype=torch.float64) + 7
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    weight, bias = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    with_bias, bias_free = WithBias(6).double(), BiasFree(6).double()
    with_bias.load_state_dict({'weight': weight, 'bias': bias})
    bias_free.load_state_dict({'weight': weight})
    scaled = weight[:, None, None] / (variance + 1e-5).sqrt()
    torch.testing.assert_close(with_bias(x), (x - mean) * scaled + bias[:, None, None])
    torch.testing.assert_close(bias_free(x), x * scaled)


@pytest.mark.parametrize('height, width', [(1, 1), (5, 30), (16, 9)])
@torch.no_grad()
def test_images_of_any_size_are_mirrored(height, width):
    net = small()
    x = torch.rand(1, 3, height, width)
    right, bottom = -width % 8, -height % 8
    padded = F.pad(x, (0, right, 0, 0), mode='reflect' if right < width else 'replicate')
    padded = F.pad(padded, (0, 0, 0, bottom), mode='reflect' if bottom < height else 'replicate')
    torch.testing.assert_close(net(x), net(padded)[..., :height, :width])


@torch.no_grad()
def test_two_images_in_the_channels():
    """Dual-pixel deblurring: nothing is added to the output, features of the first convolution are."""
    net = small(inp_channels=6, dual_pixel_task=True)
    x = torch.rand(1, 6, 16, 8)
    assert net(x).shape == (1, 3, 16, 8) and net.skip_conv.weight.shape == (8, 4, 1, 1)
    net.output.weight.zero_()
    assert net(x).abs().max() == 0


def test_trains():
    net = small().train()
    net(torch.rand(2, 3, 12, 9)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'num_blocks': [1, 1]}, r'num_blocks must have four entries, not \[1, 1\]'),
        ({'heads': [1]}, 'heads must have four entries'),
        ({'heads': [3, 2, 2, 4]}, r'heads \[3, 2, 2, 4\] do not divide'),
        ({'LayerNorm_type': 'Biasfree'}, "WithBias or BiasFree, not 'Biasfree'"),
        ({'inp_channels': 6}, 'inp_channels 6 and out_channels 3 must be equal'),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UserError, match=message):
        small(**changes)


def test_waits_for_no_device():
    """Fake tensors have no values: reading one on the host would fail."""
    with FakeTensorMode():
        assert small()(torch.empty(1, 3, 41, 39)).shape == (1, 3, 41, 39)
