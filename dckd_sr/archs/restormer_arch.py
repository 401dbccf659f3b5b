"""Restormer: a transformer with attention over channels (Zamir et al., Restormer, CVPR 2022).

Parameter names and shapes are those of swz30/Restormer, so that its public checkpoints fit. What differs: images of any
size are accepted; normalisation uses PyTorch's fused kernel; nothing but PyTorch is needed.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn
from torch.nn import functional as F

from dckd_sr.errors import UserError
from dckd_sr.ops.padding import pad_to_multiple

_EPS = 1e-5  # of the normalisations
NORMS = ('WithBias', 'BiasFree')


class WithBias(nn.LayerNorm):
    """Normalisation of each pixel over its channels, for (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__(channels, eps=_EPS)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class BiasFree(nn.Module):
    """Division of each pixel by the standard deviation of its channels; their mean stays."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        variance = (x - x.mean(1, keepdim=True)).square().mean(1, keepdim=True)
        return x * torch.rsqrt(variance + _EPS) * self.weight[:, None, None]


class Norm(nn.Module):
    """One of the two normalisations, under the name that checkpoints give it."""

    def __init__(self, channels, kind):
        super().__init__()
        self.body = WithBias(channels) if kind == 'WithBias' else BiasFree(channels)

    def forward(self, x):
        return self.body(x)


class Attention(nn.Module):
    """Attention of channels to channels by their cosine over all positions: linear in the number of pixels."""

    def __init__(self, channels, num_heads, bias):
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=bias)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=bias)

    def forward(self, x):
        # (B, 3, heads, channels per head, HW) -> three of (B, heads, channels per head, HW)
        q, k, v = self.qkv_dwconv(self.qkv(x)).flatten(2).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return self.project_out((weights.softmax(-1) @ v).reshape(x.shape))


class FeedForward(nn.Module):
    """Two pointwise layers around a gated depthwise convolution."""

    def __init__(self, channels, expansion, bias):
        super().__init__()
        hidden = int(channels * expansion)
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=bias)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=bias)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=bias)

    def forward(self, x):
        a, b = self.dwconv(self.project_in(x)).chunk(2, 1)
        return self.project_out(F.gelu(a) * b)


class Block(nn.Module):
    """Normalised attention and feed-forward layer, each added to its input."""

    def __init__(self, channels, num_heads, expansion, bias, norm):
        super().__init__()
        self.norm1 = Norm(channels, norm)
        self.attn = Attention(channels, num_heads, bias)
        self.norm2 = Norm(channels, norm)
        self.ffn = FeedForward(channels, expansion, bias)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Embedding(nn.Module):
    """The first convolution, under the name that checkpoints give it."""

    def __init__(self, channels_in, channels):
        super().__init__()
        self.proj = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)

    def forward(self, x):
        return self.proj(x)


class Resize(nn.Module):
    """(B, C, H, W) -> (B, 2C, H/2, W/2), or (B, C/2, 2H, 2W) with ``up``: a convolution and a pixel (un)shuffle."""

    def __init__(self, channels, up):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels * 2 if up else channels // 2, 3, padding=1, bias=False),
            nn.PixelShuffle(2) if up else nn.PixelUnshuffle(2),
        )

    def forward(self, x):
        return self.body(x)


@ARCH_REGISTRY.register()
class Restormer(nn.Module):
    """U-shaped network of four sizes that adds its output to the image.

    Args:
        inp_channels, out_channels: of the images.
        dim: channels at full size; they double with each halving. The way up keeps 2 * dim at full size.
        num_blocks: blocks per size, four entries from full size; the last one counts for the smallest size.
        num_refinement_blocks: blocks at full size at the end.
        heads: attention heads per size, four entries.
        ffn_expansion_factor: width of the feed-forward layers over their input's.
        bias: of the convolutions inside blocks and of those that join ways down and up and make the image.
        LayerNorm_type: WithBias (public deraining, motion and defocus deblurring) or BiasFree (denoising).
        dual_pixel_task: two images side by side in the channels (inp_channels 6) become one; nothing is added to it.

    Raises:
        UserError: lists of another length, channels that heads do not divide, another LayerNorm_type, or channel
            counts of input and output that differ without ``dual_pixel_task``.
    """

    window_size = 8  # what inputs are padded to a multiple of, see inference.padding_of

    def __init__(
        self,
        inp_channels=3,
        out_channels=3,
        dim=48,
        num_blocks=(4, 6, 6, 8),
        num_refinement_blocks=4,
        heads=(1, 2, 4, 8),
        ffn_expansion_factor=2.66,
        bias=False,
        LayerNorm_type='WithBias',
        dual_pixel_task=False,
    ):
        super().__init__()
        widths = [dim, 2 * dim, 4 * dim, 8 * dim]
        for name, values in (('num_blocks', num_blocks), ('heads', heads)):
            if len(values) != len(widths):
                raise UserError(f'Restormer: {name} must have four entries, not {list(values)}')
        if any(width % count for width, count in zip(widths, heads)) or 2 * dim % heads[0]:
            raise UserError(f'Restormer: heads {list(heads)} do not divide the channels {widths} (dim {dim})')
        if LayerNorm_type not in NORMS:
            raise UserError(f'Restormer: LayerNorm_type must be {" or ".join(NORMS)}, not {LayerNorm_type!r}')
        if inp_channels != out_channels and not dual_pixel_task:
            raise UserError(
                f'Restormer: inp_channels {inp_channels} and out_channels {out_channels} must be equal, because the '
                'input is added to the output; dual_pixel_task: true leaves it out'
            )

        def blocks(count, width, num_heads):
            return nn.Sequential(
                *(Block(width, num_heads, ffn_expansion_factor, bias, LayerNorm_type) for _ in range(count))
            )

        self.patch_embed = Embedding(inp_channels, dim)
        self.encoder_level1 = blocks(num_blocks[0], widths[0], heads[0])
        self.down1_2 = Resize(widths[0], up=False)
        self.encoder_level2 = blocks(num_blocks[1], widths[1], heads[1])
        self.down2_3 = Resize(widths[1], up=False)
        self.encoder_level3 = blocks(num_blocks[2], widths[2], heads[2])
        self.down3_4 = Resize(widths[2], up=False)
        self.latent = blocks(num_blocks[3], widths[3], heads[3])
        self.up4_3 = Resize(widths[3], up=True)
        self.reduce_chan_level3 = nn.Conv2d(widths[3], widths[2], 1, bias=bias)
        self.decoder_level3 = blocks(num_blocks[2], widths[2], heads[2])
        self.up3_2 = Resize(widths[2], up=True)
        self.reduce_chan_level2 = nn.Conv2d(widths[2], widths[1], 1, bias=bias)
        self.decoder_level2 = blocks(num_blocks[1], widths[1], heads[1])
        self.up2_1 = Resize(widths[1], up=True)
        self.decoder_level1 = blocks(num_blocks[0], widths[1], heads[0])
        self.refinement = blocks(num_refinement_blocks, widths[1], heads[0])
        self.dual_pixel_task = dual_pixel_task
        if dual_pixel_task:
            self.skip_conv = nn.Conv2d(widths[0], widths[1], 1, bias=bias)
        self.output = nn.Conv2d(widths[1], out_channels, 3, padding=1, bias=bias)

    def forward(self, x):
        """(B, inp_channels, H, W) -> (B, out_channels, H, W); sides are mirrored up to multiples of 8 and cropped."""
        height, width = x.shape[2:]
        x = pad_to_multiple(x, self.window_size)
        embedded = self.patch_embed(x)
        level1 = self.encoder_level1(embedded)
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        h = self.up4_3(self.latent(self.down3_4(level3)))
        h = self.up3_2(self.decoder_level3(self.reduce_chan_level3(torch.cat([h, level3], 1))))
        h = self.up2_1(self.decoder_level2(self.reduce_chan_level2(torch.cat([h, level2], 1))))
        h = self.refinement(self.decoder_level1(torch.cat([h, level1], 1)))
        out = self.output(h + self.skip_conv(embedded)) if self.dual_pixel_task else self.output(h) + x
        return out[..., :height, :width]
