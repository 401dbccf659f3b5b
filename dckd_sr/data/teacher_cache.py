"""The teacher's outputs of whole training images, computed once: ``datasets.train.teacher_cache: NAME.lmdb``.

    python -m dckd_sr.prepare teacher_cache -opt options/train_edsr_x4.yml

The folder holds an LMDB of pixels, uncompressed, so that a patch is read without decoding anything, and
``teacher_cache.json``, which says what they were made of.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from typing import Any

import lmdb
import numpy as np
import torch
from basicsr.archs import build_network
from basicsr.data import build_dataset
from torch.utils.data import Dataset
from tqdm import tqdm

from dckd_sr import checkpoint, devices, locks, precision
from dckd_sr.data import lmdb_maker, pair_sizes
from dckd_sr.data.files import read_bytes, view_lmdb
from dckd_sr.data.preparing import Result, refuse_inside
from dckd_sr.download import sha256_of
from dckd_sr.errors import UserError, out_of_memory, reason
from dckd_sr.inference import infer

FORMATS = ('uint8', 'float16')
_RECORD = 'teacher_cache.json'
WHOLE = 2**30  # bytes of images whose content is compared, not their sizes alone
_SECONDS = 2  # of work that a kill may cost


class TeacherCache:
    """Reads what ``prepare teacher_cache`` wrote.

    Args:
        folder: the LMDB.

    Raises:
        UserError: it is not there, or something else.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.dtype = np.dtype(_read_record(folder)['format'])

    def read(self, index: int, shape: tuple[int, ...]) -> np.ndarray:
        """The output for image ``index`` of the dataset: (h, w, 3) BGR, read-only, on the file itself.

        uint8, or float16 with white at 1.

        Raises:
            UserError: it has another size than ``shape``, that of the GT.
        """
        value = view_lmdb(self.folder, _key(index))
        if len(value) != np.prod(shape) * self.dtype.itemsize:
            raise UserError(f'{self.folder}: image {index} has another size than its GT: remove it and make it anew')
        return np.frombuffer(value, self.dtype).reshape(shape)


def _key(index):
    return f'{index:08d}'


def _read_record(folder):
    try:
        with open(os.path.join(folder, _RECORD), encoding='utf-8') as file:
            record = json.load(file)
        if record['format'] in FORMATS:
            return record
    except FileNotFoundError:
        what = 'no teacher cache' if os.path.lexists(folder) else 'not there'
        raise UserError(f'{folder} is {what}; make it: python -m dckd_sr.prepare teacher_cache -opt FILE') from None
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise UserError(f'{folder}: {_RECORD} is damaged: remove the folder and make it anew')


def check(opt: dict[str, Any], dataset: Dataset) -> None:
    """Whether ``datasets.train.teacher_cache`` holds what this run's teacher makes of this dataset.

    Args:
        opt: the whole option dict.
        dataset: the training dataset.

    Raises:
        UserError: it does not; the message names the first difference.
    """
    folder = opt['datasets']['train']['teacher_cache']
    if getattr(dataset, 'teacher_cache', None) is None:
        raise UserError(f'datasets.train.teacher_cache: {type(dataset).__name__} does not read it; SRImageDataset does')
    found = difference(_read_record(folder), describe(opt, dataset))
    if found:
        raise UserError(f'datasets.train.teacher_cache = {folder}: {found}; name another and make it')


def describe(opt: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    """What outputs depend on: the teacher's weights and options, the scale, the images with their sizes in bytes.

    Raises:
        UserError: there is no teacher, or no file with its weights.
    """
    network, path = dict(opt.get('network_t') or {}), opt.get('path') or {}
    weights, key = path.get('pretrain_network_t'), path.get('param_key_t')
    if network.get('type') == 'spandrel':  # built with the weights of its own path
        weights, key = network.pop('path', None), network.get('param_key')
    if weights is None or not os.path.isfile(weights):
        raise UserError(
            f'teacher_cache needs a teacher with weights: network_t and path.pretrain_network_t ({weights})'
        )
    network.pop('allow_random', None)
    return {
        'weights': sha256_of(weights),
        'param_key_t': key,
        'network_t': network,
        'scale': opt['scale'],
        'lq_convention': None if dataset.lq_folder else dataset.convention,  # of LQ made from GT
        'images': [[name, size] for name, size in _images(dataset)],
        'content': _content(dataset),
    }


def _images(dataset):
    """(name, bytes) of the files that the teacher sees."""
    folder = dataset.lq_folder or dataset.gt_folder
    for paths in dataset.paths:
        path = paths['lq_path']
        if dataset.backend == 'lmdb':
            yield path, len(view_lmdb(folder, path))
        else:
            yield os.path.relpath(path, folder).replace(os.sep, '/'), os.path.getsize(path)


def _content(dataset):
    """A hash of the bytes of these files, where they are not many; else their sizes have to do."""
    if sum(size for _, size in _images(dataset)) > WHOLE:
        return None
    folder, digest = dataset.lq_folder or dataset.gt_folder, hashlib.sha256()
    for paths in dataset.paths:
        path = paths['lq_path']
        content = view_lmdb(folder, path) if dataset.backend == 'lmdb' else read_bytes(path)
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def difference(record: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """The first difference in words, or None; only keys of ``expected`` count."""
    expected = json.loads(json.dumps(expected, default=str))
    for key, wanted in expected.items():
        found = record.get(key)
        if found == wanted or (key == 'content' and None in (found, wanted)):
            continue
        if key == 'weights':
            return f'made with other weights of the teacher (sha256 {str(found)[:8]}..., not {wanted[:8]}...)'
        if key == 'images' and isinstance(found, list):
            return _difference_of_images(found, wanted)
        if key == 'content':
            return 'made of images with another content'
        if key == 'network_t' and isinstance(found, dict):
            key = next(name for name in [*wanted, *found] if wanted.get(name) != found.get(name))
            found, wanted, key = found.get(key), wanted.get(key), f'network_t.{key}'
        return f'made with {key} {found}, not {wanted}'
    return None


def _difference_of_images(found, wanted):
    if len(found) != len(wanted):
        return f'made of {len(found)} images, not {len(wanted)}'
    (old, old_size), (new, size) = next((a, b) for a, b in zip(found, wanted) if a != b)
    if old != new:
        return f'made of other images ({old}, not {new})'
    return f'made of another {new} ({old_size} bytes, not {size})'


# ---------------------------------------------------------------------------------------------------------------------
# Making it


def make(args):
    """``teacher_cache``: the cache that an option file names."""
    from dckd_sr import options  # all archs, losses and models: seconds, for this command alone

    opt, _ = options.load(args.opt, args.force_yml)
    block = opt['datasets']['train']
    folder = block.get('teacher_cache')
    if folder is None:
        raise UserError(f'{args.opt}: datasets.train.teacher_cache is missing; the folder NAME.lmdb to write')
    dataset = build_dataset({**block, 'phase': 'val', 'cache': None})
    refuse_inside([folder], filter(None, [dataset.gt_folder, dataset.lq_folder]))
    expected = {'format': args.format, 'self_ensemble': args.self_ensemble, **describe(opt, dataset)}
    if os.path.lexists(folder):
        found = difference(_read_record(folder), expected)
        if found:
            raise UserError(f'{folder} exists, {found}: remove it, or name another')
        return Result(f'{folder}: {len(dataset)} images, was ready')
    pair_sizes.check_headers(dataset)
    write(folder, expected, dataset, _runner(opt, args.self_ensemble))
    size = os.path.getsize(os.path.join(folder, 'data.mdb'))
    return Result(f'{folder}: {len(dataset)} images as {args.format}, {size / 2**20:.0f} MB')


def _runner(opt, self_ensemble):
    """(3, h, w) -> (3, h * scale, w * scale), float32 on the CPU, by the teacher, with the tiles of ``val``."""
    precision.set_tf32(False)  # what is kept is made once, and rounded once
    device = devices.of(opt)
    try:
        net = build_network({key: value for key, value in opt['network_t'].items() if key != 'allow_random'})
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'network_t: {reason(error)}') from error
    path = opt['path']
    if path.get('pretrain_network_t') is not None:
        strict, key = path.get('strict_load_t'), path.get('param_key_t')
        checkpoint.load_network(net, path['pretrain_network_t'], strict, key, 'path.param_key_t')
    net = net.to(device).eval()
    sizes = {key: opt['val'].get(key) for key in ('window_size', 'tile_size', 'tile_overlap')}

    def run(lq):
        with torch.no_grad():
            return infer(net, lq[None].to(device), opt['scale'], **sizes, self_ensemble=self_ensemble)[0].float().cpu()

    return run


def write(folder, expected, dataset, run):
    """Fill a hidden folder, which gets its name when it is complete; a killed run's one is continued.

    Args:
        folder: the LMDB to be.
        expected: what it is made of, see `describe`, and its ``format``.
        dataset: whole images in the training's order.
        run: (3, h, w) -> (3, H, W), RGB, white at 1.

    Raises:
        UserError: it cannot be written; what is done stays for the next run.
    """
    parent, name = os.path.split(os.path.abspath(folder))
    temporary = os.path.join(parent, f'.{name}.tmp')
    record = os.path.join(temporary, _RECORD)
    try:
        with locks.preparing(folder):
            before = None
            with contextlib.suppress(OSError, ValueError), open(record, encoding='utf-8') as file:
                before = json.load(file)
            if before is None or difference(before, expected):
                shutil.rmtree(temporary, ignore_errors=True)
                os.makedirs(temporary)
                with open(record, 'w', encoding='utf-8') as file:
                    json.dump(expected, file, default=str)
            _fill(temporary, expected['format'], dataset, run)
            os.rename(temporary, folder)
    except (OSError, lmdb.Error) as error:
        raise UserError(f'cannot write {folder}: {getattr(error, "strerror", None) or error}') from error


def _fill(folder, kind, dataset, run):
    with lmdb.open(folder, map_size=lmdb_maker.MAP_SIZE) as environment:
        with environment.begin() as transaction:
            done = {bytes(key) for key in transaction.cursor().iternext(values=False)}
        batch, since = [], time.monotonic()
        with tqdm(total=len(dataset), initial=len(done), desc='teacher_cache', unit='image', disable=None) as bar:
            for index in range(len(dataset)):
                key = _key(index).encode()
                if key in done:
                    continue
                sample = dataset[index]
                try:
                    output = run(sample['lq'])
                except Exception as error:
                    if isinstance(error, UserError) or not out_of_memory(error):
                        raise
                    path, (height, width) = sample['lq_path'], sample['lq'].shape[1:]
                    raise UserError(
                        f'{path} ({width}x{height}): not enough memory; set val.tile_size, such as 256, or lower it'
                    ) from error
                if not torch.isfinite(output).all():
                    raise UserError(f'the output of the teacher is not finite: {sample["lq_path"]}')
                batch.append((key, _pixels(output, kind).tobytes()))
                bar.update()
                if time.monotonic() - since > _SECONDS:
                    lmdb_maker.put(environment, batch)
                    batch, since = [], time.monotonic()
        lmdb_maker.put(environment, batch)


def _pixels(output, kind):
    """(3, h, w) RGB float -> (h, w, 3) BGR; uint8 is rounded and clipped to what an image file can hold."""
    if kind == 'uint8':
        output = (output.clamp(0, 1) * 255).round().to(torch.uint8)
    return output.flip(0).permute(1, 2, 0).contiguous().numpy().astype(kind)
