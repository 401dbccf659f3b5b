"""Every option file that is shipped: complete, of one form, with the networks of the paper, and it runs.

Runs are two steps and a validation on generated images with networks shrunk by overrides; all else is the file's own.
"""

import copy
import itertools
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network

from dckd_sr import option_files, options, test, train, zoo

OPTIONS = Path(__file__).resolve().parents[1] / 'options'
NAMES = sorted(file.relative_to(OPTIONS).with_suffix('').as_posix() for file in OPTIONS.rglob('*.yml'))
TESTS = [name for name in NAMES if re.search(r'(^|/|_)test(_|$)', name)]
TRAININGS = [name for name in NAMES if name not in TESTS]
SR = list(itertools.product(('edsr', 'rcan', 'swinir'), (2, 3, 4)))
TASKS = ('nafnet_deblur', 'restormer_deblur', 'restormer_derain')
PAIRS = [f'{kind}_x{scale}' for kind, scale in SR] + list(TASKS)
# Trainable parameters of teacher and student. SwinIR, RCAN, NAFNet, Restormer: counted from the classes of their
# authors, in agreement with the paper's Table 1. EDSR: its authors state 43.1 M and 1.5 M at x4.
PARAMETERS = {
    'edsr_x2': (40729603, 1369859),
    'edsr_x3': (43680003, 1554499),
    'edsr_x4': (43089923, 1517571),
    'rcan_x2': (15444643, 5023603),
    'rcan_x3': (15629283, 5208243),
    'rcan_x4': (15592355, 5171315),
    'swinir_x2': (11752487, 1087727),
    'swinir_x3': (11937127, 1272367),
    'swinir_x4': (11900199, 1235439),
    'nafnet_deblur': (17111907, 2683059),
    'restormer_deblur': (26126644, 3813230),
    'restormer_derain': (26126644, 3813230),
}
MEAN = [0.4488, 0.4371, 0.4040]
# What RCAN's authors' file holds; the option files name the file alone.
RCAN = {'type': 'RCAN', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 64, 'num_group': 10, 'num_block': 20}
SMALL = {
    'EDSR': {'num_feat': 8, 'num_block': 1},
    'SRVGGNetCompact': {'num_feat': 8, 'num_conv': 1},
    'RCAN': {'num_feat': 8, 'num_group': 1, 'num_block': 1, 'squeeze_factor': 4},
    'SwinIR': {'depths': [1], 'num_heads': [2], 'embed_dim': 8, 'window_size': 4, 'img_size': 8},
    'NAFNet': {'width': 4, 'enc_blk_nums': [1, 1], 'dec_blk_nums': [1, 1]},
    'Restormer': {'dim': 8, 'num_blocks': [1] * 4, 'num_refinement_blocks': 1, 'heads': [1] * 4},
    'VQGAN': {
        'embed_dim': 32,
        'n_embed': 16,
        'ddconfig:ch': 32,
        'ddconfig:ch_mult': [1] * 5,
        'ddconfig:num_res_blocks': 1,
        'ddconfig:attn_resolutions': [],
        'ddconfig:z_channels': 32,
        'ddconfig:resolution': 32,
    },
}
SMALL['NAFNetLocal'] = SMALL['NAFNet']


def read(name):
    """The options of a file, with its bases."""
    return option_files.read(OPTIONS / f'{name}.yml').options


def load(name, *overrides):
    return options.load(OPTIONS / f'{name}.yml', ['num_gpu=0', *overrides], is_train=name in TRAININGS)


def set_key(opt, key, value):
    for part in key.split(':')[:-1]:
        opt = opt[part]
    opt[key.split(':')[-1]] = value


def shrunk(block):
    block = copy.deepcopy(block)
    for key, value in SMALL[block['type']].items():
        set_key(block, key, value)
    return block


def flat(value, path=''):
    """'train.optim_g.lr' -> value, of all leaves."""
    if not isinstance(value, dict):
        return {path: value}
    return {name: leaf for key, part in value.items() for name, leaf in flat(part, f'{path}.{key}'.strip('.')).items()}


# ---------------------------------------------------------------------------------------------------------------------
# As they are


def test_all_of_the_papers_rows_are_there():
    for name in PAIRS:
        assert f'train_{name}' in TRAININGS and f'test_{name}' in TESTS
    for name in (*(f'train_{pair}' for pair in PAIRS), *(f'test_{pair}' for pair in PAIRS)):
        assert '_base_' not in (OPTIONS / f'{name}.yml').read_text(encoding='utf-8')  # complete in one file


@pytest.mark.parametrize('name', NAMES)
def test_nothing_is_wrong_with_it_but_files_that_are_not_there(name):
    try:
        warnings = load(name)[1]
        problems = []
    except options.OptionError as error:
        warnings, problems = [], error.problems
    for problem in [*problems, *warnings]:
        assert re.search(r': no such (file|folder)', problem), problem
    for problem in problems:  # a public file comes with the command that gets it
        public = 'pretrained_models' in problem and 'pretrained_models/demo' not in problem
        assert not public or re.search(r'python -m dckd_sr\.zoo get \S+$', problem), problem


@pytest.mark.parametrize('name', [f'{kind}_{pair}' for pair in PAIRS for kind in ('train', 'test')])
def test_comments_name_the_command_that_gets_each_public_file(name):
    text = (OPTIONS / f'{name}.yml').read_text(encoding='utf-8')
    files = re.findall(r'^( +)(?:pretrain_network_(?:t|vqgan)|path): (\S+)', text, flags=re.M)
    assert len(files) == (2 if name.startswith('train') else 1)
    for indent, path in files:
        command = zoo.command_for(path)
        assert command and f'{indent}# {command}\n' in text
        entry = zoo.find(command.split()[-1])
        assert zoo.path_of(entry).as_posix() == path


@pytest.mark.parametrize('pair', PAIRS)
def test_full_networks(pair, monkeypatch):
    linspace = torch.linspace  # SwinIR asks for the values of its drop path rates, which the meta device has not
    monkeypatch.setattr(torch, 'linspace', lambda *args, **kwargs: linspace(*args, **{**kwargs, 'device': 'cpu'}))
    opt = read(f'train_{pair}')
    for letter, expected in zip('tg', PARAMETERS[pair]):
        block = copy.deepcopy(opt[f'network_{letter}'])
        if block['type'] == 'spandrel':
            assert pair.startswith('rcan') and letter == 't'
            block = {**RCAN, 'upscale': opt['scale']}
        with torch.device('meta'):
            net = build_network(block)
        assert sum(parameter.numel() for parameter in net.parameters()) == expected
        comment = re.search(rf'^network_{letter}:.* ([\d.]+) M parameters$', text_of(pair), flags=re.M)
        assert float(comment[1]) == pytest.approx(expected / 1e6, abs=0.05)
    with torch.device('meta'):
        encoder = build_network(opt['network_vqgan'])
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 29626112


def text_of(pair):
    return (OPTIONS / f'train_{pair}.yml').read_text(encoding='utf-8')


@pytest.mark.parametrize('pair', PAIRS)
def test_a_test_file_scores_what_its_training_writes(pair):
    training, testing = read(f'train_{pair}'), read(f'test_{pair}')
    assert testing['path']['pretrain_network_g'] == f'experiments/{training["name"]}/models/net_g_latest.pth'
    assert testing['path']['param_key_g'] == 'params_ema' and training['train']['ema_decay'] == 0.999
    for key in ('network_g', 'network_t', 'scale'):
        assert testing[key] == training[key]
    for key in ('pretrain_network_t', 'param_key_t'):
        assert testing['path'].get(key) == training['path'].get(key)
    assert testing['val']['metrics'] == training['val']['metrics']
    assert f'-opt options/train_{pair}.yml' in text_of(pair)


@pytest.mark.parametrize('kind', ['train', 'test'])
@pytest.mark.parametrize('family', ['edsr', 'rcan', 'swinir'])
def test_files_of_one_family_differ_in_the_scale_alone(family, kind):
    by_scale = {scale: read(f'{kind}_{family}_x{scale}') for scale in (2, 3, 4)}
    leaves = {scale: flat(opt) for scale, opt in by_scale.items()}
    for scale in (3, 4):
        assert list(leaves[scale]) == list(leaves[2])
        for key, value in leaves[scale].items():
            if value == leaves[2][key]:
                continue
            # The scale itself, what it multiplies, and names with it in them; EDSR's files have hashes in theirs.
            if isinstance(value, int):
                assert value / scale == leaves[2][key] / 2 and key.rpartition('.')[2] in (
                    'scale',
                    'upscale',
                    'gt_size',
                    'crop_border',
                ), key
            else:
                changed = re.sub(r'-\w{8}\.pth$', '', value), re.sub(r'-\w{8}\.pth$', '', leaves[2][key])
                assert changed[0] == re.sub(r'([xX])2', rf'\g<1>{scale}', changed[1]), key


def test_families_of_super_resolution_differ_in_their_networks_alone():
    for kind, scale in itertools.product(('train', 'test'), (2, 3, 4)):
        others = [read(f'{kind}_{family}_x{scale}') for family in ('edsr', 'rcan', 'swinir')]
        for opt in others:
            del opt['name'], opt['network_g'], opt['network_t']
            for key in ('pretrain_network_t', 'strict_load_t', 'param_key_t'):
                opt['path'].pop(key, None)
            if kind == 'test':
                del opt['path']['pretrain_network_g']
        assert others[0] == others[1] == others[2]


@pytest.mark.parametrize('pair', PAIRS)
def test_losses_are_the_papers(pair):
    section = read(f'train_{pair}')['train']
    weights = {key: section[key]['loss_weight'] for key in ('pixel_opt', 'logits_opt', 'cl_opt', 'ce_opt')}
    assert weights == {'pixel_opt': 1, 'logits_opt': 1, 'cl_opt': 0.1, 'ce_opt': 0.001}
    assert section['pixel_opt']['type'] == section['logits_opt']['type'] == 'L1Loss'  # Eqs. 2 and 3
    assert section['cl_opt']['weights'] == [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1]
    assert section['step'] == [1000, 2000, 3000] and section['update_decay'] == 0.1 and section['num_neg'] == 4
    assert 'lcr_opt' not in section and read(f'train_{pair}')['network_his'] is True


@pytest.mark.parametrize('family, scale', SR)
def test_recipe_of_super_resolution(family, scale):
    opt = read(f'train_{family}_x{scale}')
    data, section = opt['datasets']['train'], opt['train']
    assert data['gt_size'] == 48 * scale and data['batch_size_per_gpu'] == 16 and 'accum_iter' not in section
    assert section['optim_g'] == {'type': 'Adam', 'lr': 1e-4, 'weight_decay': 0, 'betas': [0.9, 0.99]}
    assert section['scheduler'] == {'type': 'MultiStepLR', 'milestones': [100000, 200000], 'gamma': 0.1}
    assert section['total_iter'] == 250000
    assert all(m == {**m, 'crop_border': scale, 'test_y_channel': True} for m in opt['val']['metrics'].values())
    sets = [block['name'] for block in read(f'test_{family}_x{scale}')['datasets'].values()]
    assert sets == ['Set5', 'Set14', 'B100', 'Urban100', 'Manga109']


def test_recipe_of_nafnet():
    opt = read('train_nafnet_deblur')
    section, data = opt['train'], opt['datasets']['train']
    assert section['optim_g'] == {'type': 'AdamW', 'lr': 1e-3, 'weight_decay': 1e-3, 'betas': [0.9, 0.9]}
    assert section['scheduler'] == {'type': 'TrueCosineAnnealingLR', 'T_max': 200000, 'eta_min': 1e-7}
    assert section['total_iter'] == 200000
    assert data['gt_size'] == 256 and data['batch_size_per_gpu'] * section['accum_iter'] == 32


@pytest.mark.parametrize('task', ['deblur', 'derain'])
def test_recipe_of_restormer(task):
    opt = read(f'train_restormer_{task}')
    section, data = opt['train'], opt['datasets']['train']
    assert section['optim_g'] == {'type': 'AdamW', 'lr': 3e-4, 'weight_decay': 1e-4, 'betas': [0.9, 0.999]}
    assert section['scheduler'] == {'type': 'TrueCosineAnnealingLR', 'T_max': 300000, 'eta_min': 1e-6}
    assert section['total_iter'] == sum(data['iters']) == 300000
    assert list(itertools.accumulate(data['iters']))[:-1] == [92000, 156000, 204000, 240000, 276000]
    assert data['gt_sizes'] == [128, 160, 192, 256, 320, 384]
    assert [size * section['accum_iter'] for size in data['mini_batch_sizes']] == [64, 40, 32, 16, 8, 8]


def test_sets_and_metrics_of_deblurring_and_deraining():
    for name, on_y in (('nafnet_deblur', False), ('restormer_deblur', False), ('restormer_derain', True)):
        opt = read(f'test_{name}')
        assert [metric['test_y_channel'] for metric in opt['val']['metrics'].values()] == [on_y] * 2
        assert [metric['crop_border'] for metric in opt['val']['metrics'].values()] == [0, 0]
        sets = [block['name'] for block in opt['datasets'].values()]
        assert sets == (['Test100', 'Rain100H', 'Rain100L', 'Test2800', 'Test1200'] if on_y else ['GoPro'])
        for block in opt['datasets'].values():  # the layout that dckd_sr.prepare writes
            base = f'datasets/Rain13K/test/{block["name"]}' if on_y else 'datasets/GoPro/test'
            assert (block['dataroot_gt'], block['dataroot_lq']) == (f'{base}/gt', f'{base}/lq')


# ---------------------------------------------------------------------------------------------------------------------
# Running


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Two smooth images: gt (48x48), and what is x1 to x4 times smaller, as 1, 2, 3, 4."""
    folder, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for index in range(2):
        smooth = cv2.resize(rng.random((5, 5, 3)), (48, 48), interpolation=cv2.INTER_CUBIC)
        for name, side in (('gt', 48), *((str(scale), 48 // scale) for scale in (1, 2, 3, 4))):
            (folder / name).mkdir(exist_ok=True)
            image = cv2.resize(smooth, (side, side), interpolation=cv2.INTER_AREA)
            image = image + (0.03 * rng.standard_normal(image.shape) if name == '1' else 0)
            cv2.imwrite(str(folder / name / f'{index}.png'), np.clip(image * 255, 0, 255).round().astype(np.uint8))
    return folder


def weights(block, path):
    """The file with weights of a network, in BasicSR's layout."""
    torch.manual_seed(1)
    state = build_network(copy.deepcopy(block)).state_dict()
    torch.save({'params': state, 'params_ema': state}, path)
    return path


def overrides(name, images):
    """Paths, counts and sizes, as a user would override them."""
    opt, scale = read(name), read(name)['scale']
    values = {'num_gpu': 0}
    for key, block in opt['datasets'].items():
        values[f'datasets:{key}:dataroot_gt'] = images / 'gt'
        values[f'datasets:{key}:filename_tmpl'] = "'{}'"
        if block.get('dataroot_lq'):
            same = block['dataroot_lq'] == block['dataroot_gt']
            values[f'datasets:{key}:dataroot_lq'] = images / ('gt' if same else str(scale))
    for letter in ('g', 't', 'vqgan'):
        block = opt.get(f'network_{letter}')
        if block is None:
            continue
        if block['type'] == 'spandrel':
            small = shrunk({**RCAN, 'upscale': scale, 'rgb_mean': MEAN})
            values['network_t:path'] = weights(small, 'teacher.pth')
            continue
        values.update({f'network_{letter}:{key}': value for key, value in SMALL[block['type']].items()})
        if letter == 'vqgan':
            values['network_vqgan:allow_random'] = 'true'
            values['path:pretrain_network_vqgan'] = '~'
        elif letter == 't' or name in TESTS:
            values[f'path:pretrain_network_{letter}'] = weights(shrunk(block), f'{letter}.pth')
    if name in TRAININGS:
        if opt['datasets']['train'].get('teacher_cache'):
            values['datasets:train:teacher_cache'] = '~'
        if opt['path'].get('pretrain_network_g'):
            values['path:pretrain_network_g'] = '~'
        values.update(
            {
                'datasets:train:gt_size': 48 if scale == 3 else 32,
                'datasets:train:batch_size_per_gpu': 2,
                'datasets:train:num_worker_per_gpu': 0,
                'train:total_iter': 2,
                'val:val_freq': 2,
                'val:tile_size': '~',
                'val:tile_overlap': '~',
                'logger:print_freq': 1,
                'logger:use_tb_logger': 'false',
            }
        )
        if opt['train'].get('logits_opt'):
            values['train:check_teacher'] = 'false'  # its weights are random
        if 'gt_sizes' in opt['datasets']['train']:
            sizes = {'gt_sizes': [16, 32], 'mini_batch_sizes': [2, 1], 'iters': [1, 1]}
            values.update({f'datasets:train:{key}': value for key, value in sizes.items()})
        if opt['train'].get('accum_iter'):
            values['train:accum_iter'] = 2
    return [f'{key}={value}' for key, value in values.items()]


@pytest.mark.parametrize('name', TRAININGS)
def test_a_training_runs_and_validates(name, images):
    assert train.main(['-opt', str(OPTIONS / f'{name}.yml'), '--force_yml', *overrides(name, images)]) == 0
    opt = read(name)
    (log,) = Path('experiments', opt['name']).glob('train_*.log')
    log = log.read_text(encoding='utf-8')
    assert re.findall(r'iter: +(\d), lr', log) == ['1', '2']
    for key, term in (('pixel_opt', 'l_pix'), ('logits_opt', 'l_ts'), ('cl_opt', 'l_cl'), ('ce_opt', 'l_ce')):
        assert (f' {term}: ' in log) == bool(opt['train'].get(key)), term
    for metric in opt['val']['metrics']:
        assert re.search(rf'# {metric}: \d', log)
    assert Path('experiments', opt['name'], 'models', 'net_g_latest.pth').is_file()


@pytest.mark.parametrize('name', TESTS)
def test_a_test_scores_student_and_teacher_on_every_set(name, images):
    argv = ['-opt', str(OPTIONS / f'{name}.yml'), '--with_teacher', '--force_yml', *overrides(name, images)]
    assert test.main(argv) == 0
    opt = read(name)
    results = json.loads(Path('results', opt['name'], 'results.json').read_text(encoding='utf-8'))['results']
    assert list(results) == ['bicubic'] * (opt['scale'] > 1) + ['student', 'teacher']
    for sets in results.values():
        assert list(sets) == [block['name'] for block in opt['datasets'].values()]
        for entry in sets.values():
            assert list(entry['means']) == ['psnr', 'ssim'] and len(entry['images']) == 2
