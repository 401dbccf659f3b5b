"""Option files that build on others, are found by name, or bring modules of their own."""

import sys
from pathlib import Path

import pytest
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY
from option_files import dckd, load, make_files

from dckd_sr import option_files, options, safe_yaml

SHIPPED = option_files.shipped_root() / 'options'


@pytest.fixture(autouse=True)
def files(tmp_path):
    make_files(tmp_path)


def write(name, text):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text if isinstance(text, str) else safe_yaml.dump(text), encoding='utf-8')
    return name


def message(name, *overrides):
    with pytest.raises(options.OptionError) as error:
        options.load(name, overrides)
    return str(error.value)


class TestMerge:
    def merged(self, base, child):
        write('base.yml', base)
        write('child.yml', '_base_: base.yml\n' + child)
        return options.read_file('child.yml')

    @pytest.mark.parametrize(
        ('base', 'child', 'expected'),
        [
            ('a: 1\nb: 2', 'b: 3\nc: 4', {'a': 1, 'b': 3, 'c': 4}),
            ('a: {b: 1, c: {d: 2}}', 'a: {c: {e: 3}}', {'a': {'b': 1, 'c': {'d': 2, 'e': 3}}}),
            ('a: [1, 2, 3]', 'a: [4]', {'a': [4]}),
            ('a: {type: X, b: 1}', 'a: {c: 2}', {'a': {'type': 'X', 'b': 1, 'c': 2}}),
            ('a: {type: X, b: 1}', 'a: {type: X, c: 2}', {'a': {'type': 'X', 'b': 1, 'c': 2}}),
            ('a: {type: X, b: 1}', 'a: {type: Y, c: 2}', {'a': {'type': 'Y', 'c': 2}}),
            ('a: {b: 1}', 'a: {type: Y}', {'a': {'b': 1, 'type': 'Y'}}),
            ('a: {b: 1}\nc: 2', 'a: ~', {'c': 2}),
            ('a: 1', 'a: ~', {'a': None}),
            ('a: {b: 1}', 'a: 5', {'a': 5}),
            ('a: 5', 'a: {b: 1}', {'a': {'b': 1}}),
            ('a: ~', 'a: {b: 1}', {'a': {'b': 1}}),
            # older names of a key count as the key
            ('path: {pretrain_network_g: x}', 'path: {pretrain_model_g: y}', {'path': {'pretrain_model_g': 'y'}}),
            # an entry belongs to its file
            (
                'path: {pretrain_network_t: x, param_key_t: k, strict_load_t: false, param_key_g: l}',
                'path: {pretrain_network_t: y}',
                {'path': {'pretrain_network_t': 'y', 'param_key_g': 'l'}},
            ),
            (
                'path: {pretrain_network_vqgan: x, param_key_vqgan: k}',
                'path: {pretrain_network_vqgan: y, param_key_vqgan: l}',
                {'path': {'pretrain_network_vqgan': 'y', 'param_key_vqgan': 'l'}},
            ),
            (
                'path: {pretrain_network_t: x, param_key_t: k}',
                'path: {pretrain_network_t: x}',
                {'path': {'pretrain_network_t': 'x', 'param_key_t': 'k'}},
            ),
            (
                'path: {pretrain_network_t: ~, param_key_t: k}',
                'path: {pretrain_network_t: x}',
                {'path': {'pretrain_network_t': 'x', 'param_key_t': 'k'}},
            ),
            (
                'path: {pretrain_model_g: x, strict_load: false, param_key_g: k}',
                'path: {pretrain_network_g: y}',
                {'path': {'pretrain_network_g': 'y'}},
            ),
            (
                'l: {encoder: {pretrain: x, param_key: k}}',
                'l: {encoder: {pretrain: y}}',
                {'l': {'encoder': {'pretrain': 'y'}}},
            ),
            (
                'network_t: {type: spandrel, path: x, param_key: k}',
                'network_t: {path: y}',
                {'network_t': {'type': 'spandrel', 'path': 'y'}},
            ),
            # and so do weights to a network that brings others
            (
                'network_t: {type: EDSR}\npath: {pretrain_network_t: x, param_key_t: k, strict_load_t: false, a: 1}',
                'network_t: {type: spandrel, path: y}',
                {'network_t': {'type': 'spandrel', 'path': 'y'}, 'path': {'a': 1}},
            ),
            (
                'network_t: {type: zoo, name: A}\npath: {pretrain_network_t: x}',
                'network_t: {name: B}',
                {'network_t': {'type': 'zoo', 'name': 'B'}, 'path': {}},
            ),
            (
                'network_t: {type: zoo, name: A}\npath: {pretrain_network_t: x}',
                'network_t: {allow_random: true}',
                {'network_t': {'type': 'zoo', 'name': 'A', 'allow_random': True}, 'path': {'pretrain_network_t': 'x'}},
            ),
            ('datasets: {v: {use_flip: 1}}', 'datasets: {v: {use_hflip: 0}}', {'datasets': {'v': {'use_hflip': 0}}}),
        ],
    )
    def test_rules(self, base, child, expected):
        assert self.merged(base, child) == expected

    def test_order_of_keys_is_the_bases(self):
        assert list(self.merged('a: 1\nb: 2\nc: 3', 'd: 4\nb: 5')) == ['a', 'b', 'c', 'd']

    def test_several_bases_the_last_wins(self):
        write('one.yml', 'a: 1\nb: 1\nc: 1')
        write('two.yml', 'b: 2\nc: 2')
        write('child.yml', '_base_: [one, two.yml]\nc: 3')
        assert options.read_file('child.yml') == {'a': 1, 'b': 2, 'c': 3}

    def test_bases_of_bases_lie_beside_their_reader(self):
        write('deep/root.yml', 'a: 1\nb: 1')
        write('deep/middle.yml', '_base_: root\nb: 2')
        write('child.yml', '_base_: [deep/middle, deep/root]\n')  # the same file twice is no circle
        assert options.read_file('child.yml') == {'a': 1, 'b': 1}

    def test_overrides_come_last(self):
        write('base.yml', dckd())
        write('child.yml', '_base_: base\ntrain: {num_neg: 3, total_iter: 7}\n')
        opt, warnings = options.load('child.yml', ['train:num_neg=2'])
        assert (opt['train']['num_neg'], opt['train']['total_iter'], opt['train']['ema_decay']) == (2, 7, 0.999)
        assert warnings == [] and '_base_' not in opt
        assert message('child.yml', '_base_=base.yml') == '--force_yml _base_=base.yml: only a file can have a base'

    def test_an_override_replaces_an_older_name(self):
        source = dckd()
        source['datasets']['train']['use_hflip'] = True
        assert load(source, 'datasets:train:use_flip=false')[0]['datasets']['train']['use_hflip'] is False

    def test_a_set_can_be_taken_away(self):
        write('base.yml', dckd())
        write('child.yml', '_base_: base\ndatasets: {val_2: ~}\n')
        assert set(options.load('child.yml')[0]['datasets']) == {'train', 'val_1'}

    def test_null_takes_a_block_away_wherever_it_stands(self):
        """In a variant, in an override and in a plain file: as if the block had never been there."""

        def blocks(value, path=()):
            for key, inner in value.items():
                if isinstance(inner, dict):
                    yield (*path, key)
                    yield from blocks(inner, (*path, key))

        def outcome(*overrides):
            try:
                return filled(options.load('opt.yml', overrides)[0])
            except options.OptionError as error:
                return [problem.partition(':')[0].partition(' = ')[0] for problem in error.problems]

        def filled(value):
            return {k: filled(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value

        def without(path, empty=False):
            opt = dckd()
            block = opt
            for key in path[:-1]:
                block = block[key]
            block.pop(path[-1])
            block.update({path[-1]: None} if empty else {})
            return opt

        write('base.yml', dckd())
        places = list(blocks(dckd()))
        assert {('datasets', 'val_2'), ('val', 'metrics', 'psnr'), ('network_vqgan', 'ddconfig')} < set(places)
        for path in places:
            variant = None
            for key in reversed(path):
                variant = {key: variant}
            write('opt.yml', without(path))
            expected = outcome()
            write('opt.yml', {'_base_': 'base', **variant})
            assert outcome() == expected, path
            write('opt.yml', dckd())
            for empty in ('null', '~', 'none', ''):
                assert outcome(f'{":".join(path)}={empty}') == expected, path
            write('opt.yml', without(path, empty=True))
            assert outcome() == expected, path

    def test_no_set_at_all(self):
        write('opt.yml', {**dckd(), 'datasets': {'test_1': None}})
        assert message('opt.yml').startswith('opt.yml: datasets: missing; ')

    def test_what_an_override_takes_away_has_no_origin(self):
        write('base.yml', dckd())
        file = option_files.read('base.yml')
        option_files.apply_overrides(file.options, ['network_t=null', 'train:num_neg=null'], file.origins)
        assert 'network_t' not in file.options and not [path for path in file.origins if path[0] == 'network_t']
        assert file.options['train']['num_neg'] is None and file.origins['train', 'num_neg'] == '--force_yml'

    def test_lines(self):
        write('base.yml', '\na: 1\nb:\n  c: &x {d: 2}\n  e: 3\nf: {<<: *x, g: 4}\n')
        write('sub/child.yml', '_base_: ../base.yml\nb:\n  e: 5\n')
        origins = option_files.read('sub/child.yml').origins
        assert origins['a',] == 'base.yml:2' and origins['b', 'c', 'd'] == 'base.yml:4'
        assert origins['f', 'd'] == 'base.yml:4' and origins['f', 'g'] == 'base.yml:6'
        assert origins['b', 'e'] == str(Path('sub/child.yml')) + ':3' and ('_base_',) not in origins


class TestBaseLookup:
    def test_beside_the_reader_not_the_current_folder(self):
        write('base.yml', 'a: here')
        write('sub/base.yml', 'a: beside')
        write('sub/child.yml', '_base_: base')
        assert options.read_file('sub/child.yml') == {'a': 'beside'}

    def test_shipped(self):
        write('child.yml', '_base_: train_edsr_x4\nname: mine')
        expected = safe_yaml.parse((SHIPPED / 'train_edsr_x4.yml').read_text(encoding='utf-8'))
        assert options.read_file('child.yml') == {**expected, 'name': 'mine'}
        write('child.yml', '_base_: demo/scratch.yml')
        assert options.read_file('child.yml')['name'] == 'demo_scratch'

    def test_a_file_may_have_the_name_of_its_shipped_base(self):
        write('train_edsr_x4.yml', '_base_: train_edsr_x4\nname: mine')
        opt = options.read_file('train_edsr_x4.yml')
        assert opt['name'] == 'mine' and opt['network_g']['type'] == 'EDSR'

    @pytest.mark.parametrize(
        ('texts', 'text'),
        [
            ({'a': '_base_: basse'}, 'a.yml: _base_ = basse: not beside it and not among the shipped option files'),
            ({'a': '_base_: [b]', 'b': '_base_: nope'}, 'a.yml -> b.yml: _base_ = nope: not beside it'),
            ({'a': '_base_: a'}, 'a.yml: _base_ = a: the file itself'),
            ({'a': '_base_: b', 'b': '_base_: a'}, 'a.yml -> b.yml: _base_ = a: leads back to a.yml'),
            (
                {'a': '_base_: b', 'b': '_base_: c', 'c': '_base_: b.yml'},
                'a.yml -> b.yml -> c.yml: _base_ = b.yml: leads back to b.yml',
            ),
            ({'a': '_base_: 5'}, 'a.yml: _base_ = 5: expected the name of an option file, or a list of names'),
            ({'a': '_base_: [b, {c: 1}]', 'b': 'x: 1'}, "a.yml: _base_ = {'c': 1}: expected the name"),
            ({'a': "_base_: ''"}, 'a.yml: _base_ = : expected the name'),
            ({'a': '_base_: b', 'b': '- 1'}, 'a.yml -> b.yml: not made of `key: value` lines'),
            ({'a': '_base_: b', 'b': ''}, 'a.yml -> b.yml: empty'),
        ],
    )
    def test_mistakes_are_one_line(self, texts, text):
        for name, content in texts.items():
            write(f'{name}.yml', content)
        assert text in message('a.yml') and len(message('a.yml').splitlines()) == 1

    def test_nearest_name(self):
        write('base.yml', 'x: 1')
        write('a.yml', '_base_: bsae')
        assert "(did you mean 'base.yml'?)" in message('a.yml')
        write('a.yml', '_base_: train_esdr_x4')
        assert str(SHIPPED / 'train_edsr_x4.yml') in message('a.yml')

    def test_bad_yaml_in_a_base(self):
        write('base.yml', 'x: 1\nx: 2')
        write('a.yml', '_base_: base')
        text = "a.yml -> base.yml: line 2: the key 'x' is already set in line 1"
        assert message('a.yml') == text

    def test_problems_name_the_file_that_was_given(self):
        write('base.yml', {**dckd(), 'scael': 4})
        write('a.yml', '_base_: base')
        assert message('a.yml').startswith('a.yml: scael = 4: unknown key')


class TestFind:
    @pytest.mark.parametrize('name', ['train_edsr_x4', 'train_edsr_x4.yml', 'options/train_edsr_x4.yml'])
    def test_shipped_names(self, name):
        assert option_files.find(name) == (SHIPPED / 'train_edsr_x4.yml', True)
        assert message(name).startswith(f'{SHIPPED / "train_edsr_x4.yml"}: ')  # its data is not here
        assert 'datasets.train.dataroot_gt = datasets/DIV2K' in message(name)

    def test_what_is_here_comes_first(self):
        write('train_edsr_x4.yml', dckd())
        assert option_files.find('train_edsr_x4') == (Path('train_edsr_x4.yml'), False)
        write('train_edsr_x4', dckd())
        assert option_files.find('train_edsr_x4') == (Path('train_edsr_x4'), False)

    def test_a_folder_of_that_name_is_no_option_file(self):
        Path('train_edsr_x4').mkdir()
        assert option_files.find('train_edsr_x4')[1]

    @pytest.mark.parametrize('name', ['../options/train_edsr_x4', 'x/train_edsr_x4.yml', 'options', '', '.'])
    def test_other_paths_are_not_looked_up(self, name):
        assert option_files.find(name) == (Path(name), False)

    def test_a_run_says_which_file(self, monkeypatch, tmp_path):
        write('clone/options/mine.yml', dckd())
        monkeypatch.setattr(option_files, 'shipped_root', lambda: tmp_path / 'clone')
        file = tmp_path / 'clone' / 'options' / 'mine.yml'
        _, args, warnings = options.parse(['-opt', 'mine'])
        assert args.opt == str(file)
        assert warnings == [f'-opt mine: read from {file}, which comes with dckd_sr']

    def test_a_wheel_has_copies_and_a_clone_its_own_folder(self, monkeypatch, tmp_path):
        monkeypatch.setattr(option_files, '__file__', str(tmp_path / 'dckd_sr' / 'option_files.py'))
        assert option_files.shipped_root() == tmp_path
        (tmp_path / 'dckd_sr' / 'shipped').mkdir(parents=True)
        assert option_files.shipped_root() == tmp_path / 'dckd_sr' / 'shipped'


def test_resolved_file_stands_alone():
    write('base.yml', dckd())
    write('child.yml', '_base_: base\nimports: json\nname: child')
    opt, _ = options.load('child.yml')
    text = options.to_yaml(opt)
    assert '_base_' not in text and 'imports: [json]' in text
    Path('base.yml').unlink()
    write('resolved.yml', text)
    assert options.load('resolved.yml') == (opt, [])


class TestImports:
    @pytest.fixture(autouse=True)
    def _restored(self, monkeypatch):
        monkeypatch.setattr(sys, 'path', [entry for entry in sys.path if entry])
        monkeypatch.setattr(sys, 'dont_write_bytecode', True)
        for registry in (ARCH_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY):
            monkeypatch.setattr(registry, '_obj_map', dict(registry._obj_map))
        before = set(sys.modules)
        yield
        for name in set(sys.modules) - before:
            if name.split('.')[0] in ('my_package', 'my_module'):
                del sys.modules[name]

    def package(self):
        write('my_package/__init__.py', '')
        write(
            'my_package/archs.py',
            'from torch import nn\n'
            'from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY\n'
            'from dckd_sr.models.dckd_model import DCKDModel\n'
            '@ARCH_REGISTRY.register()\n'
            'class MyNet(nn.Module):\n'
            '    def __init__(self, num_feat, upscale=4):\n'
            '        super().__init__()\n'
            '@LOSS_REGISTRY.register()\n'
            'class MyLoss(nn.Module):\n'
            '    def __init__(self, loss_weight=1.0):\n'
            '        super().__init__()\n'
            '    def forward(self, pred, target):\n'
            '        return (pred - target).abs().mean()\n'
            '@MODEL_REGISTRY.register()\n'
            'class MyModel(DCKDModel):\n'
            '    pass\n',
        )

    def test_names_are_known_then(self):
        self.package()
        mine = {'type': 'MyNet', 'num_feat': 8}
        opt = {**dckd(), 'network_g': mine, 'model_type': 'MyModel', 'imports': ['my_package.archs']}
        opt['train']['pixel_opt'] = {'type': 'MyLoss', 'loss_weight': 2.0}
        resolved, warnings = load(opt)
        assert resolved['imports'] == ['my_package.archs'] and resolved['network_g'] == mine and warnings == []
        assert resolved['train']['step'] == [1000, 2000, 3000]  # the keys of the model that it derives from
        assert load({**opt, 'imports': 'my_package.archs'}, is_train=False)[0]['imports'] == ['my_package.archs']
        wrong = {**opt, 'network_g': {**mine, 'num_feats': 8}}
        assert 'unknown argument of MyNet' in load(wrong)[1][0]  # their keys are their own
        (problem,) = load_problems({**wrong, 'model_type': 'DCKDModel'})
        assert 'unknown argument of MyNet' in problem

    def test_unknown_without(self):
        self.package()
        (problem,) = load_problems({**dckd(), 'network_g': {'type': 'MyNet', 'num_feat': 8}})
        assert problem.startswith('network_g.type = MyNet: no such arch')

    def test_by_override_and_by_base(self):
        self.package()
        write('base.yml', {**dckd(), 'network_g': {'type': 'MyNet', 'num_feat': 8}})
        write('child.yml', '_base_: base\nimports: [my_package.archs]')
        assert options.load('base.yml', ['imports=my_package.archs'])[1] == []
        assert options.load('child.yml')[1] == []

    def test_what_is_installed_comes_before_the_current_folder(self):
        write('json/__init__.py', 'raise ValueError')
        write('my_module.py', '')
        load({**dckd(), 'imports': ['json', 'my_module']})
        assert sys.path[-1] == str(Path.cwd()) and sys.path.count(str(Path.cwd())) == 1

    @pytest.mark.parametrize(
        ('imports', 'start'),
        [
            ('my_module', 'imports = my_module: no such module: my_module is neither installed nor in '),
            ('my_package.nothing', 'imports = my_package.nothing: no such module: my_package.nothing is neither'),
            ('my_module.archs', 'imports = my_module.archs: no such module: my_module is neither'),
            (
                'my_package.needs',
                'imports = my_package.needs: cannot be imported: ModuleNotFoundError: No module named',
            ),
            ('my_package.fails', 'imports = my_package.fails: cannot be imported: ValueError: first line'),
            ('my_package.syntax', 'imports = my_package.syntax: cannot be imported: SyntaxError: '),
            ('my_package.leaves', 'imports = my_package.leaves: cannot be imported: SystemExit: 3'),
            ('my_package.silent', 'imports = my_package.silent: cannot be imported: AssertionError'),
            ('my_package.twice', 'imports = my_package.twice: cannot be imported: AssertionError: An object named'),
            ('my-package', 'imports = my-package: no such module, file or folder; looked for in '),
            ('.relative', 'imports = .relative: no such module, file or folder; looked for in '),
            ('my_package.class', 'imports = my_package.class: no such module, file or folder; looked for in '),
            ('a/b.py', 'imports = a/b.py: no such module, file or folder; looked for in '),
            (
                'my_package/needs.py',
                'imports = my_package/needs.py: cannot be imported: ModuleNotFoundError: No module',
            ),
            ('my_package/notes.txt', 'imports = my_package/notes.txt: expected a Python file, NAME.py'),
            ('empty', 'imports = empty: no file in this folder registers anything'),
            (' ', 'imports.0 =  : expected a module such as my_package.archs, a file or a folder'),
            (['my_package.archs', 5], 'imports.1 = 5: expected text'),
            ({'a': 'b'}, 'imports.0 = {"a": "b"}: expected text'),
        ],
    )
    def test_mistakes_are_one_line(self, imports, start):
        self.package()
        write('my_package/needs.py', 'import no_such_thing_here')
        write('my_package/fails.py', 'raise ValueError("first line\\nsecond line")')
        write('my_package/syntax.py', 'def f(:')
        write('my_package/leaves.py', 'raise SystemExit(3)')
        write('my_package/silent.py', 'assert False')
        write(
            'my_package/twice.py',
            'from basicsr.utils.registry import ARCH_REGISTRY\n'
            '@ARCH_REGISTRY.register()\nclass Net: pass\n'
            '@ARCH_REGISTRY.register()\nclass Net: pass\n',
        )
        write('my_package/notes.txt', '')
        write('empty/notes.txt', '')
        (problem,) = load_problems({**dckd(), 'imports': imports})
        assert problem.startswith(start) and '\n' not in problem


def load_problems(opt):
    with pytest.raises(options.OptionError) as error:
        load(opt)
    return error.value.problems
