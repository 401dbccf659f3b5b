"""Per-sample seeding and readable errors around any BasicSR dataset."""

from __future__ import annotations

import os
import random

import numpy as np
import torch
from torch.utils.data import Dataset

from dckd_sr.data.files import check_image_file
from dckd_sr.errors import UserError, reason
from dckd_sr.ops.seeding import seed_of


class DataError(UserError):
    """A sample that cannot be read.

    torch's DataLoader rebuilds an exception of a worker from the text of its traceback; the message alone is kept.
    """

    def __init__(self, message: str):
        mark = f'{__name__}.DataError: '
        super().__init__(message.rsplit(mark, 1)[-1].rstrip('\n') if mark in message else message)


class SeededDataset(Dataset):
    """Draws of sample ``position`` come from (seed, 'data', position) alone, whoever loads it and whenever.

    BasicSR's worker seeds repeat every epoch and depend on the number of workers. Here random, numpy and torch (CPU)
    are seeded before each sample and put back after it; numpy is left alone for a class that says ``draws_from_numpy =
    False``. Other attributes, such as ``opt``, are the wrapped dataset's.

    Args:
        dataset: any map-style dataset.
        seed: the run's manual_seed.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        # Saving numpy's state takes longer than a patch from memory. A derived class may draw from it: not inherited.
        self._numpy = vars(type(dataset)).get('draws_from_numpy', True)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name):
        if name == 'dataset' or name.startswith('__'):  # while unpickling there is no dataset yet
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, key):
        """The sample at key = (position, index), and gt_size, and own; an integer key is position and index.

        A gt_size replaces the dataset's own crop from here on (progressive training). ``own`` is put into the sample:
        whether it belongs to the batch, or is there to be mixed with one that does.

        Raises:
            DataError: the dataset failed; the message names the files of that index.
        """
        position, index, *rest = key if isinstance(key, tuple) else (key, key)
        gt_size, own = rest[:1], {'own': rest[1]} if len(rest) > 1 else {}
        if gt_size and gt_size[0] is not None:
            self.dataset.opt['gt_size'] = self.dataset.gt_size = gt_size[0]  # BasicSR reads the former, ours the latter
        before = random.getstate(), np.random.get_state() if self._numpy else None, torch.get_rng_state()
        seed = seed_of(self.seed, 'data', position)
        random.seed(seed)
        if self._numpy:
            np.random.seed(seed & 0xFFFFFFFF)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA as well
        try:
            return {**self.dataset[index], **own} if own else self.dataset[index]
        except UserError as error:
            raise DataError(str(error)) from error
        except Exception as error:
            raise DataError(self._explain(index, error)) from error
        finally:
            random.setstate(before[0])
            if self._numpy:
                np.random.set_state(before[1])
            torch.set_rng_state(before[2])

    def _explain(self, index, error):
        name = getattr(self.dataset, 'opt', {}).get('name', type(self.dataset).__name__)
        paths = _paths_of(self.dataset, index)
        for path in paths:
            problem = check_image_file(path) if os.path.splitext(path)[1] else None
            if problem:
                return f'dataset {name}: {problem}'
        where = ', '.join(paths) if paths else f'sample {index}'
        return f'dataset {name}: cannot load {where}: {reason(error)}'


def _paths_of(dataset, index):
    """The files of one sample: BasicSR keeps ``paths[index]`` as a string or as {'lq_path': ..., 'gt_path': ...}."""
    try:
        entry = dataset.paths[index]
    except (AttributeError, LookupError, TypeError):
        return []
    values = entry.values() if isinstance(entry, dict) else [entry]
    return [str(value) for value in values]
