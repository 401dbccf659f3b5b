"""Stopping and going on, for every kind of model: the run that was cut equals the one that was not, bit for bit."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from basicsr.models.sr_model import SRModel
from basicsr.models.srgan_model import SRGANModel
from small_run import VQGAN, dckd_run, edsr, write

from dckd_sr import checkpoint, safe_yaml, train
from dckd_sr.errors import UserError
from dckd_sr.models.dckd_model import DCKDModel
from dckd_sr.models.vqgan_model import VQGANModel

L1 = {'type': 'L1Loss'}
ADAM = {'type': 'Adam', 'lr': 1e-3}


@pytest.fixture
def opt(tmp_path):
    result = dckd_run(tmp_path)
    result['train']['total_iter'] = 6
    result['train']['scheduler'] = {'type': 'MultiStepLR', 'milestones': [2, 5], 'gamma': 0.5}
    result['logger']['save_checkpoint_freq'] = 100
    return result


def plain(opt, network, model_type='SRModel', **train_opt):
    """The same data for a model of BasicSR's."""
    for key in ('network_t', 'network_his', 'network_vqgan'):
        del opt[key]
    opt.update(model_type=model_type, network_g=network, path={})
    keep = {key: opt['train'][key] for key in ('ema_decay', 'total_iter', 'scheduler')}
    opt['train'] = {**keep, 'optim_g': dict(ADAM), 'pixel_opt': dict(L1), **train_opt}


def as_dckd(opt):
    return DCKDModel


def as_swinir(opt):
    """Drop path draws from torch's global generator."""
    sizes = {'img_size': 16, 'window_size': 8, 'depths': [2], 'embed_dim': 12, 'num_heads': [2], 'mlp_ratio': 2}
    plain(opt, {'type': 'SwinIR', 'upscale': 2, 'upsampler': 'pixelshuffle', 'drop_path_rate': 0.5, **sizes})
    return SRModel


def as_gan(opt):
    gan = {'type': 'GANLoss', 'gan_type': 'vanilla', 'loss_weight': 0.1}
    plain(opt, edsr(), 'SRGANModel', gan_opt=gan, optim_d=dict(ADAM))
    opt['network_d'] = {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 4}
    return SRGANModel


def as_codebook(opt):
    network = {key: value for key, value in VQGAN.items() if key != 'allow_random'}
    plain(opt, {**network, 'decoder': True}, 'VQGANModel', commit_opt={'type': 'MSELoss'}, restart_after=2)
    opt['scale'] = 1
    for block in opt['datasets'].values():
        block['dataroot_lq'] = block['dataroot_gt']
    return VQGANModel


def as_progressive(opt):
    """Stages that end between two saves, micro-batches, clipping."""
    opt['datasets']['train'].update(mini_batch_sizes=[3, 2, 1], gt_sizes=[16, 32, 48], iters=[2, 2, 2])
    opt['train'].update(accum_iter=2, grad_clip=0.1)
    return DCKDModel


def as_all_methods(opt):
    maps = ['body.0', 'upsample:input']
    opt['train'].update(
        fakd_opt={'type': 'SpatialAffinityLoss', 'student': maps, 'teacher': maps},
        csd_opt={'type': 'CSDLoss', 'num_neg': 1, 'allow_random': True},
        mclir_opt={'type': 'HistoryNegativeLoss', 'layer_weights': {'conv2_1': 1.0}, 'allow_random': True},
        dukd_opt={'type': 'UpcyclingLoss', 'n_gt_sub': 2},
    )
    return DCKDModel


KINDS = [as_dckd, as_swinir, as_gan, as_codebook, as_progressive, as_all_methods]


def stop_at(monkeypatch, model, iteration, number=signal.SIGTERM):
    """Send this process a signal in the middle of a step."""
    original = model.optimize_parameters

    def optimize_parameters(self, current_iter):
        original(self, current_iter)
        if current_iter == iteration:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(model, 'optimize_parameters', optimize_parameters)


def content(run, iteration=6):
    """Everything that a checkpoint holds, but for what may differ: the name and the workers in the options."""
    state = torch.load(f'experiments/{run}/training_states/{iteration}.state', weights_only=True)
    del state['dckd_sr']['options']
    nets = {
        file.name: torch.load(file, weights_only=True) for file in Path(f'experiments/{run}/models').glob('*_6.pth')
    }
    assert nets
    return {'state': state, 'nets': nets}


def differences(a, b, path=''):
    if isinstance(a, dict):
        assert list(a) == list(b), path
        return [text for key in a for text in differences(a[key], b[key], f'{path}.{key}')]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        return [text for index, pair in enumerate(zip(a, b)) for text in differences(*pair, f'{path}.{index}')]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [path]


def logged(run):
    """(iteration, learning rate) and (iteration, losses) over all log files of a run."""
    text = '\n'.join(file.read_text() for file in Path(f'experiments/{run}').glob('train_*.log'))
    return [sorted(re.findall(rf'iter: +(\d+), {what}', text)) for what in (r'lr:\((.*?)\)', r'.*\] (l_.*)')]


@pytest.mark.parametrize('kind', KINDS)
def test_a_run_that_was_cut_equals_one_that_was_not(opt, kind, monkeypatch):
    model = kind(opt)
    assert train.main(['-opt', write(opt)]) == 0
    opt['name'], opt['datasets']['train']['num_worker_per_gpu'] = 'cut', 1
    with monkeypatch.context() as patch:
        stop_at(patch, model, 3)
        assert train.main(['-opt', write(opt)]) == 143
    assert [f.name for f in Path('experiments/cut/training_states').iterdir()] == ['3.state']
    opt['datasets']['train']['num_worker_per_gpu'] = 0 if kind is as_gan else 4
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    assert differences(content('run'), content('cut')) == []
    assert logged('run') == logged('cut') and len(logged('run')[1]) == 6


def test_the_state_that_is_named_is_kept(opt):
    """Or the same option file would not start again."""
    opt['logger'].update(save_checkpoint_freq=1, keep_checkpoints=1)
    opt['train']['total_iter'], opt['val']['val_freq'] = 2, 100
    assert train.main(['-opt', write(opt)]) == 0
    opt['train']['total_iter'] = 5
    opt['path']['resume_state'] = 'experiments/run/training_states/2.state'
    assert train.main(['-opt', write(opt)]) == 0
    for folder, names in (('training_states', ['2.state', '5.state']), ('models', ['net_g_2.pth', 'net_g_5.pth'])):
        found = {file.name for file in Path('experiments/run', folder).iterdir()} - {'net_g_latest.pth'}
        assert sorted(found) == names
    opt['train']['total_iter'] = 6
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0


class Killed(BaseException):
    """As good as a kill: nothing catches it."""


def test_best_metrics_survive_a_kill_during_validation(opt, monkeypatch):
    """The state is written before the validation of its iteration, which is then repeated."""
    opt['logger']['save_checkpoint_freq'] = 2
    assert train.main(['-opt', write(opt)]) == 0
    opt['name'] = 'cut'
    original = DCKDModel.validation

    def validation(self, loader, current_iter, *args):
        if current_iter == 4:
            raise Killed
        original(self, loader, current_iter, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DCKDModel, 'validation', validation)
        with pytest.raises(Killed):
            train.main(['-opt', write(opt)])
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    assert differences(content('run'), content('cut')) == []


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
def test_signals_finish_the_step_save_and_say_how_to_go_on(opt, number, code, monkeypatch, capfd):
    stop_at(monkeypatch, DCKDModel, 3, number)
    assert train.main(['-opt', write(opt)]) == code
    assert Path('experiments/run/training_states/3.state').is_file()
    log = next(Path('experiments/run').glob('train_*.log')).read_text()
    assert re.search(f'Stopped by {number.name} after iteration 3. Continue with: .*--auto_resume', log)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # put back


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
def test_signals_before_the_first_iteration_end_it_at_once(opt, number, code, monkeypatch, capfd):
    monkeypatch.setattr(train, 'build', lambda opt: os.kill(os.getpid(), number))
    assert train.main(['-opt', write(opt)]) == code
    assert 'nothing to save' in capfd.readouterr().err and not Path('experiments').exists()


def test_a_second_sigint_leaves_at_once_with_the_checkpoint_intact(opt, monkeypatch):
    opt['logger']['save_checkpoint_freq'] = 2
    original = DCKDModel.optimize_parameters

    def optimize_parameters(self, current_iter):
        original(self, current_iter)
        if current_iter == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError('not reached')

    monkeypatch.setattr(DCKDModel, 'optimize_parameters', optimize_parameters)
    assert train.main(['-opt', write(opt)]) == 130
    assert [f.name for f in Path('experiments/run/training_states').iterdir()] == ['2.state']


def test_a_signal_cuts_a_validation_short(opt, monkeypatch):
    original, seen = DCKDModel.test, []

    def test(self):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    monkeypatch.setattr(DCKDModel, 'test', test)
    opt['train']['check_teacher'] = False
    assert train.main(['-opt', write(opt)]) == 143
    assert len(seen) == 2  # of four images
    assert Path('experiments/run/training_states/2.state').is_file()


def damage(kind):
    folder = Path('experiments/run')
    state, net = folder / 'training_states/4.state', folder / 'models/net_g_4.pth'
    target = net if kind.startswith('network') else state
    data = target.read_bytes()
    if 'truncated' in kind:
        target.write_bytes(data[: len(data) // 2])
    elif 'zeros' in kind:
        target.write_bytes(bytes(len(data)))
    elif 'bit' in kind:
        middle = len(data) // 2
        target.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif 'foreign' in kind:
        torch.save({'a': 1}, target)
    elif 'older' in kind:
        shutil.copy(folder / 'models/net_g_2.pth', net)
    elif 'missing' in kind:
        target.unlink()
    elif 'folder' in kind:
        target.unlink()
        target.mkdir()


PLACES = ['truncated', 'zeros', 'bit', 'foreign', 'folder']


@pytest.mark.parametrize('kind', [*PLACES, *(f'network {k}' for k in [*PLACES, 'older', 'missing'])])
def test_auto_resume_takes_the_newest_that_verifies_and_says_why(opt, kind, capfd):
    opt['logger']['save_checkpoint_freq'], opt['train']['total_iter'] = 2, 4
    assert train.main(['-opt', write(opt)]) == 0
    damage(kind)
    opt['train']['total_iter'] = 5
    capfd.readouterr()
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    printed = ''.join(capfd.readouterr())
    assert re.search('Passed over .*4.state: .*(4.state|net_g_4.pth)', printed)
    assert re.search('Resuming from .*2.state, iteration 2', printed) and 'Traceback' not in printed


def test_changed_options_are_told_and_another_network_is_refused(opt, capfd):
    opt['logger']['save_checkpoint_freq'], opt['train']['total_iter'] = 2, 2
    assert train.main(['-opt', write(opt)]) == 0
    opt['train'].update(total_iter=3, num_neg=1)
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    printed = ''.join(capfd.readouterr())
    assert 'changed since the checkpoint: train.num_neg: 2 -> 1' in printed
    assert 'changed since the checkpoint: train.total_iter: 2 -> 3' in printed and printed.count('changed since') == 2
    opt['network_g'] = edsr(num_feat=4)
    assert train.main(['-opt', write(opt), '--auto_resume']) == 2
    assert 'cannot change: network_g.num_feat: 8 -> 4' in capfd.readouterr().err


@pytest.mark.parametrize(
    'scheduler',
    [
        {'type': 'MultiStepLR', 'milestones': [1, 3], 'gamma': 0.1},  # goes by its last rate
        {'type': 'CosineAnnealingRestartLR', 'periods': [9], 'eta_min': 1e-6},  # goes by the number of the iteration
    ],
)
def test_changed_rates_count_from_the_next_iteration(opt, scheduler):
    """BasicSR takes rates, their schedule and the optimiser's settings from the state, whatever the options say."""

    def rates(name):
        lines = Path(f'experiments/{name}/metrics.jsonl').read_text().splitlines()
        return {line['iter']: line['lrs'] for line in map(json.loads, lines) if 'lrs' in line}

    opt['logger'].update(save_checkpoint_freq=4, print_freq=1)
    opt['train']['total_iter'] = 4
    assert train.main(['-opt', write(opt)]) == 0
    first = rates('run')
    opt['train']['scheduler'], opt['train']['total_iter'] = scheduler, 8
    opt['train']['optim_g'].update(lr=3e-3, weight_decay=0.01)
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    resumed = rates('run')
    opt['name'] = 'whole'
    assert train.main(['-opt', write(opt)]) == 0
    whole = rates('whole')
    assert [resumed[i] for i in range(1, 5)] == [first[i] for i in range(1, 5)] != [whole[i] for i in range(1, 5)]
    assert [resumed[i] for i in range(5, 9)] == [whole[i] for i in range(5, 9)]
    groups = [torch.load(f'experiments/{name}/training_states/8.state')['optimizers'][0] for name in ('run', 'whole')]
    assert groups[0]['param_groups'] == groups[1]['param_groups'] and groups[0]['param_groups'][0]['weight_decay'] > 0
    assert float(groups[0]['state'][0]['step']) == 8  # what the optimiser has gathered is still there


def test_a_state_of_basicsr_goes_on_with_a_warning(opt, capfd):
    opt['logger']['save_checkpoint_freq'], opt['train']['total_iter'] = 2, 2
    assert train.main(['-opt', write(opt)]) == 0
    path = 'experiments/run/training_states/2.state'
    state = torch.load(path, weights_only=True)
    del state['dckd_sr']
    torch.save(state, path)
    opt['train']['total_iter'] = 3
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    printed = ''.join(capfd.readouterr())
    assert 'it lacks random generators, best metrics, the history network' in printed
    assert Path('experiments/run/training_states/3.state').is_file()


def test_keep_checkpoints_keeps_the_last_and_the_best(opt):
    opt['logger'].update(save_checkpoint_freq=1, keep_checkpoints=2)
    opt['val'].update(val_freq=1)
    opt['val']['metrics']['psnr']['better'] = 'lower'  # an untrained student gets better: the best is an early one
    assert train.main(['-opt', write(opt)]) == 0
    state = torch.load('experiments/run/training_states/6.state', weights_only=True)
    best = state['dckd_sr']['best_metric_results']['Set']['psnr']['iter']
    kept = sorted({best, 5, 6})
    assert len(kept) == 3
    assert sorted(int(f.stem) for f in Path('experiments/run/training_states').iterdir()) == kept
    names = {f.name for f in Path('experiments/run/models').iterdir()}
    assert names == {'net_g_latest.pth', *(f'net_g_{n}.pth' for n in kept)}


def test_damaged_checkpoints_are_not_those_that_are_kept(opt):
    opt['logger']['save_checkpoint_freq'], opt['train']['total_iter'], opt['val']['val_freq'] = 2, 4, 100
    assert train.main(['-opt', write(opt)]) == 0
    opt['logger']['keep_checkpoints'] = 1
    folder = Path('experiments/run/training_states')
    (folder / '4.state').rename(folder / '8.state')  # a later one, damaged
    (folder / '8.state').write_bytes(b'')
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    assert sorted(file.name for file in folder.iterdir()) == ['4.state']
    assert [file.name for file in Path('experiments/run').glob('set_aside_*/training_states/*')] == ['8.state']


def killed_at(opt, monkeypatch, iteration, *arguments):
    """A training that is killed in this iteration."""
    original = DCKDModel.optimize_parameters

    def optimize_parameters(self, current_iter):
        if current_iter == iteration:
            raise Killed
        original(self, current_iter)

    with monkeypatch.context() as patch:
        patch.setattr(DCKDModel, 'optimize_parameters', optimize_parameters)
        with pytest.raises(Killed):
            train.main(['-opt', write(opt), *arguments])


def names_in(folder):
    return sorted(file.name for file in Path(folder).iterdir())


def test_what_a_rollback_leaves_is_not_continued(opt, monkeypatch, capfd):
    """Back to iteration 2, killed at 4: the next start goes on from 2, not from the 6 of before."""
    opt['logger']['save_checkpoint_freq'] = 2
    assert train.main(['-opt', write(opt)]) == 0
    before, metrics = content('run', 6), Path('experiments/run/metrics.jsonl').read_text()
    rolled = {**opt, 'path': {**opt['path'], 'resume_state': 'experiments/run/training_states/2.state'}}
    rolled['train'] = {**opt['train'], 'num_neg': 1}
    capfd.readouterr()
    killed_at(rolled, monkeypatch, 4)
    assert re.search(r'2.state: 4.state, 6.state moved to .*set_aside_', ''.join(capfd.readouterr()))
    assert names_in('experiments/run/training_states') == ['2.state']
    assert names_in('experiments/run/models') == ['net_g_2.pth']  # no net_g_latest, which is the sign of the end
    assert train.main(['-opt', write({**rolled, 'path': opt['path']}), '--auto_resume']) == 0
    printed = ''.join(capfd.readouterr())
    assert re.search('Resuming from .*run.training_states.2.state, iteration 2', printed)
    # What was left is whole, and can be gone back to.
    (aside,) = Path('experiments/run').glob('set_aside_*')
    assert names_in(aside / 'training_states') == ['4.state', '6.state']
    assert names_in(aside / 'models') == ['net_g_4.pth', 'net_g_6.pth', 'net_g_latest.pth']
    assert (aside / 'metrics.jsonl').read_text() == metrics
    opt['path']['resume_state'] = str(aside / 'training_states/6.state')
    opt['train']['total_iter'] = 8
    killed_at(opt, monkeypatch, 8)
    assert names_in('experiments/run/training_states') == []  # 4 and 6 of the other branch
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    assert re.search('Resuming from .*set_aside_.*6.state, iteration 6', ''.join(capfd.readouterr()))
    state = torch.load(aside / 'training_states/6.state', weights_only=True)
    assert differences(state['optimizers'], before['state']['optimizers']) == []


def test_a_rollback_that_is_cut_off_has_happened_or_not(opt, monkeypatch):
    """Whichever rename is the last: a later start goes on from the newest of before, or from the chosen one."""
    opt['logger']['save_checkpoint_freq'] = 2
    assert train.main(['-opt', write(opt)]) == 0
    chosen = {**opt, 'path': {**opt['path'], 'resume_state': 'experiments/run/training_states/2.state'}}
    shutil.copytree('experiments', 'kept')
    rename, seen = Path.rename, set()
    for last in range(6):
        shutil.rmtree('experiments')
        shutil.copytree('kept', 'experiments')
        left = [last]

        def cut(self, target, left=left):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, 'rename', cut)
            try:
                train.main(['-opt', write({**chosen, 'train': {**opt['train'], 'total_iter': 3}})])
            except Killed:
                folder = Path('experiments/run')
                paths = {'training_states': folder / 'training_states', 'models': folder / 'models'}
                state, _ = checkpoint.find_state({**opt, 'auto_resume': True, 'path': paths})
                seen.add(state['iter'])
    assert seen == {2, 6}


def test_auto_resume_of_an_empty_folder_starts_from_the_state_that_is_named(opt, monkeypatch, capfd):
    opt['logger']['save_checkpoint_freq'], opt['train']['total_iter'] = 2, 2
    assert train.main(['-opt', write(opt)]) == 0
    opt['name'], opt['train']['total_iter'] = 'next', 5
    opt['path']['resume_state'] = 'experiments/run/training_states/2.state'
    killed_at(opt, monkeypatch, 3, '--auto_resume')
    printed = ''.join(capfd.readouterr())
    assert 'finds no checkpoint in' in printed and 'the run starts from path.resume_state' in printed
    assert re.search('Resuming from .*run.training_states.2.state, iteration 2', printed)
    killed_at(opt, monkeypatch, 5, '--auto_resume')  # again, because nothing was saved
    assert 'the run starts from path.resume_state' in ''.join(capfd.readouterr())
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    printed = ''.join(capfd.readouterr())
    assert re.search('Resuming from .*next.training_states.4.state, iteration 4', printed)
    assert 'resume_state = experiments/run/training_states/2.state is for a run without one' in printed


def test_a_state_of_another_run_moves_what_is_there_aside(opt, monkeypatch):
    """Or its states would be taken for those of the run that begins."""
    opt['logger']['save_checkpoint_freq'], opt['train']['total_iter'] = 2, 2
    for opt['name'] in ('run', 'next'):
        assert train.main(['-opt', write(opt)]) == 0
    opt['path']['resume_state'], opt['train']['total_iter'] = 'experiments/run/training_states/2.state', 4
    killed_at(opt, monkeypatch, 3)
    assert names_in('experiments/next/training_states') == []
    assert len(list(Path('experiments').glob('next_archived_*/training_states/2.state'))) == 1


def test_safetensors_hold_the_same(opt, monkeypatch):
    from safetensors.torch import load_file

    opt['logger']['save_checkpoint_freq'] = 3
    assert train.main(['-opt', write(opt)]) == 0
    opt['name'], opt['logger']['save_checkpoint_format'] = 'cut', 'safetensors'
    with monkeypatch.context() as patch:
        stop_at(patch, DCKDModel, 3)
        assert train.main(['-opt', write(opt)]) == 143
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    whole = torch.load('experiments/run/models/net_g_6.pth', weights_only=True)
    for key, name in (('params', 'net_g_6'), ('params_ema', 'net_g_ema_6')):
        saved = load_file(f'experiments/cut/models/{name}.safetensors')
        assert differences(whole[key], {name: saved[name] for name in whole[key]}) == []


def no_room(monkeypatch, after):
    original, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise RuntimeError('PytorchStreamWriter failed writing file: No space left on device')
        original(*args, **kwargs)

    monkeypatch.setattr(torch, 'save', full)


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(opt, monkeypatch, capfd):
    opt['logger']['save_checkpoint_freq'] = 2
    with monkeypatch.context() as patch:
        no_room(patch, after=3)  # the second network is written, its state is not
        assert train.main(['-opt', write(opt)]) == 2
    assert 'cannot save' in (error := capfd.readouterr().err) and 'The checkpoint of iteration 2 is intact' in error
    assert not list(Path('experiments/run').rglob('*.tmp'))
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    assert 'Resuming from' in ''.join(capfd.readouterr())


def test_a_full_disk_may_be_survived(opt, monkeypatch, capfd):
    opt['logger'].update(save_checkpoint_freq=2, on_save_error='continue')
    no_room(monkeypatch, after=2)
    assert train.main(['-opt', write(opt)]) == 0
    assert 'Training goes on without this checkpoint' in ''.join(capfd.readouterr())
    assert [f.name for f in Path('experiments/run/training_states').iterdir()] == ['2.state']


def test_leftovers_of_a_killed_process_are_swept(opt):
    opt['train']['total_iter'] = 1
    train.main(['-opt', write(opt)])
    leftover = Path('experiments/run/models/.net_g_2.pth.tmp')
    leftover.write_bytes(b'half')
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    assert not leftover.exists()


class Bad:
    """Makes the loss of some iterations something that is no number."""

    def __init__(self, monkeypatch, iterations, value=float('nan')):
        original = DCKDModel.terms

        def terms(model, current_iter):
            result = original(model, current_iter)
            if current_iter in iterations:
                result['l_ts'] = result['l_ts'] * value
            return result

        monkeypatch.setattr(DCKDModel, 'terms', terms)


def networks(model_iter):
    state = torch.load(f'experiments/run/training_states/{model_iter}.state', weights_only=True)
    nets = torch.load(f'experiments/run/models/net_g_{model_iter}.pth', weights_only=True)
    return [*nets['params'].values(), *nets['params_ema'].values(), *state['dckd_sr']['extra']['net_his'].values()]


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_not_finite_stops_at_the_next_line_and_moves_nothing(opt, monkeypatch, capfd, value):
    opt['logger']['print_freq'], opt['train']['scheduler']['milestones'] = 5, [100]
    Bad(monkeypatch, {3, 4}, value)
    seen = {}
    original = DCKDModel.optimize_parameters

    def optimize_parameters(self, current_iter):
        original(self, current_iter)
        seen[current_iter] = [p.clone() for net in (self.net_g, self.net_g_ema, self.net_his) for p in net.parameters()]

    monkeypatch.setattr(DCKDModel, 'optimize_parameters', optimize_parameters)
    assert train.main(['-opt', write(opt)]) == 2
    assert max(seen) == 5
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[4]))
    assert any(not torch.equal(a, b) for a, b in zip(seen[4], seen[5]))
    error = capfd.readouterr().err
    assert re.search(r'iteration 3: l_ts = (nan|inf) is not finite', error) and 'train.on_nonfinite' in error
    batch = torch.load('experiments/run/nonfinite_3_rank0.pth', weights_only=True)
    assert batch['iteration'] == 3 and batch['lq'].shape == (2, 3, 16, 16)


def test_the_saved_batch_is_the_one_that_was_trained_on(opt, monkeypatch):
    as_progressive(opt)
    Bad(monkeypatch, {4})
    seen = []
    original = DCKDModel.feed_data

    def feed_data(self, data):
        original(self, data)
        seen.append((self.steps.iteration, self.steps.micro, data))

    monkeypatch.setattr(DCKDModel, 'feed_data', feed_data)
    assert train.main(['-opt', write(opt)]) == 2
    trained = next(data for iteration, micro, data in seen if (iteration, micro) == (4, 0))
    batch = torch.load('experiments/run/nonfinite_4_rank0.pth', weights_only=True)
    assert torch.equal(batch['lq'], trained['lq']) and batch['lq_path'] == trained['lq_path']


def test_skipping_counts_and_gives_up_after_ten_in_a_row(opt, monkeypatch, capfd):
    opt['train'].update(on_nonfinite='skip', total_iter=16)
    opt['logger'].update(print_freq=4)
    opt['val']['val_freq'] = 100
    with monkeypatch.context() as patch:
        Bad(patch, {2, 3})
        assert train.main(['-opt', write(opt)]) == 0
    assert 'iteration 2: l_ts = nan is not finite; 2 of 4 iterations since the last line moved no weight' in ''.join(
        capfd.readouterr()
    )
    assert all(torch.isfinite(value).all() for value in networks(16) if value.is_floating_point())
    Bad(monkeypatch, set(range(3, 13)))
    assert train.main(['-opt', write(opt)]) == 2
    assert '10 iterations in a row' in capfd.readouterr().err


def test_options_of_a_state_are_text_that_loads(opt):
    opt['train']['total_iter'] = 1
    train.main(['-opt', write(opt)])
    state = torch.load('experiments/run/training_states/1.state', weights_only=True)
    assert safe_yaml.parse(state['dckd_sr']['options'])['train']['num_neg'] == 2
    assert set(state['dckd_sr']['files']) == {'net_g_1.pth'}
    with pytest.raises(UserError, match='not a training state'):
        checkpoint.find_state({'path': {'resume_state': 'teacher.pth', 'models': '.'}, 'network_g': {}})
