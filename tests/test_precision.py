"""TF32 by both interfaces of torch, and what is said about the precision of a run."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch.backends import cudnn

from dckd_sr import precision
from dckd_sr.precision import TF32
from dckd_sr.speed import Speed


@pytest.fixture(autouse=True)
def _as_before():
    yield
    precision.set_tf32(None)


def newer():
    """What the newer interface of torch says; None where it is not there."""
    if not hasattr(cudnn, 'conv'):
        return None
    assert cudnn.conv.fp32_precision == cudnn.rnn.fp32_precision
    return TF32(cudnn.conv.fp32_precision == 'tf32', torch.backends.cuda.matmul.fp32_precision == 'tf32')


def test_torchs_own_default():
    code = 'import torch, dckd_sr.precision as p; print(*p.DEFAULT, torch.backends.cudnn.allow_tf32)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ['True', 'False', 'True']


@pytest.mark.parametrize('use, expected', [(None, precision.DEFAULT), (True, (True, True)), (False, (False, False))])
@pytest.mark.parametrize('before', [True, False])
def test_both_interfaces_agree_and_nothing_warns(use, expected, before):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        precision.set_tf32(before)
        assert precision.set_tf32(use) == precision.tf32() == expected
    assert (cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == expected
    assert newer() in (None, expected)
    assert torch.get_float32_matmul_precision() == ('high' if expected[1] else 'highest')


@pytest.mark.skipif(not hasattr(cudnn, 'conv'), reason='torch before 2.9 has one interface')
def test_what_the_newer_interface_was_set_to_is_no_obstacle():
    precision.set_tf32(None)
    cudnn.conv.fp32_precision = 'ieee'
    torch.backends.cuda.matmul.fp32_precision = 'tf32'
    assert precision.tf32() == (False, True)
    with pytest.raises(RuntimeError, match='mix of the legacy and new'):
        cudnn.allow_tf32  # noqa: B018  (this is what torch's compiler would meet)
    former = torch.backends.fp32_precision
    torch.backends.fp32_precision = 'tf32'
    try:
        precision.set_tf32(False)
        assert newer() == precision.tf32() == (False, False)
        assert not cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.fp32_precision = former


def test_the_older_interface_alone(monkeypatch):
    class Backend:
        allow_tf32 = True

    monkeypatch.setattr(torch.backends, 'cudnn', Backend())
    monkeypatch.setattr(torch.backends.cuda, 'matmul', Backend())
    assert precision.tf32() == (True, True)
    precision.set_tf32(False)
    assert precision.tf32() == (False, False) and not torch.backends.cudnn.allow_tf32
    monkeypatch.undo()


def test_it_is_given_back():
    precision.set_tf32(False)
    with pytest.raises(ValueError), precision.tf32_as(True):
        assert precision.tf32() == (True, True)
        raise ValueError
    assert precision.tf32() == (False, False)


@pytest.mark.parametrize(
    'opt, said',
    [
        ({}, "float32 with TF32 convolutions (torch's default; use_tf32: false is bit-true float32)."),
        ({'use_tf32': True}, 'float32 with TF32 convolutions and matrix products.'),
        ({'use_tf32': False}, 'float32 without TF32.'),
        (
            {'use_amp': True, 'amp_bf16': True, 'use_tf32': False},
            'bfloat16 in all networks; else float32 without TF32.',
        ),
        (
            {'use_amp': True, 'amp_networks': ['teacher', 'encoder'], 'use_tf32': True},
            'float16 in teacher, encoder; else float32 with TF32 convolutions and matrix products.',
        ),
    ],
)
def test_a_line_says_which_precision_a_run_has(gpu, opt, said):
    Speed(opt, 'cuda')
    assert precision.describe(opt, 'cuda') == f'Precision: {said}'


def test_older_gpus_have_no_tf32(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: (7, 5))
    precision.set_tf32(True)
    assert precision.rounds('cuda') == (False, False)
    assert precision.describe({'use_tf32': True}, 'cuda') == 'Precision: float32 without TF32.'
    assert precision.rounds('cpu') == (False, False)


@pytest.mark.parametrize(
    'opt, device, capable, told',
    [
        ({'use_amp': True}, 'cuda', True, True),
        ({'use_amp': True, 'amp_networks': ['encoder']}, 'cuda', True, True),
        ({'use_amp': True, 'amp_networks': ['teacher']}, 'cuda', True, False),
        ({'use_amp': True, 'amp_bf16': True}, 'cuda', True, False),
        ({'use_amp': True}, 'cuda', False, False),
        ({'use_amp': True}, 'cpu', True, False),
        ({}, 'cuda', True, False),
    ],
)
def test_bfloat16_is_advised_where_there_is_some(opt, device, capable, told, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: capable)
    advice = precision.advice(opt, device)
    assert (advice is not None) == told
    assert not told or 'amp_bf16: true' in advice
