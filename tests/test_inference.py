import pytest
import torch
import torch.nn.functional as F
from basicsr.archs import build_network

import dckd_sr  # noqa: F401
from dckd_sr.errors import UserError
from dckd_sr.inference import infer


def image(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


class Record(torch.nn.Module):
    """Nearest-neighbour enlargement that remembers the sizes it saw."""

    def __init__(self, scale=1):
        super().__init__()
        self.scale, self.sizes = scale, []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[-2:]))
        return x.repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)


class Mean(torch.nn.Module):
    """Every pixel becomes its tile's mean: the worst case for seams."""

    def forward(self, x):
        return x.mean((-1, -2), keepdim=True).expand_as(x)


@pytest.mark.parametrize('scale', [1, 2, 3])
@pytest.mark.parametrize('size', [(16, 24), (17, 23), (3, 30), (1, 1)])
@pytest.mark.parametrize('window, tile', [(None, None), (8, None), (8, 12), (None, 7), (5, 10)])
def test_any_size_comes_back_whole(scale, size, window, tile):
    x = image(2, 3, *size)
    net = Record(scale)
    out = infer(net, x, scale, window_size=window, tile_size=tile)
    expected = x.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    assert out.dtype == x.dtype and torch.allclose(out, expected, atol=1e-6)
    assert all(h % (window or 1) == 0 and w % (window or 1) == 0 for h, w in net.sizes)
    if tile:
        limit = -(-tile // (window or 1)) * (window or 1)
        assert all(h <= limit and w <= limit for h, w in net.sizes)


def test_padding_mirrors_and_repeats_where_the_image_is_too_small():
    seen = []
    infer(lambda x: seen.append(x) or x, image(1, 3, 13, 6), 1, window_size=16)
    x = image(1, 3, 13, 6)
    assert torch.equal(seen[0][..., :6], F.pad(x, (0, 0, 0, 3), mode='reflect'))
    assert torch.equal(seen[0][..., 6:], F.pad(x, (0, 0, 0, 3), mode='reflect')[..., 5:6].expand(-1, -1, -1, 10))


@pytest.mark.parametrize('size', [(19, 21), (24, 17)])
def test_swinir_equals_basicsrs_own_padding(size):
    """Mirrored at the bottom and right to the next multiple, cropped after (basicsr/models/swinir_model.py:14-31)."""
    opt = {'type': 'SwinIR', 'upscale': 2, 'img_size': 16, 'window_size': 8, 'depths': [2], 'embed_dim': 12}
    net = build_network({**opt, 'num_heads': [2], 'mlp_ratio': 2, 'upsampler': 'pixelshuffle'}).eval()
    x, (height, width) = image(1, 3, *size), size
    with torch.no_grad():
        reference = net(F.pad(x, (0, -width % 8, 0, -height % 8), mode='reflect'))[..., : 2 * height, : 2 * width]
        assert torch.allclose(infer(net, x, 2, window_size=8), reference, atol=1e-6)


def test_tiles_of_a_real_network_equal_the_whole_image_away_from_their_borders():
    """A convolution sees two pixels here; what it lacks at a tile's border lies where the weight is small."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 3, 3, padding=1))
    x = image(1, 3, 50, 61)
    with torch.no_grad():
        whole, tiled = net(x), infer(net, x, 1, tile_size=24, tile_overlap=12)
        hard = infer(net, x, 1, tile_size=24, tile_overlap=0)
    assert (tiled - whole).abs().mean() < 0.25 * (hard - whole).abs().mean()
    assert (tiled - whole).abs().max() < 0.35 * (hard - whole).abs().max()


def test_tiles_blend_linearly_without_a_seam():
    """A ramp's tile means are steps; blended over the overlap they rise by equal small steps."""
    x = torch.linspace(0, 1, 40).expand(1, 1, 8, 40)
    out = infer(Mean(), x, 1, tile_size=16, tile_overlap=8)[0, 0]
    assert torch.allclose(out, out[:1])
    steps = out[0].diff()
    assert steps.min() > -1e-6 and steps.max() < 0.35 * (x[0, 0, 0, 16:32].mean() - x[0, 0, 0, :16].mean())
    # In the first overlap (pixels 8..15) the second tile's weight rises from 1/16 by 1/8 to 15/16.
    first, second = x[0, 0, 0, :16].mean(), x[0, 0, 0, 8:24].mean()
    weight = (torch.arange(8) + 0.5) / 8
    assert torch.allclose(out[0, 8:16], first + (second - first) * weight, atol=1e-6)


def test_tiles_that_cover_the_image_are_one_pass():
    net = Record(2)
    infer(net, image(1, 3, 20, 30), 2, tile_size=64)
    infer(net, image(1, 3, 20, 30), 2, window_size=8, tile_size=20, tile_overlap=0)
    assert net.sizes == [(20, 30), (24, 24), (24, 24)]


def test_window_partition_agrees_with_the_whole_images():
    """Tiles start at multiples of the window, so what a window holds is the same as without tiles."""

    def windows(x):  # every 8x8 window becomes its mean
        return F.avg_pool2d(x, 8).repeat_interleave(8, -1).repeat_interleave(8, -2)

    x = image(1, 3, 45, 70)
    whole, tiled = infer(windows, x, 1, 8), infer(windows, x, 1, 8, tile_size=20, tile_overlap=5)
    assert torch.allclose(whole, tiled, atol=1e-6)


def test_low_precision_outputs_are_blended_in_float32():
    out = infer(lambda x: x.bfloat16(), torch.full((1, 1, 30, 30), 0.7), 1, tile_size=10, tile_overlap=9)
    assert out.dtype == torch.bfloat16 and (out == torch.tensor(0.7).bfloat16()).all()


def test_default_overlap_fits_any_tile():
    x = image(1, 3, 20, 40)
    for tile in (1, 4, 8, 12, 16, 200):
        assert torch.allclose(infer(Record(1), x, 1, window_size=8, tile_size=tile), x, atol=1e-6)
        assert torch.allclose(infer(Record(1), x, 1, tile_size=tile), x, atol=1e-6)


def test_mistakes_are_said():
    with pytest.raises(UserError, match='turns 8x6 into 16x12, but scale 3 means 24x18'):
        infer(Record(2), image(1, 3, 6, 8), 3)
    with pytest.raises(UserError, match='tile_overlap 10 must be smaller than tile_size 10'):
        infer(Record(1), image(1, 3, 6, 8), 1, tile_size=10, tile_overlap=10)
