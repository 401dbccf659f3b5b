"""How BasicSR's own image datasets find their files, repaired; one function per defect.

Lines are those of basicsr/data/data_util.py unless another file is named.
"""

from __future__ import annotations

import os
import sys

import cv2
import numpy as np
import torch
from basicsr.data import (
    data_util,
    ffhq_dataset,
    paired_image_dataset,
    realesrgan_dataset,
    realesrgan_paired_dataset,
    single_image_dataset,
)
from basicsr.data.transforms import augment, mod_crop, paired_random_crop
from basicsr.utils import FileClient, bgr2ycbcr, img2tensor, img_util
from basicsr.utils.file_client import HardDiskBackend, LmdbBackend
from torchvision.transforms.functional import normalize

from dckd_sr.data import decoding, pair_sizes
from dckd_sr.data.files import (
    decode,
    find_partners,
    image_names,
    listed_but_missing,
    lmdb_difference,
    lmdb_keys,
    meta_info_names,
    view_lmdb,
)
from dckd_sr.errors import UserError

_DATASETS = (ffhq_dataset, paired_image_dataset, realesrgan_dataset, realesrgan_paired_dataset, single_image_dataset)


def apply():
    """Put the repaired functions where BasicSR's datasets look them up."""
    for function in (
        paired_paths_from_folder,
        paired_paths_from_meta_info_file,
        paired_paths_from_lmdb,
        paths_from_folder,
        paths_from_lmdb,
    ):
        for module in (data_util, *_DATASETS):
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)
    single_image_dataset.scandir = scan_images
    LmdbBackend.__init__, LmdbBackend.get, HardDiskBackend.get = lmdb_init, lmdb_get, disk_get
    for function in (img_util.imfrombytes, data_util.read_img_seq):
        for module in list(sys.modules.values()):
            if getattr(module, '__name__', '').startswith('basicsr') and hasattr(module, function.__name__):
                setattr(module, function.__name__, globals()[function.__name__])
    for cls in (
        paired_image_dataset.PairedImageDataset,
        realesrgan_paired_dataset.RealESRGANPairedDataset,
    ):
        cls.__getitem__, cls.pairs_of_files = paired_sample, pair_sizes.pairs_of_files


def paired_paths_from_folder(folders, keys, filename_tmpl):
    """:214-232 lists in the file system's order, counts every file and searches a list for each image."""
    lq_folder, gt_folder = folders
    gt_names = image_names(gt_folder)
    pairs, unused = find_partners(gt_names, lq_folder, filename_tmpl, any_suffix=False)
    if unused:
        raise UserError(
            f'{len(unused)} images in {lq_folder} have no partner in {gt_folder}: {", ".join(sorted(unused)[:3])}'
        )
    return [_pair(keys, os.path.join(lq_folder, pairs[name]), os.path.join(gt_folder, name)) for name in gt_names]


def paired_paths_from_meta_info_file(folders, keys, meta_info_file, filename_tmpl):
    """:187-199 cuts names at the first space and finds out about missing files in the middle of the training."""
    lq_folder, gt_folder = folders
    paths = []
    for name in meta_info_names(meta_info_file, gt_folder):
        stem, suffix = os.path.splitext(os.path.basename(name))
        lq_path = os.path.join(lq_folder, filename_tmpl.format(stem) + suffix)
        paths.append(_pair(keys, lq_path, os.path.join(gt_folder, name)))
    missing = [path for pair in paths for path in pair.values() if not os.path.isfile(path)]
    if missing:
        raise UserError(listed_but_missing(missing, meta_info_file))
    return paths


def paired_paths_from_lmdb(folders, keys):
    """:142-144 cut the keys at the first dot."""
    lq_folder, gt_folder = folders
    lq_keys, gt_keys = lmdb_keys(lq_folder), lmdb_keys(gt_folder)
    if lq_keys != gt_keys:
        raise UserError(lmdb_difference(gt_folder, lq_folder, gt_keys, lq_keys))
    return [_pair(keys, key, key) for key in gt_keys]


def paths_from_folder(folder):
    """:245-246 list in the file system's order and count every file."""
    return [os.path.join(folder, name) for name in image_names(folder)]


def paths_from_lmdb(folder):
    """:261 cuts the keys at the first dot."""
    return lmdb_keys(folder)


def scan_images(folder, suffix=None, recursive=False, full_path=False):
    """single_image_dataset.py:45 counts every file; recursive and suffix are not used there."""
    return [os.path.join(folder, name) if full_path else name for name in image_names(folder)]


def imfrombytes(content, flag='color', float32=False):
    """utils/img_util.py:114-134 reads other pixels than the other commands, cuts 16 bits to 8, reads truncated images,
    and fails on unreadable ones with a word about NoneType.
    """
    name = getattr(content, 'name', 'an image')
    try:
        if flag == 'unchanged':
            image = decoding.decode(content, name)
            image = image.pixels if image.alpha is None else np.dstack([image.pixels, image.alpha])
            image = image[..., 0] if image.shape[2] == 1 else image
        else:
            image = decode(content, name)
            image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if flag == 'grayscale' else image
    except UserError as error:
        raise ValueError(str(error)) from None  # `SeededDataset` says which dataset it is of
    white = np.iinfo(image.dtype).max
    if float32:
        return image.astype(np.float32) / white
    return image if white == 255 or flag == 'unchanged' else (image >> 8).astype(np.uint8)


def read_img_seq(path, require_mod_crop=False, scale=1, return_imgname=False):
    """:11-41 read with OpenCV, and every file."""
    paths = path if isinstance(path, list) else paths_from_folder(path)
    images = [imfrombytes(_Content.of(name), float32=True) for name in paths]
    images = [mod_crop(image, scale) for image in images] if require_mod_crop else images
    images = torch.stack(img2tensor(images))
    names = [os.path.splitext(os.path.basename(name))[0] for name in paths]
    return (images, names) if return_imgname else images


class _Content(bytes):
    """What is in a file, with its name for messages."""

    @classmethod
    def of(cls, path):
        with open(path, 'rb') as file:
            content = cls(file.read())
        content.name = str(path)
        return content


def disk_get(self, filepath):
    """utils/file_client.py:80-84 forgets the name of the file."""
    return _Content.of(filepath)


def paired_sample(self, index):
    """paired_image_dataset.py:98 cuts GT to LQ times scale however much larger it is, so that pairs of another scale
    are scored; realesrgan_paired_dataset.py does not cut at all. In training both refuse what `prepare check` admits.
    """
    if self.file_client is None:
        self.file_client = FileClient(self.io_backend_opt.pop('type'), **self.io_backend_opt)
    paths = self.paths[index]
    gt, lq = (imfrombytes(self.file_client.get(paths[f'{key}_path'], key), float32=True) for key in ('gt', 'lq'))
    gt = pair_sizes.cut(gt, lq, self, index)
    if self.opt['phase'] == 'train':
        gt, lq = paired_random_crop(gt, lq, self.opt['gt_size'], self.opt['scale'], paths['gt_path'])
        gt, lq = augment([gt, lq], self.opt['use_hflip'], self.opt['use_rot'])
    if self.opt.get('color') == 'y':
        gt, lq = (bgr2ycbcr(image, y_only=True)[..., None] for image in (gt, lq))
    gt, lq = img2tensor([gt, lq], bgr2rgb=True, float32=True)
    if self.mean is not None or self.std is not None:
        for image in (lq, gt):
            normalize(image, self.mean, self.std, inplace=True)
    return {'lq': lq, 'gt': gt, 'lq_path': paths['lq_path'], 'gt_path': paths['gt_path']}


def lmdb_init(self, db_paths, client_keys='default', **options):
    """utils/file_client.py:112 opens a folder once per dataset, which LMDB refuses; `read_lmdb` opens it when needed.

    The options (readonly, lock, readahead) are LMDB's; here it is only read.
    """
    self.db_paths = [str(path) for path in (db_paths if isinstance(db_paths, list) else [db_paths])]
    client_keys = [client_keys] if isinstance(client_keys, str) else client_keys
    if len(client_keys) != len(self.db_paths):
        raise UserError(f'{len(self.db_paths)} LMDB folders for {len(client_keys)} keys')
    self._client = dict(zip(client_keys, self.db_paths))


def lmdb_get(self, filepath, client_key):
    """:126 gives None for a key that is not there."""
    content = _Content(view_lmdb(self._client[client_key], str(filepath)))
    content.name = f'{self._client[client_key]}/{filepath}'
    return content


def _pair(keys, lq_path, gt_path):
    return {f'{keys[0]}_path': lq_path, f'{keys[1]}_path': gt_path}
