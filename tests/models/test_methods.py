"""FAKD, CSD, MCLIR and DUKD in DCKDModel: alone, beside DCKD, in files of other types, in several processes."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from basicsr.models import build_model
from small_run import SWINIR, VQGAN, dckd_run, edsr, write
from test_distributed import content, losses, start

from dckd_sr import options, train
from dckd_sr.errors import UserError
from dckd_sr.ops import gradients
from dckd_sr.ops.augment import draw_flags
from dckd_sr.ops.resize import imresize
from dckd_sr.ops.upcycling import draw_tiles

MAPS = ['body.0', 'upsample:input']
METHODS = {
    'fakd_opt': {'type': 'SpatialAffinityLoss', 'student': MAPS, 'teacher': MAPS},
    'csd_opt': {'type': 'CSDLoss', 'num_neg': 2, 'allow_random': True},
    'mclir_opt': {'type': 'HistoryNegativeLoss', 'layer_weights': {'conv3_1': 1.0}, 'allow_random': True},
    'dukd_opt': {'type': 'UpcyclingLoss', 'n_gt_sub': 2, 'prob': 0.5},
}
LEVELS = {'type': 'HistoryNegativeLoss', 'features': 'vqgan', 'weights': [0.5, 1.0], 'loss_weight': 0.01}
LOGGED = {
    'fakd_opt': ['l_fakd'],
    'csd_opt': ['l_csd'],
    'mclir_opt': ['l_mclir'],
    'dukd_opt': ['l_dukd_in', 'l_dukd_out'],
}
DCKD = {
    'logits_opt': {'type': 'L1Loss'},
    'cl_opt': {'type': 'DynamicContrastiveLoss', 'loss_weight': 0.1, 'weights': [0.5, 1.0]},
    'ce_opt': {'type': 'DistributionMappingLoss', 'loss_weight': 0.001},
}


def model_of(*methods, beside=(), top=(), **train_opt):
    """A model with random networks, without files."""
    torch.manual_seed(1)
    return build_model(
        {
            'name': 'methods',
            'model_type': 'DCKDModel',
            'scale': 2,
            'num_gpu': 0,
            'manual_seed': 3,
            'network_g': edsr(),
            'network_t': edsr(16),
            'network_vqgan': copy.deepcopy(VQGAN),
            **dict(top),
            'train': {
                'ema_decay': 0.5,
                'optim_g': {'type': 'Adam', 'lr': 1e-3},
                'pixel_opt': {'type': 'L1Loss'},
                'num_neg': 2,
                'step': [1],
                'gaussian_noise_prob': 1,
                **{key: copy.deepcopy(DCKD[key]) for key in beside},
                **{key: copy.deepcopy(METHODS[key]) for key in methods},
                **train_opt,
            },
        }
    )


def data(batch=2, size=16, seed=0):
    random = np.random.default_rng(seed)
    shapes = {'lq': (batch, 3, size, size), 'gt': (batch, 3, 2 * size, 2 * size)}
    return {key: torch.from_numpy(random.random(shape, dtype=np.float32)) for key, shape in shapes.items()}


def step(model, iteration=1, **arguments):
    model.feed_data(data(seed=iteration, **arguments))
    model.optimize_parameters(iteration)
    return model.get_current_log()


def flat(net):
    return torch.cat([value.detach().flatten().float() for value in net.state_dict().values()])


def gradient(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize('beside', [(), tuple(DCKD)], ids=['alone', 'with DCKD'])
@pytest.mark.parametrize('methods', [*((key,) for key in METHODS), tuple(METHODS)], ids=[*METHODS, 'all'])
def test_two_steps_move_the_student_alone(methods, beside):
    model = model_of(*methods, beside=beside)
    frozen = {name: net for name, net in vars(model).items() if isinstance(net, torch.nn.Module) and name != 'net_g'}
    assert 'net_t' in frozen and ('net_his' in frozen) == ('mclir_opt' in methods or bool(beside))
    frozen = {name: net for name, net in frozen.items() if name != 'net_g_ema' and net.state_dict()}
    before = {name: flat(net) for name, net in frozen.items()}
    for iteration in (1, 2):
        student, history = flat(model.net_g), frozen.get('net_his')
        log = step(model, iteration)
        wanted = ['l_pix', *(['l_ts', 'l_cl', 'l_ce'] if beside else [])]
        log = {name: value for name, value in log.items() if not name.startswith('cl_left_out_')}
        assert set(log) == {*wanted, *(name for key in methods for name in LOGGED[key])}
        assert all(np.isfinite(value) for value in log.values())
        assert not torch.equal(student, flat(model.net_g))
    for name, net in frozen.items():
        assert all(p.grad is None and not p.requires_grad for p in net.parameters()), name
        assert torch.equal(before[name], flat(net)) == (net is not history), name
        assert not any(module.training for module in net.modules() if name.startswith('net')), name
    if 'mclir_opt' in methods:
        assert log['l_mclir'] < 0
    assert not any(module._forward_hooks for net in (model.net_g, model.net_t) for module in net.modules())


def test_a_measurement_that_nobody_asked_for_ends_no_training(monkeypatch):
    """Where memory is too little for it; but of several processes the others would wait for ever."""

    def full(*arguments):
        raise torch.OutOfMemoryError('full')

    monkeypatch.setattr(gradients, 'against_first', full)
    model = model_of(beside=tuple(DCKD))
    model.watch = gradients.Watch(10)
    before = flat(model.net_g)
    step(model)
    assert not torch.equal(before, flat(model.net_g)) and not model.watch.wants(2)
    model.watch, model.opt['dist'] = gradients.Watch(10), True
    with pytest.raises(torch.OutOfMemoryError):
        step(model)


SHAKEN = {'gaussian_blur_prob': 1, 'resize_prob': 1, 'gray_noise_prob': 0.5, 'noisy': {'prob': 0.5}}
NAFNET = {'type': 'NAFNet', 'width': 8, 'middle_blk_num': 1, 'enc_blk_nums': [1], 'dec_blk_nums': [1]}
RESTORMER = {'type': 'Restormer', 'dim': 8, 'num_blocks': [1] * 4, 'num_refinement_blocks': 1, 'heads': [1] * 4}
RCAN = {**edsr(), 'type': 'RCAN', 'num_group': 1, 'num_block': 1, 'squeeze_factor': 4}
STEPS = {
    'all methods': (tuple(METHODS), {}, {'lcr_opt': {'type': 'L1Loss'}, **SHAKEN}),
    'by the encoder': ((), {}, {'mclir_opt': LEVELS}),
    'float16': (tuple(METHODS), {'use_amp': True}, {'lcr_opt': {'type': 'L1Loss'}, **SHAKEN}),
    'bfloat16, less memory': (
        (),
        {'use_amp': True, 'amp_bf16': True, 'use_channels_last': True, 'use_checkpoint': True},
        {'negatives_micro_batch': 1},
    ),
    'shares, clipped': (
        (),
        {'logger': {'gradients': True, 'print_freq': 1}},
        {'gradient_shares': {'cl_opt': 0.1, 'ce_opt': 0.1}, 'grad_clip': 0.1},
    ),
    'SGD': ((), {}, {'optim_g': {'type': 'SGD', 'lr': 1e-3, 'momentum': 0.9}}),
    'SwinIR': ((), {'network_g': SWINIR, 'network_t': SWINIR}, SHAKEN),
    'RCAN': ((), {'network_g': RCAN, 'network_t': RCAN}, {}),
    'NAFNet': ((), {'network_g': NAFNET, 'network_t': NAFNET, 'scale': 1}, {}),
    'Restormer, mixup': (
        (),
        {'network_g': RESTORMER, 'network_t': RESTORMER, 'scale': 1},
        {'mixing_augs': {'mixup': True}, 'accum_iter': 2},
    ),
}


@pytest.mark.parametrize('name', STEPS)
def test_no_step_waits_for_the_gpu(gpu, name):
    """The third one: the first ones put networks and optimisers there."""
    methods, top, train_opt = STEPS[name]
    model = model_of(*methods, beside=tuple(DCKD), top={'num_gpu': 1, **copy.deepcopy(top)}, **train_opt)
    scale = model.opt['scale']
    for iteration in (1, 2, 3):
        gpu.found.clear()
        for micro in range(train_opt.get('accum_iter', 1)):
            model.steps.begin(iteration, micro)
            model.feed_data({'lq': torch.rand(2, 3, 16, 16), 'gt': torch.rand(2, 3, 16 * scale, 16 * scale)})
            model.optimize_parameters(iteration)
    assert not gpu.found
    assert {value.device.type for value in model.log_dict.values()} == {'cuda'}
    gpu.found.clear()
    model.get_current_log()
    assert gpu.found  # here it does


@pytest.mark.parametrize('method', METHODS)
def test_each_term_moves_the_weights(method):
    """The gradient is another one than without the method."""
    history = {'top': {'network_his': True}}  # of its own random weights, else its distance is 0 at first
    models = [model_of(**history), model_of(method, **history)]
    for model in models:
        with torch.no_grad():
            for p in model.net_his.parameters():
                p.mul_(0.9)
        step(model)
    plain, distilled = (gradient(model.net_g) for model in models)
    assert (plain - distilled).abs().max() > 1e-6 * plain.abs().max()


def undone(images, flags):
    """F^-1, image by image, with numpy's words for it: transpose, mirror left-right, mirror top-bottom, 1 - x."""
    found = []
    for index, image in enumerate(images):
        image = image.transpose(1, 2) if flags['t'][index] else image
        image = image.flip(2) if flags['v'][index] else image
        image = image.flip(1) if flags['h'][index] else image
        found.append(1 - image if flags['i'][index] else image)
    return torch.stack(found)


def changed(images, flags):
    """F, image by image."""
    found = []
    for index, image in enumerate(images):
        image = 1 - image if flags['i'][index] else image
        image = image.flip(1) if flags['h'][index] else image
        image = image.flip(2) if flags['v'][index] else image
        found.append(image.transpose(1, 2) if flags['t'][index] else image)
    return torch.stack(found)


def test_dukd_equals_its_formula():
    """|F^-1(S(F(g))) - T(g)| on two tiles of GT, |S(x') - x| + |S(x') - T(x')| on MATLAB's smaller x'."""
    model, iteration = model_of('dukd_opt', top={'scale': 2}), 5
    batch = data(batch=3, seed=4)
    model.feed_data(batch)
    terms = model.terms(iteration)
    chosen = draw_tiles(2, 2, 3, iteration, 0)
    inside = 0
    for k, number in enumerate(chosen):
        top, left = number // 2 * 16, number % 2 * 16
        g = batch['gt'][:, :, top : top + 16, left : left + 16]
        flags = draw_flags(0.5, 3, 3, iteration, (iteration - 1) * 3, f'dukd {k}')
        assert any(flags[op].any() for op in 'ihvt')
        with torch.no_grad():
            label = model.net_t(g)
        inside = inside + (undone(model.net_g(changed(g, flags)), flags) - label).abs().mean() / 2
    small = np.stack([imresize(image.permute(1, 2, 0).numpy().astype(np.float64), 0.5) for image in batch['lq']])
    small = torch.from_numpy(small).permute(0, 3, 1, 2).float()
    s, t = model.net_g(small), model.net_t(small)
    outside = (s - batch['lq']).abs().mean() + (s - t).abs().mean()
    assert torch.allclose(terms['l_dukd_in'], inside, rtol=1e-5)
    assert torch.allclose(terms['l_dukd_out'], outside, rtol=1e-5)
    wanted = torch.autograd.grad(inside + outside, list(model.net_g.parameters()))
    found = torch.autograd.grad(terms['l_dukd_in'] + terms['l_dukd_out'], list(model.net_g.parameters()))
    for ours, theirs in zip(found, wanted):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


def test_without_zoom_out_there_is_one_term():
    assert list(step(model_of(dukd_opt={'type': 'UpcyclingLoss', 'zoom_out': False}))) == ['l_pix', 'l_dukd_in']


def test_patches_that_are_no_multiple_of_the_windows_are_padded():
    """x' is 4 x 4, the windows are 8 x 8."""
    swinir = {'type': 'SwinIR', 'upscale': 2, 'img_size': 8, 'window_size': 8, 'depths': [2], 'embed_dim': 12}
    swinir.update(num_heads=[2], mlp_ratio=2, upsampler='pixelshuffledirect')
    model = model_of('dukd_opt', top={'network_g': swinir})
    assert np.isfinite(step(model, size=8)['l_dukd_out'])


def test_dukd_refuses_gt_of_another_size():
    model = model_of('dukd_opt')
    model.feed_data({**data(), 'lq': torch.rand(2, 3, 16, 15)})
    with pytest.raises(UserError, match='train.dukd_opt needs .*scale = 2 times LQ, but GT is 32x32 and LQ 15x16'):
        model.upcycle(1)


def maps_by_hand(net, lq):
    """Outputs of the first block and of the sum before the upsampler, of BasicSR's EDSR."""
    first = net.conv_first((lq - net.mean) * net.img_range)
    return [net.body[0](first), net.conv_after_body(net.body(first)) + first]


@pytest.mark.parametrize('lcr', [False, True], ids=['plain', 'with a teacher on twice the batch'])
def test_fakd_compares_the_maps_of_this_batch(lcr):
    more = {'lcr_opt': {'type': 'L1Loss'}} if lcr else {}
    model, batch = model_of('fakd_opt', **more), data()
    model.feed_data(batch)
    wanted = 0
    for s, t in zip(*(maps_by_hand(net, batch['lq']) for net in (model.net_g, model.net_t))):
        a = [torch.einsum('bcl,bcm->blm', *[torch.nn.functional.normalize(f.flatten(2), dim=1)] * 2) for f in (s, t)]
        wanted = wanted + 20 / 255 * (a[0] - a[1]).abs().mean()
    assert torch.allclose(model.terms(1)['l_fakd'], wanted, rtol=1e-4)


def test_csd_and_mclir_see_outputs_on_the_clean_input():
    model, batch = model_of('csd_opt', 'mclir_opt', beside=DCKD), data()
    with torch.no_grad():
        for p in model.net_his.parameters():
            p.mul_(0.9)
    model.feed_data(batch)
    terms = model.terms(1)
    outputs = [net(batch['lq']) for net in (model.net_g, model.net_t, model.net_his)]
    assert torch.allclose(terms['l_csd'], model.cri_csd.contrast(outputs[0], outputs[1], batch['lq']), rtol=1e-5)
    assert torch.allclose(terms['l_mclir'], model.cri_mclir.push(outputs[0], outputs[2]), rtol=1e-5)


@pytest.mark.parametrize('beside', [(), ('cl_opt',), ('ce_opt',), tuple(DCKD)], ids=str)
def test_the_history_pushes_by_the_encoders_levels_too(beside):
    model, batch = model_of(mclir_opt=LEVELS, beside=beside), data()
    with torch.no_grad():
        for p in model.net_his.parameters():
            p.mul_(0.9)
    model.feed_data(batch)
    value = model.terms(1)['l_mclir']
    student, history = (model.net_vqgan(net(batch['lq'])).levels for net in (model.net_g, model.net_his))
    wanted = -0.01 * sum(w * (s - h).abs().mean() for w, s, h in zip([0.5, 1.0], student, history))
    assert value < 0 and torch.allclose(value, wanted, rtol=1e-4)


def test_initial_weights_and_generator_do_not_depend_on_the_method():
    states = []
    for methods in ((), tuple(METHODS)):
        model = model_of(*methods)
        states.append((flat(model.net_g), torch.get_rng_state()))
    assert torch.equal(states[0][0], states[1][0]) and torch.equal(states[0][1], states[1][1])


def test_micro_batches_equal_one_batch():
    """All tiles, unchanged: which ones a micro-batch draws is its own."""
    dukd = {'type': 'UpcyclingLoss', 'n_gt_sub': 4, 'prob': 0.0}
    sgd = {'type': 'SGD', 'lr': 1e-3}
    whole, parts = (model_of('fakd_opt', dukd_opt=dukd, optim_g=sgd, accum_iter=count) for count in (1, 2))
    batch = data(batch=4)
    whole.feed_data(batch)
    whole.optimize_parameters(1)
    for micro in (0, 1):
        parts.steps.begin(1, micro)
        parts.feed_data({key: value[2 * micro : 2 * micro + 2] for key, value in batch.items()})
        parts.optimize_parameters(1)
    assert torch.allclose(flat(whole.net_g), flat(parts.net_g), atol=1e-7)
    assert torch.allclose(gradient(whole.net_g), gradient(parts.net_g), rtol=1e-3, atol=1e-5)


def test_checkpointed_activations_give_the_same_maps():
    networks = {'network_g': {**edsr(), 'num_block': 3}}
    plain, recomputed = (model_of('fakd_opt', top={**networks, 'use_checkpoint': value}) for value in (False, True))
    assert step(plain) == pytest.approx(step(recomputed), rel=1e-5)
    assert torch.allclose(gradient(plain.net_g), gradient(recomputed.net_g), rtol=1e-3, atol=1e-5)


def test_networks_whose_modules_are_read_are_not_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda net, **_: compiled.append(net) or net)
    model = model_of('fakd_opt', 'csd_opt', beside=('ce_opt',), top={'use_compile': True})
    step(model)
    assert compiled and not {id(model.net_g), id(model.net_t)} & {id(net) for net in compiled}


def test_csd_stays_out_of_float16():
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        model = model_of('csd_opt', top={'use_amp': True, 'amp_bf16': bf16, 'amp_networks': ['encoder']})
        assert model.cri_csd.run(model.cri_csd.vgg, torch.rand(1, 3, 32, 32))[0].dtype == dtype


# ---------------------------------------------------------------------------------------------------------------------
# From option files


@pytest.fixture
def opt(tmp_path):
    return dckd_run(tmp_path)


def without_dckd(opt):
    for key in ('network_his', 'network_vqgan'):
        del opt[key]
    for key in ('logits_opt', 'cl_opt', 'ce_opt', 'num_neg', 'step', 'gaussian_blur_prob', 'gaussian_noise_prob'):
        del opt['train'][key]
    opt['train']['total_iter'] = 2
    return opt


@pytest.mark.parametrize('method', METHODS)
def test_a_file_of_another_type_with_one_block(opt, method, capfd):
    without_dckd(opt).update(model_type='SRModel')
    opt['train'][method] = METHODS[method]
    if method == 'mclir_opt':  # which has no teacher
        del opt['network_t'], opt['path'], opt['train']['check_teacher']
    assert train.main(['-opt', write(opt)]) == 0, capfd.readouterr()
    log = next(Path('experiments/run').glob('train_*.log')).read_text()
    assert 'model_type = SRModel: runs as DCKDModel' in log and 'End of training' in log
    last = re.findall(r'iter: +2,.*\] (l_.*)', log)[0]
    assert re.findall(r'l_\w+', last) == ['l_pix', *LOGGED[method]]


def test_a_push_alone_is_no_loss(opt):
    without_dckd(opt)
    del opt['train']['pixel_opt']
    opt['train']['mclir_opt'] = METHODS['mclir_opt']
    (problem,) = options.check(opt)[0]
    assert problem.startswith('train: no loss; expected one of pixel_opt')


FAKD = METHODS['fakd_opt']
PROBLEMS = [
    ({'fakd_opt': {**FAKD, 'teacher': ['body.0']}}, 'train.fakd_opt.teacher = ["body.0"]: expected as many modules'),
    ({'fakd_opt': {**FAKD, 'student': []}}, 'train.fakd_opt.student = []: expected a list of modules'),
    ({'fakd_opt': {**FAKD, 'student': [1, 2]}}, 'train.fakd_opt.student = [1, 2]: expected a list of modules'),
    ({'fakd_opt': {'type': 'SpatialAffinityLoss', 'student': 'a'}}, 'train.fakd_opt.teacher: missing'),
    ({'fakd_opt': {**FAKD, 'pool_size': 0}}, 'train.fakd_opt.pool_size = 0: expected a whole number, at least 1'),
    ({'fakd_opt': {'type': 'L1Loss'}}, 'train.fakd_opt.type = L1Loss: no such loss for train.fakd_opt'),
    ({'fakd_opt': {**FAKD, 'encoder': {}}}, 'train.fakd_opt.encoder = {}: unknown argument'),
    ({'pixel_opt': {'type': 'CSDLoss'}}, 'train.pixel_opt.type = CSDLoss: no such loss'),
    (
        {'csd_opt': {'type': 'CSDLoss', 'allow_random': True}},
        'train.csd_opt.num_neg = 10: they are taken from the batch',
    ),
    (
        {'csd_opt': {**METHODS['csd_opt'], 'weights': [1]}},
        'train.csd_opt.weights = [1]: expected 5 numbers, one for each of',
    ),
    ({'csd_opt': {**METHODS['csd_opt'], 'weights': list('abcde')}}, 'train.csd_opt.weights = '),
    ({'csd_opt': {**METHODS['csd_opt'], 'pretrain': 'vgg.pth'}}, 'train.csd_opt.pretrain = vgg.pth: no such file'),
    ({'csd_opt': {'type': 'CSDLoss', 'num_neg': 1}}, 'train.csd_opt: no weights of vgg19 at'),
    ({'mclir_opt': {'type': 'HistoryNegativeLoss'}}, 'train.mclir_opt: no weights of vgg19 at'),
    (
        {'mclir_opt': {**METHODS['mclir_opt'], 'layer_weights': {'relu9': 1}}},
        'train.mclir_opt.layer_weights.relu9: no such',
    ),
    (
        {'mclir_opt': {**METHODS['mclir_opt'], 'layer_weights': {'relu1_1': 'a'}}},
        'train.mclir_opt.layer_weights.relu1_1 = a',
    ),
    (
        {'mclir_opt': {**METHODS['mclir_opt'], 'layer_weights': [1]}},
        'train.mclir_opt.layer_weights = [1]: expected a block',
    ),
    ({'mclir_opt': {**LEVELS, 'weights': [1]}}, 'train.mclir_opt.weights = [1]: expected 2 numbers, one per level'),
    ({'mclir_opt': {**LEVELS, 'features': 'vqgna'}}, 'train.mclir_opt.features = vqgna: expected vgg or vqgan'),
    ({'dukd_opt': {'type': 'UpcyclingLoss', 'n_gt_sub': 5}}, 'train.dukd_opt.n_gt_sub = 5: GT has 2 x 2 tiles'),
    ({'dukd_opt': {'type': 'UpcyclingLoss', 'n_gt_sub': 0}}, 'train.dukd_opt.n_gt_sub = 0: expected a whole number'),
    ({'dukd_opt': {'type': 'UpcyclingLoss', 'prob': 2}}, 'train.dukd_opt.prob = 2: expected a number from 0 to 1'),
    ({'dukd_opt': {'type': 'UpcyclingLoss', 'zoom_out': 'no'}}, 'train.dukd_opt.zoom_out = no: expected true or false'),
]


@pytest.mark.parametrize(('blocks', 'start'), PROBLEMS, ids=[row[1] for row in PROBLEMS])
def test_problems_of_the_blocks(opt, blocks, start, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    opt['train'].update(copy.deepcopy(blocks))
    problems, _ = options.check(opt)
    assert len(problems) == 1 and problems[0].startswith(start), problems


@pytest.mark.parametrize('method', METHODS)
def test_problems_with_other_blocks(opt, method):
    opt['train'][method] = METHODS[method]
    assert options.check(opt)[0] == []
    opt['datasets']['train'].update(type='SRImageDataset', teacher_cache='cache.lmdb')
    wanted = {'fakd_opt': "with its modules' outputs", 'dukd_opt': 'on other input'}.get(method)
    told = [f'train.{method}: needs the teacher {wanted}, which datasets.train.teacher_cache does not have']
    assert options.check(opt)[0] == (told if wanted else [])
    del opt['datasets']['train']['teacher_cache'], opt['network_t'], opt['path'], opt['train']['logits_opt']
    told = [f'train.{method}: needs network_t, the teacher']
    assert options.check(opt)[0] == (told if wanted else [])


def test_dukd_needs_crops_that_shrink_twice(opt):
    opt['train']['dukd_opt'] = {'type': 'UpcyclingLoss'}
    opt['datasets']['train']['gt_size'] = 30
    (problem,) = options.check(opt)[0]
    assert problem.startswith(
        'datasets.train.gt_size = 30: expected a multiple of 2 x 2: dukd_opt shrinks LQ once more'
    )
    opt['train']['dukd_opt']['zoom_out'] = False
    assert options.check(opt)[0] == []
    opt['train']['dukd_opt']['zoom_out'] = True
    opt['datasets']['train'].update(gt_size=32, gt_sizes=[32, 30], mini_batch_sizes=[2, 2], iters=[1, 1])
    (problem,) = options.check(opt)[0]
    assert problem.startswith('datasets.train.gt_sizes.1 = 30')
    del (
        opt['datasets']['train']['gt_sizes'],
        opt['datasets']['train']['mini_batch_sizes'],
        opt['datasets']['train']['iters'],
    )
    opt.update(scale=1, network_g={'type': 'NAFNet'}, network_t={'type': 'NAFNet'})
    (problem,) = options.check(opt)[0]
    assert problem.startswith('train.dukd_opt: is for super-resolution')


def test_the_history_is_assumed_and_the_encoder_needed(opt):
    without_dckd(opt)['train'].update(mclir_opt=copy.deepcopy(LEVELS))
    (problem,) = options.check(opt)[0]
    assert problem.startswith('train.mclir_opt: needs network_vqgan, the encoder')
    opt['network_vqgan'] = VQGAN
    problems, warnings = options.check(opt)
    assert problems == [] and warnings == [
        'network_his: true is assumed: mclir_opt takes its negatives from the history'
    ]
    opt['network_his'] = False
    assert options.check(opt)[0] == ['network_his = false: mclir_opt takes its negatives from the history; write true']


@pytest.mark.parametrize('role', ['student', 'teacher'])
def test_a_module_that_is_not_there_stops_before_anything_is_written(opt, role, capfd):
    opt['train']['fakd_opt'] = {'type': 'SpatialAffinityLoss', 'student': 'body.0', 'teacher': 'body.0', role: 'body.7'}
    assert train.main(['-opt', write(opt)]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith('error: ')]
    assert line.startswith(f'error: train.fakd_opt.{role}: EDSR has no module body.7; nearest: ') and 'body.0' in line
    assert not Path('experiments').exists()


def test_two_processes_equal_one_with_twice_the_batch(opt):
    for key in ('fakd_opt', 'dukd_opt', 'csd_opt'):
        opt['train'][key] = copy.deepcopy(METHODS[key])
    opt['train']['mclir_opt'] = copy.deepcopy(LEVELS)
    opt['train'].update(total_iter=5, step=[1])
    opt['logger'].update(save_checkpoint_freq=5)
    opt['val']['val_freq'] = 5
    assert start(opt).wait(timeout=120) == 0, Path('output.txt').read_text()
    opt['name'], opt['datasets']['train']['batch_size_per_gpu'] = 'single', 4
    assert train.main(['-opt', write(opt)]) == 0
    (two, _), (one, _) = content('run'), content('single')
    for key in ('params', 'params_ema'):
        for name, value in one[key].items():
            assert torch.allclose(two[key][name], value, rtol=1e-4, atol=5e-5), (key, name)
    (rows, _), (expected, _) = losses('run'), losses('single')
    assert len(rows) == 5 and rows.shape == expected.shape and torch.allclose(rows, expected, rtol=5e-4, atol=1e-6)
