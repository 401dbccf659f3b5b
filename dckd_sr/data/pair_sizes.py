"""Which sizes a GT image and its LQ image may have: one rule for every dataset, checker and command."""

from __future__ import annotations

import io
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from dckd_sr.data.files import decode, read_bytes, view_lmdb
from dckd_sr.errors import UserError

_SHOWN = 3  # pairs that a message names
_ORIENTATION = 274  # tag of EXIF; from 5 on, height and width are exchanged
_LARGEST_SCALE = 16  # that a message suggests


def belongs(gt: Sequence[int], lq: Sequence[int], scale: int) -> bool:
    """Whether sizes (height, width, ...) make a pair: GT exceeds LQ x scale by at most scale - 1 a side.

    That is what an LQ image has whose GT was cut to a multiple of the scale. An LQ of a size that was rounded up lies
    where the tool that made it put it, which nothing here can know.
    """
    return all(0 <= full - small * scale < scale for full, small in zip(gt[:2], lq[:2]))


def misfit(gt_path: str, gt: Sequence[int], lq_path: str, lq: Sequence[int], scale: int) -> str | None:
    """What is wrong with a pair of sizes (height, width, ...), in words with both files, or None."""
    if belongs(gt, lq, scale):
        return None
    expected = f'{gt[1] // scale}x{gt[0] // scale}'
    text = (
        f'sizes do not match at scale {scale}: {gt_path} is {gt[1]}x{gt[0]}, {lq_path} is {lq[1]}x{lq[0]} '
        f'(expected {expected})'
    )
    if all(small == -(-full // scale) for full, small in zip(gt[:2], lq[:2])):
        return f'{text}; LQ was rounded up: make it of GT cut to a multiple of {scale}, as dckd_sr.prepare sr does'
    others = [other for other in range(1, _LARGEST_SCALE + 1) if belongs(gt, lq, other)]
    hint = ', and scale is 1 where nothing sets it' if scale == 1 else ''
    return f'{text}; they match at scale {others[0]}{hint}' if len(others) == 1 else text


def cut(gt: np.ndarray, lq: np.ndarray, dataset: Any, index: int) -> np.ndarray:
    """GT (h, w, c) without the rest that LQ (h, w, c) has no pixels for.

    Args:
        dataset: whose sample ``index`` they are; see `pairs_of_files`.

    Raises:
        UserError: they do not belong together; the message names set, folders and files.
    """
    scale = dataset.opt.get('scale', 1)
    if not belongs(gt.shape, lq.shape, scale):
        files = [os.path.join(*file) for file in next(itertools.islice(pairs_of_files(dataset), index, None))]
        raise UserError(f'dataset {dataset.opt.get("name")}: {misfit(files[0], gt.shape, files[1], lq.shape, scale)}')
    return gt[: lq.shape[0] * scale, : lq.shape[1] * scale]


def check_headers(dataset: Dataset) -> None:
    """Look at the sizes of all pairs of a dataset, before anything is computed with them; pixels are not read.

    Args:
        dataset: any dataset; those that do not pair files as BasicSR's PairedImageDataset does are passed over.

    Raises:
        UserError: pairs that do not belong together, or one that cannot be read; the message names set, folders and
            files.
    """
    found = [_problem(*pair, dataset.opt.get('scale', 1)) for pair in pairs_of(dataset)]
    problems, count = [problem for problem in found if problem], len(found)
    if problems:
        more = f'; and {len(problems) - _SHOWN} more' if len(problems) > _SHOWN else ''
        of = f' {len(problems)} of {count} pairs:' if len(problems) > 1 else ''
        raise UserError(f'dataset {dataset.opt.get("name")}:{of} {"; ".join(problems[:_SHOWN])}{more}')


def pairs_of(dataset: Dataset) -> Iterable[tuple[tuple[str, str], tuple[str, str]]]:
    """`pairs_of_files` of a dataset whose samples are read by the class that has it; else nothing."""
    dataset = getattr(dataset, 'dataset', dataset)  # within a SeededDataset
    reader = next((cls for cls in type(dataset).__mro__ if '__getitem__' in vars(cls)), object)
    return dataset.pairs_of_files() if 'pairs_of_files' in vars(reader) else ()


def pairs_of_files(dataset: Any) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """((folder, GT), (folder, LQ)) of a dataset that has BasicSR's options and ``paths``; a folder is an LMDB or ''."""
    backend = dataset.opt.get('io_backend') or {}
    in_lmdb = backend.get('type') == 'lmdb' or 'db_paths' in backend  # BasicSR takes the type out
    gt, lq = (dataset.gt_folder, dataset.lq_folder) if in_lmdb else ('', '')
    return (((gt, paths['gt_path']), (lq, paths['lq_path'])) for paths in dataset.paths)


def _problem(gt, lq, scale):
    """What is wrong with a pair of files, or None."""
    sizes = header_size(*gt), header_size(*lq)
    if None not in sizes and belongs(*sizes, scale):
        return None
    try:
        # A header has the size before the picture is turned upright; whoever has the pixels knows.
        return misfit(os.path.join(*gt), _decoded(*gt), os.path.join(*lq), _decoded(*lq), scale)
    except UserError as error:
        return str(error)


def header_size(folder: str, name: str) -> tuple[int, int] | None:
    """(height, width) that a file's header states, or None: unreadable, or stored lying on its side.

    Args:
        folder: an LMDB, in which ``name`` is a key, or ''.
    """
    content = io.BytesIO(view_lmdb(folder, name)) if folder else name
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of Pillow: odd EXIF
        try:
            with Image.open(content) as image:
                # Of a PNG file, Pillow would read all pixels before it looks for EXIF behind them.
                exif = image.getexif() if image.format != 'PNG' or 'exif' in image.info else {}
                return None if exif.get(_ORIENTATION, 1) > 4 else (image.height, image.width)
        except Exception:  # whatever its plug-ins raise on damaged files
            return None


def _decoded(folder, name):
    content = bytes(view_lmdb(folder, name)) if folder else read_bytes(name)
    return decode(content, os.path.join(folder, name)).shape
