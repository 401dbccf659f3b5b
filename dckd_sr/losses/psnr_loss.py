"""NAFNet's training loss: the negative PSNR of each image, averaged over the batch.

Source: megvii-research/NAFNet, basicsr/models/losses/losses.py, `PSNRLoss`.
"""

from __future__ import annotations

import math

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import nn

from dckd_sr.errors import UserError


@LOSS_REGISTRY.register()
class PSNRLoss(nn.Module):
    """loss_weight * mean over the batch of 10 log10(mse + 1e-8): -PSNR in dB for images in [0, 1], at least -80.

    Args:
        loss_weight: factor of the result.
        reduction: 'mean', there is no other.
        toY: compare the Y channel (BT.601, 16..235 of 255) of RGB images.

    Raises:
        UserError: another reduction; toY with images that have not 3 channels.
    """

    def __init__(self, loss_weight=1.0, reduction='mean', toY=False):
        super().__init__()
        if reduction != 'mean':
            raise UserError(f"reduction of PSNRLoss must be mean, not '{reduction}'")
        self.loss_weight = loss_weight
        self.to_y = toY
        # Without its offset of 16, which the difference cancels.
        weights = torch.tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1) / 255
        self.register_buffer('y_weights', weights, persistent=False)

    def forward(self, pred, target):
        """The loss of images (B, C, H, W) in [0, 1].

        Returns:
            0-d tensor, weighted; negative where the mean squared error is below 1.
        """
        difference = pred - target
        if self.to_y:
            if pred.shape[1] != 3:
                raise UserError(f'PSNRLoss: toY needs RGB images, these have {pred.shape[1]} channels')
            difference = (difference * self.y_weights).sum(1, keepdim=True)
        mse = difference.square().mean(dim=(1, 2, 3))
        return self.loss_weight * 10 / math.log(10) * torch.log(mse + 1e-8).mean()
