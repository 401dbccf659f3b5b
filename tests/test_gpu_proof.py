"""The proof of `doctor --gpu` where there is no GPU: its parts on the CPU and on fakes, and what they survive."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dckd_sr import benchmark, complexity, doctor, gpu_parts, gpu_proof, step_parts
from dckd_sr.errors import UserError
from dckd_sr.gpu_parts import METHODS, PARTS, Failed, Part, Place


@pytest.fixture
def cpu(tmp_path):
    return Place(torch.device('cpu'), True, tmp_path)


@pytest.fixture
def there(gpu, tmp_path, monkeypatch):
    """A place on the GPU that is not there; whether waits are forbidden is noted."""
    modes = ['default']
    monkeypatch.setattr(torch.cuda, 'get_sync_debug_mode', lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', modes.append)
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: tensor)  # fakes cannot be
    place = Place(torch.device('cuda'), True, tmp_path)
    yield place, modes


def holds(name, place):
    """The figures of a part that holds here."""
    row = gpu_proof.run_part(name, place)
    assert row['ok'], row['traceback']
    assert json.loads(json.dumps(row)) and row['title'] in gpu_proof.line(row)
    return row['figures']


# ---------------------------------------------------------------------------------------------------------------------
# Parts


@pytest.mark.parametrize('name', ['agree-edsr', 'method-1', 'mode-all-modes'])
def test_steps_on_the_cpu(name, cpu):
    holds(name, cpu)


@pytest.mark.parametrize('name', ['overflow-float32', 'overflow-accumulated', 'overflow-sgd'])
def test_overflow_on_the_cpu(name, cpu):
    assert holds(name, cpu)['bit-equal'] > 50


def test_a_killed_training_on_the_cpu(cpu):
    assert holds('killed', cpu) == {'weights': 'bit-equal'}


def test_a_state_of_basicsr_on_the_cpu(cpu):
    assert holds('state-basicsr', cpu)['finite'] > 20


def test_speed_on_the_cpu(cpu, monkeypatch):
    monkeypatch.setattr(benchmark, '_SLICE', 0)
    monkeypatch.setattr(step_parts, 'peaks', lambda run: {'float32': 1e11, 'copy': 1e10})
    figures = holds('speed-float32', cpu)
    assert figures['ms'] > 0 and figures['ratio'] > 0 and figures['peak_gb'] > 0 and figures['times_floor'] > 0
    assert figures['details']['command'] == 'step'


def test_inference_on_the_cpu(cpu, monkeypatch):
    monkeypatch.setattr(complexity, 'paper_shape', lambda scale, channels: (1, channels, 16, 24))
    figures = holds('infer-bf16', cpu)
    assert figures['student_ms'] > 0 and figures['teacher_peak_gb'] > 0


@pytest.mark.parametrize('backend', ['eager', None])
def test_compilation(backend, cpu, monkeypatch):
    """Without the minutes that compiling takes."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda net, **_: compile_(net, backend=backend) if backend else net)
    row = gpu_proof.run_part('compile-default', cpu)
    assert row['ok'] == bool(backend), row.get('traceback')
    if backend:
        assert row['figures']['compiled'] >= 4 and row['figures']['as'] == 'default'
    else:
        assert row['reason'] == 'nothing was compiled'


def test_what_does_not_compile_fails(cpu, monkeypatch):
    def compile_(net, **arguments):
        def compiled(*inputs, **more):
            raise RuntimeError('no Triton here')

        return compiled

    monkeypatch.setattr(torch, 'compile', compile_)
    row = gpu_proof.run_part('compile-default', cpu)
    assert not row['ok'] and 'cannot be compiled' in row['reason'] and 'no Triton here' in row['reason']


SOME = ('shares and logged gradients, fp16', 'clipped, accumulated, negatives in parts, fp16')


@pytest.mark.parametrize('name', SOME)
def test_methods_on_fakes(name, there):
    """Every line that a card would run, but for kernels and values; other tests look for waits of the host."""
    place, modes = there
    figures = gpu_parts.method(place, *METHODS[name])
    assert figures['losses'] > 1 and modes == ['default', 'error', 'default']


def test_the_other_steps_on_fakes(there):
    place, _ = there
    # Every number that fakes give is 1: a difference of gradients, too, and that a step was finite.
    for name, told in (
        ('agree-edsr', 'l_pix differs by 0.0e.00, the gradient by 1.0e'),
        ('mode-all-modes', 'l_pix differs by 0.0e.00, the gradient by 1.0e'),
        ('overflow-accumulated', 'says that its gradient was finite'),
    ):
        with pytest.raises(Failed, match=told):
            PARTS[name].run(place)
    gpu_parts.clean(place.device)


def test_waits_are_forbidden_inside_alone(there):
    place, modes = there
    with pytest.raises(ZeroDivisionError), gpu_parts.no_waits(place.device):
        assert modes[-1] == 'error'
        1 / 0  # noqa: B018
    assert modes[-1] == 'default'


def test_numbers_that_are_not_those_of_the_cpu():
    losses, gradient = {'l_pix': 1.0, 'l_cl': 2.0}, torch.ones(4)
    theirs, bounds = (losses, gradient), (1e-4, 1e-2)
    assert gpu_parts.differences(theirs, theirs, bounds) == {'losses': 0, 'gradient': 0}
    for other, told in (
        (({**losses, 'l_cl': 2.001}, gradient), 'l_cl differs by 5.0e-04, the gradient by 0.0e'),
        ((losses, gradient * 1.02), 'the gradient by 2.0e-02'),
        ((losses, gradient * float('nan')), 'the gradient by nan'),
        (({'l_pix': 1.0}, gradient), 'losses l_pix instead of l_pix, l_cl'),
    ):
        with pytest.raises(Failed, match=told):
            gpu_parts.differences(other, theirs, bounds)


def test_a_method_that_is_not_finite(cpu, monkeypatch):
    original = gpu_parts.build

    def build(*words):
        opt, model, batch = original(*words)
        batch['gt'].fill_(float('nan'))
        return opt, model, batch

    monkeypatch.setattr(gpu_parts, 'build', build)
    row = gpu_proof.run_part('method-2', cpu)
    assert not row['ok'] and row['reason'].startswith('l_pix = nan')


def test_weights_that_an_overflow_moves(cpu, monkeypatch):
    monkeypatch.setattr(torch, 'isfinite', lambda value: torch.ones_like(value, dtype=torch.bool))
    row = gpu_proof.run_part('overflow-float32', cpu)
    assert not row['ok'] and 'tensors changed, such as net_g.' in row['reason']


def test_a_training_that_fails_is_told(cpu, monkeypatch):
    monkeypatch.setattr(gpu_parts, '_run_file', lambda *words: 'none.yml')
    row = gpu_proof.run_part('state-from-cpu', cpu)
    assert row['reason'].startswith('the training ended with 2: error: -opt none.yml: no such file')


# ---------------------------------------------------------------------------------------------------------------------
# Processes

WORKER = """
import json, os, signal, sys, time
results, *names = sys.argv[1:]
for name in names:
    if name == 'hangs':
        print('busy', flush=True)
        time.sleep(60)
    if name == 'crashes':
        print('an illegal memory access', flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if name == 'exits':
        sys.exit(3)
    with open(results, 'a') as file:
        row = {'name': name, 'title': name, 'ok': name != 'poisons', 'seconds': 0.1, 'figures': {}, 'reason': 'bad'}
        file.write(json.dumps(row) + '\\n')
    if name == 'poisons':
        os._exit(75)
"""


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Set the parts, whose processes run the script above; gives the commands that were started."""
    started, original = [], subprocess.Popen
    (tmp_path / 'worker.py').write_text(WORKER)

    def popen(command, **options):
        started.append(command)
        results, names = command[command.index('--worker') + 1], command[command.index('--only') + 1 :]
        return original([sys.executable, str(tmp_path / 'worker.py'), results, *names], **options)

    monkeypatch.setattr(gpu_proof.subprocess, 'Popen', popen)
    monkeypatch.setattr(gpu_proof, 'START', 5)
    monkeypatch.setattr(gpu_proof, 'SLOWER', 1)

    def these(**groups):
        table = {name: Part(name, None, 1, group) for name, group in groups.items()}
        monkeypatch.setattr(gpu_proof, 'PARTS', table)
        return started

    return these


def told(rows):
    return {row['name']: row.get('reason') if not row['ok'] else True for row in rows}


def test_parts_of_a_group_share_a_process(parts):
    started, lines = parts(a='x', b='x', c='y'), []
    assert told(gpu_proof.prove('cpu', True, tell=lines.append)) == {'a': True, 'b': True, 'c': True}
    assert [command[-2:] for command in started] == [['a', 'b'], ['--only', 'c']]
    assert [line.split()[:2] for line in lines] == [['ok', 'a'], ['ok', 'b'], ['ok', 'c']]


@pytest.mark.parametrize(
    ('bad', 'why'),
    [
        ('crashes', 'its process ended by SIGKILL: an illegal memory access'),
        ('exits', 'its process ended with 3: it said nothing'),
        ('poisons', 'bad'),
        ('hangs', 'no answer within 1 s'),
    ],
)
def test_a_bad_part_costs_its_process_and_no_other_part(bad, why, parts):
    started = parts(a='x', **{bad: 'x'}, c='x')
    rows = gpu_proof.prove('cpu', True, tell=lambda line: None)
    assert told(rows) == {'a': True, bad: why, 'c': True}
    assert len(started) == 2 and started[1][-1] == 'c'


def test_when_the_time_is_over(parts, monkeypatch):
    parts(a='x', hangs='y', c='z')
    monkeypatch.setattr(gpu_proof, 'TOTAL', 1.5)
    rows = gpu_proof.prove('cuda', tell=lambda line: None)
    assert told(rows)['a'] is True and 'the 1.5 s are over' in told(rows)['c']


def test_its_processes_end_with_it(parts, monkeypatch):
    parts(a='x', hangs='x')
    ended, end = [], gpu_proof._end
    monkeypatch.setattr(gpu_proof, '_end', lambda process: ended.append((end(process), process.returncode)))
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        gpu_proof.prove('cpu', True, tell=lambda line: os.kill(os.getpid(), signal.SIGTERM))
    assert stop.value.code == 143 and ended == [(None, -signal.SIGKILL)]
    assert signal.getsignal(signal.SIGTERM) == former


def test_inside_of_a_process(monkeypatch, tmp_path):
    def fails(place):
        raise RuntimeError('two\nlines')

    table = {name: Part(name, run, 1, 'x') for name, run in (('a', lambda place: {'ms': 1.5}), ('b', fails))}
    monkeypatch.setattr(gpu_proof, 'PARTS', table)
    assert gpu_proof.work(['a', 'b'], 'cpu', True, str(tmp_path / 'rows')) == 0
    first, second = map(json.loads, (tmp_path / 'rows').read_text().splitlines())
    assert first['ok'] and first['figures'] == {'ms': 1.5}
    assert not second['ok'] and second['reason'].startswith('two') and 'RuntimeError: two' in second['traceback']
    page = gpu_proof.table([second, first], 'cuda', False)
    assert '1 of 2 parts hold on cuda, in ' in page and 'ms 1.5' in page
    assert page.splitlines()[-2].startswith('  FAILED  b') and page.endswith('--gpu --only b')

    # Where the GPU answers no more, the process ends after it has said so.
    def dead(device):
        raise RuntimeError('CUDA error: an illegal memory access was encountered')

    monkeypatch.setattr(gpu_parts, 'clean', dead)
    codes = []
    monkeypatch.setattr(gpu_proof.os, '_exit', lambda code: codes.append(code) or sys.exit(code))
    with pytest.raises(SystemExit):
        gpu_proof.work(
            ['b'],
            'cpu',
            True,
            str(tmp_path / 'more' / 'rows') if (tmp_path / 'more').mkdir() else str(tmp_path / 'more/rows'),
        )
    assert codes == [gpu_proof._POISONED]


def test_the_time_of_all_parts():
    """What is likely to be needed fits; what hangs is given up."""
    assert gpu_proof.TOTAL < 8 * 60
    assert all(part.seconds <= 180 for part in PARTS.values())
    assert list(PARTS)[-1] == 'speed-compiled'  # what takes longest comes last
    with pytest.raises(dataclasses.FrozenInstanceError):
        PARTS['killed'].seconds = 1


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command(monkeypatch, capsys):
    """Two parts in a real process."""
    assert doctor.main('--gpu --device cpu --only method-2 overflow-sgd --json proof.json'.split()) == 0
    out, err = capsys.readouterr()
    assert '2 of 2 parts hold on cpu, at reduced size' in out and err.count('ok  ') == 2
    rows = json.loads(Path('proof.json').read_text())['proof']
    assert [row['name'] for row in rows] == ['method-2', 'overflow-sgd'] and all(row['ok'] for row in rows)


def test_a_part_that_fails_is_an_exit_code(monkeypatch, capsys):
    row = {'name': 'killed', 'title': 'x', 'ok': False, 'seconds': 1.0, 'figures': {}, 'reason': 'no'}
    monkeypatch.setattr(gpu_proof, 'prove', lambda *words: [row])
    monkeypatch.setattr(doctor, 'convolution', lambda device: {'float32': 1.0, 'bfloat16': 1.0, 'float16': 1.0})
    assert doctor.main(['--gpu', '--device', 'cpu']) == 1
    assert 'FAILED  x ' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('words', 'error'),
    [
        ('--device cpu', '--device is of the proof: --gpu is missing'),
        ('--only killed', '--only is of the proof: --gpu is missing'),
        ('--small', '--small is of the proof: --gpu is missing'),
        ('--gpu --device cpu --only kiled', "--only kiled: no such part (did you mean 'killed'?); known: agree-edsr, "),
        ('--gpu', '--gpu: there is none here; --device cpu tries the proof itself, at reduced size'),
    ],
)
def test_mistakes(words, error, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(doctor, 'gpu_problem', lambda: None)
    assert doctor.main(words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith(f'error: {error}') and err.count('\n') == 1


def test_names():
    assert gpu_proof.names_of(None) == list(PARTS)
    assert gpu_proof.names_of(['method-2']) == ['method-2']
    assert gpu_proof.names_of(['speed', 'agree-edsr']) == [
        'agree-edsr',
        *(name for name in PARTS if name.startswith('speed')),
    ]
    with pytest.raises(UserError, match='no such part'):
        gpu_proof.names_of(['x'])
