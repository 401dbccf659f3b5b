"""Finding and decoding image files; every message names the file."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dckd_sr.data import decoding
from dckd_sr.data.decoding import SUFFIXES
from dckd_sr.errors import UserError, looked_in

_SHOWN = 3  # names in a message


def image_names(folder: str) -> list[str]:
    """Sorted names of the image files in ``folder``; hidden and other files (Thumbs.db) do not count.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not os.path.isdir(folder):
        raise UserError(f'folder not found: {folder}{looked_in(folder, " (looked in {})")}')
    with os.scandir(folder) as entries:
        entries = [e for e in entries if not e.name.startswith('.') and e.name.lower().endswith(SUFFIXES)]
    dangling = sorted(e.path for e in entries if e.is_symlink() and not os.path.exists(e.path))
    if dangling:
        raise UserError(f'links that lead nowhere: {", ".join(dangling[:3])}')
    names = sorted(e.name for e in entries if e.is_file())
    if not names:
        raise UserError(f'no images in {folder} (looked for {", ".join(SUFFIXES)}{not_searched(folder)})')
    return names


def not_searched(folder: str | os.PathLike) -> str:
    """'; sub-folders are not searched: a, b' where a folder has some with images in or below them; else ''."""
    names = []
    with contextlib.suppress(OSError):
        names = [
            e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith('.') and _has_images(e.path)
        ]
    more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
    return f'; sub-folders are not searched: {", ".join(sorted(names)[:_SHOWN])}{more}' if names else ''


def _has_images(folder):
    return any(name.lower().endswith(SUFFIXES) for _, _, names in os.walk(folder) for name in names)


def meta_info_names(meta_info_file: str, folder: str) -> list[str]:
    """The image names listed in a BasicSR meta information file, lines such as ``0001_s001.png (480,480,3)``.

    BasicSR's own lists (basicsr/data/meta_info) are missing from its PyPI package; for those the folder is listed.

    Raises:
        UserError: no such file, or nothing in it.
    """
    if not os.path.isfile(meta_info_file):
        if 'basicsr/data/meta_info/' in meta_info_file.replace('\\', '/'):
            warnings.warn(
                f'{meta_info_file} is not part of the PyPI package of BasicSR: every image in {folder} is used',
                stacklevel=2,
            )
            return image_names(folder)
        raise UserError(f'meta_info_file not found: {meta_info_file}{looked_in(meta_info_file, " (looked in {})")}')
    with open(meta_info_file, encoding='utf-8') as file:
        names = [_name_of(line) for line in file if line.strip()]
    if not names:
        raise UserError(f'no image names in {meta_info_file}')
    return names


def lmdb_keys(folder: str) -> list[str]:
    """Sorted keys of an LMDB made by BasicSR (the names in its meta_info.txt without their extension).

    Raises:
        UserError: the folder is not such an LMDB.
    """
    meta = os.path.join(folder, 'meta_info.txt')
    if not folder.endswith('.lmdb') or not os.path.isfile(meta):
        raise UserError(f'not an LMDB folder of BasicSR (NAME.lmdb with meta_info.txt): {folder}')
    with open(meta, encoding='utf-8') as file:
        keys = sorted(os.path.splitext(_name_of(line))[0] for line in file if line.strip())
    if not keys:
        raise UserError(f'no images in {folder}')
    return keys


def read_lmdb(folder: str, key: str) -> bytes:
    """A copy of the value of a key. Raises UserError as `view_lmdb`."""
    return bytes(view_lmdb(folder, key))


def view_lmdb(folder: str, key: str) -> memoryview:
    """The value of a key in the file itself, which is mapped into memory: only what is looked at is read.

    Each folder is opened once per process, however many datasets read it: LMDB refuses to open it twice, in a forked
    worker as well if the parent has it open; there the inherited handle is closed first.

    Raises:
        UserError: the LMDB cannot be opened, or lacks the key.
    """
    import lmdb

    path, process = os.path.realpath(folder), os.getpid()
    owner, environment, transaction = _environments.get(path, (None, None, None))
    if owner != process:
        if environment is not None:
            environment.close()
        try:
            environment = lmdb.open(path, readonly=True, lock=False, readahead=False, create=False)
        except lmdb.Error as error:
            raise UserError(f'cannot open {folder}: {str(error).replace(path, "").lstrip(": ")}') from error
        # LMDB maps the file into memory: beyond the end of a truncated one, the process is killed.
        found = os.path.getsize(os.path.join(path, 'data.mdb'))
        needed = (environment.info()['last_pgno'] + 1) * environment.stat()['psize']
        if found < needed:
            raise UserError(f'{folder} is truncated: data.mdb has {found} bytes of {needed}')
        # Open for good: values are valid as long as it is, and nobody writes.
        transaction = environment.begin(buffers=True)
        _environments[path] = process, environment, transaction
    value = transaction.get(key.encode('utf-8'))
    if value is None:
        raise UserError(f'{folder} has no key {key!r}')
    return value


_environments = {}  # folder -> (process id, lmdb.Environment, lmdb.Transaction)


def _name_of(line):
    """'a b.png (480,480,3) 1' -> 'a b.png'; without a shape, the first word counts, as in BasicSR."""
    line = line.strip()
    with_shape = re.match(r'(.+?)\s+\(\s*\d+\s*,.*\)', line)
    return with_shape.group(1) if with_shape else line.split()[0]


def find_partners(
    gt_names: Sequence[str], lq_folder: str, template: str = '{}', any_suffix: bool = True
) -> tuple[dict[str, str], list[str]]:
    """Match ``template`` filled with each GT name's stem against the files of ``lq_folder``.

    Args:
        gt_names: names, possibly with sub-folders (then looked up in lq_folder itself, as BasicSR does).
        any_suffix: another image suffix than the GT's is accepted, the GT's is preferred.

    Returns:
        {gt name: lq name}, and the LQ names nobody matched.

    Raises:
        UserError: GT images without a partner; the message has the first ones and, where it shows, the right template.
    """
    present = image_names(lq_folder)
    by_name, by_stem = set(present), {}
    for name in present:
        by_stem.setdefault(os.path.splitext(name)[0], name)
    pairs, missing = {}, []
    for gt_name in gt_names:
        stem, suffix = os.path.splitext(os.path.basename(gt_name))
        wanted = template.format(stem)
        if wanted + suffix in by_name:
            pairs[gt_name] = wanted + suffix
        elif any_suffix and wanted in by_stem:
            pairs[gt_name] = by_stem[wanted]
        else:
            missing.append(wanted + suffix)
    if missing:
        more = f' and {len(missing) - 3} more' if len(missing) > 3 else ''
        hint = other_template(gt_names, by_stem, template)
        hint = f" (filename_tmpl: '{hint}'?)" if hint else other_suffix(missing[0], by_stem)
        raise UserError(
            f'no LQ image for {len(missing)} of {len(gt_names)} GT images in {lq_folder}: '
            f'{", ".join(missing[:3])}{more}{hint}'
        )
    used = set(pairs.values())
    return pairs, [name for name in present if name not in used]


def other_template(gt_names: Iterable[str], lq_stems: Iterable[str], template: str = '{}') -> str | None:
    """The template that matches the first GT image instead, such as '{}x4', or None.

    Args:
        gt_names: file names, or keys of an LMDB.
        lq_stems: names without suffix.
        template: the one that does not match.
    """
    stem = os.path.splitext(os.path.basename(next(iter(gt_names))))[0]
    # Sorted by length: for GT "img_1" both "img_1x4" and "img_10x4" contain the stem.
    found = min((s for s in lq_stems if stem in s), key=len, default=None)
    suggestion = found.replace(stem, '{}', 1) if found else template
    return suggestion if suggestion != template else None


def other_suffix(missing: str, by_stem: Mapping[str, str]) -> str:
    """A hint where a file is there under another suffix (or the same in capitals), and what pairs the two; or ''."""
    found = by_stem.get(os.path.splitext(missing)[0])
    if found is None:
        return ''
    return f' ({found} is there; type: SRImageDataset, or Dataset_PairedImage at scale 1, pairs files of any suffix)'


def listed_but_missing(paths: Sequence[str], meta_info_file: str) -> str:
    """A message about files of a list that are not there."""
    folder, name = os.path.split(paths[0])
    present = os.listdir(folder or '.') if os.path.isdir(folder or '.') else []
    by_stem = {os.path.splitext(other)[0]: other for other in present if other.lower().endswith(SUFFIXES)}
    return (
        f'{len(paths)} images listed in {meta_info_file} are missing: {", ".join(paths[:_SHOWN])}'
        f'{other_suffix(name, by_stem)}'
    )


def lmdb_difference(gt_folder: str, lq_folder: str, gt_keys: Sequence[str], lq_keys: Sequence[str]) -> str:
    """A message about two LMDBs of which LQ lacks keys of GT, with the command that makes them equal where it shows."""
    differing = sorted(set(lq_keys) ^ set(gt_keys))
    text = f'{lq_folder} and {gt_folder} have different keys: {", ".join(differing[:_SHOWN])}'
    lacking, template = sorted(set(gt_keys) - set(lq_keys)), None
    template = other_template(lacking, lq_keys) if lacking else None
    if template is None or any(template.format(key) not in lq_keys for key in lacking[:100]):
        return text
    return (
        f"{text}; those of LQ are named '{template}': make it anew, python -m dckd_sr.prepare lmdb FOLDER {lq_folder} "
        f"--filename_tmpl '{template}'"
    )


def read_bytes(path: str) -> bytes:
    """The content of a file.

    Raises:
        UserError: it cannot be opened, or is empty.
    """
    try:
        with open(path, 'rb') as file:
            content = file.read()
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from error
    if not content:
        raise UserError(f'empty file: {path}')
    return content


def decode(content: bytes, name: str) -> np.ndarray:
    """Decode an image file's bytes to (h, w, 3) BGR, uint8 or uint16, for datasets.

    Grayscale becomes three equal channels; alpha is dropped. What is lost is a warning, each kind once per process, and
    what libraries say about a file is one, too.

    Raises:
        UserError: as `decoding.decode`.
    """
    image = decoding.decode(content, name)
    for text in image.lost:
        _warn(text, f'{name}: {text} (said once, of the first such image)')
    for text in image.remarks:
        _warn((name, text), f'{name}: {text}')
    pixels = image.pixels
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels)


def _warn(what, text):
    if what not in _warned:
        _warned.add(what)
        warnings.warn(text, stacklevel=3)


_warned = set()


def check_image_file(path: str) -> str | None:
    """What is wrong with an image file, in words, or None."""
    try:
        decode(read_bytes(path), path)
    except UserError as error:
        return str(error)
    return None
