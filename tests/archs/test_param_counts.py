"""The parameter counts of the paper's Table 1, of every scale, on the meta device."""

import functools
import json

import golden_data
import torch
from basicsr.archs import build_network

SWINIR = {'type': 'SwinIR', 'img_size': 64, 'window_size': 8, 'img_range': 1.0, 'mlp_ratio': 2}
SWINIR = {**SWINIR, 'upsampler': 'pixelshuffle', 'resi_connection': '1conv'}
RCAN = {'type': 'RCAN', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 64, 'num_group': 10}
NAFNET = {'type': 'NAFNet', 'middle_blk_num': 1, 'dec_blk_nums': [1, 1, 1, 1]}
STUDENT = {'dim': 24, 'num_blocks': [2, 3, 3, 4], 'num_refinement_blocks': 2}
EDSR = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3}
# Row of param_counts.json, up to its remark in brackets -> options.
NETS = {
    'SwinIR teacher': {**SWINIR, 'depths': [6] * 6, 'embed_dim': 180, 'num_heads': [6] * 6},
    'SwinIR student': {**SWINIR, 'depths': [6] * 4, 'embed_dim': 60, 'num_heads': [6] * 4},
    'RCAN teacher': {**RCAN, 'num_block': 20},
    'RCAN student': {**RCAN, 'num_block': 6},
    'NAFNet teacher': {**NAFNET, 'width': 32, 'enc_blk_nums': [1, 1, 1, 28]},
    'NAFNet student': {**NAFNET, 'width': 16, 'enc_blk_nums': [1, 1, 1, 14]},
    'Restormer teacher, WithBias': {'type': 'Restormer', 'LayerNorm_type': 'WithBias'},
    'Restormer teacher, BiasFree': {'type': 'Restormer', 'LayerNorm_type': 'BiasFree'},
    'Restormer student, WithBias': {'type': 'Restormer', 'LayerNorm_type': 'WithBias', **STUDENT},
    'Restormer student, BiasFree': {'type': 'Restormer', 'LayerNorm_type': 'BiasFree', **STUDENT},
}


def count(options):
    with torch.device('meta'):
        net = build_network(options)
    return sum(parameter.numel() for parameter in net.parameters())


def edsr(feat, blocks, scale):
    """3x3 convolutions with bias, by hand: first, two per block, one after them, upsampling, last."""
    convolutions = [(3, feat), *[(feat, feat)] * (2 * blocks + 1)]
    convolutions += [(feat, 9 * feat)] if scale == 3 else [(feat, 4 * feat)] * (scale // 2)
    return sum(9 * a * b + b for a, b in [*convolutions, (feat, 3)])


def test_table_1(monkeypatch):
    # SwinIR reads its drop path rates from a tensor, which must not be on the meta device.
    monkeypatch.setattr(torch, 'linspace', functools.partial(torch.linspace, device='cpu'))
    counts = json.loads((golden_data.require() / 'param_counts.json').read_text())
    seen = set()
    for row in counts['rows']:
        name = row['net'].split(' (')[0].replace(' x4', '')
        options = NETS[name] if NETS[name]['type'] in ('NAFNet', 'Restormer') else {**NETS[name], 'upscale': 4}
        assert count(options) == row['params'], name
        assert round(row['params'] / 1e6, 1) == row['paper_M'], name
        seen.add(name)
    assert seen == set(NETS)
    for name, scales in counts['other_scales'].items():
        for scale, expected in scales.items():
            assert count({**NETS[name], 'upscale': int(scale[1:])}) == expected, (name, scale)


def test_edsr():
    """The golden numbers have no EDSR."""
    for scale in (2, 3, 4):
        for feat, blocks in ((64, 16), (64, 32), (256, 32)):
            options = {**EDSR, 'num_feat': feat, 'num_block': blocks, 'upscale': scale}
            assert count(options) == edsr(feat, blocks, scale)
