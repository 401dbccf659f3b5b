"""Memory of a step on a GPU that is not there: counting against bytes added up by hand, and against real tensors."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from small_run import edsr

from dckd_sr import benchmark, complexity, fake_gpu, step_memory
from dckd_sr.errors import UserError
from dckd_sr.step_memory import GIB, Living, predict, stages

SMALL = (
    'network_g:num_feat=8',
    'network_g:num_block=1',
    'network_t:num_feat=16',
    'network_t:num_block=1',
    'network_vqgan:ddconfig:ch=32',
    'datasets:train:gt_size=64',
    'datasets:train:batch_size_per_gpu=2',
)


@pytest.fixture(autouse=True)
def _compiler():
    try:
        fake_gpu.load()
    except UserError as error:
        pytest.skip(str(error))


def test_bytes_are_counted_in_blocks_until_they_are_freed():
    with fake_gpu.fake_gpu(), Living() as living:
        torch.rand(10**6)  # not on the GPU
        assert living.now == 0
        x = torch.rand(1000, device='cuda')  # 4000 bytes
        y = x.view(10, 100).T.add_(1)  # the same ones
        assert living.now == 4096
        z = y.half().contiguous()  # 2000 bytes, twice for a moment
        assert (living.now, living.peak) == (4096 + 2048, 4096 + 2 * 2048)
        del x
        assert living.now == 4096 + 2048  # y has them
        del y, z
        assert living.now == 0


def test_a_backward_pass_by_hand():
    n = 1024
    with fake_gpu.fake_gpu(), Living() as living:
        x = torch.rand(n, device='cuda', requires_grad=True)
        y = x.exp().sin().sum()  # keeps exp's output, which sin has, too; not sin's
        assert living.now == 4 * n + 4 * n + 512  # x, exp, the sum
        living.peak = living.now
        y.backward()
        assert x.grad.shape == (n,)
        del y
        assert living.now == 2 * 4 * n  # x and its gradient


def test_a_forward_pass_needs_what_real_tensors_need():
    torch.manual_seed(0)
    net, shape = build_network(edsr(8)).eval(), (2, 3, 24, 24)
    real = complexity.peak_memory(net, shape)
    with fake_gpu.fake_gpu(), torch.no_grad(), Living() as living:
        fake = build_network(edsr(8)).eval().to('cuda')
        fake(torch.rand(shape, device='cuda'))
    assert real <= living.peak < 1.02 * real + 30 * 512  # blocks


def a_training(device):
    """Three steps of a small network, whose weights weigh as much as its activations."""
    net = torch.nn.Sequential(*(torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.LayerNorm(256)) * 2).to(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, foreach=False)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.zeros(512, 256, device=device)).square().mean().backward()
        optimizer.step()


def test_a_whole_step_needs_what_torchs_profiler_counts_of_real_tensors():
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as found:
        a_training('cpu')
    now = real = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == '[memory]':
            now += event.nbytes()
            real = max(real, now)
    with fake_gpu.fake_gpu(), Living() as living:
        a_training('cuda')
    assert real > 4 * 512 * 256 * 4 and living.peak == pytest.approx(real, rel=0.02)


def test_a_step_of_the_shipped_kind():
    whole = predict('train_edsr_x4', None, SMALL)
    student = sum(p.numel() for p in build_network({**edsr(8, 4), 'num_block': 1}).parameters())
    for name in ('net_g', 'net_g_ema', 'net_his', 'gradients'):
        assert 4 * student <= whole['held'][name] < 4 * student + 40 * 512, name
    assert 8 * student <= whole['held']['optimiser'] < 8 * student + 80 * 512
    assert whole['batch'] == 2 and sum(whole['held'].values()) < whole['peak'] <= whole['peak_measuring']
    assert whole['where'] == 'backward' or '.py:' in whole['where']
    less = predict('train_edsr_x4', None, (*SMALL, 'train:negatives_micro_batch=1'))
    half = predict('train_edsr_x4', None, (*SMALL, 'use_amp=true', 'amp_bf16=true'))
    twice = predict('train_edsr_x4', 4, SMALL)
    assert less['peak'] < whole['peak'] > half['peak'] and less['held'] == whole['held']
    assert 1.7 < (twice['peak'] - sum(whole['held'].values())) / (whole['peak'] - sum(whole['held'].values())) < 2.1
    accumulated = predict('train_edsr_x4', 1, (*SMALL, 'train:accum_iter=2'))
    assert accumulated['peak'] < whole['peak'] and accumulated['accum_iter'] == 2


@pytest.mark.parametrize(
    ('data', 'expected'),
    [
        ({'batch_size_per_gpu': 4, 'gt_size': 64}, (4, 64)),
        ({'gt_size': 64}, (1, 64)),
        ({'mini_batch_sizes': [8, 5, 1], 'gt_sizes': [128, 160, 384], 'gt_size': 384}, (1, 384)),
        ({'mini_batch_sizes': [8, 5, 1], 'gt_sizes': [256, 160, 384]}, (8, 256)),
        ({'mini_batch_sizes': [2, 6], 'gt_size': 96}, (6, 96)),
        ({'batch_size_per_gpu': 3, 'gt_sizes': [64, 96]}, (3, 96)),
        ({'batch_size_per_gpu': 3}, (3, None)),
    ],
)
def test_the_largest_stage(data, expected):
    assert stages(data) == expected


@ARCH_REGISTRY.register()
class DecidesByValues(torch.nn.Conv2d):
    def __init__(self, num_in_ch=3, upscale=4):
        super().__init__(3, 3, 1)

    def forward(self, x):
        x = torch.nn.functional.interpolate(x, scale_factor=4)
        return super().forward(x if x.mean() > 0.5 else x * 2)


def test_what_values_decide_is_a_guess():
    small = tuple(key for key in SMALL if not key.startswith('network_g'))
    found = predict('train_edsr_x4', None, (*small, 'network_g={type: DecidesByValues}'))
    assert found['guessed'] and predict('train_edsr_x4', None, SMALL)['guessed'] == []
    result = {'option_file': 'f', 'variants': [{'with': [], **found}]}
    assert 'a guess: there are no values here' in step_memory.table(result)


def test_validation_has_the_largest_image_that_is_there():
    for name, size in (('a', (32, 20)), ('b', (52, 40)), ('c', (12, 60))):
        Path('sets').mkdir(exist_ok=True)
        cv2.imwrite(f'sets/{name}.png', np.zeros((*size, 3), np.uint8))
    folder = 'datasets:val_1:dataroot_gt=sets'
    found = predict('train_edsr_x4', None, (*SMALL, folder), validates=True)
    held = sum(found['held'].values())
    assert found['validation']['lq'] == [13, 10] and found['validation']['is_there']
    # LQ, and the output and a map of 8 channels at full size, at least; less than a step.
    assert held + 4 * 52 * 40 * 11 < found['validation']['peak'] < found['peak']
    found = predict('train_edsr_x4', None, (*SMALL, 'datasets:val_1:dataroot_gt=nowhere'), validates=True)
    assert found['validation']['lq'] == [180, 320] and not found['validation']['is_there']
    assert 'LQ 320x180 (assumed' in step_memory.table({'option_file': 'f', 'variants': [{'with': [], **found}]})


def test_what_fits_leaves_room():
    assert step_memory.fits(10 * GIB) == pytest.approx(11.7)
    assert step_memory.fits(0) == pytest.approx(0.7)


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(step_memory, 'SAVINGS', step_memory.SAVINGS[:1])
    arguments = ['step', '--memory', '-opt', 'train_edsr_x4', '--force_yml', *SMALL]
    assert benchmark.main([*arguments, '--json', 'memory.json']) == 0
    printed = capsys.readouterr().out
    result = json.loads(open('memory.json').read())
    kinds = [tuple(variant['with']) for variant in result['variants']]
    assert kinds[:2] == [(), ('train:negatives_micro_batch=1',)] and kinds[2][0] == 'batch 1' and len(kinds) == 3
    first = result['variants'][0]
    assert f'{first["peak"] / GIB:.2f}' in printed and 'the file as it is' in printed and '24 GB' in printed
    assert first['card_gb'] == round(step_memory.fits(first['peak']), 2)


def test_mistakes_are_one_line(capsys, monkeypatch):
    arguments = ['step', '--memory', '-opt', 'train_edsr_x4', '--force_yml', *SMALL]
    assert benchmark.main([*arguments, 'datasets:train:gt_size=null']) == 2
    assert 'datasets.train.gt_size: missing' in capsys.readouterr().err

    def broken(*arguments, **options):
        raise RuntimeError('values are asked for\nand more')

    monkeypatch.setattr(benchmark, 'build', broken)
    assert benchmark.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.strip().endswith('cannot run on tensors without values: values are asked for') and said.count('\n') == 1


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'datasets:train:mini_batch_szes': '[16]'}, "unknown key (did you mean 'mini_batch_sizes'?)"),
        ({'datasets:train:gt_sizes': '[32, a]'}, 'datasets.train.gt_sizes'),
        ({'datasets:train:mini_batch_sizes': '8'}, 'datasets.train.mini_batch_sizes = [8]: '),
        ({'train': '[1]'}, 'train = [1]: expected a block'),
        ({'datasets': '[1]'}, 'datasets = [1]: expected a block'),
        ({'scale': 'null'}, 'scale'),
        ({'device': 'cuda:1'}, 'device = cuda:1: expected'),
    ],
)
def test_mistakes_in_a_file_are_not_blamed_on_networks(changes, said, capsys):
    small = {key: value for key, _, value in (part.partition('=') for part in SMALL)}
    if 'train' in changes or 'datasets' in changes:
        small = {key: value for key, value in small.items() if not key.startswith('datasets')}
    arguments = [f'{key}={value}' for key, value in {**small, **changes}.items()]
    for memory in ([], ['--memory']):
        assert benchmark.main(['step', *memory, '-opt', 'train_edsr_x4', '--force_yml', *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and 'values' not in error.partition('did you mean')[0].partition('expected')[0], error


def test_a_teacher_cache_spares_the_teacher():
    large = ('network_t:num_feat=64', 'network_t:num_block=4', 'network_vqgan=null', 'train:cl_opt=null')
    arguments = (*SMALL, *large, 'train:ce_opt=null', 'network_his=null', 'network_vqgan=null')
    arguments = tuple(key for key in arguments if not key.startswith('network_vqgan:'))
    live = predict('train_edsr_x4', None, arguments)
    cached = predict('train_edsr_x4', None, (*arguments, 'datasets:train:teacher_cache=cache.lmdb'))
    assert cached['peak'] < live['peak']


@pytest.mark.parametrize('more', [['--device', 'cpu'], ['--data']])
def test_what_memory_does_not_take(more, capsys):
    assert benchmark.main(['step', '--memory', '-opt', 'train_edsr_x4', *more]) == 2
    assert 'leave --device and --data out' in capsys.readouterr().err
