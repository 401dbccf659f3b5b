"""BasicSR's logger with handlers that can be set at any time, and a stream that does not tear a progress bar.

basicsr/utils/logger.py:166 fixes the handlers at the first call of get_root_logger: one early call loses the file.
"""

import contextlib
import logging
import logging.handlers

from basicsr.utils import logger as basicsr_logger
from basicsr.utils.dist_util import get_dist_info
from tqdm import tqdm

from dckd_sr.errors import UserError, reason

_FORMAT = logging.Formatter('%(asctime)s %(levelname)s: %(message)s')


FILE_ONLY = {'file_only': True}  # as `extra` of a log call: a line too long for the terminal


class _Stream(logging.Handler):
    def emit(self, record):
        tqdm.write(self.format(record))


def start(log_file=None, bar=False):
    """Give BasicSR's logger fresh handlers: the terminal and, where given, a file.

    Args:
        log_file: path of the log file; None keeps the lines for the file of a later call.
        bar: True where a progress bar shows the losses; the lines that repeat them then go to the file alone.

    Returns:
        the logger; ranks other than 0 stay silent below errors.
    """
    logger = logging.getLogger('basicsr')
    earlier = [h for h in logger.handlers if isinstance(h, logging.handlers.MemoryHandler)]
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        if handler not in earlier:
            handler.close()
    stream = _Stream()
    stream.addFilter(lambda record: not getattr(record, 'file_only', False))
    if bar:
        # MessageLogger logs from its __call__.
        stream.addFilter(lambda record: record.funcName != '__call__')
    rank = get_dist_info()[0]
    if log_file is None:
        file = logging.handlers.MemoryHandler(10000, logging.CRITICAL + 1)  # kept until there is a file
    elif rank == 0:
        file = logging.FileHandler(log_file, 'a', encoding='utf-8')  # of the same second: resumed at once
    else:
        file = logging.NullHandler()
    for handler in (stream, file):
        handler.setFormatter(_FORMAT)
        logger.addHandler(handler)
    for handler in earlier:
        if log_file is not None:
            handler.setTarget(file)  # closing flushes into it; without a file, they were an earlier run's
        handler.close()
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logger.propagate = False
    basicsr_logger.initialized_logger['basicsr'] = True
    return logger


@contextlib.contextmanager
def explained(what):
    """Around calls that networks, losses and metrics may refuse for reasons that no check of options sees.

    Args:
        what: what is being done, for the message.

    Raises:
        UserError: whatever else was raised inside, in one line; the log file gets the traceback.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        logging.getLogger('basicsr').error(f'{what} failed.', exc_info=True, extra=FILE_ONLY)
        raise UserError(f'{what}: {reason(error)}') from error
