import pytest
import torch
import torch.nn.functional as F
from basicsr.archs import build_network

import dckd_sr  # noqa: F401
from dckd_sr.errors import UserError
from dckd_sr.inference import infer, padding_of


def image(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


SMALL = {
    'Restormer': {'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'heads': [1, 2, 2, 4]},
    'NAFNet': {'width': 4, 'enc_blk_nums': [1, 1], 'dec_blk_nums': [1, 1]},
    'NAFNetLocal': {'width': 4, 'enc_blk_nums': [1, 1], 'dec_blk_nums': [1, 1], 'train_size': [1, 3, 32, 32]},
    'SwinIR': {'img_size': 8, 'window_size': 4, 'depths': [2], 'embed_dim': 8, 'num_heads': [2], 'upscale': 1},
}


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


@torch.no_grad()
def reach(net, scale, size=64):
    """How far from an output pixel, in LQ pixels, a change of the input still changes it."""
    x = image(1, 3, size, size).double()
    changed = x.clone()
    changed[..., : size // 2, :] += 0.5
    rows = (net(changed) - net(x)).abs().amax((0, 1, 3)).nonzero().max().item()
    return rows // scale - size // 2 + 1


@torch.no_grad()
def test_tiles_are_exact_up_to_an_overlap_of_four_times_the_reach():
    """EDSR of n blocks at x4 reaches 2n + 4 pixels, as `infer` says."""
    net = build_network({'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 3, 'upscale': 4})
    net = net.double().eval()
    net.mean = net.mean.double()
    for parameter in net.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    assert reach(net, 4) == 10
    x = image(1, 3, 75, 113).double()
    whole = net(x)
    spread = whole.max() - whole.min()
    exact = infer(net, x, 4, tile_size=60, tile_overlap=40)
    assert (exact - whole).abs().max() < 1e-6 * spread  # weights are float32
    short = infer(net, x, 4, tile_size=60, tile_overlap=20)
    hard = infer(net, x, 4, tile_size=60, tile_overlap=0)
    assert 1e-6 * spread < (short - whole).abs().max() < 0.1 * (hard - whole).abs().max()


def test_tiles_blend_linearly_without_a_seam():
    """A ramp's tile means are steps; blended over the middle half of the overlap they rise by equal small steps."""
    x = torch.linspace(0, 1, 40).expand(1, 1, 8, 40)
    out = infer(Mean(), x, 1, tile_size=16, tile_overlap=8)[0, 0]
    assert torch.allclose(out, out[:1])
    # In the first overlap (pixels 8..15) the second tile's weight is 0 up to 9, 1 from 14, and rises by 1/4 in between.
    first, second = x[0, 0, 0, :16].mean(), x[0, 0, 0, 8:24].mean()
    weight = torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1])
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


@pytest.mark.parametrize('kind', ['Restormer', 'NAFNet', 'NAFNetLocal', 'SwinIR'])
@torch.no_grad()
def test_tiles_lie_on_the_networks_grid(kind):
    """Every tile starts where the whole image's halvings or windows do; only the last may end before a multiple."""
    net = build_network({'type': kind, **SMALL[kind]}).eval()
    grid, seen = {'Restormer': 8, 'SwinIR': 4}.get(kind, 4), []
    place = torch.arange(53 * 61.0).view(1, 1, 53, 61).expand(1, 3, -1, -1) / 1e4
    net.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    out = infer(net, place, 1, tile_size=21, tile_overlap=5)
    assert out.shape == place.shape and out.isfinite().all() and len(seen) > 9
    for tile in seen:
        y, x = divmod(round(tile[0, 0, 0, 0].item() * 1e4), 61)
        assert y % grid == 0 and x % grid == 0
        if kind in ('Restormer', 'SwinIR'):
            assert tile.shape[2] % grid == 0 and tile.shape[3] % grid == 0
        else:  # pads by itself, at the border of the image only
            assert all(side == 24 or start + side == end for start, side, end in zip((y, x), tile.shape[2:], (53, 61)))


@pytest.mark.parametrize('kind', ['Restormer', 'NAFNet', 'NAFNetLocal'])
@torch.no_grad()
def test_no_seam_where_statistics_are_those_of_tiles(kind):
    """From any row or column to the next, what tiles change is less than half of what the image itself does there,
    and of the step at a border without an overlap. With random weights, which weigh statistics more than trained ones.
    """
    net = build_network({'type': kind, **SMALL[kind]}).eval()
    for parameter in net.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    x = F.interpolate(image(1, 3, 13, 15), (101, 117), mode='bicubic').clamp(0, 1)
    whole = net(x)

    def steps(values, dim):  # (steps,), means over all else
        return values.diff(dim=dim).abs().transpose(0, dim).flatten(1).mean(1)

    smooth, hard = (infer(net, x, 1, tile_size=64, tile_overlap=overlap) - whole for overlap in (32, 0))
    for dim in (2, 3):
        worst = steps(smooth, dim).max()
        assert worst < 0.5 * steps(whole, dim).median() and worst < 0.5 * steps(hard, dim).max()


@torch.no_grad()
def test_swinir_x4_tiled_within_a_hundredth_of_a_decibel():
    """On an odd size. Formally its windows reach far; what they add there is small."""
    net = build_network(
        {'type': 'SwinIR', 'upscale': 4, 'img_size': 32, 'window_size': 8, 'depths': [4, 4], 'embed_dim': 12}
        | {'num_heads': [2, 2], 'mlp_ratio': 2, 'upsampler': 'pixelshuffle'}
    ).eval()
    for parameter in net.parameters():
        if parameter.dim() > 1:  # a trained network's attention is not the fresh one's, which is flat
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    x = F.interpolate(image(1, 3, 17, 23), (67, 91), mode='bicubic').clamp(0, 1)
    whole, tiled = infer(net, x, 4), infer(net, x, 4, tile_size=48, tile_overlap=16)
    whole, tiled = ((out - whole.mean()) / whole.std() * 0.05 for out in (whole, tiled))  # the scale of a residual
    gt = 0.05 * torch.randn_like(whole)
    psnr = [-10 * ((out - gt) ** 2).mean().log10() for out in (whole, tiled)]
    assert not torch.equal(whole, tiled) and abs(psnr[0] - psnr[1]) < 0.01


def test_padding_is_known_from_the_network():
    swinir = build_network({'type': 'SwinIR', **SMALL['SwinIR']})
    assert padding_of(swinir) == 4 and padding_of(torch.nn.DataParallel(swinir)) == 4
    assert padding_of(build_network({'type': 'Restormer', **SMALL['Restormer']})) == 8
    assert padding_of(build_network({'type': 'NAFNet', **SMALL['NAFNet']})) == 1
    assert padding_of(torch.nn.Conv2d(3, 3, 1)) == padding_of(lambda x: x) == 1
    net = Record()
    net.window_size = 6, 4
    assert padding_of(net) == 12
    infer(net, image(1, 3, 5, 7), 1)
    infer(net, image(1, 3, 5, 7), 1, window_size=8)  # for another network of the run, which needs less
    assert net.sizes == [(12, 12), (24, 24)]


@pytest.mark.parametrize('tile', [None, 8])
def test_self_ensemble_is_the_mean_over_8_orientations(tile):
    """Rotations and their mirror images, in one loop each."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3, padding=1), torch.nn.PixelShuffle(2))
    x = image(2, 3, 9, 14)
    with torch.no_grad():
        outs = []
        for turns in range(4):
            turned = torch.rot90(x, turns, (2, 3))
            outs.append(torch.rot90(infer(net, turned, 2, tile_size=tile), -turns, (2, 3)))
            outs.append(torch.rot90(infer(net, turned.flip(3), 2, tile_size=tile).flip(3), -turns, (2, 3)))
        out = infer(net, x, 2, tile_size=tile, self_ensemble=True)
    assert torch.allclose(out, torch.stack(outs).mean(0), atol=1e-6)
    assert (out - outs[0]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize('size', [(40, 70), (9, 70), (41, 33)])
def test_tiles_in_batches_are_tiles_one_by_one(size):
    """Also of several images, and where the last tiles are smaller: NAFNet halves at multiples of 4."""
    torch.manual_seed(1)
    net = build_network({'type': 'NAFNet', **SMALL['NAFNet']}).eval()
    shapes = []

    def run(network, x):
        assert network is net
        shapes.append(tuple(x.shape))
        return net(x)

    x = image(2, 3, *size)
    apart = infer(net, x, 1, tile_size=16, tile_overlap=4, run=run)
    count = len(shapes)
    assert all(shape[0] == 2 and max(shape[2:]) <= 16 for shape in shapes)
    del shapes[:]
    together = infer(net, x, 1, tile_size=16, tile_overlap=4, tile_batch_size=5, run=run)
    assert torch.allclose(together, apart, atol=1e-6)
    assert sum(shape[0] for shape in shapes) == 2 * count and max(shape[0] for shape in shapes) == min(10, 2 * count)
    assert len(shapes) < count
    turned = infer(net, x, 1, tile_size=16, tile_overlap=4, tile_batch_size=5, self_ensemble=True)
    assert torch.allclose(turned, infer(net, x, 1, tile_size=16, tile_overlap=4, self_ensemble=True), atol=1e-6)


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


class Pooled(Record):
    """Fails on sides below 9, as networks with strided pooling do, unless it ``fails`` on all."""

    fails = False

    def forward(self, x):
        if self.fails:
            raise RuntimeError('at every size')
        F.max_pool2d(x, 9)
        return super().forward(x)


@pytest.mark.parametrize('sizes', [{}, {'tile_size': 4, 'tile_overlap': 0}, {'self_ensemble': True}])
def test_an_image_below_the_smallest_side_is_padded_where_nobody_has_measured_it(sizes):
    net, lq = Pooled(2), image(1, 3, 6, 20)
    torch.testing.assert_close(infer(net, lq, 2, **sizes), Record(2)(lq))
    assert net.smallest_side == 9


def test_what_a_network_raises_at_every_size_is_passed_on():
    net = Pooled(2)
    net.fails = True
    with pytest.raises(RuntimeError, match='at every size'):
        infer(net, image(1, 3, 20, 20), 2)
