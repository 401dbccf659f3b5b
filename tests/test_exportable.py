"""Networks made independent of the size: equal to what they were, at sizes other than the recorded one."""

import warnings

import pytest
import spandrel
import torch
from basicsr.archs import build_network

from dckd_sr.exportable import Exportable
from dckd_sr.inference import infer

SR = {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1}
UNET = {'width': 4, 'middle_blk_num': 1, 'enc_blk_nums': [1, 1], 'dec_blk_nums': [1, 1]}
SWIN = {'img_size': 16, 'embed_dim': 8, 'num_heads': [2, 2], 'mlp_ratio': 2}
NETWORKS = {
    'edsr': ({'type': 'EDSR', **SR, 'upscale': 4}, 4),
    'rcan': ({'type': 'RCAN', **SR, 'num_group': 1, 'squeeze_factor': 2, 'upscale': 3}, 3),
    'msrresnet': ({'type': 'MSRResNet', **SR, 'upscale': 2}, 2),
    'nafnet': ({'type': 'NAFNet', **UNET}, 1),
    'nafnet_local': ({'type': 'NAFNetLocal', **UNET, 'train_size': [1, 3, 16, 24]}, 1),
    'baseline_local': ({'type': 'BaselineLocal', **UNET, 'train_size': [1, 3, 24, 16]}, 1),
    'restormer': ({'type': 'Restormer', 'dim': 8, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1}, 1),
    'swinir': (
        {'type': 'SwinIR', **SWIN, 'depths': [2, 3], 'window_size': 8, 'upscale': 2, 'upsampler': 'pixelshuffledirect'},
        2,
    ),
    'swinir_odd_window': (
        {'type': 'SwinIR', **SWIN, 'img_size': 14, 'depths': [2, 2], 'window_size': 7, 'upscale': 1},
        1,
    ),
}
SIZES = [(2, 16, 16), (1, 33, 50), (1, 72, 40), (3, 24, 17), (1, 5, 9), (1, 1, 1)]


def build(name):
    """With random values also where networks begin with zeros, so that every part counts."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net = build_network(dict(NETWORKS[name][0])).eval().requires_grad_(False)
    for key, parameter in net.named_parameters():
        if key.endswith(('beta', 'gamma')) or 'relative_position' in key:
            parameter.normal_()
    return net


@pytest.mark.parametrize('traced', [False, True])
@pytest.mark.parametrize('name', NETWORKS)
def test_equal_at_every_size(name, traced):
    net, scale = build(name), NETWORKS[name][1]
    exportable = Exportable(net, scale)
    if traced:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            exportable = torch.jit.trace(exportable, torch.rand(2, 3, 24, 20), check_trace=False)
    for batch, height, width in SIZES:
        lq = torch.rand(batch, 3, height, width)
        torch.testing.assert_close(exportable(lq), infer(net, lq, scale), rtol=0, atol=2e-5)


def test_the_network_itself_stays():
    net = build('swinir')
    before = {name: vars(module).get('forward') for name, module in net.named_modules()}
    Exportable(net, 2, half=True)
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    assert before == {name: vars(module).get('forward') for name, module in net.named_modules()}


def test_half():
    net = build('edsr')
    lq = torch.rand(1, 3, 12, 9)
    half, full = Exportable(net, 4, half=True)(lq), net(lq)
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0, atol=5e-3)


def test_copies_of_swinir_are_recognised():
    """spandrel has a copy of SwinIR of its own."""
    net = build('swinir')
    theirs = spandrel.ModelLoader('cpu').load_from_state_dict(dict(net.state_dict())).model.float()
    lq = torch.rand(1, 3, 24, 32)
    exportable = Exportable(theirs, 2)
    replaced = [module for module in exportable.modules() if 'forward' in vars(module)]
    assert len(replaced) == 5
    torch.testing.assert_close(exportable(lq), net(lq), rtol=0, atol=2e-5)
