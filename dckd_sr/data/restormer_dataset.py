"""The datasets of Restormer's option files, under their names there.

Source: swz30/Restormer, basicsr/data/paired_image_dataset.py and basicsr/utils/img_util.py.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from basicsr.data.transforms import paired_random_crop
from basicsr.utils.registry import DATASET_REGISTRY

from dckd_sr.data.files import decode, find_partners
from dckd_sr.data.sr_image_dataset import SRImageDataset, listed
from dckd_sr.errors import UserError

SIGMA_TYPES = ('constant', 'random', 'choice')


@DATASET_REGISTRY.register()
class Dataset_PairedImage(SRImageDataset):
    """Pairs of images of one size, as `SRImageDataset` gives them, but for crops and augmentation.

    Training: images smaller than the crop are continued by their mirror image below and to the right; then a random
    crop and, unless ``geometric_augs`` is false, one of the eight flips and rotations.

    Args:
        opt: `SRImageDataset`'s options with scale 1, and ``geometric_augs`` (bool, true) for its flips.

    Raises:
        UserError: as `SRImageDataset`.
    """

    draws_from_numpy = False
    pads = True  # what is smaller than the crop

    def _crop(self, gts, lq, paths):
        below, right = (max(0, self.gt_size - side) for side in lq.shape[:2])
        images = [*gts, lq]
        if below or right:
            images = [np.pad(image, ((0, below), (0, right), (0, 0)), 'symmetric') for image in images]
        gts, lq = paired_random_crop(images[:-1], images[-1], self.gt_size, self.scale, paths['gt_path'])
        mode = random.randint(0, 7) if self.opt.get('geometric_augs', True) else 0
        return [flip_and_rotate(image, mode) for image in (*listed(gts), lq)]


def flip_and_rotate(image: np.ndarray, mode: int) -> np.ndarray:
    """(h, w, c) turned counterclockwise by mode // 2 quarters, then upside down where mode is odd; a copy."""
    turned = np.rot90(image, mode // 2)
    return (np.flipud(turned) if mode % 2 else turned).copy()


@DATASET_REGISTRY.register()
class Dataset_GaussianDenoising(Dataset_PairedImage):
    """Images, and the same with Gaussian noise, which is neither rounded nor clipped.

    Training noise follows random and torch, which `SeededDataset` seeds per sample; that of a validation image depends
    on its size alone.

    Args:
        opt: `Dataset_PairedImage`'s options without ``dataroot_lq``, and
            in_ch (int, 3): 1 for gray images.
            sigma_type (str, 'random'), sigma_range: training noise in levels of 255: 'constant', a number; 'random',
                the two bounds; 'choice', a list.
            sigma_test (number): noise of validation and test.

    Raises:
        UserError: as `Dataset_PairedImage`, or a noise that is none of these.
    """

    takes_teacher_cache = False  # its LQ is another one each time

    def _check(self):
        self.lq_folder = self.gt_folder  # SRImageDataset wants one at scale 1
        super()._check()
        self.lq_folder = None
        key, kind = ('sigma_range', self.opt.get('sigma_type', 'random')) if self.train else ('sigma_test', 'constant')
        if kind not in SIGMA_TYPES:
            raise UserError(f'dataset {self.name}: sigma_type is {" or ".join(SIGMA_TYPES)}, got {kind!r}')
        sigma, listed = self.opt.get(key), isinstance(self.opt.get(key), (list, tuple))
        numbers = sigma if listed else [sigma]
        fits = listed == (kind != 'constant') and len(numbers) in ((2,) if kind == 'random' else range(1, 1000))
        if not fits or not all(isinstance(n, (int, float)) and n >= 0 for n in numbers):
            what = {'constant': 'a number', 'random': 'a list of two numbers', 'choice': 'a list of numbers'}[kind]
            raise UserError(f'dataset {self.name}: {key} is {what}, got {sigma!r}')
        self.sigma_type, self.sigma = kind, sigma

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        gt = sample['gt']
        if self.train:
            sigma = {
                'constant': lambda: self.sigma,
                'random': lambda: random.uniform(*self.sigma),
                'choice': lambda: random.choice(self.sigma),
            }[self.sigma_type]()
            noise = torch.randn(gt.shape) * (sigma / 255)
        else:
            # Drawn as (h, w, c) from a generator that starts at 0: Restormer's very numbers.
            drawn = np.random.RandomState(0).normal(0, self.sigma / 255, (*gt.shape[1:], gt.shape[0]))
            noise = torch.from_numpy(drawn).permute(2, 0, 1)
        return {**sample, 'lq': (gt + noise).float()}

    def _load(self, index):
        gt, lq = super()._load(index)
        return (cv2.cvtColor(gt, cv2.COLOR_BGR2GRAY)[..., None] if self.opt.get('in_ch', 3) == 1 else gt), lq

    def _low(self, gt, region=None):
        return gt

    def _crop(self, gts, lq, paths):
        return super()._crop(gts, gts[0], paths)


@DATASET_REGISTRY.register()
class Dataset_DefocusDeblur_DualPixel_16bit(Dataset_PairedImage):
    """Sharp images and the two views of a dual-pixel sensor: 'lq' has 6 channels, RGB of the left and of the right.

    Args:
        opt: `Dataset_PairedImage`'s options with ``dataroot_lqL`` and ``dataroot_lqR`` in place of ``dataroot_lq``;
            files, not LMDB.

    Raises:
        UserError: as `Dataset_PairedImage`.
    """

    takes_teacher_cache = False  # made of two images

    def __init__(self, opt: dict[str, Any]):
        self.right_folder = opt.get('dataroot_lqR')
        super().__init__({**opt, 'dataroot_lq': opt.get('dataroot_lqL')})
        self.opt = opt

    def _check(self):
        super()._check()
        if not self.right_folder or self.backend != 'disk':
            raise UserError(f'dataset {self.name}: dataroot_lqL, dataroot_lqR and io_backend.type disk are needed')

    def _file_paths(self):
        names = [os.path.basename(pair['gt_path']) for pair in super()._file_paths()]
        partners, _ = find_partners(names, self.right_folder, self.opt.get('filename_tmpl') or '{}')
        self.right_paths = [os.path.join(self.right_folder, partners[name]) for name in names]
        return super()._file_paths()

    def pairs_of_files(self) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
        yield from super().pairs_of_files()
        yield from ((('', pair['gt_path']), ('', right)) for pair, right in zip(self.paths, self.right_paths))

    def _load(self, index):
        gt, left = super()._load(index)
        path = self.right_paths[index]
        right = decode(self._read(path, self.right_folder), path)
        if right.shape != left.shape or right.dtype != left.dtype:
            raise UserError(
                f'dataset {self.name}: {path} has another size or depth than {self.paths[index]["lq_path"]}'
            )
        # BasicSR turns BGR into RGB where there are 3 channels only.
        return gt, np.concatenate([left[..., ::-1], right[..., ::-1]], axis=2)
