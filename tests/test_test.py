"""Testing as a user meets it: option files on disk, exit codes, messages, tables, images."""

import copy
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage
import torch
import yaml
from basicsr.archs import build_network
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.test import test_pipeline as basicsr_pipeline
from basicsr.utils import img2tensor, tensor2img

from dckd_sr import options
from dckd_sr import test as command
from dckd_sr.ops.resize import imresize

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = {'astronaut': (60, 190), 'chelsea': (90, 120), 'coffee': (120, 200)}  # top and left of the crop


def edsr(num_feat=4, upscale=2):
    return {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': num_feat, 'num_block': 1, 'upscale': upscale}


def save_weights(path, num_feat=4, seed=0, keys=('params',)):
    torch.manual_seed(seed)
    nets = {key: build_network(edsr(num_feat)) for key in keys}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: net.state_dict() for key, net in nets.items()}, path)
    return nets


@pytest.fixture
def opt(tmp_path):
    """Two sets of cut photographs, one with LR files and one without, and random weights; stands in tmp_path."""
    for name, (top, left) in PHOTOS.items():
        photo = cv2.imread(str(Path(skimage.__file__).parent / 'data' / f'{name}.png'))
        gt = photo[top : top + 80, left : left + 64]
        for folder, file, content in (
            ('Photos/HR', name, gt),
            ('Photos/LR', f'{name}x2', imresize(gt, 0.5)),
            ('Cuts/HR', name, gt[:51, :42]),
        ):
            Path(folder).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(f'{folder}/{file}.png', content)
    Path('Cuts/HR/coffee.png').unlink()
    save_weights('student.pth', seed=1)
    save_weights('teacher.pth', num_feat=6, seed=2)
    backend = {'io_backend': {'type': 'disk'}}
    return {
        'name': 'run',
        'model_type': 'SRModel',
        'scale': 2,
        'num_gpu': 0,
        'manual_seed': 0,
        'datasets': {
            'test_1': {
                'name': 'Photos',
                'type': 'PairedImageDataset',
                'dataroot_gt': 'Photos/HR',
                'dataroot_lq': 'Photos/LR',
                'filename_tmpl': '{}x2',
                **backend,
            },
            'test_2': {'name': 'Cuts', 'type': 'SRImageDataset', 'dataroot_gt': 'Cuts/HR', **backend},
        },
        'network_g': edsr(),
        'path': {'pretrain_network_g': 'student.pth', 'strict_load_g': True},
        'val': {
            'save_img': False,
            'suffix': None,
            'metrics': {
                'psnr': {'type': 'calculate_psnr', 'crop_border': 2, 'test_y_channel': True},
                'ssim': {'type': 'calculate_ssim', 'crop_border': 2, 'test_y_channel': True},
            },
        },
    }


def run(opt, *args):
    Path('run.yml').write_text(yaml.safe_dump(opt))
    return command.main(['-opt', 'run.yml', *args])


def means(name='run'):
    content = json.loads(Path('results', name, 'results.json').read_text())
    return {network: {s: r['means'] for s, r in sets.items()} for network, sets in content['results'].items()}, content


def by_hand(weights, num_feat=4, key='params', names=PHOTOS):
    """Mean PSNR and SSIM over Photos, without any of our evaluation."""
    return scored(loaded(weights, num_feat, key), names)


def loaded(weights, num_feat=4, key='params'):
    net = build_network(edsr(num_feat))
    net.load_state_dict(torch.load(weights)[key])
    return net


def scored(net, names=PHOTOS):
    scores = []
    for name in names:
        lq, gt = cv2.imread(f'Photos/LR/{name}x2.png'), cv2.imread(f'Photos/HR/{name}.png')
        with torch.no_grad():
            sr = tensor2img(net(img2tensor(lq.astype(np.float32) / 255)[None]))
        scores.append([f(sr, gt, crop_border=2, test_y_channel=True) for f in (calculate_psnr, calculate_ssim)])
    return np.mean(scores, axis=0)


def test_a_teacher_made_of_teachers(opt, capsys):
    save_weights('other.pth', seed=3)
    members = [{**edsr(6), 'pretrain': 'teacher.pth'}, {'type': 'spandrel', 'path': 'other.pth'}]
    opt['network_t'] = {'type': 'Ensemble', 'networks': members}
    opt['path'].pop('pretrain_network_t', None)
    assert run(opt, '--with_teacher') == 0
    of_teachers = means()[0]['teacher']['Photos']['psnr']
    assert 'teacher: teacher.pth, other.pth' in Path('results/run/results.md').read_text()
    nets = [loaded('teacher.pth', 6), loaded('other.pth')]
    assert abs(of_teachers - scored(lambda x: sum(net(x) for net in nets) / 2)[0]) < 1e-3
    Path('teacher.pth').unlink()
    Path('other.pth').unlink()
    assert run(opt, '--with_teacher') == 2
    told = capsys.readouterr().err
    assert 'network_t.networks.0.pretrain' in told and 'network_t.networks.1.path' in told


def test_table_files_and_log(opt, tmp_path, capsys):
    opt['network_t'] = edsr(6)
    opt['path']['pretrain_network_t'] = 'teacher.pth'
    assert run(opt, '--with_teacher') == 0
    scores, content = means()
    assert list(scores) == ['bicubic', 'student', 'teacher'] and list(scores['student']) == ['Photos', 'Cuts']
    assert [scores['student']['Photos'][m] for m in ('psnr', 'ssim')] == pytest.approx(by_hand('student.pth'), abs=1e-6)
    assert [scores['teacher']['Photos'][m] for m in ('psnr', 'ssim')] == pytest.approx(
        by_hand('teacher.pth', 6), abs=1e-6
    )
    assert scores['bicubic']['Photos']['psnr'] > 25 > scores['student']['Photos']['psnr']
    images = content['results']['student']['Photos']['images']
    assert [row['image'] for row in images] == [f'{name}x2' for name in sorted(PHOTOS)]
    assert np.mean([row['psnr'] for row in images]) == pytest.approx(scores['student']['Photos']['psnr'])
    assert len(content['results']['student']['Cuts']['images']) == 2
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines() if re.match(r'(bicubic|student|teacher) +\d', line)]
    assert [row[0] for row in table] == list(scores)
    assert table[1][1] == f'{scores["student"]["Photos"]["psnr"]:.2f}'
    assert f'Written to {Path("results/run").resolve()}: results.md, results.csv, results.json' in out
    logs = list(Path('results/run').glob('test_run_*.log'))
    assert len(logs) == 1 and 'weights: params' in logs[0].read_text() and 'bicubic' in logs[0].read_text()
    assert not Path('results/run/visualization').exists() and sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ['Photos', 'Cuts', 'results', 'run.yml', 'student.pth', 'teacher.pth']
    )


def test_basicsr_test_pipeline_gives_the_same_scores(opt, monkeypatch):
    assert run(opt, '--no_bicubic') == 0
    scores, _ = means()
    assert list(scores) == ['student']

    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler = Keep()
    logging.getLogger('basicsr').addHandler(handler)
    opt['name'] = 'theirs'
    Path('run.yml').write_text(yaml.safe_dump(opt))
    monkeypatch.setattr(sys, 'argv', ['test.py', '-opt', 'run.yml'])
    basicsr_pipeline(str(Path.cwd()))
    logging.getLogger('basicsr').removeHandler(handler)
    found = re.findall(r'Validation (\w+)\n\s+# psnr: ([\d.]+).*\n\s+# ssim: ([\d.]+)', '\n'.join(lines))
    assert [name for name, *_ in found] == ['Photos', 'Cuts']
    for name, psnr, ssim in found:
        assert float(psnr) == pytest.approx(scores['student'][name]['psnr'], abs=1e-4)
        assert float(ssim) == pytest.approx(scores['student'][name]['ssim'], abs=1e-4)


def test_images_are_saved_under_basicsrs_names_and_former_ones_stay(opt):
    old = Path('results/run/visualization/Photos/old_run.png')
    old.parent.mkdir(parents=True)
    old.write_text('keep')
    opt['network_t'] = edsr(6)
    opt['path']['pretrain_network_t'] = 'teacher.pth'
    assert run(opt, '--save_img', '--with_teacher', '--force_yml', 'datasets:test_2:name=Small') == 0
    assert sorted(p.name for p in old.parent.iterdir()) == sorted(
        ['old_run.png', *(f'{name}x2_run{kind}.png' for name in PHOTOS for kind in ('', '_bicubic', '_teacher'))]
    )
    assert old.read_text() == 'keep'
    small = cv2.imread('results/run/visualization/Small/astronaut_run_bicubic.png')
    expected = imresize(imresize(cv2.imread('Cuts/HR/astronaut.png')[:50], 0.5), 2)
    assert np.array_equal(small, expected)
    opt['val'].update(save_img=True, suffix='v2')
    assert run(opt, '--no_bicubic') == 0
    assert (old.parent / 'coffeex2_v2.png').is_file() and (old.parent / 'coffeex2_run.png').is_file()


def test_images_are_not_written_among_those_that_are_read(opt, capsys):
    shutil.copytree('Photos/LR', 'results/run/visualization/Photos')
    opt['datasets']['test_1']['dataroot_lq'] = 'results/run/visualization/Photos'
    before = sorted(Path('results').rglob('*'))
    assert run(opt) == 0
    capsys.readouterr()
    assert run(opt, '--save_img') == 2
    assert 'dataroot_lq = results/run/visualization/Photos: the images of this test' in capsys.readouterr().err
    assert sorted(Path('results').rglob('*.png')) == [path for path in before if path.suffix == '.png']


def test_missing_sets_are_skipped_until_none_is_left(opt, capsys):
    opt['datasets']['test_1'].update(name='Set5', dataroot_gt='Set5/HR', dataroot_lq='Set5/LR')
    assert run(opt) == 0
    assert list(means()[0]['student']) == ['Cuts']
    out = capsys.readouterr().out
    warnings = [line for line in out.splitlines() if 'WARNING' in line]
    assert len(warnings) == 1 and 'Set5 is skipped' in warnings[0] and 'Set5/HR' in warnings[0]
    assert 'Set5/LR' in warnings[0] and warnings[0].count('https://') == 1  # where it comes from
    assert '- not there: Set5\n' in Path('results/run/results.md').read_text()

    opt['datasets']['test_2']['dataroot_gt'] = 'nowhere'
    opt['name'] = 'none'
    assert run(opt) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: there is no set to test on') and 'nowhere' in error and 'Set5/HR' in error
    assert not Path('results/none').exists()


def test_lr_that_is_not_there_is_made_from_hr_and_that_is_told(opt, capsys):
    Path('Photos/LR_bicubic').mkdir()
    Path('Photos/LR').rename('Photos/LR_bicubic/X2')
    opt['datasets']['test_1'].update(type='SRImageDataset', dataroot_lq='Photos/LR_bicubic/X2')
    assert run(opt) == 0
    expected = means()[0]['student']
    for file in Path('Photos/LR_bicubic/X2').iterdir():
        file.unlink()
    Path('Photos/LR_bicubic/X2').rmdir()
    capsys.readouterr()
    assert run(opt) == 0
    assert means()[0]['student'] == expected
    said = 'datasets.test_1.dataroot_lq = Photos/LR_bicubic/X2: no such folder'
    assert f'{said} in {Path.cwd()}; LR is made from HR' in capsys.readouterr().out
    assert "- LR made from HR, as MATLAB's imresize: Photos, Cuts\n" in Path('results/run/results.md').read_text()


def test_which_weights_are_used(opt, capsys):
    save_weights('student.pth', seed=3, keys=('params', 'params_ema'))
    for extra, key in (([], 'params_ema'), (['--force_yml', 'path:param_key_g=params'], 'params')):
        assert run(opt, '--no_bicubic', *extra) == 0
        assert means()[0]['student']['Photos']['psnr'] == pytest.approx(by_hand('student.pth', key=key)[0], abs=1e-6)
        assert f'weights: {key}.' in capsys.readouterr().out


def test_a_training_file_is_tested_on_its_validation_sets(opt):
    opt['datasets'] = {'train': {'name': 'gone', 'type': 'SRImageDataset', 'dataroot_gt': 'gone'}, **opt['datasets']}
    opt['datasets']['val_1'] = opt['datasets'].pop('test_1')
    del opt['datasets']['test_2']
    opt.update(model_type='DCKDModel', network_his=True, train={'total_iter': 5, 'cl_opt': {'type': 'ContrasLoss'}})
    assert run(opt) == 0
    assert list(means()[0]['student']) == ['Photos']


def test_images_without_ground_truth(opt, capsys):
    opt['datasets'] = {
        'test': {
            'name': 'Wild',
            'type': 'SingleImageDataset',
            'dataroot_lq': 'Photos/LR',
            'io_backend': {'type': 'disk'},
        }
    }
    assert run(opt, '--save_img') == 0
    assert len(list(Path('results/run/visualization/Wild').iterdir())) == 6
    assert 'psnr was not measured' in capsys.readouterr().out
    opt['val'] = {}
    assert run(opt) == 0
    assert 'val.metrics is empty and no image is saved' in capsys.readouterr().out


def test_windows_are_padded(opt):
    small = {'img_size': 8, 'window_size': 8, 'depths': [1], 'embed_dim': 6, 'num_heads': [1], 'mlp_ratio': 1}
    opt['network_g'] = {'type': 'SwinIR', 'upscale': 2, 'img_range': 1.0, 'upsampler': 'pixelshuffledirect', **small}
    torch.save({'params': build_network(copy.deepcopy(opt['network_g'])).state_dict()}, 'student.pth')
    assert run(opt) == 0  # 25x21 pixels are no multiple of 8


def test_self_ensemble_and_tiles(opt):
    opt['datasets'].pop('test_2')
    assert run(opt) == 0
    plain = means()[0]
    assert run(opt, '--self_ensemble') == 0
    ensemble = means()[0]
    assert plain['bicubic'] == ensemble['bicubic'] and plain['student'] != ensemble['student']
    assert 'self_ensemble: True' in Path('results/run/results.md').read_text()
    opt['val'].update(self_ensemble=True, tile_size=30, tile_overlap=20)
    assert run(opt) == 0
    assert means()[0]['student']['Photos'] == pytest.approx(ensemble['student']['Photos'], rel=1e-3)
    assert 'tile_overlap: 20' in Path('results/run/results.md').read_text()


def test_mixed_precision_differs_little_and_is_said(opt):
    opt['datasets'].pop('test_2')
    opt['network_t'], opt['path']['pretrain_network_t'] = edsr(6), 'teacher.pth'
    assert run(opt, '--with_teacher') == 0
    plain = means()[0]
    opt.update(use_amp=True, amp_bf16=True, amp_networks=['student'])
    opt['val'].update(tile_size=32, tile_overlap=28, tile_batch_size=3)
    assert run(opt, '--with_teacher') == 0
    fast = means()[0]
    for network, exact in (('bicubic', True), ('student', False), ('teacher', None)):
        before, after = plain[network]['Photos']['psnr'], fast[network]['Photos']['psnr']
        assert exact is None or (before == after) is exact
        assert after == pytest.approx(before, abs=0.05 if network == 'student' else 1e-4)
    table = Path('results/run/results.md').read_text()
    assert all(line in table for line in ('amp_bf16: True', "amp_networks: ['student']", 'tile_batch_size: 3'))


def test_whole_images_are_not_compiled(opt, capsys, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda *_, **__: pytest.fail('compiled'))
    opt['datasets'].pop('test_2')
    opt['use_compile'] = True
    assert run(opt) == 0
    assert 'use_compile: without effect in a test without val.tile_size' in capsys.readouterr().out


def test_tiles_are_compiled(opt, monkeypatch):
    calls = []

    def compiler(net, **arguments):
        calls.append(arguments['mode'])
        return net

    monkeypatch.setattr(torch, 'compile', compiler)
    opt.update(use_compile=True, compile_mode='max-autotune')
    opt['val']['tile_size'] = 16
    assert run(opt) == 0
    assert calls == ['max-autotune']


def test_scale_1_has_no_bicubic_row(opt, capsys):
    opt['datasets'].pop('test_2')
    opt['datasets']['test_1'].update(dataroot_lq='Photos/HR', filename_tmpl='{}')
    opt.update(scale=1, network_g=edsr(upscale=1))
    torch.save({'params': build_network(edsr(upscale=1)).state_dict()}, 'student.pth')
    assert run(opt) == 0
    assert list(means()[0]) == ['student']
    assert run(opt, '--bicubic') == 2
    assert 'error: --bicubic: scale is 1' in capsys.readouterr().err


def broken_image(opt):
    Path('Photos/LR/coffeex2.png').write_bytes(b'no image')


def without_weights(opt):
    opt['path']['pretrain_network_g'] = None
    save_weights('experiments/run/models/net_g_latest.pth')


def other_size(opt):
    opt['datasets'].pop('test_1')
    opt['datasets']['test_2'].update(dataroot_lq='Photos/LR', filename_tmpl='{}x2')


@pytest.mark.parametrize(
    'change, args, message',
    [
        (broken_image, [], r'coffeex2.png'),
        (without_weights, [], r'path.pretrain_network_g is not set.*net_g_latest.pth'),
        (other_size, [], r'astronaut.png is 42x51, Photos/LR/astronautx2.png is 32x40'),
        (lambda opt: opt['network_g'].update(num_feat=8), [], r'student.pth .params. does not fit this EDSR'),
        (lambda opt: opt['path'].update(pretrain_network_g='no.pth'), [], r'no.pth'),
        (lambda opt: None, ['--with_teacher'], r'network_t is missing, --with_teacher needs it'),
        (
            lambda opt: (opt.update(network_t=edsr()), opt['path'].update(pretrain_network_t='no.pth')),
            ['--with_teacher'],
            r'path.pretrain_network_t = no.pth: no such file',
        ),
        (lambda opt: None, ['--device', 'gpu'], r'--device gpu: '),
        (lambda opt: opt.update(datasets={'train': opt['datasets']['test_1']}), [], r'no entry named test'),
    ],
)
def test_mistakes_end_with_one_message(opt, change, args, message, capsys):
    change(opt)
    assert run(opt, *args) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and 'Traceback' not in error
    assert re.search(message, error.replace('\n', ' ')), error


def test_interrupt(opt, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, 'evaluate', interrupt)
    assert run(opt) == 130
    assert 'interrupted' in capsys.readouterr().err


def test_other_processes_leave_the_test_to_the_first(opt, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    assert run(opt, '--launcher', 'pytorch') == 0
    assert not Path('results').exists()
    monkeypatch.setenv('RANK', '0')
    assert run(opt, '--launcher', 'pytorch') == 0
    assert Path('results').exists()


def test_script_and_module_run_from_a_clone(opt):
    """Started as a file, the package's folder must not hide the standard library's `test`, and outputs stay here."""
    Path('run.yml').write_text(yaml.safe_dump(opt))
    script = ROOT / 'dckd_sr' / 'test.py'
    start = (
        f'import runpy, sys; sys.path[0] = {str(script.parent)!r}; sys.argv = ["test.py", "-opt", "run.yml"]\n'
        f'try: runpy.run_path({str(script)!r}, run_name="__main__")\n'
        'except SystemExit as stop: assert stop.code == 0, stop.code\n'
        'import test; assert "dckd_sr" not in test.__file__, test.__file__'
    )
    done = subprocess.run([sys.executable, '-c', start], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert Path('results/run/results.csv').is_file()
    command_line = [sys.executable, '-m', 'dckd_sr.test', '-opt', 'none.yml']
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=200, env={'PYTHONPATH': str(ROOT)})
    assert done.returncode == 2 and done.stderr.startswith('error: '), done.stderr


def make(path, folder):
    path = Path(path)
    (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
    if not folder:
        path.write_bytes(b'')


@pytest.mark.parametrize('name', ['train_edsr_x4', 'test_edsr_x4'])
def test_shipped_option_files_are_complete(name):
    """With every file and folder that they name in place, nothing is wrong with them and nothing is worth a warning."""
    file, is_train = ROOT / 'options' / f'{name}.yml', name.startswith('train')
    raw = options.read_file(file)
    for key, value in raw['path'].items():
        if key.startswith('pretrain') and value:
            make(value, folder=False)
    for block in raw['datasets'].values():
        make(block['dataroot_gt'], folder=True)
        make(block['dataroot_lq'], folder=True)
    opt, warnings = options.load(file, is_train=is_train, overrides=['num_gpu=0'])
    assert not warnings
    # 43.1 M and 1.52 M parameters (the table of EDSR's authors).
    for letter, millions in (('t', 43.1), ('g', 1.52)):
        with torch.device('meta'):
            net = build_network(copy.deepcopy(opt[f'network_{letter}']))
        count = sum(parameter.numel() for parameter in net.parameters()) / 1e6
        assert count == pytest.approx(millions, abs=0.05 if millions > 10 else 0.005)
    for metric in opt['val']['metrics'].values():
        assert metric['crop_border'] == 4 and metric['test_y_channel']
    if is_train:
        train, data = opt['train'], opt['datasets']['train']
        assert (data['gt_size'] // opt['scale'], data['batch_size_per_gpu']) == (48, 16)
        assert train['optim_g'] == {'type': 'Adam', 'lr': 1e-4, 'weight_decay': 0, 'betas': [0.9, 0.99]}
        assert train['scheduler'] == {'type': 'MultiStepLR', 'milestones': [100000, 200000], 'gamma': 0.1}
        assert train['total_iter'] == 250000
        weights = {key: train[key]['loss_weight'] for key in ('pixel_opt', 'logits_opt', 'cl_opt', 'ce_opt')}
        assert weights == {'pixel_opt': 1, 'logits_opt': 1, 'cl_opt': 0.1, 'ce_opt': 0.001}
        assert train['cl_opt']['weights'] == [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1]
        noise = [train[f'{key}_prob'] for key in ('gaussian_blur', 'resize', 'gaussian_noise', 'gray_noise')]
        assert noise == [0, 0, 1, 0.5] and train['num_neg'] == 4 and train['neg_clean']
        assert (train['step'], train['update_decay'], train.get('lcr_opt')) == ([1000, 2000, 3000], 0.1, None)
        assert opt['network_his'] and 'network_vqgan' in opt
    else:
        assert [block['name'] for block in opt['datasets'].values()] == [
            'Set5',
            'Set14',
            'B100',
            'Urban100',
            'Manga109',
        ]
        assert opt['datasets']['test_3']['dataroot_lq'] == 'datasets/B100/LR_bicubic/X4'
        train_file = options.read_file(ROOT / 'options' / 'train_edsr_x4.yml')
        assert opt['path']['pretrain_network_g'] == f'experiments/{train_file["name"]}/models/net_g_latest.pth'
        assert opt['network_g'] == train_file['network_g'] and opt['network_t'] == train_file['network_t']
