"""Learning rate schedules by the names that option files use: BasicSR's, NAFNet's, Restormer's and torch's.

All are stepped once per iteration.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR, MultiStepRestartLR, get_position_from_periods
from torch.optim import lr_scheduler

from dckd_sr.errors import UserError

# torch's classes that need functions, other schedules or a measured loss; and MultiStepLR, which is BasicSR's here.
UNFIT = ('LRScheduler', 'LambdaLR', 'MultiplicativeLR', 'SequentialLR', 'ChainedScheduler', 'ReduceLROnPlateau')


class CosineAnnealingRestartCyclicLR(CosineAnnealingRestartLR):
    """Cosine annealing in cycles, each with a least rate of its own (Restormer, basicsr/models/lr_scheduler.py).

    At iteration t of cycle i, which began at s_i: eta_i + w_i / 2 (lr - eta_i) (1 + cos(pi (t - s_i) / T_i)). A cycle
    holds its last iteration, s_i + T_i, too. Where eta_i is the initial rate, the cycle is constant.

    Args:
        periods: T, lengths of the cycles in iterations; a step beyond their sum fails.
        restart_weights: w.
        eta_mins: eta.

    Raises:
        UserError: lists of different lengths.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        periods: Sequence[int],
        restart_weights: Sequence[float] = (1,),
        eta_mins: Sequence[float] = (0,),
        last_epoch: int = -1,
    ):
        if not len(periods) == len(restart_weights) == len(eta_mins):
            raise UserError(
                f'CosineAnnealingRestartCyclicLR: {len(periods)} periods, {len(restart_weights)} restart_weights and '
                f'{len(eta_mins)} eta_mins; expected as many of each'
            )
        self.eta_mins = eta_mins
        super().__init__(optimizer, periods, restart_weights, last_epoch=last_epoch)

    def get_lr(self):
        self.eta_min = self.eta_mins[get_position_from_periods(self.last_epoch, self.cumulative_period)]
        return super().get_lr()


def _fitting():
    classes = {name: cls for name, cls in vars(lr_scheduler).items() if inspect.isclass(cls) and name[0] != '_'}
    return {
        name: cls
        for name, cls in classes.items()
        if issubclass(cls, lr_scheduler.LRScheduler) and name not in UNFIT and cls.__module__ == lr_scheduler.__name__
    }


SCHEDULERS = {
    **_fitting(),
    'MultiStepLR': MultiStepRestartLR,
    'MultiStepRestartLR': MultiStepRestartLR,
    'CosineAnnealingRestartLR': CosineAnnealingRestartLR,
    'CosineAnnealingRestartCyclicLR': CosineAnnealingRestartCyclicLR,
    # NAFNet's name: in its BasicSR, CosineAnnealingLR was taken.
    'TrueCosineAnnealingLR': lr_scheduler.CosineAnnealingLR,
}
