"""The model types of NAFNet and Restormer: clipping, mixing, and what they share with DCKDModel."""

import pytest
import torch
from basicsr.models import build_model

import dckd_sr  # noqa: F401
from dckd_sr.data.sampler import TrainSampler
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


@pytest.mark.parametrize(
    'processes, micro_batches, size', [(1, 2, 2), (2, 1, 2), (4, 1, 1), (2, 2, 1), (1, 2, 3), (3, 1, 1)]
)
def test_a_batch_is_mixed_alike_however_it_is_spread(processes, micro_batches, size):
    total = processes * micro_batches * size
    lq, gt = (torch.rand(total, 3, 16, 16, generator=torch.Generator().manual_seed(n)) for n in range(2))

    def mixed(rank, world_size, accum_iter):
        opt = options('ImageCleanModel', mixing_augs=MIXUP, accum_iter=accum_iter)
        model = build_model({**opt, 'rank': rank, 'world_size': world_size})
        sampler = TrainSampler(total, total // world_size // accum_iter, world_size, rank, 0, 0, 1, accum_iter, True)
        for micro in range(accum_iter):
            keys = sampler.keys(2, micro)
            rows = [key[0] - 2 * total for key in keys]
            own = [key[3] if len(key) == 4 else True for key in keys]
            data = {'lq': lq[rows], 'gt': gt[rows]}
            model.feed_data(data if all(own) else {**data, 'own': torch.tensor(own)})
            model.steps.begin(3, micro)
            model.mix(3)
            yield from zip([row for row, ours in zip(rows, own) if ours], model.lq, model.gt)

    whole = sorted(mixed(0, 1, 1), key=lambda part: part[0])
    parts = [part for rank in range(processes) for part in mixed(rank, processes, micro_batches)]
    parts.sort(key=lambda part: part[0])
    assert [part[0] for part in parts] == list(range(total))
    for (_, *ours), (_, *theirs) in zip(parts, whole):
        assert all(map(torch.equal, ours, theirs))
    changed = [not torch.equal(part[1], image) for part, image in zip(whole, lq)]
    assert changed == [True] * (total - total % 2) + [False] * (total % 2)
