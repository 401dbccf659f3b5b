"""The option files of NAFNet and Restormer, with paths, io_backend and counts overridden and networks shrunk.

Their keys are those of megvii-research/NAFNet, options/{train,test}/{GoPro,REDS,SIDD}/NAFNet-width*.yml and
{GoPro,SIDD}/Baseline-width*.yml, and of swz30/Restormer,
{Deraining,Motion_Deblurring,Defocus_Deblurring,Denoising}/Options/*.yml.
"""

import copy
import re
from pathlib import Path

import cv2
import numpy as np
import option_files
import pytest
import torch
from basicsr.archs import build_network

from dckd_sr import options, safe_yaml, test, train

LOGGER = {'use_tb_logger': True, 'wandb': {'project': None, 'resume_id': None}}
DIST = {'backend': 'nccl', 'port': 29500}


def metric(name, on_y=False):
    return {'type': f'calculate_{name}', 'crop_border': 0, 'test_y_channel': on_y}


def nafnet(task, width, total, decay, network='NAFNet', **arguments):
    """NAFNet's training files, and Baseline's."""
    sidd = task == 'SIDD'
    data = {'type': 'PairedImageDataset', 'io_backend': {'type': 'lmdb'}}
    numbers = ([2, 2, 4, 8], 12, [2, 2, 2, 2]) if sidd else ([1, 1, 1, 28], 1, [1, 1, 1, 1])
    return {
        'name': f'{network}-{task}-width{width}',
        'model_type': 'ImageRestorationModel',
        'scale': 1,
        'num_gpu': 8,
        'manual_seed': 10,
        'datasets': {
            'train': {
                'name': f'{task}-train',
                **data,
                'dataroot_gt': f'./datasets/{task}/train/gt.lmdb',
                'dataroot_lq': f'./datasets/{task}/train/lq.lmdb',
                'filename_tmpl': '{}',
                'gt_size': 256,
                'use_flip': not sidd,
                'use_rot': not sidd,
                'use_shuffle': True,
                'num_worker_per_gpu': width // 8,
                'batch_size_per_gpu': width // 8,
                'dataset_enlarge_ratio': 1,
                'prefetch_mode': None,
            },
            'val': {
                'name': f'{task}-test',
                **data,
                'dataroot_gt': f'./datasets/{task}/test/gt.lmdb',
                'dataroot_lq': f'./datasets/{task}/test/lq.lmdb',
            },
        },
        'network_g': {
            'type': network if sidd else f'{network}Local',
            'width': width,
            **arguments,
            **dict(zip(('enc_blk_nums', 'middle_blk_num', 'dec_blk_nums'), numbers)),
        },
        'path': {'pretrain_network_g': None, 'strict_load_g': True, 'resume_state': None},
        'train': {
            'optim_g': {'type': 'AdamW', 'lr': 1e-3, 'weight_decay': decay, 'betas': [0.9, 0.9]},
            'scheduler': {'type': 'TrueCosineAnnealingLR', 'T_max': total, 'eta_min': 1e-7},
            'total_iter': total,
            'warmup_iter': -1,
            'pixel_opt': {'type': 'PSNRLoss', 'loss_weight': 1, 'reduction': 'mean'},
        },
        'val': {
            'val_freq': 2e4,
            'save_img': False,
            **({'use_image': False} if sidd else {}),
            'metrics': {name: metric(name) for name in ('psnr', 'ssim')},
        },
        'logger': {'print_freq': 200, 'save_checkpoint_freq': 5e3, **LOGGER},
        'dist_params': DIST,
    }


def restormer(name, norm='WithBias', on_y=False, mixup=False, kind='Dataset_PairedImage', channels=(3, 3), **data):
    """Restormer's files, which train and test."""
    roots = {'dataroot_gt': './Datasets/target', 'dataroot_lq': './Datasets/input', **data}
    in_training = {key: roots.pop(key) for key in ('sigma_type', 'sigma_range') if key in roots}
    in_tests = {key: roots.pop(key) for key in ('sigma_test',) if key in roots}
    roots = {key: value for key, value in roots.items() if value is not None}
    return {
        'name': f'{name}_Restormer',
        'model_type': 'ImageCleanModel',
        'scale': 1,
        'num_gpu': 8,
        'manual_seed': 100,
        'datasets': {
            'train': {
                'name': 'TrainSet',
                'type': kind,
                **roots,
                **in_training,
                'geometric_augs': True,
                'filename_tmpl': '{}',
                'io_backend': {'type': 'disk'},
                'use_shuffle': True,
                'num_worker_per_gpu': 8,
                'batch_size_per_gpu': 8,
                'mini_batch_sizes': [8, 5, 4, 2, 1, 1],
                'iters': [92000, 64000, 48000, 36000, 36000, 24000],
                'gt_size': 384,
                'gt_sizes': [128, 160, 192, 256, 320, 384],
                'dataset_enlarge_ratio': 1,
                'prefetch_mode': None,
            },
            'val': {'name': 'ValSet', 'type': kind, **roots, **in_tests, 'io_backend': {'type': 'disk'}},
        },
        'network_g': {
            'type': 'Restormer',
            'inp_channels': channels[0],
            'out_channels': channels[1],
            'dim': 48,
            'num_blocks': [4, 6, 6, 8],
            'num_refinement_blocks': 4,
            'heads': [1, 2, 4, 8],
            'ffn_expansion_factor': 2.66,
            'bias': False,
            'LayerNorm_type': norm,
            'dual_pixel_task': channels[0] == 6,
        },
        'path': {'pretrain_network_g': None, 'strict_load_g': True, 'resume_state': None},
        'train': {
            'total_iter': 300000,
            'warmup_iter': -1,
            'use_grad_clip': True,
            'scheduler': {
                'type': 'CosineAnnealingRestartCyclicLR',
                'periods': [92000, 208000],
                'restart_weights': [1, 1],
                'eta_mins': [0.0003, 0.000001],
            },
            'mixing_augs': {'mixup': mixup, 'mixup_beta': 1.2, 'use_identity': True},
            'optim_g': {'type': 'AdamW', 'lr': 3e-4, 'weight_decay': 1e-4, 'betas': [0.9, 0.999]},
            'pixel_opt': {'type': 'L1Loss', 'loss_weight': 1, 'reduction': 'mean'},
        },
        'val': {
            'window_size': 8,
            'val_freq': 4e3,
            'save_img': False,
            'rgb2bgr': True,
            'use_image': False,
            'max_minibatch': 8,
            'metrics': {'psnr': metric('psnr', on_y)},
        },
        'logger': {'print_freq': 1000, 'save_checkpoint_freq': 4e3, **LOGGER},
        'dist_params': DIST,
    }


def gaussian(name, channels):
    noise = {'sigma_type': 'random', 'sigma_range': [0, 50], 'sigma_test': 25, 'in_ch': channels, 'dataroot_lq': 'none'}
    kind = 'Dataset_GaussianDenoising'
    return restormer(name, 'BiasFree', mixup=True, kind=kind, channels=(channels, channels), **noise)


NAFNET = {
    'gopro-32': nafnet('GoPro', 32, 200000, 0.0),
    'gopro-64': nafnet('GoPro', 64, 400000, 1e-3),
    'reds-64': nafnet('REDS', 64, 400000, 1e-3),
    'sidd-32': nafnet('SIDD', 32, 200000, 0.0),
    'sidd-64': nafnet('SIDD', 64, 400000, 0.0),
    'baseline-gopro-32': nafnet('GoPro', 32, 200000, 1e-3, 'Baseline', dw_expand=1, ffn_expand=2),
    'baseline-gopro-64': nafnet('GoPro', 64, 400000, 0.0, 'Baseline', dw_expand=2, ffn_expand=2),
    'baseline-sidd-32': nafnet('SIDD', 32, 200000, 0.0, 'Baseline', dw_expand=1, ffn_expand=2),
    'baseline-sidd-64': nafnet('SIDD', 64, 400000, 0.0, 'Baseline', dw_expand=2, ffn_expand=2),
}
RESTORMER = {
    'deraining': restormer('Deraining', on_y=True),
    'motion': restormer('Deblurring'),
    'defocus': restormer('DefocusDeblur_Single_8bit'),
    'dual-pixel': restormer(
        'DefocusDeblur_DualPixel_16bit',
        kind='Dataset_DefocusDeblur_DualPixel_16bit',
        channels=(6, 3),
        dataroot_lq=None,
        dataroot_lqL='./Datasets/inputL',
        dataroot_lqR='./Datasets/inputR',
    ),
    'real-denoising': restormer('RealDenoising', 'BiasFree', mixup=True),
    'gaussian-color': gaussian('GaussianColorDenoising', 3),
    'gaussian-gray': gaussian('GaussianGrayDenoising', 1),
}
RELEASED = {**NAFNET, **RESTORMER}
SMALL = {
    'NAFNet': {'width': 4, 'enc_blk_nums': [1, 1], 'middle_blk_num': 1, 'dec_blk_nums': [1, 1]},
    'Baseline': {'width': 4, 'enc_blk_nums': [1, 1], 'middle_blk_num': 1, 'dec_blk_nums': [1, 1]},
    'Restormer': {'dim': 8, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'heads': [1, 1, 1, 1]},
}
COUNTS = {
    'num_gpu': 0,
    'datasets:train:num_worker_per_gpu': 0,
    'datasets:train:batch_size_per_gpu': 2,
    'datasets:train:gt_size': 24,
    'train:total_iter': 2,
    'val:val_freq': 2,
    'logger:print_freq': 1,
    'logger:save_checkpoint_freq': 2,
}
PROGRESSIVE = {'mini_batch_sizes': [2, 1, 1, 1, 1, 1], 'iters': [1] * 6, 'gt_sizes': [16, 24, 24, 24, 24, 24]}
ENCODER = copy.deepcopy(option_files.VQGAN)
ENCODER['embed_dim'] = ENCODER['n_embed'] = 32
ENCODER['ddconfig'].update(ch=32, ch_mult=[1, 1], num_res_blocks=1, attn_resolutions=[], z_channels=32)
LOSSES = {
    'logits_opt': option_files.L1,
    'cl_opt': {'type': 'DynamicContrastiveLoss', 'loss_weight': 0.1, 'weights': [0.5, 1.0]},
    'ce_opt': {'type': 'DistributionMappingLoss', 'loss_weight': 0.001},
    'num_neg': 2,
    'gaussian_blur_prob': 0,
    'gaussian_noise_prob': 1,
    'check_teacher': False,
}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Four pairs of smooth images and their noisy selves, in the folders gt and lq."""
    folder, rng = tmp_path_factory.mktemp('pairs'), np.random.default_rng(0)
    for index in range(4):
        smooth = cv2.resize(rng.random((5, 5, 3)), (35, 30), interpolation=cv2.INTER_CUBIC)
        for name, noise in (('gt', 0), ('lq', 0.05)):
            (folder / name).mkdir(exist_ok=True)
            image = smooth + noise * rng.standard_normal(smooth.shape)
            cv2.imwrite(str(folder / name / f'{index}.png'), np.clip(image * 255, 0, 255).round().astype(np.uint8))
    return folder


def overrides(opt, images):
    """What a user overrides, and networks for a test's time."""
    values = dict(COUNTS)
    for name in opt['datasets']:
        values[f'datasets:{name}:io_backend:type'] = 'disk'
        for key in opt['datasets'][name]:
            if key.startswith('dataroot') and opt['datasets'][name][key] != 'none':
                values[f'datasets:{name}:{key}'] = str(images / ('gt' if key == 'dataroot_gt' else 'lq'))
    if 'iters' in opt['datasets'].get('train', {}):
        values.update({f'datasets:train:{key}': value for key, value in PROGRESSIVE.items()})
    for network in ('network_g', 'network_t'):
        if network in opt:
            small = SMALL[opt[network]['type'].replace('Local', '')]
            values.update({f'{network}:{key}': value for key, value in small.items()})
    return [f'{key}={value}' for key, value in values.items()]


def write(opt):
    Path('released.yml').write_text(safe_yaml.dump(opt), encoding='utf-8')
    return 'released.yml'


def run(opt, images, *more):
    return train.main(['-opt', write(opt), '--force_yml', *overrides(opt, images), *more])


def log_of(name):
    return next(Path('experiments', name).glob('train_*.log')).read_text(encoding='utf-8')


def resolved(name):
    return safe_yaml.parse(Path('experiments', name, 'resolved.yml').read_text(encoding='utf-8'))


def distilled(opt):
    """The file with a teacher and the DCKD blocks."""
    opt = copy.deepcopy(opt)
    opt['network_t'] = copy.deepcopy(opt['network_g'])
    opt['network_his'] = True
    opt['network_vqgan'] = {**ENCODER, 'allow_random': True}
    opt['path']['pretrain_network_t'] = 'teacher.pth'
    opt['train'].update(LOSSES)
    return opt


@pytest.mark.parametrize('name', RELEASED)
def test_a_released_file_runs_and_validates(name, images):
    opt = RELEASED[name]
    assert run(opt, images) == 0
    log, metrics = log_of(opt['name']), opt['val']['metrics']
    assert re.findall(r'epoch: +0, iter: +(\d)', log) == ['1', '2'] and 'l_pix' in log
    assert all(re.search(rf'# {metric}: \d', log) for metric in metrics)
    assert Path('experiments', opt['name'], 'models', 'net_g_latest.pth').is_file()
    assert resolved(opt['name'])['train']['use_grad_clip'] is True  # NAFNet's files do not say it, its code does


@pytest.mark.parametrize('name', RELEASED)
def test_it_distils_with_a_teacher_and_our_blocks(name, images):
    opt = distilled(RELEASED[name])
    torch.manual_seed(1)
    teacher = build_network({**opt['network_t'], **SMALL[opt['network_t']['type'].replace('Local', '')]})
    torch.save({'params': teacher.state_dict()}, 'teacher.pth')
    assert run(opt, images) == 0
    log = log_of(opt['name'])
    assert 'runs as DCKDModel' in log and all(f' {term}: ' in log for term in ('l_pix', 'l_ts', 'l_cl', 'l_ce'))
    assert resolved(opt['name'])['train']['use_grad_clip'] is True


def test_keys_without_effect_are_said_and_others_refused(images):
    opt = copy.deepcopy(RESTORMER['deraining'])
    opt['val']['grids'] = False
    warnings = options.load(write(opt), overrides(opt, images))[1]
    for key in ('datasets.train.use_shuffle', 'val.use_image', 'val.rgb2bgr', 'val.max_minibatch', 'val.grids'):
        assert sum(warning.startswith(f'{key}: without effect') for warning in warnings) == 1
    opt['train']['mixing_augs']['mixup_alpha'] = opt['datasets']['train']['geometric_aug'] = 1
    with pytest.raises(options.OptionError) as error:
        options.load(write(opt), overrides(opt, images))
    found = '\n'.join(error.value.problems)
    assert "train.mixing_augs.mixup_alpha = 1: unknown key (did you mean 'mixup_beta'?)" in found
    assert "datasets.train.geometric_aug = 1: unknown key (did you mean 'geometric_augs'?)" in found


def test_clipping_can_be_switched_off(images):
    opt = NAFNET['gopro-32']
    assert options.load(write(opt), overrides(opt, images))[0]['train']['use_grad_clip'] is True
    for override in ('train:use_grad_clip=false', 'train:grad_clip=0.1'):
        assert not options.load('released.yml', [*overrides(opt, images), override])[0]['train'].get('use_grad_clip')


@pytest.mark.parametrize(
    'name, split',
    [
        ('gopro-32', 'test'),
        ('reds-64', 'test'),
        ('sidd-32', 'val'),
        ('baseline-gopro-64', 'test'),
        ('baseline-sidd-32', 'val'),
    ],
)
def test_nafnets_test_files_score_trained_weights(name, split, images, capsys):
    opt = copy.deepcopy(NAFNET[name])
    torch.manual_seed(1)
    torch.save({'params': build_network({**opt['network_g'], **SMALL['NAFNet']}).state_dict()}, 'weights.pth')
    opt = {key: value for key, value in opt.items() if key not in ('train', 'logger')}
    opt['datasets'] = {split: opt['datasets']['val']}
    opt['path']['pretrain_network_g'] = 'experiments/pretrained_models/NAFNet.pth'
    opt['val'] = {**opt['val'], 'grids': False, 'save_img': name.startswith('baseline')}
    del opt['val']['val_freq']
    kept = [entry for entry in overrides(opt, images) if entry.split(':')[0] in ('datasets', 'network_g')]
    kept = [entry for entry in kept if not entry.startswith('datasets:train')]
    assert (
        test.main(['-opt', write(opt), '--force_yml', *kept, 'num_gpu=0', 'path:pretrain_network_g=weights.pth']) == 0
    )
    assert re.search(r'PSNR', capsys.readouterr().out, re.I)
