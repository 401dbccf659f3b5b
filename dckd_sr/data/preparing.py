"""What the data preparation commands share: reading images strictly, refusing to write into sources, results."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dckd_sr import locks
from dckd_sr.data import jobs
from dckd_sr.data.files import decode_stored, image_names, is_cmyk, read_bytes
from dckd_sr.errors import UserError


@dataclass
class Result:
    """What a command says at its end: the summary, one line per unfit image, names of images that had alpha."""

    summary: str = ''
    problems: list = field(default_factory=list)
    alpha: list = field(default_factory=list)


@dataclass
class Outcome:
    """What a job on one image says: files written, what is unfit, the name of an image that had alpha."""

    files: list = field(default_factory=list)
    problem: str | None = None
    alpha: str | None = None


def read_image(path: str) -> tuple[np.ndarray, bool]:
    """Decode a file to (h, w, 1) gray or (h, w, 3) BGR, 8 or 16 bit as stored, and whether alpha was dropped.

    Raises:
        UserError: unreadable, damaged, or print colours (CMYK).
    """
    return decoded(read_bytes(path), path)


def decoded(content: bytes, name: str) -> tuple[np.ndarray, bool]:
    """As `read_image`, of a file's content; ``name`` is for messages."""
    if is_cmyk(content):
        raise UserError(f'CMYK, not RGB: {name} (convert it with its colour profile first)')
    image = decode_stored(content, name)
    alpha = image.shape[2] in (2, 4)
    return np.ascontiguousarray(image[..., :-1] if alpha else image), alpha


def stems_of(folder: str) -> dict[str, str]:
    """{name without suffix: name} of a folder's images; outputs are named after the first.

    Raises:
        UserError: no folder, no images, or two of one name (a.png and a.jpg).
    """
    stems = {}
    for name in image_names(folder):
        stem = os.path.splitext(name)[0]
        if stem in stems:
            raise UserError(f'{folder} has two images of one name: {stems[stem]} and {name}')
        stems[stem] = name
    return stems


def refuse_inside(outputs: Iterable[str], sources: Iterable[str]) -> None:
    """Raise UserError if an output folder is a source folder or lies inside one."""
    for out in outputs:
        for source in sources:
            inner, outer = os.path.realpath(out), os.path.realpath(source)
            if inner == outer or inner.startswith(os.path.join(outer, '')):
                raise UserError(f'{out} would be written inside the source {source}: name another folder')


def run_jobs(
    function: Callable, todo: Sequence[Any], args: argparse.Namespace, record: jobs.Record, stamps: dict[str, list[Any]]
) -> tuple[Result, int]:
    """Run the jobs that are not done yet.

    Args:
        function: (job, files it may replace) -> Outcome; a UserError makes an unfit image, and the others go on.
        todo: jobs, each with a ``key`` of its own.
        args: with ``workers`` and ``command``.
        record: what is done; grows.
        stamps: {key: what the job's outputs depend on}.

    Returns:
        the result without its summary, and how many jobs were done before.

    Raises:
        UserError: outputs cannot be written at all.
    """
    result, open_jobs = Result(), [job for job in todo if not record.is_done(job.key, stamps[job.key])]
    before = {job.key: record.files(job.key) for job in open_jobs}
    work = [(function, job, before[job.key]) for job in open_jobs]
    with locks.preparing(record.folder) if work else contextlib.nullcontext():
        for key, outcome in jobs.run(_one, work, args.workers, args.command):
            if outcome.problem:
                result.problems.append(outcome.problem)
            else:
                for path in before[key] - {os.path.normpath(path) for path in outcome.files}:
                    os.unlink(path)  # of a source that had more crops when it was larger
                record.add(key, stamps[key], outcome.files)
            if outcome.alpha:
                result.alpha.append(outcome.alpha)
    result.problems.sort()
    return result, len(todo) - len(open_jobs)


def _one(work):
    function, job, ours = work
    try:
        return job.key, function(job, ours)
    except jobs.CannotWrite:
        raise
    except UserError as error:
        return job.key, Outcome(problem=str(error))


def some(names: Iterable[str], count: int = 5) -> str:
    """The first names in order, and how many more."""
    names = sorted(names)
    return ', '.join(names[:count]) + (f' and {len(names) - count} more' if len(names) > count else '')


def size_text(image: np.ndarray) -> str:
    """Width x height of (h, w, c)."""
    return f'{image.shape[1]}x{image.shape[0]}'


def ready_text(count: int) -> str:
    """For a summary: how many images needed nothing."""
    return f' ({count} were ready)' if count else ''


def unfit_text(result: Result) -> str:
    """For a summary: how many problems there are."""
    count = len(result.problems)
    return f'; {count} problem{"s" if count > 1 else ""}' if count else ''
