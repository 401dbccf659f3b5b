"""Option files from the command line to the resolved dict."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from basicsr.utils.options import parse_options
from option_files import EDSR, L1, PAIRED, dckd, esrgan, load, make_files

from dckd_sr import devices, options, safe_yaml
from dckd_sr.errors import UserError


@pytest.fixture(autouse=True)
def files(tmp_path):
    make_files(tmp_path)


def write(opt, name='opt.yml'):
    Path(name).write_text(safe_yaml.dump(opt), encoding='utf-8')
    return name


def message(*args, **kwargs):
    with pytest.raises(options.OptionError) as error:
        options.load(*args, **kwargs)
    return str(error.value)


def small():
    """No more than what must be there."""
    data = {key: value for key, value in PAIRED.items() if key != 'io_backend'}
    return copy.deepcopy(
        {
            'name': 'small',
            'model_type': 'SRModel',
            'scale': 4,
            'datasets': {'train': {**data, 'gt_size': 128}, 'val': data},
            'network_g': EDSR,
            'train': {'total_iter': 10, 'optim_g': {'type': 'AdamW', 'lr': 1e-3}, 'pixel_opt': L1},
        }
    )


class TestAgainstBasicSR:
    """Whatever BasicSR's own reader makes of a file, ours has, too."""

    def compare(self, monkeypatch, opt, is_train, *arguments):
        file = write(opt)
        monkeypatch.setattr(sys, 'argv', ['program', '-opt', file, *arguments])
        theirs, _ = parse_options(str(Path.cwd()), is_train=is_train)
        ours, _, _ = options.parse(['-opt', file, *arguments], is_train)
        self.contains(ours, theirs)
        return ours

    def contains(self, ours, theirs, where=''):
        for key, value in theirs.items():
            if isinstance(value, dict):
                assert type(ours[key]) is dict
                self.contains(ours[key], value, f'{where}{key}.')
            else:
                assert ours[key] == value or (key == 'suffix' and not ours[key]), f'{where}{key}'

    def test_train(self, monkeypatch):
        opt = self.compare(monkeypatch, dckd(), True)
        assert opt['path']['models'] == str(Path.cwd() / 'experiments' / 'run' / 'models')

    def test_debug_and_resume(self, monkeypatch):
        opt = self.compare(monkeypatch, dckd(), True, '--debug', '--auto_resume')
        assert opt['name'] == 'debug_run' and opt['logger']['print_freq'] == 1 and opt['val']['val_freq'] == 8

    def test_overrides(self, monkeypatch):
        values = ['name=other', 'train:total_iter=20', 'train:ema_decay=0.9', 'num_gpu=0', 'train:step=[1,2]']
        self.compare(
            monkeypatch, dckd(), True, '--force_yml', *values, 'path:pretrain_network_g=~', 'val:save_img=True'
        )

    def test_a_test(self, monkeypatch):
        opt = esrgan()
        opt['datasets'] = {'test_1': {'name': 'Set5', **PAIRED}, 'test_2': {'name': 'Set14', **PAIRED}}
        opt['path'] = {'pretrain_network_g': 'teacher.pth'}
        opt['val']['suffix'] = None
        opt = self.compare(monkeypatch, opt, False)
        assert opt['path']['visualization'] == str(Path.cwd() / 'results' / 'run' / 'visualization')
        assert opt['datasets']['test_1']['phase'] == 'test' and opt['datasets']['test_1']['scale'] == 4


def test_defaults():
    opt, warnings = load(small(), 'num_gpu=0')
    assert warnings == []
    train = opt['datasets']['train']
    assert (train['name'], train['io_backend']) == ('train', {'type': 'disk'})
    assert (train['num_worker_per_gpu'], train['batch_size_per_gpu'], train['dataset_enlarge_ratio']) == (4, 16, 1)
    assert (train['use_hflip'], train['use_rot'], train['phase']) == (True, True, 'train')
    assert 'batch_size_per_gpu' not in opt['datasets']['val']
    assert opt['train']['scheduler'] == {'type': 'MultiStepLR', 'milestones': []}
    assert (opt['train']['ema_decay'], opt['train']['warmup_iter']) == (0, -1)
    assert (opt['val']['save_img'], opt['val']['suffix'], opt['val']['val_freq']) == (False, '', 5000)
    assert opt['logger'] == {
        'print_freq': 100,
        'save_checkpoint_freq': 5000,
        'save_checkpoint_format': 'pth',
        'gradients': False,
        'on_save_error': 'stop',
        'use_tb_logger': False,
    }
    assert (opt['dist'], opt['rank'], opt['world_size']) == (False, 0, 1)


def test_empty_values_are_defaults():
    opt, _ = load(dckd(), 'train:ema_decay=~', 'train:num_neg=~', 'val=~', 'train:step=', 'path:param_key_t=~')
    assert (opt['train']['ema_decay'], opt['train']['num_neg'], opt['train']['step']) == (0, 4, [1000, 2000, 3000])
    assert opt['val']['val_freq'] == 5000 and opt['path']['param_key_t'] is None


def test_types():
    opt, _ = load(dckd(), 'logger:print_freq=2e2', 'train:step=500', 'manual_seed=7')
    assert type(opt['val']['val_freq']) is int and opt['logger']['print_freq'] == 200
    assert opt['train']['step'] == [500] and opt['manual_seed'] == 7


def test_nothing_is_created(tmp_path):
    file = write(dckd())
    before = sorted(tmp_path.rglob('*'))
    options.parse(['-opt', file, '--debug'])
    message(file, ['scael=4'])
    assert sorted(tmp_path.rglob('*')) == before


def test_seed():
    del (opt := dckd())['manual_seed']
    assert len({load(opt)[0]['manual_seed'] for _ in range(5)}) > 1
    assert all(0 < load(opt)[0]['manual_seed'] <= 10000 for _ in range(5))
    assert load(opt, launcher='pytorch')[0]['manual_seed'] == 0  # all processes must agree


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    overrides = ['datasets:train:dataroot_gt=~/HR', 'path:pretrain_network_t=~/teacher.pth']
    overrides += ['datasets:train:meta_info_file=~/list.txt', 'path:resume_state=~/list.txt']
    opt, _ = load(dckd(), *overrides)
    assert opt['datasets']['train']['dataroot_gt'] == str(tmp_path / 'HR')
    assert opt['datasets']['train']['meta_info_file'] == opt['path']['resume_state'] == str(tmp_path / 'list.txt')
    assert opt['path']['pretrain_network_t'] == str(tmp_path / 'teacher.pth')


def test_root_path(tmp_path):
    opt, _ = load(dckd(), root_path=tmp_path / 'elsewhere')
    assert opt['path']['log'] == str(tmp_path / 'elsewhere' / 'experiments' / 'run')
    assert opt['root_path'] == str(tmp_path / 'elsewhere')


class TestOverrides:
    @pytest.mark.parametrize(
        ('text', 'value'),
        [
            ('-1', -1),
            ('1e-4', 1e-4),
            ('!!float 5e3', 5000.0),
            ('[1, 2e-1]', [1, 0.2]),
            ('{a: 1}', {'a': 1}),
            ('~', None),
            ('None', None),
            ('none', None),
            ('', None),
            ('true', True),
            ('False', False),
            ('a=b', 'a=b'),
            ('C:/x.pth', 'C:/x.pth'),
            ('{}x4', '{}x4'),
            ("'{}'", '{}'),
            ("'5'", '5'),
            (' padded ', 'padded'),
            ('@text', '@text'),
        ],
    )
    def test_values(self, text, value):
        opt = {'a': {'b': 0, 'c': 1}}
        options.apply_overrides(opt, [f'a:b={text}'])
        assert opt == {'a': {'b': value, 'c': 1}} and type(opt['a']['b']) is type(value)

    def test_new_keys(self):
        opt = {'a': None}
        options.apply_overrides(opt, ['a:b:c=1', 'x=2', 'y : z = 3'])
        assert opt == {'a': {'b': {'c': 1}}, 'x': 2, 'y': {'z': 3}}

    @pytest.mark.parametrize(
        ('entry', 'text'),
        [
            ('a:b', 'expected key:key=value'),
            ('=1', 'expected key:key=value'),
            ('a::b=1', 'expected key:key=value'),
            ('a:b=1', "'a' is a value here, not a block of keys"),
            ('c=!!python/object/apply:os.mkdir [hacked]', 'the tag !!python/object/apply:os.mkdir is not allowed'),
            ('c={d: 1, d: 2}', "the key 'd' is already set"),
        ],
    )
    def test_refused(self, entry, text):
        with pytest.raises(options.OptionError) as error:
            options.apply_overrides({'a': 5}, [entry])
        assert str(error.value).startswith(f'--force_yml {entry}: ') and text in str(error.value)
        assert not Path('hacked').exists()

    @pytest.mark.parametrize('key', ['compare', 'network_t', 'name', 'train:cl_opt'])
    def test_a_home_folder_that_the_shell_wrote(self, key, monkeypatch, tmp_path):
        monkeypatch.setenv('HOME', str(tmp_path))
        monkeypatch.setenv('USERPROFILE', str(tmp_path))
        text = message(write(dckd()), [f'{key}={tmp_path}'])
        assert text == (
            f'--force_yml {key}={tmp_path}: this is your home folder, which the shell wrote in the place of ~; '
            f'write {key}=null'
        )

    def test_a_home_folder_that_is_meant(self, monkeypatch, tmp_path):
        monkeypatch.setenv('HOME', str(tmp_path))
        monkeypatch.setenv('USERPROFILE', str(tmp_path))
        opt, _ = load(dckd(), f'datasets:train:dataroot_gt={tmp_path}')
        assert opt['datasets']['train']['dataroot_gt'] == str(tmp_path)

    def test_the_seed_can_be_overridden(self):
        assert load(dckd(), 'manual_seed=5')[0]['manual_seed'] == 5


@pytest.mark.parametrize('break_', ['\n', '\r\n', '\x1b[2J', '\u2028', '\t'])
def test_one_problem_is_one_line(break_, capsys):
    opt = dckd()
    opt['train'][f'a{break_}key'] = 1
    opt['network_g'][f'an{break_}argument'] = 1
    opt['datasets']['train']['dataroot_gt'] = f'some{break_}ew'
    opt['datasets'][f'val_{break_}'] = {**PAIRED, 'name': 'x'}
    opt['path']['pretrain_network_t'] = f'a{break_}b.pth'
    opt['val']['metrics'][f'p{break_}'] = {'type': f'no{break_}metric'}
    file = write(opt)
    problems = options.check(opt)[0]
    assert len(problems) >= 5 and message(file).count('\n') == len(problems)
    assert all(char.isprintable() for problem in problems for char in problem)
    assert options.main(['show', file]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 + len(problems)
    write(dckd())
    for text in (message(file, [f'scale=a{break_}b']), message(file, [f'a{break_}b']), message(f'no{break_}where.yml')):
        assert text.isprintable()


class TestFiles:
    def test_missing(self):
        write(dckd(), 'my_dckd.yml')
        here = f'no such file in {Path.cwd()}'
        assert message('my_dkcd.yml') == f"-opt my_dkcd.yml: {here} (did you mean 'my_dckd.yml'?)"
        assert message('nowhere/else.yml') == f'-opt nowhere/else.yml: {here}'
        assert message('/nowhere/else.yml') == '-opt /nowhere/else.yml: no such file'

    def test_missing_but_shipped(self):
        shipped = Path(options.__file__).parents[1] / 'options' / 'train_edsr_x4.yml'
        if not shipped.is_file():
            pytest.skip('the shipped option files are not beside the package')
        assert str(shipped) in message('train_esdr_x4.yml')

    def test_folder(self):
        assert message('HR') == '-opt HR: a folder, not a file'

    @pytest.mark.parametrize(
        ('content', 'text'),
        [
            (b'', '-opt x.yml: empty'),
            (b'# nothing\n', '-opt x.yml: empty'),
            (b'- 1\n- 2\n', '-opt x.yml: not made of `key: value` lines'),
            (b'text', '-opt x.yml: not made of `key: value` lines'),
            (b'\x80\x02\xff', '-opt x.yml: not a UTF-8 text file'),
            (b'\x00\x01', 'x.yml: '),
            (b'a: 1\na: 2', "x.yml: line 2: the key 'a' is already set in line 1"),
            (b'a: !!python/name:os.system', 'x.yml: line 1: the tag !!python/name:os.system'),
            (b'a: [1\nb: 2', 'x.yml: line 2'),
        ],
    )
    def test_bad_content(self, content, text):
        Path('x.yml').write_bytes(content)
        assert message('x.yml').startswith(text)

    def test_byte_order_mark_and_other_letters(self):
        text = safe_yaml.dump({**dckd(), 'name': 'größe_学'})
        Path('x.yml').write_bytes(b'\xef\xbb\xbf' + text.encode())
        assert options.load('x.yml')[0]['name'] == 'größe_学'


class TestCommandLine:
    def test_all_arguments(self):
        arguments = ['--launcher', 'none', '--auto_resume', '--debug', '--local-rank', '3']
        file = write(dckd())
        opt, args, warnings = options.parse(['-opt', file, *arguments, '--force_yml', 'scale=4', 'train:num_neg=1'])
        assert args.opt == file and args.local_rank == 3 and opt['auto_resume'] and opt['train']['num_neg'] == 1
        assert options.parse(['-opt', file, '--local_rank', '2'])[1].local_rank == 2
        assert warnings == []

    @pytest.mark.parametrize(('argv', 'code'), [(['--help'], 0), ([], 2), (['-opt', 'x', '--what'], 2)])
    def test_exits(self, argv, code, capsys):
        with pytest.raises(SystemExit) as error:
            options.parse(argv)
        assert error.value.code == code
        assert 'usage: dckd-train' in ''.join(capsys.readouterr())

    def test_more_arguments(self):
        command = options.parser(is_train=False)
        command.add_argument('--with_teacher', action='store_true')
        _, args, _ = options.parse(['-opt', write(dckd()), '--with_teacher'], False, command)
        assert args.with_teacher


class TestGPUs:
    @pytest.mark.parametrize(
        ('asked', 'there', 'launcher', 'used', 'warning'),
        [
            ('auto', 0, 'none', 0, None),
            (0, 4, 'none', 0, None),
            (1, 1, 'none', 1, None),
            ('auto', 1, 'none', 1, None),
            (1, 0, 'none', 0, 'num_gpu = 1: no GPU here, the CPU is used; the effective batch is 16 x 1 = 16'),
            (4, 1, 'none', 1, 'num_gpu = 4: 1 here; the effective batch is 16 x 1 = 16'),
            (4, 4, 'none', 1, 'num_gpu = 4: a run that torchrun did not start uses one; the effective batch is 16 x 1'),
            (4, 4, 'pytorch', 4, None),
            (8, 4, 'pytorch', 4, 'num_gpu = 8: 4 here; the effective batch is 16 x 2 = 32'),
            (4, 0, 'slurm', 0, 'num_gpu = 4: no GPU here, the CPU is used; the effective batch is 16 x 3 = 48'),
        ],
    )
    def test_upper_bound(self, asked, there, launcher, used, warning, monkeypatch):
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: there)
        monkeypatch.setenv('WORLD_SIZE', '2')
        monkeypatch.setenv('SLURM_NTASKS', '3')
        opt, warnings = load(dckd(), f'num_gpu={asked}', launcher=launcher)
        assert opt['num_gpu'] == used and opt['dist'] == (launcher != 'none')
        assert len(warnings) == bool(warning) and all(line.startswith(warning) for line in warnings)
        assert opt['datasets']['train']['batch_size_per_gpu'] == 16

    @pytest.mark.parametrize(
        ('overrides', 'here', 'used'),
        [
            (['device=cpu'], ['cpu', 'cuda'], 0),
            (['device=mps'], ['cpu', 'mps'], 1),
            (['device=xpu', 'num_gpu=0'], ['cpu', 'xpu'], 1),
            (['device=cuda', 'num_gpu=1'], ['cpu', 'cuda'], 1),
        ],
    )
    def test_device(self, overrides, here, used, monkeypatch):
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: int('cuda' in here))
        monkeypatch.setattr(devices, 'available', lambda: here)
        opt, warnings = load(dckd(), *overrides)
        assert opt['num_gpu'] == used and not warnings

    @pytest.mark.parametrize(
        ('overrides', 'launcher', 'said'),
        [
            (['device=mps'], 'none', 'device = mps: not usable here; expected one of cpu'),
            (['device=cuda'], 'none', 'device = cuda: not usable here; expected one of cpu'),
            (['device=gpu'], 'none', "device = gpu: expected 'cpu', 'cuda', 'mps' or 'xpu'"),
            (['device=cuda', 'num_gpu=0'], 'none', 'device = cuda: num_gpu is 0, which asks for the CPU'),
            (['device=xpu'], 'pytorch', 'device = xpu: trains in one process here, without --launcher pytorch'),
        ],
    )
    def test_devices_that_cannot_be(self, overrides, launcher, said, monkeypatch):
        if launcher != 'none' or 'num_gpu=0' in overrides:
            monkeypatch.setattr(devices, 'available', lambda: list(devices.KINDS))
        with pytest.raises(UserError) as error:
            load(dckd(), *overrides, launcher=launcher)
        assert said in str(error.value)

    def test_another_device_that_is_here_is_named(self, monkeypatch):
        monkeypatch.setattr(devices, 'available', lambda: ['cpu', 'mps'])
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
        _, warnings = load(dckd(), 'num_gpu=1')
        assert '(device: mps asks for what is here)' in warnings[0]


class TestDropIn:
    """BasicSR's files that gain a block of ours."""

    def opt(self, **blocks):
        return {**small(), 'num_gpu': 0, **blocks}

    @pytest.mark.parametrize('model_type', ['SRModel', 'SwinIRModel'])
    def test_each_block(self, model_type):
        source = dckd()
        vqgan = {'network_vqgan': source['network_vqgan'], 'path': {'pretrain_network_vqgan': 'vqgan.ckpt'}}
        teacher = {'network_t': source['network_t'], 'path': {'pretrain_network_t': 'teacher.pth'}}
        for key, needs in (('cl_opt', vqgan), ('ce_opt', vqgan), ('logits_opt', teacher), ('lcr_opt', teacher)):
            opt = self.opt(model_type=model_type, **needs)
            opt['train'][key] = source['train'][key]
            opt, warnings = load(opt)
            assert opt['model_type'] == 'DCKDModel'
            assert warnings[0].startswith(
                f'model_type = {model_type}: runs as DCKDModel, because the file has network_'
            )
            assert opt['train']['check_teacher'] is True and opt['train']['step'] == [1000, 2000, 3000]

    def test_unknown_keys_are_errors_then(self):
        opt = self.opt()
        opt['train']['cl_op'] = {'type': 'ContrasLoss'}
        assert message(write(opt)).startswith('opt.yml: train.cl_op = ')
        opt['network_t'] = {**EDSR, 'allow_random': True}
        assert 'train.cl_op = ' in message(write(opt)) and "did you mean 'cl_opt'?" in message(write(opt))

    def test_other_models_and_files_stay(self):
        assert load(self.opt())[0]['model_type'] == 'SRModel'
        opt = {**esrgan(), 'network_t': EDSR}
        opt, warnings = load(opt)
        assert opt['model_type'] == 'ESRGANModel' and warnings[0].startswith('network_t = ')

    def test_a_test_says_nothing(self):
        opt = self.opt(network_t=EDSR, datasets={'test': PAIRED}, path={'pretrain_network_g': 'teacher.pth'})
        opt, warnings = load(opt, is_train=False)
        assert opt['model_type'] == 'DCKDModel' and warnings == []


def test_older_names():
    opt = small()
    opt['datasets']['train'].update(use_flip=False, use_shuffle=True)
    opt['path'] = {'pretrain_model_g': 'teacher.pth', 'strict_load': False, 'ignore_resume_networks': 'network_t'}
    opt, warnings = load(opt, 'num_gpu=0')
    assert opt['datasets']['train']['use_hflip'] is False and 'use_shuffle' not in opt['datasets']['train']
    assert opt['path']['pretrain_network_g'] == 'teacher.pth' and opt['path']['strict_load_g'] is False
    assert len(warnings) == 5 and warnings[0] == 'path.strict_load: read as strict_load_g, its present name'


def test_a_resolved_file_loads_again():
    for opt in (dckd(), esrgan(), small()):
        first, _ = load(opt, 'train:optim_g:lr=1e-7', 'manual_seed=3')
        Path('resolved.yml').write_text(options.to_yaml(first), encoding='utf-8')
        second, warnings = options.load('resolved.yml')
        assert second == first and warnings == []


def test_check_leaves_the_dict_alone():
    opt = dckd()
    assert options.check(opt) == ([], []) and opt == dckd()
    opt['train']['num_neg'] = -1
    assert options.check(opt) == (['train.num_neg = -1: expected greater than or equal to 0'], [])


def test_a_test_needs_only_its_network():
    opt = dckd()
    opt['datasets'] = {'test_1': {'name': 'Set5', **PAIRED}}
    for name in ('t', 'vqgan'):
        opt['path'][f'pretrain_network_{name}'] = 'not_here.pth'
    del opt['train']['optim_g']
    opt, warnings = load(opt, 'path:pretrain_network_g=teacher.pth', is_train=False)
    assert warnings == [] and opt['path']['pretrain_network_t'] == 'not_here.pth'
    assert 'path.pretrain_network_g = no.pth: no such file' in message(
        'opt.yml', ['path:pretrain_network_g=no.pth'], is_train=False
    )
