"""What users install, read and type: setup.py, constraints.txt, Makefile, .ci/run and README.md against the code."""

import ast
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import option_files
import pytest
import setuptools
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dckd_sr import option_keys, options, safe_yaml, test, zoo
from dckd_sr.archs.vqgan_arch import VQGAN
from dckd_sr.losses.distribution_loss import DistributionMappingLoss

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
MODULES = {'PIL': 'pillow', 'cv2': 'opencv-python', 'skimage': 'scikit-image', 'yaml': 'PyYAML'}  # module -> package
FORMER = {'python_version': '3.9', 'python_full_version': '3.9.18'}
CURRENT = {'python_version': '3.11', 'python_full_version': '3.11.7'}


@pytest.fixture(scope='module')
def setup_arguments():
    """The arguments that setup.py passes to setup()."""
    arguments, setup = {}, setuptools.setup
    setuptools.setup = lambda **given: arguments.update(given)
    try:
        exec(
            compile((ROOT / 'setup.py').read_text(encoding='utf-8'), ROOT / 'setup.py', 'exec'),
            {'__file__': ROOT / 'setup.py'},
        )
    finally:
        setuptools.setup = setup
    return arguments


def requirements(arguments, extras=('test', 'lint', 'report', 'onnx')):
    lines = arguments['install_requires'] + [line for extra in extras for line in arguments['extras_require'][extra]]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def pins(environment):
    """Package -> version that constraints.txt names for a Python version."""
    found = {}
    for line in (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines():
        line = line.partition('#')[0].strip()
        if line:
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(environment):
                (specifier,) = pin.specifier
                assert specifier.operator == '==' and canonicalize_name(pin.name) not in found, line
                found[canonicalize_name(pin.name)] = specifier.version
    return found


def lowest(requirement):
    return next((s.version for s in requirement.specifier if s.operator in ('>=', '==')), None)


@pytest.mark.parametrize('environment', [FORMER, CURRENT], ids=['former', 'current'])
def test_every_requirement_is_pinned_within_its_range(setup_arguments, environment):
    pinned = pins(environment)
    for name, requirement in requirements(setup_arguments).items():
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert name in pinned, f'{name} has no pin'
            assert requirement.specifier.contains(pinned[name]), f'{requirement} does not admit {pinned[name]}'


def test_the_lowest_torch_is_one_that_was_tested(setup_arguments):
    for name in ('torch', 'torchvision'):
        assert pins(FORMER)[name].startswith(lowest(requirements(setup_arguments)[name]))


def test_python_versions(setup_arguments):
    python = Requirement(f'python{setup_arguments["python_requires"]}').specifier
    assert python.contains('3.9.18') and python.contains('3.11.7') and python.contains('3.12.1')
    assert not python.contains('3.8.18') and not python.contains('3.13.0')
    assert Marker(
        f'python_version >= "{lowest(Requirement("python" + setup_arguments["python_requires"]))}"'
    ).evaluate()


def imported(folder):
    """Top-level names of the modules that the files of a folder import, anywhere in them."""
    names = set()
    for file in folder.rglob('*.py'):
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                names.update(alias.name.split('.')[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split('.')[0])
    return names


def test_every_imported_package_is_required(setup_arguments):
    standard = set(sys.stdlib_module_names) if sys.version_info >= (3, 10) else set(sys.builtin_module_names)
    if sys.version_info < (3, 10):
        pytest.skip('Python 3.9 cannot name its standard library')
    known = set(requirements(setup_arguments, extras=('report', 'onnx', 'heif')))
    used = {canonicalize_name(MODULES.get(name, name)) for name in imported(ROOT / 'dckd_sr') - standard - {'dckd_sr'}}
    assert used <= known | {'setuptools'}, used - known
    declared = {canonicalize_name(name) for name in known} - used - {'onnxscript'}  # torch.onnx imports that one
    assert not declared, f'declared, never imported: {declared}'


def test_packages_and_scripts(setup_arguments):
    folders = {str(f.parent.relative_to(ROOT)).replace(os.sep, '.') for f in (ROOT / 'dckd_sr').rglob('__init__.py')}
    assert set(setup_arguments['packages']) == folders
    for script in setup_arguments['entry_points']['console_scripts']:
        name, _, target = script.partition(' = ')
        module, _, function = target.partition(':')
        assert callable(getattr(importlib.import_module(module), function))
        assert name in {'dckd-train', 'dckd-test', 'dckd-doctor'}


def test_a_wheel_carries_option_files_and_the_demo(tmp_path):
    """The build step that a wheel is made of; a build for -e leaves them out."""
    for folder in ('options', 'experiments/pretrained_models/demo'):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / 'dckd_sr').mkdir()
    for name in ('setup.py', 'README.md', 'dckd_sr/__init__.py'):
        shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', 'built']
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    shipped = tmp_path / 'built' / 'dckd_sr' / 'shipped'
    found = {file.relative_to(shipped).as_posix() for file in shipped.rglob('*') if file.is_file()}
    wanted = [*(ROOT / 'options').rglob('*.yml'), *(ROOT / 'experiments/pretrained_models/demo').iterdir()]
    assert found == {file.relative_to(ROOT).as_posix() for file in wanted} and 'options/train_edsr_x4.yml' in found
    manifest = (ROOT / 'MANIFEST.in').read_text(encoding='utf-8')  # so that a source archive can build that wheel
    assert {line.split()[1] for line in manifest.splitlines()} == {'options', 'experiments/pretrained_models/demo'}


@pytest.mark.skipif(shutil.which('git') is None or not (ROOT / '.git').exists(), reason='not a git clone')
def test_tracked_files():
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split('\0') if name and (ROOT / name).exists()]
    assert len(files) > 20
    large = [str(file) for file in files if file.stat().st_size > 10e6]
    assert not large
    parts = [file.relative_to(ROOT).parts for file in files]
    assert not [file for file in parts if '__pycache__' in file or file[0] in ('.venv', 'results')]


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no executable bit')
def test_ci_runs_make_test():
    script = ROOT / '.ci' / 'run'
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding='utf-8')
    assert text.startswith('#!/usr/bin/env bash') and re.findall(r'\bmake +(\S+)', text) == ['test']


@pytest.mark.skipif(shutil.which('make') is None, reason='no make')
def test_make_targets_install_first(tmp_path):
    for name in ('Makefile', 'setup.py', 'constraints.txt'):
        shutil.copy(ROOT / name, tmp_path)
    for target, command in (('demo', '-m dckd_sr.demo'), ('test', '-m pytest'), ('lint', 'ruff check')):
        made = subprocess.run(['make', '-n', target], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        steps = ['-m venv .venv', ' torch torchvision', '--no-build-isolation --use-pep517 basicsr', '-e ', command]
        found = [made.find(step) for step in steps]
        assert -1 not in found and found == sorted(found), made
        assert f'make {target}' in README or target == 'lint'


def test_readme_names_what_is_there():
    named = set(re.findall(r'options/[\w/]+\.yml', README))
    assert {'options/train_edsr_x4.yml', 'options/test_edsr_x4.yml', 'options/train_vqgan.yml'} <= named
    links = {link.partition('#')[0] for link in re.findall(r'\]\(([^)]+)\)', README) if '://' not in link}
    commands = set(re.findall(r'dckd_sr/\w+\.py', README))
    assert links and commands
    for name in named | links | commands:
        assert (ROOT / name).is_file(), name
    for module in re.findall(r'-m (dckd_sr\.\w+)', README):
        assert importlib.util.find_spec(module), module


def test_readme_flags_exist():
    calls = re.findall(r'(?:dckd_sr/|dckd_sr\.|dckd-)(train|test)\b(?:\.py)?((?: +\[?-.*)+)$', README, flags=re.M)
    assert {name for name, _ in calls} == {'train', 'test'}
    for name, rest in calls:
        known = set((test.parser() if name == 'test' else options.parser())._option_string_actions)
        assert set(re.findall(r'(?<![\w-])--?[a-z]\w*', rest)) <= known, rest


def test_the_error_that_the_readme_shows():
    (line,) = [line.strip() for line in README.splitlines() if 'loss_wieght' in line]
    with pytest.raises(options.OptionError) as caught:
        options.load(ROOT / 'options/train_edsr_x4.yml', ['train:cl_opt:loss_wieght=0.1'])
    assert line in caught.value.problems


def block():
    """The README's example of an option file that gains our losses."""
    (text,) = re.findall(r'```yaml\n(.*?)```', README, flags=re.S)
    return safe_yaml.parse(text)


def plain_file():
    """A BasicSR file without any block of ours."""
    opt = option_files.dckd()
    opt['model_type'] = 'SRModel'
    opt = {key: value for key, value in opt.items() if key not in ('network_t', 'network_his', 'network_vqgan')}
    opt['path'] = {}
    known = set(option_keys.Train.model_fields)
    opt['train'] = {key: value for key, value in opt['train'].items() if key in known}
    return opt


def merged(opt, block):
    for key, value in block.items():
        opt[key] = merged(opt.get(key) or {}, value) if isinstance(value, dict) else value
    return opt


def test_readme_block_drops_into_a_file_of_basicsr(tmp_path):
    option_files.make_files(tmp_path)
    assert options.check(plain_file()) == ([], [])
    opt = merged(plain_file(), block())
    for file in opt['path'].values():
        (tmp_path / file).touch()
    problems, warnings = options.check(opt)
    assert not problems
    assert [warning for warning in warnings if 'runs as DCKDModel' in warning]


def test_readme_table_of_released_and_printed_forms_has_real_keys():
    rows = re.findall(r'^\| [^|]+ \| (`[^|]+`) \| ', README[README.index('| what | key |') :], flags=re.M)
    keys = [key for row in rows for key in re.findall(r'`([\w.]+)`', row)]
    assert {'ce_opt.form', 'network_vqgan.input_range', 'neg_clean', 'history_from', 'lcr_opt'} <= set(keys)
    fields = option_keys.DCKDTrain.model_fields
    for key in keys:
        head, _, tail = key.partition('.')
        if head == 'network_vqgan':
            assert tail in inspect.signature(VQGAN).parameters
        elif head == 'noisy':
            assert tail in option_keys.Noisy.model_fields
        else:
            assert head in fields, key
            assert head != 'ce_opt' or tail in inspect.signature(DistributionMappingLoss).parameters
    assert fields['num_neg'].default == 4 and fields['neg_clean'].default is True
    assert fields['history_from'].default == 'ema' and fields['step_period'].default == 100000
    assert inspect.signature(DistributionMappingLoss).parameters['form'].default == 'released'
    assert tuple(inspect.signature(VQGAN).parameters['input_range'].default) == (0, 1)


def test_the_convert_command_of_the_readme_is_understood(capsys):
    (arguments,) = re.findall(r'`python -m dckd_sr\.zoo (convert [^`]+)`', README)
    assert zoo.main(arguments.split()) == 2  # the file is not there; the arguments are right
    assert 'FILE is not there' in capsys.readouterr().err
