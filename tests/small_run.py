"""A complete small run on four generated images, for tests that train."""

import copy
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from basicsr.archs import build_network

VQGAN = {
    'type': 'VQGAN',
    'allow_random': True,
    'embed_dim': 32,
    'n_embed': 16,
    'ddconfig': {
        'in_channels': 3,
        'out_ch': 3,
        'resolution': 32,
        'ch': 32,
        'ch_mult': [1, 1],
        'num_res_blocks': 1,
        'attn_resolutions': [],
        'dropout': 0.0,
        'double_z': False,
        'z_channels': 32,
    },
}
# The smallest one, for losses alone.
TINY_VQGAN = {
    'embed_dim': 4,
    'n_embed': 8,
    'ddconfig': {
        'in_channels': 3,
        'out_ch': 3,
        'resolution': 8,
        'ch': 32,
        'ch_mult': [1, 1],
        'num_res_blocks': 1,
        'attn_resolutions': [],
        'z_channels': 4,
    },
}
SWINIR = {
    'type': 'SwinIR',
    'upscale': 2,
    'in_chans': 3,
    'img_size': 16,
    'window_size': 8,
    'img_range': 1.0,
    'depths': [2, 2],
    'embed_dim': 12,
    'num_heads': [2, 2],
    'mlp_ratio': 2,
    'upsampler': 'pixelshuffle',
    'resi_connection': '1conv',
}


def edsr(num_feat=8, upscale=2):
    return {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': num_feat, 'num_block': 1, 'upscale': upscale}


def dckd_run(folder):
    """The files in `folder`, and the options of a DCKD run on them, to be started from there."""
    rng = np.random.default_rng(0)
    for index in range(4):
        smooth = cv2.resize(rng.random((6, 6, 3)), (48, 48), interpolation=cv2.INTER_CUBIC)
        for name, image in (('HR', smooth), ('LR', cv2.resize(smooth, (24, 24), interpolation=cv2.INTER_AREA))):
            (folder / name).mkdir(exist_ok=True)
            cv2.imwrite(str(folder / name / f'{index}.png'), np.clip(image * 255, 0, 255).round().astype(np.uint8))
    torch.manual_seed(1)
    teacher = build_network(edsr(16))
    torch.save({'params': teacher.state_dict()}, folder / 'teacher.pth')
    data = {'type': 'PairedImageDataset', 'dataroot_gt': 'HR', 'dataroot_lq': 'LR', 'io_backend': {'type': 'disk'}}
    return {
        'name': 'run',
        'model_type': 'DCKDModel',
        'scale': 2,
        'num_gpu': 0,
        'manual_seed': 1,
        'datasets': {
            'train': {
                'name': 'train',
                **data,
                'gt_size': 32,
                'use_hflip': True,
                'use_rot': True,
                'num_worker_per_gpu': 0,
                'batch_size_per_gpu': 2,
            },
            'val_1': {'name': 'Set', **copy.deepcopy(data)},
        },
        'network_g': edsr(),
        'network_t': edsr(16),
        'network_his': True,
        'network_vqgan': copy.deepcopy(VQGAN),
        'path': {'pretrain_network_t': 'teacher.pth', 'strict_load_t': True},
        'train': {
            'ema_decay': 0.9,
            'optim_g': {'type': 'Adam', 'lr': 1e-3},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [100], 'gamma': 0.5},
            'total_iter': 4,
            'pixel_opt': {'type': 'L1Loss'},
            'logits_opt': {'type': 'L1Loss'},
            'cl_opt': {'type': 'DynamicContrastiveLoss', 'loss_weight': 0.1, 'weights': [0.5, 1.0]},
            'ce_opt': {'type': 'DistributionMappingLoss', 'loss_weight': 0.001},
            'num_neg': 2,
            'step': [2],
            'gaussian_blur_prob': 0,
            'gaussian_noise_prob': 1,
            'check_teacher': False,
        },
        'val': {
            'val_freq': 2,
            'save_img': False,
            'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 2, 'test_y_channel': True}},
        },
        'logger': {'print_freq': 1, 'save_checkpoint_freq': 2, 'use_tb_logger': False},
    }


def write(opt, name='opt.yml'):
    Path(name).write_text(yaml.safe_dump(opt, sort_keys=False), encoding='utf-8')
    return name
