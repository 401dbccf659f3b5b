"""The doctor says what this machine has and what a file lacks here, and what it says is so."""

import json
from pathlib import Path

import pytest
import small_run
import torch

from dckd_sr import doctor
from dckd_sr.errors import UserError

SECONDS = {'float32': 0.01, 'bfloat16': 0.002, 'float16': 0.02}


@pytest.fixture
def known(monkeypatch):
    """No clock: a machine on which bfloat16 is five times as fast, and float16 half as fast."""
    monkeypatch.setattr(doctor, 'convolution', lambda device: dict(SECONDS))


def run(capsys, *words):
    """Exit code, and what was printed."""
    code = doctor.main(list(words))
    out, err = capsys.readouterr()
    assert 'Traceback' not in out + err
    return code, out, err


def written(**changes):
    opt = small_run.dckd_run(Path('.'))
    for section, values in changes.items():
        opt[section] = {**opt[section], **values} if isinstance(values, dict) else values
    return small_run.write(opt)


def test_the_machine(capsys):
    code, out, _ = run(capsys, '--json', 'found.json')
    assert code == 0
    found = json.loads(Path('found.json').read_text())
    assert found['versions']['torch'] == torch.__version__ and found['file'] is None
    facts = found['machine']
    times = facts['convolution']
    assert all(isinstance(times[name], (float, str)) for name in SECONDS) and times['float32'] > 0
    assert 1 <= facts['cores'] and 0 <= facts['workers'] < max(2, facts['cores'])
    assert facts['disk_free'] > 0 and facts['memory_free'] > 0
    assert len(facts['gpus']) == torch.cuda.device_count()
    for word in ('Versions', 'torch ', 'cores', 'free on disk', 'GPU', 'convolution, ', 'Advice', '-opt FILE'):
        assert word in out


def test_json_in_place_of_the_text(known, capsys):
    code, out, _ = run(capsys, '--json', '-')
    assert code == 0 and json.loads(out)['machine']['convolution'] == SECONDS


def test_nothing_is_missing_and_nothing_is_written(known, capsys):
    file = written()
    before = sorted(map(str, Path('.').rglob('*')))
    code, out, _ = run(capsys, '-opt', file)
    assert code == 0 and 'opt.yml, a training: nothing is missing' in out
    assert 'first look' in out and 'First look, PSNR of 0.png: bicubic ' in out
    assert 'python -m dckd_sr.train -opt opt.yml' in out
    assert sorted(map(str, Path('.').rglob('*'))) == before
    _, out, _ = run(capsys, '-opt', file, '--force_yml', 'train:step=[3, 4]')
    assert "python -m dckd_sr.train -opt opt.yml --force_yml 'train:step=[3, 4]'" in out


def test_a_training_agrees(known, capsys):
    """What the doctor finds is what the training stops at."""
    from dckd_sr import train

    file = written()
    Path('teacher.pth').unlink()
    code, out, _ = run(capsys, '-opt', file)
    assert code == 1 and 'a training: 1 problem\n' in out
    assert train.main(['-opt', file]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert f'  {line.removeprefix("error: opt.yml: ")}\n' in out


def test_from_another_folder(known, capsys, monkeypatch):
    file = written()
    Path('elsewhere').mkdir()
    monkeypatch.chdir('elsewhere')
    code, out, _ = run(capsys, '-opt', f'../{file}')
    assert code == 1 and 'a training: 5 problems' in out
    assert 'path.pretrain_network_t = teacher.pth: no such file in ' in out
    assert 'datasets.val_1.dataroot_lq = LR: no such folder in ' in out


@pytest.mark.parametrize(
    ('overrides', 'told'),
    [
        (['train:total_itre=3'], ["train.total_itre = 3: unknown key (did you mean 'total_iter'?)"]),
        # Data and weights are looked at, both, whatever the other has.
        (
            ['datasets:val_1:dataroot_lq=HR', 'network_t:num_feat=12'],
            ['dataset Set: 4 of 4 pairs: sizes do not match', 'teacher.pth (params) does not fit this EDSR'],
        ),
        (['train:check_teacher=true'], ['network_t: the teacher reaches ']),
        (['use_amp=true'], ['use_amp: a convolution in float16 takes 2.0 times as long here as in float32; amp_bf16:']),
        (['logger:wandb:project=x', 'logger:use_tb_logger=true'], ['logger.wandb.project: wandb is not installed']),
        (['network_g:type=EDSRR'], ['network_g.type = EDSRR: no such arch']),
        (['datasets=3'], ['datasets = 3: expected a block of keys']),
        (['logger=3'], ['logger = 3: expected a block of keys']),
    ],
)
def test_what_is_missing(overrides, told, known, capsys, monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, 'find_spec', lambda name: None if name == 'wandb' else name)
    code, out, _ = run(capsys, '-opt', written(), '--force_yml', *overrides)
    assert code == 1
    for line in told:
        assert f'  {line}' in out


def test_room_for_checkpoints(known, capsys, monkeypatch):
    file = written()
    need = doctor.room(file, ())
    student = sum(p.numel() for p in doctor.build_network(small_run.edsr()).parameters()) * 4
    # Student, EMA, history, and Adam's two averages; at iterations 2 and 4.
    assert need['each'] == 5 * student and need['count'] == 2 and need['total'] == 10 * student
    assert doctor.room(file, ['logger:keep_checkpoints=1', 'train:optim_g:type=SGD'])['total'] == 4 * student
    assert doctor.room(file, ['network_g:type=None']) is None
    usage = doctor.shutil.disk_usage('.')
    monkeypatch.setattr(doctor.shutil, 'disk_usage', lambda path: usage._replace(free=1000))
    code, out, _ = run(capsys, '-opt', file)
    assert code == 1 and '2 checkpoints of 0.1 MiB need 0.2 MiB, ' in out


def test_the_files_of_a_run_are_of_that_size(known, capsys):
    """`room` against what a training writes."""
    from dckd_sr import train

    file = written()
    need = doctor.room(file, ())
    assert train.main(['-opt', file]) == 0
    run_folder = Path('experiments/run')
    size = (
        sum(f.stat().st_size for f in run_folder.rglob('*_2.pth'))
        + (run_folder / 'training_states/2.state').stat().st_size
    )
    assert need['each'] < size < need['each'] + 100_000  # names, generators, options


def test_a_test(known, capsys):
    opt = small_run.dckd_run(Path('.'))
    del opt['train'], opt['datasets']['train']
    opt['datasets'] = {'test_1': opt['datasets'].pop('val_1')}
    opt['network_g'], opt['path'] = opt['network_t'], {'pretrain_network_g': 'teacher.pth'}
    for key in ('network_t', 'network_his', 'network_vqgan'):
        del opt[key]
    file = small_run.write(opt)
    code, out, _ = run(capsys, '-opt', file)
    assert code == 0 and 'a test: nothing is missing' in out and 'python -m dckd_sr.test -opt opt.yml' in out
    Path('teacher.pth').unlink()
    code, out, _ = run(capsys, '-opt', file)
    assert code == 1 and 'path.pretrain_network_g = teacher.pth: no such file' in out


def test_compiling_is_tried(known, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError('no C++ compiler\nmore of it')

    monkeypatch.setattr(doctor.torch, 'compile', refuse)
    code, out, _ = run(capsys, '-opt', written(), '--force_yml', 'use_compile=true')
    assert code == 1 and '  use_compile: no C++ compiler\n' in out
    monkeypatch.setattr(doctor.torch, 'compile', lambda net, **_: net)
    assert doctor.compiles('cpu', None) > 0


@pytest.mark.parametrize(
    ('words', 'told'),
    [
        (['-opt', 'op.yml'], "-opt op.yml: no such file in .* \\(did you mean 'opt.yml'\\?\\)"),
        (['-opt', 'opt.yml', '--json', 'opt.yml'], '--json opt.yml: the option file itself'),
        (['--json', 'no/such.json'], '--json no/such.json: no such folder'),
        (['--force_yml', 'a=1'], '--force_yml sets keys of an option file: -opt is missing'),
        (['-opt', 'opt.yml', '--force_yml', 'scale:x=1'], "--force_yml scale:x=1: 'scale' is a value here"),
    ],
)
def test_mistakes(words, told, capsys):
    written()
    code, out, err = run(capsys, *words)
    assert code == 2 and out == '' and err.count('\n') == 1
    with pytest.raises(UserError, match=told):
        raise UserError(err)


def facts(**changes):
    known = {'convolution': SECONDS, 'device': 'cpu', 'gpus': [], 'gpu_problem': None, 'instructions': [], 'threads': 1}
    return {**known, 'cores': 2, 'shared_memory_free': None, **changes}


GPU = {'name': 'G', 'bf16': True, 'tf32': True}


@pytest.mark.parametrize(
    ('changes', 'told'),
    [
        ({}, 'bfloat16: a wide convolution is 5.0 times as fast'),
        ({'instructions': ['AMX bf16']}, 'bfloat16 (this processor has AMX): a wide convolution is 5.0 times'),
        (
            {'convolution': {**SECONDS, 'bfloat16': 0.15}},
            'bfloat16 takes 15.0 times as long as float32 here: leave use_amp',
        ),
        ({'convolution': {**SECONDS, 'bfloat16': 0.01}}, 'bfloat16 is no faster than float32 here: leave use_amp'),
        ({'convolution': {**SECONDS, 'bfloat16': 'no such kernel'}}, 'bfloat16 does not run here'),
        (
            {'gpu_problem': 'there is a GPU, and this torch is built for CPUs'},
            'torch is built for CPUs: install the torch',
        ),
        (
            {'device': 'cuda', 'gpus': [{**GPU, 'problem': 'this torch has no kernels for sm_120'}]},
            'G: this torch has no k',
        ),
        (
            {'device': 'cuda', 'gpus': [{**GPU, 'bf16': False}], 'convolution': {**SECONDS, 'float16': 0.001}},
            'float16: a wide convolution is 10.0 times as fast',
        ),
        ({'threads': 8}, '8 threads on 2 cores: set OMP_NUM_THREADS=2'),
        ({'shared_memory_free': 64 * 2**20}, '/dev/shm has 64.0 MiB free'),
    ],
)
def test_advice(changes, told):
    assert any(told in line for line in doctor.advice(facts(**changes)))


def test_a_gpu(gpu, monkeypatch):
    """What is said of a card; capability 9.0, as the fixture has it."""
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda index: (60 * 2**30, 80 * 2**30))
    for known, problem in ((['sm_90'], None), (['sm_80', 'sm_120'], 'this torch has no kernels for sm_90')):
        monkeypatch.setattr(torch.cuda, 'get_arch_list', lambda known=known: known)
        (row,) = doctor.gpus()
        assert (row['capability'], row['bf16'], row['tf32'], row.get('problem')) == ([9, 0], True, True, problem)
    assert doctor.gpu_problem() is None


def test_a_device_that_does_not_compute(capsys, monkeypatch):
    def broken(*words, **more):
        raise RuntimeError('CUDA error: no kernel image is available\nmore')

    monkeypatch.setattr(doctor.step_parts, 'fastest', broken)
    code, out, _ = run(capsys)
    assert code == 0 and 'The CPU does not compute: CUDA error: no kernel image is available' in out
    assert 'float32 CUDA error' in out


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.version, 'cuda', None)
    monkeypatch.setattr(doctor.shutil, 'which', lambda name: name)
    assert doctor.gpu_problem() == 'there is a GPU, and this torch is built for CPUs'
    monkeypatch.setattr(torch.version, 'cuda', '13.0')

    def old():
        raise RuntimeError('The NVIDIA driver on your system is too old\nPlease update')

    monkeypatch.setattr(torch.cuda, 'init', old)
    assert doctor.gpu_problem() == 'The NVIDIA driver on your system is too old'
