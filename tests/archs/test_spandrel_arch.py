"""Networks read from files: what is told of them, that they equal the networks they were, and what is refused."""

import argparse
import math
import warnings
from pathlib import Path

import golden_data
import pytest
import torch
from basicsr.archs import build_network
from safetensors.torch import save_file
from small_run import SWINIR

from dckd_sr.archs import spandrel_arch
from dckd_sr.archs.spandrel_arch import describe
from dckd_sr.errors import UserError
from dckd_sr.inference import infer, padding_of

IN_OUT = {'num_in_ch': 3, 'num_out_ch': 3}
NETWORKS = {
    'edsr': {'type': 'EDSR', **IN_OUT, 'num_feat': 8, 'num_block': 3, 'upscale': 4, 'res_scale': 1},
    'edsr_x3': {'type': 'EDSR', **IN_OUT, 'num_feat': 8, 'num_block': 1, 'upscale': 3, 'res_scale': 1},
    'rcan': {
        'type': 'RCAN',
        **IN_OUT,
        'num_feat': 16,
        'num_group': 2,
        'num_block': 3,
        'squeeze_factor': 4,
        'upscale': 2,
    },
    'rcan_x8': {
        'type': 'RCAN',
        **IN_OUT,
        'num_feat': 16,
        'num_group': 1,
        'num_block': 1,
        'squeeze_factor': 16,
        'upscale': 8,
    },
    'srresnet': {'type': 'MSRResNet', **IN_OUT, 'num_feat': 8, 'num_block': 2, 'upscale': 3},
    'srresnet_x4': {'type': 'MSRResNet', **IN_OUT, 'num_feat': 8, 'num_block': 2, 'upscale': 4},
    'nafnet': {
        'type': 'NAFNet',
        'img_channel': 3,
        'width': 4,
        'middle_blk_num': 2,
        'enc_blk_nums': [1, 3],
        'dec_blk_nums': [2, 1],
    },
    'restormer': {
        'type': 'Restormer',
        'inp_channels': 3,
        'out_channels': 3,
        'dim': 8,
        'num_blocks': [1, 2, 1, 1],
        'num_refinement_blocks': 2,
        'heads': [1, 2, 4, 8],
        'ffn_expansion_factor': 2.66,
        'bias': False,
        'LayerNorm_type': 'WithBias',
        'dual_pixel_task': False,
    },
}
NETWORKS['restormer_other'] = {
    **NETWORKS['restormer'],
    'inp_channels': 6,
    'heads': [2, 2, 2, 2],
    'ffn_expansion_factor': 1.7,
    'bias': True,
    'LayerNorm_type': 'BiasFree',
    'dual_pixel_task': True,
}


def make(block, path, **entries):
    """A network with weights that differ from each other, and its file in BasicSR's form."""
    net = build_network(dict(block)).eval()
    for i, value in enumerate(net.parameters()):
        torch.nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(i))
    torch.save({'params': net.state_dict(), **entries}, path)
    return net


def read(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's, of spandrel's meshgrid
        return build_network({'type': 'spandrel', 'path': str(path), **options})


def outputs(*nets, channels=3, size=(16, 24)):
    x = torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [net(x) for net in nets]


@pytest.mark.parametrize('name', NETWORKS)
def test_what_we_recognise(name):
    block = NETWORKS[name]
    net = make(block, 'net.pth')
    found = describe('net.pth')
    options = {**found.options, 'type': found.type}
    if found.type == 'Restormer':  # of the factors that give these shapes, the file cannot tell one from another
        for level in range(4):
            dim = block['dim'] * 2**level
            assert int(dim * options['ffn_expansion_factor']) == int(dim * block['ffn_expansion_factor'])
        options['ffn_expansion_factor'] = block['ffn_expansion_factor']
    assert options == block and found.is_ours
    channels = block.get('inp_channels', 3)
    assert (found.num_in_ch, found.num_out_ch) == (channels, 3)
    out, again = outputs(net, read('net.pth'), channels=channels)
    assert torch.equal(out, again)
    assert out.shape[-2:] == (16 * found.scale, 24 * found.scale)


@pytest.mark.parametrize('changes', [{}, {'upscale': 3, 'upsampler': 'pixelshuffledirect', 'window_size': 4}])
def test_swinir_of_spandrel_equals_basicsrs(changes):
    net = make({**SWINIR, **changes}, 'net.pth')
    other = read('net.pth')
    assert type(other).__module__.startswith('spandrel.') and not other.training
    out, again = outputs(net, other)
    assert torch.equal(out, again)
    found = describe('net.pth')
    scale, window = {**SWINIR, **changes}['upscale'], {**SWINIR, **changes}['window_size']
    assert found[:5] == ('SwinIR', scale, 3, 3, window) and found.options['depths'] == [2, 2]
    assert padding_of(other) == padding_of(net) == window
    x = torch.rand(2, 3, 13, 9)
    with torch.no_grad():
        assert torch.equal(infer(net, x, scale), infer(other, x, scale))


def test_outputs_are_not_clamped():
    make(SWINIR, 'net.pth')
    [out] = outputs(read('net.pth'))
    assert out.min() < 0 or out.max() > 1


def test_the_input_stays_as_it_was():
    """spandrel 0.4's RCAN multiplies its input in place, for one; the batch is the student's, too."""
    make(SWINIR, 'net.pth')
    net = read('net.pth')
    net.forward = lambda x: x.mul_(255)
    x = torch.ones(1, 3, 8, 8)
    assert torch.equal(net(x), 255 * x) and torch.equal(x, torch.ones(1, 3, 8, 8))


def in_edsr_pytorchs_layout(weights, groups=None, blocks=None):
    """The names that EDSR-PyTorch (src/model/edsr.py, rcan.py) gives to BasicSR's weights, module by module."""
    names = {'head.0': 'conv_first', 'tail.1': 'conv_last'}
    names.update({f'tail.0.{i}': f'upsample.{i}' for i in (0, 2)})
    if groups is None:
        for i in range(blocks):
            names[f'body.{i}.body.0'], names[f'body.{i}.body.2'] = f'body.{i}.conv1', f'body.{i}.conv2'
        names[f'body.{blocks}'] = 'conv_after_body'
    else:
        for g in range(groups):
            for b in range(blocks):
                ours, theirs = f'body.{g}.residual_group.{b}.rcab', f'body.{g}.body.{b}.body'
                names.update({f'{theirs}.0': f'{ours}.0', f'{theirs}.2': f'{ours}.2'})
                names[f'{theirs}.3.conv_du.0'] = f'{ours}.3.attention.1'
                names[f'{theirs}.3.conv_du.2'] = f'{ours}.3.attention.3'
            names[f'body.{g}.body.{blocks}'] = f'body.{g}.conv'
        names[f'body.{groups}'] = 'conv_after_body'
    renamed = {}
    for theirs, ours in names.items():
        for kind in ('weight', 'bias'):
            if f'{ours}.{kind}' in weights:
                renamed[f'{theirs}.{kind}'] = weights[f'{ours}.{kind}']
    assert len(renamed) == len(weights)
    for shift in ('sub_mean', 'add_mean'):
        renamed |= {f'{shift}.weight': torch.eye(3).view(3, 3, 1, 1), f'{shift}.bias': torch.zeros(3)}
    return renamed


@pytest.mark.parametrize('name', ['edsr', 'rcan'])
def test_the_layout_of_edsr_pytorch(name):
    block = NETWORKS[name]
    net = make(block, 'basicsr.pth')
    groups = block.get('num_group')
    torch.save(in_edsr_pytorchs_layout(net.state_dict(), groups, block['num_block']), 'model.pt')
    assert describe('model.pt') == describe('basicsr.pth')
    assert torch.equal(*outputs(net, read('model.pt')))


def test_rcans_own_layout_gives_what_spandrel_makes_of_it():
    """An independent reading of the same file."""
    import spandrel

    block = NETWORKS['rcan']
    weights = in_edsr_pytorchs_layout(make(block, 'basicsr.pth').state_dict(), 2, 3)
    mean = 255 * torch.tensor([0.4488, 0.4371, 0.4040])
    weights |= {'sub_mean.bias': -mean, 'add_mean.bias': mean}
    torch.save(weights, 'model.pt')
    [ours] = outputs(read('model.pt'))
    [theirs] = outputs(spandrel.ModelLoader().load_from_state_dict(weights).model.eval())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['nafnet', 'restormer'])
def test_public_layouts(name):
    """Every key and shape of the official NAFNet and Restormer teachers."""
    manifest = golden_data.manifest(name)
    variants = manifest.get('variants', manifest)
    unet = {'width': 32, 'middle_blk_num': 1, 'enc_blk_nums': [1, 1, 1, 28], 'dec_blk_nums': [1, 1, 1, 1]}
    transformer = {'num_blocks': [4, 6, 6, 8], 'heads': [1, 2, 4, 8], 'dim': 48, 'ffn_expansion_factor': 2.66}
    wanted = {'nafnet': {'teacher': unet}}.get(
        name, {f'teacher_{norm}': {**transformer, 'LayerNorm_type': norm} for norm in ('WithBias', 'BiasFree')}
    )
    for variant, options in wanted.items():
        keys = variants[variant]['keys']
        found, _ = spandrel_arch.infer({key: torch.zeros(()).expand(shape) for key, shape in keys.items()})
        assert {key: found.options[key] for key in options} == options
        with torch.device('meta'):
            net = build_network({'type': found.type, **found.options})
        assert {key: list(value.shape) for key, value in net.state_dict().items()} == keys


def test_edsr_l_has_a_residual_scale():
    shapes = {'conv_first.weight': (256, 3, 3, 3), 'conv_last.weight': (3, 256, 3, 3), 'upsample.0.weight': (1024, 256)}
    shapes |= {f'body.{i}.conv1.weight': (256, 256) for i in range(32)}
    weights = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    assert spandrel_arch.infer(weights)[0].options['res_scale'] == 0.1
    del weights['body.31.conv1.weight']
    assert spandrel_arch.infer(weights)[0].options['res_scale'] == 1


def test_options_of_the_block_come_first():
    block = {**NETWORKS['edsr'], 'res_scale': 0.5, 'img_range': 1.0}
    net = make(block, 'net.pth')
    assert torch.equal(*outputs(net, read('net.pth', res_scale=0.5, img_range=1.0)))
    assert not torch.equal(*outputs(net, read('net.pth')))


def test_forms_of_files(tmp_path):
    """Average before current weights, as BasicSR's users expect; other entries by name; safetensors; DataParallel."""
    block = NETWORKS['edsr']
    average = make(block, 'average.pth')
    net = make(block, 'net.pth')
    torch.nn.init.zeros_(net.conv_last.weight)
    torch.save({'params': net.state_dict(), 'params_ema': average.state_dict()}, 'both.pth')
    assert torch.equal(*outputs(average, read('both.pth')))
    assert torch.equal(*outputs(net, read('both.pth', param_key='params')))
    save_file(net.state_dict(), 'net.safetensors')
    assert torch.equal(*outputs(net, read('net.safetensors')))
    torch.save({f'module.{key}': value for key, value in net.state_dict().items()}, 'parallel.pth')
    assert torch.equal(*outputs(net, read('parallel.pth')))
    torch.save({key: value.half() for key, value in make(SWINIR, 'x.pth').state_dict().items()}, 'half.pth')
    assert next(read('half.pth').parameters()).dtype == torch.float32


def test_nothing_in_the_file_is_run():
    class Evil:
        def __reduce__(self):
            return open, ('evil', 'w')

    net = make(NETWORKS['edsr'], 'net.pth')
    torch.save({'state_dict': net.state_dict(), 'hparams': argparse.Namespace(lr=1), 'x': Evil()}, 'net.ckpt')
    assert torch.equal(*outputs(net, read('net.ckpt')))
    assert not Path('evil').exists()


def test_descriptions_follow_the_file():
    make(NETWORKS['edsr'], 'net.pth')
    assert describe('net.pth').scale == 4
    make(NETWORKS['rcan'], 'net.pth')
    assert describe('net.pth')[:2] == ('RCAN', 2)


@pytest.mark.parametrize(
    'needs, own, window',
    [((0, 1), None, 1), ((0, 4), None, 4), ((64, 1), None, 64), ((20, 8), None, 24), ((16, 1), 8, 8), ((0, 6), 4, 12)],
)
def test_windows(needs, own, window):
    minimum, multiple = needs
    model = argparse.Namespace(window_size=own)
    requirements = argparse.Namespace(minimum=minimum, multiple_of=multiple)
    assert spandrel_arch._window(argparse.Namespace(model=model, size_requirements=requirements)) == window


@pytest.mark.parametrize(
    'options, message',
    [
        ({'path': 'absent.pth'}, 'absent.pth is not there'),
        (
            {'path': 'foreign.pth'},
            'foreign.pth is of no arch that is recogn.*its first keys are a.weight, b.weight',
        ),
        ({'path': 'broken.pth'}, 'missing in the file: conv_after_body.weight'),
        ({'path': 'swinir.pth'}, 'swinir.pth is damaged or of a variant that spandrel cannot build'),
        ({'path': 'edsr.pth', 'num_blocks': 3}, "holds EDSR, which has no option num_blocks .did you mean 'num_block'"),
        (
            {'path': 'fine_swinir.pth', 'img_range': 255},
            'SwinIR, whose options are those of the file; drop img_range',
        ),
        ({'path': 'edsr.pth', 'param_key': 'params_x'}, "edsr.pth has no entry 'params_x'; available: params"),
        ({'path': 'edsr.pth', 'num_feat': 16}, 'of another shape: conv_first.weight'),
    ],
)
def test_mistakes(options, message):
    torch.save({f'{name}.weight': torch.zeros(3) for name in 'abcd'}, 'foreign.pth')
    net = make(NETWORKS['edsr'], 'edsr.pth')
    torch.save({key: value for key, value in net.state_dict().items() if 'after' not in key}, 'broken.pth')
    weights = make(SWINIR, 'fine_swinir.pth').state_dict()
    torch.save({key: value for key, value in weights.items() if 'fc2' not in key}, 'swinir.pth')
    with pytest.raises(UserError, match=message) as error:
        read(**options)
    assert '\n' not in str(error.value)


def test_restormer_factors():
    """int(dim * factor) is the same for the factor found, whatever the factor was."""
    for dim in (8, 48, 52):
        for factor in (1, 1.3, 2, 2.66, 2.67, 3.999, math.pi):
            weights = {'patch_embed.proj.weight': torch.empty(dim, 3, 3, 3), 'output.weight': torch.empty(3, 1)}
            for level, name in enumerate(('encoder_level1', 'encoder_level2', 'encoder_level3', 'latent')):
                hidden = int(dim * 2**level * factor)
                weights[f'{name}.0.ffn.project_out.weight'] = torch.empty(1, hidden)
                weights[f'{name}.0.attn.temperature'] = torch.empty(1)
            found = spandrel_arch.infer(weights)[0].options['ffn_expansion_factor']
            assert all(int(dim * 2**level * found) == int(dim * 2**level * factor) for level in range(4))
