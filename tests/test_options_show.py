"""``python -m dckd_sr.options show``: the same options, and where each value came from."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from option_files import EDSR, dckd, make_files

from dckd_sr import option_show, options, safe_yaml


@pytest.fixture(autouse=True)
def files(tmp_path):
    make_files(tmp_path)
    write('base.yml', {**dckd(), 'num_gpu': 'auto', 'manual_seed': None})
    Path('child.yml').write_text(CHILD, encoding='utf-8')


CHILD = """\
_base_: base
name: child
train:
  step: 500
  ema_decay: ~
  pixel_opt: {type: CharbonnierLoss}
network_g: {num_feat: 32}
datasets:
  train: {use_flip: false}
path: {pretrain_network_t: ~/teacher.pth}
"""


def write(name, opt):
    Path(name).write_text(safe_yaml.dump(opt), encoding='utf-8')


def line_in_base(key, above=''):
    """The line of a key in base.yml, after a line that starts with `above`."""
    lines = Path('base.yml').read_text(encoding='utf-8').splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(above))
    return next(i + 1 for i, line in enumerate(lines) if i >= start and f'{key}:' in line)


def sources(text):
    """Path of a key -> the comment on its line."""
    found, path = {}, []
    for line in text.splitlines():
        match = re.match(r"( *)([\w']+):(?: (.*?))?(?:  +# (.*))?$", line)
        if match and not line.startswith('#'):
            path = [*path[: len(match[1]) // 2], match[2]]
            assert (match[3] is None) == (match[4] is None), line
            if match[4] is not None:
                found['.'.join(path)] = match[4]
    return found


@pytest.mark.parametrize('is_train', [True, False])
def test_it_is_the_resolved_file(is_train, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    overrides = ['manual_seed=3', 'path:pretrain_network_g=teacher.pth']
    text, report, path = option_show.show('child', overrides, is_train)
    assert report.problems == [] and path == Path('child.yml')
    opt, _ = options.load('child.yml', overrides, is_train)
    assert safe_yaml.parse(text) == options.portable(opt)
    Path('again.yml').write_text(text, encoding='utf-8')
    assert options.load('again.yml', (), is_train)[0] == opt


def test_sources(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    found = sources(option_show.show('child.yml', ['train:cl_opt:loss_weight=0.5', 'val:metrics:p={type: x}'])[0])
    expected = {
        'name': 'child.yml:2',
        'model_type': f'base.yml:{line_in_base("model_type")}',
        'num_gpu': f'base.yml:{line_in_base("num_gpu")}, written auto',
        'manual_seed': 'derived',  # drawn
        'train.step': 'child.yml:4, written 500',
        'train.ema_decay': 'default',
        'train.pixel_opt.type': 'child.yml:6',
        'train.num_neg': f'base.yml:{line_in_base("num_neg")}',
        'train.neg_clean': 'default',
        'train.cl_opt.loss_weight': '--force_yml',
        'train.cl_opt.weights': f'base.yml:{line_in_base("weights")}',
        'val.metrics.p.type': '--force_yml',
        'val.pbar': 'default',
        'network_g.num_feat': 'child.yml:7',
        'network_g.type': f'base.yml:{line_in_base("type", above="network_g:")}',
        'datasets.train.use_hflip': 'child.yml:9, written {use_flip: false}',
        'datasets.train.use_rot': f'base.yml:{line_in_base("use_rot")}',
        'datasets.val_2.use_rot': 'default',
        'path.pretrain_network_t': 'child.yml:10, written ~/teacher.pth',
        'path.pretrain_network_g': f'base.yml:{line_in_base("pretrain_network_g")}',
        'logger.wandb.project': f'base.yml:{line_in_base("project")}',
    }
    assert {key: found[key] for key in expected} == expected
    assert 'train.pixel_opt.loss_weight' not in found  # of the base's loss


def test_derived_is_not_default():
    opt = dckd()
    del opt['network_his'], opt['datasets']['val_1']['name']
    write('short.yml', opt)
    found = sources(option_show.show('short.yml')[0])
    assert (found['network_his'], found['datasets.val_1.name']) == ('derived',) * 2
    assert found['train.accum_iter'] == 'default'


def test_odd_values():
    odd = {'lists': [[1, 2], [3]], 'text': 'two\nlines: # no comment', 'empty': {}, '5': '1e-4', 'hash': 'a #b'}
    odd['none'] = None
    write('odd.yml', {**dckd(), 'network_g': {**EDSR, **odd}})
    text, report, _ = option_show.show('odd.yml')
    assert len(report.problems) == len(odd)  # no arguments of EDSR, and shown all the same
    shown = safe_yaml.parse(text)['network_g']
    assert shown == {**EDSR, **odd}


class TestCommand:
    def test_problems_follow_the_file(self, capsys):
        assert options.main(['show', 'base.yml', '--force_yml', 'scael=4']) == 2
        out, err = capsys.readouterr()
        assert 'model_type: DCKDModel' in out
        assert err == "error: base.yml: scael = 4: unknown key (did you mean 'scale'?)\n"

    def test_warnings_stand_above(self, capsys):
        assert options.main(['show', 'base.yml', '--force_yml', 'datasets:train:use_shuffle=true']) == 0
        out, err = capsys.readouterr()
        assert out.splitlines()[0] == '# base.yml, for training' and err == ''
        assert out.splitlines()[1].startswith('# datasets.train.use_shuffle: without effect')

    def test_a_test(self, capsys):
        assert options.main(['show', 'base.yml', '--test', '--force_yml', 'path:pretrain_network_g=teacher.pth']) == 0
        assert '# base.yml, for a test' in capsys.readouterr().out

    def test_mistakes(self, capsys):
        assert options.main(['show', 'nowhere.yml']) == 2
        assert capsys.readouterr().err == f'error: -opt nowhere.yml: no such file in {Path.cwd()}\n'
        assert options.main([]) == 2 and options.main(['--help']) == 0

    @pytest.mark.filterwarnings('ignore:.*found in sys.modules')
    def test_as_a_module(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, 'argv', ['options', 'show', 'base.yml', '--force_yml', 'manual_seed=1'])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module('dckd_sr.options', run_name='__main__')
        assert stop.value.code == 0
        assert re.search(r'^manual_seed: 1 +# --force_yml$', capsys.readouterr().out, flags=re.M)
