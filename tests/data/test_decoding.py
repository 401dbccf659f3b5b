"""The one reader: whatever Pillow and tifffile write comes out with their pixels, or is refused in words."""

import io
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from basicsr.data import build_dataset
from PIL import Image, ImageCms, ImageFile, ImageOps, PngImagePlugin

from dckd_sr import pictures, prepare
from dckd_sr.data import decoding
from dckd_sr.data.decoding import decode
from dckd_sr.data.preparing import read_image
from dckd_sr.data.repairs import read_img_seq
from dckd_sr.errors import UserError

Image.init()
HEIGHT, WIDTH = 40, 52  # not square, and no multiple of a tile
SMALL = np.random.default_rng(0).random((4, 5, 4), np.float32)
SMOOTH = cv2.resize(SMALL, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
BYTES = (SMOOTH * 255).round().astype(np.uint8)
WORDS = (SMOOTH * 65535).round().astype(np.uint16)
MODES = ('1', 'L', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'I', 'F', 'LA', 'PA', 'RGBX', 'I;16', 'I;16B')
READ = {'PNG', 'JPEG', 'MPO', 'BMP', 'DIB', 'PPM', 'WEBP', 'TIFF', 'GIF', 'AVIF', 'JPEG2000', 'TGA'}
NAME = 'folder/a picture.tga'  # TGA is known by its name alone


def made(mode):
    if mode == 'LAB':
        profiles = [ImageCms.createProfile(name) for name in ('sRGB', 'LAB')]
        return ImageCms.profileToProfile(Image.fromarray(BYTES[..., :3]), *profiles, outputMode='LAB')
    if mode.startswith('I;16'):
        return Image.frombytes(
            mode, (WIDTH, HEIGHT), WORDS[..., 0].astype('>u2' if mode == 'I;16B' else '<u2').tobytes()
        )
    if mode == 'I':
        return Image.fromarray(WORDS[..., 0].astype(np.int32))
    if mode == 'F':
        return Image.fromarray(SMOOTH[..., 0])
    if mode == 'RGBX':
        return Image.frombytes('RGBX', (WIDTH, HEIGHT), BYTES.tobytes())
    if mode in ('LA', 'PA'):
        return Image.fromarray(BYTES).convert('LA').convert(mode)
    return Image.fromarray(BYTES if mode == 'RGBA' else BYTES[..., :3]).convert(mode)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(content):
    """(h, w, 4) RGBA as floats of 255, upright, by Pillow."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I'):
            gray = np.asarray(image).astype(float) / 257
            return np.dstack([gray, gray, gray, np.full(gray.shape, 255.0)])
        if image.mode == 'LAB':
            profiles = [ImageCms.createProfile(name) for name in ('LAB', 'sRGB')]
            image = ImageCms.profileToProfile(image, *profiles, outputMode='RGB')
        if image.mode == 'CMYK':
            image = image.convert('RGB')
        return np.asarray(image.convert('RGBA')).astype(float)


def as_rgba(image):
    """The same of what is decoded."""
    white = np.iinfo(image.pixels.dtype).max
    rgb = np.repeat(image.pixels, 3, 2) if image.pixels.shape[2] == 1 else image.pixels[..., ::-1]
    alpha = np.full(rgb.shape[:2], white) if image.alpha is None else image.alpha
    return np.dstack([rgb, alpha]) * (255 / white)


def assert_equal(image, expected, tolerance=1):
    ours = as_rgba(image)
    assert ours.shape == expected.shape
    visible = expected[..., 3:] > 0  # a transparent pixel has any colour
    assert np.abs((ours - expected) * visible)[..., :3].max() <= tolerance
    assert np.abs(ours - expected)[..., 3].max() <= tolerance


@pytest.mark.parametrize('kind', sorted(set(Image.SAVE) | READ))
def test_all_that_pillow_writes(kind):
    written = []
    for mode in MODES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of formats that Pillow gives up
                content = saved(made(mode), kind)
        except Exception:  # a mode that this format has not
            continue
        written.append(mode)
        try:
            image = decode(content, NAME)
        except UserError as error:
            assert NAME in str(error)
            if kind in READ and mode not in ('I', 'F'):  # old versions cannot read all that they write
                with pytest.raises(OSError):
                    by_pillow(content)
            continue
        assert kind in READ
        assert_equal(image, by_pillow(content))
        if kind in ('PNG', 'TIFF', 'JPEG', 'JPEG2000') and mode not in ('P', 'PA'):
            assert (image.pixels.shape[2] == 1) == (mode in ('1', 'L', 'LA', 'I', 'F', 'I;16', 'I;16B')), mode
    assert written or kind not in READ


# ----------------------------------------------------------------------------------------------------------------- PNG


def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(samples, depth, colour, *chunks, interlace=False):
    """A PNG file of (h, w, channels) samples."""

    def rows(part):
        for row in part.reshape(part.shape[0], -1):
            if depth == 16:
                yield b'\0' + row.astype('>u2').tobytes()
            else:
                bits = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :]
                yield b'\0' + np.packbits(bits.ravel()).tobytes()

    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [samples[top::down, left::right] for top, left, down, right in passes] if interlace else [samples]
    data = b''.join(b''.join(rows(part)) for part in parts if part.size)
    height, width = samples.shape[:2]
    header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, interlace)
    parts = [chunk(b'IHDR', header), *(chunk(*each) for each in chunks), chunk(b'IDAT', zlib.compress(data))]
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts) + chunk(b'IEND', b'')


@pytest.mark.parametrize('interlace', [False, True])
@pytest.mark.parametrize('transparent', [False, True])
@pytest.mark.parametrize(
    'colour,depth',
    [
        (0, 1),
        (0, 2),
        (0, 4),
        (0, 8),
        (0, 16),
        (2, 8),
        (2, 16),
        (3, 1),
        (3, 2),
        (3, 4),
        (3, 8),
        (4, 8),
        (4, 16),
        (6, 8),
        (6, 16),
    ],
)
def test_every_kind_of_png(colour, depth, transparent, interlace):
    channels, most = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour], 2**depth - 1
    samples = (SMOOTH[..., :channels] * most).round().astype(int)
    chunks, white = [], 65535 if depth == 16 else 255
    palette = np.random.default_rng(1).integers(0, 256, (most + 1, 3)) if colour == 3 else None
    if colour == 3:
        chunks.append((b'PLTE', palette.astype(np.uint8).tobytes()))
    key = samples[3, 4]
    if transparent and colour in (0, 2):
        chunks.append((b'tRNS', key.astype('>u2').tobytes()))
    elif transparent and colour == 3:
        chunks.append((b'tRNS', bytes([9] * most)))  # the last colour has no entry
    image = decode(png(samples, depth, colour, *chunks, interlace=interlace), NAME)
    pixels = palette[samples[..., 0]] if colour == 3 else samples[..., : 1 if colour in (0, 4) else 3] * (white // most)
    assert image.pixels.dtype == (np.uint16 if depth == 16 else np.uint8)
    assert np.array_equal(image.pixels[..., ::-1], pixels)
    if colour in (4, 6):
        alpha = samples[..., -1]
    elif transparent:
        alpha = np.where(samples[..., 0] < most, 9, 255) if colour == 3 else (samples != key).any(2) * white
    else:
        alpha = None
    assert (image.alpha is None) == (alpha is None) and (alpha is None or np.array_equal(image.alpha, alpha))
    assert image.plain == (alpha is None) and not image.notes and not image.remarks


def test_an_animated_png():
    """Its picture is the one that every program shows, also where that is no frame of the animation."""
    frames = [Image.fromarray(array) for array in (BYTES, 255 - BYTES, BYTES[::-1])]
    for options in ({}, {'default_image': True}, {'disposal': 1, 'blend': 1}):
        content = saved(frames[0], 'PNG', save_all=True, append_images=frames[1:], **options)
        image = decode(content, NAME)
        assert_equal(image, by_pillow(content), 0)
        assert image.notes == [f'the first of {2 if "default_image" in options else 3} frames'] and not image.plain


@pytest.mark.parametrize('palette', [False, True])
def test_a_png_with_long_texts(palette):
    """Other programs store their settings there; Pillow refuses the file."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    picture = Image.fromarray(BYTES[..., :3])
    content = saved(picture.quantize(16) if palette else picture, 'PNG', icc_profile=profile)
    text = chunk(b'zTXt', b'workflow\0\0' + zlib.compress(bytes(2**22)))
    image = decode(content[:33] + text + content[33:], NAME, with_profile=True)
    assert_equal(image, by_pillow(content), 0)
    assert image.profile == profile and image.plain


def test_ordinary_files_are_decoded_once(monkeypatch):
    """Pillow is asked for an orientation alone, and decodes nothing."""
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda self: pytest.fail('Pillow decodes'))
    exif = Image.Exif()
    exif[274] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text('Software', 'a program')
    text.add_itxt('XML:com.adobe.xmp', '<x:xmpmeta></x:xmpmeta>')
    picture = Image.fromarray(BYTES[..., :3])
    for kind, options in (
        ('PNG', {'pnginfo': text, 'dpi': (300, 300)}),
        ('PNG', {'exif': exif}),
        ('JPEG', {'exif': exif}),
    ):
        image = decode(saved(picture, kind, **options), NAME)
        assert image.pixels.shape == ((WIDTH, HEIGHT, 3) if 'exif' in options else (HEIGHT, WIDTH, 3))


def test_the_profile_of_a_png_makes_no_noise(capfd):
    """libpng complains about an sRGB profile in a gray image, for one."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    image = decode(saved(Image.fromarray(BYTES[..., 0]), 'PNG', icc_profile=profile), NAME)
    assert image.remarks == [] and np.array_equal(image.pixels[..., 0], BYTES[..., 0]) and image.plain
    assert capfd.readouterr().err == ''


# ---------------------------------------------------------------------------------------------------------------- TIFF


def tiff(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, np.ascontiguousarray(array), **options)
    return file.getvalue()


def deep_lzw(array):
    """OpenCV compresses by LZW."""
    return cv2.imencode('.tif', array)[1].tobytes()


@pytest.mark.parametrize('layout', [{}, {'byteorder': '>'}, {'tile': (16, 32)}, {'rowsperstrip': 7}, {'bigtiff': True}])
@pytest.mark.parametrize('compression', [{}, {'compression': 'zlib'}, {'compression': 'zlib', 'predictor': True}])
@pytest.mark.parametrize('source', [BYTES, WORDS], ids=['8', '16'])
@pytest.mark.parametrize('channels,planar', [(1, None), (3, 'contig'), (3, 'separate'), (4, 'contig'), (4, 'separate')])
def test_every_layout_of_tiff(channels, planar, source, compression, layout):
    array = source[..., :channels] if channels > 1 else source[..., 0]
    if channels > 1:
        layout = {**layout, 'planarconfig': planar, 'photometric': 'rgb'}
        layout.update({'extrasamples': ['unassalpha']} if channels == 4 else {})
    image = decode(tiff(np.moveaxis(array, 2, 0) if planar == 'separate' else array, **layout, **compression), NAME)
    assert np.array_equal(image.pixels[..., ::-1], source[..., : min(3, channels)]) and image.notes == []
    assert image.pixels.dtype == source.dtype
    assert np.array_equal(image.alpha, source[..., 3]) if channels == 4 else image.alpha is None


@pytest.mark.parametrize('source', [BYTES, WORDS], ids=['8', '16'])
def test_alpha_and_white_of_tiff(source):
    white = np.iinfo(source.dtype).max
    image = decode(tiff(source[..., 0], photometric='miniswhite'), NAME)
    assert np.array_equal(image.pixels[..., 0], white - source[..., 0])
    alpha = source[..., 3:] // 2 + white // 4
    colours = (source[..., :3].astype(float) * alpha / white).round().astype(source.dtype)
    image = decode(tiff(np.dstack([colours, alpha]), photometric='rgb', extrasamples=['assocalpha']), NAME)
    assert (
        np.abs(image.pixels[..., ::-1].astype(int) - source[..., :3]).max() <= white // 255 * 4
    )  # few values are left
    assert np.array_equal(image.alpha, alpha[..., 0])
    image = decode(
        tiff(source[..., :2], photometric='minisblack', extrasamples=['unassalpha'], planarconfig='contig'), NAME
    )
    assert np.array_equal(image.pixels[..., 0], source[..., 0]) and np.array_equal(image.alpha, source[..., 1])
    image = decode(tiff(source, photometric='rgb', extrasamples=['unspecified']), NAME)
    assert np.array_equal(image.pixels[..., ::-1], source[..., :3]) and image.alpha is None


@pytest.mark.parametrize('bits', range(9, 16))
def test_packed_tiff(bits):
    """White is white: values of 12 bits are not taken for dark ones of 16."""
    values = (SMOOTH[..., 0] * (2**bits - 1)).round().astype(np.uint16)
    values[0, :2] = 0, 2**bits - 1
    rows = (np.unpackbits(row.astype('>u2')[:, None].view(np.uint8), axis=1)[:, 16 - bits :].ravel() for row in values)
    data = b''.join(np.packbits(row).tobytes() for row in rows)
    entries = [
        (256, WIDTH),
        (257, HEIGHT),
        (258, bits),
        (259, 1),
        (262, 1),
        (273, 200),
        (277, 1),
        (278, HEIGHT),
        (279, len(data)),
    ]
    directory = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in entries)
    head = b'II*\0' + struct.pack('<IH', 8, len(entries)) + directory + bytes(4)
    content = head.ljust(200, b'\0') + data
    try:
        assert np.abs(as_rgba(decode(content, NAME))[..., 0] - values * (255 / (2**bits - 1))).max() < 0.01
    except UserError as error:
        assert str(error) == f'{NAME} is packed in a way that takes another package: pip install imagecodecs'


def test_lzw_of_16_bits():
    """Which tifffile reads with imagecodecs alone."""
    for array in (WORDS[..., 0], WORDS[..., :3], WORDS):
        image = decode(deep_lzw(array), NAME)
        assert image.pixels.dtype == np.uint16
        assert np.array_equal(image.pixels, array[..., None] if array.ndim == 2 else array[..., :3])
        assert np.array_equal(image.alpha, array[..., 3]) if array is WORDS else image.alpha is None
    image = decode(saved(made('I;16'), 'TIFF', compression='tiff_lzw'), NAME)
    assert np.array_equal(image.pixels[..., 0], WORDS[..., 0])


@pytest.mark.parametrize(
    'array,options,message',
    [
        (SMOOTH[..., 0], {}, 'has float32 values; 8 or 16 bit images are needed'),
        (SMOOTH[..., :3].astype(np.float16), {'photometric': 'rgb'}, 'has float16 values'),
        (WORDS[..., 0].astype(np.int32), {}, 'has int32 values'),
        (WORDS[..., 0].astype(np.uint32), {}, 'has uint32 values'),
        (WORDS[..., 0].astype(np.int16), {}, 'has int16 values'),
        (BYTES[..., 0].astype(np.int8), {}, 'has int8 values'),
        (np.zeros((8, 8), np.complex64), {}, 'has complex64 values'),
        (WORDS, {'photometric': 'separated'}, 'is a TIFF file of 16 bits and SEPARATED colours'),
        (np.repeat(WORDS[..., :1], 9, 2), {'photometric': 'minisblack', 'planarconfig': 'contig'}, 'has 9 channels'),
        (
            np.repeat(BYTES[..., :1], 9, 2),
            {'photometric': 'minisblack', 'planarconfig': 'contig'},
            'is a TIFF file of 9 channels, 8 bits and MINISBLACK colours, which is not read',
        ),
        (BYTES[..., 0], {'photometric': 32803}, 'is a raw photograph (DNG)'),
        (BYTES[..., :3], {'photometric': 'rgb', 'subfiletype': 1}, 'begins with a reduced image'),
    ],
)
def test_tiff_that_is_refused(array, options, message):
    with pytest.raises(UserError) as error:
        decode(tiff(array, **options), NAME)
    assert NAME in str(error.value) and message in str(error.value)


def test_pages():
    """Those of a document count; reduced images of the first do not."""
    for source in (BYTES, WORDS):
        file = io.BytesIO()
        with tifffile.TiffWriter(file) as writer:
            for array, kind in ((source, 0), (source[::2, ::2], 1), (source[::-1], 0)):
                writer.write(array[..., :3].copy(), photometric='rgb', subfiletype=kind)
        image = decode(file.getvalue(), NAME)
        assert np.array_equal(image.pixels[..., ::-1], source[..., :3]) and image.notes == ['the first of 2 pages']
    stack = decode(tiff(np.stack([WORDS[..., 0], WORDS[..., 1]]), imagej=True), NAME)
    assert np.array_equal(stack.pixels[..., 0], WORDS[..., 0]) and stack.notes == ['the first of 2 pages']


# --------------------------------------------------------------------------------------------------------- Orientation


def kinds_of_orientation():
    picture = Image.fromarray(BYTES[..., :3])
    yield 'JPEG', picture, {'quality': 95}
    yield 'JPEG', picture.convert('L'), {}
    yield 'JPEG', picture.convert('CMYK'), {}
    yield 'PNG', picture, {}
    yield 'PNG', picture.quantize(16), {}
    yield 'PNG', made('I;16'), {}
    yield 'PNG', Image.fromarray(BYTES), {}
    yield 'WEBP', picture, {'lossless': True}
    yield 'AVIF', picture, {'quality': 90}
    yield 'TIFF', picture, {}
    yield 'TIFF', made('I;16'), {'compression': 'tiff_deflate'}
    yield 'TIFF', made('I;16'), {'compression': 'tiff_lzw'}
    yield 'MPO', picture, {}


@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation(orientation):
    for kind, image, options in kinds_of_orientation():
        exif = Image.Exif()
        exif[274] = orientation
        content = saved(image, kind, exif=exif, **options)
        ours, expected = decode(content, NAME), by_pillow(content)
        assert_equal(ours, expected)
        assert expected.shape[:2] == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT)), kind
        assert not (ours.plain and orientation > 1)


def test_orientation_in_xmp():
    xmp = b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"></x:xmpmeta>'
    text = PngImagePlugin.PngInfo()
    text.add_itxt('XML:com.adobe.xmp', xmp.decode())
    content = saved(Image.fromarray(BYTES[..., :3]), 'PNG', pnginfo=text)
    assert_equal(decode(content, NAME), by_pillow(content), 0)
    assert decode(content, NAME).pixels.shape == (WIDTH, HEIGHT, 3)
    content = saved(Image.fromarray(BYTES[..., :3]), 'JPEG', xmp=xmp)
    assert decode(content, NAME).pixels.shape == (WIDTH, HEIGHT, 3)
    assert_equal(decode(content, NAME), by_pillow(content))


# ---------------------------------------------------------------------------------------------------------- Other kinds


@pytest.mark.parametrize('bits', range(9, 17))
def test_jpeg_2000_of_more_than_8_bits(bits):
    """Of 9 bits white is no 128th of white."""
    values = WORDS[..., 0] >> (16 - bits)
    # Pillow writes 16 bits. What is coded is the distance from the middle of the range that the header says.
    coded = (values.astype(int) + 2**15 - 2 ** (bits - 1)).astype(np.uint16)
    content = bytearray(saved(Image.fromarray(coded), 'JPEG2000', irreversible=False))
    content[content.find(b'ihdr') + 14] = content[content.find(b'\xff\x51') + 40] = bits - 1
    image = decode(bytes(content), NAME)
    assert_equal(image, by_pillow(bytes(content)))
    assert np.abs(as_rgba(image)[..., 0] - values * (255 / (2**bits - 1))).max() < 1


@pytest.mark.parametrize('most', [1, 15, 255, 511, 1023, 4095, 65535])
@pytest.mark.parametrize('kind', ['P2', 'P3', 'P5', 'P6'])
def test_pnm(kind, most):
    channels, deep = 3 if kind in ('P3', 'P6') else 1, most > 255
    values = (SMOOTH[..., :channels] * most).round().astype(int)
    data = values.astype('>u2' if deep else 'u1').tobytes()
    if kind in ('P2', 'P3'):
        data = b' '.join(b'%d' % value for value in values.ravel()) + b'\n# the end\n'
    content = f'{kind}\n# a comment, 7 7 7\n{WIDTH} # wide\n{HEIGHT}\n{most}\n'.encode() + data
    image = decode(content, NAME)
    assert image.pixels.dtype == (np.uint16 if deep else np.uint8) and image.pixels.shape == (HEIGHT, WIDTH, channels)
    assert np.abs(as_rgba(image)[..., :3] - values * (255 / most)).max() <= 0.5
    for cut in (content[: len(content) // 2], content[:9], content.replace(b'%d\n' % most, b'70000\n', 1)):
        with pytest.raises(UserError, match=NAME):
            decode(cut, NAME)


@pytest.mark.parametrize('subsampling', [0, 1, 2])
@pytest.mark.parametrize('progressive', [False, True])
def test_jpeg(subsampling, progressive):
    options = {'subsampling': subsampling, 'progressive': progressive}
    for image in (Image.fromarray(BYTES[..., :3]), Image.fromarray(BYTES[..., 0])):
        content = saved(image, 'JPEG', **options)
        assert_equal(decode(content, NAME), by_pillow(content))
        assert decode(content, NAME).pixels.shape[2] == len(image.getbands())
    if not subsampling:
        content = saved(Image.fromarray(BYTES[..., :3]), 'JPEG', keep_rgb=True)
        assert_equal(decode(content, NAME), by_pillow(content))
    # YCCK: Adobe's mark says how the four channels are stored.
    content = saved(made('CMYK'), 'JPEG', **options)
    for transform in (0, 2):
        at = content.find(b'Adobe')
        marked = content[: at + 11] + bytes([transform]) + content[at + 12 :]
        assert_equal(decode(marked, NAME), by_pillow(marked))
        assert decode(marked, NAME).notes == ['CMYK became sRGB without a profile, so its colours are approximate']


def test_colours_of_more_bits_that_are_cut():
    """Pillow reads 8 of them, which is said."""
    content = cv2.imencode('.jp2', WORDS[..., :3])[1].tobytes()
    assert decode(content, NAME).notes == ['16 bits become 8']
    assert_equal(decode(content, NAME), by_pillow(content))
    assert decode(saved(Image.fromarray(BYTES), 'JPEG2000'), NAME).notes == []
    assert decode(saved(Image.fromarray(BYTES), 'AVIF'), NAME).notes == []
    content = saved(Image.fromarray(BYTES[..., :3]), 'AVIF')
    ten = content.replace(b'pixi' + bytes(4) + b'\x03\x08\x08\x08', b'pixi' + bytes(4) + b'\x03\x0a\x0a\x0a')
    assert decoding._bits(content) == 8 and decoding._bits(ten) == 10  # its decoder wants 10 bits in other places, too


def test_print_colours_with_a_profile():
    """They are converted as the profile says; an sRGB profile that claims to be one of CMYK is not used."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    content = saved(made('CMYK'), 'TIFF', icc_profile=profile)
    assert_equal(decode(content, NAME), by_pillow(content))
    content = saved(made('LAB'), 'TIFF')
    assert decode(content, NAME).notes == ['LAB became sRGB']
    assert np.abs(as_rgba(decode(content, NAME))[..., :3] - BYTES[..., :3]).mean() < 2  # of 8 bits in LAB


@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'AVIF'])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.fromarray(array[..., :3]) for array in (BYTES, 255 - BYTES)]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    image = decode(content, NAME)
    assert image.notes == ['the first of 2 frames']
    assert_equal(image, by_pillow(content))


@pytest.mark.parametrize('bits,alpha', [(24, False), (32, True)])
def test_bmp_with_alpha(bits, alpha):
    content = saved(Image.fromarray(BYTES if alpha else BYTES[..., :3]), 'BMP')
    assert_equal(decode(content, NAME), by_pillow(content))
    if alpha:  # a header of version 4, with masks
        pixels = BYTES[::-1, :, [2, 1, 0, 3]].tobytes()
        masks = struct.pack('<IIII', 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        header = struct.pack('<IiiHHIIiiII', 108, WIDTH, HEIGHT, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks + bytes(52)
        content = b'BM' + struct.pack('<IHHI', 122 + len(pixels), 0, 0, 122) + header + pixels
        assert np.array_equal(decode(content, NAME).alpha, BYTES[..., 3])
        assert_equal(decode(content, NAME), by_pillow(content))


def test_heif(monkeypatch):
    heif = pytest.importorskip('pillow_heif')
    file = io.BytesIO()
    heif.from_pillow(Image.fromarray(BYTES[..., :3])).save(file, quality=90)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'pillow_heif', None)  # as if it were not installed
        with pytest.raises(UserError) as error:
            decode(file.getvalue(), NAME)
        assert str(error.value) == f'{NAME} is a HEIF image, which is read by pillow-heif: pip install "dckd_sr[heif]"'
    image = decode(file.getvalue(), NAME)
    assert_equal(image, by_pillow(file.getvalue()))
    assert np.abs(as_rgba(image)[..., :3] - BYTES[..., :3]).mean() < 6


def test_heif_is_told_from_its_first_bytes(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    for brand in (b'heic', b'heix', b'mif1', b'msf1'):
        with pytest.raises(UserError, match='dckd_sr.heif'):
            decode(b'\0\0\0\x18ftyp' + brand + bytes(40), NAME)


# --------------------------------------------------------------------------------------------------------------- Damage


def noisy(dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (64, 80, 3), dtype)


def kinds_of_files():
    picture = Image.fromarray(noisy())
    for kind in sorted(READ):
        yield kind, saved(picture, kind)
    yield 'palette', saved(picture.quantize(64), 'PNG')
    yield 'CMYK', saved(picture.convert('CMYK'), 'JPEG')
    yield 'TIFF 16', tiff(noisy(np.uint16), photometric='rgb')
    yield 'TIFF 16 zlib', tiff(noisy(np.uint16), photometric='rgb', compression='zlib')
    yield 'TIFF 16 LZW', deep_lzw(noisy(np.uint16))
    yield 'TIFF LZW', saved(picture, 'TIFF', compression='tiff_lzw')
    yield 'TIFF JPEG', saved(picture, 'TIFF', compression='jpeg')


@pytest.mark.parametrize('kind,content', [pytest.param(*each, id=each[0]) for each in kinds_of_files()])
def test_damage_is_told(kind, content, capfd):
    """Files that end early are refused; others are read or refused, and nothing but words of ours is written."""
    for keep in (0, 1, 3, 10, 20, 40, 100, *(int(len(content) * part) for part in (0.3, 0.5, 0.9, 0.99))):
        with pytest.raises(UserError) as error:
            decode(content[:keep], NAME)
        assert NAME in str(error.value) and '\n' not in str(error.value)
    rng = np.random.default_rng(1)
    for _ in range(40):
        damaged, at = bytearray(content), rng.integers(0, len(content) - 8)
        damaged[at : at + 8] = rng.integers(0, 256, 8, np.uint8).tobytes()
        try:
            decode(bytes(damaged), NAME)
        except UserError as error:
            assert NAME in str(error) and '\n' not in str(error)
    assert capfd.readouterr().err == ''


def test_what_a_library_says_is_told_with_the_name(tmp_path, capfd):
    """libjpeg and libpng write to the error stream themselves."""
    content = saved(Image.fromarray(noisy()), 'JPEG')
    harmless = content[:-2] + bytes(9) + content[-2:]
    image = decode(harmless, NAME)
    assert image.remarks == ['Corrupt JPEG data: 8 extraneous bytes before marker 0xd9']
    assert_equal(image, by_pillow(content))
    scan = content.find(b'\xff\xda') + 20
    with pytest.raises(UserError, match=f'damaged: {NAME}: Corrupt JPEG data: '):
        decode(content[: scan + 99] + content[-2:], NAME)
    content = bytearray(saved(Image.fromarray(noisy()), 'PNG'))
    content[200] ^= 1
    with pytest.raises(UserError, match=f'damaged: {NAME}: libpng error: IDAT: '):
        decode(bytes(content), NAME)
    assert capfd.readouterr().err == ''


def test_the_error_stream_comes_back(capfd):
    """Whatever threads and forks do meanwhile."""
    content = saved(Image.fromarray(noisy()), 'JPEG')[:-2] + bytes(9) + b'\xff\xd9'
    failures = []

    def work():
        for _ in range(20):
            if len(decode(content, NAME).remarks) != 1:
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    if hasattr(os, 'fork'):
        for _ in range(5):
            child = os.fork()
            if not child:
                os.write(2, b'a child\n')
                os._exit(len(decode(content, NAME).remarks) - 1)
            assert os.waitpid(child, 0)[1] == 0
    for thread in threads:
        thread.join()
    os.write(2, b'the end\n')
    assert not failures
    assert capfd.readouterr().err == 'a child\n' * 5 * hasattr(os, 'fork') + 'the end\n'


def test_without_an_error_stream():
    """As services start."""
    code = """import os; os.close(2)
from dckd_sr.data.decoding import decode
print(decode(open('a.png', 'rb').read(), 'a').pixels.shape)"""
    Image.fromarray(BYTES).save('a.png')
    done = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert done.stdout == f'({HEIGHT}, {WIDTH}, 3)\n'


# ---------------------------------------------------------------------------------------------------------- Odd content


def tiff_of_size(width, height):
    content = bytearray(tiff(np.zeros((8, 8), np.uint16)))
    for tag, size in ((256, width), (257, height)):
        at = content.find(struct.pack('<H', tag))
        content[at + 2 : at + 12] = struct.pack('<HII', 4, 1, size)
    return bytes(content)


def jpeg_of_size(width, height):
    content = bytearray(saved(Image.new('RGB', (8, 8)), 'JPEG'))
    at = content.find(b'\xff\xc0')
    content[at + 5 : at + 9] = struct.pack('>HH', height, width)
    return bytes(content)


@pytest.mark.parametrize(
    'content',
    [
        png(np.zeros((1, 1, 1), int), 8, 0).replace(struct.pack('>II', 1, 1), struct.pack('>II', 60000, 60000), 1),
        tiff_of_size(60000, 60000),
        jpeg_of_size(60000, 60000),
        b'P5 60000 60000 255\n',
        b'P3 60000 60000 255\n1 2 3',
    ],
    ids=['png', 'tiff', 'jpeg', 'pgm', 'ppm'],
)
def test_a_huge_image_is_not_begun(content):
    with pytest.raises(UserError, match='is 60000x60000 px; at most 1074 million pixels are read'):
        decode(content, NAME)


def test_a_large_image_is_read():
    """200 million pixels, as telephones take them; Pillow alone would refuse."""
    Image.MAX_IMAGE_PIXELS, before = 100, Image.MAX_IMAGE_PIXELS
    try:
        content = saved(Image.fromarray(BYTES[..., 0]).quantize(9), 'GIF')
        assert decode(content, NAME).pixels.shape[:2] == (HEIGHT, WIDTH)
        assert Image.MAX_IMAGE_PIXELS == 100
    finally:
        Image.MAX_IMAGE_PIXELS = before


@pytest.mark.parametrize(
    'content,message',
    [
        (b'', ''),
        (b'words ' * 99, ''),
        (bytes(1000), ''),
        (b'PK\x03\x04' + bytes(99), ': an archive; unpack it first'),
        (b'\x1f\x8b' + bytes(99), ': an archive; unpack it first'),
        (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', ': a PostScript document'),
        (b'Pf\n2 2\n-1.0\n' + bytes(16), None),
        (b'<!DOCTYPE html><html></html>', ': a web page or a drawing in XML'),
        (b'\0\0\0\x0cJXL \r\n\x87\n' + bytes(99), ': a JPEG XL image; convert it first'),
        (b'8BPS' + bytes(99), ': a Photoshop document; export its picture first'),
    ],
)
def test_what_is_no_image(content, message):
    with pytest.raises(UserError) as error:
        decode(content, 'a file.png')
    expected = f'not an image, or damaged: a file.png{message}'
    assert str(error.value) == expected if message is not None else 'a file.png' in str(error.value)


@pytest.mark.skipif(sys.platform != 'linux', reason='bounds the memory of a process')
def test_too_little_memory():
    """A small file of a large image."""
    names = ['a.png', 'a.jpg', 'palette.png']
    code = """import resource, sys
from pathlib import Path
from dckd_sr.data.decoding import decode
from dckd_sr.errors import UserError
files = {name: Path(name).read_bytes() for name in sys.argv[1:]}
used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 20 * 2**20,) * 2)
for name, content in files.items():
    try:
        decode(content, name)
    except UserError as error:
        print(error)"""
    large = Image.new('RGB', (4000, 4000))
    for name in names:
        (large.convert('P') if 'palette' in name else large).save(name)
    done = subprocess.run([sys.executable, '-c', code, *names], stdout=subprocess.PIPE, text=True)
    assert done.stdout.splitlines() == [f'not enough memory for {name}' for name in names]


def test_no_pixels():
    for content in (png(np.zeros((0, 0, 1), int), 8, 0), b'P5 0 4 255\n', b'P6 4 0 255\n', tiff_of_size(0, 0)):
        with pytest.raises(UserError, match=NAME):
            decode(content, NAME)


def test_another_suffix_than_content(tmp_path):
    for kind in ('PNG', 'JPEG', 'TIFF', 'WEBP', 'GIF'):
        content = saved(Image.fromarray(BYTES[..., :3]), kind)
        assert_equal(decode(content, 'a.bmp'), by_pillow(content))


# --------------------------------------------------------------------------------------------------- One for everything


def odd_files():
    """{name: content} of files that programs read differently."""
    picture = Image.fromarray(BYTES[..., :3])
    exif = Image.Exif()
    exif[274] = 6
    for kind, suffix in (('PNG', 'png'), ('WEBP', 'webp'), ('AVIF', 'avif'), ('JPEG', 'jpg'), ('TIFF', 'tif')):
        yield f'turned_{kind}.{suffix}', saved(picture, kind, exif=exif)
    yield 'palette.tif', saved(picture.quantize(16), 'TIFF')
    yield 'planar.tif', tiff(np.moveaxis(WORDS[..., :3], 2, 0), photometric='rgb', planarconfig='separate')
    yield 'white.tif', tiff(WORDS[..., 0], photometric='miniswhite')
    yield 'alpha.tif', tiff(WORDS, photometric='rgb', extrasamples=['assocalpha'])
    yield 'clear.png', png(BYTES[..., :1].astype(int), 8, 0, (b'tRNS', b'\0\x09'))
    yield 'gray_alpha.png', png(WORDS[..., :2].astype(int), 16, 4)
    yield 'moving.png', saved(picture, 'PNG', save_all=True, append_images=[Image.new('RGB', picture.size)])
    yield 'print.jpg', saved(picture.convert('CMYK'), 'JPEG')
    yield 'dark.pgm', f'P5 {WIDTH} {HEIGHT} 1023\n'.encode() + (WORDS[..., 0] >> 6).astype('>u2').tobytes()
    yield 'gray.jp2', saved(made('I;16'), 'JPEG2000')
    yield 'wrong.bmp', saved(picture, 'PNG')


@pytest.mark.filterwarnings('ignore')
def test_every_command_and_dataset_reads_the_same(tmp_path):
    """upscale and export; training, validation and tests by ours and BasicSR's datasets, of files and LMDB; prepare."""
    folder = tmp_path / 'in'
    folder.mkdir()
    for name, content in odd_files():
        (folder / name).write_bytes(content)
    assert prepare.main(['lmdb', 'in', 'in.lmdb', '--workers', '1']) == 0
    assert prepare.main(['sr', 'in', 'out', '--scales', '2', '--workers', '1']) == 0
    opt = {'phase': 'val', 'scale': 1, 'name': 'odd', 'dataroot_gt': 'in', 'dataroot_lq': 'in', 'filename_tmpl': '{}'}
    stored = {**opt, 'dataroot_gt': 'in.lmdb', 'dataroot_lq': 'in.lmdb', 'io_backend': {'type': 'lmdb'}}
    sets = [
        build_dataset({**opt, 'type': 'SRImageDataset'}),
        build_dataset({**opt, 'type': 'PairedImageDataset', 'io_backend': {'type': 'disk'}}),
        build_dataset({**opt, 'type': 'SingleImageDataset', 'io_backend': {'type': 'disk'}}),
        build_dataset({**stored, 'type': 'SRImageDataset'}),
        build_dataset({**stored, 'type': 'PairedImageDataset'}),
    ]
    names = sorted(path.name for path in folder.iterdir())
    assert {len(images) for images in sets} == {len(names)} == {len(list(odd_files()))}
    for index, name in enumerate(names):
        picture = pictures.read(folder / name).pixels
        expected = picture.astype(np.float32) / np.iinfo(picture.dtype).max
        expected = np.repeat(expected, 3, 2) if expected.shape[2] == 1 else expected
        for images in sets:
            sample = images[index]
            assert Path(name).stem in sample['lq_path']
            np.testing.assert_allclose(sample['lq'].numpy().transpose(1, 2, 0), expected, atol=1e-6, err_msg=name)
        made = pictures.read(tmp_path / 'out' / 'HR' / f'{Path(name).stem}.png')
        assert np.array_equal(made.pixels, picture) and made.alpha is None and made.notes == [], name
        assert read_image(str(folder / name))[0].shape == picture.shape
    [frame] = read_img_seq(['in/turned_PNG.png']).numpy()
    assert np.array_equal(frame, sets[0][names.index('turned_PNG.png')]['lq'].numpy())


def test_basicsrs_reader_in_all_its_forms():
    """As its own datasets and those of others call it."""
    from basicsr.utils import imfrombytes

    for content in (cv2.imencode('.png', array)[1].tobytes() for array in (BYTES, BYTES[..., :3], BYTES[..., 0])):
        array = np.frombuffer(content, np.uint8)
        for flag, kind in (
            ('color', cv2.IMREAD_COLOR),
            ('grayscale', cv2.IMREAD_GRAYSCALE),
            ('unchanged', cv2.IMREAD_UNCHANGED),
        ):
            expected = cv2.imdecode(array, kind)
            read = imfrombytes(content, flag)
            # libpng has weights of its own for gray.
            assert read.shape == expected.shape and np.abs(read.astype(int) - expected).max() <= (flag == 'grayscale')
            floats = imfrombytes(content, flag, float32=True)
            assert floats.dtype == np.float32 and np.array_equal(floats, read.astype(np.float32) / 255.0)
    deep = cv2.imencode('.png', WORDS[..., :3])[1].tobytes()
    assert np.array_equal(imfrombytes(deep), WORDS[..., :3] >> 8) and imfrombytes(deep).dtype == np.uint8
    assert np.array_equal(imfrombytes(deep, 'unchanged'), WORDS[..., :3])
    assert np.array_equal(imfrombytes(deep, float32=True), WORDS[..., :3].astype(np.float32) / 65535)
    with pytest.raises(ValueError, match='not an image, or damaged: an image'):
        imfrombytes(b'words')
