"""BasicSR imports on this stack, once, from any folder; its repaired methods behave."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from small_run import SWINIR
from torch import nn

import dckd_sr  # noqa: F401
from dckd_sr import compat
from dckd_sr.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def python(code, folder):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run(
        [sys.executable, '-c', code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_import_without_distutils_from_an_empty_folder(tmp_path):
    """Python 3.12 has no distutils; everything registers exactly once and BasicSR's own names stay."""
    code = (
        'import sys; sys.modules["distutils"] = None\n'
        'import dckd_sr, basicsr\n'
        'from basicsr.utils.registry import ARCH_REGISTRY as A, LOSS_REGISTRY as L, MODEL_REGISTRY as M\n'
        'assert all(n in A for n in ("VQGAN", "EDSR", "SwinIR", "RCAN"))\n'
        'assert all(n in L for n in ("DynamicContrastiveLoss", "ContrasLoss", "DistributionMappingLoss", "CELoss"))\n'
        'assert all(n in M for n in ("DCKDModel", "VQGANModel", "SRModel"))\n'
        'from basicsr.archs.arch_util import LooseVersion\n'
        'assert LooseVersion("0.28.0+cpu") >= LooseVersion("0.9.0")\n'
        'assert not LooseVersion("0.8.1") >= LooseVersion("0.9.0")\n'
        'print("imported")'
    )
    result = python(code, tmp_path)
    assert result.stdout.strip() == 'imported', result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('version', [None, '1.2.0'])
def test_a_package_that_hides_basicsr_is_named(tmp_path, version):
    other = tmp_path / 'basicsr'
    (other / 'archs').mkdir(parents=True)
    (other / '__init__.py').write_text('')
    if version:
        (other / 'version.py').write_text(f"__version__ = '{version}'\n")
    result = python('import dckd_sr', tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert (
        result.returncode != 0
        and last.startswith('ImportError')
        and str(other) in last
        and (version or 'unknown') in last
    )


def test_registry_names_the_nearest():
    from basicsr.utils.registry import ARCH_REGISTRY

    assert ARCH_REGISTRY.get('EDSR').__name__ == 'EDSR'
    with pytest.raises(KeyError, match=r"no arch named 'EDSRR' \(did you mean 'EDSR'\?\)"):
        ARCH_REGISTRY.get('EDSRR')


def test_version_comparison_of_the_distutils_stand_in():
    version = compat._Version
    assert version('0.28.0+cpu') >= version('0.9.0')
    assert not version('0.8.0') >= version('0.9')


def model():
    from basicsr.models.base_model import BaseModel

    return BaseModel({'num_gpu': 1, 'is_train': True, 'dist': False, 'path': {}})


@pytest.mark.skipif(torch.cuda.is_available(), reason='shows what happens without CUDA')
def test_num_gpu_1_without_cuda_runs_on_cpu():
    assert model().device.type == 'cpu'


@pytest.mark.parametrize('name', ['AdamW', 'SGD'])
def test_any_optimiser_of_torch(name):
    parameters = [nn.Parameter(torch.zeros(1))]
    assert type(model().get_optimizer(name, parameters, 0.1)).__name__ == name


def test_ema_averages_parameters_and_copies_buffers():
    base = model()
    base.net_g = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    base.net_g_ema = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    start = base.net_g_ema[0].weight.clone()
    base.net_g(torch.randn(8, 2))
    base.model_ema(0.9)
    torch.testing.assert_close(base.net_g_ema[0].weight, 0.9 * start + 0.1 * base.net_g[0].weight)
    assert torch.equal(base.net_g_ema[1].running_mean, base.net_g[1].running_mean)
    assert base.net_g_ema[1].running_mean.abs().sum() > 0


def test_logged_losses_stay_on_the_device_until_they_are_read():
    base = model()
    base.log_dict = base.reduce_loss_dict({'l_pix': torch.tensor(2.0, requires_grad=True)})
    assert isinstance(base.log_dict['l_pix'], torch.Tensor) and not base.log_dict['l_pix'].requires_grad
    assert base.get_current_log() == {'l_pix': 2.0}


@pytest.mark.parametrize('model_type', ['SwinIRModel', 'SRModel'])
def test_validation_pads_and_survives_odd_cases(tmp_path, model_type):
    """No ground truth in a batch, an empty set, an image smaller than the window's padding."""
    from basicsr.models import build_model

    swinir = {
        'type': 'SwinIR',
        'upscale': 2,
        'img_size': 16,
        'window_size': 8,
        'depths': [2],
        'embed_dim': 8,
        'num_heads': [2],
        'mlp_ratio': 2,
        'upsampler': 'pixelshuffle',
        'img_range': 1.0,
    }
    opt = {
        'model_type': model_type,
        'network_g': swinir,
        'scale': 2,
        'num_gpu': 0,
        'is_train': False,
        'dist': False,
        'rank': 0,
        'name': 'n',
        'path': {'visualization': str(tmp_path)},
        'val': {
            'suffix': None,
            'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 0, 'test_y_channel': True}},
        },
    }
    net = build_model(opt)

    class Loader(list):
        class dataset:
            opt = {'name': 'set'}

    with_gt = {'lq': torch.rand(1, 3, 5, 13), 'gt': torch.rand(1, 3, 10, 26), 'lq_path': ['a.png']}
    without_gt = {'lq': torch.rand(1, 3, 5, 13), 'lq_path': ['b.png']}
    net.nondist_validation(Loader([with_gt]), 1, None, False)
    alone = net.metric_results['psnr']
    net.nondist_validation(Loader([with_gt, without_gt]), 2, None, True)
    assert net.metric_results['psnr'] == alone
    assert sorted(p.name for p in (tmp_path / 'set').iterdir()) == ['a_n.png', 'b_n.png']
    net.opt['val']['self_ensemble'] = True
    net.nondist_validation(Loader([with_gt]), 3, None, False)
    assert net.metric_results['psnr'] != alone
    with pytest.raises(UserError, match='no images'):
        net.nondist_validation(Loader([]), 4, None, False)


def test_a_stand_in_of_the_users_own_is_kept(monkeypatch):
    name = 'torchvision.transforms.functional_tensor'
    own = types.ModuleType(name)  # without a __spec__, which find_spec refuses
    monkeypatch.setitem(sys.modules, name, own)
    compat.restore_functional_tensor()
    assert sys.modules[name] is own


def test_slow_modules_wait_until_they_are_needed(tmp_path):
    """torch's compiler and SciPy's statistics; both work as ever, and torchvision's and BasicSR's users of them."""
    code = (
        'import sys, numpy as np, torch\n'
        'before = set(sys.modules)\n'
        'import dckd_sr\n'
        'loaded = {"torch._dynamo", "torch._dynamo.utils", "scipy.stats"} & (set(sys.modules) - before)\n'
        'from basicsr.data.degradations import cdf2, sigma_matrix2\n'
        'from scipy import stats\n'
        'middle = cdf2(sigma_matrix2(1, 2, 0.3), np.zeros((2, 2, 2)))\n'
        'from torchvision.ops import roi_align\n'
        'aligned = roi_align(torch.ones(1, 3, 8, 8), torch.tensor([[0, 0, 0, 4, 4.0]]), 2)\n'
        'print(loaded, middle.shape, float(middle[0, 0]), tuple(aligned.shape), stats.norm.cdf(0))'
    )
    result = python(code, tmp_path)
    assert result.stdout.strip() == 'set() (2, 2) 0.25 (1, 3, 2, 2) 0.5', result.stderr


def test_a_deferred_module_is_loaded_where_more_than_its_function_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / 'slow_module.py').write_text('def function(x):\n    return 2 * x\n\nOTHER = 3\n')
    monkeypatch.syspath_prepend(tmp_path)
    with compat.deferred('slow_module', 'function'):
        from slow_module import function

        assert not hasattr(sys.modules['slow_module'], '__file__')  # a stand-in
        from slow_module import OTHER
    assert OTHER == 3 and sys.modules['slow_module'].__file__ == str(tmp_path / 'slow_module.py')
    assert function(4) == 8 and function is not sys.modules['slow_module'].function
    loaded = sys.modules['slow_module']
    with compat.deferred('slow_module', 'function'):
        assert sys.modules['slow_module'] is loaded
    assert sys.modules['slow_module'] is loaded
    monkeypatch.delitem(sys.modules, 'slow_module')
    with pytest.raises(ZeroDivisionError), compat.deferred('slow_module', 'function'):
        1 / 0  # noqa: B018
    assert 'slow_module' not in sys.modules


def plain_tensors(net):
    return [name for module in net.modules() for name, value in vars(module).items() if isinstance(value, torch.Tensor)]


SR = {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 2}


@pytest.mark.parametrize(
    'block',
    [
        {'type': 'EDSR', **SR},
        {'type': 'RCAN', **SR, 'num_group': 1, 'squeeze_factor': 4},
        SWINIR,
        {'type': 'DUF', 'scale': 2, 'num_layer': 16},
        {'type': 'StyleGAN2Generator', 'out_size': 8, 'num_style_feat': 8, 'num_mlp': 1, 'narrow': 0.01},
    ],
    ids=lambda block: block['type'],
)
def test_constants_go_where_the_network_goes(block):
    from basicsr.archs import build_network
    from basicsr.utils.registry import ARCH_REGISTRY

    torch.manual_seed(0)
    net = build_network(block)
    torch.manual_seed(0)
    own = ARCH_REGISTRY.get(block['type'])(**{key: value for key, value in block.items() if key != 'type'})
    assert plain_tensors(own) and not plain_tensors(net)
    found, expected = net.state_dict(), own.state_dict()
    assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in found)
    assert {buffer.device.type for buffer in net.to('meta').buffers()} == {'meta'}


@pytest.mark.parametrize('block', [{'type': 'EDSR', **SR}, SWINIR], ids=['EDSR', 'SwinIR'])
def test_a_network_is_compiled_once(block):
    from basicsr.archs import build_network

    net, graphs = build_network(block).to('meta'), []

    def backend(module, examples):
        graphs.append({example.device.type for example in examples if isinstance(example, torch.Tensor)})
        return module

    compiled = torch.compile(net, backend=backend, dynamic=False)
    for _ in range(3):
        compiled(torch.rand(1, 3, 16, 16, device='meta'))
    assert graphs == [{'meta'}]


def test_constants_are_not_copied_to_a_device_in_the_first_forward(gpu):
    from basicsr.archs import build_network

    net = build_network({'type': 'EDSR', **SR}).to('cuda')
    gpu.found.clear()
    assert net(torch.rand(1, 3, 8, 8, device='cuda')).is_cuda and not gpu.found


def test_basicsrs_models_build_such_networks():
    from basicsr.models import build_model

    opt = {'num_gpu': 0, 'dist': False, 'is_train': False, 'path': {}, 'network_g': {'type': 'EDSR', **SR}}
    assert not plain_tensors(build_model({'model_type': 'SRModel', **opt}).net_g)


def test_constants_are_not_sent_between_processes(tmp_path):
    from basicsr.archs import build_network

    store = torch.distributed.FileStore(str(tmp_path / 'store'), 1)
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(build_network({'type': 'EDSR', **SR}))
        assert wrapped.modules_buffers == [] and 'mean' in wrapped.parameters_to_ignore
    finally:
        torch.distributed.destroy_process_group()


def test_networks_that_spandrel_builds_are_mended_too(tmp_path):
    """Its copy of SwinIR has the constants and the masks of BasicSR's."""
    from basicsr.archs import build_network

    from dckd_sr.archs import spandrel_arch
    from dckd_sr.ops import swin

    net = build_network({**SWINIR, 'img_size': 32}).eval()
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    theirs, _ = spandrel_arch.build(tmp_path / 'net.pth', None, {}, 'param_key')
    assert type(theirs).__module__.startswith('spandrel') and not plain_tensors(theirs)
    swin._kept.clear()
    image = torch.rand(1, 3, 24, 40)
    with torch.no_grad():
        torch.testing.assert_close(theirs(image), net(image), rtol=0, atol=1e-6)
    assert len(swin._kept) == 2  # with and without shift, of both networks


def test_what_is_learned_or_made_anew_is_no_constant():
    layer = nn.utils.weight_norm(nn.Conv2d(3, 3, 1))
    layer.scale = torch.full((1,), 2.0)
    compat.hold_constants(layer)
    assert [name for name, _ in layer.named_buffers()] == ['scale'] and 'weight' in vars(layer)
    layer(torch.rand(1, 3, 2, 2)).sum().backward()
    assert layer.weight_v.grad is not None and 'scale' not in layer.state_dict()


def test_basicsrs_own_models_do_not_wait_for_their_batch(gpu):
    from basicsr.models import build_model

    opt = {'model_type': 'SRModel', 'scale': 2, 'num_gpu': 1, 'is_train': True, 'dist': False, 'path': {}}
    opt['network_g'] = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 2}
    opt['train'] = {'optim_g': {'type': 'Adam', 'lr': 1e-3}, 'pixel_opt': {'type': 'L1Loss'}}
    opt['train']['scheduler'] = {'type': 'MultiStepLR', 'milestones': [10], 'gamma': 0.5}
    model = build_model(opt)
    for iteration in (1, 2):
        gpu.found.clear()
        model.steps.begin(iteration)
        model.feed_data({'lq': torch.rand(2, 3, 8, 8), 'gt': torch.rand(2, 3, 16, 16)})
        model.optimize_parameters(iteration)
    assert not gpu.found and model.lq.device.type == model.gt.device.type == 'cuda'
