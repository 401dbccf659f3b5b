"""Two gloo processes on one machine against one process: the same numbers, and nobody waits for ever."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_run import dckd_run, write

from dckd_sr import locks, processes, train
from dckd_sr.errors import UserError

CRASH = """
import os
from dckd_sr.models.dckd_model import DCKDModel

step = DCKDModel.optimize_parameters


def fail(self, current_iter):
    if current_iter == 2 and os.environ['RANK'] == '1':
        raise RuntimeError('this rank is broken')
    step(self, current_iter)


DCKDModel.optimize_parameters = fail
"""
RECORD = """
import os
from pathlib import Path
from dckd_sr.models.dckd_model import DCKDModel

rank, test = os.environ['RANK'], DCKDModel.test
Path(f'pid_{rank}').write_text(str(os.getpid()))


def record(self):
    with open(f'validated_{rank}', 'a') as file:
        file.write('x')
    test(self)


DCKDModel.test = record
"""
ONE_FAILS = """
import os
import time
from dckd_sr.errors import UserError
from dckd_sr.models.dckd_model import DCKDModel

feed, fails = DCKDModel.feed_data, os.environ['FAILS']


def feed_data(self, data):
    if self.net_g.training and self.steps.iteration == 2:
        if os.environ['RANK'] == fails:
            raise {error}('this rank is broken')
        if {busy}:
            time.sleep(600)  # between two collectives
    feed(self, data)


DCKDModel.feed_data = feed_data
"""
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def opt(tmp_path):
    result = dckd_run(tmp_path)
    result['datasets']['train']['batch_size_per_gpu'] = 2
    result['train'].update(total_iter=5, lcr_opt={'type': 'L1Loss'}, noisy={'prob': 0.5}, gaussian_blur_prob=0.5)
    result['logger'].update(save_checkpoint_freq=5)
    result['val']['val_freq'] = 5
    return result


def start(opt, *flags, processes=2, **environment):
    """The launcher's command, in its own group; everything goes to output.txt."""
    command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--master_port=0']
    command += ['--standalone', str(ROOT / 'dckd_sr' / 'train.py'), '-opt', write(opt), '--launcher', 'pytorch', *flags]
    with open('output.txt', 'ab') as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{ROOT}/tests', **environment},
            start_new_session=True,
        )


def output():
    return Path('output.txt').read_text(errors='replace')


def content(run):
    nets = torch.load(f'experiments/{run}/models/net_g_5.pth', weights_only=True)
    state = torch.load(f'experiments/{run}/training_states/5.state', weights_only=True)
    return nets, state


def losses(run):
    text = next(Path(f'experiments/{run}').glob('train_*.log')).read_text()
    rows = re.findall(r'iter: +\d+,.*\] (l_.*)', text)
    return torch.tensor([[float(value) for value in re.findall(r': (\S+)', row)] for row in rows]), text


def test_two_processes_equal_one_with_twice_the_batch(opt):
    Path('record.py').write_text(RECORD)
    opt['imports'] = ['record']
    opt['train']['gradient_shares'] = {'ce_opt': 0.3}
    opt['train']['csd_opt'] = {'type': 'CSDLoss', 'num_neg': 2, 'loss_weight': 0.01, 'allow_random': True}
    opt['logger']['gradients'] = True
    # Of several processes, too, no image overwrites another of its name, nor that of another set.
    Path('other').mkdir()
    shutil.copy('HR/1.png', 'other/0.png')
    Path('list.txt').write_text('HR/0.png\nother/0.png\n')
    namesakes = {'type': 'SRImageDataset', 'dataroot_gt': '.', 'meta_info_file': 'list.txt'}
    opt['datasets']['val_2'] = {'name': 'Namesakes', **namesakes}
    opt['val']['save_img'] = True
    assert start(opt).wait(timeout=120) == 0, output()
    assert [len(Path(f'validated_{rank}').read_text()) for rank in (0, 1)] == [3, 3]  # of four and two images
    del opt['imports']
    opt['name'], opt['datasets']['train']['batch_size_per_gpu'] = 'single', 4
    assert train.main(['-opt', write(opt)]) == 0
    (two, two_state), (one, one_state) = content('run'), content('single')
    # Adam divides by the gradient's magnitude: where that is rounding, so is the step, at most 1e-3 each.
    near = {'rtol': 1e-4, 'atol': 2e-5}
    for key in ('params', 'params_ema'):
        for name, value in one[key].items():
            assert torch.allclose(two[key][name], value, **near), (key, name)
    history = two_state['dckd_sr']['extra']['net_his'], one_state['dckd_sr']['extra']['net_his']
    assert all(torch.allclose(history[0][name], value, **near) for name, value in history[1].items())
    (rows, log), (expected, single_log) = losses('run'), losses('single')
    assert len(rows) == 5 and rows.shape == expected.shape and torch.allclose(rows, expected, rtol=2e-3, atol=1e-4)
    pictures = [sorted(Path(f'experiments/{run}/visualization').rglob('*.png')) for run in ('run', 'single')]
    names = [
        [str(path.relative_to(f'experiments/{run}')) for path in paths]
        for run, paths in zip(('run', 'single'), pictures)
    ]
    assert len(names[0]) == 6 and names[0] == names[1] and 'visualization/Namesakes/0_2/0_2_5.png' in names[0]
    for ours, theirs in zip(*pictures):
        assert np.abs(cv2.imread(str(ours)).astype(int) - cv2.imread(str(theirs))).max() <= 1
    # Every validation image is counted once.
    psnr = [re.search(r'# psnr: (\S+)', text).group(1) for text in (log, single_log)]
    assert float(psnr[0]) == pytest.approx(float(psnr[1]), abs=1e-3)
    assert len(list(Path('experiments/run').glob('train_*.log'))) == 1 and '2 x 2 processes' in log
    assert len(two_state['dckd_sr']['generators']) == 2


def codebook(opt):
    """Training of a codebook that is small enough to lose codes; none of its networks but itself."""
    network = {**opt['network_vqgan'], 'decoder': True, 'embed_dim': 8, 'n_embed': 24}
    del network['allow_random']
    run = {'name': 'run', 'model_type': 'VQGANModel', 'scale': 1, 'num_gpu': 0, 'manual_seed': 1, 'network_g': network}
    data = {'type': 'SRImageDataset', 'dataroot_gt': 'HR', 'dataroot_lq': 'HR', 'gt_size': 32, 'num_worker_per_gpu': 0}
    run['datasets'] = {'train': {'name': 'train', **data}, 'val_1': {'name': 'Set', **data}}
    run['val'], run['logger'] = opt['val'], opt['logger']
    run['train'] = {
        'ema_decay': 0.9,
        'optim_g': {'type': 'SGD', 'lr': 1e-2},
        'total_iter': 5,
        'pixel_opt': {'type': 'L1Loss'},
        'commit_opt': {'type': 'MSELoss', 'loss_weight': 0.25},
        'restart_after': 2,
    }
    return run


def mixed(opt):
    """Everything that draws for samples, but for ratios, which are one micro-batch's."""
    del opt['train']['cl_opt'], opt['network_his']
    opt['train']['optim_g'] = {'type': 'SGD', 'lr': 1e-2}
    opt['train'].update(mixing_augs={'mixup': True, 'mixup_beta': 1.2}, dukd_opt={'type': 'UpcyclingLoss', 'prob': 0.5})
    return opt


@pytest.mark.parametrize('recipe, batch', [(codebook, 2), (mixed, 1)])
def test_processes_and_micro_batches_are_one_batch(opt, recipe, batch):
    opt = recipe(opt)
    for name, size, accum_iter, count in (
        ('run', batch, 1, 2),
        ('micro', batch, 2, 1),
        ('single', 2 * batch, 1, 1),
    ):
        opt['name'], opt['datasets']['train']['batch_size_per_gpu'] = name, size
        opt['train']['accum_iter'] = accum_iter
        code = start(opt).wait(timeout=120) if count == 2 else train.main(['-opt', write(opt)])
        assert code == 0, output()
    single, (expected, _) = content('single'), losses('single')
    for name in ('run', 'micro'):
        (nets, state), (rows, _) = content(name), losses(name)
        assert torch.allclose(rows, expected, rtol=1e-3), name
        for key in ('params', 'params_ema'):
            for parameter, value in single[0][key].items():
                assert torch.allclose(nets[key][parameter], value, rtol=1e-3, atol=1e-5), (name, key, parameter)
        extra = single[1]['dckd_sr']['extra']
        for key in ('code_sizes', 'code_sums', 'idle') if 'idle' in extra else ():
            assert torch.allclose(state['dckd_sr']['extra'][key], extra[key], rtol=1e-3, atol=1e-5), (name, key)


def test_a_rank_that_dies_ends_all_with_its_error(opt):
    opt['train']['total_iter'] = 10000
    Path('crash.py').write_text(CRASH)
    opt['imports'] = ['crash']
    began = time.monotonic()
    assert start(opt, PYTHONPATH='.').wait(timeout=90) != 0
    assert time.monotonic() - began < 60 and 'this rank is broken' in output()


def test_a_mistake_is_told_once_per_process_without_traceback_of_ours(opt):
    opt['train']['check_teacher'] = True
    opt['val']['metrics']['psnr'].update(crop_border=0)
    torch.save({'params': {'x': torch.zeros(1)}}, 'teacher.pth')
    assert start(opt).wait(timeout=90) != 0
    assert 'does not fit this EDSR' in output()


def test_sigterm_to_one_rank_stops_all_at_one_iteration_and_the_run_resumes(opt):
    Path('record.py').write_text(RECORD)
    opt['imports'] = ['record']
    opt['train']['total_iter'], opt['logger']['save_checkpoint_freq'] = 100000, 100000
    opt['val']['val_freq'] = 100000
    process = start(opt)
    deadline = time.monotonic() + 90
    while 'iter:       3' not in output() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(int(Path('pid_1').read_text()), signal.SIGTERM)
    process.wait(timeout=60)
    del opt['imports']
    states = list(Path('experiments/run/training_states').glob('*.state'))
    assert len(states) == 1, output()
    iteration = int(states[0].stem)
    opt['train']['total_iter'] = iteration + 2
    assert start(opt, '--auto_resume').wait(timeout=120) == 0, output()
    assert f'iteration {iteration}.' in output() and 'not exactly' not in output()
    # One process goes on, too, and says that it is not the same run.
    opt['train']['total_iter'] = iteration + 3
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    log = '\n'.join(file.read_text() for file in Path('experiments/run').glob('train_*.log'))
    assert 'is of 2 process(es), this run has 1: it continues, but not exactly' in log


def without_a_launcher(opt, **environment):
    """Two ranks that nobody ends but they themselves: (exit codes, what they printed)."""
    port, command = str(free_port()), [sys.executable, '-m', 'dckd_sr.train', '-opt', write(opt)]
    world = {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'OMP_NUM_THREADS': '1'}
    ranks = [
        subprocess.Popen(
            [*command, '--launcher', 'pytorch'],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **world, 'RANK': rank, 'LOCAL_RANK': rank, 'PYTHONPATH': str(ROOT), **environment},
        )
        for rank in '01'
    ]
    try:
        printed = [process.communicate(timeout=90)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [process.returncode for process in ranks], printed


@pytest.mark.parametrize(
    'fails, error, busy', [(1, 'UserError', True), (0, 'UserError', False), (1, 'RuntimeError', True)]
)
def test_an_error_on_one_rank_ends_all_with_that_error(opt, fails, error, busy):
    """Also where the other one is between two collectives, or waits in one, and no launcher ends it."""
    Path('one_fails.py').write_text(ONE_FAILS.format(error=error, busy=busy))
    opt['imports'] = ['one_fails']
    codes, printed = without_a_launcher(opt, FAILS=str(fails))
    what = 'this rank is broken' if error == 'UserError' else 'iteration 2: this rank is broken'
    assert codes == [2, 2], printed
    assert printed[1 - fails].rstrip().endswith(f'error: rank {fails}: {what}'), printed[1 - fails]
    assert f'error: {what}' in printed[fails] and 'closed by peer' not in ''.join(printed)


def test_rank_0_alone_is_refused_the_folder_and_the_others_hear_why(opt):
    opt['train']['total_iter'] = 1
    assert train.main(['-opt', write(opt)]) == 0
    with locks.sole_writer(Path('experiments/run')):
        codes, printed = without_a_launcher(opt)
    assert codes == [2, 2] and 'error: rank 0: another training is writing to' in printed[1]


@pytest.mark.parametrize(
    ('places', 'said'),
    [
        ([], None),
        ([('a', '1'), ('a', '2'), ('b', '1')], None),
        ([('a', '1'), ('a', '2'), ('a', '1'), ('a', '2')], '2 processes on a have the same GPU, .* start 2 there'),
        ([('a', '1'), ('b', '1'), ('b', '1'), ('b', '1')], '3 processes on b have the same GPU, .* start 1 there'),
    ],
)
def test_processes_that_share_a_gpu_are_refused(places, said):
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        processes._refuse_shared_gpus(places, 'pytorch')


def test_a_gpu_is_known_whatever_its_number(monkeypatch):
    """SLURM shows each process one, which is number 0 for all of them."""

    def gather(places, place, group):
        places[:] = [('a', 'GPU-1'), place]

    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda which: types.SimpleNamespace(uuid='GPU-2'))
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 2)
    monkeypatch.setattr(torch.distributed, 'all_gather_object', gather)
    monkeypatch.setattr(socket, 'gethostname', lambda: 'a')
    assert processes._gpus() == [('a', 'GPU-1'), ('a', 'GPU-2')]


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def test_slurm_starts_them_too_and_networks_with_buffers_do_not_hang(opt):
    """SwinIR has buffers, and without an average the trained network itself is validated (basicsr hangs there)."""
    sizes = {'img_size': 16, 'window_size': 8, 'depths': [1], 'embed_dim': 12, 'num_heads': [2], 'mlp_ratio': 2}
    opt['network_g'] = {'type': 'SwinIR', 'upscale': 2, 'upsampler': 'pixelshuffledirect', **sizes}
    opt['train'].update(ema_decay=0, total_iter=2)
    opt['val']['val_freq'] = 1
    opt['dist_params'] = {'port': free_port()}
    Path('scontrol').write_text(f'#!{sys.executable}\nprint("127.0.0.1\\nanother")\n')
    Path('scontrol').chmod(0o755)
    command = [sys.executable, '-m', 'dckd_sr.train', '-opt', write(opt), '--launcher', 'slurm']
    slurm = {'SLURM_NTASKS': '2', 'SLURM_STEP_NODELIST': 'node[1-2]', 'PATH': f'{Path.cwd()}:{os.environ["PATH"]}'}
    ranks = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                **slurm,
                'SLURM_PROCID': rank,
                'SLURM_LOCALID': rank,
                'OMP_NUM_THREADS': '1',
                'PYTHONPATH': str(ROOT),
            },
        )
        for rank in '01'
    ]
    printed = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], printed
    assert printed[0].count('Validation Set') == 2 and 'Validation Set' not in printed[1]
    assert Path('experiments/run/models/net_g_latest.pth').is_file()
