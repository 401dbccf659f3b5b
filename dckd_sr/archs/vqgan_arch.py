"""VQGAN: convolutional encoder, codebook and decoder (Esser et al., Taming Transformers, CVPR 2021).

DCKD compares images by the levels of its frozen encoder (Eq. 5) and by their distributions over its codebook (Eq. 8).
Parameter names and shapes are those of CompVis/taming-transformers, so that its public checkpoints fit. What differs:
one pass gives levels and code logits and stops where nothing more is asked; attention uses PyTorch's fused kernel; the
range in which images enter is an option; images of any size are accepted.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn
from torch.nn import functional as F

from dckd_sr.errors import UserError, nearest

_GROUPS = 32  # of every GroupNorm: channel counts must be multiples of it


class ConfigError(UserError, TypeError):
    """``ddconfig`` does not describe a VQGAN."""


class Encoding(NamedTuple):
    """What `VQGAN.forward` found; a part that was not asked for is None."""

    levels: list[torch.Tensor] | None
    logits: torch.Tensor | None


class Norm(nn.GroupNorm):
    """Group normalisation that accepts a single pixel per group, which F.group_norm refuses."""

    def __init__(self, channels):
        super().__init__(_GROUPS, channels, eps=1e-6)

    def forward(self, x):
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the channel count changes."""

    def __init__(self, channels_in, channels_out, dropout):
        super().__init__()
        self.norm1 = Norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = Norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x):
        in_place = not torch.is_grad_enabled()  # nobody looks at what is overwritten: less memory to move
        h = self.conv1(F.silu(self.norm1(x), in_place))
        h = self.conv2(self.dropout(F.silu(self.norm2(h), in_place)))
        return h.add_(self.nin_shortcut(x) if hasattr(self, 'nin_shortcut') else x)


class Attention(nn.Module):
    """Single-head attention over all positions, scaled by channels^-0.5."""

    def __init__(self, channels):
        super().__init__()
        self.norm = Norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        # (B, 1, hw, C) each
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Stride-2 convolution, padded with zeros on the right and at the bottom only."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        # A side of one pixel needs a second zero, or the kernel does not fit.
        height, width = (1 + (side == 1) for side in x.shape[2:])
        return self.conv(F.pad(x, (0, width, 0, height)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode='nearest'))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, channels_in, channels_out, blocks, attention, dropout):
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.block = nn.ModuleList(ResidualBlock(a, b, dropout) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(Attention(channels_out) for _ in range(blocks if attention else 0))

    def after_first(self, h):
        """Everything of this level behind ``block[0]``, whose output is h."""
        for i, block in enumerate(self.block):
            h = block(h) if i else h
            h = self.attn[i](h) if self.attn else h
        return h

    def forward(self, x):
        return self.after_first(self.block[0](x))


class Middle(nn.Module):
    """The bottleneck of encoder and decoder."""

    def __init__(self, channels, dropout):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, dropout)
        self.attn_1 = Attention(channels)
        self.block_2 = ResidualBlock(channels, channels, dropout)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image to feature map, one halving per level but the last.

    Args:
        in_channels, z_channels: channels of the image and of the feature map.
        ch, ch_mult: width, and its factor per level; the number of levels is the length of ``ch_mult``.
        num_res_blocks: residual blocks per level.
        resolution, attn_resolutions: a level has attention if ``resolution``, halved once per finer level, is listed.
            This is settled here; images of other sizes pass through the same layers.
        dropout: of the residual blocks, in training.
    """

    def __init__(self, in_channels, z_channels, ch, ch_mult, num_res_blocks, resolution, attn_resolutions, dropout):
        super().__init__()
        widths = [ch] + [ch * factor for factor in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(len(ch_mult)):
            level = Level(widths[i], widths[i + 1], num_res_blocks, resolution // 2**i in attn_resolutions, dropout)
            if i + 1 < len(ch_mult):
                level.downsample = Downsample(widths[i + 1])
            self.down.append(level)
        self.mid = Middle(widths[-1], dropout)
        self.norm_out = Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x, num_levels=0, images=None):
        """Run as far as the arguments ask.

        Args:
            x: (B, in_channels, H, W).
            num_levels: how many levels to return, from the finest.
            images: the feature map is wanted for this many images, from the first; None is all, 0 none.

        Returns:
            (list of the outputs of ``down[i].block[0]``, feature map (images, z_channels, h, w) or None).
        """
        images = len(x) if images is None else min(images, len(x))
        levels = []
        h = self.conv_in(x if num_levels or images == len(x) else x[:images])
        for i, level in enumerate(self.down):
            h = level.block[0](h)
            if i < num_levels:
                levels.append(h)
            if i + 1 == num_levels and images < len(x):
                if images == 0:
                    return levels, None
                h = h[:images]
            h = level.after_first(h)
            if i + 1 < len(self.down):
                h = level.downsample(h)
        return levels, self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Feature map to image, the mirror of `Encoder` with one residual block more per level; ``up[0]`` is the finest."""

    def __init__(self, out_ch, z_channels, ch, ch_mult, num_res_blocks, resolution, attn_resolutions, dropout):
        super().__init__()
        last = len(ch_mult) - 1
        widths = [ch * factor for factor in ch_mult] + [ch * ch_mult[-1]]
        coarsest = resolution // 2**last
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], dropout)
        self.up = nn.ModuleList()
        for i in range(len(ch_mult)):
            attention = coarsest * 2 ** (last - i) in attn_resolutions
            level = Level(widths[i + 1], widths[i], num_res_blocks + 1, attention, dropout)
            if i > 0:
                level.upsample = Upsample(widths[i])
            self.up.append(level)
        self.norm_out = Norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z):
        """(B, z_channels, h, w) -> (B, out_ch, h * 2^(levels - 1), w * 2^(levels - 1))."""
        h = self.mid(self.conv_in(z))
        for i in reversed(range(len(self.up))):
            h = self.up[i](h)
            if i > 0:
                h = self.up[i].upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Codebook(nn.Module):
    """n_embed vectors of embed_dim numbers."""

    def __init__(self, n_embed, embed_dim):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)

    def forward(self, z):
        """Logits (B*h*w, n_embed), rows ordered batch, height, width, of features (B, embed_dim, h, w).

        -|z - e|^2 = 2 z.e - |e|^2 - |z|^2, without the last term: it is the same for all codes of a row.
        """
        # Squared distances are differences of large numbers: half precision would decide the codes by rounding.
        with torch.autocast(z.device.type, enabled=False):
            codes = self.embedding.weight
            rows = z.to(codes.dtype).permute(0, 2, 3, 1).flatten(0, 2)
            return torch.addmm(-codes.square().sum(1), rows, codes.t(), alpha=2)


def _check_ddconfig(
    in_channels,
    out_ch,
    z_channels,
    ch,
    ch_mult,
    num_res_blocks,
    resolution,
    attn_resolutions,
    dropout=0.0,
    double_z=False,
    resamp_with_conv=True,
):
    """Its signature is the list of keys that ``ddconfig`` has."""
    if double_z:
        raise ConfigError('ddconfig.double_z must be false: true belongs to autoencoders without a codebook')
    if not resamp_with_conv:
        raise ConfigError('ddconfig.resamp_with_conv must be true: levels are changed by convolutions here')
    if not ch_mult or num_res_blocks < 1:
        raise ConfigError('ddconfig needs at least one entry in ch_mult and num_res_blocks of 1 or more')
    if any(ch * factor % _GROUPS for factor in (1, *ch_mult)):
        raise ConfigError(
            f'ddconfig.ch and its product with each of ch_mult {list(ch_mult)} must be multiples of {_GROUPS}'
        )
    common = (z_channels, ch, tuple(ch_mult), num_res_blocks, resolution, tuple(attn_resolutions), dropout)
    return (in_channels, *common), (out_ch, *common)


def _parse_ddconfig(ddconfig):
    """Check ddconfig and return the arguments of `Encoder` and of `Decoder`."""
    known = inspect.signature(_check_ddconfig).parameters
    for key in ddconfig:
        if key not in known:
            raise ConfigError(f"ddconfig has no key '{key}'{nearest(key, known)}; known: {', '.join(known)}")
    missing = [key for key, value in known.items() if value.default is value.empty and key not in ddconfig]
    if missing:
        raise ConfigError(f'ddconfig lacks {", ".join(missing)}')
    return _check_ddconfig(**ddconfig)


@ARCH_REGISTRY.register()
class VQGAN(nn.Module):
    """Encoder and codebook, optionally with the decoder, in the key layout of the public checkpoints.

    Args:
        embed_dim: length of a code vector.
        n_embed: number of codes.
        ddconfig: shape of the encoder, keys as in taming-transformers' configurations (see `Encoder`): in_channels,
            out_ch, resolution, ch, ch_mult, num_res_blocks, attn_resolutions, z_channels, dropout, double_z (false),
            resamp_with_conv (true).
        input_range: the range in which the network sees images; they are given in [0, 1]. [0, 1] passes them on as they
            are, as DCKD's released code does; [-1, 1] is what public VQGANs were trained on. Nothing is clipped.
        decoder: with the decoder and post_quant_conv, for reconstruction.

    Raises:
        ConfigError (a UserError and a TypeError): unknown or missing ddconfig keys, or values that make no network.
        UserError: another input_range.
    """

    def __init__(self, embed_dim, n_embed, ddconfig, input_range=(0, 1), decoder=False):
        super().__init__()
        encoder_args, decoder_args = _parse_ddconfig(ddconfig)
        if tuple(input_range) not in ((0, 1), (-1, 1)):
            raise UserError(f'input_range of the VQGAN must be [0, 1] or [-1, 1], not {list(input_range)}')
        self.input_range = tuple(input_range)
        self.num_levels = len(ddconfig['ch_mult'])
        self.encoder = Encoder(*encoder_args)
        self.quant_conv = nn.Conv2d(ddconfig['z_channels'], embed_dim, 1)
        self.quantize = Codebook(n_embed, embed_dim)
        if decoder:
            self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig['z_channels'], 1)
            self.decoder = Decoder(*decoder_args)

    def forward(self, x, levels=True, codes=True, num_levels=None):
        """Encoder levels and code logits from one pass, which ends as early as what is asked allows.

        Args:
            x: images (B, in_channels, H, W) in [0, 1]; gray ones, (B, 1, H, W), enter as equal channels.
            levels: whether to return the levels.
            codes: whether to return the logits; a number asks for those of the first so many images only.
            num_levels: how many levels, from the finest; None is all.

        Returns:
            Encoding: ``levels``, the outputs of ``encoder.down[i].block[0]``, and ``logits`` (B*h*w, n_embed), minus
            the squared distances to the codes up to a constant per row; softmax over the codes gives C of Eq. 8.
        """
        count = 0 if not levels else self.num_levels if num_levels is None else min(num_levels, self.num_levels)
        images = len(x) if codes is True else int(codes)
        if not count and not images:
            raise ValueError('neither levels nor codes asked for')
        found, h = self.encoder(self._enter(x), count, images)
        return Encoding(found if levels else None, self.quantize(self.quant_conv(h)) if images else None)

    def encode(self, x):
        """C of Eq. 8: softmax over the codes, (B*h*w, n_embed), rows ordered batch, height, width (released name)."""
        return self(x, levels=False).logits.softmax(1)

    def get_feas(self, x):
        """Levels of a list of image batches: a list over levels of lists over the batches (released name)."""
        return [list(level) for level in zip(*(self(images, codes=False).levels for images in x))]

    def quantized(self, x):
        """Features and their nearest codes.

        Args:
            x: images (B, in_channels, H, W) in [0, 1].

        Returns:
            (z, z_q, indices): features and code vectors, both (B, embed_dim, h, w), and code numbers (B, h, w).
            Gradients of z_q reach the codebook, those of z the encoder; there is none through the choice.
        """
        z = self.quant_conv(self.encoder(self._enter(x))[1])
        indices = self.quantize(z.detach()).argmax(1).view(len(z), *z.shape[2:])
        return z, self.quantize.embedding(indices).permute(0, 3, 1, 2), indices

    def decode(self, z_q):
        """Codes (B, embed_dim, h, w) to images (B, out_ch, h*f, w*f), f = 2^(levels - 1), in [0, 1], unclipped."""
        low, high = self.input_range
        images = self.decoder(self.post_quant_conv(z_q))
        return images if (low, high) == (0, 1) else (images - low) / (high - low)

    def reconstruct(self, x):
        """The images (B, in_channels, H, W) as their codes describe them, of the same size, in [0, 1], not clipped."""
        height, width = x.shape[2:]
        factor = 2 ** (self.num_levels - 1)
        padded = F.pad(x, (0, -width % factor, 0, -height % factor), mode='replicate')
        return self.decode(self.quantized(padded)[1])[:, :, :height, :width]

    def _enter(self, x):
        if x.shape[1] == 1:
            x = x.expand(-1, self.encoder.conv_in.in_channels, -1, -1)
        low, high = self.input_range
        return x if (low, high) == (0, 1) else x * (high - low) + low
