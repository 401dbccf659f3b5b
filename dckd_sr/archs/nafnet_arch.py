"""NAFNet, restoration without activation functions, and the `Baseline` that it came from (Chen et al., Simple Baselines
for Image Restoration, ECCV 2022).

`NAFNetLocal` and `BaselineLocal` are the same networks tested with local statistics (Chu et al., Improving Image
Restoration by Revisiting Global Information Aggregation, ECCV 2022). Parameter names and shapes are those of
megvii-research/NAFNet, so that its public checkpoints fit. What differs: normalisation uses PyTorch's fused kernel; box
means are separable running sums.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn
from torch.nn import functional as F

from dckd_sr.errors import UserError


class Norm(nn.LayerNorm):
    """Normalisation of each pixel over its channels, for (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LocalMean(nn.Module):
    """Mean over a window around each pixel; windows that would leave the image are moved inside.

    (B, C, H, W) -> (B, C, H, W), or (B, C, 1, 1) where one window of this size (height, width) holds the whole image.
    """

    def __init__(self, window):
        super().__init__()
        self.window = window

    def extra_repr(self):
        return f'window={self.window}'

    def forward(self, x):
        if all(side <= window for side, window in zip(x.shape[2:], self.window)):
            return x.mean((2, 3), keepdim=True)
        # float32: running sums are much larger than the means.
        means = _running_mean(_running_mean(x.float(), self.window[1], 3), self.window[0], 2)
        height, width = (full - part for full, part in zip(x.shape[2:], means.shape[2:]))
        pad = (width // 2, width - width // 2, height // 2, height - height // 2)
        return F.pad(means, pad, mode='replicate').to(x.dtype)


def _running_mean(x, window, axis):
    """Means over ``window`` neighbours (all, if there are fewer) along an axis, which gets window - 1 shorter."""
    size = x.shape[axis]
    window = min(window, size)
    sums = x.cumsum(axis)
    first = sums.narrow(axis, window - 1, 1)
    others = sums.narrow(axis, window, size - window) - sums.narrow(axis, 0, size - window)
    return torch.cat([first, others], axis) / window


class Block(nn.Module):
    """Depthwise convolution with channel attention, then a pointwise layer; products of halves in place of activations.

    Args:
        channels: of input and output.
        pool: module that gives the statistics of the channel attention.
    """

    def __init__(self, channels, pool):
        super().__init__()
        self.norm1 = Norm(channels)
        self.conv1 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.sca = nn.Sequential(pool, nn.Conv2d(channels, channels, 1))
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.norm2 = Norm(channels)
        self.conv4 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        h = _gate(self.conv2(self.conv1(self.norm1(x))))
        x = x + self.conv3(h * self.sca(h)) * self.beta
        return x + self.conv5(_gate(self.conv4(self.norm2(x)))) * self.gamma


class BaselineBlock(nn.Module):
    """The block before its activations were taken out: GELU, and squeeze and excitation as channel attention.

    Args:
        channels: of input and output.
        pool: module that gives the statistics of the channel attention.
        dw_expand, ffn_expand: channels inside the two halves, as multiples of ``channels``.
    """

    def __init__(self, channels, pool, dw_expand=1, ffn_expand=2):
        super().__init__()
        wide, deep = channels * dw_expand, channels * ffn_expand
        self.norm1 = Norm(channels)
        self.conv1 = nn.Conv2d(channels, wide, 1)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.se = nn.Sequential(
            pool, nn.Conv2d(wide, wide // 2, 1), nn.ReLU(), nn.Conv2d(wide // 2, wide, 1), nn.Sigmoid()
        )
        self.conv3 = nn.Conv2d(wide, channels, 1)
        self.norm2 = Norm(channels)
        self.conv4 = nn.Conv2d(channels, deep, 1)
        self.conv5 = nn.Conv2d(deep, channels, 1)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        h = F.gelu(self.conv2(self.conv1(self.norm1(x))))
        x = x + self.conv3(h * self.se(h)) * self.beta
        return x + self.conv5(F.gelu(self.conv4(self.norm2(x)))) * self.gamma


def _gate(x):
    a, b = x.chunk(2, 1)
    return a * b


@ARCH_REGISTRY.register()
class NAFNet(nn.Module):
    """U-shaped network of `Block`s that adds its output to the image.

    Args:
        img_channel: channels of the image.
        width: channels at full size; they double with each halving.
        middle_blk_num: blocks at the smallest size.
        enc_blk_nums, dec_blk_nums: blocks per size on the way down, from full size, and on the way up, to full size.

    Raises:
        UserError: the two lists differ in length.
    """

    def __init__(self, img_channel=3, width=16, middle_blk_num=1, enc_blk_nums=(), dec_blk_nums=()):
        super().__init__()
        if len(enc_blk_nums) != len(dec_blk_nums):
            raise UserError(
                f'{type(self).__name__}: enc_blk_nums {list(enc_blk_nums)} and dec_blk_nums {list(dec_blk_nums)} must '
                'be equally long'
            )
        levels = len(enc_blk_nums)
        self.padder_size = 2**levels  # official name; tiles start at multiples of it

        def blocks(count, level):
            return nn.Sequential(*(self._block(width * 2**level, level) for _ in range(count)))

        self.intro = nn.Conv2d(img_channel, width, 3, padding=1)
        self.encoders = nn.ModuleList(blocks(count, level) for level, count in enumerate(enc_blk_nums))
        self.downs = nn.ModuleList(
            nn.Conv2d(width * 2**level, width * 2 ** (level + 1), 2, stride=2) for level in range(levels)
        )
        self.middle_blks = blocks(middle_blk_num, levels)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width * 2**level, width * 2 ** (level + 1), 1, bias=False), nn.PixelShuffle(2))
            for level in range(levels, 0, -1)
        )
        self.decoders = nn.ModuleList(blocks(count, levels - 1 - i) for i, count in enumerate(dec_blk_nums))
        self.ending = nn.Conv2d(width, img_channel, 3, padding=1)

    def _block(self, channels, level):
        return Block(channels, self._pool(level))

    def _pool(self, level):
        """What gives the channel attention its statistics where sides are halved ``level`` times."""
        return nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        """(B, img_channel, H, W) -> the same, any H and W: zeros fill them up to a multiple of ``padder_size``."""
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % self.padder_size, 0, -height % self.padder_size))
        h, skips = self.intro(x), []
        for encoder, down in zip(self.encoders, self.downs):
            h = encoder(h)
            skips.append(h)
            h = down(h)
        h = self.middle_blks(h)
        for up, decoder, skip in zip(self.ups, self.decoders, reversed(skips)):
            h = decoder(up(h) + skip)
        return (self.ending(h) + x)[..., :height, :width]


@ARCH_REGISTRY.register()
class NAFNetLocal(NAFNet):
    """NAFNet whose channel attention sees a window around each pixel, as in training, where crops were that small.

    Windows are 1.5 times the training crop, so training itself is that of `NAFNet`.

    Args:
        img_channel, width, middle_blk_num, enc_blk_nums, dec_blk_nums: see `NAFNet`.
        train_size: shape of the training batch; its last two entries, height and width, count.
    """

    def __init__(
        self,
        img_channel=3,
        width=16,
        middle_blk_num=1,
        enc_blk_nums=(),
        dec_blk_nums=(),
        train_size=(1, 3, 256, 256),
    ):
        self._crop = tuple(train_size)[-2:]
        super().__init__(img_channel, width, middle_blk_num, enc_blk_nums, dec_blk_nums)

    def _pool(self, level):
        return _local_mean(self._crop, self.padder_size, level)


@ARCH_REGISTRY.register()
class Baseline(NAFNet):
    """NAFNet with `BaselineBlock`s.

    Args:
        img_channel, width, middle_blk_num, enc_blk_nums, dec_blk_nums: see `NAFNet`.
        dw_expand, ffn_expand: see `BaselineBlock`.
    """

    def __init__(
        self,
        img_channel=3,
        width=16,
        middle_blk_num=1,
        enc_blk_nums=(),
        dec_blk_nums=(),
        dw_expand=1,
        ffn_expand=2,
    ):
        self._expand = dw_expand, ffn_expand
        super().__init__(img_channel, width, middle_blk_num, enc_blk_nums, dec_blk_nums)

    def _block(self, channels, level):
        return BaselineBlock(channels, self._pool(level), *self._expand)


@ARCH_REGISTRY.register()
class BaselineLocal(Baseline):
    """`Baseline` whose channel attention sees a window around each pixel; see `NAFNetLocal`.

    Args:
        img_channel, width, middle_blk_num, enc_blk_nums, dec_blk_nums, dw_expand, ffn_expand: see `Baseline`.
        train_size: see `NAFNetLocal`.
    """

    def __init__(
        self,
        img_channel=3,
        width=16,
        middle_blk_num=1,
        enc_blk_nums=(),
        dec_blk_nums=(),
        dw_expand=1,
        ffn_expand=2,
        train_size=(1, 3, 256, 256),
    ):
        self._crop = tuple(train_size)[-2:]
        super().__init__(img_channel, width, middle_blk_num, enc_blk_nums, dec_blk_nums, dw_expand, ffn_expand)

    def _pool(self, level):
        return _local_mean(self._crop, self.padder_size, level)


def _local_mean(crop, multiple, level):
    # The side at this level, padded as in forward, times the ratio of window and crop, rounded as officially.
    sides = (-(-side // multiple) * multiple // 2**level for side in crop)
    return LocalMean(tuple(side * int(1.5 * whole) // whole for side, whole in zip(sides, crop)))
