"""Exported files: equal to the network they were made of, whatever reads them; and what stops an export."""

import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import spandrel
import torch
from basicsr.archs import build_network
from PIL import Image
from safetensors import safe_open
from small_run import edsr, write

from dckd_sr import export, model_files, upscale
from dckd_sr.evaluation import score
from dckd_sr.exportable import Exportable
from dckd_sr.inference import infer
from dckd_sr.ops.resize import imresize

# deblurring's UNet in tests/test_exportable.py, with statistics of a window
LOCAL = {'type': 'NAFNetLocal', 'width': 4, 'middle_blk_num': 1, 'enc_blk_nums': [1], 'dec_blk_nums': [1]}
LOCAL['train_size'] = [1, 3, 32, 32]
SWIN = {'type': 'SwinIR', 'img_size': 16, 'embed_dim': 8, 'num_heads': [2], 'mlp_ratio': 2, 'depths': [2]}
SWIN.update(window_size=8, upscale=2, upsampler='pixelshuffledirect')
NAFNET = {'type': 'NAFNet', **{key: value for key, value in LOCAL.items() if key not in ('type', 'train_size')}}
RCAN = {**edsr(), 'type': 'RCAN', 'num_group': 2, 'num_block': 2, 'squeeze_factor': 2, 'upscale': 3}
RCAN_OF_ANOTHER_RANGE = {**RCAN, 'img_range': 1.0, 'rgb_mean': [0.3, 0.5, 0.6], 'upscale': 4}
SIZES = [(1, 33, 50), (2, 72, 40), (1, 5, 9)]

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ('onnx', 'onnxruntime')),
    reason='needs onnx and onnxruntime: pip install dckd_sr[onnx]',
)


def checkpoint(block, name='net'):
    """NAME.pth and NAME.yml; the network, with random values also where networks begin with zeros."""
    torch.manual_seed(1)
    net = build_network(dict(block)).eval().requires_grad_(False)
    for key, parameter in net.named_parameters():
        if key.endswith(('beta', 'gamma')) or 'relative_position' in key:
            parameter.normal_()
    torch.save({'params': net.state_dict()}, f'{name}.pth')
    write({'network_g': block}, f'{name}.yml')
    return net


def run(*arguments):
    return export.main(['net.pth', '-opt', 'net.yml', *arguments])


def folder(name, images):
    Path(name).mkdir(parents=True)
    for stem, image in images.items():
        Image.fromarray(image).save(f'{name}/{stem}.png')
    return name


def photographs(size=48):
    """Smooth random images: PNG stem -> uint8 (size, size, 3)."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (3, 6, 6, 3), np.uint8)
    return {f'im{i}': imresize(image, size / 6) for i, image in enumerate(small)}


@needs_onnx
@pytest.mark.parametrize('block', [SWIN, LOCAL], ids=['swinir', 'nafnet_local'])
def test_onnx_of_any_size(block, capsys):
    net = checkpoint(block)
    scale = block.get('upscale', 1)
    assert run('--to', 'onnx') == 0
    printed = capsys.readouterr().out
    for size in ('94x61', '75x104'):
        assert f'float32     {size}: differs from torch in float32 by at most' in printed
    model = model_files.load('net.onnx')
    assert (model.scale, model.channels, model.grid) == (scale, 3, 8 if block is SWIN else 2)
    for batch, height, width in SIZES:
        lq = torch.rand(batch, 3, height, width)
        torch.testing.assert_close(model.run(lq), infer(net, lq, scale), rtol=0, atol=1e-5)


@needs_onnx
def test_onnx_with_fewer_digits(capsys):
    import onnxruntime

    net = checkpoint(edsr())
    hr = photographs()
    pairs = folder('lq', {f'{stem}x2': imresize(image, 0.5) for stem, image in hr.items()}), folder('gt', hr)
    lq = torch.from_numpy(imresize(hr['im0'], 0.5).transpose(2, 0, 1)[None].astype(np.float32) / 255)
    expected, differences = net(lq), {}
    for flags in ((), ('--half',), ('--int8', '--calibration', 'lq')):
        assert run('--to', 'onnx', *flags, '--test', *pairs, '-o', 'out.onnx', '--force') == 0
        printed = capsys.readouterr().out
        # A program that knows nothing of us:
        [found] = onnxruntime.InferenceSession('out.onnx').run(None, {'lq': lq.numpy()})
        differences[flags[:1]] = np.abs(found - expected.numpy()).max()
        told = onnxruntime.InferenceSession('out.onnx').get_modelmeta().custom_metadata_map['dckd_sr']
        assert json.loads(told)['arch'] == edsr()
        [line] = [line for line in printed.splitlines() if line.startswith('PSNR')]
        full, ours, cost = (float(word) for word in line.replace(',', '').split() if word.count('.') == 1)
        assert '3 pairs' in line and cost == pytest.approx(full - ours, abs=2e-3)
    assert differences[()] < 1e-5 < differences[('--half',)] < 2e-3 < differences[('--int8',)] < 0.1
    metric = {'psnr': {'type': 'calculate_psnr', 'crop_border': 2, 'test_y_channel': True}}
    values = []
    for stem, image in hr.items():
        small = imresize(image, 0.5).transpose(2, 0, 1)[None].astype(np.float32) / 255
        sr = net(torch.from_numpy(small))[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
        values.append(score(sr[..., ::-1].copy(), image[..., ::-1].copy(), metric, stem)['psnr'])
    assert full == pytest.approx(np.mean(values), abs=2e-3)


@pytest.mark.parametrize('block', [SWIN, LOCAL, edsr()], ids=['swinir', 'nafnet_local', 'edsr'])
def test_torchscript(block, capsys):
    net = checkpoint(block)
    assert run('--to', 'torchscript') == 0
    assert '94x61' in capsys.readouterr().out
    script, model = torch.jit.load('net.pt'), model_files.load('net.pt')
    for batch, height, width in SIZES:
        lq = torch.rand(batch, 3, height, width)
        expected = infer(net, lq, block.get('upscale', 1))
        torch.testing.assert_close(script(lq), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.run(lq), expected, rtol=0, atol=1e-5)


def test_torchscript_half(capsys):
    net = checkpoint(edsr())
    assert run('--to', 'torchscript', '--half') == 0
    lq = torch.rand(1, 3, 12, 9)
    found = torch.jit.load('net_fp16.pt')(lq)
    assert found.dtype == torch.float32 and not torch.equal(found, net(lq))
    torch.testing.assert_close(found, net(lq), rtol=0, atol=5e-3)
    assert 'float16' in capsys.readouterr().out


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('block', [{**edsr(), 'res_scale': 0.1}, LOCAL], ids=['edsr', 'nafnet_local'])
def test_safetensors_need_no_option_file(block, half):
    net = checkpoint(block)
    ending = '_fp16' if half else ''
    assert run('--to', 'safetensors', *(['--half'] if half else [])) == 0
    lq = torch.rand(1, 3, 40, 44)
    found = model_files.load(f'net{ending}.safetensors').run(lq)
    assert torch.equal(found, net(lq)) != half
    torch.testing.assert_close(found, net(lq), rtol=0, atol=5e-3)
    with safe_open(f'net{ending}.safetensors', 'pt') as file:
        told = json.loads(file.metadata()['dckd_sr'])
        dtypes = {str(file.get_tensor(key).dtype) for key in file.keys()}
    assert told['arch'] == block and told['scale'] == block.get('upscale', 1)
    assert dtypes == {'torch.float16' if half else 'torch.float32'}


@pytest.mark.parametrize('block', [SWIN, NAFNET, RCAN, RCAN_OF_ANOTHER_RANGE], ids=lambda block: block['type'])
def test_students_open_in_spandrel(block, capsys):
    net = checkpoint(block)
    assert run('--to', 'safetensors') == 0
    [told] = re.findall(
        rf'opens it as {block["type"]}; differs from torch by at most (\S+) of', capsys.readouterr().out
    )
    assert float(told) < 0.01
    assert model_files.load('net.safetensors').arch == block
    theirs = spandrel.ModelLoader('cpu').load_from_file('net.safetensors')
    lq = torch.rand(1, 3, 24, 32)
    assert theirs.scale == block.get('upscale', 1)
    torch.testing.assert_close(theirs(lq.clone()), net(lq).clamp(0, 1), rtol=0, atol=1e-5)


def test_what_spandrel_does_not_know(capsys):
    for block in (edsr(), {**RCAN, 'res_scale': 0.5}):
        net = checkpoint(block)
        assert run('--to', 'safetensors', '--force') == 0
        assert 'spandrel    does not know this architecture' in capsys.readouterr().out
        lq = torch.rand(1, 3, 12, 10)
        assert torch.equal(model_files.load('net.safetensors').run(lq), net(lq))


def test_a_wrong_export_is_not_written(monkeypatch, capsys):
    """As where an exporter records one of two ways that depend on the size."""
    forward = Exportable.forward
    monkeypatch.setattr(Exportable, 'forward', lambda self, lq: forward(self, lq) + (lq.shape[2] != 40) * 0.01)
    checkpoint(edsr())
    assert run('--to', 'torchscript') == 2
    assert 'more than rounding: its operations depend on the size of the image; nothing' in capsys.readouterr().err
    assert not Path('net.pt').exists()


def test_mistakes(capsys):
    checkpoint(edsr())
    folder('lq', {'a': np.zeros((8, 8, 3), np.uint8)})
    folder('gt', {'a': np.zeros((32, 32, 3), np.uint8)})
    folder('other', {'b': np.zeros((16, 16, 3), np.uint8)})
    Path('net.safetensors').touch()
    for arguments, message in (
        (['--to', 'torchscript', '--int8', '--calibration', 'lq'], '8-bit integers are for --to onnx'),
        (['--to', 'onnx', '--int8'], '--int8 and --calibration FOLDER belong together'),
        (['--to', 'onnx', '--calibration', 'lq'], '--int8 and --calibration FOLDER belong together'),
        (['--to', 'onnx', '--int8', '--half'], '--int8 --half: one of the two'),
        (['--to', 'safetensors'], 'net.safetensors exists; name another file with -o or add --force'),
        (['--to', 'safetensors', '-o', 'net.pth'], 'net.pth should end in .safetensors'),
        (['--to', 'torchscript', '--image', 'absent.png'], 'cannot read absent.png'),
        (['--to', 'torchscript', '--image', 'lq/a.png'], '--image lq/a.png: at least 94x104 px are needed'),
        (['--to', 'torchscript', '--test', 'lq', 'other'], 'no image in other for lq'),
        (['--to', 'torchscript', '--test', 'absent', 'other'], 'cannot read absent'),
        (
            ['--to', 'torchscript', '--test', 'lq', 'gt'],
            '--test: sizes do not match at scale 2: gt/a.png is 32x32, lq/a.png is 8x8 (expected 16x16)',
        ),
        (['--to', 'nothing'], 'invalid choice'),
    ):
        assert run(*arguments) == 2, arguments
        assert message in capsys.readouterr().err
    assert export.main(['absent.pth', '--to', 'torchscript']) == 2
    assert capsys.readouterr().err.startswith('error: absent.pth is not there')
    assert run('--to', 'torchscript') == 0 and export.main(['net.pt', '--to', 'torchscript', '-o', 'b.pt']) == 2
    assert 'net.pt is an exported file; expected a checkpoint' in capsys.readouterr().err


def test_the_page_shows_commands_that_are_understood():
    page = Path(export.__file__).parents[1] / 'docs' / 'shipping.md'
    lines = re.findall(r'^ {4}python -m dckd_sr\.(\w+) (.*)$', page.read_text(encoding='utf-8'), flags=re.M)
    assert len(lines) == 9
    for command, arguments in lines:
        {'export': export, 'upscale': upscale}[command]._parser().parse_args(arguments.split())


@pytest.mark.parametrize('missing', ['onnx', 'onnxruntime'])
def test_without_onnx(missing, monkeypatch, capsys):
    there = types.SimpleNamespace(set_default_logger_severity=lambda level: None)
    monkeypatch.setitem(sys.modules, 'onnxruntime', there)
    monkeypatch.setitem(sys.modules, missing, None)
    checkpoint(edsr())
    assert run('--to', 'onnx') == 2
    assert capsys.readouterr().err.strip() == f'error: {model_files.ONNX_NEEDED}'
