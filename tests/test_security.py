"""No file that a user may have from somebody else runs code: options, weights, training states, image databases."""

import ast
import fnmatch
import os
import pickle
import shutil
import warnings
from pathlib import Path

import cv2
import lmdb
import pytest
import torch
from basicsr.archs import build_network
from small_run import dckd_run, edsr, write

from dckd_sr import test, train, zoo

ROOT = Path(__file__).resolve().parents[1]
CANARY = Path('CANARY')

# ---------------------------------------------------------------------------------------------------------------------
# What the package does not call

BUILTIN = {'eval', 'exec', 'compile', '__import__'}
FORBIDDEN = (
    *(
        'builtins.*',
        'pickle*',
        '_pickle*',
        'marshal*',
        'shelve*',
        'dill*',
        'cloudpickle*',
        'joblib*',
        'runpy*',
        'code*',
    ),
    *('torch.load', 'torch.jit.load', 'torch.hub*', 'torch.package*', 'torch.utils.model_zoo*', 'torch.utils.cpp_ext*'),
    *(
        'torch.distributed.*object*',
        'torch.distributed.rpc*',
        'numpy.load',
        'yaml.*oad*',
        'importlib*',
        'ctypes*',
        'pty*',
    ),
    *(
        'os.system',
        'os.popen*',
        'os.exec*',
        'os.spawn*',
        'os.posix_spawn*',
        'subprocess*',
        'asyncio.create_subprocess*',
    ),
    *('shutil.unpack_archive', 'tarfile.*.extractall', 'urllib.request.urlretrieve', 'pandas*'),
)
HARMLESS = {
    *('yaml.SafeLoader', 'subprocess', 'importlib', 'importlib.util', 'pickletools', 'pickletools.genops'),
    *('torch.hub', 'torch.hub.get_dir'),
}
# (file, name) -> why it is there all the same
EXCEPTIONS = {
    ('imports.py', 'importlib.import_module'): '`imports` names modules to be run, as `python -m` does',
    ('imports.py', 'importlib.util.find_spec'): 'looks for them and runs nothing',
    ('imports.py', 'importlib.util.spec_from_file_location'): '`imports` names files to be run, as `python FILE` does',
    ('imports.py', 'importlib.util.module_from_spec'): 'the same',
    ('imports.py', 'importlib.machinery.PathFinder'): 'where those files lie, for what they import in turn',
    ('imports.py', 'importlib.machinery.PathFinder.find_spec'): 'the same',
    ('archs/__init__.py', 'importlib.import_module'): 'the modules of this package',
    ('data/__init__.py', 'importlib.import_module'): 'the modules of this package',
    ('losses/__init__.py', 'importlib.import_module'): 'the modules of this package',
    ('models/__init__.py', 'importlib.import_module'): 'the modules of this package',
    ('compat.py', 'importlib.import_module'): "BasicSR's and torchvision's modules, by fixed names",
    ('commands.py', 'importlib.util.find_spec'): 'looks for what is not installed, by fixed names, and runs nothing',
    ('compat.py', 'importlib.util.find_spec'): 'looks for BasicSR and runs nothing',
    ('export.py', 'importlib.util.find_spec'): 'looks for onnx and runs nothing',
    ('processes.py', 'subprocess.run'): "SLURM's scontrol: a list of words, no shell",
    ('processes.py', 'ctypes'): 'mallopt of the C library that this process has loaded',
    ('processes.py', 'ctypes.CDLL'): 'the same',
    ('compare.py', 'subprocess.run'): 'this Python with -m dckd_sr.train: a list of words, no shell',
    ('compare.py', 'subprocess.STDOUT'): 'the same',
    (
        'model_files.py',
        'subprocess.run',
    ): 'this Python with a fixed text, which runs an ONNX model: words, no shell',
    ('model_files.py', 'subprocess.PIPE'): 'the same',
    ('model_files.py', 'subprocess.DEVNULL'): 'the same',
    ('model_files.py', 'torch.jit.load'): 'a TorchScript file, which is a program, that the user has named as model',
    ('processes.py', 'torch.distributed.broadcast_object_list'): "pickles, between one run's own ranks",
    ('checkpoint.py', 'torch.distributed.all_gather_object'): "pickles, between one run's own ranks",
    ('evaluation.py', 'torch.distributed.all_gather_object'): "pickles, between one run's own ranks",
    ('processes.py', 'torch.distributed.all_gather_object'): "pickles, between one run's own ranks",
    ('doctor.py', 'importlib.metadata'): 'versions of packages, by fixed names',
    ('doctor.py', 'importlib.metadata.version'): 'the same',
    ('doctor.py', 'importlib.util.find_spec'): 'looks for wandb and tensorboard and runs nothing',
    ('fake_gpu.py', 'subprocess.run'): "the compiler on this package's own fake_gpu.cpp: a list of words, no shell",
    ('fake_gpu.py', 'ctypes'): 'the library that this made, in a folder of its own',
    ('fake_gpu.py', 'ctypes.CDLL'): 'the same',
    ('gpu_proof.py', 'subprocess.Popen'): 'this Python with -m dckd_sr.doctor: a list of words, no shell',
    ('gpu_proof.py', 'subprocess.DEVNULL'): 'the same',
    ('gpu_proof.py', 'subprocess.STDOUT'): 'the same',
    ('gpu_parts.py', 'subprocess.run'): 'this Python with -m dckd_sr.train or torchrun: a list of words, no shell',
    ('gpu_parts.py', 'subprocess.Popen'): 'the same',
    ('gpu_parts.py', 'subprocess.PIPE'): 'the same',
    ('gpu_parts.py', 'subprocess.DEVNULL'): 'the same',
    ('gpu_parts.py', 'subprocess.STDOUT'): 'the same',
}


def dangers(source):
    """What a module's text imports or refers to that can run what a file holds, unless it is called safely."""
    tree, names, safe = ast.parse(source), {name: name for name in BUILTIN}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition('.')[0]] = (
                    alias.name if alias.asname else alias.name.partition('.')[0]
                )
        elif isinstance(node, ast.ImportFrom):
            names.update({alias.asname or alias.name: f'{node.module}.{alias.name}' for alias in node.names})

    def full_name(node):
        if isinstance(node, ast.Name):
            return names.get(node.id)
        base = full_name(node.value) if isinstance(node, ast.Attribute) else None
        return base and f'{base}.{node.attr}'

    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            passed = {keyword.arg: getattr(keyword.value, 'value', keyword.value) for keyword in node.keywords}
            name = full_name(node.func)
            if name == 'torch.load' and passed.get('weights_only') is True:
                safe.add(node.func)
            if name == 'numpy.load' and passed.get('allow_pickle', False) is False:
                safe.add(node.func)
    found = {
        full_name(node) for node in ast.walk(tree) if isinstance(node, (ast.Name, ast.Attribute)) and node not in safe
    }
    found |= {name for name in names.values() if name not in BUILTIN} - {None}  # imported, though never named again
    return {
        name
        for name in found - {None} - HARMLESS
        if name in BUILTIN or any(fnmatch.fnmatchcase(name, pattern) for pattern in FORBIDDEN)
    }


@pytest.mark.parametrize(
    'text, name',
    [
        ('x = eval("1")', 'eval'),
        ('f = exec', 'exec'),
        ('import pickle', 'pickle'),
        ('import pickle as p\np.loads(b"")', 'pickle.loads'),
        ('from pickle import Unpickler as U', 'pickle.Unpickler'),
        ('import torch\ntorch.load("x")', 'torch.load'),
        ('import torch\ntorch.load("x", weights_only=False)', 'torch.load'),
        ('import torch\nload = torch.load', 'torch.load'),
        ('from torch import load', 'torch.load'),
        ('import torch as t\nt.hub.load_state_dict_from_url("u")', 'torch.hub.load_state_dict_from_url'),
        ('import numpy as np\nnp.load("x", allow_pickle=True)', 'numpy.load'),
        ('import numpy as np\nnp.load("x", allow_pickle=maybe)', 'numpy.load'),
        ('import yaml\nyaml.load(text, yaml.Loader)', 'yaml.load'),
        ('import yaml\nyaml.unsafe_load(text)', 'yaml.unsafe_load'),
        ('from yaml import full_load', 'yaml.full_load'),
        ('import os\nos.system("x")', 'os.system'),
        ('import subprocess\nsubprocess.getoutput("x")', 'subprocess.getoutput'),
        ('import importlib\nimportlib.import_module(name)', 'importlib.import_module'),
    ],
)
def test_the_search_finds(text, name):
    assert name in dangers(text)


def test_the_search_lets_pass():
    text = 'import re, torch, numpy as np\nre.compile("x")\nnet.eval()\ncode.append(1)\n'
    assert dangers(text + 'torch.load("x", weights_only=True)\nnp.load("x")\nnp.load("x", allow_pickle=False)') == set()


def test_nothing_in_the_package_runs_what_a_file_holds():
    package = ROOT / 'dckd_sr'
    found = {
        (file.relative_to(package).as_posix(), name)
        for file in package.rglob('*.py')
        for name in dangers(file.read_text(encoding='utf-8'))
    }
    assert found == set(EXCEPTIONS)


# ---------------------------------------------------------------------------------------------------------------------
# Crafted files


class Code:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, (str(CANARY),)


@pytest.fixture(autouse=True)
def canary(tmp_path):
    """Nobody has made the folder."""
    yield
    assert not (tmp_path / CANARY).exists()


@pytest.fixture
def opt(tmp_path, monkeypatch):
    # Where the file is read by a plain torch.load, code must run, so that it is seen.
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    warnings.simplefilter('ignore')
    result = dckd_run(tmp_path)
    result['train']['total_iter'] = 1
    return result


def as_pickle(content, path):
    Path(path).write_bytes(pickle.dumps(content))


def as_zip(content, path):
    torch.save(content, path)


def as_stream(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


FORMATS = [as_pickle, as_zip, as_stream]
formats = pytest.mark.parametrize('write_file', FORMATS, ids=lambda f: f.__name__[3:])


@formats
def test_the_files_do_run_code(write_file, tmp_path):
    write_file({'params': Code()}, 'evil.pth')
    if write_file is as_pickle:
        pickle.loads(Path('evil.pth').read_bytes())
    else:
        torch.load('evil.pth', weights_only=False)
    CANARY.rmdir()


def weights(**more):
    return {'params': build_network(edsr(16)).state_dict(), **more}


@formats
@pytest.mark.parametrize('key', ['t', 'g', 'vqgan'])
@pytest.mark.parametrize('suffix', ['pth', 'ckpt', 'safetensors'])
def test_weights_for_training(opt, key, suffix, write_file):
    write_file({'params': Code()}, f'evil.{suffix}')
    opt['path'][f'pretrain_network_{key}'] = f'evil.{suffix}'
    assert train.main(['-opt', write(opt)]) == 2


@formats
def test_weights_beside_which_there_is_code(opt, write_file):
    """The weights are sound; what else the file names stays a name."""
    write_file(weights(extra=Code(), epoch=[Code()]), 'teacher.pth')
    assert train.main(['-opt', write(opt)]) == (2 if write_file is as_pickle else 0)


@formats
@pytest.mark.parametrize('model, key', [('SRModel', 'g'), ('SRGANModel', 'd')])
def test_weights_for_models_of_basicsr(opt, model, key, write_file):
    write_file({'params': Code()}, 'evil.pth')
    for name in ('network_t', 'network_his', 'network_vqgan'):
        del opt[name]
    adam = {'type': 'Adam', 'lr': 1e-3}
    opt.update(model_type=model, path={f'pretrain_network_{key}': 'evil.pth'})
    opt['train'] = {'total_iter': 1, 'optim_g': adam, 'pixel_opt': {'type': 'L1Loss'}}
    if model == 'SRGANModel':
        opt['network_d'] = {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 4}
        opt['train'].update(optim_d=adam, gan_opt={'type': 'GANLoss', 'gan_type': 'vanilla'})
    assert train.main(['-opt', write(opt)]) == 2


def test_weights_that_a_loss_of_basicsr_takes_from_a_fixed_place(opt, capfd):
    place = Path('experiments/pretrained_models/vgg19-dcbb9e9d.pth')
    place.parent.mkdir(parents=True)
    as_zip({'params': Code()}, place)
    opt['train']['perceptual_opt'] = {'type': 'PerceptualLoss', 'layer_weights': {'conv1_2': 1.0}}
    assert train.main(['-opt', write(opt)]) == 2
    assert 'holds entries that are not tensors: params (posix.mkdir)' in capfd.readouterr().err


@formats
def test_weights_for_a_test(opt, write_file):
    write_file({'params': Code()}, 'evil.pth')
    opt['path']['pretrain_network_g'] = 'evil.pth'
    assert test.main(['-opt', write(opt)]) == 2


@formats
def test_weights_to_convert(write_file):
    write_file({'state_dict': Code()}, 'evil.ckpt')
    assert zoo.main(['convert', 'evil.ckpt', 'out.pth']) == 2


@formats
def test_a_state_to_resume_from(opt, write_file):
    write_file({'iter': 1, 'epoch': 0, 'optimizers': Code(), 'schedulers': []}, 'evil.state')
    opt['path']['resume_state'] = 'evil.state'
    assert train.main(['-opt', write(opt)]) == 2


@formats
def test_a_state_that_is_found(opt, write_file, capfd):
    folder = Path('experiments/run/training_states')
    folder.mkdir(parents=True)
    write_file({'iter': 9, 'epoch': 0, 'optimizers': [], 'schedulers': [], 'dckd_sr': Code()}, folder / '9.state')
    assert train.main(['-opt', write(opt), '--auto_resume']) in (0, 2)
    assert 'Traceback' not in ''.join(capfd.readouterr())


def trained(opt):
    opt['logger']['save_checkpoint_freq'] = 1
    assert train.main(['-opt', write(opt)]) == 0
    opt['train']['total_iter'] = 2
    return torch.load('experiments/run/training_states/1.state', weights_only=True)


PLACES = ['iter', 'epoch', 'optimizers', 'schedulers', 'dckd_sr']
PLACES += [f'dckd_sr.{key}' for key in ('generators', 'best_metric_results', 'extra', 'files', 'options', 'failures')]


@pytest.mark.parametrize('value', [Code(), 3, {'a': [1]}], ids=['code', 'number', 'block'])
@pytest.mark.parametrize('place', PLACES)
def test_a_state_of_this_run_with_something_else_in_it(opt, place, value, capfd):
    state = trained(opt)
    block, _, key = place.rpartition('.')
    (state[block] if block else state)[key] = value
    as_zip(state, 'experiments/run/training_states/1.state')
    capfd.readouterr()
    assert train.main(['-opt', write(opt), '--auto_resume']) in (0, 2)
    assert 'Traceback' not in ''.join(capfd.readouterr())


@formats
def test_a_network_of_a_state_with_code_in_it(opt, write_file, capfd):
    trained(opt)
    write_file({'params': Code()}, 'experiments/run/models/net_g_1.pth')
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    assert 'Passed over' in ''.join(capfd.readouterr())


OBJECTS = [
    '!!python/object/apply:os.mkdir [CANARY]',
    '!!python/object/new:os.mkdir [CANARY]',
    '!!python/object/apply:subprocess.check_call [[mkdir, CANARY]]',
    '!!python/object/apply:os.mkdir {args: [CANARY]}',
    '!!python/name:os.mkdir',
    '!!python/module:this',
    '!<tag:yaml.org,2002:python/object/apply:os.mkdir> [CANARY]',
]


@pytest.mark.parametrize('text', OBJECTS)
def test_yaml(opt, text, capfd):
    line = f'\nfirst: {text}\n'
    name = write(opt)
    for main, flags in ((train.main, []), (test.main, [])):
        Path('evil.yml').write_text(Path(name).read_text() + line)
        assert main(['-opt', 'evil.yml', *flags]) == 2
        Path('child.yml').write_text('_base_: evil.yml\nname: child\n')
        assert main(['-opt', 'child.yml', *flags]) == 2
        assert main(['-opt', name, '--force_yml', f'name={text}']) == 2
    assert 'Traceback' not in ''.join(capfd.readouterr())


@pytest.mark.parametrize(
    'override',
    [
        "name=__import__('os').mkdir('CANARY')",
        "train:total_iter=__import__('os').mkdir('CANARY')",
        "name'];__import__('os').mkdir('CANARY');opt['x=1",
        "train:__import__('os').mkdir('CANARY')=1",
    ],
)
def test_overrides_are_no_python(opt, override, capfd):
    """BasicSR evaluates the values and executes the keys."""
    opt['train']['total_iter'] = 1
    assert train.main(['-opt', write(opt), '--force_yml', override, 'logger:print_freq=1']) in (0, 2)
    assert 'Traceback' not in ''.join(capfd.readouterr())


def test_options_in_a_state(opt, capfd):
    state = trained(opt)
    for text in (f'name: {OBJECTS[0]}\n', 'name'):
        state['dckd_sr']['options'] = text
        torch.save(state, 'experiments/run/training_states/1.state')
        assert train.main(['-opt', write(opt), '--auto_resume']) == 2
    assert 'Traceback' not in ''.join(capfd.readouterr())


NAMES = [
    '../../../evil',
    '/tmp/../evil',
    '$(mkdir CANARY)',
    "__import__('os').mkdir('CANARY')",
    '%s%n{0.__class__}',
    'a\\..\\evil',
]


def test_keys_of_an_image_database(opt, tmp_path, monkeypatch):
    """They are what images are looked up by, and give files their names, inside the results alone."""
    inside = tmp_path / 'a' / 'b' / 'c'
    inside.mkdir(parents=True)
    for folder in ('HR', 'LR'):
        image = cv2.imread(f'{folder}/0.png')
        target = inside / f'{folder}.lmdb'
        with lmdb.open(str(target), map_size=2**20) as environment, environment.begin(write=True) as transaction:
            for name in NAMES:
                transaction.put(name.encode(), cv2.imencode('.png', image)[1].tobytes())
        height, width, _ = image.shape
        lines = [f'{name}.png ({height},{width},3) 1' for name in NAMES]
        (target / 'meta_info.txt').write_text('\n'.join(lines) + '\n')
        opt['datasets']['val_1'].update({'io_backend': {'type': 'lmdb'}})
    shutil.copy('teacher.pth', inside)
    opt['datasets']['val_1'].update(dataroot_gt='HR.lmdb', dataroot_lq='LR.lmdb')
    del opt['datasets']['train']
    opt['network_g'] = edsr(16)
    opt['path']['pretrain_network_g'] = 'teacher.pth'
    opt['val']['save_img'] = True
    before = set(tmp_path.rglob('*'))
    monkeypatch.chdir(inside)
    assert test.main(['-opt', write(opt), '--no_bicubic']) == 0
    made = set(tmp_path.rglob('*')) - before - {inside / 'opt.yml'}
    assert len([file for file in made if file.suffix == '.png']) == len(NAMES)
    assert not [file for file in made if inside / 'results' not in (file, *file.parents)]
