"""Images of all kinds: what comes out of a file is what went in, upright; what is written is read back."""

import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from dckd_sr import pictures
from dckd_sr.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (5, 7), np.uint8)
IMAGE = Image.fromarray(RGB)


def save(image, name, **options):
    image.save(name, **options)
    return name


def srgb():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


@pytest.mark.parametrize('name', ['a.png', 'a.bmp', 'a.tif', 'a.ppm', 'a.tga', 'a.webp'])
def test_colour(name):
    options = {'lossless': True} if name.endswith('.webp') else {}
    picture = pictures.read(save(IMAGE, name, **options))
    assert np.array_equal(picture.pixels, RGB) and picture.alpha is None and picture.notes == []


@pytest.mark.parametrize('mode', ['1', 'L'])
@pytest.mark.parametrize('kind', ['png', 'tif'])
def test_gray(mode, kind):
    gray = IMAGE.convert(mode)
    picture = pictures.read(save(gray, f'a.{kind}'))
    assert np.array_equal(picture.pixels[..., 0], np.asarray(gray.convert('L'))) and picture.pixels.shape == (5, 7, 1)


@pytest.mark.parametrize('kind', ['png', 'tif', 'webp'])
def test_alpha(kind):
    options = {'lossless': True, 'exact': True} if kind == 'webp' else {}
    picture = pictures.read(save(Image.fromarray(np.dstack([RGB, ALPHA])), f'a.{kind}', **options))
    assert np.array_equal(picture.pixels, RGB) and np.array_equal(picture.alpha, ALPHA)


@pytest.mark.parametrize('kind', ['png', 'tif'])
def test_gray_with_alpha(kind):
    picture = pictures.read(save(Image.fromarray(np.dstack([RGB[..., 0], ALPHA]), 'LA'), f'a.{kind}'))
    assert np.array_equal(picture.pixels, RGB[..., :1]) and np.array_equal(picture.alpha, ALPHA)


@pytest.mark.parametrize('kind', ['png', 'gif'])
@pytest.mark.parametrize('clear', [None, 2])
def test_palette(kind, clear):
    image = IMAGE.quantize(8)
    options = {} if clear is None else {'transparency': clear}
    picture = pictures.read(save(image, f'a.{kind}', **options))
    indices = np.asarray(image)
    expected = np.array(image.getpalette()).reshape(-1, 3)[indices]
    visible = slice(None) if clear is None else indices != clear
    assert np.array_equal(picture.pixels[visible], expected[visible])
    if clear is None:
        assert picture.alpha is None
    else:
        assert np.array_equal(picture.alpha == 0, indices == clear)


@pytest.mark.parametrize('kind', ['png', 'tif', 'ppm'])
def test_16_bit_colour(kind):
    deep = RGB.astype(np.uint16) * 256 + 7
    cv2.imwrite(f'a.{kind}', deep[..., ::-1])
    picture = pictures.read(f'a.{kind}')
    assert picture.pixels.dtype == np.uint16 and np.array_equal(picture.pixels, deep)


def test_16_bit_gray_and_alpha():
    deep = RGB[..., 0].astype(np.uint16) * 256 + 7
    cv2.imwrite('gray.png', deep)
    assert np.array_equal(pictures.read('gray.png').pixels[..., 0], deep)
    Image.fromarray(deep).save('gray.jp2')
    assert np.array_equal(pictures.read('gray.jp2').pixels[..., 0], deep)
    cv2.imwrite('alpha.png', np.dstack([deep, deep, deep, deep // 2]))
    assert np.array_equal(pictures.read('alpha.png').alpha, deep // 2)
    cv2.imwrite('alpha.tif', np.dstack([deep, deep, deep, deep // 2]))
    picture = pictures.read('alpha.tif')
    assert np.array_equal(picture.alpha, deep // 2) and np.array_equal(picture.pixels[..., 0], deep)


@pytest.mark.parametrize('kind', ['jpg', 'png', 'webp', 'tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation(kind, orientation):
    # Bright corners tell all eight apart, also after JPEG: top left full, top right half.
    corners = np.zeros((16, 32), np.uint8)
    corners[:8, :8], corners[:8, 24:] = 255, 128
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.repeat(corners[..., None], 3, 2))
    picture = pictures.read(save(image, f'a.{kind}', exif=exif))
    turn = [None, None, 0, 3, 1, 5, 4, 6, 2][orientation]  # Pillow's own names of what undoes it
    expected = np.asarray(image if turn is None else image.transpose(turn))
    assert picture.pixels.shape == expected.shape
    assert np.abs(picture.pixels.astype(int) - expected).mean() < 8


def test_print_colours():
    """Pillow's conversions, plain and by profile, are the truth; the picture is no inverted or misread one."""
    smooth = Image.fromarray(cv2.resize(RGB, (64, 64), interpolation=cv2.INTER_CUBIC)).convert('CMYK')
    for name in ('a.jpg', 'a.tif'):
        picture = pictures.read(save(smooth, name))
        assert np.abs(picture.pixels.astype(int) - np.asarray(smooth.convert('RGB'))).mean() < 4
        assert picture.alpha is None and picture.profile is None
    save(smooth, 'b.tif', icc_profile=b'no profile at all')
    assert np.array_equal(pictures.read('b.tif').pixels, np.asarray(smooth.convert('RGB')))


def test_profile_stays_where_it_fits():
    profile = srgb()
    assert pictures.read(save(IMAGE, 'a.png', icc_profile=profile)).profile == profile
    assert pictures.read(save(IMAGE, 'a.jpg', icc_profile=profile)).profile == profile
    assert pictures.read(save(IMAGE.convert('L'), 'gray.png', icc_profile=profile)).profile is None


@pytest.mark.parametrize('kind', ['gif', 'webp', 'tif', 'png'])
def test_the_first_frame(kind):
    options = {'lossless': True} if kind == 'webp' else {}
    first, second = IMAGE.quantize(256).convert('RGB'), Image.fromarray(255 - RGB)
    save(first, f'a.{kind}', save_all=True, append_images=[second], **options)
    picture = pictures.read(f'a.{kind}')
    assert picture.notes == [f'the first of 2 {"pages" if kind == "tif" else "frames"}']
    assert np.abs(picture.pixels.astype(int) - np.asarray(first)).max() < 3


def test_what_is_no_image():
    IMAGE.resize((99, 99)).save('whole.png')
    content = open('whole.png', 'rb').read()
    files = {'text.png': b'words ' * 99, 'empty.png': b'', 'part.png': content[:200], 'zero.gif': b'GIF89a' + bytes(40)}
    for name, data in files.items():
        with open(name, 'wb') as file:
            file.write(data)
        with pytest.raises(UserError, match=name):
            pictures.read(name)
    Image.fromarray(np.zeros((4, 4), np.float32)).save('float.tif')
    with pytest.raises(UserError, match=r'float\.tif has float32 values'):
        pictures.read('float.tif')
    with pytest.raises(UserError, match='No such file'):
        pictures.read('absent.png')


@pytest.mark.parametrize('suffix', ['.png', '.webp'])
@pytest.mark.parametrize('gray', [False, True])
@pytest.mark.parametrize('alpha', [None, ALPHA])
def test_written_and_read(suffix, gray, alpha):
    profile = None if gray else srgb()
    picture = pictures.Picture(RGB[..., :1] if gray else RGB, alpha, profile)
    with open(f'a{suffix}', 'wb') as file:
        file.write(pictures.encode(picture, suffix))
    again = pictures.read(f'a{suffix}')
    assert np.array_equal(again.pixels.mean(2), picture.pixels.mean(2)) and again.profile == profile
    assert alpha is None or np.array_equal(again.alpha, alpha)
    # Pillow, which reads profiles, checks the chunk that we put into PNG files.
    with Image.open(f'a{suffix}') as image:
        image.load()
        assert image.info.get('icc_profile') == profile


def test_written_16_bit():
    deep = pictures.Picture(RGB.astype(np.uint16) * 257, ALPHA.astype(np.uint16) * 257)
    with open('a.png', 'wb') as file:
        file.write(pictures.encode(deep, '.png'))
    again = pictures.read('a.png')
    assert np.array_equal(again.pixels, deep.pixels) and np.array_equal(again.alpha, deep.alpha)
    assert pictures.losses(deep, '.png') == []
    assert pictures.losses(deep, '.jpg') == ['16 bits become 8 in .jpg', '.jpg has no alpha']
    for suffix in ('.jpg', '.webp'):
        small = Image.open(io.BytesIO(pictures.encode(deep, suffix))).convert('RGB')
        assert np.abs(np.asarray(small).astype(int) - RGB).mean() < (1 if suffix == '.webp' else 30)


def test_formats_have_limits():
    wide = pictures.Picture(np.zeros((1, 70000, 3), np.uint8))
    for suffix in ('.jpg', '.webp'):
        with pytest.raises(UserError, match=f'70000x1 px cannot be written as {suffix}'):
            pictures.encode(wide, suffix)
    assert struct.unpack('>I', pictures.encode(wide, '.png')[16:20]) == (70000,)
    with pytest.raises(UserError, match='cannot write .bmp; one of .png'):
        pictures.encode(wide, '.bmp')


def test_listing(tmp_path):
    for name in ('b.JPG', 'a.gif', '.hidden.png', 'notes.txt'):
        (tmp_path / name).touch()
    (tmp_path / 'folder.png').mkdir()
    assert [path.name for path in pictures.list_folder(tmp_path)] == ['a.gif', 'b.JPG']
    with pytest.raises(UserError, match='no images in'):
        pictures.list_folder(tmp_path / 'folder.png')
    with pytest.raises(UserError, match='cannot read absent'):
        pictures.list_folder('absent')


def test_no_program_is_run(monkeypatch):
    """Pillow hands EPS files, whatever they are called, to Ghostscript."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *_, **__: pytest.fail('Ghostscript was called'))
    IMAGE.save('a.eps')
    with open('a.eps', 'rb') as file, open('a.png', 'wb') as disguised:
        disguised.write(file.read())
    with pytest.raises(UserError, match='not an image'):
        pictures.read('a.png')
