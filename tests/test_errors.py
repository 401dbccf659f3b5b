"""docs/errors.md is true: every mistake in it is made here, and answered as it says."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mistakes import MISTAKES, WORKS, Run

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / 'docs' / 'errors.md').read_text(encoding='utf-8')
AS_PROCESSES = (
    'an option file that is not there',
    'a key that is set twice',
    '`total_iter: 0`',
    'LQ of another size than GT needs',
    'a truncated PNG',
    'a truncated LMDB',
    'truncated weights',
    'a pickle with code as weights',
    'a GPU that is not there',
    'a file where training writes its folder',
)


def rows(document, columns):
    """The rows of the tables with so many columns."""
    lines = [line.strip().strip('|') for line in document.splitlines() if line.startswith('|')]
    cells = [[cell.strip() for cell in re.split(r'(?<!\\)\|', line)] for line in lines]
    titles = [row for row, below in zip(cells, cells[1:]) if set(below[0]) == {'-'}]
    return [row for row in cells if len(row) == columns and set(row[0]) != {'-'} and row not in titles]


TABLE = {name: (message.strip('` '), int(code)) for name, message, code in rows(DOCUMENT, 3)}
ODD = [name for name, _ in rows(DOCUMENT, 2)]


def check(name, code, text):
    """One line of error, as the table has it ('...' stands for anything), and no traceback."""
    message, expected = TABLE[name]
    pattern = '.*'.join(re.escape(part) for part in message.split('...'))
    lines = [match.group(1) for match in re.finditer(r'^(?:dckd-\w+: )?error: (.*(?:\n .*)*)', text, re.M)]
    assert (len(lines), code) == (1, expected), text
    assert re.fullmatch(pattern, lines[0]), f'{name}: {lines[0]}'
    assert 'Traceback' not in text and not Path('HACKED').exists()


def test_the_table_and_the_mistakes_are_the_same():
    assert list(TABLE) and sorted(TABLE) == sorted(MISTAKES) and sorted(ODD) == sorted(WORKS)
    assert len(TABLE) == len(rows(DOCUMENT, 3)) >= 60 and len(ODD) == len(set(ODD))
    assert set(AS_PROCESSES) <= set(TABLE) and len(AS_PROCESSES) == 10


TEN = DOCUMENT[DOCUMENT.index('## The ten') : DOCUMENT.index('## All mistakes')]
# Messages among the ten commonest that no mistake of the tables gives; tests of their own make them.
ELSEWHERE = (
    '... does not have torch, torchvision, ',
    'the package `basicsr` found at ',
    'iteration 1: CUDA out of memory',
)
ELSEWHERE += (
    '... not enough GPU memory; set val.tile_size, ',
    '--launcher pytorch: 4 processes on ... have the same GPU',
)


def test_the_ten_commonest_are_ten_and_say_what_is_said():
    parts = re.split(r'^### (\d+)\. ', TEN, flags=re.M)[1:]
    assert parts[::2] == [str(number) for number in range(1, 11)]
    known = {message for message, _ in TABLE.values()}
    for part in parts[1::2]:
        quoted = re.findall(r'^ {4}error: (.*)$', part, flags=re.M)
        assert quoted and part.strip().endswith('.'), part
        assert all(line in known or line.startswith(ELSEWHERE) for line in quoted), quoted


@pytest.mark.parametrize('line', re.findall(r'`(python -m dckd_sr\.[^`]*)`', TEN))
def test_commands_among_the_ten_are_understood(line, capsys):
    _, _, module, *words = shlex.split(line)
    assert importlib.import_module(module).main([*words, '--help']) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words if word.startswith('--'))


@pytest.mark.parametrize('name', TABLE)
def test_a_mistake_is_answered_in_one_line(name, monkeypatch, capsys):
    run = Run(monkeypatch)
    run.prepare(MISTAKES[name])
    code = run.start()
    check(name, code, capsys.readouterr().err)


@pytest.mark.parametrize('name', ODD)
def test_what_looks_odd_works(name):
    run = Run()
    run.prepare(WORKS[name])
    assert run.start() == 0


def test_mistakes_in_real_processes(tmp_path, monkeypatch):
    commands = {}
    for index, name in enumerate(AS_PROCESSES):
        folder = tmp_path / str(index)
        folder.mkdir()
        monkeypatch.chdir(folder)
        run = Run()
        run.prepare(MISTAKES[name])
        commands[name] = folder, [sys.executable, '-m', f'dckd_sr.{run.command}', *run.arguments]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}

    def start(name):
        folder, command = commands[name]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        for name, done in zip(commands, pool.map(start, commands)):
            monkeypatch.chdir(commands[name][0])
            check(name, done.returncode, done.stderr)


def test_a_reader_that_has_gone_is_no_error():
    for unbuffered in ('', '1'):  # told while printing, or at the end
        command = [sys.executable, '-m', 'dckd_sr.zoo', 'list']
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, 'PYTHONUNBUFFERED': unbuffered},
        )
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, b'')
        process.stderr.close()
