"""What precision, memory format, compilation and checkpointing change in a step, and what they must not change."""

import copy
import logging

import pytest
import torch
from basicsr.models import build_model
from small_run import SWINIR, VQGAN, edsr
from torch import nn

import dckd_sr  # noqa: F401
from dckd_sr import precision
from dckd_sr.speed import Speed, _blocks

DIRECT = {**SWINIR, 'upsampler': 'pixelshuffledirect'}


def model_with(train=None, network_g=None, **top):
    """A small DCKD model whose history differs from its student."""
    torch.manual_seed(0)
    model = build_model(
        copy.deepcopy(
            {
                'model_type': 'DCKDModel',
                'scale': 2,
                'num_gpu': 0,
                'manual_seed': 1,
                'network_g': network_g or edsr(),
                'network_t': edsr(16),
                'network_vqgan': VQGAN,
                'train': {
                    'ema_decay': 0.9,
                    'optim_g': {'type': 'SGD', 'lr': 1e-2},
                    'scheduler': {'type': 'MultiStepLR', 'milestones': [100]},
                    'pixel_opt': {'type': 'L1Loss'},
                    'logits_opt': {'type': 'L1Loss'},
                    'cl_opt': {'type': 'ContrasLoss', 'loss_weight': 0.1, 'weights': [0.5, 1.0]},
                    'ce_opt': {'type': 'DistributionMappingLoss', 'loss_weight': 0.1},
                    'num_neg': 3,
                    'gaussian_noise_prob': 1.0,
                    **(train or {}),
                },
                **top,
            }
        )
    )
    with torch.no_grad():
        for parameter in model.net_his.parameters():
            parameter.mul_(0.9)
    return model


def step(model, iteration=1):
    """One iteration: (losses, gradient of the student as one vector)."""
    generator = torch.Generator().manual_seed(iteration)
    lq, gt = (torch.rand(2, 3, side, side, generator=generator) for side in (16, 32))
    model.feed_data({'lq': lq, 'gt': gt})
    model.steps.begin(iteration)
    model.optimize_parameters(iteration)
    return model.get_current_log(), torch.cat([p.grad.flatten() for p in model.net_g.parameters()])


def difference(model, reference):
    """Largest relative difference of a loss, and 1 - cosine of the gradients, in one step of two models."""
    (losses, gradient), (expected, true) = step(model), step(reference)
    assert losses.keys() == expected.keys()
    off = max(abs(losses[name] - value) / abs(value) for name, value in expected.items())
    # In float32 the cosine of a gradient with itself is off by more than some of the bounds, on some processors.
    return off, 1 - torch.cosine_similarity(gradient.double(), true.double(), dim=0).item()


@pytest.mark.parametrize(
    'top, loss_bound, gradient_bound, least',
    [
        ({'use_amp': True, 'amp_bf16': True}, 2e-2, 1e-2, 1e-5),
        ({'use_amp': True, 'amp_bf16': True, 'amp_networks': ['teacher']}, 1e-2, 5e-3, 1e-7),
        ({'use_amp': True}, 3e-3, 1e-3, 1e-6),
        ({'use_channels_last': True}, 1e-5, 1e-5, 0),
        ({'use_checkpoint': True}, 1e-6, 1e-7, 0),
        ({'use_tf32': True}, 1e-6, 1e-7, 0),
    ],
)
def test_modes_stay_near_float32(top, loss_bound, gradient_bound, least):
    model = model_with(**top)
    loss_off, gradient_off = difference(model, model_with())
    assert least <= loss_off < loss_bound
    assert gradient_off < gradient_bound
    assert all(p.dtype == torch.float32 for p in model.net_g.parameters())


@pytest.mark.parametrize('count', [1, 2, 3, 9])
def test_negatives_in_parts_are_the_same_step(count):
    loss_off, gradient_off = difference(model_with({'negatives_micro_batch': count}), model_with())
    assert loss_off < 1e-5 and gradient_off < 1e-6


def test_negatives_in_parts_reach_the_encoder_so_many_at_a_time():
    model = model_with({'negatives_micro_batch': 2})
    sizes, run = [], model.run
    model.run = lambda role, net, x, **arguments: sizes.append((role, len(x))) or run(role, net, x, **arguments)
    model.run.begin_step = run.begin_step
    step(model)
    # 4 negatives of 2 images, in two parts
    assert [n for role, n in sizes if role == 'history'] == [4, 4]
    assert [n for role, n in sizes if role == 'encoder'] == [2, 2, 4, 4]


def test_losses_are_float32_whatever_the_networks_are():
    model = model_with(use_amp=True, amp_bf16=True)
    seen, run = {}, model.run.__class__.__call__
    for role, net in (('student', model.net_g), ('encoder', model.net_vqgan)):
        arguments = {'levels': True, 'codes': 1} if role == 'encoder' else {}
        seen[role] = run(model.run, role, net, torch.rand(1, 3, 16, 16), **arguments)
    assert seen['student'].dtype == torch.float32
    assert seen['encoder'].levels[0].dtype == torch.bfloat16  # the contrastive loss converts them piece by piece
    assert seen['encoder'].logits.dtype == torch.float32


def test_float16_lowers_its_scale_after_an_overflow_and_moves_nothing():
    model = model_with(use_amp=True)
    model.run.scaler.load_state_dict({**model.run.scaler.state_dict(), 'scale': 2.0**60})
    before = copy.deepcopy(model.net_g.state_dict())
    step(model)
    assert model.run.scaler.get_scale() == 2.0**59
    assert not model.steps.ok and model.steps.take()[0] == []  # the scaler's way, no failure of the run
    assert all(torch.equal(value, before[key]) for key, value in model.net_g.state_dict().items())
    model.run.scaler.load_state_dict({**model.run.scaler.state_dict(), 'scale': 1024.0})
    step(model)
    assert not torch.equal(model.net_g.conv_first.weight, before['conv_first.weight'])


def test_gradients_are_those_of_the_unscaled_loss():
    scaled, plain = model_with(use_amp=True, amp_networks=['encoder']), model_with()
    scaled.run.scaler.load_state_dict({**scaled.run.scaler.state_dict(), 'scale': 4096.0})
    found, expected = step(scaled)[1], step(plain)[1]
    assert (found - expected).norm() < 0.02 * expected.norm()  # unscaled it would be thousands


def test_the_scale_is_part_of_the_state():
    model, other = model_with(use_amp=True), model_with(use_amp=True)
    model.run.scaler.load_state_dict({**model.run.scaler.state_dict(), 'scale': 8.0, '_growth_tracker': 5})
    other.load_extra_state(model.extra_state())
    assert other.run.scaler.state_dict() == model.run.scaler.state_dict()
    assert 'scaler' not in model_with(use_amp=True, amp_bf16=True).extra_state()


def test_checkpointing_keeps_fewer_activations_and_draws_the_same_drop_path():
    def kept(model):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = model.run('student', model.net_g, torch.rand(1, 3, 16, 16))
        output.square().sum().backward()
        return total, torch.cat([p.grad.flatten() for p in model.net_g.parameters()])

    network = {**DIRECT, 'drop_path_rate': 0.5}
    (most, expected), (few, found) = (
        kept(model_with(network_g=network, use_checkpoint=value)) for value in (False, True)
    )
    assert few < most / 3
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max())


def test_blocks_are_those_of_the_body():
    names = {type(block).__name__ for block in _blocks(model_with(network_g=DIRECT).net_g)}
    assert names == {'RSTB'}
    assert len(list(_blocks(model_with(network_g={**edsr(), 'num_block': 3}).net_g))) == 3


def test_compiled_networks_are_used_in_training_and_not_in_validation(monkeypatch):
    calls = []

    def compile_(net, **arguments):
        calls.append(arguments)
        return lambda *inputs, **settings: calls.append(type(net).__name__) or net(*inputs, **settings)

    monkeypatch.setattr(torch, 'compile', compile_)
    model = model_with(use_compile=True, compile_mode='max-autotune')
    step(model)
    assert calls.count({'mode': 'max-autotune', 'dynamic': False}) == 4
    assert sorted(c for c in calls if isinstance(c, str)) == ['EDSR', 'EDSR', 'EDSR', 'VQGAN', 'VQGAN']
    calls.clear()
    model.lq = torch.rand(1, 3, 7, 9)
    model.test()
    assert calls == [] and set(model.net_g.state_dict()) == set(model_with().net_g.state_dict())


def test_a_network_that_does_not_compile_runs_as_it_is(monkeypatch, caplog):
    def compile_(net, **arguments):
        def fail(*inputs, **settings):
            raise RuntimeError('no compiler here\nand more')

        return fail

    monkeypatch.setattr(torch, 'compile', compile_)
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    model, plain = model_with(use_compile=True), model_with()
    assert difference(model, plain)[0] < 1e-6
    assert 'use_compile: the student cannot be compiled and runs as it is: no compiler here' in caplog.text
    caplog.clear()
    step(model, 2)
    assert 'compile' not in caplog.text


@pytest.mark.parametrize(
    'capability, use_amp, warned', [('AVX2', True, True), ('AVX2', False, False), ('AVX512', True, False)]
)
def test_mixed_precision_on_a_processor_that_has_none(capability, use_amp, warned, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    Speed({'use_amp': use_amp, 'amp_bf16': True}, 'cpu')
    assert ('no instructions for 16 bits' in caplog.text) == warned


@pytest.mark.parametrize('use, expected', [(None, (True, False)), (False, (False, False)), (True, (True, True))])
def test_tf32_is_as_the_options_say(use, expected, monkeypatch):
    monkeypatch.setattr(precision, 'DEFAULT', precision.TF32(True, False))
    with precision.tf32_as(True):
        Speed({} if use is None else {'use_tf32': use}, 'cpu')
        assert precision.tf32() == expected


def test_channels_last_networks_see_such_images():
    class Probe(nn.Module):
        def forward(self, x):
            assert x.is_contiguous(memory_format=torch.channels_last)
            return x

    run = Speed({'use_channels_last': True}, 'cpu')
    run('teacher', Probe(), torch.rand(2, 3, 4, 5))
    model = model_with(use_channels_last=True)
    for net in (model.net_g, model.net_g_ema, model.net_his, model.net_t):
        weight = net.body[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
