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
from dckd_sr.data.decoding import Decoded, decode
from dckd_sr.data.files import image_names, read_bytes
from dckd_sr.errors import UserError


@dataclass
class Result:
    """What a command says at its end: the summary, one line per unfit image, {what was lost: names of images}."""

    summary: str = ''
    problems: list = field(default_factory=list)
    lost: dict = field(default_factory=dict)

    def add_lost(self, lost: Iterable[tuple[str, str]]) -> None:
        """Note (what was lost, name of the image)."""
        for what, name in lost:
            self.lost.setdefault(what, []).append(name)


@dataclass
class Outcome:
    """What a job on one image says: files written, what is unfit, (what was lost, name of the image)."""

    files: list = field(default_factory=list)
    problem: str | None = None
    lost: list = field(default_factory=list)


def read_image(path: str) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Decode a file to (h, w, 1) gray or (h, w, 3) BGR, 8 or 16 bit as stored.

    Returns:
        the pixels, and what was lost of the image: (what, its name).

    Raises:
        UserError: unreadable or damaged.
    """
    return pixels_of(decode(read_bytes(path), path), path)


def pixels_of(image: Decoded, path: str) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """As `read_image`, of an image that is decoded."""
    lost = [(what, os.path.basename(path)) for what in (*image.lost, *image.remarks)]
    return np.ascontiguousarray(image.pixels), lost


def stems_of(folder: str, problems: list[str]) -> dict[str, str]:
    """{name without suffix: name} of a folder's images; outputs are named after the first.

    Args:
        problems: grows by a line for each name that several images have (a.png and a.jpg), which are all left out.

    Raises:
        UserError: no folder, no images, or none that has a name of its own.
    """
    stems = {}
    for name in image_names(folder):
        stems.setdefault(os.path.splitext(name)[0], []).append(name)
    alike = [names for names in stems.values() if len(names) > 1]
    told = [f'{folder} has {"two" if len(names) == 2 else len(names)} images of one name: ' for names in alike]
    told = [f'{text}{", ".join(names[:-1])} and {names[-1]}' for text, names in zip(told, alike)]
    if alike and len(alike) == len(stems):
        raise UserError(f'{told[0]}, and none that has a name of its own')
    problems += [f'{text}; they are left out' for text in told]
    return {stem: names[0] for stem, names in stems.items() if len(names) == 1}


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
            result.add_lost(outcome.lost)
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
