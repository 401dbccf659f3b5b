"""Where networks are, on machines with other devices than this one."""

import types

import pytest
import torch

from dckd_sr import devices


@pytest.mark.parametrize(
    ('opt', 'kind'),
    [
        ({}, 'cpu'),
        ({'num_gpu': 1}, 'cpu'),
        ({'device': 'cpu', 'num_gpu': 1}, 'cpu'),
        ({'device': 'mps', 'num_gpu': 1}, 'mps'),
        ({'device': 'xpu'}, 'xpu'),
    ],
)
def test_without_cuda(opt, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert devices.of(opt) == torch.device(kind)


def test_with_cuda(gpu):
    assert devices.of({}) == devices.of({'num_gpu': 2, 'device': 'cuda'}) == torch.device('cuda', 0)
    assert devices.of({'num_gpu': 0}) == devices.of({'device': 'cpu'}) == torch.device('cpu')
    assert devices.available() == ['cpu', 'cuda']


@pytest.mark.parametrize('kind', ['cuda', 'mps', 'xpu'])
def test_waiting_and_generators_are_those_of_the_device(kind, monkeypatch):
    done, device = [], torch.device(kind)
    module = types.SimpleNamespace(
        synchronize=lambda: done.append('waited'),
        get_rng_state=lambda *which: ('state', *which),
        set_rng_state=lambda state, *which: done.append((state, *which)),
    )
    monkeypatch.setattr(torch, 'get_device_module', lambda device: module)
    devices.wait(device)
    state = devices.generator_state(device)
    devices.set_generator_state(state, device)
    where = () if kind == 'mps' else (device,)
    assert done == ['waited', (('state', *where), *where)]


def test_the_cpu_needs_none():
    devices.wait(torch.device('cpu'))
    assert devices.generator_state(torch.device('cpu')) is None
