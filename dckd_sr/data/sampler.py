"""The order of the training samples: a function of (seed, position), the same for any number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from dckd_sr.ops.seeding import seed_of


class TrainSampler(Sampler):
    """Endless sampler of (position, index).

    Positions count the samples drawn since iteration 0 over all processes; each pass over the dataset is a new
    permutation made from (seed, pass). Iteration t's global batch holds positions t * B * W .. (t + 1) * B * W - 1 and
    rank r takes rows r * B .. r * B + B - 1 of it, so W processes of B see together what one of W * B sees. A batch may
    cross from one pass into the next, also when the dataset is smaller than the batch.

    Args:
        length: number of images.
        batch_size: B, per process.
        world_size, rank: W and r.
        start_iteration: iterations already done; the order continues there.
        enlarge_ratio: passes that count as one epoch (BasicSR's dataset_enlarge_ratio); changes the logs only.

    Raises:
        ValueError: an empty dataset, or numbers that make no sense.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        world_size: int,
        rank: int,
        seed: int,
        start_iteration: int = 0,
        enlarge_ratio: float = 1,
    ):
        if length < 1 or batch_size < 1 or not 0 <= rank < world_size or start_iteration < 0 or enlarge_ratio <= 0:
            raise ValueError(
                f'length {length}, batch_size {batch_size}, world_size {world_size}, rank {rank}, '
                f'start_iteration {start_iteration}, enlarge_ratio {enlarge_ratio}'
            )
        self.length, self.batch_size = length, batch_size
        self.world_size, self.rank = world_size, rank
        self.seed, self.start_iteration = seed, start_iteration
        self.iterations_per_epoch = math.ceil(length * enlarge_ratio / (batch_size * world_size))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        current, order, iteration = -1, None, self.start_iteration
        while True:
            first = (iteration * self.world_size + self.rank) * self.batch_size
            for position in range(first, first + self.batch_size):
                turn, row = divmod(position, self.length)
                if turn != current:
                    current, order = turn, self._permutation(turn)
                yield position, int(order[row])
            iteration += 1

    def _permutation(self, turn):
        # RandomState: numpy keeps its streams over versions, which it does not promise for Generator.
        key = seed_of(self.seed, 'order', turn)
        return np.random.RandomState([key & 0xFFFFFFFF, key >> 32]).permutation(self.length)
