"""The contrastive loss of CSD (Contrastive Self-distillation, IJCAI 2021) with a frozen teacher.

sum_i weight_i * |f_i(S) - f_i(T)| / (sum_k |f_i(S) - f_i(N_k)| + 1e-7), f_i being ReLU layers of VGG19 on images up to
255 without normalisation, N_k the enlarged LQ images of the batch. Reference: Booooooooooo/CSD,
loss/contrast_loss.py and trainer/slim_contrast_trainer.py; there the teacher shares its weights with the student and is
trained beside it.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import nn
from torch.nn import functional as F

from dckd_sr.errors import UserError
from dckd_sr.losses.contrastive_loss import DynamicContrastiveLoss
from dckd_sr.vgg import VGGFeatures


@LOSS_REGISTRY.register()
class CSDLoss(nn.Module):
    """Pulls the student towards the teacher and away from bicubically enlarged inputs, in VGG19's features.

    Args:
        loss_weight: factor of the result. The default is the reference's 200 beside an L1 loss of images up to 255,
            converted to images in [0, 1].
        weights: one number for each of ``LAYERS``, from the finest.
        num_neg: negatives: the first images of the batch, each of them for all images (as the reference draws them).
        pretrain: file with torchvision's weights of VGG19; BasicSR's places if empty.
        allow_random: random features where there is no file; for tests.

    Attributes:
        run: called as ``run(net, images)``; another way to run VGG19 may take its place, but not one in float16,
            whose range the features of images up to 255 may leave.

    Raises:
        UserError: no weights of VGG19, or another number of weights than layers.
    """

    LAYERS = ('relu1_1', 'relu2_1', 'relu3_1', 'relu4_1', 'relu5_1')

    def __init__(
        self,
        loss_weight=200 / 255,
        weights=(1 / 32, 1 / 16, 1 / 8, 1 / 4, 1),
        num_neg=10,
        pretrain=None,
        allow_random=False,
    ):
        super().__init__()
        if len(weights) != len(self.LAYERS):
            raise UserError(
                f'weights of CSDLoss has {len(weights)} entries, not one for each of {", ".join(self.LAYERS)}'
            )
        self.ratio = DynamicContrastiveLoss(weights, loss_weight, margin=None, guard=False)
        self.num_neg = num_neg
        self.vgg = VGGFeatures(self.LAYERS, normalise=False, pretrain=pretrain, allow_random=allow_random)
        self.run = lambda net, images: net(images)

    def contrast(self, student, teacher, lq):
        """The loss of images in [0, 1].

        Args:
            student: (B, C, H, W); gradients flow to it.
            teacher: the same.
            lq: (N, C, h, w), whose first ``num_neg`` images are the negatives; the same ones on all processes.

        Returns:
            0-d tensor, weighted.
        """
        anchor = self.run(self.vgg, student * 255)
        with torch.no_grad():
            # What the reference's torch.nn.Upsample does.
            negatives = F.interpolate(lq[: self.num_neg], size=student.shape[2:], mode='bicubic', align_corners=False)
            others = self.run(self.vgg, torch.cat([teacher, negatives]) * 255)
        batch = len(teacher)
        positive = [level[:batch] for level in others]
        parts = ([level[k : k + 1].expand(batch, -1, -1, -1) for level in others] for k in range(batch, len(others[0])))
        return self.ratio.from_parts(anchor, positive, parts)
