"""--help answers at once, with the text of the parser; everything else of the package starts as ever."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dckd_sr
from dckd_sr import commands

PACKAGE = Path(dckd_sr.__file__).parent
PARSERS = {'train': commands.parser, 'test': commands.test_parser}


def run(words, folder):
    """stdout, and the modules that were imported."""
    environment = {**os.environ, 'PYTHONPATH': str(PACKAGE.parent), 'PYTHONPROFILEIMPORTTIME': '1', 'COLUMNS': '80'}
    result = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, {line.rpartition('|')[2].strip() for line in result.stderr.splitlines()}


@pytest.mark.parametrize('verb', ['train', 'test'])
@pytest.mark.parametrize('start', ['script', 'module', 'file'])
def test_help_loads_nothing(verb, start, tmp_path, monkeypatch):
    if start == 'module' and sys.version_info < (3, 10):
        pytest.skip('Python 3.9 does not say which module -m looks for')
    script = tmp_path / f'dckd-{verb}'
    script.write_text(f'import sys\nfrom dckd_sr.{verb} import main\nsys.exit(main())\n')
    words = {'script': [script], 'module': ['-m', f'dckd_sr.{verb}'], 'file': [PACKAGE / f'{verb}.py']}[start]
    stdout, imported = run([*words, '-opt', 'x.yml', '--help'], tmp_path)
    monkeypatch.setenv('COLUMNS', '80')
    assert stdout == PARSERS[verb]().format_help()
    assert not {'basicsr', 'torchvision', 'dckd_sr.options'} & imported
    assert start == 'file' or 'torch' not in imported


@pytest.mark.parametrize(
    'argv, original',
    [
        (['dckd-train', '-opt', 'x.yml'], []),
        (['/elsewhere/train.py', '--help'], []),
        (['dckd-other', '--help'], []),
        (['-m', '--help'], ['python', '-m', 'dckd_sr.prepare', '--help']),
        (['-m', '--help'], ['python', '-m', 'other.train', '--help']),
        (['-m', '--help'], []),
        ([''], ['python']),
        ([], []),
    ],
)
def test_other_processes_go_on(argv, original, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', argv)
    monkeypatch.setattr(sys, 'orig_argv', original, raising=False)
    commands.answer_help()
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('program', ['/somewhere/bin/dckd-test', 'C:\\dckd-test.exe', str(PACKAGE / 'test.py')])
def test_our_programs_answer(program, monkeypatch, capsys):
    if '\\' in program and os.name != 'nt':
        program = program.rpartition('\\')[2]
    monkeypatch.setattr(sys, 'argv', [program, '-h'])
    with pytest.raises(SystemExit) as stop:
        commands.answer_help()
    assert stop.value.code == 0 and '--with_teacher' in capsys.readouterr().out
