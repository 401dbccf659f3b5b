"""The model types of NAFNet and Restormer: clipping, mixing, and what they share with DCKDModel."""

import pytest
import torch
from basicsr.models import build_model

import dckd_sr  # noqa: F401
from dckd_sr.ops.mixup import mixup

NET = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 2}
MIXUP = {'mixup': True, 'mixup_beta': 1.2, 'use_identity': False}


def options(model_type, **train):
    sgd = {'type': 'SGD', 'lr': 1.0}
    return {
        'model_type': model_type,
        'scale': 2,
        'num_gpu': 0,
        'manual_seed': 5,
        'network_g': dict(NET),
        'train': {'optim_g': sgd, 'pixel_opt': {'type': 'L1Loss', 'loss_weight': 50.0}, **train},
    }


def batch():
    return {'lq': torch.rand(4, 3, 8, 8), 'gt': torch.rand(4, 3, 16, 16)}


def step_length(model):
    """The norm of one SGD step of rate 1, which is that of the gradient."""
    before = [p.detach().clone() for p in model.net_g.parameters()]
    model.feed_data(batch())
    model.optimize_parameters(1)
    return torch.cat([(p - b).flatten() for p, b in zip(model.net_g.parameters(), before)]).norm().item()


@pytest.mark.parametrize(
    'model_type, train, clipped',
    [
        ('ImageRestorationModel', {}, True),
        ('ImageRestorationModel', {'use_grad_clip': False}, False),
        ('ImageCleanModel', {}, False),
        ('ImageCleanModel', {'use_grad_clip': True}, True),
    ],
)
def test_gradients_are_clipped_as_the_sources_do(model_type, train, clipped):
    length = step_length(build_model(options(model_type, **train)))
    assert length == pytest.approx(0.01, rel=1e-3) if clipped else length > 1


def test_a_norm_of_ones_own_replaces_nafnets():
    assert step_length(build_model(options('ImageRestorationModel', grad_clip=0.5))) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize('model_type', ['ImageCleanModel', 'DCKDModel'])
def test_mixed_batches_train_student_and_teacher_alike(model_type):
    opt = options(model_type, mixing_augs=MIXUP)
    if model_type == 'DCKDModel':
        opt['network_t'], opt['train']['logits_opt'] = dict(NET), {'type': 'L1Loss'}
    model, data = build_model(opt), batch()
    model.feed_data(data)
    lq, gt = mixup(data['lq'], data['gt'], 1.2, False, 5, 3, 0, 0)
    student = model.net_g(lq).detach()
    wanted = {'l_pix': 50 * (student - gt).abs().mean()}
    if model.net_t is not None:
        wanted['l_ts'] = (student - model.net_t(lq)).abs().mean()
    model.optimize_parameters(3)
    assert dict(model.get_current_log()) == pytest.approx({name: value.item() for name, value in wanted.items()})


@pytest.mark.parametrize('mixing', [None, {**MIXUP, 'mixup': False}])
def test_nothing_is_mixed_unasked(mixing):
    model, data = build_model(options('ImageCleanModel', mixing_augs=mixing)), batch()
    model.feed_data(data)
    model.optimize_parameters(1)
    assert model.lq is data['lq'] and model.gt is data['gt']


def test_validation_is_never_mixed():
    model, data = build_model(options('ImageCleanModel', mixing_augs=MIXUP)), batch()
    model.feed_data(data)
    model.test()
    torch.testing.assert_close(model.output, model.net_g(data['lq']))


def test_micro_batches_are_mixed_each_in_its_own_way():
    model, data = build_model(options('ImageCleanModel', mixing_augs=MIXUP, accum_iter=2)), batch()
    mixed = []
    for micro in range(2):
        model.steps.begin(1, micro)
        model.feed_data(data)
        model.optimize_parameters(1)
        mixed.append(model.lq)
    assert not torch.equal(*mixed)
