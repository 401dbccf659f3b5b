"""Weights from every layout that circulates, named differences, atomic writes, and states that come back."""

import copy
import os
import pickle
import types

import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.models import build_model
from basicsr.utils import get_root_logger
from basicsr.utils.registry import ARCH_REGISTRY
from models.test_dckd_model import flat, options, step
from safetensors.torch import save_file
from torch import nn

import dckd_sr  # noqa: F401
from dckd_sr import checkpoint
from dckd_sr.errors import UserError
from dckd_sr.ops.stepping import Stepping

WEIGHTS = {'weight': torch.arange(6.0).reshape(2, 3), 'bias': torch.zeros(2)}
EMA = {'weight': torch.ones(2, 3), 'bias': torch.ones(2)}


@pytest.mark.parametrize(
    'content, key, used, expected',
    [
        ({'params': WEIGHTS, 'params_ema': EMA}, 'params_ema', 'params_ema', EMA),
        ({'params': WEIGHTS, 'params_ema': EMA}, 'params', 'params', WEIGHTS),
        ({'params': WEIGHTS, 'params_ema': EMA}, None, 'params_ema', EMA),
        (WEIGHTS, None, 'bare weights', WEIGHTS),
        ({'state_dict': WEIGHTS, 'epoch': 3}, None, 'state_dict', WEIGHTS),
        ({'model_state_dict': WEIGHTS, 'optimizer': {'state': {}, 'lr': 1}}, None, 'model_state_dict', WEIGHTS),
        ({'model': WEIGHTS, 'scheduler': {'step': 3}}, None, 'model', WEIGHTS),
        ({'net': WEIGHTS}, None, 'net', WEIGHTS),
        ({'generator': WEIGHTS, 'iter': 3, 'lr': [1e-4]}, None, 'generator', WEIGHTS),
        ({'model': {'type': 'EDSR'}, 'net': WEIGHTS}, None, 'net', WEIGHTS),
        ({'net': WEIGHTS, 'params': EMA}, 'net', 'net', WEIGHTS),
        ({'params': {f'module.{k}': v for k, v in WEIGHTS.items()}}, None, 'params', WEIGHTS),
        ({f'_orig_mod.module.{k}': v for k, v in WEIGHTS.items()}, None, 'bare weights', WEIGHTS),
    ],
)
def test_layouts(tmp_path, content, key, used, expected):
    torch.save(content, tmp_path / 'w.pth')
    weights, found = checkpoint.read_weights(tmp_path / 'w.pth', key)
    assert found == used and list(weights) == list(expected)
    assert all(torch.equal(weights[k], expected[k]) for k in expected)


@pytest.mark.parametrize('name', ['w.safetensors', 'w.pth'])
def test_safetensors_whatever_its_name(tmp_path, name):
    save_file(WEIGHTS, tmp_path / name, {'dckd_sr': '{"scale": 2}'})
    weights, used = checkpoint.read_weights(tmp_path / name)
    assert used == 'bare weights' and torch.equal(weights['weight'], WEIGHTS['weight'])
    assert checkpoint.read_metadata(tmp_path / name) == {'scale': 2}
    torch.save({'params': EMA}, tmp_path / 'w.safetensors')
    assert torch.equal(checkpoint.read_weights(tmp_path / 'w.safetensors')[0]['weight'], EMA['weight'])


@pytest.mark.parametrize(
    'content, key, message',
    [
        (
            {'params': WEIGHTS, 'ema': EMA},
            'params_ema',
            "no entry 'params_ema'; available: params, ema; set path.param_key_t",
        ),
        (WEIGHTS, 'params', "no entry 'params': it holds bare weights, without entries; leave out path.param_key_t"),
        ({'a': WEIGHTS, 'b': EMA}, None, 'holds several networks: a, b; set path.param_key_t to one of them'),
        ({'params': {'w': torch.eye(2).to_sparse()}}, None, r'not tensors: w \(a sparse tensor\)'),
        (
            {'net': {'w': torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)}},
            None,
            r'w \(a quantised tensor\)',
        ),
        ({'w': torch.ones(2, device='meta')}, None, r'w \(a tensor without values, of the device meta\)'),
        ({'net': nn.Linear(1, 1)}, None, r'not tensors: net \(torch.nn.modules.linear.Linear\)'),
    ],
)
@pytest.mark.filterwarnings('ignore')
def test_another_entry_is_never_taken_instead(tmp_path, content, key, message):
    torch.save(content, tmp_path / 'w.pth')
    with pytest.raises(UserError, match=message):
        checkpoint.read_weights(tmp_path / 'w.pth', key, 'path.param_key_t')


@pytest.fixture
def log(caplog):
    logger = get_root_logger()
    logger.propagate = True
    with caplog.at_level('INFO', 'basicsr'):
        yield caplog
    logger.propagate = False


@pytest.mark.parametrize(
    'content, key, warned',
    [
        ({'params': WEIGHTS, 'params_ema': EMA}, 'params', True),
        ({'params': WEIGHTS, 'params_ema': EMA}, None, False),
        ({'state_dict': WEIGHTS, 'state_dict_ema': EMA}, None, True),
        ({'params': WEIGHTS}, 'params', False),
    ],
)
def test_raw_weights_beside_averaged_ones_are_told(tmp_path, log, content, key, warned):
    torch.save(content, tmp_path / 'w.pth')
    checkpoint.read_weights(tmp_path / 'w.pth', key, 'path.param_key_t')
    told = [record.getMessage() for record in log.records if record.levelname == 'WARNING']
    assert bool(told) is warned and all('path.param_key_t' in text and 'averaged' in text for text in told)


def renamed(weights, prefix):
    return {f'{prefix}{key}': value for key, value in weights.items()}


class Wrapped(nn.Module):
    """A network whose own names have a part in common."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, 2))


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'net_g.', 'model.', 'model.net_g.module.', 'lit.net.'])
@pytest.mark.parametrize('wrapped', [False, True])
def test_a_prefix_of_all_names_is_left_out_where_the_rest_fits(tmp_path, log, prefix, wrapped):
    net = Wrapped() if wrapped else nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    wanted = {key: torch.full_like(value, 7) for key, value in net.state_dict().items()}
    torch.save({'state_dict': renamed(wanted, prefix)}, tmp_path / 'w.ckpt')
    checkpoint.load_network(net, tmp_path / 'w.ckpt', option='path.param_key_g')
    assert all(torch.equal(value, wanted[key]) for key, value in net.state_dict().items())
    told = ' '.join(record.getMessage() for record in log.records)
    assert not prefix or f'without {prefix} before' in told or "'module.' and '_orig_mod.'" in told


def test_a_prefix_that_the_file_lacks_is_put_before(tmp_path):
    inner = nn.Sequential(nn.Linear(3, 2))
    torch.save(inner.state_dict(), tmp_path / 'w.pth')
    net = Wrapped()
    checkpoint.load_network(net, tmp_path / 'w.pth')
    assert torch.equal(net.model[0].weight, inner[0].weight)


@pytest.mark.parametrize(
    'content, message',
    [
        (renamed(WEIGHTS, 'student.') | renamed(EMA, 'teacher.'), '--prefix student.'),
        ({**WEIGHTS, 'bias': torch.zeros(3)}, 'path.strict_load_g: false takes what fits, the rest stays random'),
        ({**WEIGHTS, 'scale': torch.zeros(3)}, 'path.strict_load_g: false leaves out what is unknown'),
    ],
)
def test_what_does_not_fit_names_what_helps(tmp_path, content, message):
    torch.save({'params': content}, tmp_path / 'w.pth')
    for strict in (True, None):  # an empty option is one that is not set
        with pytest.raises(UserError) as error:
            checkpoint.load_network(nn.Linear(3, 2), tmp_path / 'w.pth', strict, option='path.param_key_g')
        assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('key, wanted', [(None, EMA), ('params', WEIGHTS), ('params_ema', EMA)])
def test_every_role_reads_alike(tmp_path, key, wanted):
    """Start weights, their average, teacher: the same file and option, the same weights."""
    opt = options()
    for name in ('network_his', 'network_vqgan', 'cl_opt', 'ce_opt'):
        (opt if name in opt else opt['train']).pop(name)
    opt.update(model_type='KDModel', network_t=opt['network_g'])
    net = build_network(opt['network_g'])
    raw, ema = (
        {name: torch.full_like(value, fill) for name, value in net.state_dict().items()} for fill in (0.25, 0.5)
    )
    torch.save({'params': renamed(raw, 'net_g.'), 'params_ema': renamed(ema, 'net_g.')}, tmp_path / 'w.pth')
    paths = {
        f'{name}_{letter}': value for letter in 'gt' for name, value in (('param_key', key), ('strict_load', None))
    }
    opt['path'] = {**paths, **{f'pretrain_network_{letter}': str(tmp_path / 'w.pth') for letter in 'gt'}}
    model = build_model(opt)
    fill = 0.25 if wanted is WEIGHTS else 0.5
    assert np.all(flat(model.net_g) == fill) and np.all(flat(model.net_t) == fill)
    assert np.all(flat(model.net_g_ema) == 0.5)  # the file's averaged ones, as BasicSR


def broken(kind, path):
    torch.save({'params': WEIGHTS}, path)
    if kind == 'missing':
        path.unlink()
    elif kind == 'folder':
        path.unlink()
        path.mkdir()
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'truncated':
        path.write_bytes(path.read_bytes()[:700])
    elif kind == 'text':
        path.write_text('not weights')
    elif kind == 'other key':
        torch.save({'generator': WEIGHTS, 'iter': 3}, path)
    elif kind == 'a list':
        torch.save([1, 2], path)
    elif kind == 'no tensors':
        torch.save({'params': {'a': 3}}, path)


@pytest.mark.parametrize(
    'kind, expected',
    [
        ('missing', 'not there'),
        ('folder', 'folder'),
        ('empty', 'is empty'),
        ('truncated', 'cannot be read'),
        ('text', ''),
        ('other key', "no entry 'params'; available: generator"),
        ('a list', 'list'),
        ('no tensors', 'not tensors: a'),
    ],
)
def test_files_that_are_no_weights_are_named(tmp_path, kind, expected):
    path = tmp_path / 'w.pth'
    broken(kind, path)
    with pytest.raises(UserError) as error:
        checkpoint.read_weights(path, 'params')
    assert str(path) in str(error.value) and expected in str(error.value)


class Dangerous:
    def __reduce__(self):
        return os.mkdir, ('ran',)


def test_code_in_a_file_never_runs(tmp_path):
    with open(tmp_path / 'w.pth', 'wb') as file:
        pickle.dump({'params': {'weight': Dangerous()}}, file)
    torch.save({'params': {'weight': Dangerous()}}, tmp_path / 'zip.pth')
    for name in ('w.pth', 'zip.pth'):
        with pytest.raises(UserError):
            checkpoint.read_weights(tmp_path / name)
    assert not (tmp_path / 'ran').exists()


def test_differences_are_named(tmp_path):
    net = nn.Linear(3, 2)
    torch.save({'params': {'weight': torch.zeros(4, 3), 'scale': torch.zeros(1)}}, tmp_path / 'w.pth')
    with pytest.raises(UserError) as error:
        checkpoint.load_network(net, tmp_path / 'w.pth')
    for part in ('missing in the file: bias', 'unknown to the network: scale', 'weight (file (4, 3), network (2, 3))'):
        assert part in str(error.value)
    torch.save({'params': {'weight': torch.zeros(4, 3), 'bias': torch.ones(2)}}, tmp_path / 'w.pth')
    checkpoint.load_network(net, tmp_path / 'w.pth', strict=False)
    assert torch.equal(net.bias, torch.ones(2))


def test_swinir_of_another_training_patch_loads(tmp_path):
    from basicsr.archs.swinir_arch import SwinIR

    settings = {'window_size': 8, 'depths': [2], 'embed_dim': 8, 'num_heads': [2], 'upscale': 2}
    settings['upsampler'] = 'pixelshuffle'
    saved, net = SwinIR(img_size=32, **settings), SwinIR(img_size=16, **settings)
    torch.save({'params': saved.state_dict()}, tmp_path / 'w.pth')
    checkpoint.load_network(net, tmp_path / 'w.pth')
    lq = torch.rand(1, 3, 24, 24)
    torch.testing.assert_close(net(lq), saved(lq))


def test_a_failed_write_keeps_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / 'w.pth'
    checkpoint.write({'params': WEIGHTS}, path)

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='No space left'):
        checkpoint.write({'params': EMA}, path)
    assert torch.equal(checkpoint.read_weights(path)[0]['weight'], WEIGHTS['weight'])
    assert [p.name for p in tmp_path.iterdir()] == ['w.pth']


def run_options(folder):
    opt = options(gaussian_noise_prob=1, lcr_opt={'type': 'L1Loss'})
    opt.update(auto_resume=True, network_vqgan={**opt['network_vqgan'], 'allow_random': True})
    opt['path'] = {'models': str(folder / 'models'), 'training_states': str(folder / 'training_states')}
    return opt


def encoder_of(source, target):
    target.net_vqgan.load_state_dict(source.net_vqgan.state_dict())
    target.net_t.load_state_dict(source.net_t.state_dict())


def test_a_state_brings_everything_back(tmp_path):
    opt = run_options(tmp_path)
    run = build_model(opt)
    for iteration in (1, 2, 3):
        step(run, iteration)
    run.best_metric_results = {'Set5': {'psnr': {'better': 'higher', 'val': np.float64(30.5), 'iter': 2}}}
    run.save(0, 3)
    losses = step(run, 4)

    state, path = checkpoint.find_state(opt)
    assert path.name == '3.state' and state['iter'] == 3
    resumed = build_model(opt)
    encoder_of(run, resumed)
    checkpoint.resume(resumed, opt, state, path)
    assert resumed.best_metric_results['Set5']['psnr']['val'] == 30.5
    assert step(resumed, 4) == losses
    for name in ('net_g', 'net_g_ema', 'net_his'):
        assert np.array_equal(flat(getattr(run, name)), flat(getattr(resumed, name))), name


def test_basicsr_reads_our_files_and_we_read_its_states(tmp_path):
    opt = run_options(tmp_path)
    run = build_model(opt)
    step(run, 1)
    run.save(0, 1)
    plain = torch.load(tmp_path / 'models' / 'net_g_1.pth', weights_only=True)
    assert sorted(plain) == ['params', 'params_ema'] and list(plain['params']) == list(run.net_g.state_dict())
    state = torch.load(tmp_path / 'training_states' / '1.state', weights_only=True)
    del state['dckd_sr']
    torch.save(state, tmp_path / 'training_states' / '1.state')
    resumed = build_model(opt)
    found, path = checkpoint.find_state(opt)
    checkpoint.resume(resumed, opt, found, path)
    assert np.array_equal(flat(resumed.net_his), flat(run.net_g_ema))  # no history in the file: a copy of the EMA


@pytest.mark.parametrize('damage', ['truncated', 'no network file', 'foreign'])
def test_auto_resume_passes_over_what_it_cannot_read(tmp_path, damage):
    opt = run_options(tmp_path)
    run = build_model(opt)
    for iteration in (1, 2):
        run.save(0, iteration)
    newest = tmp_path / 'training_states' / '2.state'
    if damage == 'truncated':
        newest.write_bytes(newest.read_bytes()[:1000])
    elif damage == 'foreign':
        newest.write_text('hello')
    else:
        (tmp_path / 'models' / 'net_g_2.pth').unlink()
    (tmp_path / 'training_states' / 'notes.state').write_text('not a number')
    assert checkpoint.find_state(opt)[1].name == '1.state'


def test_no_state_and_a_named_one_that_is_missing(tmp_path):
    opt = copy.deepcopy(run_options(tmp_path))
    assert checkpoint.find_state(opt) == (None, None)
    opt['auto_resume'] = False
    opt['path']['resume_state'] = str(tmp_path / '5.state')
    with pytest.raises(UserError, match='5.state'):
        checkpoint.find_state(opt)


def test_ranks_that_differ_save_nothing(monkeypatch):
    net = torch.nn.Conv2d(1, 1, 3)
    model = types.SimpleNamespace(opt={'network_g': {}}, net_g=net, get_bare_model=lambda net: net)
    monkeypatch.setattr(checkpoint, '_gather', lambda value: [value, dict(value)])
    checkpoint.check_equal(model)

    def another(value):
        with torch.no_grad():
            net.weight[0, 0, 0, 0] += 1e-7  # one bit is enough
        monkeypatch.setattr(checkpoint, '_gather', lambda own: [value, own])
        checkpoint.check_equal(model)

    monkeypatch.setattr(checkpoint, '_gather', another)
    with pytest.raises(UserError, match='the ranks hold different net_g; nothing was saved'):
        checkpoint.check_equal(model)


@pytest.mark.parametrize(
    'kind, options, said',
    [
        ('EDSR', {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1}, 'x2 instead of x4: '),
        ('MSRResNet', {'num_feat': 8, 'num_block': 1}, 'x2 instead of x4: '),
        ('SwinIR', {'img_size': 8, 'depths': [2], 'num_heads': [2], 'embed_dim': 8, 'window_size': 4}, 'it seems: '),
    ],
)
def test_weights_of_another_scale(kind, options, said, tmp_path):
    options = {**options, **({'upsampler': 'pixelshuffledirect'} if kind == 'SwinIR' else {})}
    two, four = (ARCH_REGISTRY.get(kind)(**options, upscale=scale) for scale in (2, 4))
    path = tmp_path / 'two.pth'
    torch.save({'params': two.state_dict()}, path)
    with pytest.raises(UserError, match=f'does not fit this {kind}: of another scale, {said}'):
        checkpoint.load_network(four, str(path))
    wider = {**options, 'num_feat': 16} if 'num_feat' in options else {**options, 'embed_dim': 12}
    torch.save({'params': ARCH_REGISTRY.get(kind)(**wider, upscale=4).state_dict()}, path)
    with pytest.raises(UserError, match=f'does not fit this {kind}') as error:
        checkpoint.load_network(four, str(path))
    assert 'another scale' not in str(error.value)


def stepped(net, cls, batches, state=None, **options):
    """A network after steps of an optimiser that goes on from a state, as the models build and restore it."""
    optimizer = Stepping().attach(cls(net.parameters(), 0.01, **options))
    model = types.SimpleNamespace(optimizers=[optimizer], schedulers=[], opt={}, device=torch.device('cpu'))
    if state is not None:
        checkpoint.restore_state(
            model, {'optimizers': [state], 'schedulers': [], 'dckd_sr': {'generators': [None] * 2}}
        )
    for batch in batches:
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()
    return optimizer


BEFORE_FUSED = ('fused', 'foreach', 'capturable', 'differentiable', 'maximize')  # what states of old torch lack


@pytest.mark.parametrize('saved', [{}, {'fused': True}, {'foreach': True}, 'old'])
@pytest.mark.parametrize('now', [{}, {'fused': True}, {'foreach': True}])
@pytest.mark.parametrize('formats', [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize('name, options', [('Adam', {'amsgrad': True}), ('AdamW', {}), ('SGD', {'momentum': 0.9})])
def test_states_go_on_with_other_kernels_and_memory_formats(name, options, saved, now, formats):
    """CUDA trains with fused kernels, the CPU without; a state of one goes on as if it had been written there."""
    cls, batches = getattr(torch.optim, name), torch.rand(4, 2, 3, 8, 8)
    layouts = [torch.channels_last if chosen else torch.contiguous_format for chosen in formats]
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 3))
    expected = copy.deepcopy(net)
    stepped(expected, cls, batches, **options)
    first = copy.deepcopy(net).to(memory_format=layouts[0])
    state = stepped(first, cls, batches[:2], **options, **({} if saved == 'old' else saved)).state_dict()
    if saved == 'old':
        for group in state['param_groups']:
            for key in BEFORE_FUSED:
                group.pop(key, None)
        for values in state['state'].values():
            if 'step' in values:
                values['step'] = int(values['step'])
    second = copy.deepcopy(net).to(memory_format=layouts[1])
    second.load_state_dict(first.state_dict())
    optimizer = stepped(second, cls, batches[2:], copy.deepcopy(state), **options, **now)
    for group in optimizer.param_groups:
        assert group['fused'] == now.get('fused') and group['foreach'] == now.get('foreach')
    for a, b in zip(second.parameters(), expected.parameters()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ('name', 'before', 'after'),
    [
        ('Adam', {}, {'amsgrad': True}),
        ('RMSprop', {}, {'centered': True, 'momentum': 0.9}),
        ('SGD', {}, {'momentum': 0.9}),
        ('Adam', {'amsgrad': True}, {}),
    ],
)
def test_settings_that_ask_for_other_averages_begin_them(name, before, after):
    """New settings count when a run goes on; averages that the state does not have start at zero."""
    net, batches = nn.Conv2d(3, 2, 3), torch.rand(3, 2, 3, 8, 8)
    cls = getattr(torch.optim, name)
    state = stepped(net, cls, batches[:1], **before).state_dict()
    optimizer = Stepping().attach(cls(net.parameters(), 0.01, **after))
    model = types.SimpleNamespace(optimizers=[optimizer], schedulers=[])
    rates = checkpoint._settings(model)
    optimizer.load_state_dict(state)
    kept = {key: value.clone() for key, value in optimizer.state[net.weight].items() if value is not None}
    checkpoint._replay(model, rates)
    for key, value in kept.items():
        assert torch.equal(optimizer.state[net.weight][key], value)
    weight = net.weight.detach().clone()
    net(batches[1]).square().mean().backward()
    optimizer.step()
    assert net.weight.isfinite().all() and not torch.equal(net.weight, weight)


@pytest.mark.parametrize('new_rates', [False, True])
@pytest.mark.parametrize('name', ['Adam', 'RMSprop', 'SGD'])
@pytest.mark.parametrize('lacking', [(), BEFORE_FUSED])
def test_a_state_of_a_cpu_goes_on_on_a_gpu(gpu, name, new_rates, lacking):
    opt = options()
    momentum = {'momentum': 0.9} if name == 'SGD' else {}
    opt['train']['optim_g'] = {'type': name, 'lr': 1e-3, **momentum}
    opt['num_gpu'] = 0
    before = build_model(copy.deepcopy(opt))
    assert before.device.type == 'cpu'
    for iteration in (1, 2):
        before.steps.begin(iteration)
        before.feed_data({'lq': torch.rand(2, 3, 16, 16), 'gt': torch.rand(2, 3, 32, 32)})
        before.optimize_parameters(iteration)
    state = {
        'iter': 2,
        'optimizers': [before.optimizer_g.state_dict()],
        'schedulers': [scheduler.state_dict() for scheduler in before.schedulers],
    }
    for key in lacking:  # as torch wrote them when BasicSR was new
        state['optimizers'][0]['param_groups'][0].pop(key, None)
    model = build_model({**copy.deepcopy(opt), 'num_gpu': 1})
    rates = checkpoint._settings(model)
    model.resume_training(state)
    if new_rates:
        checkpoint._replay(model, rates)
    assert model.optimizer_g.param_groups[0].get('fused') == (True if name == 'Adam' else None)
    for iteration in (3, 4):
        gpu.found.clear()
        model.steps.begin(iteration)
        model.feed_data({'lq': torch.rand(2, 3, 16, 16), 'gt': torch.rand(2, 3, 32, 32)})
        model.optimize_parameters(iteration)
    assert not gpu.found
    tensors = [value for state in model.optimizer_g.state.values() for value in state.values() if value is not None]
    assert {value.device.type for value in tensors} == {'cuda'}
