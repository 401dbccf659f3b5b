"""What trainings and scores are made from, by content: options, and the bytes of the files that they name.

A training writes this to ``made_from.json`` in its folder before its first iteration, a test to ``results.json``. Who
wants to use one again compares: equal names, paths and dates are no proof that nothing has changed between.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dckd_sr import checkpoint, options
from dckd_sr.download import sha256_of

RECORD = 'made_from.json'
WHOLE = 2**30  # bytes of a folder that are read; of larger ones, the times of the files stand for their content
# What the weights do not depend on, and what scores do not.
_NEVER = ('name', 'num_gpu', 'device', 'logger', 'compare', 'dist_params')
_NOT_OF_TRAINING = (*_NEVER, 'val', 'datasets.train.num_worker_per_gpu')
_NOT_OF_TEST = (*_NEVER, 'train', 'manual_seed', 'datasets.train')
_NAMES = ('name', 'type', 'model_type')  # of these keys no value is a path


def inputs(opt: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, path) of the files that resolved options name and that are there, and of folders of images and of code."""
    for key, value in flat(options.portable(opt)):
        if not isinstance(value, str) or key.rpartition('.')[2] in _NAMES:
            continue
        try:
            if os.path.isfile(value) or (key.startswith(('datasets.', 'imports.')) and os.path.isdir(value)):
                yield key, value
        except ValueError:  # a zero byte
            continue


def flat(block: Any, key: str = '') -> Iterator[tuple[str, Any]]:
    """('train.step.0', value) of every plain value, and of empty blocks."""
    items = block.items() if isinstance(block, dict) else enumerate(block) if isinstance(block, list) else ()
    items = list(items)
    if not items:
        yield key, block
    for name, value in items:
        yield from flat(value, f'{key}.{name}' if key else str(name))


def of_training(opt: dict[str, Any], world_size: int = 1) -> dict[str, Any]:
    """What the weights of a training depend on: see `describe`."""
    others = tuple(f'datasets.{name}' for name in opt['datasets'] if name != 'train')
    return describe(opt, (*_NOT_OF_TRAINING, *others), {'processes': world_size})


def of_test(opt: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What the scores of a test depend on: see `describe`."""
    return describe(opt, _NOT_OF_TEST, more)


def describe(opt: dict[str, Any], without: tuple[str, ...], more: dict[str, Any]) -> dict[str, Any]:
    """Options and contents.

    Args:
        opt: resolved options.
        without: keys (of blocks, too) that do not count.
        more: further settings.

    Returns:
        {'options': {key: value}, 'contents': {key of a path: [path, digest]}}, as JSON gives it back.
    """

    def counts(key):
        return not any(key == other or key.startswith(f'{other}.') for other in without)

    contents = {}
    for key, path in inputs(opt):
        if counts(key) and not key.startswith('imports.'):
            try:
                contents[key] = [path, digest(path)]
            except OSError as error:  # who reads it will say so
                contents[key] = [path, f'not readable: {error.strerror}']
    plain = {key: value for key, value in flat(options.portable(opt)) if counts(key) and key not in contents}
    if 'use_tf32' in plain and (opt.get('num_gpu') == 0 or not torch.cuda.is_available()):
        plain['use_tf32'] = False  # whatever it is: CPUs have none
    return json.loads(json.dumps({'options': {**plain, **more}, 'contents': contents}, default=str))


def difference(record: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """The first difference between two of `describe` in words, or None; where equal content lies does not matter."""
    try:
        old, new = record['contents'], expected['contents']
        for key in [*new, *(key for key in old if key not in new)]:
            if key in old and key in new and old[key][1] != new[key][1]:
                kind = 'other files in it' if os.path.isdir(new[key][0]) else 'another content'
                return f'{key} = {new[key][0]} has {kind} now'
        plain = [{**part['options'], **dict.fromkeys(part['contents'], '(a file)')} for part in (record, expected)]
        for key in [*plain[1], *(key for key in plain[0] if key not in plain[1])]:
            values = [json.dumps(part[key]) if key in part else 'not there' for part in plain]
            if values[0] != values[1]:
                return f'{key}: {values[0]} -> {values[1]}'
    except (KeyError, TypeError, IndexError, AttributeError):
        return 'its record is damaged'
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Content


def digest(path: str | os.PathLike) -> str:
    """A hash of a file's bytes, or of a folder's names and bytes, with all below it."""
    if not os.path.isdir(path):
        return _of_file(os.path.realpath(path), *_stamp(os.stat(path)))
    files = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        files += [os.path.join(folder, name) for name in names if not name.startswith('.') and name != 'lock.mdb']
    stamps = {os.path.relpath(file, path): (file, *_stamp(os.stat(file))) for file in files if os.path.isfile(file)}
    whole, result = sum(size for _, size, _ in stamps.values()) <= WHOLE, hashlib.sha256()
    for name, (file, size, time) in sorted(stamps.items()):
        content = _of_file(os.path.realpath(file), size, time) if whole else str(time)
        result.update(json.dumps([name, size, content]).encode())
    return result.hexdigest()


def _stamp(status):
    return status.st_size, status.st_mtime_ns


@functools.cache
def _of_file(path, size, time):
    return sha256_of(path)


# ---------------------------------------------------------------------------------------------------------------------
# The record of a training


def read(folder: str | os.PathLike) -> dict[str, Any]:
    """The record of a run's folder; {} where there is none, or a damaged one."""
    try:
        record = json.loads((Path(folder) / RECORD).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    made_from = record.get('made_from') if isinstance(record, dict) else None
    parts = [made_from.get(part) for part in ('options', 'contents')] if isinstance(made_from, dict) else [None]
    return record if all(isinstance(part, dict) for part in parts) else {}


def begin(folder: str | os.PathLike, made_from: dict[str, Any], resumed: bool) -> None:
    """Record what a training that is about to go on is made from; what it was made from so far stays on record.

    Raises:
        UserError: it cannot be written.
    """
    record = {'made_from': made_from, 'changed': []}
    if resumed:
        former = read(folder)
        changed = former.get('changed')
        record['changed'] = changed if isinstance(changed, list) else ['it began without a record']
        found = difference(former['made_from'], made_from) if former else None
        record['changed'] += [found] if found else []
    checkpoint.write(json.dumps(record, indent=1).encode(), Path(folder) / RECORD)


def end(folder: str | os.PathLike) -> None:
    """Add to the record the final weights, which makes it that of a finished training.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(folder)
    files = sorted((folder / 'models').glob('net_*_latest.*'))
    record = {**read(folder), 'weights': {file.name: digest(file) for file in files}}
    checkpoint.write(json.dumps(record, indent=1).encode(), folder / RECORD)


def lacking(folder: str | os.PathLike, made_from: dict[str, Any]) -> str | None:
    """Why the training in a folder is not, from its first iteration on, the one that is ``made_from`` this; or None."""
    record = read(folder)
    if not record:
        return 'there is no record of what it was made from'
    if record.get('changed'):
        return f'it was continued with other options: {record["changed"][0]}'
    return difference(record['made_from'], made_from)


def final_weights(folder: str | os.PathLike, network: str = 'net_g') -> Path | None:
    """The file with the average of the trained network, of a training that is at its end and as it was then."""
    folder, weights = Path(folder), read(folder).get('weights')
    if not isinstance(weights, dict) or not weights:
        return None
    try:
        if any(digest(folder / 'models' / name) != known for name, known in weights.items()):
            return None
    except OSError:
        return None
    # safetensors files have one network each
    names = sorted(name for name in weights if name.startswith((f'{network}_ema_latest.', f'{network}_latest.')))
    return folder / 'models' / names[0] if names else None
