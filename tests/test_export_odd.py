"""Networks that ONNX needs help with: pooling to sizes of the image, unfold, functions of one's own, one size alone."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from PIL import Image
from small_run import write

from dckd_sr import export, imports, model_files, upscale
from dckd_sr.exportable import SizeFree
from dckd_sr.inference import infer

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ('onnx', 'onnxruntime')),
    reason='needs onnx and onnxruntime: pip install dckd_sr[onnx]',
)

NETS = """
import torch
import torch.nn.functional as F
from torch import nn

class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        ctx.more = 1
        return x * weight

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, 1, 1)
        self.weight = nn.Parameter(torch.full((1, 3, 1, 1), 0.8))
    def forward(self, x):
        y = self.attention(Own.apply(x, self.weight))
        return F.pixel_shuffle(self.conv(torch.cat([x, y, x, y], 1)), 2)

class Adaptive(Base):
    def attention(self, x):
        h, w = x.shape[2:]
        a = F.adaptive_max_pool2d(x, (h // 8, w // 8))
        b = F.adaptive_avg_pool2d(x, (h // 3, 2)) + F.adaptive_avg_pool2d(x, 1)
        return F.interpolate(a, (h, w)) + F.interpolate(b, (h, w), mode='bilinear')

class Unfolded(Base):
    def attention(self, x):
        y = x.unfold(2, 7, 3).unfold(3, 7, 3).var(dim=(-1, -2))
        return F.interpolate(y, x.shape[2:], mode='bilinear') + F.unfold(x, 3, padding=1)[:, :3].view(x.shape)

class Fourier(Base):
    def attention(self, x):
        y = torch.fft.rfft2(x, norm='ortho')
        return torch.fft.irfft2(torch.complex(y.real.relu(), y.imag), s=x.shape[2:], norm='ortho')

class SizeBound(Base):
    def attention(self, x):
        return x * (x.shape[2] / 100) if x.shape[2] > 50 else x * float(x.shape[3] % 7)

class Impossible(Base):
    def attention(self, x):
        return torch.special.spherical_bessel_j0(x)
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', dict(ARCH_REGISTRY._obj_map))
    monkeypatch.setattr(imports, '_loaded', {})
    Path('nets.py').write_text(NETS)


def run(name, *arguments):
    """Export a network of the file above; (exit code, the network)."""
    write({'imports': 'nets.py', 'network_g': {'type': name}}, 'net.yml')
    imports.load('nets.py')
    torch.manual_seed(0)
    net = ARCH_REGISTRY.get(name)().eval()
    torch.save({'params': net.state_dict()}, 'net.pth')
    return export.main(['net.pth', '-opt', 'net.yml', *arguments]), net


@pytest.mark.parametrize('name, least', [('Adaptive', 8), ('Unfolded', 7)])
@pytest.mark.parametrize('kind', ['onnx', 'torchscript'])
def test_sizes_that_follow_from_the_image(name, least, kind, capsys):
    code, net = run(name, '--to', kind, '-o', f'net.{"onnx" if kind == "onnx" else "pt"}')
    assert code == 0 and 'other exporter' not in capsys.readouterr().out
    model = model_files.load('net.onnx' if kind == 'onnx' else 'net.pt')
    assert (model.scale, model.channels, model.smallest_side) == (2, 3, least)
    for size in ((least, least), (31, 52), (4, 40)):
        x = torch.rand(1, 3, *size)
        net.smallest_side = least
        with torch.no_grad():
            assert torch.allclose(infer(model.run, x, 2), infer(net, x, 2), atol=1e-5)


def test_size_free_operations_are_torchs():
    for size in ((16, 17), (7, 5)):
        x = torch.rand(2, 3, *size)
        for output in ((3, 2), (1, 4), size, (None, 2), 2):
            for pool in (torch.nn.functional.adaptive_avg_pool2d, torch.nn.functional.adaptive_max_pool2d):
                with SizeFree():
                    found = pool(x, output)
                assert torch.allclose(found, pool(x, output), atol=1e-6)
        with SizeFree():
            found = x.unfold(-1, 4, 3)
        assert torch.equal(found, x.unfold(-1, 4, 3))


@pytest.mark.skipif(importlib.util.find_spec('onnxscript') is None, reason='needs onnxscript')
def test_the_other_exporter(capfd):
    assert run('Fourier', '--to', 'onnx')[0] == 0
    out, err = capfd.readouterr()
    assert 'fft_rfft' in out and "torch's other exporter is tried" in out and 'graph(' not in out and err == ''
    assert out.count('differs from torch in float32 by at most') == 2


def test_one_line_where_nothing_helps(capfd, monkeypatch):
    monkeypatch.setattr(export, '_record_otherwise', export._record)
    assert run('Impossible', '--to', 'onnx')[0] == 2
    out, err = capfd.readouterr()
    assert err.count('\n') == 1 and len(err) < 400 and 'graph(' not in out and 'spherical_bessel_j0' in err
    assert not list(Path().glob('*.onnx'))


@pytest.mark.parametrize('kind', ['onnx', 'torchscript'])
def test_one_size(kind, capsys):
    file = f'net.{"onnx" if kind == "onnx" else "pt"}'
    assert run('SizeBound', '--to', kind, '-o', file)[0] == 2
    assert '--size HxW exports it for images of one size' in capsys.readouterr().err
    code, net = run('SizeBound', '--to', kind, '-o', file, '--size', '60x41')
    assert code == 0 and '41x60' in capsys.readouterr().out
    model = model_files.load(file)
    assert model.run.fixed_size == (60, 41) and model.scale == 2
    x = torch.rand(1, 3, 60, 41)
    with torch.no_grad():
        assert torch.allclose(model.run(x), net(x), atol=1e-5)
        for size in ((60, 41), (5, 5), (100, 70)):  # padded, tiled
            assert infer(model.run, torch.rand(1, 3, *size), 2).shape == (1, 3, 2 * size[0], 2 * size[1])
    for size in ((60, 41), (9, 90), (130, 30)):
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(f'{size[0]}.png')
        assert upscale.main([f'{size[0]}.png', '-m', file, '-o', 'o.png', '--force']) == 0
        assert Image.open('o.png').size == (2 * size[1], 2 * size[0])
        assert ('in tiles of 41x60' in capsys.readouterr().out) == (size != (60, 41))


@pytest.mark.parametrize('size', ['60', '0x5', '6 0x5', '-1x5', 'x'])
def test_sizes_that_are_none(size, capsys):
    assert run('SizeBound', '--to', 'onnx', f'--size={size}')[0] == 2
    assert 'expected height and width in LQ pixels' in capsys.readouterr().err


def test_a_foreign_onnx_that_ends_the_process_on_small_images(capsys):
    """Max pooling of 9 by 3 of an image of 4x4: onnxruntime raises or ends the process; the folder goes on."""
    import onnx

    run('Unfolded', '--to', 'onnx', '--force')
    proto = onnx.load('net.onnx')
    del proto.metadata_props[:]
    onnx.save(proto, 'foreign.onnx')
    Path('images').mkdir()
    for side in (4, 40):
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(f'images/{side}.png')
    assert model_files.load('foreign.onnx').smallest_side == 8
    assert upscale.main(['images', '-m', 'foreign.onnx', '-o', 'out']) == 0
    assert Image.open('out/4.png').size == (8, 8)


@pytest.mark.parametrize('count, expected', [(3, [0, 1, 2]), (40, [0, 1, 3, 4]), (96, [0, 3, 6, 9])])
def test_calibration_images_are_spread(count, expected):
    Path('many').mkdir()
    for index in range(count):
        Image.fromarray(np.full((4, 4, 3), index, np.uint8)).save(f'many/{index:03}.png')
    values = [int(image[0, 0, 0]) for image in export._calibration('many')]
    assert values[:4] == expected[:count] and values[-1] == count - 1 and len(values) == min(count, 32)
