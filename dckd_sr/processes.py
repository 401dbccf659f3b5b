"""Several processes, by torch.distributed: joining them, agreeing between them, and the signals that end them."""

import contextlib
import ctypes
import gc
import json
import multiprocessing.connection
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import torch

from dckd_sr.errors import UserError, reason

_NEEDED = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
_SLURM = (('RANK', 'SLURM_PROCID'), ('WORLD_SIZE', 'SLURM_NTASKS'), ('LOCAL_RANK', 'SLURM_LOCALID'))
_host_group = None
_alarm = None


def start(opt, launcher):
    """Join the process group of torchrun or SLURM (nccl where there is a GPU, gloo elsewhere); sets rank and size.

    Raises:
        UserError: the launcher's variables are missing, or the others cannot be reached.
    """
    global _host_group, _alarm
    if launcher == 'none':
        return
    if launcher == 'slurm':
        _read_slurm(opt)
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise UserError(
            f'--launcher {launcher}: {", ".join(missing)} not set; '
            'start with torchrun --nproc_per_node=N dckd_sr/train.py -opt ... --launcher pytorch'
        )
    use_cuda = torch.cuda.is_available() and opt['num_gpu'] != 0
    if use_cuda:
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']) % torch.cuda.device_count())
    address = f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]}'
    try:
        torch.distributed.init_process_group('nccl' if use_cuda else 'gloo', timeout=timedelta(minutes=10))
        _host_group = torch.distributed.new_group(backend='gloo') if use_cuda else None
        places = _gpus() if use_cuda else []
        _alarm = _Alarm()
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [''])[0]
        raise UserError(
            f'--launcher {launcher}: cannot join the other processes at {address}: {reason}; is the port in use? '
            'torchrun --master_port and dist_params.port set another'
        ) from error
    opt['rank'], opt['world_size'] = torch.distributed.get_rank(), torch.distributed.get_world_size()
    _refuse_shared_gpus(places, launcher)


def _gpus():
    """(host, GPU) of every rank, whatever number the GPU has for its process."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    place = socket.gethostname(), str(getattr(properties, 'uuid', os.getpid()))
    places = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(places, place, group=_host_group)
    return places


def _refuse_shared_gpus(places, launcher):
    host, gpu = next((place for place in places if places.count(place) > 1), (None, None))
    if host is not None:
        raise UserError(
            f'--launcher {launcher}: {places.count((host, gpu))} processes on {host} have the same GPU, which nccl '
            f'refuses; start {len({place for place in places if place[0] == host})} there (torchrun --nproc_per_node), '
            'or show each process one of its own by CUDA_VISIBLE_DEVICES'
        )


def keep_freed_memory():
    """Have the C library keep the memory of large tensors for the next ones, for work on the CPU.

    glibc hands blocks over 32 MB back to the system at once, and every new one is filled with zeros, page by page: a
    quarter of the time of a VQGAN's forward pass (docs/performance.md). Elsewhere nothing happens.
    """
    if platform.libc_ver()[0] == 'glibc':
        mallopt, (trim_threshold, top_pad, mmap_max) = ctypes.CDLL(None).mallopt, (-1, -2, -4)  # names of malloc.h
        for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**26)):
            mallopt(parameter, value)


def _read_slurm(opt):
    """SLURM's variables under torch's names; the first host of the job step is the address."""
    for ours, theirs in _SLURM:
        if os.environ.get(theirs):
            os.environ.setdefault(ours, os.environ[theirs])
    os.environ.setdefault('MASTER_PORT', str((opt.get('dist_params') or {}).get('port', 29500)))
    hosts = os.environ.get('SLURM_STEP_NODELIST')
    if hosts and 'MASTER_ADDR' not in os.environ and shutil.which('scontrol'):
        names = subprocess.run(['scontrol', 'show', 'hostnames', hosts], capture_output=True, text=True).stdout.split()
        os.environ.update({'MASTER_ADDR': names[0]} if names else {})


def stop():
    """Leave the process group, if there is one."""
    global _host_group, _alarm
    _host_group, alarm, _alarm = None, _alarm, None
    if alarm is not None:
        alarm.over.set()
        if alarm.raised and torch.distributed.get_backend() == 'nccl':
            return  # it would wait for those that have gone
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # models that hold the group: its threads may not outlive Python, which would abort
        torch.distributed.destroy_process_group()


def largest(value, opt):
    """The largest of all ranks' integers, without a look at the GPU."""
    if opt['world_size'] == 1:
        return value
    number = torch.tensor(value)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=_host_group)
    return int(number)


def share(value, opt):
    """Rank 0's value (anything that pickles) on all ranks."""
    if opt['world_size'] == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, 0, group=_host_group)
    return values[0]


class _Alarm:
    """Tells the other ranks of an error on one, whatever they are doing, and ends this one when it is told.

    A rank that waits in a collective for one that has failed would wait for minutes, and then say something else.
    """

    LISTEN, WAIT = 0.5, 10  # seconds between two looks; for the others to have heard

    def __init__(self):
        attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        self.key, self.heard = f'dckd_sr/error/{attempt}', f'dckd_sr/heard/{attempt}'
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        # A connection of its own to the store of the process group: that one may be waiting for something.
        address = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), self.size, False
        self.store = torch.distributed.TCPStore(*address, timeout=timedelta(minutes=1), wait_for_workers=False)
        self.raised, self.over = False, threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        with contextlib.suppress(RuntimeError):  # rank 0, which may keep the store, has ended
            while not self.over.wait(self.LISTEN):
                if self.store.check([self.key]) and not self.over.is_set():
                    rank, code, text = json.loads(self.store.get(self.key))
                    print(f'error: rank {rank}: {text}', file=sys.stderr, flush=True)
                    self.store.add(self.heard, 1)
                    os._exit(code)

    def tell(self, code, text):
        """End the other ranks with an exit code and a message; the first one that tells is heard."""
        self.raised, deadline = True, time.monotonic() + self.WAIT
        self.over.set()
        with contextlib.suppress(RuntimeError):
            ours = json.dumps([self.rank, code, text])
            if self.store.compare_set(self.key, '', ours).decode() != ours:
                self.store.add(self.heard, 1)  # this one ends, too, with an error of its own
                return
            while self.store.add(self.heard, 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(0.05)


@contextlib.contextmanager
def together():
    """What ends one rank in here ends all of them, at once and with its error."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError):
            tell(2, str(error))
        elif isinstance(error, KeyboardInterrupt):
            tell(130, 'interrupted')
        else:
            tell(1, reason(error))
        raise


def tell(code, text):
    """End the other ranks, if there are any, with an exit code and a message."""
    if _alarm is not None:
        _alarm.tell(code, text)


class Stopped(BaseException):
    """A signal came while nothing was being trained."""


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 (SLURM's warning before it takes the machine) end the run after the present step.

    Attributes:
        received: the number of the first signal, 0 if there was none.
        interruptible: the training loop sets it where it may be left at any point; `Stopped` is raised there.
    """

    def __init__(self):
        self.received, self.interruptible = 0, False
        names = ('SIGINT', 'SIGTERM', 'SIGUSR1')
        self._handled = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self._former = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in self._handled}
        return self

    def __exit__(self, *exc):
        for number, former in self._former.items():
            signal.signal(number, former)

    def _handle(self, number, frame):
        self.received = self.received or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one leaves at once
        if self.interruptible:
            self.interruptible = False
            raise Stopped

    @property
    def exit_code(self):
        """130 after SIGINT, 143 after SIGTERM, 0 after SIGUSR1, which is no failure of the run."""
        return {signal.SIGINT: 130, signal.SIGTERM: 143}.get(self.received, 0)


def init_worker():
    """In a loader worker: signals to the whole group are the main process's to answer, which then ends its workers.

    One that is stuck, in a lock that a killed process held, goes half a minute after SIGTERM; a worker whose main
    process was killed goes at once.
    """
    for name in ('SIGINT', 'SIGUSR1'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, 'setitimer'):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.setitimer(signal.ITIMER_REAL, 30))
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Wait for the main process of a worker to end, and end with it: nobody would give it work again, or stop it."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
