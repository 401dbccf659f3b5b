"""The frozen VQGAN through which DCKD compares images; `DCKDModel` and the losses' ``encoder:`` block build it here."""

from pathlib import Path

import torch
from basicsr.archs import build_network
from basicsr.utils import get_root_logger

from dckd_sr.checkpoint import fitting, read_weights
from dckd_sr.errors import UserError
from dckd_sr.option_keys import ENCODER_ADVICE


def build_encoder(network_opt, path, param_key=None, option='path.param_key_vqgan'):
    """Build a VQGAN without decoder, load all its weights and freeze it.

    Args:
        network_opt: ``type`` and arguments of the network, as in ``network_vqgan``; it is not changed. With
            ``allow_random: true`` a missing path means random weights (for tests) instead of an error.
        path: file with its weights (.ckpt, .pth or .safetensors), or None. Keys that the network does not have (those
            of a decoder or a loss) are passed over; those that it has must all be there.
        param_key: the entry of the file that holds the weights; see `checkpoint.read_weights`.
        option: what a user sets to choose it, for messages.

    Returns:
        VQGAN on the CPU, in eval mode, none of its parameters requiring a gradient.

    Raises:
        UserError: no file, an unreadable one, or one whose weights do not fit.
    """
    options = {'type': 'VQGAN', **network_opt, 'decoder': False}
    allow_random = options.pop('allow_random', False)
    if path is None and not allow_random:
        raise UserError(f'The VQGAN has no weights: set path.pretrain_network_vqgan. {ENCODER_ADVICE}')
    if path is not None and not Path(path).is_file():
        raise UserError(f'The weights of the VQGAN, {path}, are not there. {ENCODER_ADVICE}')
    try:
        with torch.random.fork_rng(devices=[]):  # the global generator is the student's
            net = build_network(options)
    except TypeError as error:
        raise UserError(f'network_vqgan: {error}') from error
    if path is not None:
        _load(net, path, param_key, option)
    return net.eval().requires_grad_(False)


def build_loss_encoder(block):
    """Build the encoder of a loss's ``encoder:`` block: that of ``network_vqgan`` with ``pretrain`` and ``param_key``.

    Raises:
        UserError: as `build_encoder`.
    """
    options = dict(block)
    path, param_key = options.pop('pretrain', None), options.pop('param_key', None)
    if path is None and not options.get('allow_random', False):
        raise UserError(f'The encoder of a loss has no weights: set pretrain in its encoder block. {ENCODER_ADVICE}')
    return build_encoder(options, path, param_key, 'param_key of the encoder block')


def _load(net, path, param_key, option):
    weights, used = read_weights(path, param_key, option)
    own = net.state_dict()
    weights, prefix = fitting(weights, own)
    wrong = [f'{key} is missing' for key in own if key not in weights]
    wrong += [
        f'{key} is {tuple(weights[key].shape)} instead of {tuple(value.shape)}'
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if wrong:
        rest = f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''
        raise UserError(f'{path} ({used}) does not fit network_vqgan: {"; ".join(wrong[:5])}{rest}')
    net.load_state_dict({key: weights[key] for key in own})
    get_root_logger().info(f'Loaded {type(net).__name__} from {path}, weights: {used}{prefix}.')
