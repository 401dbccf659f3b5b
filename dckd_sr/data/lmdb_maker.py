"""BasicSR's LMDB folders: data.mdb and meta_info.txt.

basicsr/utils/lmdb_util.py (LmdbMaker) takes ASCII names only, writes in place, reserves 1 TB and ends the process
where the folder exists; the format is the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable
from typing import Any

import lmdb

from dckd_sr import locks
from dckd_sr.data.files import lmdb_keys
from dckd_sr.errors import UserError

MAP_SIZE = 2**28  # to begin with
LEVEL = 1  # of PNG compression
_BATCH = 64  # images per transaction
_LONGEST_KEY = 511  # bytes, LMDB's own limit


def is_made(folder: str, stamps: dict[str, Any]) -> bool:
    """Whether the LMDB exists, complete, of exactly these images.

    Args:
        stamps: {key: what its image depends on}, values that JSON can hold.

    Raises:
        UserError: something else has that name, or it has no ``.lmdb`` at its end.
    """
    if not folder.endswith('.lmdb'):
        raise UserError(f'{folder} should end in .lmdb')
    for key in stamps:
        if len(key.encode('utf-8')) > _LONGEST_KEY:
            raise UserError(f'the name {key[:40]}... is longer than {_LONGEST_KEY} bytes, the limit of LMDB')
    if not os.path.lexists(folder):
        return False
    with contextlib.suppress(OSError, ValueError, UserError), open(_stamps(folder), encoding='utf-8') as file:
        if json.load(file) == stamps and set(lmdb_keys(folder)) == set(stamps):
            return True
    raise UserError(f'{folder} exists and was made of other images, or at another level: name another, or remove it')


def _stamps(folder):
    return os.path.join(folder, '.prepared.json')


def write(
    folder: str,
    images: Iterable[tuple[str, bytes, tuple[int, ...]]],
    stamps: dict[str, Any],
    problems: list[str],
    level: int = LEVEL,
) -> int:
    """Write all images to a temporary folder, which gets its name at the end.

    Args:
        images: (key, PNG file, (h, w, c)).
        stamps: see `is_made`.
        problems: filled while ``images`` is read; if anything is in it at the end, no LMDB is made.
        level: of compression, for the list of images.

    Returns:
        number of images; 0 if there were problems.

    Raises:
        UserError: it cannot be written; nothing is left behind.
    """
    parent, name = os.path.split(os.path.abspath(folder))
    temporary = os.path.join(parent, f'.{name}.tmp')
    try:
        with locks.preparing(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                lines = _fill(temporary, images)
                if problems:
                    return 0
                with open(os.path.join(temporary, 'meta_info.txt'), 'w', encoding='utf-8') as file:
                    file.writelines(f'{key}.png ({h},{w},{c}) {level}\n' for key, (h, w, c) in sorted(lines.items()))
                with open(_stamps(temporary), 'w', encoding='utf-8') as file:
                    json.dump(stamps, file)
                os.rename(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, lmdb.Error) as error:
        raise UserError(f'cannot write {folder}: {error}') from error
    return len(lines)


def _fill(folder, images):
    shapes, batch = {}, []
    with lmdb.open(folder, map_size=MAP_SIZE) as environment:
        for key, content, shape in images:
            shapes[key] = shape
            batch.append((key.encode('utf-8'), content))
            if len(batch) == _BATCH:
                put(environment, batch)
                batch = []
        put(environment, batch)
    return shapes


def put(environment: lmdb.Environment, batch: list[tuple[bytes, bytes]]) -> None:
    """Write (key, value) pairs at once. The map grows when it is full: how much PNG files need is not known before."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, content in batch:
                    transaction.put(key, content)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()['map_size'])
