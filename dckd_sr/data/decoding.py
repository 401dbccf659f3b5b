"""The one reader of image files: every command and every dataset decodes with `decode`.

The header decides who decodes: OpenCV ordinary PNG and JPEG files, tifffile TIFF files of more than 8 bits, Pillow the
rest, each only what it gets right. What is read with a loss is told in words, what cannot be read right is refused.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import struct
import tempfile
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
from PIL import Image, ImageCms

from dckd_sr.errors import UserError, reason

SUFFIXES = (
    *('.png', '.jpg', '.jpeg', '.jfif', '.bmp', '.dib', '.tif', '.tiff', '.webp', '.ppm', '.pgm', '.pbm', '.pnm'),
    *('.gif', '.avif', '.jp2', '.tga', '.heic', '.heif', '.hif'),
)
_PACKED = ' is packed in a way that takes another package: pip install imagecodecs'
_LONGEST_PROFILE = 2**24
MOST_PIXELS = 2**30  # of an image, OpenCV's bound, too: a small file may claim any size

# No other: Pillow opens EPS files, for one, by running Ghostscript on them.
_PILLOW = ('PNG', 'JPEG', 'MPO', 'BMP', 'DIB', 'PPM', 'WEBP', 'TIFF', 'GIF', 'AVIF', 'JPEG2000', 'HEIF')
_GRAY = ('1', 'L', 'LA', 'La', 'I;16', 'I;16B', 'I;16L', 'I;16N')
_ORIENTATION, _DNG = 274, 50706  # tags of EXIF and TIFF
_TURNS = {  # orientation -> what puts the picture upright
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: np.swapaxes(image, 0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(np.swapaxes(image, 0, 1), 2),
    8: lambda image: np.rot90(image, 1),
}
_OTHERS = {  # what files that are no images, or of formats that are not read, begin with
    **dict.fromkeys((b'PK\x03\x04', b'\x1f\x8b', b'7z\xbc\xaf', b'Rar!'), 'an archive; unpack it first'),
    **dict.fromkeys((b'\xff\n', b'\x00\x00\x00\x0cJXL '), 'a JPEG XL image; convert it first'),
    **dict.fromkeys((b'v/1\x01', b'#?RADIANCE', b'PF', b'Pf'), 'an image of floats; convert it first'),
    b'8BPS': 'a Photoshop document; export its picture first',
    b'P7': 'a PAM image; convert it first',
    b'%PDF': 'a PDF document',
    b'%!PS': 'a PostScript document',
    b'<': 'a web page or a drawing in XML',
}
_HEIF = (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1')
# Of libjpeg: pixels are missing or wrong. Superfluous bytes, of which it speaks as well, do no harm.
_DAMAGE = re.compile(r'Corrupt JPEG data: (?!\d+ extraneous)|Premature end of JPEG|\[ERROR|libpng error|LZWDecode')


@dataclass
class Decoded:
    """An image, upright.

    Attributes:
        pixels: (h, w, 1) gray or (h, w, 3) BGR; uint8 or uint16.
        alpha: (h, w) of the same type, not multiplied into the colours, or None.
        notes: what was left out or changed on the way, in words.
        remarks: what the library that decoded it wrote to the error stream.
        plain: any program reads these very pixels from a PNG file: neither alpha nor orientation nor frames.
        profile: the ICC profile of these pixels, if asked for; empty for none.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    plain: bool = False
    profile: bytes | None = None

    @property
    def lost(self) -> list[str]:
        """In words, what whoever takes the pixels alone should know."""
        return [*(['alpha channel dropped, colours as stored'] if self.alpha is not None else []), *self.notes]


def decode(content: bytes, name: str, with_profile: bool = False) -> Decoded:
    """Decode the bytes of an image file.

    Values are as stored: a colour profile is not applied, but for print colours (CMYK) and LAB, which become sRGB.
    Orientation is applied. Of several frames or pages, the first counts.

    Args:
        content: the file.
        name: for messages.
        with_profile: read the colour profile, too.

    Raises:
        UserError: not an image, damaged, truncated, too large, or of a kind that is not read; the message has ``name``.
    """
    kind = _KINDS.get(bytes(content[:4])) or _KINDS.get(bytes(content[:2])) or _by_pillow
    try:
        with _listening() as remarks:
            image = kind(content, name)
            if with_profile and image.profile is None:
                with _opened(content) as header:
                    image.profile = header.info.get('icc_profile')
    except UserError:
        raise
    except MemoryError:
        raise UserError(f'not enough memory for {name}') from None
    except _Refused as error:
        raise UserError(f'{name}{error}') from None
    except Exception as error:  # whatever libraries raise on damaged files
        raise UserError(f'not an image, or damaged: {name}{_because(error, content, remarks)}') from error
    damage = next((line for line in remarks if _DAMAGE.search(line)), None)
    if damage:
        raise UserError(f'not an image, or damaged: {name}: {damage}')
    if min(image.pixels.shape) < 1:
        raise UserError(f'{name} has no pixels')
    image.remarks = remarks
    return image


class _Refused(Exception):
    """Words that follow the name of a file, which is an image of a kind that is not read."""


class _Damaged(Exception):
    """An image that its library gives no reason to refuse."""


def _because(error, content, remarks):
    kind = next((kind for mark, kind in _OTHERS.items() if content[: len(mark)] == mark), None)
    if kind:
        return f': {kind}'
    if isinstance(error, (_Damaged, Image.UnidentifiedImageError)):
        return ''.join(f': {remark}' for remark in remarks[:1])
    return f': {reason(error)}'


# ---------------------------------------------------------------------------------------------------------------------
# What C libraries write to the error stream

_LOCK = threading.RLock()
if hasattr(os, 'register_at_fork'):  # a process forked in between would keep the exchanged stream
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """The list gets, at the end, the lines that libraries wrote to the process's error stream meanwhile."""
    lines = []
    with _LOCK, _buffer() as heard:
        try:
            stream = os.dup(2)
        except OSError:  # there is none
            stream = None
        else:
            os.dup2(heard.fileno(), 2)
        try:
            yield lines
        finally:
            if stream is not None:
                os.dup2(stream, 2)
                os.close(stream)
            if heard.seek(0, os.SEEK_END):
                heard.seek(0)
                text = heard.read().decode('utf-8', 'replace')
                lines += dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())


def _buffer():
    if hasattr(os, 'memfd_create'):
        return open(os.memfd_create('heard'), 'r+b', buffering=0)
    return tempfile.TemporaryFile(buffering=0)


# ---------------------------------------------------------------------------------------------------------------------
# PNG and JPEG: OpenCV, where the header says that it is plain


def _png(content, name):
    chunks, at = [], 8
    while at + 12 <= len(content):
        (size,), kind = struct.unpack_from('>I', content, at), content[at + 4 : at + 8]
        chunks.append((kind, at, at + 12 + size))
        at += 12 + size
        if kind == b'IEND':
            break
    if not chunks or chunks[-1][0] != b'IEND' or at > len(content):
        raise UserError(f'truncated file: {name}')
    kinds = {kind for kind, *_ in chunks}
    if chunks[0][0] != b'IHDR' or chunks[0][2] != 33:
        raise _Damaged
    width, height, depth, colour = struct.unpack_from('>IIBB', content, 16)
    _check_size(width, height, name)
    found = {kind: content[start + 8 : end - 4] for kind, start, end in chunks if kind in (b'tRNS', b'acTL', b'iCCP')}
    # Pillow decodes the picture to find an orientation: where there is none, it is not asked.
    texts = [content[start + 8 : end] for kind, start, end in chunks if kind in (b'iTXt', b'tEXt', b'zTXt')]
    oriented = any(text.startswith(b'Raw profile type') or b'tiff:Orientation' in text for text in texts)
    upright = _turn(content) if oriented or b'eXIf' in kinds else None
    needed = {b'IHDR', b'IDAT', b'IEND', *((b'PLTE', b'tRNS') if colour == 3 else ())}
    if kinds - needed:
        # Without what else is in it: libpng complains about profiles, Pillow refuses long texts, and OpenCV makes
        # something else of animations and of the transparent colour.
        parts = [content[start:end] for kind, start, end in chunks if kind in needed]
        content = b''.join([content[:8], *parts])
    if colour == 3:
        image = _by_pillow(content, name)
    else:
        stored = _opencv(content, cv2.IMREAD_UNCHANGED)
        image = Decoded(stored[..., : 1 if colour in (0, 4) else 3], stored[..., -1] if colour in (4, 6) else None)
        if len(found.get(b'tRNS', b'')) == {0: 2, 2: 6}.get(colour):
            key = np.array(struct.unpack(f'>{len(found[b"tRNS"]) // 2}H', found[b'tRNS']))[::-1]
            key = key * (255 // (2**depth - 1)) if depth < 8 else key
            clear = (image.pixels == key).all(2)
            image.alpha = np.where(clear, 0, np.iinfo(stored.dtype).max).astype(stored.dtype)
    if b'acTL' in found:
        image.notes += _frames(int.from_bytes(found[b'acTL'][:4], 'big'), 'frames')
    image.plain = image.alpha is None and not image.notes and upright is None
    image.profile = b''
    if b'iCCP' in found:  # a name, 0, and how it is compressed
        with contextlib.suppress(zlib.error):
            image.profile = zlib.decompressobj().decompress(found[b'iCCP'].partition(b'\0')[2][1:], _LONGEST_PROFILE)
    return _turned(image, upright)


def _jpeg(content, name):
    size, precision, components, with_exif, scan = 0, 8, 0, False, 0
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:  # headers are 0xff, a marker and a length
        marker = content[at + 1]
        if marker == 0xDA:
            scan = at
            break
        if marker == 0xFF:
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and at + 10 <= len(content):
            precision, *size, components = struct.unpack_from('>BHHB', content, at + 4)
        with_exif |= marker == 0xE1
        at += 2 + int.from_bytes(content[at + 2 : at + 4], 'big')
    # A camera's thumbnail, which lies in the header, has an end of its own.
    if content.find(b'\xff\xd9', scan) < 0:
        raise UserError(f'truncated file: {name}')
    if precision != 8:
        raise _Refused(f' is a JPEG file of {precision} bits, which is not read; 8 are needed')
    if not scan or components not in (1, 3):
        return _by_pillow(content, name)
    _check_size(size[1], size[0], name)
    flag = cv2.IMREAD_GRAYSCALE if components == 1 else cv2.IMREAD_COLOR
    image = _opencv(content, flag | cv2.IMREAD_IGNORE_ORIENTATION)
    return _turned(Decoded(image), _turn(content) if with_exif else None)


def _opencv(content, flags):
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error as error:
        raise MemoryError if error.code == cv2.Error.StsNoMem else _Damaged from error
    if image is None:
        raise _Damaged
    return image if image.ndim == 3 else image[..., None]


def _check_size(width, height, name):
    if width * height > MOST_PIXELS:
        raise UserError(f'{name} is {width}x{height} px; at most {MOST_PIXELS / 1e6:.0f} million pixels are read')


def _frames(count, word):
    return [f'the first of {count} {word}'] if count > 1 else []


def _turn(content):
    """What puts the picture upright, or None."""
    with contextlib.suppress(Exception), _opened(content) as header:  # whatever Pillow finds odd beside the picture
        return _TURNS.get(_orientation(header))
    return None


def _orientation(header):
    try:
        return header.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF: the picture is as it is
        return 1


def _turned(image, turn):
    if turn is not None:
        image.pixels = turn(image.pixels)
        image.alpha = None if image.alpha is None else turn(image.alpha)
    return image


# ---------------------------------------------------------------------------------------------------------------------
# TIFF


def _tiff(content, name):
    import tifffile  # half a second

    logging.getLogger('tifffile').setLevel(logging.CRITICAL)  # what it says about odd tags comes as exceptions, too
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        count = len(file.pages)
        if not count:  # the directory often lies at the end
            raise UserError(f'truncated file: {name}')
        page = file.pages.first
        if count > 1:
            count = sum(not other.subfiletype & 5 for other in file.pages)  # neither reduced images nor masks
        if file.is_imagej:  # its stacks have one header
            count = max(count, (file.imagej_metadata or {}).get('images', 1))
        _check_size(page.imagewidth, page.imagelength, name)
        photometric, bits = int(page.photometric or 0), page.bitspersample
        if _DNG in page.tags or photometric in (32803, 34892):
            raise _Refused(' is a raw photograph (DNG), which is not read; convert it first')
        if page.subfiletype & 1:
            raise _Refused(' begins with a reduced image, as raw photographs do, which is not read; convert it first')
        if page.sampleformat not in (1, 4):
            raise _Refused(f' has {page.dtype or "signed or fractional"} values; 8 or 16 bit images are needed')
        if not isinstance(bits, int) or not 1 <= bits <= 16:
            raise _Refused(f' has {page.dtype or f"({bits} bit)"} values; 8 or 16 bit images are needed')
        if bits <= 8:
            try:
                image = _by_pillow(content, name)
            except Image.UnidentifiedImageError:
                kind = getattr(page.photometric, 'name', photometric)
                kind = f'{page.samplesperpixel} channels, {bits} bits and {kind} colours'
                raise _Refused(f' is a TIFF file of {kind}, which is not read') from None
        else:
            image = _deep_tiff(page, content, photometric, bits)
    image.notes += _frames(count, 'pages')
    return image


def _deep_tiff(page, content, photometric, bits):
    """More than 8 bits, up to 16: gray or RGB with any other channels."""
    colours = {0: 1, 1: 1, 2: 3}.get(photometric)
    if colours is None:
        raise _Refused(f' is a TIFF file of {bits} bits and {page.photometric.name} colours; gray or RGB are needed')
    more = page.samplesperpixel - colours
    if not 0 <= more <= (1 if colours == 1 else 3) or page.axes not in ('YX', 'YXS', 'SYX'):
        raise _Refused(f' has {page.samplesperpixel} channels; gray or RGB are needed')
    turn = _TURNS.get(page.tags.valueof(_ORIENTATION, 1))
    try:
        image = page.asarray(maxworkers=1)
    except Exception as error:
        if not isinstance(error, ImportError) and 'imagecodecs' not in str(error):
            raise
        if page.compression != 5 or page.planarconfig != 1 or bits != 16 or photometric == 0 or more > 1:
            raise _Refused(_PACKED) from None
        image, turn = _opencv(content, cv2.IMREAD_UNCHANGED), None  # LZW; it turns TIFF files in any case
        if image.shape[2] != page.samplesperpixel:  # of gray with alpha it reads one
            raise _Refused(_PACKED) from None
    else:
        image = image[..., None] if page.axes == 'YX' else np.moveaxis(image, 0, 2) if page.axes == 'SYX' else image
        image = image[..., [2, 1, 0, *range(3, image.shape[2])]] if colours == 3 else image
    if bits < 16:
        image = ((image.astype(np.uint32) * 65535 + 2 ** (bits - 1)) // (2**bits - 1)).astype(np.uint16)
    kinds = [int(kind) for kind in page.extrasamples] or ([2] if more == 1 else [0] * more)  # as Pillow takes it
    at = next((index for index, kind in enumerate(kinds) if kind in (1, 2)), None)
    pixels, alpha = image[..., :colours], None if at is None else image[..., colours + at]
    if photometric == 0:
        pixels = 65535 - pixels
    if at is not None and kinds[at] == 1:  # colours are multiplied by it
        whole = pixels.astype(np.uint64) * 65535 + alpha[..., None] // 2
        pixels = np.minimum(whole // np.maximum(alpha, 1)[..., None], 65535).astype(np.uint16)
    left = len(kinds) - (at is not None)
    notes = [f'{left} channel{"s" if left > 1 else ""} of no known meaning left out'] if left else []
    return _turned(Decoded(pixels, alpha, notes, profile=page.tags.valueof(34675)), turn)


# ---------------------------------------------------------------------------------------------------------------------
# PNM, by its values: Pillow and OpenCV scale them each in a way of its own


def _pnm(content, name):
    kind = content[1:2]
    tokens, at = [], 2
    while len(tokens) < 3:
        match = re.compile(rb'(?:\s+|#[^\n\r]*[\n\r])*(\d+)').match(content, at)
        if match is None:
            raise _Damaged
        tokens.append(int(match.group(1)))
        at = match.end()
    width, height, most = tokens
    _check_size(width, height, name)
    if not 0 < most < 65536:
        raise _Damaged
    channels = 3 if kind in b'36' else 1
    count, dtype = width * height * channels, np.dtype('>u2' if most > 255 else 'u1')
    if kind in b'56':
        data = content[at + 1 : at + 1 + count * dtype.itemsize]
        if len(data) < count * dtype.itemsize:
            raise UserError(f'truncated file: {name}')
        values = np.frombuffer(data, dtype)
    else:
        words = re.sub(rb'#[^\n\r]*', b' ', content[at:]).split(maxsplit=count)[:count]
        if len(words) < count:
            raise UserError(f'truncated file: {name}')
        values = np.array([int(word) for word in words])
    if values.size and values.max() > most:
        raise _Damaged
    white = 65535 if most > 255 else 255
    if most != white:
        values = (values.astype(np.uint32) * white + most // 2) // most
    values = values.astype(np.uint16 if most > 255 else np.uint8).reshape(height, width, channels)
    return Decoded(values[..., ::-1])


# ---------------------------------------------------------------------------------------------------------------------
# The rest, by Pillow


@contextlib.contextmanager
def _opened(content, name=''):
    """Pillow's image, of which the header is read."""
    if content[4:8] == b'ftyp' and content[8:12] in _HEIF and b'avif' not in content[8:40]:
        try:
            import pillow_heif
        except ImportError:
            raise _Refused(' is a HEIF image, which is read by pillow-heif: pip install "dckd_sr[heif]"') from None
        pillow_heif.register_heif_opener()
    Image.init()
    # TGA has no mark of its own: anything may look like it.
    kinds = [kind for kind in (*_PILLOW, *(['TGA'] if name.lower().endswith('.tga') else [])) if kind in Image.OPEN]
    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MOST_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of sizes and odd EXIF
            with Image.open(io.BytesIO(content), formats=kinds) as header:
                yield header
    finally:
        Image.MAX_IMAGE_PIXELS = most


def _by_pillow(content, name):
    with _opened(content, name) as header:
        _check_size(*header.size, name)
        notes, profile = [], header.info.get('icc_profile')
        if header.format not in ('MPO', 'TIFF'):  # the former is a camera's JPEG with previews of itself
            notes = _frames(getattr(header, 'n_frames', 1), 'frames')
        header.load()
        turn = _TURNS.get(_orientation(header))  # of TIFF files applied by now
        mode = header.mode
        if mode in ('I', 'F'):
            raise _Refused(f' has {"int32" if mode == "I" else "float32"} values; 8 or 16 bit images are needed')
        has_alpha = 'transparency' in header.info or mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa')
        if mode in ('CMYK', 'LAB'):
            image, profile = _by_profile(header, profile), b''
            notes.append(
                f'{mode} became sRGB' + ('' if image else ' without a profile, so its colours are approximate')
            )
            image = image or header.convert('RGB')
        elif mode.startswith('I;16'):
            image = header
        else:
            gray = mode in _GRAY
            image = header.convert(('LA' if gray else 'RGBA') if has_alpha else ('L' if gray else 'RGB'))
        image = np.asarray(image)
    if image.dtype.itemsize == 2:
        image = image.astype(np.uint16)  # of either byte order
    elif _bits(content) > 8:
        notes.append(f'{_bits(content)} bits become 8')
    image = image if image.ndim == 3 else image[..., None]
    alpha = image[..., -1] if image.shape[2] in (2, 4) else None
    pixels = image[..., :1] if image.shape[2] < 3 else image[..., 2::-1]
    return _turned(Decoded(pixels, alpha, notes, profile=profile or b''), turn)


def _bits(content):
    """Of a channel of JPEG 2000 and AVIF files; 8 of others."""
    for mark, distance in ((b'\xff\x4f\xff\x51', 42), (b'pixi', 9)):
        at = content.find(mark, 0, 2000)
        if 0 <= at < len(content) - distance:
            return (content[at + distance] & 0x7F) + (distance == 42)
    return 8


def _by_profile(image, profile):
    """Print colours as their profile means them, and LAB, in sRGB; None without a profile that lcms can use."""
    try:
        if image.mode == 'LAB':
            source = ImageCms.createProfile('LAB')
        else:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b''))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile('sRGB'), outputMode='RGB')
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        if image.mode == 'LAB':
            raise
        return None


_KINDS = {
    b'\x89PNG': _png,
    b'\xff\xd8': _jpeg,
    b'II*\0': _tiff,
    b'MM\0*': _tiff,
    b'II+\0': _tiff,
    b'MM\0+': _tiff,
    **dict.fromkeys((b'P2', b'P3', b'P5', b'P6'), _pnm),
}
