"""Randomness as a function: every draw is made from (seed, purpose, numbers), never from a shared stream.

So a draw depends neither on the number of workers or processes nor on what was drawn before it.
"""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, purpose: str, *numbers: int) -> int:
    """Hash (seed, purpose, numbers) to an integer in [0, 2**63).

    The same on every platform and in every version of Python. ``purpose`` keeps draws of different kinds apart, such as
    'data', 'neg' or 'lcr'; ``numbers`` are for example the iteration and the global sample index.
    """
    text = '\0'.join([str(int(seed)), purpose, *(str(int(n)) for n in numbers)])
    digest = hashlib.blake2b(text.encode('utf-8'), digest_size=8).digest()
    return int.from_bytes(digest, 'big') >> 1


def generator(device: torch.device | str, seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A new torch generator on ``device``, seeded by ``seed_of``. Streams differ between CPU and CUDA."""
    return torch.Generator(device=device).manual_seed(seed_of(seed, purpose, *numbers))
