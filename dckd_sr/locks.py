"""Files that one process at a time may hold."""

import contextlib
import errno
import os
import time
from pathlib import Path

from dckd_sr.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

PATIENCE = 3  # seconds; loader workers hold what their killed parent held until they have noticed


def lock(file):
    """Try to hold an open file, until it is closed or the process ends, however it ends.

    Returns:
        False if somebody else holds it; True also where the file system has no locks.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(2**30)  # beyond what is written, because Windows locks bytes against reading
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    return True


def hold(path):
    """Try to hold the file of a name, which is made where it is missing.

    Returns:
        the open file, to be closed or given to `release`; None if somebody else holds it.
    """
    while True:
        file = open(path, 'a+b')
        try:
            held = lock(file)
            if held and is_at(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()
        if not held:
            return None
        # Its former holder has removed it: that lock is on a file without a name, which nobody else will find.


def is_at(file, path):
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def release(file, path):
    """Let go what `hold` returned, and remove it, unless its name has become another's."""
    with file, contextlib.suppress(OSError):  # Windows keeps it while it is open; it is no one's then
        if is_at(file, path):
            os.unlink(path)


@contextlib.contextmanager
def alone(path):
    """Hold the file of a name, which nobody else needs; yields whether it is held. Leaves nothing behind."""
    deadline = time.monotonic() + PATIENCE
    while (file := hold(path)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        yield file is not None
    finally:
        if file is not None:
            release(file, path)


@contextlib.contextmanager
def preparing(folder):
    """Be the only process that makes what ``folder`` will hold; it need not exist.

    Raises:
        UserError: another process is at it.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_name(f'.{folder.name}.lock')) as held:
        if not held:
            raise UserError(f'another process is writing to {folder}: wait for its end, or name another folder')
        yield


def sole_writer(folder):
    """Be the only process that writes to an existing folder; a context that yields whether this one is.

    The folder may be moved in the meantime: then whoever makes one of this name may hold that.
    """
    return alone(folder / '.lock')
