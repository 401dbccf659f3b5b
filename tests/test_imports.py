"""`imports:` names modules, files and folders: arch files of forks load as they lie, in every command."""

import sys
from pathlib import Path

import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY

from dckd_sr import export, imports, options, safe_yaml, upscale
from dckd_sr.errors import UserError

HEAD = 'import torch\nfrom torch import nn\n'
NET = """
class {name}(nn.Module):
    def __init__(self, upscale=2):
        super().__init__()
        self.conv = nn.Conv2d(12, 3 * upscale**2, 3, 1, 1)
        self.shuffle = nn.PixelShuffle(upscale)
    def forward(self, x):
        return self.shuffle(self.conv(torch.cat([x] * 4, 1)))
"""
REGISTERED = HEAD + 'from basicsr.utils.registry import ARCH_REGISTRY\n@ARCH_REGISTRY.register()' + NET


def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content if isinstance(content, str) else safe_yaml.dump(content), encoding='utf-8')


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', dict(ARCH_REGISTRY._obj_map))
    monkeypatch.setattr(imports, '_loaded', {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(('imports_', 'archs', 'block', 'basicsr.archs.Own')):
            del sys.modules[name]


def fork(folder='Fork'):
    """A clone of a fork: its own `basicsr`, of which only what the installed one lacks may be run."""
    write(f'{folder}/README.md', '')
    for package in ('basicsr', 'basicsr/archs', 'basicsr/utils'):
        write(f'{folder}/{package}/__init__.py', 'raise RuntimeError("the package of the fork was run")')
    write(f'{folder}/basicsr/utils/registry.py', 'raise RuntimeError("this would be another registry")')
    write(f'{folder}/basicsr/archs/OwnParts.py', 'CHANNELS = 12')
    write(f'{folder}/tools/more.py', 'OFFSET = 0')
    write(
        f'{folder}/basicsr/archs/forked_arch.py',
        'import basicsr.archs.OwnParts as Parts\n'
        'from basicsr.archs.arch_util import make_layer\n'
        'from .OwnParts import CHANNELS\n'
        'from tools.more import OFFSET\n' + REGISTERED.format(name='Forked') + '        assert CHANNELS == 12\n',
    )
    return f'{folder}/basicsr/archs/forked_arch.py'


class TestLoad:
    def test_a_file_of_a_fork_loads_unedited(self):
        file, real = fork(), sys.modules['basicsr.archs']
        assert imports.load(file) == [] and imports.load(file) == []
        assert ARCH_REGISTRY.get('Forked')().conv.in_channels == 12
        assert sys.modules['basicsr.archs'] is real and 'site-packages' in sys.modules['basicsr'].__file__

    def test_a_folder_loads_what_registers(self):
        fork()
        write('Fork/basicsr/archs/test_it.py', 'raise SystemExit("a script")')
        write('Fork/basicsr/archs/edsr_arch.py', REGISTERED.format(name='EDSR'))
        write('Fork/basicsr/archs/bad_arch.py', 'import no_such_thing\n' + REGISTERED.format(name='Bad'))
        ours = ARCH_REGISTRY.get('EDSR')
        kept, left_out = imports.load('Fork/basicsr/archs')
        assert 'EDSR' in kept and 'is not used' in kept and ARCH_REGISTRY.get('EDSR') is ours
        assert left_out.startswith('bad_arch.py is left out: cannot be imported: ModuleNotFoundError')
        assert 'Forked' in ARCH_REGISTRY

    def test_a_named_file_takes_a_name(self):
        write('my_edsr.py', REGISTERED.format(name='EDSR'))
        (note,) = imports.load('my_edsr.py')
        assert 'EDSR is that of' in note and 'in place of' in note
        assert ARCH_REGISTRY.get('EDSR')().conv.in_channels == 12

    def test_without_a_registry_and_beside_another(self):
        for folder, factor in (('one', 2), ('two', 3)):
            write(f'{folder}/block.py', f'FACTOR = {factor}')
            write(
                f'{folder}/net.py', f'import block as B\n{HEAD}{NET.format(name=f"Net{factor}")}    FACTOR = B.FACTOR\n'
            )
            assert imports.load(f'{folder}/net.py') == []
            assert ARCH_REGISTRY.get(f'Net{factor}').FACTOR == factor  # not that of the other block.py

    def test_a_folder_without_init_is_no_module(self):
        write('archs/my_arch.py', REGISTERED.format(name='Mine'))
        imports.load('archs')
        assert 'Mine' in ARCH_REGISTRY

    def test_a_package_that_reads_nothing(self):
        write('archs/__init__.py', '')
        write('archs/my_arch.py', REGISTERED.format(name='Mine'))
        imports.load('archs')
        assert 'Mine' in ARCH_REGISTRY

    def test_nothing_to_register(self):
        write('nothing.py', 'X = 1')
        assert imports.load('nothing.py') == ['nothing in it registers an arch, a loss, a dataset, a model or a metric']

    def test_errors(self):
        for text, start in (('x = ', 'cannot be imported: SyntaxError'), ('from .. import x', 'cannot be imported: ')):
            write('bad.py', text)
            with pytest.raises(UserError, match=f'^{start}'):
                imports.load('bad.py')


def test_entries_are_found_beside_the_option_file(tmp_path, monkeypatch):
    write('there/archs/my_arch.py', REGISTERED.format(name='Mine'))
    write('there/base.yml', {'imports': ['archs/my_arch.py', 'archs', 'json', 'no_such']})
    write('variant.yml', '_base_: there/base.yml')
    here = [str(tmp_path / 'there' / 'archs' / 'my_arch.py'), str(tmp_path / 'there' / 'archs'), 'json', 'no_such']
    assert options.read_file('variant.yml')['imports'] == here
    monkeypatch.chdir('there')
    assert options.read_file('base.yml')['imports'] == ['archs/my_arch.py', 'archs', 'json', 'no_such']


@pytest.fixture
def run():
    """A run of an arch of one's own, as a training leaves it."""
    write('archs/my_arch.py', REGISTERED.format(name='Mine'))
    resolved = {'imports': ['archs/my_arch.py'], 'scale': 2, 'network_g': {'type': 'Mine', 'upscale': 2}}
    write('experiments/x/resolved.yml', resolved)
    imports.load('archs/my_arch.py')
    net = ARCH_REGISTRY.get('Mine')()
    Path('experiments/x/models').mkdir()
    torch.save({'params': net.state_dict()}, 'experiments/x/models/net_g_4.pth')
    del ARCH_REGISTRY._obj_map['Mine']
    imports._loaded.clear()


@pytest.mark.parametrize('elsewhere', [False, True])
def test_upscale_and_export(run, elsewhere, tmp_path, monkeypatch, capsys):
    from PIL import Image

    Image.new('RGB', (20, 16)).save('a.png')
    if elsewhere:
        Path('other').mkdir()
        monkeypatch.chdir('other')
    model = str(tmp_path / 'experiments/x/models/net_g_4.pth')
    assert upscale.main([str(tmp_path / 'a.png'), '-m', model, '-o', 'o.png']) == 0, capsys.readouterr().err
    assert Image.open('o.png').size == (40, 32)
    assert export.main([model, '--to', 'torchscript', '-o', 'o.pt']) == 0, capsys.readouterr().err
    assert export.main([model, '--to', 'safetensors', '-o', 'o.safetensors']) == 0, capsys.readouterr().err
    del ARCH_REGISTRY._obj_map['Mine']
    assert upscale.main([str(tmp_path / 'a.png'), '-m', 'o.safetensors', '-o', 'p.png']) == 2
    assert '-opt FILE, with imports and network_g' in capsys.readouterr().err
