"""BasicSR's logger with handlers that can be set at any time, and a stream that does not tear a progress bar.

basicsr/utils/logger.py:166 fixes the handlers at the first call of get_root_logger: one early call loses the file.
"""

import contextlib
import json
import logging
import logging.handlers
import platform
import re

import basicsr
import numpy as np
import torch
import torchvision
from basicsr.utils import logger as basicsr_logger
from basicsr.utils.dist_util import get_dist_info
from tqdm import tqdm

from dckd_sr import checkpoint
from dckd_sr.errors import UserError, out_of_memory, reason

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


class Metrics:
    """``metrics.jsonl``: what a log line says and what would clutter it, an object a line.

    Args:
        path: the file; None (ranks other than 0) writes nothing.
        start: the iteration that the run goes on from; what an earlier process wrote after it goes.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path, start=0):
        self.path = path
        if path is not None and path.exists():
            kept = [json.dumps(row) + '\n' for row in read_metrics(path) if row['iter'] <= start]
            checkpoint.write(''.join(kept).encode(), path)

    def write_scores(self, iteration, name, scores):
        """Append the scores of a validation: name of the set, metric -> value."""
        scores = {metric: float(v) for metric, v in scores.items() if isinstance(v, (float, int, np.number))}
        if scores:
            self.write({'iter': iteration, 'validation': {name: scores}})

    def write(self, row):
        """Append a dict of JSON values, with ``iter`` among them; numbers that are not finite become null."""
        if self.path is None:
            return
        line = json.dumps(json.loads(json.dumps(row), parse_constant=lambda name: None))
        try:
            with open(self.path, 'a', encoding='utf-8') as file:
                file.write(line + '\n')
        except OSError as error:
            logging.getLogger('basicsr').warning(f'cannot write {self.path}: {error.strerror}')


def read_metrics(path):
    """The objects of a ``metrics.jsonl``, [] where there is none.

    Lines that a killed process left unfinished are passed over.
    """
    rows = []
    if not path.is_file():
        return rows
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get('iter'), int):
                rows.append(row)
    return rows


def versions():
    """Package -> version, of what a training's numbers depend on."""
    import dckd_sr  # which imports this module

    return {
        'Python': platform.python_version(),
        'PyTorch': torch.__version__,
        'TorchVision': torchvision.__version__,
        'BasicSR': basicsr.__version__,
        'dckd_sr': dckd_sr.__version__,
    }


@contextlib.contextmanager
def explained(what, opt=None):
    """Around calls that networks, losses and metrics may refuse for reasons that no check of options sees.

    Args:
        what: what is being done, for the message.
        opt: the options of a training, which may say what would need less memory.

    Raises:
        UserError: whatever else was raised inside, in one line; the log file gets the traceback.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        logging.getLogger('basicsr').error(f'{what} failed.', exc_info=True, extra=FILE_ONLY)
        text = reason(error)
        if opt is not None and out_of_memory(error):
            # torch goes on with what every process and its own caches hold.
            text = re.split(r'\.? (?=Process \d|Including non-|Of the allocated)', text)[0].rstrip('.')
            text += f'; less is needed with {" or ".join(less_memory(opt))}'
        raise UserError(f'{what}: {text}') from error


def less_memory(opt):
    """Keys that would make a training step smaller, as far as the options do not set them; first what costs least."""
    train, data = opt['train'], opt['datasets']['train']
    if train.get('cl_opt') and train.get('negatives_micro_batch') != 1:
        yield 'train.negatives_micro_batch: 1'
    if not opt.get('use_checkpoint'):
        yield 'use_checkpoint: true'
    if not opt.get('use_amp'):
        yield 'use_amp: true and amp_bf16: true'
    if data.get('mini_batch_sizes') or data.get('gt_sizes'):
        yield 'smaller datasets.train.mini_batch_sizes and gt_sizes'
        return
    size, count = data.get('batch_size_per_gpu') or 1, train.get('accum_iter') or 1
    if size > 1:
        yield f'datasets.train.batch_size_per_gpu: {-(-size // 2)} with train.accum_iter: {2 * count}'
    yield f'a datasets.train.gt_size below {data["gt_size"]}' if data.get('gt_size') else 'a datasets.train.gt_size'
