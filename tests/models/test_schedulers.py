"""Learning rates over iterations, as models set them, against formulas written out per iteration."""

import inspect
import math

import option_files
import pytest
import torch
from basicsr.models.base_model import BaseModel

from dckd_sr import checkpoint
from dckd_sr.errors import UserError
from dckd_sr.ops.schedulers import SCHEDULERS, CosineAnnealingRestartCyclicLR

LR = 3e-4
RESTORMER = {
    'type': 'CosineAnnealingRestartCyclicLR',
    'periods': [5, 12],
    'restart_weights': [1, 1],
    'eta_mins': [LR, 1e-6],
}


def model(scheduler, lr=LR):
    result = BaseModel({'num_gpu': 0, 'is_train': True, 'dist': False, 'train': {'scheduler': scheduler}})
    result.optimizers = [result.get_optimizer('AdamW', [torch.nn.Parameter(torch.zeros(1))], lr=lr)]
    result.setup_schedulers()
    return result


def rates(model, iterations, warmup_iter=-1, start=1):
    """The rate that each iteration's step would use."""
    result = []
    for iteration in range(start, iterations + 1):
        model.update_learning_rate(iteration, warmup_iter)
        result += model.get_current_learning_rate()
        model.optimizers[0].step()
    return result


def cosine(t, length, least, weight=1, lr=LR):
    return least + weight * (lr - least) * (1 + math.cos(math.pi * t / length)) / 2


def cycles(t, periods, weights, leasts):
    """Restormer's formula: cycle by cycle, each with its own least rate."""
    start = 0
    for period, weight, least in zip(periods, weights, leasts):
        if t <= start + period:
            return cosine(t - start, period, least, weight)
        start += period
    raise AssertionError(t)


@pytest.mark.parametrize('name', ['TrueCosineAnnealingLR', 'CosineAnnealingLR'])
def test_nafnets_cosine(name):
    found = rates(model({'type': name, 'T_max': 40, 'eta_min': 1e-7}), 40)
    assert found == pytest.approx([cosine(t, 40, 1e-7) for t in range(40)], rel=1e-9)
    assert found[0] == LR and found[-1] < 1e-6


@pytest.mark.parametrize(
    'periods, weights, leasts', [([5, 12], [1, 1], [LR, 1e-6]), ([4, 3, 6], [1, 0.5, 0.25], [1e-5, 0, 1e-7])]
)
def test_restormers_cycles(periods, weights, leasts):
    options = {'periods': periods, 'restart_weights': weights, 'eta_mins': leasts}
    found = rates(model({'type': 'CosineAnnealingRestartCyclicLR', **options}), sum(periods))
    assert found == pytest.approx([cycles(t, periods, weights, leasts) for t in range(sum(periods))], rel=1e-12)


def test_restormers_first_cycle_is_constant_and_the_last_ends_at_its_least_rate():
    found = rates(model(RESTORMER), 18)
    assert found[:6] == pytest.approx([LR] * 6)
    assert found[6] < LR and found[-1] == pytest.approx(1e-6)


def test_lists_of_different_lengths_are_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    with pytest.raises(UserError, match='2 periods, 1 restart_weights and 1 eta_mins'):
        CosineAnnealingRestartCyclicLR(optimizer, [1, 2])


@pytest.mark.parametrize(
    'scheduler',
    [
        {'type': 'TrueCosineAnnealingLR', 'T_max': 30, 'eta_min': 1e-7},
        {'type': 'MultiStepLR', 'milestones': [12], 'gamma': 0.5},
        {'type': 'ExponentialLR', 'gamma': 0.9},
        RESTORMER,
    ],
)
def test_warm_up_leaves_no_trace_in_what_follows(scheduler):
    plain, warmed = rates(model(scheduler), 17), rates(model(scheduler), 17, warmup_iter=8)
    assert warmed[:7] == pytest.approx([LR * t / 8 for t in range(1, 8)])
    assert warmed[7:] == plain[7:]


@pytest.mark.parametrize('name', sorted(SCHEDULERS))
def test_every_schedule_runs_by_name_and_resumes_from_a_state_file(name, tmp_path):
    values = {
        'periods': [9],
        'milestones': [3],
        'T_max': 9,
        'T_0': 3,
        'step_size': 3,
        'gamma': 0.5,
        'base_lr': 1e-4,
        'max_lr': 1e-3,
    }
    options = {'total_steps': 9} if name == 'OneCycleLR' else {}
    needed = inspect.signature(SCHEDULERS[name]).parameters.values()
    needed = [p.name for p in needed if p.default is p.empty and p.name != 'optimizer']
    scheduler = {'type': name, **{key: values[key] for key in needed}, **options}
    whole, first = rates(model(scheduler), 8), model(scheduler)
    head = rates(first, 4)
    states = [first.optimizers[0].state_dict(), first.schedulers[0].state_dict()]
    checkpoint.write(checkpoint._plain(states), tmp_path / 'a.state')
    second = model(scheduler)
    optimizer, schedule = torch.load(tmp_path / 'a.state', weights_only=True)
    second.optimizers[0].load_state_dict(optimizer)
    second.schedulers[0].load_state_dict(schedule)
    assert head + rates(second, 8, start=5) == pytest.approx(whole, rel=1e-12)
    assert scheduler['type'] == name  # BasicSR would have taken it out


CYCLES = {**RESTORMER, 'periods': [5, 5]}


@pytest.mark.parametrize(
    'scheduler, problem',
    [
        ({**CYCLES, 'eta_mins': [0]}, 'eta_mins = [0]: expected as many values as periods has'),
        ({**CYCLES, 'eta_mins': 0}, 'eta_mins = 0: expected a list'),
        ({**CYCLES, 'periods': [5, 0]}, 'periods = [5, 0]: expected a list of numbers above 0'),
        ({**CYCLES, 'periods': [5, 4]}, 'periods = [5, 4]: they end before total_iter = 10'),
        ({'type': 'TrueCosineAnnealingLR', 'T_max': 0}, 'T_max = 0: expected a number above 0'),
        ({'type': 'TrueCosineAnnealingLR', 'T_max': 'all'}, 'T_max = all: expected a number above 0'),
        ({'type': 'TrueCosineAnnealingLR'}, 'T_max: missing; TrueCosineAnnealingLR needs it'),
        (
            {'type': 'TrueCosineAnnealingLR', 'T_max': 10, 'eta': 0},
            'eta = 0: unknown argument of TrueCosineAnnealingLR',
        ),
        ({'type': 'StepLR', 'step_size': False}, 'step_size = false: expected a number above 0'),
        ({'type': 'OneCycleLR', 'max_lr': 1, 'total_steps': 9}, 'total_steps = 9: they end before total_iter = 10'),
        ({'type': 'LambdaLR'}, 'type = LambdaLR: no such schedule'),
        ({'type': 'TrueCosineAnealingLR'}, "no such schedule (did you mean 'TrueCosineAnnealingLR'?)"),
    ],
)
def test_mistakes_in_a_schedule_are_found_before_training(tmp_path, scheduler, problem):
    option_files.make_files(tmp_path)
    opt = option_files.dckd()
    opt['train'].update(scheduler=scheduler, total_iter=10)
    problems = option_files.problems_of(opt)
    assert len(problems) == 1 and problems[0].startswith('train.scheduler.') and problem in problems[0]


@pytest.mark.parametrize(
    'scheduler',
    [CYCLES, {'type': 'TrueCosineAnnealingLR', 'T_max': 10}, {'type': 'OneCycleLR', 'max_lr': 1, 'total_steps': 10}],
)
def test_schedules_without_mistakes_pass_silently(tmp_path, scheduler):
    option_files.make_files(tmp_path)
    opt = option_files.dckd()
    opt['train'].update(scheduler=scheduler, total_iter=10)
    assert not [warning for warning in option_files.load(opt)[1] if 'scheduler' in warning]


def test_a_cosine_that_rises_again_is_said(tmp_path):
    option_files.make_files(tmp_path)
    opt = option_files.dckd()
    opt['train'].update(scheduler={'type': 'TrueCosineAnnealingLR', 'T_max': 9}, total_iter=10)
    assert any('T_max = 9: below total_iter = 10; the rate rises' in warning for warning in option_files.load(opt)[1])
