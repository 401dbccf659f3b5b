"""Many jobs on files: over all cores, restartable, and never a half-written or overwritten file."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from dckd_sr.data.decoding import decode
from dckd_sr.errors import UserError
from dckd_sr.processes import end_with_parent


class CannotWrite(UserError):
    """A write failed, and the next one will: disk full, no permission."""


def cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def run(function: Callable[[Any], Any], jobs: Iterable[Any], workers: int, title: str) -> Iterator[Any]:
    """Yield ``function(job)`` of every job, in the order they end, with a progress bar on a terminal.

    Args:
        function: of a module, so that other processes find it.
        jobs: picklable arguments.
        workers: number of processes; 1 stays in this one.
        title: what the progress bar says.

    Raises:
        UserError: a worker process was killed. What ``function`` raises is raised here. Interrupted or failed, the jobs
            that have begun are finished first.
    """
    jobs = list(jobs)
    with tqdm(total=len(jobs), desc=title, unit='image', disable=None) as bar:
        for result in map(function, jobs) if min(workers, len(jobs)) < 2 else _run_parallel(function, jobs, workers):
            bar.update()
            yield result


def _run_parallel(function, jobs, workers):
    executor = ProcessPoolExecutor(min(workers, len(jobs)), initializer=_quiet_worker)
    try:
        # Few at a time: results may be large, and after an interruption there is little to finish.
        waiting = iter(jobs)
        running = {executor.submit(function, job) for job in itertools.islice(waiting, 2 * workers)}
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                result = future.result()
                running.update(executor.submit(function, job) for job in itertools.islice(waiting, 1))
                yield result
    except BrokenProcessPool:
        raise UserError('a worker process was killed, probably for want of memory: use fewer --workers') from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _quiet_worker():
    """Ctrl-C is the main process's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


class Record:
    """What has been made from what, in a hidden file of the output folder: the jobs that need no repetition.

    Args:
        folder: the output folder; need not exist.
    """

    NAME = '.prepared.jsonl'

    def __init__(self, folder: str):
        self.folder = folder
        self.entries = {}
        with contextlib.suppress(OSError), open(self._path(), encoding='utf-8') as file:
            for line in file:
                # The last line is incomplete after a power cut.
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    self.entries[entry['job']] = entry['stamp'], _sizes(entry['files'])

    def _path(self):
        return os.path.join(self.folder, self.NAME)

    def is_done(self, job: str, stamp: list[Any]) -> bool:
        """Whether the job was done with the same stamp (source file, settings), and its files are as it left them."""
        known, files = self.entries.get(job, (None, {}))
        return bool(files) and known == stamp and len(self.files(job)) == len(files)

    def files(self, job: str) -> set[str]:
        """The files that the job made earlier and that are as it left them; they may be replaced."""
        _, sizes = self.entries.get(job, (None, {}))
        paths = {os.path.normpath(os.path.join(self.folder, name)): size for name, size in sizes.items()}
        return {path for path, size in paths.items() if size in (_size(path), _UNKNOWN) and os.path.isfile(path)}

    def add(self, job: str, stamp: list[Any], files: Iterable[str]) -> None:
        """Note that a job is done; ``files`` are paths of its outputs."""
        sizes = {os.path.relpath(path, self.folder): _size(path) for path in files}
        self.entries[job] = stamp, sizes
        try:
            with open(self._path(), 'a', encoding='utf-8') as file:
                # A line of its own even after one that a power cut left incomplete.
                file.write('\n' + json.dumps({'job': job, 'stamp': stamp, 'files': sizes}))
        except OSError as error:
            raise CannotWrite(f'cannot write {self._path()}: {error.strerror}') from error


_UNKNOWN = -1  # size of a file in the records of earlier versions


def _sizes(files):
    return files if isinstance(files, dict) else dict.fromkeys(files, _UNKNOWN)


def _size(path):
    return os.path.getsize(path) if os.path.isfile(path) else None


def stamp(path: str, *settings: Any) -> list[Any]:
    """What an output depends on: the source file's path, size and time of change, and settings."""
    status = os.stat(path)
    return [os.path.realpath(path), status.st_size, status.st_mtime_ns, *settings]


def write_png(image: np.ndarray, path: str, replace: bool = False) -> None:
    """Write (h, w, c) as PNG, whole or not at all.

    Args:
        replace: an existing file was made by an earlier run and may be replaced.

    Raises:
        UserError: the file exists and holds another image (it stays), or cannot be written.
    """
    if os.path.exists(path) and not replace:
        with open(path, 'rb') as file:
            present = decode(file.read(), path)
        same = present.plain and present.pixels.dtype == image.dtype and np.array_equal(present.pixels, image)
        if not same:
            raise UserError(f'{path} exists and differs from what would be written: move it or name another folder')
        return
    write_atomically(path, lambda temporary: _write(temporary, encode_png(image, path)))


def encode_png(image: np.ndarray, name: str, level: int = 3) -> bytes:
    """PNG file of (h, w, c), 8 or 16 bit; ``level`` is zlib's, 3 as in BasicSR's scripts, 0 for no compression."""
    settings = [cv2.IMWRITE_PNG_COMPRESSION, level]
    if hasattr(cv2, 'IMWRITE_PNG_FILTER'):  # OpenCV 4.11; the other filters make files no smaller and slower to read
        settings += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FAST_FILTERS if level else cv2.IMWRITE_PNG_FILTER_NONE]
    done, content = cv2.imencode('.png', image, settings)
    if not done:
        raise UserError(f'cannot encode {name}')
    return content.tobytes()


def _write(path, content):
    with open(path, 'wb') as file:
        file.write(content)


def place(source: str, path: str, copy: bool = False, replace: bool = False) -> None:
    """Give a file a second name by a hard link, or copy it where links do not work or ``copy`` is set.

    Args:
        replace: as in `write_png`.

    Raises:
        UserError: another file is there (it stays), or it cannot be written.
    """
    if os.path.exists(path) and not (replace and not os.path.samefile(source, path)):
        if not os.path.samefile(source, path) and not _same_content(source, path):
            raise UserError(f'{path} exists and differs from {source}: move it or name another folder')
        return

    def make(temporary):
        if not copy:
            with contextlib.suppress(OSError):
                os.link(source, temporary)
                return
        shutil.copy2(source, temporary)

    write_atomically(path, make)


def _same_content(first, second):
    if os.path.getsize(first) != os.path.getsize(second):
        return False
    with open(first, 'rb') as a, open(second, 'rb') as b:
        while block := a.read(2**20):
            if block != b.read(2**20):
                return False
    return True


def write_atomically(path: str, make: Callable[[str], None]) -> None:
    """Let ``make(temporary path)`` write a file beside ``path``, then give it its name.

    Raises:
        CannotWrite: nothing is left behind.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f'.{name}.tmp')
    try:
        os.makedirs(folder or '.', exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # of a killed run; it may be a link to a source, so it is not written through
        try:
            make(temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    except OSError as error:
        raise CannotWrite(f'cannot write {path}: {error.strerror or error}') from error
