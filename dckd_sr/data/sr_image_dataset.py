"""Paired images for super-resolution and other restoration; LR can be made from HR, equal to MATLAB's imresize."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from basicsr.data.transforms import augment, paired_random_crop
from basicsr.utils.registry import DATASET_REGISTRY
from torch.utils.data import Dataset

from dckd_sr.data import pair_sizes
from dckd_sr.data.files import (
    decode,
    find_partners,
    image_names,
    listed_but_missing,
    lmdb_difference,
    lmdb_keys,
    meta_info_names,
    read_bytes,
    read_lmdb,
)
from dckd_sr.data.teacher_cache import TeacherCache
from dckd_sr.errors import UserError
from dckd_sr.ops.resize import CONVENTIONS, imresize, modcrop


@DATASET_REGISTRY.register()
class SRImageDataset(Dataset):
    """Images as {'lq', 'gt': float32 (3, h, w) RGB in [0, 1], 'lq_path', 'gt_path'}, BasicSR's layout.

    With ``teacher_cache`` also 'teacher', the teacher's output where 'gt' was cut out, in [0, 1] or a little beyond.

    Training: a random crop with flips and rotations, drawn as BasicSR's PairedImageDataset draws them (the same random
    state gives the same patch). Otherwise whole images; GT is cut to scale times the LQ.

    Args:
        opt: options of this dataset:
            phase (str): 'train', or 'val' or 'test' for whole images.
            scale (int): GT size over LQ size.
            dataroot_gt (str): folder of the GT images, or an LMDB.
            dataroot_lq (str, optional): folder of the LQ images. Absent: LQ is made from GT, cut to multiples of scale.
            lq_convention (str, 'uint8'): how it is made, see ``ops.resize.imresize``.
            filename_tmpl (str, '{}'): LQ name for a GT name, both without suffix, such as '{}x4'.
            meta_info_file (str, optional): a list of the GT names to use.
            io_backend (dict, {type: disk}): type disk or lmdb.
            gt_size (int): side of the GT crop, training only.
            use_hflip, use_rot (bool, true): augmentation, training only.
            cache (str, optional): 'ram' decodes everything once, when built.
            teacher_cache (str, optional): LMDB of the teacher's outputs, see ``data.teacher_cache``; training only.

    Raises:
        UserError: a wrong option, a missing file or partner; when indexed: a file that is unreadable, too small or of
            another size than its partner needs. The message names it.
    """

    takes_teacher_cache = True
    draws_from_numpy = False

    def __init__(self, opt: dict[str, Any]):
        self.opt = opt
        self.name = opt.get('name', 'unnamed')
        self.scale = opt.get('scale', 1)
        self.train = opt.get('phase', 'train') == 'train'
        self.gt_folder, self.lq_folder = opt.get('dataroot_gt'), opt.get('dataroot_lq')
        self.convention = opt.get('lq_convention') or 'uint8'
        self.backend = (opt.get('io_backend') or {}).get('type', 'disk')
        self.gt_size = opt.get('gt_size')
        self._check()
        self.paths = self._lmdb_paths() if self.backend == 'lmdb' else self._file_paths()
        self.teacher_cache = None
        if self.train and self.takes_teacher_cache and opt.get('teacher_cache'):
            self.teacher_cache = TeacherCache(opt['teacher_cache'])
        self.cached = opt.get('cache') == 'ram'
        self._images = [self._load(index) for index in range(len(self.paths))] if self.cached else None

    def _check(self):
        if not self.gt_folder:
            raise UserError(f'dataset {self.name}: dataroot_gt is missing')
        if not isinstance(self.scale, int) or self.scale < 1:
            raise UserError(f'dataset {self.name}: scale is a positive integer, got {self.scale!r}')
        if self.scale == 1 and not self.lq_folder:
            raise UserError(f'dataset {self.name}: scale 1 needs dataroot_lq, LQ cannot be made from GT')
        if self.convention not in CONVENTIONS:
            known = ' or '.join(CONVENTIONS)
            raise UserError(f'dataset {self.name}: lq_convention is {known}, got {self.convention!r}')
        if self.backend not in ('disk', 'lmdb'):
            raise UserError(f'dataset {self.name}: io_backend.type is disk or lmdb, got {self.backend!r}')
        if self.opt.get('cache') not in (None, 'ram'):
            raise UserError(f'dataset {self.name}: cache is ram or empty, got {self.opt["cache"]!r}')
        if self.train and (not isinstance(self.gt_size, int) or self.gt_size < 1 or self.gt_size % self.scale):
            raise UserError(f'dataset {self.name}: gt_size is a multiple of scale {self.scale}, got {self.gt_size!r}')

    def _file_paths(self):
        meta_info_file = self.opt.get('meta_info_file')
        names = meta_info_names(meta_info_file, self.gt_folder) if meta_info_file else image_names(self.gt_folder)
        gt_paths = [os.path.join(self.gt_folder, name) for name in names]
        missing = [path for path in gt_paths if not os.path.isfile(path)] if meta_info_file else []
        if missing:
            raise UserError(f'dataset {self.name}: {listed_but_missing(missing, meta_info_file)}')
        lq_paths = gt_paths
        if self.lq_folder:
            partners, _ = find_partners(names, self.lq_folder, self.opt.get('filename_tmpl') or '{}')
            lq_paths = [os.path.join(self.lq_folder, partners[name]) for name in names]
        return [{'lq_path': lq, 'gt_path': gt} for lq, gt in zip(lq_paths, gt_paths)]

    def _lmdb_paths(self):
        keys, low = lmdb_keys(self.gt_folder), lmdb_keys(self.lq_folder) if self.lq_folder else None
        if low is not None and not set(keys) <= set(low):
            raise UserError(f'dataset {self.name}: {lmdb_difference(self.gt_folder, self.lq_folder, keys, low)}')
        return [{'lq_path': key, 'gt_path': key} for key in keys]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        gt, lq = self._images[index] if self.cached else self._load(index)
        paths = self.paths[index]
        gts = [gt] if self.teacher_cache is None else [gt, self.teacher_cache.read(index, gt.shape)]
        *gts, lq = self._crop(gts, lq, paths) if self.train else (gt, self._low(gt) if lq is None else lq)
        return {**dict(zip(('lq', 'gt', 'teacher'), map(_to_tensor, (lq, *gts)))), **paths}

    def _load(self, index):
        """GT and LQ of one sample, cut to sizes that belong together; LQ None if it is made from the GT when needed."""
        gt_path, lq_path = self.paths[index]['gt_path'], self.paths[index]['lq_path']
        gt = decode(self._read(gt_path, self.gt_folder), gt_path)
        if min(gt.shape[:2]) < self.scale:
            raise UserError(
                f'dataset {self.name}: {gt_path} is {gt.shape[1]}x{gt.shape[0]}, too small for scale {self.scale}'
            )
        if not self.lq_folder:
            gt = modcrop(gt, self.scale)
            return gt, (self._low(gt) if self.cached else None)
        lq = decode(self._read(lq_path, self.lq_folder), lq_path)
        return pair_sizes.cut(gt, lq, self, index), lq

    def pairs_of_files(self) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
        """See `pair_sizes.pairs_of_files`; none where LQ is made from GT."""
        return pair_sizes.pairs_of_files(self) if self.lq_folder else iter(())

    def _read(self, path, folder):
        return read_bytes(path) if self.backend == 'disk' else read_lmdb(folder, path)

    def _low(self, gt, region=None):
        return imresize(gt, 1 / self.scale, self.convention, region)

    def _crop(self, gts, lq, paths):
        """Patches of the GT and of images like it, at one place and turned alike, and of the LQ."""
        gt, size = gts[0], self.gt_size // self.scale
        height, width = gt.shape[0] // self.scale, gt.shape[1] // self.scale
        if height < size or width < size:
            raise UserError(
                f'dataset {self.name}: {paths["gt_path"]} is {gt.shape[1]}x{gt.shape[0]}, smaller than gt_size '
                f'{self.gt_size}: remove it or lower gt_size'
            )
        if lq is None:
            # Only the LQ pixels of the patch are computed; drawn in paired_random_crop's order.
            top, left = random.randint(0, height - size), random.randint(0, width - size)
            lq = self._low(gt, (top, left, size, size))
            top, left = top * self.scale, left * self.scale
            gts = [image[top : top + self.gt_size, left : left + self.gt_size] for image in gts]
        else:
            gts, lq = paired_random_crop(gts, lq, self.gt_size, self.scale, paths['gt_path'])
        # BasicSR flips in place: not in the cached image.
        patches = [np.array(image, order='C') for image in (*listed(gts), lq)]
        return augment(patches, self.opt.get('use_hflip', True), self.opt.get('use_rot', True))


def listed(images):
    """A list of one comes back from BasicSR as the image."""
    return images if isinstance(images, list) else [images]


def _to_tensor(image):
    """(h, w, c), integers or floats -> (c, h, w) float32, white at 1; three channels are turned from BGR to RGB."""
    white = _WHITE.get(image.dtype.name)
    if white is None:
        image = image.astype(np.float32)
    if image.shape[2] == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # a quarter of the bytes that it would be as floats
    if white is not None:
        image = image.astype(np.float32)
        image /= white
    return torch.from_numpy(image.transpose(2, 0, 1))


_WHITE = {'uint8': 255, 'uint16': 65535}
