"""Spatial affinity of feature maps (FAKD: Feature-Affinity Based Knowledge Distillation, ICIP 2020).

A = n^T n with the columns of a feature map (C, hw), divided by their norms; sum over maps of mean |A_S - A_T|.
Reference: vincent-hezb/FAKD, code/feature_transformation.py and code/loss.py.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import nn
from torch.nn import functional as F

from dckd_sr.errors import UserError

_EPS = 1e-8  # added to the norms
_BLOCK = {'cpu': 2**20, 'cuda': 2**26}  # entries of affinity matrices at a time


class _AffinityDistance(torch.autograd.Function):
    """mean |s^T s - t^T t| for (B, C, L) and (B, C', L), without ever holding an (L, L) matrix.

    A block of rows at a time is computed, compared and turned into its part of the gradient, 2 s sign(s^T s - t^T t)
    (the difference is symmetric); only the gradient, (B, C, L), waits for the backward pass.
    """

    @staticmethod
    def forward(ctx, student, teacher):
        batch, _, length = student.shape
        rows = max(1, _BLOCK.get(student.device.type, 2**22) // (batch * length))
        count, totals, gradients = batch * length * length, [], []
        for first in range(0, length, rows):
            difference = student[:, :, first : first + rows].transpose(1, 2) @ student  # (B, rows, L)
            difference.baddbmm_(teacher[:, :, first : first + rows].transpose(1, 2), teacher, alpha=-1)
            if ctx.needs_input_grad[0]:
                gradients.append(student @ difference.sign().transpose(1, 2))  # (B, C, rows)
            totals.append(difference.abs_().sum())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients, 2) * (2 / count))
        return torch.stack(totals).sum() / count

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None


def affinity_distance(student, teacher):
    """mean |A_S - A_T| of feature columns (B, C, L) and (B, C', L); 0-d, float32, gradients flow to the student's."""
    return _AffinityDistance.apply(_normalised(student), _normalised(teacher.detach()))


def _normalised(columns):
    columns = columns.float()
    return columns / (torch.linalg.vector_norm(columns, dim=1, keepdim=True) + _EPS)


@LOSS_REGISTRY.register()
class SpatialAffinityLoss(nn.Module):
    """Makes positions of the student's feature maps as alike to each other as they are in the teacher's.

    Where a map is scaled by a number the loss stays; the two networks may have other numbers of channels.

    Args:
        student: paths of modules of the student, such as [body.1, body.3, upsample:input]; see `ops.taps.Taps`. The
            caller reads them.
        teacher: as many of the teacher, in the same order.
        loss_weight: factor of the result. The default is the reference's 10 beside 0.5 |S - y| + 0.5 |S - T| on images
            up to 255, converted to images in [0, 1] beside |S - y| + |S - T|.
        pool_size: maps are averaged over squares of this many pixels first; for less memory and time.

    Raises:
        UserError: no paths, or another number of the teacher's than of the student's.
    """

    def __init__(self, student, teacher, loss_weight=20 / 255, pool_size=1):
        super().__init__()
        paths = ([given] if isinstance(given, str) else list(given) for given in (student, teacher))
        self.student, self.teacher = paths
        if not self.student or len(self.student) != len(self.teacher):
            raise UserError(f'fakd_opt compares as many maps of the student as of the teacher: {student}, {teacher}')
        self.loss_weight = loss_weight
        self.pool_size = pool_size

    def from_maps(self, student, teacher, size=None):
        """The loss of feature maps.

        Args:
            student: list of (B, C, h, w), or of (B, h*w, C) tokens, as window attention has them; gradients flow to it.
            teacher: the same with as many positions; another C is fine. Images beyond the student's are passed over.
            size: (h, w) of tokens, for ``pool_size``.

        Returns:
            0-d tensor, weighted.

        Raises:
            UserError: maps of other sizes, or neither of these shapes.
        """
        total = 0
        for path, other, ours, theirs in zip(self.student, self.teacher, student, teacher):
            ours, theirs = self._columns(ours, path, size), self._columns(theirs[: len(ours)], other, size)
            if ours.shape[2] != theirs.shape[2]:
                raise UserError(
                    f'fakd_opt compares position by position, but {path} of the student has {ours.shape[2]} of them, '
                    f'and {other} of the teacher {theirs.shape[2]}'
                )
            total = total + affinity_distance(ours, theirs)
        return self.loss_weight * total

    def _columns(self, value, path, size):
        """(B, C, positions)."""
        tokens = value.dim() == 3
        pooled_tokens = tokens and self.pool_size > 1
        if value.dim() not in (3, 4) or (pooled_tokens and (size is None or value.shape[1] != size[0] * size[1])):
            raise UserError(f'fakd_opt: {path} gives {tuple(value.shape)}, which is no feature map (B, C, h, w)')
        if tokens:
            value = value.transpose(1, 2)
            value = value.unflatten(2, size) if self.pool_size > 1 else value
        if self.pool_size > 1:
            value = F.avg_pool2d(value, self.pool_size, ceil_mode=True)
        return value.flatten(2)
