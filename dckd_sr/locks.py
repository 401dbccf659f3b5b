"""Files that one process at a time may hold."""

import contextlib
import errno
import time

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


@contextlib.contextmanager
def sole_writer(folder):
    """Be the only process that writes to an existing folder; yields whether this one is. Leaves nothing behind."""
    path, deadline = folder / '.lock', time.monotonic() + PATIENCE
    with open(path, 'ab') as file:
        while not (alone := lock(file)) and time.monotonic() < deadline:
            time.sleep(0.1)
        try:
            yield alone
        finally:
            if alone:
                with contextlib.suppress(OSError):  # Windows keeps it while it is open; it is no one's then
                    path.unlink()
