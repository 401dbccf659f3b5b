"""The distribution mapping loss of DCKD (AAAI 2025), Eq. 9: cross-entropy of distributions over a VQGAN's codes.

Reference: super-SSS/DCKD, `CELoss`. The released code hands softmax probabilities to a function that takes logits and
so applies softmax twice; the paper's formula has one. Both are here, and they differ: see `DistributionMappingLoss`.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import nn
from torch.nn import functional as F

from dckd_sr.encoder import build_loss_encoder
from dckd_sr.errors import UserError


@LOSS_REGISTRY.register()
class DistributionMappingLoss(nn.Module):
    """Cross-entropy between the teacher's and the student's distributions over the codebook.

    With C = softmax(logits) of Eq. 8, per position:
        'released'  - sum C^T log softmax(C^S). Flat: over n codes it stays within about 1 of log(n), its gradient is
                    far smaller, and it is not least at C^S = C^T.
        'paper'     - sum C^T log C^S (Eq. 9).

    Args:
        loss_weight: factor of the result.
        reduction: 'mean' over positions, or 'sum'.
        form: 'released' or 'paper'.
        encoder: for use on images (`forward`): type, arguments and ``pretrain`` of the VQGAN.

    Raises:
        UserError: an argument out of its choices.
    """

    def __init__(self, loss_weight=1.0, reduction='mean', form='released', encoder=None):
        super().__init__()
        for name, value, choices in (
            ('reduction', reduction, ('mean', 'sum')),
            ('form', form, ('released', 'paper')),
        ):
            if value not in choices:
                raise UserError(f"{name} of the distribution loss must be {' or '.join(choices)}, not '{value}'")
        self.loss_weight = loss_weight
        self.reduction = reduction
        self.form = form
        self.encoder = None if encoder is None else build_loss_encoder(encoder)

    def from_logits(self, student_logits, teacher_logits):
        """The loss of code logits, both (positions, codes); gradients flow to the student's only.

        Returns:
            0-d tensor, weighted.
        """
        target = teacher_logits.detach().softmax(1)
        # F.cross_entropy takes the logarithm of softmax of its first argument.
        scores = student_logits.softmax(1) if self.form == 'released' else student_logits
        return self.loss_weight * F.cross_entropy(scores, target, reduction=self.reduction)

    def forward(self, pred, target):
        """The loss of images (B, C, H, W) in [0, 1], as an ordinary BasicSR loss; gradients flow to pred only.

        Returns:
            0-d tensor, weighted.

        Raises:
            UserError: the loss was built without ``encoder``.
        """
        if self.encoder is None:
            raise UserError(
                f'{type(self).__name__} compares images through a VQGAN: give it an encoder block '
                '(type, its arguments, pretrain: FILE), or use it as ce_opt of a DCKDModel'
            )
        with torch.no_grad():
            teacher = self.encoder(target, levels=False).logits
        return self.from_logits(self.encoder(pred, levels=False).logits, teacher)


@LOSS_REGISTRY.register()
class CELoss(DistributionMappingLoss):
    """`DistributionMappingLoss` under its released name."""
