"""Image files as people have them: 8 or 16 bit, gray or colour, with alpha, colour profile and orientation.

`data.files` reads what training and tests compare pixel by pixel; here an image comes out as what it was.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageOps

from dckd_sr.data.files import IMAGE_SUFFIXES, decode_stored, read_bytes
from dckd_sr.errors import UserError, reason

SUFFIXES = (*IMAGE_SUFFIXES, '.avif', '.dib', '.gif', '.jfif', '.jp2', '.pnm', '.tga')
FORMATS = {'.png': 'PNG', '.webp': 'WEBP', '.jpg': 'JPEG', '.jpeg': 'JPEG'}  # that can be written

# OpenCV keeps their 16 bits, which Pillow cuts to 8; other modes it gets wrong (CMYK as BGRA).
_OPENCV = ('PNG', 'JPEG', 'MPO', 'BMP', 'PPM', 'WEBP')
# No other: Pillow opens EPS files, for one, by running Ghostscript on them.
_PILLOW = (*_OPENCV, 'TIFF', 'GIF', 'AVIF', 'DIB', 'JPEG2000', 'TGA')
_DEEP = ('I', 'F', 'I;16', 'I;16B', 'I;16L', 'I;16N')
_OPENCV_MODES = ('1', 'L', 'RGB', 'RGBA')
_GRAY = ('1', 'L', 'LA', 'La', *_DEEP)
_ORIENTATION, _BITS = 274, 258  # tags of EXIF and TIFF
_TURNS = {  # orientation -> what puts the picture upright
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: np.swapaxes(image, 0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(np.swapaxes(image, 0, 1), 2),
    8: lambda image: np.rot90(image, 1),
}


@dataclass
class Picture:
    """A decoded image, upright.

    Attributes:
        pixels: (h, w, 1) gray or (h, w, 3) RGB; uint8 or uint16.
        alpha: (h, w) of the same type, or None.
        profile: ICC profile of these pixels, or None; values are never converted, but for CMYK, which becomes sRGB.
        notes: what was left out of the file, in words.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    profile: bytes | None = None
    notes: list[str] = field(default_factory=list)


def read(path: str | os.PathLike) -> Picture:
    """Read an image file of any format that OpenCV or Pillow knows.

    Orientation in EXIF is applied. Of several frames or pages, the first is read, and a note says so.

    Raises:
        UserError: no image, damaged, or of values that are neither 8 nor 16 bit.
    """
    path = os.fspath(path)
    content = read_bytes(path)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of Pillow: sizes, odd EXIF
        Image.init()
        try:
            header = Image.open(io.BytesIO(content), formats=[kind for kind in _PILLOW if kind in Image.OPEN])
        except Exception:  # whatever its plug-ins raise on damaged files
            return _split(decode_stored(content, path), True)
        with header:
            try:
                return _read(header, content, path)
            except UserError:
                raise
            except Exception as error:
                raise UserError(f'not an image, or damaged: {path}: {reason(error)}') from error


def _read(header, content, path):
    kind, mode, notes = header.format, header.mode, []
    profile = header.info.get('icc_profile')
    frames = getattr(header, 'n_frames', 1)
    if frames > 1 and kind != 'MPO':  # a camera's JPEG with previews of itself
        notes.append(f'the first of {frames} {"pages" if kind == "TIFF" else "frames"}')
    has_alpha = 'transparency' in header.info or mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa')
    if kind == 'TIFF':  # of 8 bits, OpenCV multiplies colours by alpha
        by_opencv = mode in _DEEP or max(header.tag_v2.get(_BITS, (8,))) > 8
    else:
        plain = kind in _OPENCV and mode in _OPENCV_MODES and (kind != 'WEBP' or frames == 1)
        by_opencv = kind == 'PNG' or mode in _DEEP or plain
    if by_opencv:
        image = decode_stored(content, path)
        if kind in ('PNG', 'WEBP'):  # to JPEG and TIFF files OpenCV applies it
            image = _TURNS.get(_orientation(header), np.asarray)(image)
        if image.shape[2] == 4 and mode in _GRAY:
            image = image[..., 2:]
    else:
        image, profile = _by_pillow(header, has_alpha, profile)
    picture = _split(image, has_alpha)
    space = {1: b'GRAY', 3: b'RGB '}[picture.pixels.shape[2]]
    picture.profile = profile if profile and profile[16:20] == space else None
    picture.notes = notes
    return picture


def _orientation(header):
    try:
        return header.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF: the picture is as it is
        return 1


def _by_pillow(header, has_alpha, profile):
    """(h, w, c) as OpenCV orders channels, and the profile that fits it."""
    gray = header.mode in _GRAY
    header.load()
    if header.mode == 'CMYK':
        image, profile = _to_srgb(header, profile), None
    else:
        image = header.convert(('LA' if gray else 'RGBA') if has_alpha else ('L' if gray else 'RGB'))
    image = np.asarray(ImageOps.exif_transpose(image))
    image = image if image.ndim == 3 else image[..., None]
    return (image[..., [2, 1, 0, 3][: image.shape[2]]] if image.shape[2] > 2 else image), profile


def _to_srgb(image, profile):
    """Print colours as their profile means them; without one, by the usual approximation."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b''))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile('sRGB'), outputMode='RGB')
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image.convert('RGB')


def _split(image, has_alpha):
    """(h, w, 1 | 2 | 3 | 4), gray or BGR, as a Picture; a fourth channel that is no alpha is filling."""
    count = image.shape[2]
    alpha = np.ascontiguousarray(image[..., -1]) if count in (2, 4) and has_alpha else None
    pixels = image[..., :1] if count < 3 else image[..., 2::-1]
    return Picture(np.ascontiguousarray(pixels), alpha)


def encode(picture: Picture, suffix: str) -> bytes:
    """The bytes of an image file; 16 bits and alpha are cut where the format has none, which `losses` tells before.

    Args:
        suffix: '.png', lossless, keeps everything; '.webp', lossless, 8 bit; '.jpg', quality 95, 8 bit, without alpha.

    Raises:
        UserError: larger than the format allows, or an unknown suffix.
    """
    if suffix not in FORMATS:
        raise UserError(f'cannot write {suffix or "a file without a suffix"}; one of {", ".join(FORMATS)}')
    pixels, alpha = picture.pixels, picture.alpha
    if FORMATS[suffix] == 'PNG':
        return _png(pixels, alpha, picture.profile)
    if pixels.dtype == np.uint16:
        pixels, alpha = (None if part is None else _to_8_bit(part) for part in (pixels, alpha))
    lossless = FORMATS[suffix] == 'WEBP'
    if alpha is not None and lossless:
        pixels = np.dstack([np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels, alpha])
    image, target = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), io.BytesIO()
    profile = {'icc_profile': picture.profile} if picture.profile else {}
    quality = {'lossless': True, 'exact': True} if lossless else {'quality': 95, 'subsampling': 0}
    try:
        image.save(target, FORMATS[suffix], **quality, **profile)
    except (OSError, ValueError) as error:
        raise UserError(f'{image.width}x{image.height} px cannot be written as {suffix}: {reason(error)}') from error
    return target.getvalue()


def losses(picture: Picture, suffix: str) -> list[str]:
    """What a format cannot keep of a picture, in words."""
    lost = []
    if FORMATS.get(suffix) != 'PNG' and picture.pixels.dtype == np.uint16:
        lost.append(f'16 bits become 8 in {suffix}')
    if FORMATS.get(suffix) == 'JPEG' and picture.alpha is not None:
        lost.append(f'{suffix} has no alpha')
    return lost


def _to_8_bit(values):
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _png(pixels, alpha, profile):
    image = pixels[..., ::-1]
    if alpha is not None:  # OpenCV writes no gray with alpha
        image = np.dstack([np.repeat(image, 3, 2) if image.shape[2] == 1 else image, alpha])
        profile = profile if pixels.shape[2] == 3 else None
    try:
        done, content = cv2.imencode('.png', np.ascontiguousarray(image))
    except cv2.error as error:
        raise UserError(f'{image.shape[1]}x{image.shape[0]} px cannot be written as .png: {reason(error)}') from error
    content = content.tobytes()
    if profile is None:
        return content
    # OpenCV writes no profile. Its chunk follows the first one, which ends at byte 33: 8 of signature, 25 of IHDR.
    data = b'iCCP' + b'ICC profile\0\0' + zlib.compress(profile)
    chunk = struct.pack('>I', len(data) - 4) + data + struct.pack('>I', zlib.crc32(data))
    return content[:33] + chunk + content[33:]


def list_folder(folder: str | os.PathLike) -> list[Path]:
    """Paths of a folder's images by their suffixes, sorted; not those of its sub-folders, nor hidden ones.

    Raises:
        UserError: there is none, or the folder cannot be read.
    """
    try:
        entries = sorted(Path(folder).iterdir())
    except OSError as error:
        raise UserError(f'cannot read {folder}: {error.strerror}') from error
    found = [e for e in entries if e.suffix.lower() in SUFFIXES and not e.name.startswith('.') and not e.is_dir()]
    if not found:
        raise UserError(f'no images in {folder} (looked for {", ".join(SUFFIXES)})')
    return found
