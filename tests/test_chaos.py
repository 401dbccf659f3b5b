"""A run that is killed and damaged ends as the one that was not; and a difference would be seen."""

import random
import re
import subprocess
import sys
from pathlib import Path

import chaos
import pytest
import torch
from small_run import dckd_run, write

from dckd_sr import option_keys, options, train

ROOT = Path(__file__).resolve().parents[1]


def test_two_kills():
    command = [sys.executable, '-m', 'tests.chaos', '--kills', '2', '--seed', '2']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    hashes = re.findall(r'^(?:un)?disturbed +([0-9a-f]{64})$', result.stdout, flags=re.M)
    assert len(hashes) == 2 and hashes[0] == hashes[1]
    assert re.search(r'^corruptions: .* 1', result.stdout, flags=re.M) and 'equal after' in result.stdout


@pytest.fixture
def runs(tmp_path):
    """Two equal runs."""
    opt = dckd_run(tmp_path)
    opt['train']['total_iter'] = 4  # its state has the best metrics of the validation at 2
    for opt['name'] in ('undisturbed', 'disturbed'):
        assert train.main(['-opt', write(opt)]) == 0
    return tmp_path


# What differs: the file, and the way to a tensor or a block of numbers in it.
PLACES = [
    ('models/net_g_4.pth', 'params'),
    ('models/net_g_4.pth', 'params_ema'),
    ('training_states/4.state', 'dckd_sr.extra.net_his'),
    ('training_states/4.state', 'dckd_sr.best_metric_results.Set.psnr'),
    ('training_states/4.state', 'dckd_sr.generators.0'),
    ('training_states/4.state', 'optimizers.0.state.0'),
    ('training_states/4.state', 'schedulers.0'),
]


@pytest.mark.parametrize('name, place', PLACES)
def test_a_difference_is_found(runs, name, place, capsys):
    assert chaos.compare(runs, 4)
    file = runs / 'experiments' / 'disturbed' / name
    content = torch.load(file, weights_only=True)
    block = content
    for key in place.split('.'):
        block = block[int(key) if key.isdigit() else key]
    key = next(key for key, value in block.items() if isinstance(value, (torch.Tensor, float, int)))
    if isinstance(block[key], torch.Tensor):
        values = block[key].view(-1)
        values[0] = values[0] + 1 if values.dtype == torch.uint8 else torch.nextafter(values[0], torch.tensor(9.0))
    else:
        block[key] += 1
    torch.save(content, file)
    assert not chaos.compare(runs, 4)
    part = 'state' if file.suffix == '.state' else 'nets.net_g_4'
    assert f'differs: {part}.{place}.{key}\n' in capsys.readouterr().out


def test_a_loss_that_was_logged_twice_differently_is_found(runs, capsys):
    log = next((runs / 'experiments' / 'disturbed').glob('train_*.log'))
    (line,) = re.findall(r'.*iter: +1, .*', log.read_text())
    log.with_name('train_again.log').write_text(f'{line}\n')
    assert chaos.compare(runs, 4)
    log.with_name('train_again.log').write_text(f'{line}1\n')
    assert not chaos.compare(runs, 4)
    assert 'differs: logged.1' in capsys.readouterr().out


@pytest.mark.parametrize('way', chaos.DAMAGES)
def test_damages(way):
    data = bytes(range(1, 200))
    spoiled = chaos.DAMAGES[way](data, random.Random(0))
    assert spoiled != data
    assert way != 'bit flipped' or sum(bin(a ^ b).count('1') for a, b in zip(spoiled, data)) == 1


def test_every_kind_gets_its_turn():
    assert sorted(chaos.dealt(['a', 'b'], 4, random.Random(0))) == ['a', 'a', 'b', 'b']


def test_the_page_shows_what_is_there():
    text = (ROOT / 'docs' / 'reliability.md').read_text(encoding='utf-8')
    lines = [line for line in text.splitlines() if 'dckd_sr/train.py' in line]
    assert len(lines) == 3
    for line in lines:
        arguments = line.partition('dckd_sr/train.py')[2].partition('||')[0].split()
        args = options.parser().parse_args(arguments)
        assert args.auto_resume and args.launcher in ('pytorch', 'slurm') and (ROOT / args.opt).is_file()
    named = re.findall(r'`(logger|train)\.(?!py)(\w+)', text)
    assert len(named) > 3
    for section, key in named:
        assert key in {'logger': option_keys.Logger, 'train': option_keys.Train}[section].model_fields, key
    assert len(hashes := re.findall(r'`[0-9a-f]{16}`', text)) == 4 and hashes[:2] == hashes[2:]
