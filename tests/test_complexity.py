import pytest
import torch
import torch.nn.functional as F
from basicsr.archs import build_network
from torch import nn

import dckd_sr  # noqa: F401
from dckd_sr import complexity

EDSR = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 64, 'num_block': 16}
SWINIR = {
    'type': 'SwinIR', 'img_size': 64, 'window_size': 8, 'img_range': 1.0, 'depths': [6] * 4, 'embed_dim': 60,
    'num_heads': [6] * 4, 'mlp_ratio': 2, 'upsampler': 'pixelshuffledirect', 'resi_connection': '1conv',
}  # fmt: skip


@pytest.mark.parametrize(
    'options, scale, parameters, multiply_adds, tolerance',
    [
        # EDSR-baseline in the tables of AWSRN (arXiv:1904.02358) and of its followers.
        (EDSR, 2, 1370e3, 316.3e9, 0.001),
        (EDSR, 3, 1555e3, 160.2e9, 0.003),
        (EDSR, 4, 1518e3, 114.0e9, 0.003),
        # SwinIR-light in those of ELAN (arXiv:2203.06697) and NGswin (arXiv:2211.11436), whose counter adds
        # normalisations: 1.4 % at every scale.
        (SWINIR, 4, 930e3, 63.6e9, 0.015),
    ],
)
def test_counts_are_those_of_the_papers(options, scale, parameters, multiply_adds, tolerance):
    net = build_network({**options, 'upscale': scale})
    shape = complexity.paper_shape(scale)
    assert complexity.parameters(net) == pytest.approx(parameters, abs=1e3)
    assert complexity.multiply_adds(net, shape) == pytest.approx(multiply_adds, rel=tolerance)
    assert complexity.flops(net, shape) // 2 == complexity.multiply_adds(net, shape)


def test_papers_count_at_1280x720():
    assert complexity.paper_shape(4) == (1, 3, 180, 320)
    assert complexity.paper_shape(3, channels=1) == (1, 1, 240, 427)


def test_flops_are_those_of_the_padded_input():
    net = nn.Conv2d(3, 5, 3, padding=1)
    per_pixel = 2 * 3 * 3 * 3 * 5
    assert complexity.flops(net, (2, 3, 7, 10)) == per_pixel * 2 * 7 * 10
    net.window_size = 8
    assert complexity.flops(net, (2, 3, 7, 10)) == per_pixel * 2 * 8 * 16


class Attention(nn.Module):
    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)[:, None]
        return F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].transpose(1, 2).reshape(x.shape)


def test_fused_attention_counts():
    assert complexity.flops(Attention(), (1, 4, 6, 6)) == 2 * 2 * 36 * 36 * 4


class LooksAtValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)

    def forward(self, x):
        return self.conv(x) if x.mean().item() > 0.1 else x


def test_a_network_that_looks_at_values_is_counted():
    assert complexity.flops(LooksAtValues(), (1, 3, 4, 4)) == 2 * 9 * 16


def test_counting_leaves_the_network_alone():
    net = build_network({**EDSR, 'num_feat': 8, 'num_block': 1, 'upscale': 2}).train()
    x = torch.rand(1, 3, 6, 6)
    with torch.no_grad():
        before = net(x)
    complexity.flops(net, x.shape)
    with torch.no_grad():
        assert torch.equal(net(x), before)  # EDSR keeps its mean as a tensor that it replaces in forward
    assert net.training


def test_shared_parameters_count_once_and_buffers_do_not():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    net.append(net[0])
    assert complexity.parameters(net) == 12 + 6


def test_latency_is_the_median_after_two_forward_passes(monkeypatch):
    shapes, clock = [], iter([0, 90, 0, 80, 0, 3, 0, 1, 0, 2, 0, 70, 0, 2.5])
    monkeypatch.setattr(complexity.time, 'perf_counter', lambda: next(clock))

    def net(x):
        assert not torch.is_grad_enabled()
        shapes.append(tuple(x.shape))

    net.window_size = 4
    assert complexity.latency(net, (2, 3, 5, 4), repeats=5) == 2.5
    assert shapes == [(2, 3, 8, 4)] * 7


def test_throughput_counts_the_images_of_a_batch(monkeypatch):
    monkeypatch.setattr(complexity, 'latency', lambda net, shape, device, repeats: 0.5)
    assert complexity.throughput(None, (4, 3, 8, 8)) == 8


def test_peak_memory_is_what_lives_at_the_same_time():
    """Of four equal layers, two activations live at a time; a ReLU in place needs none."""
    net = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(4)), nn.ReLU(inplace=True))
    image = 4 * 4 * 16 * 16
    assert complexity.peak_memory(net, (1, 4, 16, 16)) == 4 * 4 * 4 * 9 * 4 + 3 * image  # the caller keeps its input


def test_views_and_operations_in_place_need_no_memory():
    net = nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (4, 4)), nn.ReLU(inplace=True))
    assert complexity.peak_memory(net, (1, 1, 4, 4)) == 64


def test_peak_memory_counts_weights_and_buffers_once():
    net = nn.Identity()
    net.weight = nn.Parameter(torch.zeros(100))
    net.register_buffer('same', net.weight.detach())
    net.register_buffer('table', torch.zeros(50))
    assert complexity.peak_memory(net, (1, 1, 4, 4)) == 400 + 200 + 64
