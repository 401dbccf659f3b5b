"""Images through networks: each comes out as the kind of image that it was; tiles show no seam; mistakes are named."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from PIL import Image
from small_run import edsr

from dckd_sr import export, model_files, pictures, upscale
from dckd_sr.errors import UserError

pytestmark = pytest.mark.filterwarnings('ignore:.torch.jit:DeprecationWarning')
RGB = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8), (40, 30))
DEEP = RGB.astype(np.uint16) * 256 + 7
ALPHA = np.zeros((30, 40), np.uint8)
ALPHA[8:22, 10:30] = 255


class Repeat(torch.nn.Module):
    """Every pixel four times; what comes out is known to the last bit."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


class Broken(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / torch.zeros_like(x)


@pytest.fixture(autouse=True)
def _model():
    torch.jit.save(torch.jit.script(Repeat()), 'repeat.pt')


def run(*arguments, model='repeat.pt'):
    return upscale.main([*arguments, '-m', model])


def doubled(image):
    return image.repeat(2, 0).repeat(2, 1)


def save(image, name, **options):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    if image.dtype == np.uint16:
        cv2.imwrite(name, image[..., [2, 1, 0, 3][: image.shape[2]]] if image.ndim == 3 else image)
    else:
        Image.fromarray(image).save(name, **options)
    return name


def stored(name):
    """What OpenCV finds in a file: (h, w[, c]), RGB."""
    image = cv2.imread(str(name), cv2.IMREAD_UNCHANGED)
    return image if image.ndim == 2 else image[..., [2, 1, 0, 3][: image.shape[2]]]


@pytest.mark.parametrize('image', [RGB, RGB[..., 0], DEEP, DEEP[..., 0]], ids=['8', '8_gray', '16', '16_gray'])
@pytest.mark.parametrize('kind', ['png', 'tif'])
def test_an_image_stays_what_it_was(image, kind, capsys):
    assert run(save(image, f'photo.{kind}')) == 0
    found = stored('photo_x2.png')
    assert found.dtype == image.dtype and np.array_equal(found, doubled(image))
    assert '40x30 -> 80x60' in capsys.readouterr().out


@pytest.mark.parametrize('kind', ['jpg', 'webp', 'bmp', 'gif', 'ppm'])
def test_any_format_in(kind):
    name = save(RGB, f'photo.{kind}')
    with Image.open(name) as image:
        expected = np.asarray(image.convert('RGB')).astype(int)
    assert run(name) == 0
    assert np.abs(stored('photo_x2.png') - doubled(expected)).max() <= 3  # decoders of JPEG differ by that


@pytest.mark.parametrize('out', ['out.png', 'out.webp', 'out.jpg', 'out.JPEG', 'new/deep/out.png'])
def test_any_format_out(out, capsys):
    assert run(save(RGB, 'photo.png'), '-o', out) == 0
    with Image.open(out) as image:
        assert image.size == (80, 60) and image.format == pictures.FORMATS[Path(out).suffix.lower()]
        difference = np.abs(np.asarray(image.convert('RGB')).astype(int) - doubled(RGB))
    assert difference.max() == 0 if out.endswith(('.png', '.webp')) else difference.mean() < 3
    assert run(save(DEEP, 'deep.png'), '-o', 'deep.jpg') == 0
    assert '16 bits become 8 in .jpg' in capsys.readouterr().out


@pytest.mark.parametrize('kind', ['png', 'webp'])
@pytest.mark.parametrize('image', [RGB, RGB[..., :1], DEEP], ids=['8', '8_gray', '16'])
def test_alpha_is_kept(image, kind):
    limit = np.iinfo(image.dtype).max
    source = np.dstack([image, ALPHA.astype(image.dtype) * (limit // 255)])
    assert run(save(source, 'photo.png'), '-o', f'out.{kind}') == 0
    found = stored(f'out.{kind}')
    assert found.shape == (60, 80, 4) and found.dtype == (image.dtype if kind == 'png' else np.uint8)
    alpha = found[..., 3] / np.iinfo(found.dtype).max
    # Flat areas stay exactly opaque and exactly clear; across the edges it is the bicubic of another library, which
    # rounds corners in another order.
    assert (alpha[20:40, 24:56] == 1).all() and not alpha[:12].any() and not alpha[:, :16].any()
    smooth = np.asarray(Image.fromarray(ALPHA).resize((80, 60), Image.BICUBIC))
    for line in (30, (slice(None), 40)):
        assert np.abs(alpha[line] * 255 - smooth[line]).max() <= 1
    visible = doubled(ALPHA) > 0
    colours = doubled(image) if found.dtype == image.dtype else doubled(np.round(image / 257))
    assert np.array_equal(found[..., :3][visible], np.broadcast_to(colours, found[..., :3].shape)[visible])


def test_colours_of_clear_pixels_do_not_leak():
    """A red disc stored on black: where it fades out it is red, or it would have a dark rim."""
    inside = np.hypot(*np.mgrid[-15:15, -20:20]) < 10
    red = np.dstack([inside * 255, inside * 0, inside * 0, inside * 255]).astype(np.uint8)
    save(red, 'disc.png')
    torch.jit.save(torch.jit.script(Blur()), 'blur.pt')
    assert run('disc.png', model='blur.pt') == 0
    found = stored('disc_x2.png')
    assert (found[..., 0][found[..., 3] > 0] == 255).all() and (found[..., 3] > 0).any()


class Blur(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(x, scale_factor=2.0, mode='bilinear', align_corners=False)


def test_one_channel():
    """A network of gray images gets the channels of a colour image one by one."""
    metadata = {model_files.SCRIPT_METADATA: '{"channels": 1}'}
    torch.jit.save(torch.jit.trace(Repeat(), torch.rand(1, 1, 8, 8)), 'gray.pt', _extra_files=metadata)
    for name, image in (('colour.png', RGB), ('gray.png', RGB[..., 0])):
        assert run(save(image, name), model='gray.pt') == 0
        assert np.array_equal(stored(name.replace('.', '_x2.')), doubled(image))


@pytest.mark.parametrize('size', [(100, 70), (49, 130)])
@pytest.mark.parametrize('banded', [False, True])
def test_tiles_equal_the_whole(size, banded, monkeypatch, capsys):
    """Tiles share more than the network sees of its surroundings; so do the bands of images with many of them."""
    net = build_network(edsr()).eval()
    torch.save({'params': net.state_dict()}, 'net.pth')
    image = cv2.resize(RGB, size, interpolation=cv2.INTER_CUBIC)
    save(image, 'photo.png')
    lq = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32) / 255)
    with torch.no_grad():
        expected = net(lq)[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    if banded:
        monkeypatch.setattr(upscale, '_BAND', 1)
    bars = []
    monkeypatch.setattr(upscale, 'tqdm', lambda **options: bars.append(Bar(options['total'])) or bars[-1])
    for arguments in (['--tile', '0'], ['--tile', '40', '--overlap', '24'], ['--tile', '999999']):
        assert run('photo.png', *arguments, '--force', model='net.pth') == 0
        found = stored('photo_x2.png').astype(int)
        assert found.shape == expected.shape and np.abs(found - expected).max() <= 1
    assert [bar.n == bar.total for bar in bars] == [True] * 3
    assert bars[0].total == bars[2].total == 1 and bars[1].total >= (10 if banded else 5)


class Bar:
    def __init__(self, total):
        self.total, self.n = total, 0

    def update(self):
        self.n += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_large_images_come_in_tiles(monkeypatch, capsys):
    monkeypatch.setattr(upscale, 'WHOLE', 999)
    monkeypatch.setattr(upscale, 'TILE', 16)
    assert run(save(RGB, 'photo.png')) == 0
    assert '(in tiles of 16)' in capsys.readouterr().out
    assert np.array_equal(stored('photo_x2.png'), doubled(RGB))


def test_half():
    net = build_network(edsr()).eval()
    torch.save({'params': net.state_dict()}, 'net.pth')
    save(RGB, 'photo.png')
    assert run('photo.png', '-o', 'full.png', model='net.pth') == 0
    assert run('photo.png', '-o', 'half.png', '--half', model='net.pth') == 0
    difference = np.abs(stored('full.png').astype(int) - stored('half.png'))
    assert 0 < difference.max() <= 5


@pytest.mark.parametrize('kind', ['onnx', 'torchscript', 'safetensors'])
def test_exported_files(kind):
    if kind == 'onnx':
        pytest.importorskip('onnx')
        pytest.importorskip('onnxruntime')
    torch.save({'params': build_network(edsr()).state_dict()}, 'net.pth')
    assert export.main(['net.pth', '--to', kind]) == 0
    save(RGB, 'photo.png')
    assert run('photo.png', '-o', 'theirs.png', model='net.pth') == 0
    assert run('photo.png', '-o', 'ours.png', model=f'net{export.SUFFIXES[kind]}') == 0
    assert np.abs(stored('theirs.png').astype(int) - stored('ours.png')).max() <= 1


def test_a_folder(capsys):
    for name in ('in/a.png', 'in/A.jpg', 'in/b.webp', 'in/sub/c.png', 'in/.hidden.png'):
        save(RGB, name)
    Path('in/text.txt').write_text('words')
    Path('in/damaged.png').write_text('words')
    assert run('in') == 2
    printed = capsys.readouterr()
    assert '4 images: 3 done, 1 failed; outputs in' in printed.out and '1/4' in printed.out
    assert printed.err.count('\n') == 1 and printed.err.startswith('error: ') and 'damaged.png' in printed.err
    assert sorted(path.name for path in Path('in_x2').iterdir()) == ['A.jpg.png', 'a.png.png', 'b.png']
    # Again: what is there is kept; --force makes it anew.
    Path('in_x2/b.png').write_bytes(b'mine')
    Path('in/damaged.png').unlink()
    assert run('in') == 0
    assert '3 images: 0 done, 3 kept because their outputs exist' in capsys.readouterr().out
    assert Path('in_x2/b.png').read_bytes() == b'mine'
    assert run('in', '--force') == 0 and np.array_equal(stored('in_x2/a.png.png'), doubled(RGB))
    assert Path('in_x2/b.png').read_bytes() != b'mine'
    assert run('in', '-o', 'other', '--format', 'webp') == 0
    assert {path.suffix for path in Path('other').iterdir()} == {'.webp'}


def test_several_images(capsys):
    """As a shell's `*.png` names them, on both sides of -m."""
    for name in ('a.png', 'sub/a.jpg', 'b.png', 'sub/b.png'):
        save(RGB, name)
    assert upscale.main(['a.png', 'sub/a.jpg', '-m', 'repeat.pt', 'b.png', './b.png']) == 0
    assert '3 images: 3 done; outputs in ., sub' in capsys.readouterr().out
    assert np.array_equal(stored('a_x2.png'), doubled(RGB)) and Path('sub/a_x2.png').is_file()
    Path('text.png').write_text('words')
    assert run('a.png', 'text.png', 'b.png') == 2
    printed = capsys.readouterr()
    assert '3 images: 0 done, 2 kept because their outputs exist (--force replaces them), 1 failed' in printed.out
    assert printed.err == 'error: not an image, or damaged: text.png\n'
    assert run('a.png', 'sub/a.jpg', 'b.png', '-o', 'out', '--format', 'webp') == 0
    assert sorted(path.name for path in Path('out').iterdir()) == ['a.jpg.webp', 'a.png.webp', 'b.webp']
    for arguments, message in (
        (['a.png', 'b.png', '-o', 'out.png'], '-o out.png: the name of one file for 2 images; name a folder'),
        (['a.png', 'b.png', '-o', 'text.png'], '-o text.png: the name of one file'),
        (['a.png', 'sub'], 'sub is a folder; expected it alone, or images'),
        (['sub', 'a.png'], 'sub is a folder; expected it alone, or images'),
        (['a.png', 'absent.png'], 'absent.png is not there'),
        (['b.png', 'sub/b.png', '-o', 'out'], 'out/b.png.png would be the output of b.png and of sub/b.png'),
        (['a.png', 'a_x2.png', '--force'], 'a_x2.png, the output of a.png, is an input, too'),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f'error: {message}') and error.count('\n') == 1, error


def test_a_folder_with_no_name(monkeypatch):
    save(RGB, 'in/a.png')
    model = str(Path('repeat.pt').resolve())
    monkeypatch.chdir('in')
    assert run('.', model=model) == 0 and Path('../in_x2/a.png').is_file()


def test_existing_outputs(capsys):
    save(RGB, 'photo.png')
    Path('photo_x2.png').write_bytes(b'mine')
    assert run('photo.png') == 2
    assert 'photo_x2.png exists; name another file with -o or add --force' in capsys.readouterr().err
    assert Path('photo_x2.png').read_bytes() == b'mine'
    assert run('photo.png', '--force') == 0 and stored('photo_x2.png').shape == (60, 80, 3)
    Path('there').mkdir()
    assert run('photo.png', '-o', 'there') == 0 and Path('there/photo.png').is_file()
    before = Path('photo.png').read_bytes()
    assert run('photo.png', '-o', '../' + Path.cwd().name + '/photo.png', '--force') == 2
    assert 'photo.png is the input' in capsys.readouterr().err and Path('photo.png').read_bytes() == before


def test_mistakes(capsys):
    save(RGB, 'photo.png')
    save(RGB, 'in/a.png')
    save(RGB, 'in/b.png')
    Path('empty').mkdir()
    Path('text.png').write_text('words')
    torch.jit.save(torch.jit.script(Broken()), 'broken.pt')
    for arguments, message in (
        (['absent.png'], f'absent.png is not there (looked in {Path.cwd()}); expected an image or a folder'),
        (['empty'], 'no images in empty'),
        (['text.png'], 'not an image, or damaged: text.png'),
        (
            ['photo.png', '-m', 'absent.pth'],
            f'absent.pth is not there (looked in {Path.cwd()}); expected the file of a network',
        ),
        (['photo.png', '-m', 'empty'], 'empty is a folder; expected the file of a network'),
        (['photo.png', '-m', 'text.png'], 'text.png is no PyTorch checkpoint'),
        (['photo.png', '-m', 'broken.pt'], 'photo.png: the output holds nan or infinite values'),
        (['photo.png', '-o', 'out.bmp'], 'out.bmp: cannot write .bmp; one of .png, .webp, .jpg'),
        (['photo.png', '-o', 'text.png/out.png'], 'text.png'),
        (['in', '-o', 'text.png'], 'text.png is a file; the outputs of 2 images need a folder'),
        (['in', '-o', 'in', '--force'], 'in holds the inputs; name another folder with -o'),
        (['photo.png', '--tile', '-1'], '--tile -1: at least 0'),
        (['photo.png', '--tile', '8', '--overlap', '8'], 'tile_overlap 8 must be smaller than tile_size 8'),
        (['photo.png', '--device', 'gpu'], '--device gpu: not usable here'),
        (['photo.png', '--half'], '--half: repeat.pt was exported in the precision that it has'),
        (['photo.png', '-opt', 'any.yml'], 'repeat.pt carries its network: -opt and --param_key are for checkpoints'),
    ):
        model = [] if '-m' in arguments else ['-m', 'repeat.pt']
        assert upscale.main([*arguments, *model]) == 2, arguments
        error = capsys.readouterr().err
        assert message in error and error.startswith('error: ') and error.count('\n') == 1, error
    assert not list(Path().glob('*_x2*')) and not Path('out.bmp').exists()
    assert run('photo.png', '--format', 'bmp') == 2  # argparse's own words


def test_too_little_memory(monkeypatch, capsys):
    def fail(*_):
        raise MemoryError

    save(RGB, 'photo.png')
    monkeypatch.setattr(upscale, 'restore', fail)
    assert run('photo.png', '--tile', '32') == 2
    assert capsys.readouterr().err == 'error: photo.png: not enough memory; lower --tile (32 now)\n'

    def fail_on_cpu(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: ...")

    monkeypatch.setattr(upscale, 'restore', fail_on_cpu)
    assert run('photo.png', '--tile', '0') == 2
    assert capsys.readouterr().err == 'error: photo.png: not enough memory; set --tile, such as 256\n'


def test_pictures_of_any_program():
    """`restore` is for those who have arrays: no files, no options."""
    model = model_files.load('repeat.pt')
    result = upscale.restore(pictures.Picture(RGB, ALPHA, b'profile', ['a note']), model)
    assert result.profile == b'profile' and result.notes == ['a note'] and result.alpha.shape == (60, 80)
    with pytest.raises(UserError, match='must be smaller than tile_size'):
        upscale.restore(pictures.Picture(RGB), model, tile=8, overlap=9)
