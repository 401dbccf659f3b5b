import pickle
import random

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from dckd_sr.data.seeded import DataError, SeededDataset
from dckd_sr.errors import UserError


class Draws(Dataset):
    opt = {'name': 'draws'}

    def __init__(self, paths=()):
        self.paths = list(paths)

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if self.paths:
            raise AttributeError("'NoneType' object has no attribute 'astype'")
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_sample_depends_on_seed_and_position_only():
    data = SeededDataset(Draws(), seed=4)
    first = data[7, 2]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert data[8, 2][1:] != first[1:] and data[7, 2] == first
    assert data[7, 3][1:] == first[1:] and data[7, 3][0] == 3
    assert all(a != b for a, b in zip(SeededDataset(Draws(), seed=5)[7, 2][1:], first[1:]))
    assert data[3] == data[3, 3] and len(data) == 5


def test_the_callers_streams_go_on_undisturbed():
    def streams():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = streams(), streams()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = streams()
    SeededDataset(Draws(), 0)[0, 0]
    with pytest.raises(UserError):
        SeededDataset(Draws(['a.png']), 0)[0, 0]
    assert (first, streams()) == expected


def test_pickles_and_shows_the_datasets_attributes():
    data = pickle.loads(pickle.dumps(SeededDataset(Draws(), 4)))
    assert data[7, 2] == SeededDataset(Draws(), 4)[7, 2] and data.opt == {'name': 'draws'}
    with pytest.raises(AttributeError):
        data.nothing_of_this_name  # noqa: B018
    with pytest.raises(AttributeError):  # asked before unpickling has filled it in: no endless recursion
        object.__new__(SeededDataset).dataset  # noqa: B018


def test_errors_name_the_file(tmp_path):
    good, bad = str(tmp_path / 'good.png'), str(tmp_path / 'bad.png')
    cv2.imwrite(good, np.zeros((4, 4, 3), np.uint8))
    (tmp_path / 'bad.png').write_bytes(b'no image')

    def message(paths):
        with pytest.raises(UserError) as caught:
            SeededDataset(Draws(paths), 0)[0, 0]
        return str(caught.value)

    # Where the files tell what is wrong, only the broken one is named; else both, with the error itself.
    assert message([{'lq_path': good, 'gt_path': bad}]) == f'dataset draws: not an image, or damaged: {bad}'
    assert message([str(tmp_path / 'none.png')]).endswith('none.png: No such file or directory')
    both = message([{'lq_path': good, 'gt_path': good}])
    assert both.startswith(f'dataset draws: cannot load {good}, {good}: AttributeError: ') and 'astype' in both


def test_message_survives_a_dataloader_worker():
    """torch hands the constructor a text with the worker's whole traceback; several lines stay together."""
    text = 'first line\nsecond line'
    wrapped = f'Caught DataError in DataLoader worker process 0.\nOriginal Traceback\n  x\n{__name__}: a\n'
    wrapped += f'dckd_sr.data.seeded.DataError: {text}\n'
    assert str(DataError(wrapped)) == text and str(DataError(text)) == text
    assert str(pickle.loads(pickle.dumps(DataError(text)))) == text


def test_numpy_is_left_alone_only_for_a_class_that_says_so():
    """A class derived from one that does not draw from numpy may draw from it."""

    class Plain(Dataset):
        draws_from_numpy = False

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return random.random(), np.random.random_sample(), torch.rand(()).item()

    class Derived(Plain):
        pass

    def draws(kind, seed):
        np.random.seed(seed)
        return SeededDataset(kind(), 5)[(0, 0)], np.random.random_sample()

    np.random.seed(1)
    first, second = np.random.random_sample(2)
    seeded, after = draws(Derived, 1)
    assert draws(Derived, 2)[0] == seeded and after == first
    plain, after = draws(Plain, 1)
    assert plain[1] == first and after == second and (plain[0], plain[2]) == (seeded[0], seeded[2])
