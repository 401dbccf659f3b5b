"""The gate before the optimisers, against plain torch."""

import copy
import inspect

import pytest
import torch
from torch import nn

from dckd_sr.ops import stepping
from dckd_sr.ops.history import average_
from dckd_sr.ops.stepping import Stepping
from dckd_sr.option_checks import optimizers


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3))


def train(net, steps, batches, optimizer, micro_batches=1):
    """Iterations as BasicSR's models run them: zero_grad, backward, step, once per micro-batch."""
    for number, batch in enumerate(batches):
        steps.begin(number // micro_batches + 1, number % micro_batches)
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize('clip', [None, 0.05])
def test_micro_batches_equal_one_batch(clip):
    data = torch.rand(3, 6, 1, 9, 9)
    nets = [network(), network()]
    for net, parts in zip(nets, (1, 3)):
        steps = Stepping(parts, clip)
        optimizer = steps.attach(torch.optim.Adam(net.parameters(), 0.01))
        train(net, steps, [part for batch in data for part in batch.chunk(parts)], optimizer, parts)
    for a, b in zip(*(net.parameters() for net in nets)):
        assert torch.allclose(a, b, atol=1e-6)
    assert not torch.equal(next(nets[0].parameters()), next(network().parameters()))


def test_clipping_is_torchs():
    data, (ours, theirs) = torch.rand(4, 2, 1, 9, 9), (network(), network())
    steps = Stepping(1, 0.01)
    train(ours, steps, data, steps.attach(torch.optim.SGD(ours.parameters(), 0.1)))
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    for batch in data:
        optimizer.zero_grad()
        theirs(batch).square().mean().backward()
        assert nn.utils.clip_grad_norm_(theirs.parameters(), 0.01) > 0.01
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
def test_nothing_that_is_not_finite_passes(value, fused):
    net, steps = network(), Stepping()
    optimizer = steps.attach(torch.optim.Adam(net.parameters(), 0.01, fused=fused))
    data = torch.rand(2, 1, 9, 9)
    train(net, steps, [data], optimizer)
    before, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    spoilt = data.clone()
    spoilt[0, 0, 0, 0] = value
    train(net, steps, [spoilt], optimizer)
    assert not steps.ok and all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(
        torch.equal(torch.as_tensor(old), torch.as_tensor(optimizer.state_dict()['state'][number][key]))
        for number, entry in state['state'].items()
        for key, old in entry.items()
    )
    train(net, steps, [data], optimizer)
    assert steps.ok and not torch.equal(before['0.weight'], net.state_dict()['0.weight'])


def test_schedulers_take_a_gated_optimizer():
    net, steps = network(), Stepping()
    optimizer = steps.attach(torch.optim.SGD(net.parameters(), 0.1))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1])
    train(net, steps, [torch.rand(1, 1, 9, 9)], optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0.01)


def test_the_log_averages_micro_batches_and_finds_what_was_not_finite():
    steps = Stepping(2)
    for iteration, (first, second) in enumerate([(1.0, 3.0), (2.0, torch.nan), (5.0, 7.0)], 1):
        steps.begin(iteration, 0)
        steps.record({'l_pix': torch.tensor(first)})
        steps.begin(iteration, 1)
        mean = steps.record({'l_pix': torch.tensor(second)})
    assert float(mean['l_pix']) == 6
    steps.begin(4)
    steps.ok = torch.tensor(False)
    steps.record({'l_pix': torch.tensor(1.0)})
    bad, looked = steps.take()
    assert [(step.iteration, step.micro) for step in bad] == [(2, 1), (4, 0)] and len(looked) == 7
    assert steps.take() == ([], [])


@pytest.mark.parametrize('ok', [True, False])
def test_averages_by_a_flag_on_the_device(ok):
    source, plain = network(), network()
    nn.init.ones_(source[0].weight)
    gated = copy.deepcopy(plain)
    average_(plain, source, 0.9, ok)
    average_(gated, source, 0.9, torch.tensor(ok))
    for a, b in zip(plain.parameters(), gated.parameters()):
        assert torch.allclose(a, b, atol=1e-7)
    assert torch.equal(plain[0].weight, network()[0].weight) is not ok


OPTIMIZERS = sorted(optimizers())


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('bad', [0, 1, 2])
def test_a_step_that_is_left_out_on_the_device_never_was(name, bad, monkeypatch):
    """The device decides, and nobody reads what: weights and averages are those of a run without that batch."""
    monkeypatch.setattr(stepping, '_at_hand', lambda tensor: False)
    cls, batches = optimizers()[name], torch.rand(4, 2, 1, 9, 9)
    options = {'momentum': 0.9} if name in ('SGD', 'RMSprop') else {}
    nets, states = [], []
    for number in (0, 1):
        net, steps = network(), Stepping()
        optimizer = steps.attach(cls(net.parameters(), 0.01, **options))
        mixed = [*batches[:bad], *([batches[0] * torch.nan] if number else []), *batches[bad:]]
        train(net, steps, mixed, optimizer)
        nets.append(net)
        states.append([value for state in optimizer.state.values() for value in state.values()])
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.equal(a, b)
    for a, b in zip(*states):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert not torch.equal(next(nets[0].parameters()), next(network().parameters()))


@pytest.mark.parametrize('at_hand', [True, False])
def test_fused_sgd_survives_a_first_step_that_is_left_out(at_hand, monkeypatch):
    """torch's kernel starts the momentum in that step, from memory that nobody has written to."""
    monkeypatch.setattr(stepping, '_at_hand', lambda tensor: at_hand)
    nets = []
    for first in ([], [torch.full((2, 1, 9, 9), torch.nan)]):
        net, steps = network(), Stepping()
        optimizer = steps.attach(torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, fused=True))
        train(net, steps, [*first, torch.ones(2, 1, 9, 9), torch.ones(2, 1, 9, 9)], optimizer)
        nets.append(net)
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets)))


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('given', [{}, {'foreach': True}, {'fused': False}, {'capturable': True}, {'momentum': 0.9}])
def test_no_optimiser_waits_for_the_device(gpu, name, given):
    cls = optimizers()[name]
    if set(given) - set(inspect.signature(cls).parameters):
        pytest.skip(f'{name} has no {"".join(given)}')
    net, steps = network().to('cuda'), Stepping(grad_clip=0.1)
    settings = stepping.device_settings(cls, torch.device('cuda'), given)
    optimizer = steps.attach(cls(net.parameters(), lr=0.01, **settings, **given))
    for _ in range(2):
        gpu.found.clear()
        train(net, steps, [torch.rand(2, 1, 9, 9, device='cuda')], optimizer)
    waits = {what for what, _ in gpu.found}
    assert waits == ({'item'} if name in ('Adafactor', 'Adagrad') else set())  # these count their steps on the host


def test_fused_where_the_kernels_are(gpu):
    cuda, adam = torch.device('cuda'), torch.optim.Adam
    assert stepping.device_settings(adam, cuda, {}) == {'fused': True}
    assert stepping.device_settings(adam, cuda, {'foreach': True}) == {'capturable': True}
    assert stepping.device_settings(adam, cuda, {'fused': True}) == {}
    assert stepping.device_settings(torch.optim.SGD, cuda, {}) == {}
    assert stepping.device_settings(torch.optim.NAdam, cuda, {}) == {'capturable': True}
    assert stepping.device_settings(torch.optim.NAdam, torch.device('mps'), {}) == {}
    assert stepping.device_settings(adam, torch.device('cpu'), {}) == {}


def test_a_kind_of_device_without_fused_kernels():
    class Adam(torch.optim.Adam):
        def __init__(self, params, fused=False):
            raise RuntimeError('`fused=True` requires all the params to be floating point Tensors of supported devices')

    assert stepping.device_settings(Adam, torch.device('meta'), {}) == {}


def test_only_kernels_that_heed_found_inf_are_told():
    class Deaf(torch.optim.Adam):
        def step(self):
            del self.grad_scale, self.found_inf
            super().step()

    cpu = torch.device('cpu')  # which has fused kernels, too
    assert stepping._leaves_steps_out(torch.optim.Adam, cpu) and stepping._leaves_steps_out(torch.optim.AdamW, cpu)
    assert not stepping._leaves_steps_out(Deaf, cpu)
