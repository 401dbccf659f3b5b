"""Mixup of whole training batches, as Restormer's ``mixing_augs`` has it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dckd_sr.ops.seeding import seed_of


def partner(row: int, total: int) -> int:
    """The row that a row of an iteration's whole batch is mixed with: rows 2k and 2k + 1 are mixed with each other.

    The order of samples is random, so this is as good as a random partner, and it is nearly always in the same
    micro-batch of the same process. The last row of an odd batch is mixed with itself.
    """
    return row ^ 1 if row ^ 1 < total else row


def missing_partners(rows: Sequence[int], total: int) -> list[int]:
    """Rows of the whole batch that ``rows``, those of one process and micro-batch, are mixed with and do not hold."""
    return sorted({partner(row, total) for row in rows} - set(rows))


def mixup(
    lq: torch.Tensor,
    gt: torch.Tensor,
    beta: float,
    use_identity: bool,
    seed: int,
    *numbers: int,
    rows: Sequence[int] | None = None,
    total: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """w x + (1 - w) x' of each sample x and its `partner` x', with the same w for lq, gt and the whole batch.

    Source: swz30/Restormer, basicsr/models/image_restoration_model.py, `Mixing_Augment`. There every process draws its
    own w, and partners by a random order of its batch.

    Args:
        lq, gt: (B, ...) each; behind the ``rows``, those of `missing_partners`, which are not returned.
        beta: w is drawn once per iteration from Beta(beta, beta).
        use_identity: every other iteration (probability 1/2) nothing is mixed.
        seed, numbers: all draws follow from them, for example from the iteration.
        rows: which rows of the iteration's whole batch these are; all of them by default.
        total: how many rows the whole batch has.

    Returns:
        lq, gt of the rows: new tensors, or the same ones where nothing is mixed.
    """
    rows = range(len(lq)) if rows is None else rows
    total = len(rows) if total is None else total
    # RandomState: numpy keeps its streams over versions, which it does not promise for Generator.
    key = seed_of(seed, 'mixup', *numbers)
    random = np.random.RandomState([key & 0xFFFFFFFF, key >> 32])
    identity, weight, count = random.random_sample() < 0.5, random.beta(beta, beta), len(rows)
    if use_identity and identity:
        return (lq, gt) if len(lq) == count else (lq[:count], gt[:count])
    places = {row: place for place, row in enumerate([*rows, *missing_partners(rows, total)])}
    order = torch.tensor([places[partner(row, total)] for row in rows]).to(lq.device, non_blocking=True)
    return torch.lerp(lq[order], lq[:count], weight), torch.lerp(gt[order], gt[:count], weight)
