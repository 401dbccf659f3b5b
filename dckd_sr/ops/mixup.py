"""Mixup of whole training batches, as Restormer's ``mixing_augs`` has it."""

from __future__ import annotations

import numpy as np
import torch

from dckd_sr.ops.seeding import seed_of


def mixup(
    lq: torch.Tensor, gt: torch.Tensor, beta: float, use_identity: bool, seed: int, *numbers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """w x + (1 - w) x[shuffled along the batch], with the same w and order for lq and gt.

    Source: swz30/Restormer, basicsr/models/image_restoration_model.py, `Mixing_Augment`.

    Args:
        lq, gt: (B, ...) each.
        beta: w is drawn once per batch from Beta(beta, beta).
        use_identity: every other batch (probability 1/2) stays as it is.
        seed, numbers: all draws follow from them, for example from the iteration and the rank.

    Returns:
        lq, gt: new tensors, or the same ones where nothing is mixed.
    """
    # RandomState: numpy keeps its streams over versions, which it does not promise for Generator.
    key = seed_of(seed, 'mixup', *numbers)
    random = np.random.RandomState([key & 0xFFFFFFFF, key >> 32])
    identity, weight, order = random.random_sample() < 0.5, random.beta(beta, beta), random.permutation(len(lq))
    if use_identity and identity:
        return lq, gt
    order = torch.from_numpy(order).to(lq.device)
    return torch.lerp(lq[order], lq, weight), torch.lerp(gt[order], gt, weight)
