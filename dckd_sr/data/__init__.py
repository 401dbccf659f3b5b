"""Datasets (every ``*_dataset.py`` here registers in BasicSR) and the loaders that feed training and validation."""

from __future__ import annotations

import importlib
import pkgutil
from copy import deepcopy
from typing import Any

import cv2
import torch
from basicsr.data import build_dataset
from torch.utils.data import DataLoader

from dckd_sr.data import pair_sizes, pairs, repairs, teacher_cache
from dckd_sr.data.sampler import Stage, TrainSampler
from dckd_sr.data.seeded import SeededDataset
from dckd_sr.errors import UserError, reason
from dckd_sr.ops.seeding import seed_of
from dckd_sr.processes import init_worker

for _module in pkgutil.iter_modules(__path__):
    if _module.name.endswith('_dataset'):
        importlib.import_module(f'{__name__}.{_module.name}')

repairs.apply()


def build_train_loader(
    opt: dict[str, Any], seed: int, world_size: int = 1, rank: int = 0, start_iteration: int = 0
) -> tuple[DataLoader, TrainSampler]:
    """The endless training loader, at the sample that follows ``start_iteration`` iterations.

    Works with every map-style dataset of BasicSR. What a sample contains depends on (seed, position) only: not on the
    number of workers, nor on resuming. Batches have batch_size_per_gpu samples, whatever num_gpu says, or follow the
    progressive schedule of datasets.train (mini_batch_sizes, gt_sizes, iters: Restormer's names); an iteration has
    train.accum_iter of them.

    Args:
        opt: the whole option dict, not changed; reads datasets.train, train.accum_iter and scale.
        seed: the run's manual_seed.
        world_size, rank: number of processes and which one this is.

    Returns:
        The loader (it never ends), and its sampler, which has ``iterations_per_epoch``.

    Raises:
        UserError: wrong options or files. Iterating raises it too, also for errors inside a worker.
    """
    options = _dataset_options(opt, 'train', 'train')
    batch_size = _number(options, 'batch_size_per_gpu', 1, least=1)
    workers = _number(options, 'num_worker_per_gpu', 0)
    queue = _number(options, 'num_prefetch_queue', 1, least=1)
    ratio = options.get('dataset_enlarge_ratio', 1)
    if not isinstance(ratio, (int, float)) or ratio <= 0:
        raise UserError(f'datasets.train.dataset_enlarge_ratio is a positive number, got {ratio!r}')
    if options.get('prefetch_mode') not in (None, 'cpu', 'cuda'):
        raise UserError(f'datasets.train.prefetch_mode is cpu, cuda or empty, got {options["prefetch_mode"]!r}')

    if options.get('check_images') and rank == 0:
        # Before all images are kept in memory, where the first unfit one would end it.
        pairs.check_dataset(_build('train', {**deepcopy(options), 'cache': None}), options)
    dataset = _build('train', options)
    if len(dataset) == 0:
        raise UserError(f'datasets.train ({options["name"]}) has no images')
    if options.get('teacher_cache'):
        teacher_cache.check(opt, dataset)
    stages = _stages(options, batch_size)
    train = opt.get('train') or {}
    mixes = bool((train.get('mixing_augs') or {}).get('mixup'))
    accum_iter = train.get('accum_iter', 1)
    sampler = TrainSampler(len(dataset), stages, world_size, rank, seed, start_iteration, ratio, accum_iter, mixes)
    # BasicSR's CPU prefetch thread hangs on an error and would only add to what the workers prefetch already.
    loader = Loader(
        SeededDataset(dataset, seed),
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=_pin_memory(options, default=True),
        persistent_workers=workers > 0,
        prefetch_factor=max(2, queue) if workers else None,
        worker_init_fn=_init_worker,
        generator=_own_generator(seed),
    )
    return loader, sampler


def build_val_loaders(opt: dict[str, Any]) -> list[DataLoader]:
    """One loader of single images, in order, per entry of ``datasets`` named val* or test*.

    Raises:
        UserError: wrong options or files.
    """
    names = [name for name in opt['datasets'] if name.split('_')[0] in ('val', 'test')]
    return [build_val_loader(opt, name) for name in names]


def build_val_loader(opt: dict[str, Any], name: str) -> DataLoader:
    """The loader of ``datasets.<name>``, one image at a time; its dataset has BasicSR's ``opt``.

    Of several processes, each gets its share of the images.

    Works without processes unless the dataset's num_worker_per_gpu asks for some.

    Raises:
        UserError: wrong options or files, or pairs whose sizes do not belong together (headers are looked at here).
            Iterating raises it too.
    """
    options = _dataset_options(opt, name, name.split('_')[0])
    workers = _number(options, 'num_worker_per_gpu', 0)
    seed = opt.get('manual_seed') or 0
    dataset = SeededDataset(_build(name, options), seed)
    pair_sizes.check_headers(dataset)
    return Loader(
        dataset,
        batch_size=1,
        sampler=range(opt.get('rank', 0), len(dataset), opt.get('world_size', 1)),
        num_workers=workers,
        pin_memory=_pin_memory(options, default=False),
        persistent_workers=bool(options.get('persistent_workers')) and workers > 0,
        worker_init_fn=_init_worker,
        generator=_own_generator(seed),
    )


class Loader(DataLoader):
    """A DataLoader that fails in words: dead workers (out of memory, killed) are a UserError too."""

    def __iter__(self):
        try:
            yield from super().__iter__()
        except UserError as error:
            # torch's frames in the traceback form a ring with the error. Collected as a ring, the iterator waits five
            # seconds for every worker; without the traceback it goes at once.
            self._iterator = None
            raise error.with_traceback(None) from None
        except RuntimeError as error:
            if 'DataLoader worker' not in str(error):
                raise
            name = getattr(self.dataset, 'opt', {}).get('name', 'a dataset')
            raise UserError(
                f'a data worker of {name} died, often for lack of memory or shared memory: lower num_worker_per_gpu '
                f'(now {self.num_workers}), 0 loads in the main process. {error}'
            ) from error


def _dataset_options(opt, name, phase):
    options = deepcopy(opt['datasets'][name])
    options.setdefault('name', name)
    options.setdefault('phase', phase)
    if 'scale' in opt:
        options.setdefault('scale', opt['scale'])
    return options


def _build(name, options):
    try:
        return build_dataset(options)
    except UserError as error:
        raise UserError(f'datasets.{name}: {error}') from error
    except KeyError as error:
        # A missing option, or a type that nobody registered; the latter's message is a sentence.
        text = str(error.args[0]) if error.args else ''
        raise UserError(f'datasets.{name}: {text if " " in text else f"the key {text!r} is missing"}') from error
    except Exception as error:
        raise UserError(f'datasets.{name}: cannot build {options.get("type")}: {reason(error)}') from error


def _stages(options, batch_size):
    """The progressive schedule, or one stage of the dataset's own crop."""
    lists = [options.get(key) for key in ('iters', 'mini_batch_sizes', 'gt_sizes')]
    if all(value is None for value in lists):
        return [Stage(1, batch_size)]
    if not all(isinstance(value, list) and len(value) == len(lists[0] or ()) > 0 for value in lists):
        raise UserError('datasets.train: iters, mini_batch_sizes and gt_sizes are lists of one length')
    return [Stage(*numbers) for numbers in zip(*lists)]


def _number(options, key, default, least=0):
    value = options.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f'dataset {options["name"]}: {key} is an integer, at least {least}, got {value!r}')
    return value


def _pin_memory(options, default):
    """Copies from pinned memory do not wait. Training batches are of one size, so that its pages are used again."""
    wanted = default if options.get('pin_memory') is None else options['pin_memory']
    return bool(wanted or options.get('prefetch_mode') == 'cuda') and torch.cuda.is_available()


def _own_generator(seed):
    # Without it, starting an iteration draws from torch's global generator, which belongs to the student.
    return torch.Generator().manual_seed(seed_of(seed, 'loader'))


def _init_worker(worker_id: int):
    cv2.setNumThreads(0)  # workers are the parallelism; OpenCV's threads may also hang after a fork
    init_worker()
