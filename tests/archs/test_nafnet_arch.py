"""NAFNet against the authors' numbers, the public checkpoints' layout, and slow local pooling."""

import golden_data
import pytest
import torch
from basicsr.archs import build_network
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from dckd_sr.archs.nafnet_arch import Baseline, BaselineLocal, LocalMean, NAFNet, NAFNetLocal
from dckd_sr.errors import UserError

SMALL = {'width': 4, 'middle_blk_num': 1, 'enc_blk_nums': [1, 1], 'dec_blk_nums': [1, 1]}


def small(cls=NAFNet, **changes):
    """A network in which nothing is switched off: beta and gamma start at 0."""
    net = cls(**{**SMALL, **changes}).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    return net


@pytest.mark.parametrize('kind', ['NAFNet', 'NAFNetLocal'])
@torch.no_grad()
def test_official_outputs(kind):
    """NAFNetLocal's windows hold these images whole."""
    data, config = golden_data.arrays('nafnet_small')
    net = golden_data.fill.fill_(build_network({'type': kind, **config})).eval()
    for name, size in (('out', (48, 40)), ('out_odd', (45, 37))):
        out = net(golden_data.fill.image((1, 3, *size), 3))
        torch.testing.assert_close(out, torch.from_numpy(data[name]), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize('cls', [NAFNet, NAFNetLocal])
def test_layout_of_the_public_checkpoints(cls):
    for variant in golden_data.manifest('nafnet')['variants'].values():
        with torch.device('meta'):
            net = cls(**variant['config'])
        assert {key: list(value.shape) for key, value in net.state_dict().items()} == variant['keys']


def slow_mean(x, window):
    """The mean over a window of at most these sides, as near to each pixel as the image allows, in float64."""
    (height, width), result = x.shape[2:], torch.empty_like(x, dtype=torch.float64)
    window_h, window_w = min(window[0], height), min(window[1], width)
    for y in range(height):
        top = min(max(y - (height - (height - window_h + 1)) // 2, 0), height - window_h)
        for z in range(width):
            left = min(max(z - (width - (width - window_w + 1)) // 2, 0), width - window_w)
            box = x[:, :, top : top + window_h, left : left + window_w].double()
            result[:, :, y, z] = box.mean((2, 3))
    return result


@pytest.mark.parametrize(
    'size, window', [((9, 12), (4, 5)), ((9, 12), (5, 4)), ((9, 12), (20, 5)), ((9, 12), (4, 12)), ((7, 6), (6, 6))]
)
def test_local_means(size, window):
    x = torch.rand(2, 3, *size) + 100  # large sums
    torch.testing.assert_close(LocalMean(window)(x), slow_mean(x, window).float(), rtol=1e-6, atol=0)


def test_local_means_of_what_fits_are_global():
    x = torch.rand(1, 2, 6, 5)
    torch.testing.assert_close(LocalMean((6, 5))(x), x.mean((2, 3), keepdim=True))
    assert LocalMean((6, 4))(x).shape == x.shape
    # Sums of half precision would end at 2048.
    assert (LocalMean((1, 9))(torch.ones(1, 1, 1, 2100).half()) == 1).all()


def test_windows_are_one_and_a_half_crops():
    """Of every level; 256 as officially, a crop that the network pads, and one of other sides."""
    for train_size, expected in (
        ((1, 3, 256, 256), [(384, 384), (192, 192), (96, 96)]),
        ((1, 3, 50, 30), [(78, 48), (39, 24), (19, 12)]),  # 52x32 inside, ratios 75/50 and 45/30
    ):
        net = NAFNetLocal(**SMALL, train_size=train_size)
        parts = [net.encoders[0], net.encoders[1], net.middle_blks, net.decoders[0], net.decoders[1]]
        windows = [part[0].sca[0].window for part in parts]
        assert windows == [*expected, *expected[1::-1]]


@torch.no_grad()
def test_local_network_equals_global_where_windows_hold_the_image():
    net, local = small(), small(NAFNetLocal, train_size=(1, 3, 32, 24))
    local.load_state_dict(net.state_dict())
    for size in ((32, 24), (48, 36), (45, 35)):
        x = torch.rand(1, 3, *size)
        torch.testing.assert_close(local(x), net(x))
    x = torch.rand(1, 3, 49, 36)
    assert (local(x) - net(x)).abs().max() > 1e-3
    for module in local.modules():  # the same network with the slow mean
        if isinstance(module, LocalMean):
            module.forward = lambda x, window=module.window: slow_mean(x, window).float()
    slow = local(x)
    for module in local.modules():
        module.__dict__.pop('forward', None)
    torch.testing.assert_close(local(x), slow)


@torch.no_grad()
def test_official_windows_differ_at_416x400():
    net, local = small(), small(NAFNetLocal)
    local.load_state_dict(net.state_dict())
    x = torch.rand(1, 3, 416, 400)
    assert (local(x) - net(x)).abs().max() > 1e-4


@pytest.mark.parametrize('cls', [NAFNet, NAFNetLocal, Baseline, BaselineLocal])
@torch.no_grad()
def test_images_of_any_size_are_filled_with_zeros(cls):
    net = small(cls)
    for height, width in ((1, 1), (3, 9), (8, 4)):
        x = torch.rand(2, 3, height, width)
        whole = net(F.pad(x, (0, -width % 4, 0, -height % 4)))
        torch.testing.assert_close(net(x), whole[..., :height, :width])


@pytest.mark.parametrize('cls', [NAFNet, Baseline])
def test_trains(cls):
    """Blocks start as identities, as officially, and every parameter has a gradient once they are not."""
    net, trained = cls(**SMALL), small(cls).train()
    x = torch.rand(1, 4, 10, 9)
    assert all(torch.equal(block(x), x) for block in net.encoders[0])
    trained(x[:, :3]).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained.parameters())


@pytest.mark.parametrize('cls', [NAFNet, Baseline, BaselineLocal])
def test_mistakes(cls):
    message = rf'{cls.__name__}: enc_blk_nums \[1\] and dec_blk_nums \[1, 1\] must be equally long'
    with pytest.raises(UserError, match=message):
        cls(enc_blk_nums=[1], dec_blk_nums=[1, 1])


def test_waits_for_no_device():
    """Fake tensors have no values: reading one on the host would fail."""
    with FakeTensorMode():
        for cls in (NAFNet, NAFNetLocal, Baseline, BaselineLocal):
            assert cls(**SMALL)(torch.empty(1, 3, 410, 390)).shape == (1, 3, 410, 390)


def slow_baseline_block(x, w):
    """One block of Baseline in float64, pixel by pixel where it is not a convolution; w: its state dict."""

    def norm(x, name):
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        scale, shift = (w[f'{name}.{key}'][None, :, None, None] for key in ('weight', 'bias'))
        return (x - mean) / (var + 1e-6).sqrt() * scale + shift

    def conv(x, name, **options):
        return torch.nn.functional.conv2d(x, w[f'{name}.weight'], w[f'{name}.bias'], **options)

    def gelu(x):
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    h = conv(norm(x, 'norm1'), 'conv1')
    h = gelu(conv(h, 'conv2', padding=1, groups=h.shape[1]))
    attention = conv(conv(h.mean((2, 3), keepdim=True), 'se.1').clamp(min=0), 'se.3').sigmoid()
    x = x + w['beta'] * conv(h * attention, 'conv3')
    return x + w['gamma'] * conv(gelu(conv(norm(x, 'norm2'), 'conv4')), 'conv5')


@pytest.mark.parametrize('cls', [Baseline, BaselineLocal])
@torch.no_grad()
def test_a_block_of_baseline_is_its_formula(cls):
    net = small(cls, dw_expand=2, ffn_expand=3).double()
    block = net.middle_blks[0]
    x = torch.rand(2, block.conv5.out_channels, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(block(x), slow_baseline_block(x, block.state_dict()), rtol=0, atol=1e-12)


@torch.no_grad()
def test_local_baseline_sees_a_window_around_each_pixel():
    """As its own blocks say with the slow mean; with windows that hold the image, it is Baseline."""
    net, local = small(Baseline), small(BaselineLocal, train_size=(1, 3, 32, 24))
    local.load_state_dict(net.state_dict())
    x = torch.rand(1, 3, 48, 36)
    torch.testing.assert_close(local(x), net(x))
    x = torch.rand(1, 3, 60, 36)
    assert (local(x) - net(x)).abs().max() > 1e-4
    expected = local(x)
    for module in local.modules():
        if isinstance(module, LocalMean):
            module.forward = lambda x, window=module.window: slow_mean(x, window).float()
    torch.testing.assert_close(expected, local(x))


def baseline_block(name, channels, wide, deep):
    """Keys and shapes of a block, from megvii-research/NAFNet, basicsr/models/archs/Baseline_arch.py."""
    pointwise = {
        'conv1': (wide, channels),
        'conv3': (channels, wide),
        'conv4': (deep, channels),
        'conv5': (channels, deep),
        'se.1': (wide // 2, wide),
        'se.3': (wide, wide // 2),
    }
    keys = {f'{key}.weight': (*sides, 1, 1) for key, sides in pointwise.items()}
    keys.update({f'{key}.bias': sides[:1] for key, sides in pointwise.items()})
    keys.update({'conv2.weight': (wide, 1, 3, 3), 'conv2.bias': (wide,)})
    keys.update({f'{norm}.{part}': (channels,) for norm in ('norm1', 'norm2') for part in ('weight', 'bias')})
    keys.update(dict.fromkeys(('beta', 'gamma'), (1, channels, 1, 1)))
    return {f'{name}.{key}': shape for key, shape in keys.items()}


@pytest.mark.parametrize(
    'expand, at_full_size, at_half_size',
    [({}, (4, 4, 8), (8, 8, 16)), ({'dw_expand': 3, 'ffn_expand': 1}, (4, 12, 4), (8, 24, 8))],
)
@pytest.mark.parametrize('cls', [Baseline, BaselineLocal])
def test_layout_of_baseline(cls, expand, at_full_size, at_half_size):
    net = cls(width=4, enc_blk_nums=[1], dec_blk_nums=[2], **expand)
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == {
        'intro.weight': (4, 3, 3, 3),
        'intro.bias': (4,),
        **baseline_block('encoders.0.0', *at_full_size),
        'downs.0.weight': (8, 4, 2, 2),
        'downs.0.bias': (8,),
        **baseline_block('middle_blks.0', *at_half_size),
        'ups.0.0.weight': (16, 8, 1, 1),
        **baseline_block('decoders.0.0', *at_full_size),
        **baseline_block('decoders.0.1', *at_full_size),
        'ending.weight': (3, 4, 3, 3),
        'ending.bias': (3,),
    }


def test_local_baseline_has_the_windows_of_local_nafnet():
    windows = [
        [module.window for module in small(cls).modules() if isinstance(module, LocalMean)]
        for cls in (NAFNetLocal, BaselineLocal)
    ]
    assert windows[0] == windows[1] and windows[0]
