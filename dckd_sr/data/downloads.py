"""Where public data sets are, and getting them: ``python -m dckd_sr.prepare download set5``."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from dckd_sr import download
from dckd_sr.errors import UserError, nearest


@dataclass(frozen=True)
class Archive:
    """A file to download.

    Attributes:
        url: where it is.
        page: the public page that says so, and whose hash it is.
        folders: ((folder in the archive, at its root or one below, folder to make of it), ...); equal targets merge.
        sha256: hash by the page; None: no page publishes one, the file is used unverified.
        size: bytes, by the page.
        name: file name, where the address has none.
    """

    url: str
    page: str
    folders: tuple
    sha256: str | None = None
    size: int | None = None
    name: str | None = None

    @property
    def file_name(self):
        return self.name or self.url.rsplit('/', 1)[1]


def _benchmark(name):
    page = 'https://github.com/sanghyun-son/EDSR-PyTorch'
    return (Archive('https://cv.snu.ac.kr/research/EDSR/benchmark.tar', page, ((f'benchmark/{name}', name),)),)


def _div2k(name, folder, size, sha256):
    # Addresses: https://data.vision.ee.ethz.ch/cvl/DIV2K/
    page = 'https://github.com/tensorflow/datasets/blob/master/tensorflow_datasets/datasets/div2k/checksums.tsv'
    url = f'https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_{name}.zip'
    return Archive(url, page, ((f'DIV2K_{folder}', f'DIV2K/DIV2K_{folder}'),), sha256, size)


def _rain13k(file_id, name, *folders):
    url = f'https://drive.usercontent.google.com/download?id={file_id}&export=download&confirm=t'
    page = 'https://github.com/swz30/Restormer/blob/main/Deraining/download_data.py'
    return Archive(url, page, folders, name=name)


DATASETS = {
    'set5': _benchmark('Set5'),
    'set14': _benchmark('Set14'),
    'b100': _benchmark('B100'),
    'urban100': _benchmark('Urban100'),
    'div2k': (
        _div2k('train_HR', 'train_HR', 3530603713, '9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335'),
        _div2k('valid_HR', 'valid_HR', 448993893, '20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc'),
    ),
    'div2k_x2': (
        _div2k(
            'train_LR_bicubic_X2',
            'train_LR_bicubic/X2',
            925390592,
            'a53a424317575838dadce4bcd97cf7b744d6855f43740ed5f0245af3cf4bd850',
        ),
        _div2k(
            'valid_LR_bicubic_X2',
            'valid_LR_bicubic/X2',
            117763600,
            '60eed9875c697df51204aa579e2a699e1d5215095788a097ff54dd17e2664d57',
        ),
    ),
    'div2k_x3': (
        _div2k(
            'train_LR_bicubic_X3',
            'train_LR_bicubic/X3',
            427847282,
            'ad5c8e5507e2765823d3c2c5bd0934842efcd487c5370604c224090898b3163a',
        ),
        _div2k(
            'valid_LR_bicubic_X3',
            'valid_LR_bicubic/X3',
            54513392,
            '04b9a2ed3b4a0715d3924d3ae8514830c3328fac8d30512ce716d6f419e052a3',
        ),
    ),
    'div2k_x4': (
        _div2k(
            'train_LR_bicubic_X4',
            'train_LR_bicubic/X4',
            246914039,
            'f006b837f4eb52b82909aa01478e6d6d199eefce932179491d0c9dbb706dde3a',
        ),
        _div2k(
            'valid_LR_bicubic_X4',
            'valid_LR_bicubic/X4',
            31505881,
            'a50a5d1c4b88de4e8d300d8fb2b904c52fe93b2b298a4899697760d7cbb6d553',
        ),
    ),
    'flickr2k': (
        Archive(
            'https://cv.snu.ac.kr/research/EDSR/Flickr2K.tar',
            'https://github.com/XPixelGroup/BasicSR/blob/master/docs/DatasetPreparation.md',
            (('Flickr2K_HR', 'Flickr2K/Flickr2K_HR'), ('Flickr2K_LR_bicubic', 'Flickr2K/Flickr2K_LR_bicubic')),
        ),
    ),
    'gopro': (
        # By the data set's author (https://seungjunnah.github.io/Datasets/gopro); the hash is the page's.
        Archive(
            'https://huggingface.co/datasets/snah/GOPRO_Large/resolve/main/GOPRO_Large.zip',
            'https://github.com/SlamMate/Unblur-SLAM/blob/9af4d7cadb0c6e0d713499da128ab553c96b92f2/scripts/'
            'prepare_turtle_unblur_cloud_data.py',
            (('train', 'GOPRO_Large/train'), ('test', 'GOPRO_Large/test')),
            '24532c036712515cf33803704421311c91f6a080e76049d7e5e7fd22389f128e',
        ),
    ),
    'rain13k': (
        _rain13k(
            '14BidJeG4nSNuFNFDf99K-7eErCq4i47t', 'Rain13K_train.zip', ('Rain13K', 'Rain13K_original/train/Rain13K')
        ),
        _rain13k('1P_-RAvltEoEhfT-9GrWRdpEi6NSswTs8', 'Rain13K_test.zip', ('test', 'Rain13K_original/test')),
    ),
    'bsds400': (
        Archive(
            'https://github.com/BIDS/BSDS500/archive/refs/heads/master.zip',
            'https://github.com/BIDS/BSDS500',
            (('BSDS500/data/images/train', 'BSDS400'), ('BSDS500/data/images/test', 'BSDS400')),
            name='BSDS500.zip',
        ),
    ),
}


def check_name(name: str) -> None:
    """Raise UserError unless ``name`` is a key of ``DATASETS``."""
    if name not in DATASETS:
        raise UserError(f'unknown data set {name!r}{nearest(name, DATASETS)}; known: {", ".join(DATASETS)}')


def get(name: str, out: str = 'datasets') -> list[str]:
    """Download and unpack a data set; folders that exist are complete and are left alone.

    Archives wait in OUT/downloads and are removed once unpacked; one put there by hand is used.

    Args:
        name: a key of ``DATASETS``.
        out: folder for all data sets.

    Returns:
        one line per archive: what was done.

    Raises:
        UserError: unknown name, what `download.fetch` and `download.unpack` refuse; an archive without the folder.
    """
    check_name(name)
    lines = []
    for archive in DATASETS[name]:
        targets = sorted({target for _, target in archive.folders})
        if all(os.path.isdir(os.path.join(out, target)) for target in targets):
            lines.append(f'{name}: {", ".join(targets)} in {out}, were there')
            continue
        path = download.fetch(
            archive.url, os.path.join(out, 'downloads', archive.file_name), archive.sha256, archive.size
        )
        lines.append(f'{name}: {", ".join(targets)} in {out}')
        if archive.sha256 is None:
            lines[-1] += f', unverified: {archive.page} has no hash; sha256 {download.sha256_of(path)}'
        _unpack(archive, path, out)
        path.unlink()
    return lines


def _unpack(archive, path, out):
    """Unpack beside the target, then move whole folders: one that exists is complete."""
    work = Path(out) / 'downloads' / f'{archive.file_name}.unpacked'
    download.unpack(path, work)
    ready = work / '.ready'
    for inside, target in archive.folders:
        found = [folder for folder in (work / inside, *sorted(work.glob(f'*/{inside}'))) if folder.is_dir()]
        if found:
            shutil.copytree(found[0], ready / target, dirs_exist_ok=True, copy_function=os.replace)
        elif not (ready / target).is_dir():
            raise UserError(f'{path} has no folder {inside}')
    for target in sorted({target for _, target in archive.folders}):
        place = Path(out) / target
        if not place.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.rename(ready / target, place)
    shutil.rmtree(work)
