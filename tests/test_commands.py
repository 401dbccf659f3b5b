"""--help answers at once, with the text of the parser; everything else of the package starts as ever."""

import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dckd_sr
from dckd_sr import commands

PACKAGE = Path(dckd_sr.__file__).parent
PARSERS = {'train': commands.parser, 'test': commands.test_parser, 'doctor': commands.doctor_parser}


def run(words, folder):
    """stdout, and the modules that were imported."""
    environment = {**os.environ, 'PYTHONPATH': str(PACKAGE.parent), 'PYTHONPROFILEIMPORTTIME': '1', 'COLUMNS': '80'}
    result = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, {line.rpartition('|')[2].strip() for line in result.stderr.splitlines()}


@pytest.mark.parametrize('verb', PARSERS)
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
    assert 'torch' not in imported


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


# ---------------------------------------------------------------------------------------------------------------------
# -opt forgotten, or where none is


@pytest.mark.parametrize(
    ('command', 'arguments', 'hint'),
    [
        ('train', 'my.yml', '-opt my.yml'),
        ('train', 'my.yaml --auto_resume --force_yml a=1', '-opt my.yaml'),
        ('train', '--force_yml a=1 b=2 my.yml', '-opt my.yml'),
        ('train', 'train_edsr_x4', '-opt train_edsr_x4'),
        ('test', 'my.yml --with_teacher', '-opt my.yml'),
        ('compare', 'my.yml --seeds 1', '-opt my.yml'),
        ('prepare', 'teacher_cache my.yml', '-opt my.yml'),
        ('benchmark', 'step my.yml', '-opt my.yml'),
        ('doctor', 'my.yml', '-opt my.yml'),
        ('benchmark', 'my.yml', 'step -opt my.yml'),
        ('export', 'net.pth my.yml --to onnx', '-opt my.yml'),
        ('options', 'my.yml', 'show my.yml'),
        ('options', 'show -opt my.yml', 'my.yml, without -opt'),
        ('train', '', None),
        ('train', '-opt my.yml other.yml', None),
        ('prepare', 'check', None),
    ],
)
def test_an_option_file_out_of_place(command, arguments, hint, capsys):
    assert importlib.import_module(f'dckd_sr.{command}').main(arguments.split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert 'error: ' in last and re.findall(r'\(did you mean (.*)\?\)', last) == ([hint] if hint else [])


def test_words_with_a_line_break_stay_on_one_line(capsys):
    train = importlib.import_module('dckd_sr.train')
    assert train.main(['-opt', 'a.yml', 'two\nlines']) == 2
    assert capsys.readouterr().err.splitlines()[-1] == r'dckd-train: error: unrecognized arguments: two\nlines'


# ---------------------------------------------------------------------------------------------------------------------
# Outside the environment

_STARTS = "if __name__ == '__main__':"
COMMANDS = [file.stem for file in sorted(PACKAGE.glob('*.py')) if _STARTS in file.read_text(encoding='utf-8')]


def bare_python(folder, argv, hidden=('torch', 'torchvision', 'basicsr', 'cv2', 'yaml')):
    """stderr and exit code of a Python that does not find some packages."""
    (folder / 'sitecustomize.py').write_text(f'import sys\nsys.modules.update(dict.fromkeys({hidden!r}))\n')
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(folder), str(PACKAGE.parent)])}
    done = subprocess.run(
        [sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    return done.stderr, done.returncode


def test_every_command_is_one_of_these():
    assert {'train', 'test', 'compare', 'demo', 'export', 'options', 'prepare', 'report', 'upscale', 'zoo'} <= set(
        COMMANDS
    )


@pytest.mark.parametrize(
    'argv', [['-m', f'dckd_sr.{name}'] for name in COMMANDS] + [['train.py'], ['test.py', '-opt', 'x']]
)
def test_outside_the_environment(argv, tmp_path):
    if argv[0].endswith('.py'):
        argv = [str(PACKAGE / argv[0]), *argv[1:]]
    error, code = bare_python(tmp_path, argv)
    assert code == 2 and error.count('\n') == 1, error
    assert error.startswith(f'error: {sys.executable} does not have torch, torchvision, basicsr, cv2 and 1 more: ')


def test_the_package_itself(tmp_path):
    error, code = bare_python(tmp_path, ['-m', 'dckd_sr'])
    assert code == 2 and error.startswith('error: ') and error.count('\n') == 1


def test_one_package_is_missing(tmp_path):
    error, code = bare_python(tmp_path, ['-m', 'dckd_sr.zoo', 'list'], hidden=('pydantic',))
    assert code == 2 and re.fullmatch(rf'error: {re.escape(sys.executable)} does not have pydantic: .*\n', error)


def test_the_library_raises(tmp_path):
    error, code = bare_python(tmp_path, ['-c', 'import dckd_sr'])
    assert code == 1 and error.splitlines()[-1].startswith(('ImportError: ', 'ModuleNotFoundError: '))


def told(call, capsys):
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_libraries_that_do_not_load(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['dckd-train'])
    error = ImportError('libGL.so.1: cannot open shared object file: No such file or directory')
    text = told(lambda: commands.explain(error), capsys)
    assert text.startswith(f'error: {error}; OpenCV needs it: install libgl1, or ') and text.count('\n') == 1
    assert told(lambda: commands.explain(OSError('two\nlines')), capsys) == 'error: two lines\n'


def test_a_python_that_is_too_old(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'version_info', (3, 8, 10))
    commands.check_python()  # no command of ours
    monkeypatch.setattr(sys, 'argv', ['-m'])
    monkeypatch.delattr(sys, 'orig_argv', raising=False)
    text = told(commands.check_python, capsys)
    assert re.fullmatch(r'error: Python 3\.\d+ or newer is needed, and .* is older\n', text)


# ---------------------------------------------------------------------------------------------------------------------
# What only displays


@pytest.mark.parametrize('name', COMMANDS)
@pytest.mark.parametrize('columns', ['80', '20'])
def test_every_help_is_shown(name, columns, monkeypatch, capsys):
    monkeypatch.setenv('COLUMNS', columns)
    main = importlib.import_module(f'dckd_sr.{name}').main
    assert main(['--help']) == 0 and capsys.readouterr().out.startswith('usage: ')
    assert main(['no-such-command']) != 0 or name == 'demo'
    choices = re.search(r'invalid choice: .*\(choose from (.*?)\)', capsys.readouterr().err)
    for command in re.findall(r'[\w-]+', choices[1]) if choices and name != 'demo' else ():
        assert main([command, '--help']) == 0, command
        out, err = capsys.readouterr()
        assert out.startswith('usage: ') and err == ''


def test_letters_that_a_console_does_not_have(monkeypatch, tmp_path):
    console = io.TextIOWrapper(io.BytesIO(), encoding='cp1252')
    monkeypatch.setattr(sys, 'stdout', console)
    monkeypatch.chdir(tmp_path)
    Path('opt.yml').write_text('name: 日本語\n', encoding='utf-8')
    options = importlib.import_module('dckd_sr.options')
    assert options.main(['show', 'opt.yml']) == 2
    console.flush()
    assert b'\\u65e5' in console.buffer.getvalue()


@pytest.mark.parametrize('arguments', [['--imports', 'no.such'], ['--imports', ''], ['-o', 'none/x.json'], ['--what']])
def test_schema_of_mistakes(arguments, capsys):
    options = importlib.import_module('dckd_sr.options')
    code, (_, err) = options.main(['schema', *arguments]), capsys.readouterr()
    assert code == 2 and err.splitlines()[-1].count('error: ') == 1 and 'Traceback' not in err
