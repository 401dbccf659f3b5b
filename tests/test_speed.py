"""What precision, memory format, compilation and checkpointing change in a step, and what they must not change."""

import copy
import logging

import pytest
import torch
from basicsr.models import build_model
from basicsr.utils import get_root_logger
from small_run import SWINIR, VQGAN, edsr
from torch import nn

import dckd_sr  # noqa: F401
from dckd_sr import benchmark, precision
from dckd_sr.errors import UserError
from dckd_sr.speed import Speed, _blocks

DIRECT = {**SWINIR, 'upsampler': 'pixelshuffledirect'}


def model_with(train=None, network_g=None, **top):
    """A small DCKD model whose history differs from its student."""
    torch.manual_seed(0)
    model = build_model(
        copy.deepcopy(
            {
                'model_type': 'DCKDModel',
                'scale': 2,
                'num_gpu': 0,
                'manual_seed': 1,
                'network_g': network_g or edsr(),
                'network_t': edsr(16),
                'network_vqgan': VQGAN,
                'train': {
                    'ema_decay': 0.9,
                    'optim_g': {'type': 'SGD', 'lr': 1e-2},
                    'scheduler': {'type': 'MultiStepLR', 'milestones': [100]},
                    'pixel_opt': {'type': 'L1Loss'},
                    'logits_opt': {'type': 'L1Loss'},
                    'cl_opt': {'type': 'ContrasLoss', 'loss_weight': 0.1, 'weights': [0.5, 1.0]},
                    'ce_opt': {'type': 'DistributionMappingLoss', 'loss_weight': 0.1},
                    'num_neg': 3,
                    'gaussian_noise_prob': 1.0,
                    **(train or {}),
                },
                **top,
            }
        )
    )
    with torch.no_grad():
        for parameter in model.net_his.parameters():
            parameter.mul_(0.9)
    return model


def step(model, iteration=1):
    """One iteration: (losses, gradient of the student as one vector)."""
    generator = torch.Generator().manual_seed(iteration)
    lq, gt = (torch.rand(2, 3, side, side, generator=generator) for side in (16, 32))
    model.feed_data({'lq': lq, 'gt': gt})
    model.steps.begin(iteration)
    model.optimize_parameters(iteration)
    return model.get_current_log(), torch.cat([p.grad.flatten() for p in model.net_g.parameters()])


def difference(model, reference):
    """Largest relative difference of a loss, and 1 - cosine of the gradients, in one step of two models."""
    (losses, gradient), (expected, true) = step(model), step(reference)
    assert losses.keys() == expected.keys()
    off = max(abs(losses[name] - value) / abs(value) for name, value in expected.items())
    # In float32 the cosine of a gradient with itself is off by more than some of the bounds, on some processors.
    return off, 1 - torch.cosine_similarity(gradient.double(), true.double(), dim=0).item()


@pytest.mark.parametrize(
    'top, loss_bound, gradient_bound, least',
    [
        ({'use_amp': True, 'amp_bf16': True}, 2e-2, 1e-2, 1e-5),
        ({'use_amp': True, 'amp_bf16': True, 'amp_networks': ['teacher']}, 1e-2, 5e-3, 1e-7),
        ({'use_amp': True}, 3e-3, 1e-3, 1e-6),
        ({'use_channels_last': True}, 1e-5, 1e-5, 0),
        ({'use_checkpoint': True}, 1e-6, 1e-7, 0),
        ({'use_tf32': True}, 1e-6, 1e-7, 0),
    ],
)
def test_modes_stay_near_float32(top, loss_bound, gradient_bound, least):
    model = model_with(**top)
    loss_off, gradient_off = difference(model, model_with())
    assert least <= loss_off < loss_bound
    assert gradient_off < gradient_bound
    assert all(p.dtype == torch.float32 for p in model.net_g.parameters())


@pytest.mark.parametrize('count', [1, 2, 3, 9])
def test_negatives_in_parts_are_the_same_step(count):
    loss_off, gradient_off = difference(model_with({'negatives_micro_batch': count}), model_with())
    assert loss_off < 1e-5 and gradient_off < 1e-6


def test_negatives_in_parts_reach_the_encoder_so_many_at_a_time():
    model = model_with({'negatives_micro_batch': 2})
    sizes, run = [], model.run
    model.run = lambda role, net, x, **arguments: sizes.append((role, len(x))) or run(role, net, x, **arguments)
    model.run.begin_step = run.begin_step
    step(model)
    # 4 negatives of 2 images, in two parts
    assert [n for role, n in sizes if role == 'history'] == [4, 4]
    assert [n for role, n in sizes if role == 'encoder'] == [2, 2, 4, 4]


def test_losses_are_float32_whatever_the_networks_are():
    model = model_with(use_amp=True, amp_bf16=True)
    seen, run = {}, model.run.__class__.__call__
    for role, net in (('student', model.net_g), ('encoder', model.net_vqgan)):
        arguments = {'levels': True, 'codes': 1} if role == 'encoder' else {}
        seen[role] = run(model.run, role, net, torch.rand(1, 3, 16, 16), **arguments)
    assert seen['student'].dtype == torch.float32
    assert seen['encoder'].levels[0].dtype == torch.bfloat16  # the contrastive loss converts them piece by piece
    assert seen['encoder'].logits.dtype == torch.float32


def test_float16_lowers_its_scale_after_an_overflow_and_moves_nothing():
    model = model_with(use_amp=True)
    model.run.scaler.load_state_dict({**model.run.scaler.state_dict(), 'scale': 2.0**60})
    before = copy.deepcopy(model.net_g.state_dict())
    step(model)
    assert model.run.scaler.get_scale() == 2.0**59
    assert not model.steps.ok and model.steps.take()[0] == []  # the scaler's way, no failure of the run
    assert all(torch.equal(value, before[key]) for key, value in model.net_g.state_dict().items())
    model.run.scaler.load_state_dict({**model.run.scaler.state_dict(), 'scale': 1024.0})
    step(model)
    assert not torch.equal(model.net_g.conv_first.weight, before['conv_first.weight'])


def test_gradients_are_those_of_the_unscaled_loss():
    scaled, plain = model_with(use_amp=True, amp_networks=['encoder']), model_with()
    scaled.run.scaler.load_state_dict({**scaled.run.scaler.state_dict(), 'scale': 4096.0})
    found, expected = step(scaled)[1], step(plain)[1]
    assert (found - expected).norm() < 0.02 * expected.norm()  # unscaled it would be thousands


def test_the_scale_is_part_of_the_state():
    model, other = model_with(use_amp=True), model_with(use_amp=True)
    model.run.scaler.load_state_dict({**model.run.scaler.state_dict(), 'scale': 8.0, '_growth_tracker': 5})
    other.load_extra_state(model.extra_state())
    assert other.run.scaler.state_dict() == model.run.scaler.state_dict()
    assert 'scaler' not in model_with(use_amp=True, amp_bf16=True).extra_state()


def test_checkpointing_keeps_fewer_activations_and_draws_the_same_drop_path():
    def kept(model):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = model.run('student', model.net_g, torch.rand(1, 3, 16, 16))
        output.square().sum().backward()
        return total, torch.cat([p.grad.flatten() for p in model.net_g.parameters()])

    network = {**DIRECT, 'drop_path_rate': 0.5}
    (most, expected), (few, found) = (
        kept(model_with(network_g=network, use_checkpoint=value)) for value in (False, True)
    )
    assert few < most / 3
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max())


def test_blocks_are_those_of_the_body():
    names = {type(block).__name__ for block in _blocks(model_with(network_g=DIRECT).net_g)}
    assert names == {'RSTB'}
    assert len(list(_blocks(model_with(network_g={**edsr(), 'num_block': 3}).net_g))) == 3


def test_compiled_networks_are_used_in_training_and_not_in_validation(monkeypatch):
    calls = []

    def compile_(net, **arguments):
        calls.append(arguments)
        return lambda *inputs, **settings: calls.append(type(net).__name__) or net(*inputs, **settings)

    monkeypatch.setattr(torch, 'compile', compile_)
    model = model_with(use_compile=True, compile_mode='max-autotune')
    step(model)
    assert calls.count({'mode': 'max-autotune', 'dynamic': False}) == 4
    assert sorted(c for c in calls if isinstance(c, str)) == ['EDSR', 'EDSR', 'EDSR', 'VQGAN', 'VQGAN']
    calls.clear()
    model.lq = torch.rand(1, 3, 7, 9)
    model.test()
    assert calls == [] and set(model.net_g.state_dict()) == set(model_with().net_g.state_dict())


def test_a_network_that_does_not_compile_runs_as_it_is(monkeypatch, caplog):
    def compile_(net, **arguments):
        def fail(*inputs, **settings):
            raise RuntimeError('no compiler here\nand more')

        return fail

    monkeypatch.setattr(torch, 'compile', compile_)
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    model, plain = model_with(use_compile=True), model_with()
    assert difference(model, plain)[0] < 1e-6
    assert 'use_compile: the student cannot be compiled and runs as it is: no compiler here' in caplog.text
    caplog.clear()
    step(model, 2)
    assert 'compile' not in caplog.text


@pytest.mark.parametrize(
    'capability, use_amp, warned', [('AVX2', True, True), ('AVX2', False, False), ('AVX512', True, False)]
)
def test_mixed_precision_on_a_processor_that_has_none(capability, use_amp, warned, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    Speed({'use_amp': use_amp, 'amp_bf16': True}, 'cpu')
    assert ('no instructions for 16 bits' in caplog.text) == warned


@pytest.mark.parametrize('use, expected', [(None, (True, False)), (False, (False, False)), (True, (True, True))])
def test_tf32_is_as_the_options_say(use, expected, monkeypatch):
    monkeypatch.setattr(precision, 'DEFAULT', precision.TF32(True, False))
    with precision.tf32_as(True):
        Speed({} if use is None else {'use_tf32': use}, 'cpu')
        assert precision.tf32() == expected


def test_channels_last_networks_see_such_images():
    class Probe(nn.Module):
        def forward(self, x):
            assert x.is_contiguous(memory_format=torch.channels_last)
            return x

    run = Speed({'use_channels_last': True}, 'cpu')
    run('teacher', Probe(), torch.rand(2, 3, 4, 5))
    model = model_with(use_channels_last=True)
    for net in (model.net_g, model.net_g_ema, model.net_his, model.net_t):
        weight = net.body[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------
# Compilation


@pytest.fixture
def compiling(monkeypatch, caplog):
    """torch.compile with a backend of the test's own, which costs nothing; torch's settings stay as they were."""
    from torch._dynamo import config

    compile_ = torch.compile
    names = ('recompile_limit', 'accumulated_recompile_limit', 'fail_on_recompile_limit_hit', 'disable')
    before = {name: getattr(config, name) for name in names}
    monkeypatch.setattr(get_root_logger(), 'propagate', True)
    caplog.set_level(logging.INFO, 'basicsr')
    torch._dynamo.reset()

    def use(backend):
        monkeypatch.setattr(
            torch, 'compile', lambda net, mode=None, dynamic=None: compile_(net, backend=backend, dynamic=dynamic)
        )

    yield use
    torch._dynamo.reset()
    for name, value in before.items():
        setattr(config, name, value)


def failing(times=(), forward=False):
    """A backend whose graphs for backward (or forward) passes cannot be compiled: those of these numbers, or all."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    calls = []

    def run(module, inputs):
        return make_boxed_func(module.forward)

    def fail(module, inputs):
        calls.append(module)
        if not times or len(calls) in times:
            raise RuntimeError('no such kernel here\nand more')
        return run(module, inputs)

    return aot_autograd(fw_compiler=fail if forward else run, bw_compiler=run if forward else fail)


def told(caplog):
    texts = [record.getMessage() for record in caplog.records if record.name == 'basicsr']
    return [text for text in texts if 'compil' in text]


DROPPING = {**SWINIR, 'drop_path_rate': 0.5, 'depths': [1, 1]}


@pytest.mark.parametrize(
    'train, top, times, roles',
    [
        ({}, {'network_g': DROPPING}, (), ['encoder', 'student']),
        ({}, {}, (1,), ['encoder']),
        ({'gradient_shares': {'cl_opt': 0.1}}, {}, (2,), ['student']),
        ({'total_iter': 10}, {'logger': {'gradients': True, 'print_freq': 1}}, (), ['student', 'encoder']),
        ({'accum_iter': 2}, {}, (), ['encoder', 'student']),
    ],
)
def test_a_backward_pass_that_does_not_compile_runs_as_it_is(train, top, times, roles, compiling, caplog):
    plain = model_with(train, **top)
    compiling(failing(times))
    model = model_with(train, use_compile=True, **top)
    for iteration in (1, 2):
        torch.manual_seed(3)
        losses, gradient = step(plain, iteration)
        torch.manual_seed(3)
        found, ours = step(model, iteration)
        assert found == pytest.approx(losses, rel=2e-5)
        torch.testing.assert_close(ours, gradient, rtol=0, atol=2e-5 * gradient.abs().max().item())
        assert len(model.watch.found) == len(plain.watch.found)
    warnings = [text for text in told(caplog) if 'cannot' in text]
    assert warnings == [
        f'use_compile: the {role} cannot be compiled and runs as it is: no such kernel here' for role in roles
    ]


def test_the_gradients_of_earlier_micro_batches_stay(compiling, caplog):
    """The student's second pass fails in the second micro-batch, when the first one has been added to its gradient."""
    train = {'accum_iter': 2, 'dukd_opt': {'type': 'UpcyclingLoss', 'n_gt_sub': 1, 'prob': 0.5}}
    plain, results = model_with(train), []
    compiling(failing((6,)))  # in each: encoder, student on two sizes
    model = model_with(train, use_compile=True)
    for each in (plain, model):
        for micro, side in enumerate((16, 24)):
            generator = torch.Generator().manual_seed(side)
            lq, gt = (torch.rand(2, 3, size, size, generator=generator) for size in (side, 2 * side))
            each.feed_data({'lq': lq, 'gt': gt})
            each.steps.begin(1, micro)
            each.optimize_parameters(1)
        results.append(torch.cat([p.grad.flatten() for p in each.net_g.parameters()]))
        assert each.cri_cl.counts[0].tolist() == [2, 2]
    torch.testing.assert_close(*results, rtol=0, atol=2e-5 * results[0].abs().max().item())
    assert [text for text in told(caplog) if 'cannot' in text] == [
        'use_compile: the student cannot be compiled and runs as it is: no such kernel here'
    ]


def test_an_error_of_the_loss_is_none_of_the_compilers(compiling, caplog):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError('of the loss')

    compiling('eager')
    model = model_with(use_compile=True)
    pixel_loss = model.cri_pix.forward
    model.cri_pix.forward = lambda *images: Broken.apply(pixel_loss(*images))
    with pytest.raises(RuntimeError, match='of the loss'):
        step(model)
    assert not [text for text in told(caplog) if 'student cannot' in text]


def test_several_processes_end_where_a_backward_pass_fails(compiling, tmp_path):
    compiling(failing())
    run = Speed({'use_compile': True}, 'cpu')
    net, x = nn.Conv2d(3, 3, 1), torch.rand(1, 3, 4, 4)
    store = torch.distributed.FileStore(str(tmp_path / 'store'), 1)
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        with pytest.raises(
            UserError, match="use_compile: the student's backward pass .* no such kernel here; .* false$"
        ):
            run.begin_step().backward(lambda: run('student', net, x).sum().backward(), lambda: None)
    finally:
        torch.distributed.destroy_process_group()


def test_another_size_that_does_not_compile(compiling, caplog):
    compiling(failing((2,), forward=True))
    run, net = Speed({'use_compile': True}, 'cpu'), nn.Conv2d(3, 3, 1)
    for side in (4, 5, 6):
        x = torch.rand(1, 3, side, side)
        assert torch.equal(run('teacher', net, x), net(x))
    assert told(caplog) == ['use_compile: the teacher cannot be compiled and runs as it is: no such kernel here']


def test_what_a_network_raises_does_not_end_compilation(compiling, caplog):
    compiling('eager')
    run, net = Speed({'use_compile': True}, 'cpu'), nn.Conv2d(3, 3, 3)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        run('student', net, torch.rand(1, 3, 2, 2))
    run('student', net, torch.rand(1, 3, 4, 4))
    assert run.compiler.counts.total() == 1 and told(caplog) == []


def test_too_little_memory_does_not_end_compilation(compiling, caplog):
    full = [True]

    def backend(module, inputs):
        def run(*tensors):
            if full:
                raise torch.OutOfMemoryError('CUDA out of memory')
            return module(*tensors)

        return run

    compiling(backend)
    run, net, x = Speed({'use_compile': True}, 'cpu'), nn.Conv2d(3, 3, 1), torch.rand(1, 3, 4, 4)
    with pytest.raises(torch.OutOfMemoryError):
        run('student', net, x)
    full.clear()
    assert torch.equal(run('student', net, x), net(x)) and told(caplog) == []


def test_a_loss_that_does_not_compile(compiling, caplog):
    compiling(failing(forward=True))
    run = Speed({'use_compile': True}, 'cuda')
    function = run.compiled(lambda a, b: (a - b).abs().sum(), 'contrastive distance')
    with torch.no_grad():
        assert function(torch.ones(2), torch.zeros(2)) == 2
    assert told(caplog) == [
        'use_compile: the contrastive distance cannot be compiled and runs as it is: no such kernel here'
    ]


def test_many_sizes_stay_compiled_and_are_counted_once(compiling, caplog):
    """As in progressive schedules, in `compare`, and where student, teacher and history share their code."""
    graphs = []
    compiling(lambda module, inputs: graphs.append(module) or module)
    sizes = range(4, 14)  # torch's own limit is 8
    for first in (3, 6):
        caplog.clear()
        run = Speed({'use_compile': True}, 'cpu')
        nets = {role: nn.Conv2d(3, first + i, 1) for i, role in enumerate(('student', 'teacher', 'history'))}
        for side in sizes:
            for _ in range(2):
                run.begin_step()
                for role, net in nets.items():
                    run(role, net, torch.rand(1, 3, side, side))
        assert run.compiler.counts.total() == 3 * len(sizes)
        (line,) = told(caplog)
        assert line.startswith('use_compile: 3 compilations after the first step (student 1, teacher 1, history 1)')
    assert len(graphs) == 2 * 3 * len(sizes)


def test_sizes_without_end_are_told(compiling, caplog):
    compiling('eager')
    run, net = Speed({'use_compile': True}, 'cpu'), nn.Conv2d(3, 3, 1)
    for side in range(4, 40):
        run.begin_step()
        run('student', net, torch.rand(1, 3, side, side))
    (line,) = told(caplog)
    assert line.startswith('use_compile: 8 compilations after the first step (student 8)')


def test_one_size_is_not_told(compiling, caplog):
    compiling('eager')
    model = model_with(use_compile=True)
    for iteration in range(1, 5):
        step(model, iteration)
    assert told(caplog) == []


def test_a_limit_is_told(compiling, caplog):
    compiling('eager')
    run, net = Speed({'use_compile': True}, 'cpu'), nn.Conv2d(3, 3, 1)
    torch._dynamo.config.recompile_limit = 2
    for side in (4, 5, 6):
        run('student', net, torch.rand(1, 3, side, side))
    (line,) = told(caplog)
    assert line.startswith('use_compile: the student cannot be compiled and runs as it is: ') and 'limit' in line


def test_compilation_that_the_environment_forbids_is_told(compiling, caplog):
    torch._dynamo.config.disable = True
    Speed({'use_compile': True}, 'cpu')
    assert told(caplog) == ['use_compile: nothing is compiled, because TORCH_COMPILE_DISABLE is set']


@pytest.mark.parametrize(
    'mode, without', [('reduce-overhead', 'default'), ('max-autotune', 'max-autotune-no-cudagraphs')]
)
@pytest.mark.parametrize(
    'opt, why',
    [
        ({'train': {'accum_iter': 2}}, 'train.accum_iter: 2'),
        ({'train': {'gradient_shares': {'cl_opt': 0.3}}}, 'train.gradient_shares'),
        ({'train': {'accum_iter': 3}, 'logger': {'gradients': True}}, 'train.accum_iter: 3 and logger.gradients'),
        ({'train': {'accum_iter': 1, 'gradient_shares': {'cl_opt': None}}}, None),
        ({'train': {'accum_iter': 2}, 'is_train': False}, None),
    ],
)
def test_cuda_graphs_are_left_out_where_gradients_must_last(mode, without, opt, why, compiling, caplog):
    compiling('eager')
    opt = {'is_train': True, 'use_compile': True, 'compile_mode': mode, **opt}
    assert Speed(opt, 'cpu').compile_mode == mode and told(caplog) == []  # which has none
    run = Speed(opt, 'cuda')
    assert run.compile_mode == (without if why else mode) and run.compiler.cuda_graphs == (why is None)
    assert [
        f'compile_mode: {mode} runs as {without}, without CUDA graphs, because of {why}: ' in text
        for text in told(caplog)
    ] == [True] * bool(why)


@pytest.mark.parametrize('mode, compiled', [('reduce-overhead', [False, True]), ('default', [True, True])])
def test_measured_steps_run_without_cuda_graphs(mode, compiled, monkeypatch, gpu):
    """A CUDA graph keeps a gradient only until the next one: the first five iterations compare those of the losses."""
    calls = []
    monkeypatch.setattr(
        torch, 'compile', lambda net, **_: lambda *inputs, **settings: calls.append(net) or net(*inputs, **settings)
    )
    overrides = ['use_compile=true', f'compile_mode={mode}', 'train:total_iter=1000']
    model = benchmark.build(benchmark.load('train_edsr_x4', overrides, None))
    found = []
    for iteration in (1, 7):
        calls.clear()
        images = {'lq': torch.rand(1, 3, 12, 12), 'gt': torch.rand(1, 3, 48, 48)}
        model.feed_data(images)
        model.steps.begin(iteration)
        model.optimize_parameters(iteration)
        found.append(model.net_t in calls)
    assert found == compiled and len(model.watch.found) == 1


def test_graphs_that_torch_leaves_out_are_told(compiling, monkeypatch, caplog):
    from torch._dynamo.utils import counters

    compiling('eager')
    run = Speed({'use_compile': True, 'compile_mode': 'reduce-overhead'}, 'cuda')
    monkeypatch.setitem(counters['inductor'], 'cudagraph_skips', 1)
    for _ in range(4):
        run.begin_step()
    assert told(caplog) == [
        'compile_mode: reduce-overhead: torch makes no CUDA graphs of a part of the step; '
        'TORCH_LOGS=perf_hints says why'
    ]
