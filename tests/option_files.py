"""Option files in the words of the released code and of BasicSR, as dicts, for the tests of options."""

import copy
from pathlib import Path

import pytest

from dckd_sr import options, safe_yaml

EDSR = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 64, 'num_block': 16, 'upscale': 4}
DDCONFIG = {
    'in_channels': 3,
    'out_ch': 3,
    'resolution': 256,
    'ch': 128,
    'ch_mult': [1, 1, 2, 2, 4],
    'num_res_blocks': 2,
    'attn_resolutions': [16],
    'dropout': 0.0,
    'double_z': False,
    'z_channels': 256,
}
VQGAN = {'type': 'VQGAN', 'embed_dim': 256, 'n_embed': 1024, 'ddconfig': DDCONFIG}
PAIRED = {'type': 'PairedImageDataset', 'dataroot_gt': 'HR', 'dataroot_lq': 'LR', 'io_backend': {'type': 'disk'}}
L1 = {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': 'mean'}
PSNR = {'type': 'calculate_psnr', 'crop_border': 4, 'test_y_channel': True}


def make_files(folder):
    """The files that the options below name."""
    for name in ('HR', 'LR', 'HR.lmdb', 'LR.lmdb', 'experiments/pretrained_models'):
        (folder / name).mkdir(parents=True)
    for name in ('teacher.pth', 'vqgan.ckpt', 'list.txt'):
        (folder / name).touch()


def dckd():
    """The released keys, all of them."""
    return copy.deepcopy(
        {
            'name': 'run',
            'model_type': 'DCKDModel',
            'scale': 4,
            'num_gpu': 0,
            'manual_seed': 10,
            'datasets': {
                'train': {
                    'name': 'DIV2K',
                    **PAIRED,
                    'filename_tmpl': '{}',
                    'gt_size': 192,
                    'use_hflip': True,
                    'use_rot': True,
                    'num_worker_per_gpu': 8,
                    'batch_size_per_gpu': 16,
                    'dataset_enlarge_ratio': 100,
                    'prefetch_mode': None,
                },
                'val_1': {'name': 'Set5', **PAIRED, 'filename_tmpl': '{}x4'},
                'val_2': {'name': 'Set14', **PAIRED},
            },
            'network_t': {**EDSR, 'num_feat': 256},
            'network_g': EDSR,
            'network_his': True,
            'network_vqgan': VQGAN,
            'path': {
                'pretrain_network_t': 'teacher.pth',
                'strict_load_t': True,
                'param_key_t': 'params_ema',
                'pretrain_network_g': None,
                'strict_load_g': True,
                'param_key_g': 'params_ema',
                'pretrain_network_vqgan': 'vqgan.ckpt',
                'strict_load_vqgan': False,
                'param_key_vqgan': 'state_dict',
            },
            'train': {
                'ema_decay': 0.999,
                'optim_g': {'type': 'Adam', 'lr': 1e-4, 'weight_decay': 0, 'betas': [0.9, 0.99]},
                'scheduler': {'type': 'MultiStepLR', 'milestones': [250000], 'gamma': 0.1},
                'total_iter': 250000,
                'warmup_iter': -1,
                'pixel_opt': L1,
                'logits_opt': L1,
                'lcr_opt': L1,
                'noisy': {'prob': 0.5},
                'cl_opt': {
                    'type': 'ContrasLoss',
                    'd_func': 'L1',
                    'loss_weight': 0.1,
                    'weights': [0.03125, 0.0625, 0.125, 0.25, 1.0],
                },
                'num_neg': 4,
                'update_decay': 0.1,
                'step': [1000, 2000, 3000],
                'gaussian_blur_prob': 0,
                'resize_prob': 0,
                'gaussian_noise_prob': 1.0,
                'gray_noise_prob': 0.5,
                'ce_opt': {'type': 'CELoss', 'loss_weight': 0.001, 'reduction': 'mean'},
            },
            'val': {'val_freq': 5e3, 'save_img': False, 'window_size': 8, 'metrics': {'psnr': PSNR}},
            'logger': {
                'print_freq': 1000,
                'save_checkpoint_freq': 5e3,
                'use_tb_logger': True,
                'wandb': {'project': None, 'resume_id': None},
            },
            'dist_params': {'backend': 'nccl', 'port': 29500},
        }
    )


def esrgan():
    """BasicSR's keys for adversarial training."""
    opt = dckd()
    for key in ('network_t', 'network_his', 'network_vqgan', 'path'):
        del opt[key]
    opt['model_type'] = 'ESRGANModel'
    opt['network_d'] = {'type': 'VGGStyleDiscriminator', 'num_in_ch': 3, 'num_feat': 64}
    keep = ('ema_decay', 'optim_g', 'scheduler', 'total_iter', 'warmup_iter', 'pixel_opt')
    opt['train'] = {key: opt['train'][key] for key in keep}
    opt['train']['optim_d'] = opt['train']['optim_g']
    opt['train']['gan_opt'] = {'type': 'GANLoss', 'gan_type': 'vanilla', 'loss_weight': 5e-3}
    return opt


def vqgan():
    """A codebook's training."""
    opt = esrgan()
    del opt['network_d']
    opt['model_type'] = 'VQGANModel'
    opt['network_g'] = {**VQGAN, 'decoder': True}
    for key in ('optim_d', 'gan_opt'):
        del opt['train'][key]
    opt['train']['commit_opt'] = {'type': 'MSELoss', 'loss_weight': 0.25}
    return opt


def load(opt, *overrides, **kwargs):
    """`options.load` of a file with these options."""
    Path('opt.yml').write_text(safe_yaml.dump(opt), encoding='utf-8')
    return options.load('opt.yml', overrides, **kwargs)


def problems_of(opt, *overrides, **kwargs):
    """What `options.load` refuses in a file with these options."""
    with pytest.raises(options.OptionError) as error:
        load(opt, *overrides, **kwargs)
    return error.value.problems
