"""Negatives from the student's own past (MCIR / MCLIR, AAAI 2024): minus a distance between features.

- sum_l weight_l |f_l(S(x)) - f_l(H(x))|, H being the history network on the same input. Reference: Aitical/MCLIR,
basicsr/models/sr_neg_model.py, which subtracts BasicSR's PerceptualLoss between the two outputs. There is nothing that
bounds the term below: with a large weight training diverges.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import nn

from dckd_sr.errors import UserError
from dckd_sr.losses.contrastive_loss import distances
from dckd_sr.vgg import VGGFeatures


@LOSS_REGISTRY.register()
class HistoryNegativeLoss(nn.Module):
    """Pushes the student away from what its own past makes of the same input.

    Args:
        loss_weight: factor of the distance, which is subtracted. No source states the one of super-resolution.
        features: 'vgg', layers of VGG19 as in BasicSR's PerceptualLoss, or 'vqgan', the levels of network_vqgan.
        layer_weights: layer of VGG19 -> its weight.
        weights: one number per level of the VQGAN's encoder, from the finest.
        pretrain: file with torchvision's weights of VGG19; BasicSR's places if empty.
        allow_random: random VGG features where there is no file; for tests.

    Attributes:
        run: called as ``run(net, images)``; another way to run VGG19 may take its place.

    Raises:
        UserError: no weights of VGG19, or features out of its choices.
    """

    def __init__(
        self,
        loss_weight=1e-4,
        features='vgg',
        layer_weights=None,
        weights=(1 / 32, 1 / 16, 1 / 8, 1 / 4, 1),
        pretrain=None,
        allow_random=False,
    ):
        super().__init__()
        if features not in ('vgg', 'vqgan'):
            raise UserError(f"features of the history loss must be vgg or vqgan, not '{features}'")
        self.features, self.loss_weight = features, loss_weight
        layer_weights = layer_weights or {'conv5_4': 1.0}
        self.weights = list(weights) if features == 'vqgan' else list(layer_weights.values())
        self.vgg = None if features == 'vqgan' else VGGFeatures(layer_weights, True, pretrain, allow_random)
        self.run = lambda net, images: net(images)

    def push(self, student, history):
        """The loss of images (B, C, H, W) in [0, 1], by VGG19; 0-d, weighted, never positive."""
        anchor = self.run(self.vgg, student)
        with torch.no_grad():
            negative = self.run(self.vgg, history)
        return self.from_features(anchor, negative)

    def from_features(self, student, history):
        """The loss of lists of features, one for each weight; gradients flow to the student's.

        Raises:
            UserError: another number of levels than weights.
        """
        if len(student) != len(self.weights):
            count, levels = len(self.weights), len(student)
            raise UserError(f'weights of the history loss has {count} entries, but the encoder has {levels} levels')
        found = distances(student, [history]).unbind()
        return -self.loss_weight * sum(weight * value for weight, value in zip(self.weights, found))
