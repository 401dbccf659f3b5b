"""Invertible augmentations for label consistency (released ``noising``): student(x) follows F^-1(teacher(F(x))).

Order: i inverts the colours (1 - x), h flips dimension -2, v flips dimension -1, t transposes; undone in reverse.
"""

from __future__ import annotations

import random

import torch

from dckd_sr.errors import UserError
from dckd_sr.ops.seeding import seed_of

OPERATIONS = ('i', 'h', 'v', 't')


def draw_flags(
    prob: float, batch: int, seed: int, iteration: int, first_index: int = 0, purpose: str = 'lcr'
) -> dict[str, torch.Tensor]:
    """Decide for every sample and operation, each with probability ``prob``, keyed by the global sample index.

    Draws of another ``purpose`` are other draws.

    Returns:
        {'i', 'h', 'v', 't'} -> bool tensor (batch,) on the CPU.
    """
    rows = []
    for sample in range(first_index, first_index + batch):
        u = random.Random(seed_of(seed, purpose, iteration, sample)).random
        rows.append([u() < prob for _ in OPERATIONS])
    table = torch.tensor(rows, dtype=torch.bool).reshape(batch, len(OPERATIONS))
    return {op: table[:, column].clone() for column, op in enumerate(OPERATIONS)}


def augment(x: torch.Tensor, flags: dict[str, torch.Tensor]) -> torch.Tensor:
    """F(x): a new tensor (B, C, h, w), values in [0, 1].

    Raises:
        UserError: a transposition is asked for and the patches are not square.
    """
    return _in_order(x, flags, OPERATIONS)


def invert(x: torch.Tensor, flags: dict[str, torch.Tensor]) -> torch.Tensor:
    """F^-1(x) for the same flags, at any scale: ``invert(augment(x, flags), flags)`` equals x (i up to rounding)."""
    return _in_order(x, flags, OPERATIONS[::-1])


def _in_order(x, flags, operations):
    if x.shape[-1] != x.shape[-2] and bool(flags['t'].any()):
        raise UserError(
            f'label consistency (lcr_opt, dukd_opt) transposes patches, which must be square, but they are '
            f'{x.shape[-2]}x{x.shape[-1]}: use square crops or remove the block'
        )
    # Both branches for every sample, then a choice: no index list, so the host never waits for the device.
    on_device = {op: flags[op].to(x.device, non_blocking=True).view(-1, 1, 1, 1) for op in operations}
    for op in operations:
        if op == 't' and x.shape[-1] != x.shape[-2]:
            continue
        x = torch.where(on_device[op], _apply(op, x), x)
    return x


def _apply(op, x):
    if op == 'i':
        return 1 - x
    if op == 'h':
        return x.flip(-2)
    if op == 'v':
        return x.flip(-1)
    return x.transpose(-2, -1)
