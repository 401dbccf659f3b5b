"""The training entry point as a user meets it: files on disk, exit codes, messages, resuming."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_run import dckd_run, write

from dckd_sr import locks, logs, train
from dckd_sr.errors import UserError
from dckd_sr.models.dckd_model import DCKDModel

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def opt(tmp_path):
    return dckd_run(tmp_path)


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


@pytest.mark.parametrize(
    'model, has_gpu', [('RealESRNetModel', False), ('RealESRGANModel', True), ('TheirModel', False)]
)
def test_models_that_need_a_gpu_say_so(model, has_gpu, monkeypatch):
    def build_model(opt):
        raise AssertionError('Torch not compiled with CUDA enabled')

    monkeypatch.setattr(train, 'build_model', build_model)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_gpu)
    with pytest.raises(UserError, match=f'^{model} needs a GPU') as caught:
        train.build({'model_type': model, 'num_gpu': 0})
    assert ('num_gpu is 0' in str(caught.value)) == has_gpu


def test_a_second_run_moves_the_first_aside(opt):
    opt['train']['total_iter'] = 1
    train.main(['-opt', write(opt)])
    train.main(['-opt', write(opt)])
    assert len(list(Path('experiments').glob('run_archived_*'))) == 1


@pytest.mark.parametrize('arguments', [[], ['--auto_resume']])
def test_two_trainings_do_not_share_a_folder(opt, arguments, capsys, monkeypatch):
    monkeypatch.setattr(locks, 'PATIENCE', 0.1)
    opt['train']['total_iter'] = 2
    assert train.main(['-opt', write(opt)]) == 0
    folder, before = Path('experiments/run'), sorted(Path('experiments').rglob('*'))
    opt['train']['total_iter'] = 4
    with locks.sole_writer(folder) as alone:
        assert alone
        assert train.main(['-opt', write(opt), *arguments]) == 2
        assert 'another training is writing to' in capsys.readouterr().err
        (folder / '.lock').unlink()
        assert sorted(Path('experiments').rglob('*')) == before  # nothing was moved or written
    assert train.main(['-opt', write(opt), *arguments]) == 0


@pytest.mark.parametrize(
    'key, put',
    [
        ('path.pretrain_network_g', lambda opt: opt['path'].update(pretrain_network_g='experiments/run/models/w.pth')),
        ('path.pretrain_network_t', lambda opt: opt['path'].update(pretrain_network_t='link/models/w.pth')),
        (
            'datasets.val_1.dataroot_gt',
            lambda opt: opt['datasets']['val_1'].update(dataroot_gt='experiments/run/HR'),
        ),
    ],
)
def test_a_run_does_not_move_aside_what_it_reads(opt, key, put, capsys):
    opt['train']['total_iter'] = 1
    assert train.main(['-opt', write(opt)]) == 0
    Path('link').symlink_to('experiments/run')
    shutil.copytree('HR', 'experiments/run/HR')
    shutil.copy(
        'teacher.pth' if key.endswith('_t') else 'experiments/run/models/net_g_1.pth', 'experiments/run/models/w.pth'
    )
    put(opt)
    before = sorted(Path('experiments').rglob('*'))
    capsys.readouterr()
    assert train.main(['-opt', write(opt)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: {key} = ') and 'which this run would move aside' in error
    assert sorted(Path('experiments').rglob('*')) == before
    opt['train']['total_iter'] = 2
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0  # nothing moves


def test_a_run_is_repeated_from_its_own_option_file(opt):
    """Which lies in the folder that is moved aside."""
    opt['train']['total_iter'] = 1
    assert train.main(['-opt', write(opt)]) == 0
    text = Path('experiments/run/resolved.yml').read_text()
    assert train.main(['-opt', 'experiments/run/resolved.yml']) == 0
    assert Path('experiments/run/resolved.yml').read_text() == text
    assert same(weights('run', 1), torch.load(next(Path('experiments').glob('run_archived_*/models/net_g_1.pth'))))


def test_a_first_look_at_an_image_without_psnr_says_why(opt, capsys):
    opt['val']['metrics']['psnr']['crop_border'] = 24
    opt['train'].update(total_iter=1, check_teacher=True)
    assert train.main(['-opt', write(opt)]) == 0
    printed = capsys.readouterr().out
    assert 'No first look: psnr was not measured on any image: 0 (48x48x3) is too small for psnr' in printed
    assert 'nan dB' not in printed and 'Set: psnr was not measured on any image' in printed


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


@pytest.mark.parametrize('more', [{}, {'accum_iter': 2}])
def test_gradients_are_logged_and_change_nothing(opt, more):
    opt['train'].update(total_iter=4, **more)
    opt['logger'].update(print_freq=2, save_checkpoint_freq=3)
    weights, rows = [], []
    for opt['name'], opt['logger']['gradients'] in (('without', False), ('with', True)):
        assert train.main(['-opt', write(opt)]) == 0
        folder = Path('experiments') / opt['name']
        weights.append(torch.load(folder / 'models/net_g_latest.pth')['params'])
        rows.append([row for row in logs.read_metrics(folder / 'metrics.jsonl') if 'time' in row])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    added = [sorted(set(ours) - set(before)) for before, ours in zip(*rows)]
    names = sorted(f'{loss}_{what}' for loss in ('l_ts', 'l_cl', 'l_ce') for what in ('grad', 'cos'))
    assert [row['iter'] for row in rows[1]] == [2, 4] and added == [names, names]
    assert all(row['l_ts_grad'] > 0 and -1 <= row['l_cl_cos'] <= 1 for row in rows[1])


def test_each_run_says_how_strongly_its_losses_pull(opt):
    """Once at the start and once at a tenth, without asking; the released loss is thrown off at the start, and told."""
    opt['train']['cl_opt']['type'] = 'ContrasLoss'
    opt['train'].update(total_iter=8)
    opt['logger'].update(print_freq=8, save_checkpoint_freq=8)
    assert train.main(['-opt', write(opt)]) == 0
    log = next(Path('experiments/run').glob('*.log')).read_text()
    for span in ('1 to 5', '6 to 8'):
        (line,) = [line for line in log.splitlines() if f'iterations {span}: ' in line]
        assert re.search(r'that of l_pix being 1, .*: l_ts \S+ \(cosine [+-]\S+\), l_cl \S+ .*, l_ce ', line)
    (warning,) = [line for line in log.splitlines() if 'WARNING: l_cl ' in line]
    assert 'iterations 1 to 5' in warning and warning.endswith('set train.cl_opt.margin: 1.')
    assert 'softmax twice' in log
    opt['name'], opt['train']['cl_opt']['type'] = 'mended', 'DynamicContrastiveLoss'
    assert train.main(['-opt', write(opt)]) == 0
    log = next(Path('experiments/mended').glob('*.log')).read_text()
    assert 'WARNING: l_cl ' not in log and 'cl_left_out_1: ' in log
    (row,) = [row for row in logs.read_metrics(Path('experiments/mended/metrics.jsonl')) if 'time' in row]
    assert len(row['left_out']) == 2 and 0 < row['left_out'][0] <= 1


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


OUT = (
    'CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.79 GiB of which 10.19 MiB is '
    'free. Process 81 has 7.70 GiB memory in use. Of the allocated memory 7.31 GiB is allocated by PyTorch'
)


@pytest.mark.parametrize(
    ('overrides', 'advice'),
    [
        (
            [],
            'train.negatives_micro_batch: 1 or use_checkpoint: true or use_amp: true and amp_bf16: true or '
            'datasets.train.batch_size_per_gpu: 1 with train.accum_iter: 2 or a datasets.train.gt_size below 32',
        ),
        (
            ['train:cl_opt=null', 'use_checkpoint=true', 'datasets:train:batch_size_per_gpu=1'],
            'use_amp: true and amp_bf16: true or a datasets.train.gt_size below 32',
        ),
    ],
)
@pytest.mark.parametrize('where', ['GPU', 'CPU'])
def test_a_step_without_the_memory_names_what_needs_less(where, overrides, advice, opt, monkeypatch, capsys):
    def full(self, iteration):
        raise torch.OutOfMemoryError(OUT) if where == 'GPU' else RuntimeError("can't allocate memory: 8 bytes")

    monkeypatch.setattr(DCKDModel, 'optimize_parameters', full)
    assert train.main(['-opt', write(opt), *(['--force_yml', *overrides] if overrides else [])]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    what = OUT.partition('. Process')[0] if where == 'GPU' else 'not enough memory for 8 bytes'
    assert said == f'error: iteration 1: {what}; less is needed with {advice}'
