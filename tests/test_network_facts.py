"""Channels, scale and smallest side of networks whose first convolution and options do not tell them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dckd_sr import network_facts
from dckd_sr.errors import UserError
from dckd_sr.inference import infer


class Net(nn.Module):
    """Enlarges by 2: a convolution of the image, repeated as BSRN and LKDN do, and PixelShuffle."""

    def __init__(self, channels=3, repeats=1):
        super().__init__()
        torch.manual_seed(0)
        self.repeats = repeats
        self.conv = nn.Conv2d(channels * repeats, channels * 4, 3, 1, 1)

    def forward(self, x):
        return F.pixel_shuffle(self.conv(torch.cat([x] * self.repeats, 1)), 2)


class Pooled(Net):
    """With the attention of RFDN: a convolution by 2, max pooling of 7 by 3, back to the image's size."""

    def forward(self, x):
        small = F.max_pool2d(x[..., ::2, ::2], 7, 3)
        return super().forward(x * F.interpolate(small, x.shape[2:]))


class Adaptive(Net):
    def forward(self, x):
        small = F.adaptive_max_pool2d(x, (x.shape[2] // 8, x.shape[3] // 8))
        return super().forward(x * F.interpolate(small, x.shape[2:]))


class Windows(Net):
    window_size = 8

    def forward(self, x):
        if x.shape[2] % 8 or x.shape[3] % 8 or x.shape[2] < 24:
            raise ValueError('windows')
        return super().forward(x)


@pytest.mark.parametrize(
    'net, grid, expected',
    [
        (Net(), 1, (3, 2, 1)),
        (Net(repeats=4), 1, (3, 2, 1)),
        (Net(1), 1, (1, 2, 1)),
        (Net(1, 3), 1, (1, 2, 1)),  # its first convolution reads 3
        (Pooled(), 1, (3, 2, 13)),
        (Adaptive(1), 1, (1, 2, 8)),
        (Windows(), 8, (3, 2, 24)),
        (nn.Upsample(scale_factor=3), 1, (3, 3, 1)),
        (nn.Identity(), 1, (3, 1, 1)),
    ],
)
def test_measured(net, grid, expected):
    assert network_facts.measure(net.eval(), grid) == expected


def test_what_restores_nothing():
    for net, message in (
        (Net(6), 'expected input.* to have 6 channels'),
        (nn.Conv2d(3, 1, 1), 'no whole multiple'),
        (nn.MaxPool2d(2), 'no whole multiple'),
        (nn.Flatten(), 'no whole multiple'),
    ):
        with pytest.raises(UserError, match=message):
            network_facts.measure(net)


def test_a_known_smallest_side_is_not_undercut():
    sides = []

    class Watched(Net):
        def forward(self, x):
            sides.append(x.shape[2])
            return super().forward(x)

    assert network_facts.measure(Watched(), smallest=20) == (3, 2, 20) and min(sides) == 20
    assert network_facts.measure(Watched(), fixed=(30, 50)) == (3, 2, 1)


def test_broken_weights_have_a_size_all_the_same():
    net = Net()
    nn.init.constant_(net.conv.weight, float('nan'))
    assert network_facts.measure(net) == (3, 2, 1)


@pytest.mark.parametrize('size', [(1, 1), (4, 40), (12, 13), (13, 13), (20, 30)])
@pytest.mark.parametrize('tile', [None, 8, 16])
def test_small_images_are_padded_and_cropped(size, tile):
    net = Pooled().eval()
    net.smallest_side = 13
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = infer(net, x, 2, tile_size=tile)
        assert out.shape == (1, 3, 2 * size[0], 2 * size[1])
        if min(size) >= 13 and tile is None:
            assert torch.equal(out, net(x))
        elif min(size) < 13:
            with pytest.raises(RuntimeError):
                net(x)
