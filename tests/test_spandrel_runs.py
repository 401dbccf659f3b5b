"""Option files with ``type: spandrel``: checks before training, a run, resuming it, testing it."""

import copy
import json
import re
from pathlib import Path

import option_files
import pytest
import torch
from basicsr.archs import build_network
from small_run import dckd_run, edsr, write

from dckd_sr import options, train
from dckd_sr import test as command


def save(block, path):
    torch.manual_seed(1)
    net = build_network(dict(block))
    torch.save({'params': net.state_dict()}, path)
    return net


@pytest.fixture
def opt(tmp_path):
    """A run whose teacher is the file alone."""
    opt = dckd_run(tmp_path)
    del opt['path']
    opt['network_t'] = {'type': 'spandrel', 'path': 'teacher.pth'}
    return opt


def last_weights(run):
    return torch.load(f'experiments/{run}/models/net_g_4.pth', weights_only=True)['params']


def test_a_teacher_file_trains_like_its_options_and_resumes(opt):
    plain = copy.deepcopy(opt)
    plain.update(name='plain', network_t=edsr(16), path={'pretrain_network_t': 'teacher.pth'})
    assert train.main(['-opt', write(plain)]) == 0
    opt['train']['total_iter'] = 2
    assert train.main(['-opt', write(opt)]) == 0
    opt['train']['total_iter'] = 4
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    log = ''.join(path.read_text() for path in Path('experiments/run').glob('train_run_*.log'))
    assert 'Resuming from' in log and 'random weights' not in log
    expected, found = last_weights('plain'), last_weights('run')
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert options.load('experiments/run/resolved.yml')[0]['network_t'] == opt['network_t']


def test_testing_files(opt, capsys):
    save(edsr(), 'student.pth')
    opt['network_g'] = {'type': 'spandrel', 'path': 'student.pth'}
    assert command.main(['-opt', write(opt), '--with_teacher']) == 0
    [result] = Path('results/run').glob('*.json')
    text = result.read_text()
    assert 'student' in json.dumps(json.loads(text)) and 'teacher' in text
    table = next(Path('results/run').glob('*.md')).read_text()
    assert 'student: student.pth' in table and 'teacher: teacher.pth' in table
    Path('teacher.pth').unlink()
    assert command.main(['-opt', write(opt)]) == 0  # nothing needs it
    assert command.main(['-opt', write(opt), '--with_teacher']) == 2
    assert 'network_t.path = teacher.pth: no such file' in capsys.readouterr().err


def test_a_student_file_is_trained_further(opt):
    net = save(edsr(), 'student.pth')
    opt['network_g'] = {'type': 'spandrel', 'path': 'student.pth'}
    opt['train']['optim_g']['lr'] = 1e-12
    assert train.main(['-opt', write(opt)]) == 0
    for key, value in last_weights('run').items():
        torch.testing.assert_close(value, net.state_dict()[key], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What is said before training

SR = {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1}


@pytest.mark.parametrize(
    'teacher, block, problem',
    [
        (
            {'type': 'EDSR', **SR, 'upscale': 2},
            {},
            'network_t.upscale = 2: differs from scale = 4 (told by t.pth)',
        ),
        (
            {'type': 'RCAN', **SR, 'squeeze_factor': 4, 'num_group': 1, 'upscale': 4, 'num_in_ch': 1, 'num_out_ch': 1},
            {},
            'network_t.num_in_ch = 1: network_g.num_in_ch = 3: another input; '
            'network_t.num_out_ch = 1: network_g.num_out_ch = 3: another output',
        ),
        (
            {'type': 'EDSR', **SR, 'upscale': 4},
            {'res_scal': 0.1},
            "network_t.path = t.pth: holds EDSR, which has no option res_scal (did you mean 'res_scale'?)",
        ),
        ({'type': 'EDSR', **SR, 'upscale': 4}, {'path': None}, 'network_t.path = ~: expected a file'),
        (
            {'type': 'EDSR', **SR, 'upscale': 4},
            {'path': 'absent.pth'},
            'network_t.path = absent.pth: no such file in HERE',
        ),
        (
            {'type': 'VGGStyleDiscriminator', 'num_in_ch': 3, 'num_feat': 8},
            {},
            'network_t.path = t.pth: is of no arch that is recognised: give network_t its type and options, and '
            'path.pretrain_network_t the file; its first keys are conv0_0.weight, conv0_0.bias, conv0_1.weight',
        ),
    ],
)
def test_mistakes_are_one_line_each(tmp_path, teacher, block, problem):
    option_files.make_files(tmp_path)
    save(teacher, 't.pth')
    opt = option_files.dckd()
    del opt['path']['pretrain_network_t'], opt['path']['param_key_t'], opt['path']['strict_load_t']
    opt['network_t'] = {'type': 'spandrel', 'path': 't.pth', **block}
    assert '; '.join(option_files.problems_of(opt)) == problem.replace('HERE', str(tmp_path))


def test_what_a_file_tells_is_used(tmp_path):
    option_files.make_files(tmp_path)
    swinir = {'type': 'SwinIR', 'upscale': 4, 'in_chans': 3, 'img_size': 16, 'window_size': 8, 'depths': [2]}
    swinir |= {'embed_dim': 12, 'num_heads': [2], 'mlp_ratio': 2, 'upsampler': 'pixelshuffle'}
    save(swinir, 't.pth')
    opt = option_files.dckd()
    del opt['path']['pretrain_network_t'], opt['val']['window_size']
    opt['network_t'] = {'type': 'spandrel', 'path': 't.pth'}
    found, warnings = option_files.load(opt)
    assert not [line for line in warnings if 'network_t' in line]
    opt['datasets']['train']['gt_size'] = 48
    [problem] = option_files.problems_of(opt)
    assert re.fullmatch(r'datasets.train.gt_size = 48: expected a multiple of .*window_size, 4 x 8', problem)
