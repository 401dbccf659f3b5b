"""The GPU that is not there: what is seen on it."""

import subprocess

import pytest
import torch

from dckd_sr import fake_gpu
from dckd_sr.errors import UserError


def test_gradients_are_on_the_device(gpu):
    x = torch.rand(2, 3, device='cuda', requires_grad=True)
    net = torch.nn.Linear(3, 4).to('cuda')
    gpu.found.clear()  # its weights were copied
    net(x).square().sum().backward()
    assert x.grad.device == net.weight.grad.device == torch.device('cuda', 0)
    assert net.weight.grad.shape == (4, 3) and not gpu.found


def test_devices_must_not_mix(gpu):
    with pytest.raises(RuntimeError, match='device'):
        torch.rand(3, device='cuda') + torch.rand(3)


@pytest.mark.parametrize(
    ('waiting', 'what'),
    [
        (lambda x: x.sum().item(), 'item'),
        (lambda x: bool((x > 0).all()), 'item'),
        (lambda x: x.cpu(), 'copy cuda to cpu, (4,)'),
        (lambda x: torch.ones(4).to(x.device), 'copy cpu to cuda, (4,)'),
        (lambda x: x.copy_(torch.ones(4)), 'copy cpu to cuda, (4,)'),
        (lambda x: x.nonzero(), 'aten::nonzero'),
        (lambda x: x[x > 0], 'aten::index.Tensor'),
        (lambda x: x.masked_select(x > 0), 'aten::masked_select'),
    ],
)
def test_waits_are_noted(gpu, waiting, what):
    x = torch.rand(4, device='cuda')
    try:
        waiting(x)
    except RuntimeError:  # a size that only values tell
        pass
    assert what in {found for found, _ in gpu.found}


def test_no_wait_is_noted_where_none_is(gpu):
    x = torch.rand(4, device='cuda')
    torch.ones(4).to('cuda', non_blocking=True).add_(x).softmax(0).cumsum(0)
    torch.rand(4).sum().item()
    assert not gpu.found


def test_after_it(monkeypatch):
    before = torch.nn.Module._apply, torch.Generator, torch.cuda.is_available()
    if torch.cuda.is_available():
        pytest.skip('a GPU is there')
    with fake_gpu.fake_gpu():
        assert torch.cuda.is_available() and torch.rand(1, device='cuda').is_cuda
    assert before == (torch.nn.Module._apply, torch.Generator, torch.cuda.is_available())
    with pytest.raises((RuntimeError, AssertionError)):
        torch.rand(1, device='cuda')
    x = torch.rand(3, requires_grad=True)
    x.sum().backward()  # the library stays loaded
    assert x.grad.tolist() == [1, 1, 1]


def test_compiler_is_named(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip('a GPU is there')
    monkeypatch.setattr(fake_gpu.shutil, 'which', lambda name: None)
    with pytest.raises(UserError, match='needs g\\+\\+ or clang\\+\\+'):
        fake_gpu.load.__wrapped__()
    monkeypatch.setattr(fake_gpu.shutil, 'which', lambda name: 'g++')
    failed = subprocess.CompletedProcess([], 1, '', 'x.cpp:1: error: no such thing\nmore')
    monkeypatch.setattr(fake_gpu.subprocess, 'run', lambda *_, **__: failed)
    with pytest.raises(UserError, match='error: no such thing$'):
        fake_gpu.load.__wrapped__()
