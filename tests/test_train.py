"""The training entry point as a user meets it: files on disk, exit codes, messages, resuming."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from dckd_sr import train

ROOT = Path(__file__).resolve().parents[1]
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


def edsr(num_feat=8, upscale=2):
    return {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': num_feat, 'num_block': 1, 'upscale': upscale}


@pytest.fixture
def opt(tmp_path):
    """A complete small DCKD run on four generated images, standing in tmp_path."""
    rng = np.random.default_rng(0)
    for index in range(4):
        smooth = cv2.resize(rng.random((6, 6, 3)), (48, 48), interpolation=cv2.INTER_CUBIC)
        for folder, image in (('HR', smooth), ('LR', cv2.resize(smooth, (24, 24), interpolation=cv2.INTER_AREA))):
            (tmp_path / folder).mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / folder / f'{index}.png'), np.clip(image * 255, 0, 255).round().astype(np.uint8))
    teacher = torch.nn.Module()
    from basicsr.archs import build_network

    torch.manual_seed(1)
    teacher = build_network(edsr(16))
    torch.save({'params': teacher.state_dict()}, tmp_path / 'teacher.pth')
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


def weights(run, iteration):
    return torch.load(f'experiments/{run}/models/net_g_{iteration}.pth', weights_only=True)


def same(a, b):
    return all(torch.equal(a[key][name], value) for key in b for name, value in b[key].items())


def test_a_run_writes_what_basicsr_writes(opt):
    assert train.main(['-opt', write(opt)]) == 0
    root = Path('experiments/run')
    models = sorted(p.name for p in (root / 'models').iterdir())
    assert models == ['net_g_2.pth', 'net_g_4.pth', 'net_g_latest.pth']
    assert sorted(p.name for p in (root / 'training_states').iterdir()) == ['2.state', '4.state']
    assert (root / 'opt.yml').is_file()
    assert yaml.safe_load((root / 'resolved.yml').read_text())['train']['total_iter'] == 4
    log = next(root.glob('train_run_*.log')).read_text()
    assert len(re.findall(r'iter: +\d+, lr:\(1\.000e-03,\)\].*l_pix: \S+ l_ts: \S+ l_cl: \S+ l_ce: \S+', log)) == 4
    assert log.count('Validation Set') == 2 and '# psnr: ' in log
    assert sorted(p.name for p in Path('.').iterdir()) == ['HR', 'LR', 'experiments', 'opt.yml', 'teacher.pth']


def test_auto_resume_continues_the_same_run(opt):
    assert train.main(['-opt', write(opt)]) == 0
    whole = weights('run', 4)
    opt['name'] = 'cut'
    opt['train']['total_iter'] = 2
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    opt['train']['total_iter'] = 4
    opt['datasets']['train']['num_worker_per_gpu'] = 1
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    assert same(whole, weights('cut', 4))
    assert len(list(Path('experiments').iterdir())) == 2  # nothing was moved aside


def test_a_second_run_moves_the_first_aside(opt):
    opt['train']['total_iter'] = 1
    train.main(['-opt', write(opt)])
    train.main(['-opt', write(opt)])
    assert len(list(Path('experiments').glob('run_archived_*'))) == 1


def test_first_look_stops_a_teacher_below_bicubic(opt, capsys):
    del opt['train']['check_teacher']
    assert train.main(['-opt', write(opt)]) == 2
    error = capsys.readouterr().err
    assert re.search(r'teacher reaches -?\d+\.\d\d dB on 0.png, below \d+\.\d\d dB', error) and 'check_teacher' in error
    assert not Path('experiments').exists()


def test_a_plain_basicsr_file_runs_and_gains_our_losses(opt):
    plain = copy.deepcopy(opt)
    plain['model_type'] = 'SRModel'
    for key in ('network_t', 'network_his', 'network_vqgan'):
        del plain[key]
    plain['path'] = {'pretrain_network_g': None, 'strict_load_g': True, 'resume_state': None}
    for key in (
        'logits_opt',
        'cl_opt',
        'ce_opt',
        'num_neg',
        'step',
        'gaussian_blur_prob',
        'gaussian_noise_prob',
        'check_teacher',
    ):
        del plain['train'][key]
    assert train.main(['-opt', write(plain)]) == 0
    assert 'l_pix' in next(Path('experiments/run').glob('*.log')).read_text()
    plain['name'] = 'gained'
    plain['network_vqgan'] = opt['network_vqgan']
    plain['train']['cl_opt'] = opt['train']['cl_opt']
    assert train.main(['-opt', write(plain)]) == 0
    log = next(Path('experiments/gained').glob('*.log')).read_text()
    assert 'DCKDModel' in log and 'l_cl: ' in log


def test_a_loss_by_name_as_pixel_opt(opt):
    vqgan = dict(opt['network_vqgan'])
    opt['model_type'] = 'SRModel'
    for key in ('network_t', 'network_his', 'network_vqgan'):
        del opt[key]
    opt['path'] = {}
    opt['train'] = {key: opt['train'][key] for key in ('optim_g', 'scheduler', 'total_iter', 'cl_opt')}
    opt['train']['pixel_opt'] = {**opt['train'].pop('cl_opt'), 'encoder': vqgan}
    assert train.main(['-opt', write(opt)]) == 0
    assert 'l_pix: ' in next(Path('experiments/run').glob('*.log')).read_text()


@pytest.mark.parametrize(
    'mistake, expected',
    [
        (lambda opt: opt['train']['optim_g'].update(lr=1e30), 'l_pix = nan|l_pix = inf|= nan'),
        (lambda opt: opt['datasets']['train'].update(gt_size=64), 'HR'),
        (lambda opt: Path('HR/1.png').write_text('not an image'), '1.png'),
        (lambda opt: torch.save({'params': {'x': torch.zeros(1)}}, 'teacher.pth'), 'teacher.pth'),
        (lambda opt: opt['logger'].update(wandb={'project': 'p'}), 'wandb'),
    ],
)
def test_mistakes_that_show_while_running(opt, mistake, expected, capsys):
    mistake(opt)
    assert train.main(['-opt', write(opt)]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and re.search(expected, error) and 'Traceback' not in error


@pytest.mark.parametrize('command', [[str(ROOT / 'dckd_sr' / 'train.py')], ['-m', 'dckd_sr.train']])
def test_both_ways_to_start_it(command, tmp_path):
    environment = {**os.environ, 'PYTHONPATH': '' if command[0].endswith('.py') else str(ROOT)}
    result = subprocess.run(
        [sys.executable, *command, '-opt', 'none.yml'],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2 and result.stderr.startswith('error: ') and 'none.yml' in result.stderr
    assert not list(tmp_path.iterdir())
