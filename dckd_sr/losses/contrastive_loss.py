"""The dynamic contrastive loss of DCKD (AAAI 2025), Eq. 5.

sum_i weight_i * |f_i^S - f_i^T| / sum_j |f_i^S - f_ij^Neg|, f_i being the levels of a frozen VQGAN encoder and |.| the
mean over all elements of the batch. Reference: super-SSS/DCKD, `ContrasLoss`; margin, guard and averaging over
processes are ours.

The margin is that of triplet losses, as a factor: a negative must be farther from the anchor than the positive is
(semi-hard negatives; Schroff et al., FaceNet, CVPR 2015). In the first iterations the history is nearly the student, so
that its outputs are no such negatives: the ratio is large, and its gradient can be two hundred times that of a pixel
loss.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from basicsr.utils import get_root_logger
from basicsr.utils.registry import LOSS_REGISTRY
from torch import nn

from dckd_sr.encoder import build_loss_encoder
from dckd_sr.errors import UserError

_EPS = 1e-7  # added to the denominator, as released
_BLOCK = 2**17  # elements
# A mean distance to the negatives below this part of the features' mean magnitude is rounding: equal networks that run
# through different kernels (ops/winograd.py) differ by up to 4e-6.
_LEAST = 3e-5


class _MeanOverRanks(torch.autograd.Function):
    """Average over processes. Its backward is the identity, because DistributedDataParallel averages the gradients."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx, grad):
        return grad


def compare(anchor, others, signs):
    """Distances of the anchor to others, and what their gradient is made of.

    Args:
        anchor: (B, C, h, w).
        others: (N*B, C, h, w), rows j*B to j*B + B - 1 belonging to the anchor's rows.
        signs: what an earlier call returned, or None.

    Returns:
        (sum over j of mean |anchor - other_j|, 0-d; ``signs`` + sum over j of sign(anchor - other_j), int16).
    """
    signs = torch.zeros_like(anchor, dtype=torch.int16) if signs is None else signs
    others = others.split(len(anchor))
    # Half precision has too few digits for a mean of millions.
    dtype = torch.promote_types(anchor.dtype, torch.float32)
    batch, channels, height, width = anchor.shape
    # What a processor's cache holds is compared at a time; a GPU takes all at once.
    rows = max(1, _BLOCK // (batch * channels * width)) if anchor.device.type == 'cpu' else height
    sums = []
    for top in range(0, height, rows):
        ours, place = anchor[:, :, top : top + rows].to(dtype), signs[:, :, top : top + rows]
        for other in others:
            difference = ours - other[:, :, top : top + rows]
            place += difference.sign().to(torch.int16)
            sums.append(difference.abs_().sum())
    return torch.stack(sums).sum() / anchor.numel(), signs


class _Distances(torch.autograd.Function):
    """Per level, the sum over j of mean |anchor - other_j|, for others that come in parts.

    A part may go when the next one comes: of each level only the sum of signs waits for the backward pass, where
    autograd would keep all others and compare each of them again.
    """

    @staticmethod
    def forward(ctx, compare, parts, *anchors):
        totals, signs = [0] * len(anchors), [None] * len(anchors)
        for part in parts:
            for i, (anchor, others) in enumerate(zip(anchors, part)):
                total, signs[i] = compare(anchor, others, signs[i])
                totals[i] = totals[i] + total
        ctx.save_for_backward(*signs)
        ctx.dtypes = [anchor.dtype for anchor in anchors]
        return torch.stack(totals)

    @staticmethod
    def backward(ctx, grad):
        signs = zip(grad.unbind(), ctx.saved_tensors, ctx.dtypes)
        return None, None, *((sign * (factor / sign.numel())).to(dtype) for factor, sign, dtype in signs)


def distances(anchors, parts, compare=compare):
    """Per level, the sum over j of mean |anchor - other_j|, (levels,); gradients flow to the anchors only.

    Args:
        anchors: list over levels of (B, C, h, w).
        parts: iterable of lists over levels of (N*B, C, h, w), each taken once, in turn; see `compare`.
    """
    return _Distances.apply(compare, parts, *anchors)


@LOSS_REGISTRY.register()
class DynamicContrastiveLoss(nn.Module):
    """Pulls the student's features towards the teacher's and away from those of the negatives (Eq. 5).

    Args:
        weights: one number per encoder level, from the finest.
        loss_weight: factor of the result.
        d_func: the distance; 'L1'.
        margin: each level counts by how far its negatives are beyond the teacher, with a factor of
            1 - numerator / (margin * mean distance to the negatives) that is not below 0 and has no gradient. At 1 a
            level is left out while the negatives are nearer to the student than the teacher is: they are no lower
            bound yet. None counts all levels in full, as released.
        guard: leave out a level whose negatives equal the student but for rounding (denominator / N below 3e-5 of the
            features' mean magnitude), where the ratio would explode, and warn once.
        reduce: with several processes, 'global' averages numerators and denominators over them before dividing, so that
            the loss does not depend on how the batch is spread; 'rank' divides on each, as released.
        reduction: 'mean'; the loss is a ratio of means.
        encoder: for use on images (`forward`): type, arguments and ``pretrain`` of the VQGAN.

    After each call ``stats`` holds detached tensors of one number a level, on the device: ``numerator``,
    ``denominator``, and ``left_out``, 1 minus the level's factor. Nothing here waits for the device but `report`.

    Raises:
        UserError: an argument out of its choices, or an encoder with another number of levels than weights.
    """

    def __init__(
        self,
        weights=(1 / 32, 1 / 16, 1 / 8, 1 / 4, 1),
        loss_weight=1.0,
        d_func='L1',
        margin: float | None = 1.0,
        guard=True,
        reduce='global',
        reduction='mean',
        encoder=None,
    ):
        super().__init__()
        for name, value, choices in (
            ('d_func', d_func, ('L1',)),
            ('reduce', reduce, ('global', 'rank')),
            ('reduction', reduction, ('mean',)),
        ):
            if value not in choices:
                raise UserError(f"{name} of the contrastive loss must be {' or '.join(choices)}, not '{value}'")
        if margin is not None and margin <= 0:
            raise UserError(f'margin of the contrastive loss must be above 0, or null to keep all levels, not {margin}')
        self.weights = tuple(weights)
        self.loss_weight = loss_weight
        self.margin = margin
        self.guard = guard
        self.reduce = reduce
        self.stats = {}
        self.encoder = None if encoder is None else build_loss_encoder(encoder)
        self.compare = compare  # a compiled one may take its place
        self.counts = None  # (2, levels) on the device: comparisons since the last report, and what was left out in all
        self.guarded = None  # the same, 0-d: levels left out by the guard
        self._warned = False
        if self.encoder is not None:
            self.check_levels(self.encoder.num_levels)

    def check_levels(self, num_levels):
        """Raise a UserError unless there is one weight for each of so many encoder levels."""
        if num_levels != len(self.weights):
            raise UserError(
                f'weights of the contrastive loss has {len(self.weights)} entries, but the encoder has {num_levels} '
                'levels (the length of its ch_mult): give one weight per level, from the finest'
            )

    def from_levels(self, anchor, positive, negatives):
        """The loss of features.

        Args:
            anchor: list over levels of (B, C, h, w), the student's; gradients flow to it.
            positive: the same of the teacher.
            negatives: the same of (N*B, C, h, w); rows j*B to j*B + B - 1 are negative j of each image of the batch.

        Returns:
            0-d tensor, weighted.

        Raises:
            UserError: no negatives, or another number of levels than weights.
        """
        return self.from_parts(anchor, positive, [negatives])

    def from_parts(self, anchor, positive, parts):
        """`from_levels` for negatives that come in parts: an iterable of such lists, each taken once, in turn."""
        return self._compared(anchor, positive, parts, self.margin)

    def _compared(self, anchor, positive, parts, margin):
        self.check_levels(len(anchor))
        numerators = distances(anchor, [positive], self.compare)
        counted = _Counted(parts, len(anchor[0]))
        denominators = distances(anchor, counted, self.compare)
        magnitudes = torch.stack([level.detach().abs().mean() for level in anchor]).to(numerators.dtype)
        sums = torch.stack([numerators, denominators, magnitudes])
        return self._ratios(sums, counted.num_neg, margin)

    def forward(self, pred, target):
        """The loss of images, as an ordinary BasicSR loss.

        The negatives of an image are the other targets of the batch; in a batch of one it is the target itself, shifted
        cyclically by half its height and width. ``margin`` has no effect here: such negatives are far from each
        other at the start, and a loss that stood alone would begin with no gradient at all.

        Args:
            pred: (B, C, H, W) in [0, 1]; gradients flow to it.
            target: the same, the positives.

        Returns:
            0-d tensor, weighted.

        Raises:
            UserError: the loss was built without ``encoder``.
        """
        if self.encoder is None:
            raise UserError(
                f'{type(self).__name__} compares images through a VQGAN: give it an encoder block '
                '(type, its arguments, pretrain: FILE), or use it as cl_opt of a DCKDModel'
            )
        count = len(target)
        with torch.no_grad():
            height, width = target.shape[2:]
            shifted = [target.roll((height // 2, width // 2), (2, 3))] if count == 1 else []
            others = self.encoder(torch.cat([target, *shifted]), codes=False).levels
        positive = [level[:count] for level in others]
        if count == 1:
            parts = [[level[1:] for level in others]]
        else:  # one after the other, because each is a copy
            parts = ([level.roll(shift, 0) for level in others] for shift in range(1, count))
        return self._compared(self.encoder(pred, codes=False).levels, positive, parts, margin=None)

    def report(self):
        """What there is to log, as lists of one float a level, which waits for the device.

        Returns:
            dict: ``numerator`` and ``denominator`` of the last call, and ``left_out``, the part of the level that did
            not count, a mean over the calls since the last report. Empty before the first comparison. If the guard left
            out any level, one warning a run says so.
        """
        if not self.stats:
            return {}
        values = {name: self.stats[name].tolist() for name in ('numerator', 'denominator')}
        counts = torch.zeros(2, len(self.weights)) if self.counts is None else self.counts
        values['left_out'] = [part / max(1, calls) for calls, part in zip(*counts.tolist())]
        guarded = 0 if self.guarded is None else int(self.guarded)
        self.counts = self.guarded = None
        if guarded and not self._warned:
            self._warned = True
            get_root_logger().warning(
                f'Contrastive loss: a level was left out {guarded} time(s), because the negatives equal the student '
                'there (history network equal to the student, no degradation). guard: false keeps such levels.'
            )
        return values

    def _ratios(self, sums, num_neg, margin):
        if self.reduce == 'global' and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            sums = _MeanOverRanks.apply(sums)
        numerators, denominators, magnitudes = sums.unbind()
        # A NaN compares false and stays in the sum, where it is seen.
        distance = denominators.detach() / num_neg
        guarded = distance < (_LEAST if self.guard else 0) * magnitudes
        # masked_fill takes its number as a kernel argument; torch.where would copy it to the device and wait.
        ratios = (numerators / (denominators + _EPS)).masked_fill(guarded, 0)
        counting = torch.ones_like(distance)
        if margin is not None:
            # A distance of 0 gives no level that counts.
            counting = (1 - numerators.detach() / (margin * distance + _EPS)).clamp(min=0)
            ratios = counting * ratios
        self._log(numerators.detach(), denominators.detach(), (1 - counting).masked_fill(guarded, 1), guarded)
        return self.loss_weight * sum(weight * ratio for weight, ratio in zip(self.weights, ratios.unbind()))

    def _log(self, numerators, denominators, left_out, guarded):
        self.stats = {'numerator': numerators, 'denominator': denominators, 'left_out': left_out}
        counts, guarded = torch.stack([torch.ones_like(left_out), left_out]), guarded.sum()
        self.counts = counts if self.counts is None else self.counts + counts
        self.guarded = guarded if self.guarded is None else self.guarded + guarded


class _Counted:
    """Negatives that come in parts, none of which may be empty; ``num_neg`` counts them, an image's, as they go by."""

    def __init__(self, parts, batch):
        self.parts, self.batch, self.num_neg = parts, batch, 0

    def __iter__(self):
        for part in self.parts:
            if len(part[0]) == 0:
                raise UserError('the contrastive loss needs negatives: num_neg must be 1 or more, or neg_clean true')
            self.num_neg += len(part[0]) // self.batch
            yield part


@LOSS_REGISTRY.register()
class ContrasLoss(DynamicContrastiveLoss):
    """`DynamicContrastiveLoss` under its released name, and as released: without ``margin``."""

    def __init__(
        self,
        weights=(1 / 32, 1 / 16, 1 / 8, 1 / 4, 1),
        loss_weight=1.0,
        d_func='L1',
        margin: float | None = None,
        guard=True,
        reduce='global',
        reduction='mean',
        encoder=None,
    ):
        super().__init__(weights, loss_weight, d_func, margin, guard, reduce, reduction, encoder)
