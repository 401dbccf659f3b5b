"""Several networks as one: ``network_t: {type: Ensemble, networks: [...]}`` is a teacher made of teachers."""

from __future__ import annotations

import math
from typing import Any

import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from dckd_sr import checkpoint
from dckd_sr.errors import UserError

OWN_KEYS = ('pretrain', 'param_key', 'allow_random')  # of a member, beside type and arguments


@ARCH_REGISTRY.register()
class Ensemble(nn.Module):
    """The weighted mean of the outputs of several networks of one scale.

    Args:
        networks: blocks with type and arguments of a network, ``pretrain``, the file with its weights, and, where the
            file needs it, ``param_key``. ``allow_random: true`` stands for a missing file, in tests.
        weights: one positive number per network, divided by their sum; all alike if empty.

    Raises:
        UserError: no network, another number of weights than networks, or files that are not there or do not fit.
    """

    def __init__(self, networks, weights=None):
        super().__init__()
        weights = [1] * len(networks) if weights is None else list(weights)
        if not networks or len(weights) != len(networks) or min(weights) <= 0:
            raise UserError(
                f'an Ensemble needs networks and a positive weight for each, not {len(networks)} and {weights}'
            )
        self.networks = nn.ModuleList(_build(block, index) for index, block in enumerate(networks))
        self.weights = [weight / sum(weights) for weight in weights]
        self.padder_size = math.lcm(*(getattr(net, 'padder_size', 1) for net in self.networks))  # NAFNet's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(weight * net(x) for weight, net in zip(self.weights, self.networks))


def _build(block: dict[str, Any], index: int) -> nn.Module:
    options = {key: value for key, value in block.items() if key not in OWN_KEYS}
    path = block.get('pretrain')
    if options.get('type') == 'spandrel':  # is built with the weights of its path
        return build_network({**block})
    if path is None and not block.get('allow_random'):
        raise UserError(f'networks.{index} of an Ensemble has no weights: set its pretrain')
    net = build_network(options)
    if path is not None:
        checkpoint.load_network(net, path, True, block.get('param_key'), f'network_t.networks.{index}.param_key')
    return net
