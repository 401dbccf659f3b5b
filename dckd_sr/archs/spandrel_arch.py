"""Networks whose type, scale and options come from a weights file: ``network_t: {type: spandrel, path: FILE}``.

EDSR, RCAN, MSRResNet, NAFNet and Restormer are recognised here and built from BasicSR's registry; the rest is left to
the library spandrel (https://github.com/chaiNNer-org/spandrel). No code of the file is run.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import warnings
from collections import namedtuple
from pathlib import Path

import torch
from basicsr.utils import get_root_logger
from basicsr.utils.registry import ARCH_REGISTRY

from dckd_sr import checkpoint
from dckd_sr.compat import hold_constants
from dckd_sr.errors import UserError, nearest

Description = namedtuple('Description', 'type scale num_in_ch num_out_ch window_size options is_ours')
Description.__doc__ = """What a weights file holds.

Attributes:
    type: name of the arch, in BasicSR's registry or as spandrel calls it.
    scale: output size over input size.
    num_in_ch, num_out_ch: image channels.
    window_size: inputs must be padded to multiples of it.
    options: its arguments, as far as they are plain values.
    is_ours: recognised here, and built from BasicSR's registry with ``options``.
"""


@ARCH_REGISTRY.register()
def spandrel(path, param_key=None, **options):
    """Build the network that a weights file holds, with its weights, in eval mode.

    Args:
        path: .pth, .pt, .ckpt or .safetensors.
        param_key: the entry with the weights, see `checkpoint.read_weights`.
        options: arguments that replace what the file tells. Needed where tensors cannot tell: EDSR's ``res_scale`` (0.1
            is taken for 256 features and 32 blocks, 1 for others), ``img_range``, ``rgb_mean``.

    Returns:
        torch.nn.Module: (B, C, h, w) in [0, 1] -> (B, C', h * scale, w * scale), unclamped. What spandrel reads has an
        int attribute ``window_size``: inputs must be padded to multiples of it.

    Raises:
        UserError: unreadable file, unknown arch, or options that it does not have.
    """
    return build(path, param_key, options, 'param_key')[0]


def build(path, param_key, options, option):
    """As `spandrel`, and the entry of the file that was used; ``option`` is what a user sets to choose it."""
    weights, used = checkpoint.read_weights(path, param_key, option)
    found = _recognised(weights, path)
    if found is None:
        descriptor = _descriptor(weights, path)
        check_options(path, _described_by(descriptor), options)
        net = descriptor.model.float()
        net.window_size = _window(descriptor)
        net.register_forward_pre_hook(_keep_input)
    else:
        description, weights = found
        check_options(path, description, options)
        cls = ARCH_REGISTRY.get(description.type)
        net = cls(**{**description.options, **options})
        checkpoint.load_weights(net, weights, path)
    get_root_logger().info(f'Read {type(net).__name__} from {path}, weights: {used}.')
    return hold_constants(net).eval(), used


def describe(path, param_key=None):
    """What a weights file holds, without keeping the network.

    Raises:
        UserError: unreadable file or unknown arch.
    """
    path = Path(path)
    try:
        state = path.stat()
    except OSError:
        state = None
    stamp = (state.st_mtime_ns, state.st_size) if state else None
    return _describe(path, param_key, stamp)


@functools.lru_cache(maxsize=16)
def _describe(path, param_key, stamp):
    weights, _ = checkpoint.read_weights(path, param_key)
    found = _recognised(weights, path)
    if found is not None:
        return found[0]
    return _described_by(_descriptor(weights, path))


def _recognised(weights, path):
    """As `infer`; what a file of `export` says about itself adds what tensors cannot tell, such as res_scale."""
    found, told = infer(weights), checkpoint.read_metadata(path).get('arch')
    if found is None or not isinstance(told, dict) or told.get('type') != found[0].type:
        return found
    known = inspect.signature(ARCH_REGISTRY.get(found[0].type)).parameters
    options = {key: value for key, value in told.items() if key in known}
    return found[0]._replace(options={**found[0].options, **options}), found[1]


def _described_by(descriptor):
    given = getattr(descriptor.model, 'hyperparameters', {})
    return Description(
        descriptor.architecture.name,
        descriptor.scale,
        descriptor.input_channels,
        descriptor.output_channels,
        _window(descriptor),
        {key: value for key, value in given.items() if isinstance(value, (int, float, str, list, tuple, type(None)))},
        False,
    )


def check_options(path, description, options):
    """Refuse options that the arch does not have.

    Raises:
        UserError: naming the first of them.
    """
    known = list(inspect.signature(ARCH_REGISTRY.get(description.type)).parameters) if description.is_ours else []
    for key in options:
        if not description.is_ours:
            raise UserError(f'{path} holds {description.type}, whose options are those of the file; drop {key}')
        if key not in known:
            hint = nearest(key, known) or (f'; known: {", ".join(known)}' if known else '')
            raise UserError(f'{path} holds {description.type}, which has no option {key}{hint}')


# ---------------------------------------------------------------------------------------------------------------------
# What spandrel knows


def _descriptor(weights, path):
    import spandrel as library  # late: few runs need it

    known = (named for named, _ in checkpoint.prefixes(weights) if _is_spandrels(library, named))
    weights = next(known, weights)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of torch, about lines of archs that a user cannot change
            descriptor = library.ModelLoader('cpu').load_from_state_dict(weights)
    except library.UnsupportedModelError as error:
        raise UserError(f'{path} {UNKNOWN}; its first keys are {", ".join(list(weights)[:3])}') from error
    except (RuntimeError, KeyError, ValueError, TypeError, AssertionError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f'{path} is damaged or of a variant that spandrel cannot build: {_first_line(error)}'
        ) from error
    if not isinstance(descriptor, library.ImageModelDescriptor):
        raise UserError(f'{path} holds {descriptor.architecture.name}, which needs a mask beside the image')
    return descriptor


def _is_spandrels(library, weights):
    return any(support.detect(weights) for support in library.MAIN_REGISTRY)


def without_wrapper(weights):
    """Names without the prefix that a program which trains has put before all of them, as far as names can tell.

    Returns:
        (state dict, prefix that was left out): the first under whose names an arch is recognised; else without
        ``module.``, ``_orig_mod.``, ``net_g.`` and ``model.``, unless numbers follow, as in a Sequential of this name.
    """
    import spandrel as library  # late: few runs need it

    found = list(checkpoint.prefixes(weights))
    for named, prefix in found:
        if _infer(named) is not None or _is_spandrels(library, named):
            return named, prefix
    plain = [pair for pair in found if re.fullmatch(r'((module|_orig_mod|net_g|model)\.)*', pair[1])]
    return next(pair for pair in reversed(plain) if not re.match(r'\d', next(iter(pair[0]), '')))


UNKNOWN = 'is of no arch that is recognised: give network_t its type and options, and path.pretrain_network_t the file'


def _window(descriptor):
    """Multiple to which inputs are padded: the network's window, and what spandrel states as its needs."""
    needs = descriptor.size_requirements
    own = getattr(descriptor.model, 'window_size', None)
    if isinstance(own, int) and not isinstance(own, bool) and own > 0:
        return math.lcm(own, needs.multiple_of)
    return max(needs.multiple_of, -(-needs.minimum // needs.multiple_of) * needs.multiple_of)


def _keep_input(_, args):
    """Some of spandrel's networks write into their input, which here is the batch that others read, too."""
    return (args[0].clone(), *args[1:])


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------------------------
# What is recognised here


def infer(weights):
    """Recognise the archs of this module by names and shapes.

    Args:
        weights: state dict.

    Returns:
        (`Description`, weights with the names that the arch has, without a prefix of them all), or None.
    """
    return next(filter(None, (_infer(named) for named, _ in checkpoint.prefixes(weights))), None)


def _infer(weights):
    """As `infer`, of names as they are."""
    for reader in (_edsr_pytorch, _rcan, _edsr, _msrresnet, _nafnet, _restormer):
        try:
            found = reader(weights)
        except (KeyError, IndexError, ValueError, ZeroDivisionError):
            continue  # a part of its names is there by chance
        if found is not None:
            return found
    return None


def _count(weights, prefix):
    """Number of modules in a sequence: one more than the largest index after the prefix."""
    pattern = re.compile(re.escape(prefix) + r'(\d+)\.')
    return 1 + max((int(match[1]) for match in map(pattern.match, weights) if match), default=-1)


def _described(weights, kind, scale, num_in_ch, num_out_ch, options, window_size=1):
    return Description(kind, scale, num_in_ch, num_out_ch, window_size, options, True), weights


def _upscale(weights):
    """BasicSR's Upsample: convolutions at 0, 2, ... each of which makes 4 or 9 times its channels."""
    scale = 1
    for index in range(0, _count(weights, 'upsample.'), 2):
        out, into = weights[f'upsample.{index}.weight'].shape[:2]
        scale *= {4: 2, 9: 3}[out // into]
    return scale


def _trunk(weights):
    """The options that BasicSR's EDSR, RCAN and MSRResNet have in common."""
    num_feat, num_in_ch = weights['conv_first.weight'].shape[:2]
    return {'num_in_ch': num_in_ch, 'num_out_ch': weights['conv_last.weight'].shape[0], 'num_feat': num_feat}


def _sr(weights, kind, scale, **options):
    trunk = _trunk(weights)
    options = {**trunk, **options, 'upscale': scale}
    return _described(weights, kind, scale, trunk['num_in_ch'], trunk['num_out_ch'], options)


def _edsr(weights):
    if 'body.0.conv1.weight' not in weights or 'upsample.0.weight' not in weights:
        return None
    blocks, features = _count(weights, 'body.'), weights['conv_first.weight'].shape[0]
    # Nothing in the file tells it; EDSR-L, the large one of the paper, has 0.1 (BasicSR's options/test/EDSR).
    res_scale = 0.1 if (features, blocks) == (256, 32) else 1
    return _sr(weights, 'EDSR', _upscale(weights), num_block=blocks, res_scale=res_scale)


def _rcan(weights):
    if 'body.0.residual_group.0.rcab.0.weight' not in weights:
        return None
    squeezed = weights['body.0.residual_group.0.rcab.3.attention.1.weight'].shape[0]
    return _sr(
        weights,
        'RCAN',
        _upscale(weights),
        num_group=_count(weights, 'body.'),
        num_block=_count(weights, 'body.0.residual_group.'),
        squeeze_factor=weights['conv_first.weight'].shape[0] // squeezed,
    )


def _msrresnet(weights):
    if 'upconv1.weight' not in weights or 'conv_hr.weight' not in weights or 'body.0.conv1.weight' not in weights:
        return None
    out, into = weights['upconv1.weight'].shape[:2]
    scale = 4 if 'upconv2.weight' in weights else math.isqrt(out // into)
    return _sr(weights, 'MSRResNet', scale, num_block=_count(weights, 'body.'))


def _edsr_pytorch(weights):
    """The layout of EDSR-PyTorch and of RCAN's own code (head, body, tail), renamed to BasicSR's."""
    if 'head.0.weight' not in weights or 'tail.1.weight' not in weights:
        return None
    last = _count(weights, 'body.') - 1
    rcan = 'body.0.body.0.body.0.weight' in weights
    inner = _count(weights, 'body.0.body.') - 1
    rules = [
        (r'head\.0\.', 'conv_first.'),
        (r'tail\.1\.', 'conv_last.'),
        (r'tail\.0\.', 'upsample.'),
        (rf'body\.{last}\.', 'conv_after_body.'),
    ]
    if rcan:
        rules += [
            (rf'body\.(\d+)\.body\.{inner}\.', r'body.\1.conv.'),
            (r'body\.(\d+)\.body\.(\d+)\.body\.3\.conv_du\.0\.', r'body.\1.residual_group.\2.rcab.3.attention.1.'),
            (r'body\.(\d+)\.body\.(\d+)\.body\.3\.conv_du\.2\.', r'body.\1.residual_group.\2.rcab.3.attention.3.'),
            (r'body\.(\d+)\.body\.(\d+)\.body\.([02])\.', r'body.\1.residual_group.\2.rcab.\3.'),
        ]
    else:
        rules += [(r'body\.(\d+)\.body\.0\.', r'body.\1.conv1.'), (r'body\.(\d+)\.body\.2\.', r'body.\1.conv2.')]
    renamed = {}
    for key, value in weights.items():
        if key.startswith(('sub_mean.', 'add_mean.')):
            continue  # the mean of DIV2K, which is BasicSR's rgb_mean
        for pattern, replacement in rules:
            if re.match(pattern, key):
                renamed[re.sub(f'^{pattern}', replacement, key)] = value
                break
        else:
            return None
    return _rcan(renamed) if rcan else _edsr(renamed)


def as_spandrel_reads(net):
    """A network's weights under the names by which the library recognises it, which are our own but for RCAN.

    RCAN's are those of its authors, see `_edsr_pytorch`; there, range and mean of the image are layers.
    """
    weights = net.state_dict()
    described = _rcan(weights)
    if described is None or net.body[0].residual_group[0].res_scale != 1:  # for which the library has no place
        return weights
    options = described[0].options
    rules = [
        (r'conv_first\.', 'head.0.'),
        (r'conv_after_body\.', f'body.{options["num_group"]}.'),
        (r'upsample\.', 'tail.0.'),
        (r'conv_last\.', 'tail.1.'),
        (r'body\.(\d+)\.conv\.', rf'body.\1.body.{options["num_block"]}.'),
        (r'body\.(\d+)\.residual_group\.(\d+)\.rcab\.3\.attention\.1\.', r'body.\1.body.\2.body.3.conv_du.0.'),
        (r'body\.(\d+)\.residual_group\.(\d+)\.rcab\.3\.attention\.3\.', r'body.\1.body.\2.body.3.conv_du.2.'),
        (r'body\.(\d+)\.residual_group\.(\d+)\.rcab\.', r'body.\1.body.\2.body.'),
    ]
    renamed = {}
    for key, value in weights.items():
        pattern, replacement = next(rule for rule in rules if re.match(rule[0], key))
        renamed[re.sub(f'^{pattern}', replacement, key)] = value
    # The library's images have the range 255 before the first of these and after the second.
    channels, mean, ratio = options['num_in_ch'], net.mean.detach().flatten(), net.img_range / 255
    identity = torch.eye(channels).view(channels, channels, 1, 1)
    renamed.update({'sub_mean.weight': identity * ratio, 'sub_mean.bias': -mean * net.img_range})
    renamed.update({'add_mean.weight': identity / ratio, 'add_mean.bias': mean * 255})
    return renamed


def _nafnet(weights):
    if any(key not in weights for key in ('intro.weight', 'ending.weight', 'downs.0.weight')):
        return None
    width, channels = weights['intro.weight'].shape[:2]
    levels = _count(weights, 'downs.')
    options = {
        'img_channel': channels,
        'width': width,
        'middle_blk_num': _count(weights, 'middle_blks.'),
        'enc_blk_nums': [_count(weights, f'encoders.{level}.') for level in range(levels)],
        'dec_blk_nums': [_count(weights, f'decoders.{level}.') for level in range(levels)],
    }
    return _described(weights, 'NAFNet', 1, channels, channels, options)


def _restormer(weights):
    if 'patch_embed.proj.weight' not in weights or 'latent.0.attn.temperature' not in weights:
        return None
    levels = ('encoder_level1', 'encoder_level2', 'encoder_level3', 'latent')
    dim, num_in_ch = weights['patch_embed.proj.weight'].shape[:2]
    hidden = [weights[f'{level}.0.ffn.project_out.weight'].shape[1] for level in levels]
    low = max(value / (dim * 2**i) for i, value in enumerate(hidden))
    high = min((value + 1) / (dim * 2**i) for i, value in enumerate(hidden))
    options = {
        'inp_channels': num_in_ch,
        'out_channels': weights['output.weight'].shape[0],
        'dim': dim,
        'num_blocks': [_count(weights, f'{level}.') for level in levels],
        'num_refinement_blocks': _count(weights, 'refinement.'),
        'heads': [weights[f'{level}.0.attn.temperature'].shape[0] for level in levels],
        # int(dim * factor) is what the file shows; any factor between the bounds gives it.
        'ffn_expansion_factor': 2.66 if low <= 2.66 < high else (low + high) / 2,
        'bias': 'latent.0.attn.qkv.bias' in weights,
        'LayerNorm_type': 'WithBias' if 'latent.0.norm1.body.bias' in weights else 'BiasFree',
        'dual_pixel_task': 'skip_conv.weight' in weights,
    }
    return _described(weights, 'Restormer', 1, num_in_ch, options['out_channels'], options, window_size=8)
