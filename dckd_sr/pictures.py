"""Image files as people have them: 8 or 16 bit, gray or colour, with alpha and colour profile; read and written."""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from dckd_sr.data import decoding
from dckd_sr.data.decoding import SUFFIXES
from dckd_sr.data.files import not_searched, read_bytes
from dckd_sr.errors import UserError, reason

FORMATS = {'.png': 'PNG', '.webp': 'WEBP', '.jpg': 'JPEG', '.jpeg': 'JPEG'}  # that can be written


@dataclass
class Picture:
    """A decoded image, upright.

    Attributes:
        pixels: (h, w, 1) gray or (h, w, 3) RGB; uint8 or uint16.
        alpha: (h, w) of the same type, or None.
        profile: ICC profile of these pixels, or None.
        notes: what was left out of the file or looked odd in it, in words.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    profile: bytes | None = None
    notes: list[str] = field(default_factory=list)


def read(path: str | os.PathLike) -> Picture:
    """Read an image file, see `data.decoding`.

    Raises:
        UserError: no image, damaged, or of values that are neither 8 nor 16 bit.
    """
    path = os.fspath(path)
    image = decoding.decode(read_bytes(path), path, with_profile=True)
    space = {1: b'GRAY', 3: b'RGB '}[image.pixels.shape[2]]
    profile = image.profile if image.profile and image.profile[16:20] == space else None
    alpha = None if image.alpha is None else np.ascontiguousarray(image.alpha)
    return Picture(np.ascontiguousarray(image.pixels[..., ::-1]), alpha, profile, image.notes + image.remarks)


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
        raise UserError(f'no images in {folder} (looked for {", ".join(SUFFIXES)}{not_searched(folder)})')
    return found
