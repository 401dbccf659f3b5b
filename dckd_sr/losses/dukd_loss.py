"""The loss of Data Upcycling Knowledge Distillation (DUKD, arXiv 2309.14162) on its additional inputs.

The inputs are made in `ops.upcycling`: tiles of GT (zoom in), and the LQ image shrunk once more (zoom out).
"""

from __future__ import annotations

from basicsr.utils.registry import LOSS_REGISTRY
from torch import nn
from torch.nn import functional as F


@LOSS_REGISTRY.register()
class UpcyclingLoss(nn.Module):
    """L1 on upcycled inputs: |F^-1(S(F(g))) - T(g)| for tiles g, |S(x') - x| + |S(x') - T(x')| for the shrunk x'.

    F is a random invertible augmentation of each sample, which the student sees and the teacher does not (label
    consistency). All terms of an iteration are summed before one optimiser step.

    Args:
        loss_weight: factor of each of the three terms.
        n_gt_sub: how many of the scale x scale tiles of GT are used, drawn anew each time.
        zoom_out: whether the shrunk LQ is used.
        prob: probability of each augmentation (invert, flips, transpose), per sample.
    """

    def __init__(self, loss_weight=1.0, n_gt_sub=1, zoom_out=True, prob=0.3):
        super().__init__()
        self.loss_weight = loss_weight
        self.n_gt_sub, self.zoom_out, self.prob = n_gt_sub, zoom_out, prob

    def zoomed_in(self, student, teacher):
        """The loss of outputs (B, C, H, W), the student's turned back; 0-d, weighted."""
        return self.loss_weight * F.l1_loss(student, teacher)

    def zoomed_out(self, student, lq, teacher):
        """The loss of outputs on the shrunk LQ, all (B, C, h, w); 0-d, weighted."""
        return self.loss_weight * (F.l1_loss(student, lq) + F.l1_loss(student, teacher))
