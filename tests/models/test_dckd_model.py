"""DCKDModel against six training steps of the authors' code, and what must never change."""

import copy

import golden_data
import numpy as np
import pytest
import torch
from basicsr.models import build_model

import dckd_sr  # noqa: F401
from dckd_sr.ops.history import update_interval

VQGAN = {
    'type': 'VQGAN',
    'embed_dim': 32,
    'n_embed': 64,
    'ddconfig': {
        'in_channels': 3,
        'out_ch': 3,
        'resolution': 64,
        'ch': 32,
        'ch_mult': [1, 1, 2, 2, 4],
        'num_res_blocks': 2,
        'attn_resolutions': [4],
        'dropout': 0.0,
        'double_z': False,
        'z_channels': 32,
    },
}


def rcan(num_feat=16, num_block=2):
    return {
        'type': 'RCAN',
        'num_in_ch': 3,
        'num_out_ch': 3,
        'num_feat': num_feat,
        'num_group': 2,
        'num_block': num_block,
        'squeeze_factor': 4,
        'upscale': 2,
        'img_range': 255.0,
    }


def options(**train):
    """The released settings of the golden steps as a plain dict, without pretrained files."""
    return {
        'name': 'golden',
        'model_type': 'DCKDModel',
        'scale': 2,
        'num_gpu': 0,
        'manual_seed': 10,
        'network_g': rcan(),
        'network_t': rcan(24, 3),
        'network_his': True,
        'network_vqgan': {**copy.deepcopy(VQGAN), 'allow_random': True},
        'train': {
            'ema_decay': 0.999,
            'optim_g': {'type': 'Adam', 'lr': 1e-4, 'weight_decay': 0, 'betas': [0.9, 0.99]},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [250000], 'gamma': 0.1},
            'pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': 'mean'},
            'logits_opt': {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': 'mean'},
            'cl_opt': {
                'type': 'ContrasLoss',
                'd_func': 'L1',
                'loss_weight': 0.1,
                'weights': [0.03125, 0.0625, 0.125, 0.25, 1.0],
            },
            'ce_opt': {'type': 'CELoss', 'loss_weight': 0.001, 'reduction': 'mean'},
            'num_neg': 4,
            'update_decay': 0.1,
            'step': [2, 2, 2],
            'gaussian_blur_prob': 0,
            **train,
        },
    }


def without(opt, *keys):
    for key in keys:
        opt['train'].pop(key, None)
        opt.pop(key, None)
    return opt


def images(shape, seed):
    return torch.from_numpy(np.random.default_rng(seed).random(shape, dtype=np.float32))


def step(model, iteration, batch=2, size=32):
    lq = images((batch, 3, size, size), 10 * iteration + 1)
    model.feed_data({'lq': lq, 'gt': images((batch, 3, 2 * size, 2 * size), 10 * iteration + 2)})
    model.update_learning_rate(iteration)
    model.optimize_parameters(iteration)
    return model.get_current_log()


def flat(net):
    return torch.cat([p.detach().flatten() for _, p in sorted(net.named_parameters())]).numpy()


def golden_model(opt):
    model = build_model(opt)
    fill = golden_data.fill.fill_
    for net in (model.net_g, model.net_g_ema, model.net_t, model.net_vqgan):
        fill(net)
    fill(model.net_his, 0.9)
    return model


@pytest.mark.parametrize(
    'name, loss_rtol, cl_rtol, student_tol, averages_tol, settings',
    [
        ('step_rcan_x2_his', 5e-6, 5e-5, 1e-7, 5e-8, {}),
        ('step_rcan_x2_strong', 5e-4, 2e-3, 2e-5, 2e-5, {'lr': 1e-3, 'ema_decay': 0.5}),
    ],
)
def test_six_steps_equal_the_released_code(name, loss_rtol, cl_rtol, student_tol, averages_tol, settings):
    golden, _ = golden_data.arrays(name)
    opt = options()
    opt['train']['optim_g']['lr'] = settings.get('lr', 1e-4)
    opt['train']['ema_decay'] = settings.get('ema_decay', 0.999)
    model = golden_model(opt)
    with torch.no_grad():
        lq = images((2, 3, 32, 32), 1)
        np.testing.assert_allclose(model.net_g(lq).numpy(), golden['s_out_0'], rtol=1e-4, atol=5e-5)
        np.testing.assert_allclose(model.net_t(lq).numpy(), golden['t_out_0'], rtol=1e-4, atol=5e-5)
    for k, expected in enumerate(golden['losses']):
        step_losses = step_golden(model, k)
        for loss, value in zip(golden['loss_names'], expected):
            assert step_losses[loss] == pytest.approx(value, rel=cl_rtol if loss == 'l_cl' else loss_rtol), (k, loss)
        if k == 0:
            grad = torch.cat([p.grad.flatten() for _, p in sorted(model.net_g.named_parameters())]).numpy()
            assert np.abs(grad - golden['grad_0']).max() <= 2e-5 * np.abs(golden['grad_0']).max()
            assert np.abs(flat(model.net_g) - golden['student_1']).mean() <= student_tol
    assert np.abs(flat(model.net_g) - golden['student']).mean() <= student_tol
    assert np.abs(flat(model.net_g_ema) - golden['ema']).mean() <= averages_tol
    assert np.abs(flat(model.net_his) - golden['his']).mean() <= averages_tol
    assert model.get_current_learning_rate() == [pytest.approx(float(golden['lr'][0]))]


def step_golden(model, k):
    model.feed_data({'lq': images((2, 3, 32, 32), 1 + 10 * k), 'gt': images((2, 3, 64, 64), 2 + 10 * k)})
    model.update_learning_rate(k + 1)
    model.optimize_parameters(k + 1)
    return model.get_current_log()


def test_label_consistency_equals_the_released_code(monkeypatch):
    golden, config = golden_data.arrays('lcr_rcan_x2')
    opt = without(
        options(lcr_opt={'type': 'L1Loss'}, noisy={'prob': 0.5}), 'cl_opt', 'ce_opt', 'network_his', 'network_vqgan'
    )
    model = build_model(opt)
    golden_data.fill.fill_(model.net_g)
    golden_data.fill.fill_(model.net_t)
    flags = {op: torch.tensor([index in config['indices'][op] for index in range(4)]) for op in 'ihvt'}
    monkeypatch.setattr('dckd_sr.models.dckd_model.augment.draw_flags', lambda *args: flags)
    model.feed_data({'lq': images((4, 3, 32, 32), 20), 'gt': images((4, 3, 64, 64), 21)})
    clean, consistent = model.teach(1)
    np.testing.assert_allclose(clean.numpy(), golden['t_out'], rtol=1e-4, atol=5e-5)
    np.testing.assert_allclose(consistent.numpy(), golden['t_out_lcr'], rtol=1e-4, atol=5e-5)
    assert float(model.terms(1)['l_lcr'].detach()) == pytest.approx(float(golden['l_lcr']), rel=1e-5)


def test_frozen_networks_get_no_gradient_and_change_as_told():
    model = build_model(options(gaussian_noise_prob=1, lcr_opt={'type': 'L1Loss'}))
    frozen = {
        'net_t': model.net_t,
        'net_vqgan': model.net_vqgan,
        'net_his': model.net_his,
        'net_g_ema': model.net_g_ema,
    }
    before = {name: copy.deepcopy(net.state_dict()) for name, net in frozen.items()}
    student = flat(model.net_g)
    step(model, 1)
    for name, net in frozen.items():
        assert not any(module.training for module in net.modules()), name
        assert all(p.grad is None and not p.requires_grad for p in net.parameters()), name
        same = all(torch.equal(value, before[name][key]) for key, value in net.state_dict().items())
        assert same == (name != 'net_g_ema'), name  # the history waits for its step
    assert model.net_g.training and not np.array_equal(student, flat(model.net_g))
    step(model, 2)
    assert not np.array_equal(
        flat(model.net_his), torch.cat([v.flatten() for k, v in sorted(before['net_his'].items())]).numpy()
    )


@pytest.mark.parametrize(
    'history_from, ema_decay, source', [('ema', 0.5, 'ema'), ('student', 0.5, 'g'), ('ema', 0, 'g')]
)
def test_history_follows_its_source(history_from, ema_decay, source):
    model = build_model(options(history_from=history_from, ema_decay=ema_decay, update_decay=0.3, step=[1]))
    before = flat(model.net_his)
    step(model, 1)
    followed = flat(model.net_g_ema if source == 'ema' else model.net_g)
    np.testing.assert_allclose(flat(model.net_his), 0.3 * before + 0.7 * followed, rtol=1e-5, atol=1e-7)


def test_step_schedule_holds_its_last_entry():
    assert [update_interval([1, 2, 3], i) for i in (1, 100000, 100001, 200001, 300001, 999999)] == [1, 1, 2, 3, 3, 3]
    assert update_interval([5, 7], 11, period=10) == 7
    assert update_interval(4, 10**6) == 4


@pytest.mark.parametrize(
    'removed, expected',
    [
        (['logits_opt', 'cl_opt', 'ce_opt'], ['l_pix']),
        (['pixel_opt', 'logits_opt', 'ce_opt'], ['l_cl']),
        (['pixel_opt', 'logits_opt', 'cl_opt'], ['l_ce']),
        (['pixel_opt', 'cl_opt', 'ce_opt', 'network_vqgan', 'network_his'], ['l_ts']),
        (['network_t'], ['l_pix', 'l_ts', 'l_cl', 'l_ce']),
        (['network_his'], ['l_pix', 'l_ts', 'l_cl', 'l_ce']),
    ],
)
def test_any_subset_of_the_losses(removed, expected):
    model = build_model(without(options(gaussian_noise_prob=1), *removed))
    before = flat(model.net_g)
    losses = step(model, 400000)  # past the last entry of `step`
    assert list(losses) == expected
    assert all(np.isfinite(value) for value in losses.values())
    assert not np.array_equal(before, flat(model.net_g))


def test_gradient_shares_are_those_of_the_step():
    """The gradient of the step, against losses weighted by hand from norms at the student's output."""
    found = {}
    for name, extra in (('shares', {'gradient_shares': {'cl_opt': 0.5, 'ce_opt': 0.25}}), ('by hand', {})):
        torch.manual_seed(0)
        model = build_model(options(gaussian_noise_prob=1, **extra))
        if name == 'by hand':
            plain = model.terms

            def weighted(current_iter, model=model, plain=plain):
                terms = plain(current_iter)
                image = model.student_output
                rest, cl, ce = (
                    torch.autograd.grad(loss, image, retain_graph=True)[0].norm()
                    for loss in (terms['l_pix'] + terms['l_ts'] + terms.get('l_lcr', 0), terms['l_cl'], terms['l_ce'])
                )
                terms.update(l_cl=terms['l_cl'] * 0.5 * rest / cl, l_ce=terms['l_ce'] * 0.25 * rest / ce)
                return terms

            model.terms = weighted
        losses = step(model, 1)
        found[name] = losses, torch.cat([p.grad.flatten() for p in model.net_g.parameters()])
    (losses, gradient), (by_hand, expected) = found['shares'], found['by hand']
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    # Logged as without shares.
    torch.manual_seed(0)
    plain = step(build_model(options(gaussian_noise_prob=1)), 1)
    assert losses == plain and losses['l_cl'] != by_hand['l_cl']


def test_without_teacher_the_ground_truth_is_the_target():
    model = build_model(without(options(), 'network_t', 'cl_opt', 'ce_opt'))
    losses = step(model, 1)
    assert losses['l_ts'] == losses['l_pix']


def test_teacher_of_another_arch():
    opt = options()
    opt['network_t'] = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 2}
    assert np.isfinite(step(build_model(opt), 1)['l_cl'])


def test_negatives_are_the_clean_input_and_the_degraded_ones():
    for clean, expected in ((True, 5), (False, 4)):
        model = build_model(options(neg_clean=clean, gaussian_noise_prob=1))
        model.feed_data({'lq': images((2, 3, 32, 32), 1), 'gt': images((2, 3, 64, 64), 2)})
        inputs = model.negative_inputs(1)
        assert inputs.shape == (2 * expected, 3, 32, 32)
        assert torch.equal(inputs[:2], model.lq) == clean


def test_building_twice_from_one_dict():
    opt = options()
    kept = copy.deepcopy(opt)
    build_model(opt)
    assert opt == kept
    build_model(opt)


def test_initial_weights_and_generator_do_not_depend_on_the_method():
    torch.manual_seed(3)
    alone = build_model(
        without(options(), 'network_t', 'network_his', 'network_vqgan', 'logits_opt', 'cl_opt', 'ce_opt')
    )
    after = torch.get_rng_state()
    torch.manual_seed(3)
    distilled = build_model(options())
    assert np.array_equal(flat(alone.net_g), flat(distilled.net_g))
    assert torch.equal(after, torch.get_rng_state())
