"""What the benchmark counts is countable by hand, and what it compares with computes the same step."""

import json
import math
import statistics
from pathlib import Path

import option_files
import pytest
import small_run
import torch
from basicsr.models import build_model
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from dckd_sr import benchmark, precision, safe_yaml, speed, step_parts
from dckd_sr.errors import UserError
from dckd_sr.released import ReleasedStep

PEAKS = {'float32': 1e11, 'copy': 1e10}


@pytest.fixture
def quick(monkeypatch):
    """No slices of half a second, and no device to measure."""
    monkeypatch.setattr(benchmark, '_SLICE', 0)
    monkeypatch.setattr(step_parts, 'peaks', lambda run: PEAKS)


def option_file(**train):
    """A small DCKD run's option file; none of the files that it names is there."""
    folder = Path('elsewhere')
    folder.mkdir()
    opt = small_run.dckd_run(folder)
    opt['datasets']['train']['gt_size'] = 16
    opt['network_vqgan']['ddconfig'].update(num_res_blocks=2, attn_resolutions=[16])
    del opt['network_vqgan']['allow_random']
    opt['train']['cl_opt']['type'] = 'ContrasLoss'  # every level counts, at a student from random weights, too
    opt['train'].update(train)
    return small_run.write(opt)


def built(*overrides, **train):
    opt = benchmark.load(option_file(**train), overrides, 'cpu')
    model = benchmark.build(opt)
    model.feed_data(benchmark.batch_of(opt))
    return model


@pytest.mark.parametrize(
    'overrides, train',
    [
        ((), {}),
        (['network_vqgan:input_range=[-1, 1]'], {'ce_opt': {'type': 'CELoss', 'form': 'paper'}}),
        ((), {'lcr_opt': {'type': 'L1Loss'}, 'noisy': {'prob': 0.5}, 'neg_clean': False, 'ema_decay': 0}),
        ((), {'cl_opt': {'type': 'DynamicContrastiveLoss', 'weights': [0.5, 1.0]}}),
        ((), {'cl_opt': None, 'grad_clip': 0.01}),
        (['network_t=~'], {'logits_opt': None, 'ce_opt': None}),
    ],
)
def test_the_released_order_is_the_same_step(overrides, train):
    model = built(*overrides, **train)
    reference = ReleasedStep(model)
    differences, refused = benchmark.compare(model, reference, 1)
    assert refused is None
    assert set(differences['losses']) >= {'l_pix'} and max(differences['losses'].values()) < 3e-5
    assert differences['gradient'] < 2e-3
    if model.ema_decay:
        for ours, theirs in zip(model.net_g_ema.parameters(), reference.net_g_ema.parameters()):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_released_order_runs_the_encoder_image_by_image():
    model = built()
    reference, sizes = ReleasedStep(model), []
    reference.net_vqgan.encoder.conv_in.register_forward_hook(lambda net, x, out: sizes.append(len(out)))
    reference(1)
    # Student, teacher, the clean and two degraded negatives; then student and teacher again.
    assert sizes == [2] * 7


@pytest.mark.parametrize(
    'mode, overrides, expected',
    [
        ('released', (), (True, False)),
        ('released', ['use_tf32=true'], (True, False)),
        ('released', ['use_tf32=false'], (True, False)),
        ('model', ['use_tf32=true'], (True, True)),
        ('model', ['use_tf32=false'], (False, False)),
        ('float32', ['use_tf32=true'], (False, False)),
        ('float32', (), (False, False)),
    ],
)
def test_the_released_order_has_a_precision_of_its_own(mode, overrides, expected):
    model = built(*overrides, 'use_channels_last=true', 'use_checkpoint=true')
    ours = precision.tf32()
    reference, seen = ReleasedStep(model), []
    hook = lambda net, x, out: seen.append((precision.tf32(), out.is_contiguous()))  # noqa: E731
    for net in (reference.net_g, reference.net_t, reference.net_his, reference.net_vqgan.encoder.conv_in):
        net.register_forward_hook(hook)
    reference(1, mode)
    assert len(seen) == 10 and set(seen) == {(expected, True)}
    assert not any('forward' in vars(module) for module in reference.net_g.modules())
    assert precision.tf32() == ours
    precision.set_tf32(None)


@pytest.mark.parametrize('overrides', [['amp_bf16=true'], [], ['amp_networks=[teacher, encoder]']])
def test_the_released_order_has_mixed_precision_in_the_models_mode_only(overrides):
    model = built('use_amp=true', *overrides)
    reference, seen = ReleasedStep(model), {}
    for role, net in (
        ('student', reference.net_g.conv_first),
        ('teacher', reference.net_t.conv_first),
        ('history', reference.net_his.conv_first),
        ('encoder', reference.net_vqgan.encoder.conv_in),
    ):
        net.register_forward_hook(lambda net, x, out, role=role: seen.setdefault(role, set()).add(out.dtype))
    before = [parameter.clone() for parameter in reference.net_g.parameters()]
    reference.scaler = torch.amp.GradScaler('cpu', init_scale=16, enabled=model.run.scaler is not None)
    losses = reference(1, 'model')
    half = {model.run.dtype}
    assert seen == {role: half if role in model.run.amp else {torch.float32} for role in speed.ROLES}
    assert all(math.isfinite(value) for value in losses.values())
    moved = [not torch.equal(a, b) for a, b in zip(before, reference.net_g.parameters())]
    assert any(moved)
    seen.clear()
    reference(2)
    assert set.union(*seen.values()) == {torch.float32}


def test_columns_share_nothing_that_a_step_changes():
    model = built()
    reference = ReleasedStep(model)
    ours = {step_parts._key(tensor) for tensor in step_parts.tensors_of(model)}
    assert len(ours) > 20
    assert not ours & {step_parts._key(tensor) for tensor in step_parts.tensors_of(reference)}


@ARCH_REGISTRY.register()
class OneConvolution(nn.Module):
    def __init__(self, num_in_ch=3):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)

    def forward(self, x):
        return self.conv(x)


def one_convolution():
    return build_model(
        {
            'model_type': 'KDModel',
            'num_gpu': 0,
            'network_g': {'type': 'OneConvolution'},
            'network_t': {'type': 'OneConvolution'},
            'train': {
                'optim_g': {'type': 'SGD', 'lr': 1e-2},
                'pixel_opt': {'type': 'L1Loss'},
                'logits_opt': {'type': 'L1Loss'},
            },
        }
    )


def test_counts_are_those_of_a_hand():
    model = one_convolution()
    batch = {name: torch.rand(2, 3, 5, 7) for name in ('lq', 'gt')}
    model.feed_data(batch)
    flops, moved = step_parts.account(model, batch, 1)
    convolution = 2 * (3 * 3 * 3) * (2 * 3 * 5 * 7)
    counts = {part: tuple(kinds.values()) for part, kinds in flops.items()}
    # The batch needs no gradient.
    assert counts['student'] == counts['teacher'] == counts['backward'] == (convolution, 0)
    assert counts['losses'] == counts['optimizer'] == counts['data'] == (0, 0)
    image, weight = 4 * 2 * 3 * 5 * 7, 4 * 3 * 3 * 3 * 3
    assert moved['student'] == moved['teacher'] == image + weight + image
    # SGD reads gradient and weight, and writes the weight.
    assert moved['optimizer'] == pytest.approx(3 * weight, abs=64)  # and a few single numbers
    # Both losses read the student's output, one the GT and one the teacher's; each keeps what backward needs.
    assert 3 * image <= moved['losses'] <= 5 * image + 64


def test_what_ends_with_its_stretch_is_no_traffic():
    known, ledger = torch.rand(1000), step_parts.Ledger(set())
    ledger.seen.add(step_parts._key(known))
    with ledger:
        ledger.close()
        middle = known + 1
        kept = middle * 2
        del middle
        assert ledger.close() == 4000 + 4000
        kept.view(10, 100)
        assert ledger.close() == 8000
        known.add_(kept)
        assert ledger.close() == 8000 + 2 * 4000 + 4000


def test_memory_is_what_a_step_holds_and_makes():
    weight = torch.rand(1000)

    def step():
        first = weight + 1
        second = first + 1
        del first
        return second + 1

    assert step_parts.peak_memory(step, [weight, weight.view(10, 100)], torch.device('cpu')) == 3 * 4000
    assert step_parts.peak_memory(step, [], torch.device('cpu'), others=[weight]) == 2 * 4000


def test_parts_follow_each_other_and_the_model_stays_as_it_was():
    model = built()
    batch = {'lq': model.lq, 'gt': model.gt}
    before = {name: value for name, value in vars(model).items() if name not in ('log_dict', 'lq', 'gt')}
    clock = iter(range(10**6))
    borders = step_parts.parts_of_step(model, batch, 1, lambda: next(clock))
    after = {name: value for name, value in vars(model).items() if name not in ('log_dict', 'lq', 'gt')}
    assert after == before and 'scaled' not in vars(model.steps)
    order = [part for part, _ in borders.marks if part not in (None, 'losses')]
    assert [part for i, part in enumerate(order) if part not in order[:i]] == [
        'data', 'optimizer', 'student', 'teacher', 'encoder_grad', 'history', 'encoder_no_grad', 'backward',
    ]  # fmt: skip
    assert order[-1] == 'optimizer'
    sums = borders.sums(lambda earlier, later: later - earlier)
    assert set(sums) == set(step_parts.PARTS) and sum(sums.values()) == len(borders.marks) - 1


def test_steps_take_turns(monkeypatch):
    calls = []

    class Column:
        device, run = torch.device('cpu'), None

        def feed_data(self, batch):
            pass

        def optimize_parameters(self, iteration):
            calls.append(('ours', iteration))

    monkeypatch.setattr(benchmark, '_SLICE', 0)
    rows, following = benchmark.alternate(Column(), [lambda i: calls.append(('released', i))], None, 5, 7)
    turns = [name for name, _ in calls[-10:]]
    assert turns == ['released', 'ours', 'ours', 'released', 'released', 'ours', 'ours', 'released', 'released', 'ours']
    assert [iteration for _, iteration in calls] == list(range(7, following))
    assert len(rows) == 5 and all(len(row) == 2 for row in rows)


def test_step_reports_every_field(quick, capsys):
    assert benchmark.main(['step', '-opt', option_file(), '--device', 'cpu', '--batch', '3', '--json', '-']) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {
        'command', 'option_file', 'model_type', 'device', 'machine', 'threads', 'torch', 'options', 'batch', 'lq', 'gt',
        'parts', 'step', 'peaks', 'wait_for_data', 'released', 'differences', 'refused', 'ratio_to_released',
        'released_at_equal_precision', 'ratio_at_equal_precision',
    }  # fmt: skip
    assert result['lq'] == [3, 3, 8, 8] and result['gt'] == [3, 3, 16, 16]
    assert set(result['parts']) == set(step_parts.PARTS)
    for row in result['parts'].values():
        assert set(row) == {'seconds', 'flops', 'tflops', 'bytes', 'precision', 'floor_seconds', 'times_floor'}
        floor = max(row['flops'] / PEAKS['float32'], row['bytes'] / PEAKS['copy'])
        assert row['floor_seconds'] == pytest.approx(floor)
    assert result['step']['flops'] == sum(row['flops'] for row in result['parts'].values())
    assert result['step']['peak_memory'] > 1e6
    released = result['released']
    assert released['flops'] > result['step']['flops'] and len(released['pairs']) == 5
    assert result['ratio_to_released'] == statistics.median(theirs / ours for theirs, ours in released['pairs'])
    assert result['released_at_equal_precision'] is None  # it is as released
    assert result['ratio_at_equal_precision'] == result['ratio_to_released']
    assert released['ratio_min'] <= released['ratio'] <= released['ratio_max']
    assert set(result['differences']) == {'losses', 'gradient'} and result['refused'] is None


def test_step_prints_a_table_and_writes_the_figures(quick, capsys):
    arguments = ['step', '-opt', option_file(), '--device', 'cpu', '--pairs', '0', '--json', 'figures.json']
    assert benchmark.main(arguments) == 0
    out = capsys.readouterr().out
    for text in (*step_parts.PARTS.values(), 'whole step', 'TFLOP/s', 'x floor', 'peak memory', 'GB/s (copy)'):
        assert text in out
    assert 'ratio_to_released' not in out
    assert json.loads(Path('figures.json').read_text())['ratio_to_released'] is None


def test_another_precision_has_a_column_of_its_own(quick, capsys, monkeypatch):
    modes, step = [], ReleasedStep.__call__
    monkeypatch.setattr(step_parts, 'peaks', lambda run: {**PEAKS, 'bfloat16': 1e12})
    monkeypatch.setattr(ReleasedStep, '__call__', lambda self, i, mode: modes.append(mode) or step(self, i, mode))
    overrides = ['use_amp=true', 'amp_bf16=true', 'amp_networks=[teacher]']
    arguments = ['step', '-opt', option_file(), '--device', 'cpu', '--json', 'figures.json']
    assert benchmark.main([*arguments, '--force_yml', *overrides]) == 0
    out, result = capsys.readouterr().out, json.loads(Path('figures.json').read_text())
    assert 'ratio_to_released' in out and 'ratio_at_equal_precision' in out
    assert result['parts']['teacher']['precision'] == 'bfloat16'
    equal = result['released_at_equal_precision']
    assert modes[0] == 'float32' and modes.count('model') == modes.count('released') > 5
    assert result['ratio_at_equal_precision'] == equal['ratio'] and equal['pairs'] != result['released']['pairs']
    assert [row[1] for row in equal['pairs']] == [row[1] for row in result['released']['pairs']]


@pytest.mark.parametrize(
    'overrides, device, bounds',
    [
        ((), 'cpu', (1e-4, 1e-2)),
        (['use_tf32=true'], 'cpu', (1e-4, 1e-2)),  # there is none on CPUs
        (['use_amp=true', 'amp_bf16=true'], 'cpu', (5e-2, 0.5)),
        ((), 'cuda', (5e-2, 0.5)),
        (['use_tf32=true'], 'cuda', (5e-2, 0.5)),
        (['use_tf32=false'], 'cuda', (1e-4, 1e-2)),
    ],
)
def test_what_must_be_equal_depends_on_the_precision(overrides, device, bounds, monkeypatch):
    model = built(*overrides)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: (9, 0))
    monkeypatch.setattr(model, 'device', torch.device(device))
    reference = ReleasedStep(model)
    monkeypatch.setattr(reference, 'contrast', lambda *features: features[0][0].mean().abs() + 1)
    assert benchmark.compare(model, reference, 1)[1].endswith(f'(allowed: {bounds[0]:g} and {bounds[1]:g})')
    precision.set_tf32(None)


def test_floors_know_convolutions_from_products():
    run = speed.Speed({}, 'cpu')
    assert step_parts.precisions(run, 'student') == {'convolutions': 'float32', 'products': 'float32'}
    run = speed.Speed({'use_amp': True, 'amp_bf16': True, 'amp_networks': ['encoder']}, 'cpu')
    assert set(step_parts.precisions(run, 'backward').values()) == {'bfloat16'}
    assert set(step_parts.precisions(run, 'teacher').values()) == {'float32'}


def test_no_ratio_to_another_step(quick, monkeypatch, capsys):
    monkeypatch.setattr(ReleasedStep, 'contrast', lambda self, *features: features[0][0].mean())
    assert benchmark.main(['step', '-opt', option_file(), '--device', 'cpu']) == 1
    out = capsys.readouterr().out
    assert 'no ratio to the released order: losses differ by' in out and 'ratio_to_released' not in out


def test_the_loader_of_the_data_is_waited_for(quick, monkeypatch):
    path = option_file()
    monkeypatch.chdir('elsewhere')
    result = benchmark.step(Path('..', path), 2, 'cpu', 0, use_data=True)
    assert 0 < result['wait_for_data'] <= result['parts']['data']['seconds']
    assert 'the loader is waited for' in benchmark.step_table(result)


def test_infer_reports_both_networks(capsys):
    opt = safe_yaml.parse(Path(option_file()).read_text())
    opt['network_g'] = opt['network_t'] = {'type': 'OneConvolution'}
    opt['scale'] = 1
    small_run.write(opt)
    assert benchmark.main(['infer', '-opt', 'opt.yml', '--device', 'cpu', '--json', 'figures.json']) == 0
    table = capsys.readouterr().out
    assert 'student, OneConvolution  teacher, OneConvolution' in table and 'multiply-adds, G' in table
    result = json.loads(Path('figures.json').read_text())
    assert result['output'] == [720, 1280] and list(result['networks']) == ['student', 'teacher']
    for row in result['networks'].values():
        assert row['parameters'] == 81 and row['multiply_adds'] == 27 * 3 * 720 * 1280
        assert row['flops'] == 2 * row['multiply_adds']
        assert row['latency'] > 0 and row['images_per_second'] > 0
        assert row['peak_memory'] == 4 * 81 + 2 * 4 * 3 * 720 * 1280


@pytest.mark.parametrize(
    'name', ['train_swinir_x4', 'train_rcan_x2', 'train_nafnet_deblur', 'train_restormer_derain', 'demo/distill']
)
def test_shipped_files_need_nothing(name):
    opt = benchmark.load(name, (), 'cpu')
    assert opt['model_type'] == 'DCKDModel' and opt['network_t']['type'] != 'spandrel'
    assert not any(key.startswith('pretrain') for key, value in opt['path'].items() if value is not None)
    size, scale = opt['datasets']['train']['gt_size'], opt['scale']
    opt['datasets']['train']['batch_size_per_gpu'] = 1
    shapes = [tuple(images.shape) for images in benchmark.batch_of(opt).values()]
    assert shapes == [(1, 3, size // scale, size // scale), (1, 3, size, size)]


def test_files_of_the_released_code_and_of_tests_do():
    Path('opt.yml').write_text(safe_yaml.dump(option_files.dckd()))
    assert benchmark.load('opt.yml', (), 'cpu')['datasets']['train']['batch_size_per_gpu'] == 16
    assert benchmark.load('test_rcan_x3', (), 'cpu', networks_only=True)['network_t']['num_block'] == 20


def test_a_teacher_that_only_its_file_describes_must_be_there():
    with pytest.raises(UserError, match=r'^network_t.path = other.pth: no such file'):
        benchmark.load('train_rcan_x2', ['network_t:path=other.pth'], 'cpu')


@pytest.mark.parametrize(
    'arguments, said',
    [
        ([], 'required: COMMAND'),
        (['step'], 'required: -opt/--opt'),
        (['step', '-opt', 'train_swinir'], '-opt train_swinir: no such file in'),
        (['step', '-opt', 'train_swinir_x4', '--device', 'tpu'], '--device tpu: expected cuda or cpu'),
        (['step', '-opt', 'train_swinir_x4', '--batch', '0'], '--batch 0: expected at least 1'),
        (['infer', '-opt', 'train_swinir_x4', '--batch', '-1'], '--batch -1: expected at least 1'),
        (['step', '-opt', 'train_swinir_x4', '--pairs', '3'], '--pairs 3: expected at least 5, or 0'),
        (['step', '-opt', 'demo/scratch', '--device', 'cpu'], 'SRModel is not known to the benchmark'),
        (['step', '-opt', 'train_edsr_x4', '--force_yml', 'datasets:train:gt_size=~'], 'gt_size'),
        (
            ['step', '-opt', 'train_edsr_x4', '--json', 'nowhere/figures.json'],
            '--json nowhere/figures.json: no such folder',
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, said, capsys):
    assert benchmark.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and said in error and error.count('\n') == 1


def test_the_option_file_is_not_written_over(capsys):
    file = Path(option_file())
    text = file.read_text()
    Path('link.json').symlink_to(file)
    assert benchmark.main(['step', '-opt', str(file), '--device', 'cpu', '--json', 'link.json']) == 2
    assert '--json link.json: the option file itself' in capsys.readouterr().err
    assert file.read_text() == text


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_cuda_is_not_made_up(capsys):
    assert benchmark.main(['step', '-opt', 'train_swinir_x4', '--device', 'cuda']) == 2
    assert capsys.readouterr().err == 'error: --device cuda: there is no GPU here\n'
