"""The JSON schema of option files, judged by an independent validator."""

import json
import re
import sys
from pathlib import Path

import fastjsonschema
import pytest
import test_option_checks
from basicsr.utils.registry import ARCH_REGISTRY
from option_files import dckd, esrgan, vqgan

from dckd_sr import option_files, option_keys, option_schema, options, safe_yaml

SHIPPED = sorted((option_files.shipped_root() / 'options').rglob('*.yml'))


@pytest.fixture(scope='module')
def schema():
    return json.loads(json.dumps(option_schema.schema(), allow_nan=False))


@pytest.fixture(scope='module')
def valid(schema):
    """Whether an option dict is valid."""
    check = fastjsonschema.compile(schema, use_default=False)

    def valid(opt):
        try:
            check(opt)
        except fastjsonschema.JsonSchemaException:
            return False
        return True

    return valid


@pytest.mark.parametrize('file', SHIPPED, ids=lambda file: file.stem)
def test_shipped_files_are_valid(valid, file):
    opt = safe_yaml.parse(file.read_text(encoding='utf-8'))
    assert valid(opt)
    assert not valid({**opt, 'scael': 4})


@pytest.mark.parametrize('make', [dckd, esrgan, vqgan])
def test_files_in_the_words_of_others_are_valid(valid, make):
    assert valid(make())
    assert not valid({**make(), 'network_x': {'type': 'EDSR'}})


# A schema sees one value at a time: what the disk, another key or a default decides is not for it.
SEES = (
    r'unknown|no such (model|arch|loss|metric|dataset|optim|sched)|belongs in|here it is|expected (text|true|a list$)'
)


@pytest.mark.parametrize('mistake', [m for m in test_option_checks.MISTAKES if re.search(SEES, m[1] + m[2])], ids=str)
def test_mistakes_are_seen(valid, mistake):
    opt = dckd()
    options.apply_overrides(opt, [mistake[0]] if isinstance(mistake[0], str) else mistake[0])
    assert not valid(opt)


@pytest.mark.parametrize(
    'override',
    [
        'num_gpu=-1',
        'num_gpu=all',
        'scale=0',
        'scale=x4',
        'imports=5',
        'train:ema_decay=1',
        'train:num_neg=-1',
        'train:num_neg=1.5',
        'train:step=[]',
        'train:step=0',
        'train:history_from=teacher',
        'train:noisy:prob=2',
        'train:cl_opt:reduce=mean',
        'train:scheduler:gamma=x',
        'train:optim_g=Adam',
        'network_vqgan:input_range=[0, 255]',
        'network_g:num_feat=many',
        'datasets:validation={type: SRImageDataset}',
        'datasets:train:io_backend:type=disc',
        'val:metrics=psnr',
    ],
)
def test_values_are_seen(valid, override):
    opt = dckd()
    options.apply_overrides(opt, [override])
    assert not valid(opt)


@pytest.mark.parametrize(
    'override',
    [
        'num_gpu=auto',
        'num_gpu=0',
        'train:step=500',
        'train:num_neg=~',
        'train:scheduler=~',
        'train:lcr_opt=~',
        'imports=my_package',
        'imports=[my_package.archs]',
        'datasets:val_3=~',
        'datasets:val={type: SRImageDataset, dataroot_gt: x}',
        'datasets:train:use_flip=true',
        'path:pretrain_model_g=~',
        'network_t:allow_random=true',
        'network_his=~',
        'val:metrics:niqe={type: calculate_niqe, crop_border: 4, better: lower}',
        'network_g={num_feat: 8}',
        'model_type=KDModel',
    ],
)
def test_what_is_right_is_valid(valid, override):
    opt = dckd()
    if override == 'model_type=KDModel':
        kept = {'logits_opt', *option_keys.Train.model_fields}
        opt['train'] = {key: value for key, value in opt['train'].items() if key in kept}
        for key in ('vqgan', 'his'):
            opt.pop(f'network_{key}')
        opt['path'] = {key: value for key, value in opt['path'].items() if 'vqgan' not in key}
    options.apply_overrides(opt, [override])
    assert valid(opt)


def test_models_have_their_own_keys(valid):
    assert not valid({**dckd(), 'model_type': 'KDModel'})
    assert not valid({**esrgan(), 'model_type': 'VQGANModel'})
    assert valid({**dckd(), 'model_type': 'SRModel'})  # runs as DCKDModel
    other = {**esrgan(), 'model_type': 'RealESRGANModel'}
    other['train']['l1_gt_usm'] = True  # a key of BasicSR's that no section here knows
    assert valid(other)


def test_only_a_whole_file_needs_the_main_keys(valid):
    assert not valid({'name': 'x'})
    assert valid({'_base_': 'train_edsr_x4', 'name': 'x'})
    assert valid({'_base_': ['a', 'b']}) and not valid({'_base_': 5})


def test_every_registered_name_and_argument_is_offered(schema):
    offered = schema['definitions']['network']['properties']['type']['enum']
    assert {name.replace('_basicsr', '') for name, _ in ARCH_REGISTRY} | {'zoo'} == set(offered)
    swinir = schema['definitions']['network.SwinIR']['properties']
    assert swinir['window_size']['default'] == 7 and swinir['window_size']['description'].startswith('Window size')
    weights = schema['definitions']['loss.ContrasLoss']['properties']['weights']
    assert weights['description'] and weights['default'] == [0.03125, 0.0625, 0.125, 0.25, 1.0]
    train = schema['definitions']['train.DCKDModel']['properties']
    assert train['num_neg']['default'] == 4 and train['num_neg']['description'] == 'degraded negatives'


class TestCommand:
    def test_writes(self, capsys):
        assert options.main(['schema', '-o', 'options.schema.json']) == 0
        assert capsys.readouterr() == ('', '')
        found = json.loads(Path('options.schema.json').read_text(encoding='utf-8'))
        assert found['$schema'] == 'http://json-schema.org/draft-07/schema#'
        assert options.main(['schema', '-o', 'no/folder/x.json']) == 2
        assert capsys.readouterr().err.startswith('error: --output no/folder/x.json: ')

    def test_with_modules_of_others(self, capsys, monkeypatch):
        Path('my_schema_archs.py').write_text(
            'from basicsr.utils.registry import ARCH_REGISTRY\n'
            '@ARCH_REGISTRY.register()\n'
            'class Mine:\n'
            '    def __init__(self, depth=3, **others): pass\n',
            encoding='utf-8',
        )
        monkeypatch.setattr(sys, 'path', list(sys.path))
        monkeypatch.setattr(sys, 'dont_write_bytecode', True)
        monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', dict(ARCH_REGISTRY._obj_map))
        assert options.main(['schema', '--imports', 'my_schema_archs']) == 0
        mine = json.loads(capsys.readouterr().out)['definitions']['network.Mine']
        assert mine['properties']['depth'] == {'type': 'number', 'default': 3} and mine['additionalProperties'] is True
        assert options.main(['schema', '--imports', 'my_no_module']) == 2
        assert 'my_no_module: no such module' in capsys.readouterr().err
