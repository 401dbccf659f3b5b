"""The order of the training samples: a function of (seed, position), the same for any number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from dckd_sr.ops.mixup import missing_partners
from dckd_sr.ops.seeding import seed_of


class Stage(NamedTuple):
    """A part of a progressive schedule.

    Attributes:
        iterations: its length; the last stage holds for ever, whatever it says.
        batch_size: samples per process.
        gt_size: side of the GT crop; None leaves the dataset's own.
    """

    iterations: int
    batch_size: int
    gt_size: int | None = None


class TrainSampler(Sampler):
    """Endless batch sampler: lists of keys (position, index, gt_size), one list per micro-batch.

    Positions count the samples drawn since iteration 0 over all processes; each pass over the dataset is a new
    permutation made from (seed, pass). With W processes, A micro-batches an iteration and B samples each, iteration t's
    global batch holds B * A * W positions in a row; micro-batch a of rank r takes rows (a * W + r) * B .. + B - 1 of
    it. So W processes of B, or W micro-batches of B, see together what one batch of W * B sees. A batch may cross from
    one pass into the next, also when the dataset is smaller than the batch.

    Args:
        length: number of images.
        stages: B and the crop over time; an int B stands for one stage.
        world_size, rank: W and r.
        start_iteration: iterations already done; the order continues there.
        enlarge_ratio: passes that count as one epoch (BasicSR's dataset_enlarge_ratio); changes the logs only.
        accum_iter: A.
        mixes: mixup is on: samples whose partner another process or micro-batch has come with it. It is loaded twice,
            which odd numbers of B need, once a batch or two. Such batches' keys have a fourth entry: whether the sample
            is the batch's own.

    Raises:
        ValueError: an empty dataset, or numbers that make no sense.
    """

    def __init__(
        self,
        length: int,
        stages: int | Sequence[Stage],
        world_size: int,
        rank: int,
        seed: int,
        start_iteration: int = 0,
        enlarge_ratio: float = 1,
        accum_iter: int = 1,
        mixes: bool = False,
    ):
        stages = [Stage(1, stages)] if isinstance(stages, int) else [Stage(*stage) for stage in stages]
        numbers = [length, world_size, accum_iter, *(n for stage in stages for n in stage[:2])]
        if min(numbers) < 1 or not stages or not 0 <= rank < world_size or start_iteration < 0 or enlarge_ratio <= 0:
            raise ValueError(
                f'length {length}, stages {stages}, world_size {world_size}, rank {rank}, accum_iter {accum_iter}, '
                f'start_iteration {start_iteration}, enlarge_ratio {enlarge_ratio}'
            )
        self.length, self.stages, self.seed = length, stages, seed
        self.world_size, self.rank, self.accum_iter = world_size, rank, accum_iter
        self.start_iteration, self.mixes = start_iteration, mixes
        self.iterations_per_epoch = math.ceil(length * enlarge_ratio / (stages[0].batch_size * world_size * accum_iter))
        self._orders: dict[int, np.ndarray] = {}
        # RandomState: numpy keeps its streams over versions, which it does not promise for Generator.
        self._random = np.random.RandomState(0)

    def __iter__(self) -> Iterator[list[tuple]]:
        iteration = self.start_iteration
        while True:
            for micro in range(self.accum_iter):
                yield self.keys(iteration, micro)
            iteration += 1

    def stage(self, iteration: int) -> tuple[int, int]:
        """Number of the stage that holds after ``iteration`` iterations, and the iteration at which it began."""
        began = 0
        for number, stage in enumerate(self.stages[:-1]):
            if iteration < began + stage.iterations:
                return number, began
            began += stage.iterations
        return len(self.stages) - 1, began

    def keys(self, iteration: int, micro: int = 0) -> list[tuple]:
        """The keys of this rank's micro-batch of the iteration that follows ``iteration`` iterations."""
        number, began = self.stage(iteration)
        group = self.world_size * self.accum_iter
        done = sum(stage.iterations * stage.batch_size for stage in self.stages[:number]) * group
        size, gt_size = self.stages[number].batch_size, self.stages[number].gt_size
        first, begin = done + (iteration - began) * group * size, (micro * self.world_size + self.rank) * size
        rows = range(begin, begin + size)
        keys = [(first + row, self._index(first + row), gt_size) for row in rows]
        extra = missing_partners(rows, group * size) if self.mixes else []
        if not extra:
            return keys
        return [(*key, True) for key in keys] + [
            (first + row, self._index(first + row), gt_size, False) for row in extra
        ]

    def _index(self, position):
        turn, row = divmod(position, self.length)
        if turn not in self._orders:
            for old in [known for known in self._orders if known < turn - 1]:
                del self._orders[old]
            key = seed_of(self.seed, 'order', turn)
            self._random.seed([key & 0xFFFFFFFF, key >> 32])
            self._orders[turn] = self._random.permutation(self.length)
        return int(self._orders[turn][row])
