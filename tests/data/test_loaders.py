import gc
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.utils.registry import DATASET_REGISTRY
from torch.utils.data import Dataset

import dckd_sr  # noqa: F401
from dckd_sr.data import Loader, build_train_loader, build_val_loader, build_val_loaders
from dckd_sr.errors import UserError

if 'ThreadsOfOpenCV' not in DATASET_REGISTRY:

    @DATASET_REGISTRY.register()
    class ThreadsOfOpenCV(Dataset):
        """Says how many threads OpenCV has where the sample is loaded; dies where told."""

        def __init__(self, opt):
            self.opt = opt

        def __len__(self):
            return 8

        def __getitem__(self, index):
            if self.opt.get('die'):
                os.kill(os.getpid(), signal.SIGKILL)
            return {'threads': cv2.getNumThreads(), 'pid': os.getpid(), 'draw': random.random()}


@pytest.fixture
def opt(tmp_path):
    """Options as a user's file gives them, before anything is filled in; five images, x2."""
    (tmp_path / 'gt').mkdir(), (tmp_path / 'lq').mkdir()
    rng = np.random.default_rng(0)
    for index in range(5):
        image = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / 'gt' / f'{index}.png'), image)
        cv2.imwrite(str(tmp_path / 'lq' / f'{index}.png'), image[::2, ::2])
    common = {
        'type': 'PairedImageDataset',
        'dataroot_gt': str(tmp_path / 'gt'),
        'dataroot_lq': str(tmp_path / 'lq'),
        'io_backend': {'type': 'disk'},
    }
    train = {**common, 'gt_size': 16, 'use_hflip': True, 'use_rot': True}
    train.update(num_worker_per_gpu=0, batch_size_per_gpu=4, dataset_enlarge_ratio=3, prefetch_mode=None)
    return {
        'scale': 2,
        'num_gpu': 4,
        'manual_seed': 3,
        'datasets': {
            'train': {**train, 'name': 'five'},
            'val': {**common, 'name': 'val five'},
            'val_2': dict(common),
        },
    }


def take(loader, count):
    return list(itertools.islice(loader, count))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for a, b in zip(batches, others):
        assert a['gt_path'] == b['gt_path'] and torch.equal(a['gt'], b['gt']) and torch.equal(a['lq'], b['lq'])


@pytest.mark.parametrize('kind', ['PairedImageDataset', 'SRImageDataset'])
def test_the_data_do_not_depend_on_workers_prefetch_or_resuming(opt, kind):
    train = opt['datasets']['train']
    train['type'] = kind
    loader, sampler = build_train_loader(opt, seed=3)
    reference = take(loader, 6)
    assert sampler.iterations_per_epoch == 4  # ceil(5 * 3 / 4), num_gpu plays no part
    assert reference[0]['lq'].shape == (4, 3, 8, 8) and reference[0]['gt'].shape == (4, 3, 16, 16)
    random.seed(9), torch.manual_seed(9)
    assert_same(take(build_train_loader(opt, 3)[0], 6), reference)
    assert_same(take(build_train_loader(opt, 3, start_iteration=4)[0], 2), reference[4:])
    train.update(num_worker_per_gpu=2, prefetch_mode='cpu', num_prefetch_queue=3, pin_memory=True)
    assert_same(take(build_train_loader(opt, 3)[0], 6), reference)
    patches = {batch['gt'][row].numpy().tobytes() for batch in reference for row in range(4)}
    assert len(patches) > 15  # crops and flips do not repeat from pass to pass
    assert not torch.equal(take(build_train_loader(opt, 4)[0], 1)[0]['gt'], reference[0]['gt'])


def test_two_processes_see_what_one_sees(opt):
    whole = take(build_train_loader(opt, 3)[0], 4)
    opt['datasets']['train']['batch_size_per_gpu'] = 2
    ranks = [take(build_train_loader(opt, 3, world_size=2, rank=rank)[0], 4) for rank in (0, 1)]
    for batch, first, second in zip(whole, *ranks):
        assert torch.equal(batch['gt'], torch.cat([first['gt'], second['gt']]))


def test_a_dataset_smaller_than_the_batch(opt):
    opt['datasets']['train']['batch_size_per_gpu'] = 12
    batches = take(build_train_loader(opt, 3)[0], 3)
    assert all(len(batch['gt']) == 12 for batch in batches)
    assert len(set(batches[0]['gt_path'])) == 5


def test_loaders_leave_options_and_torchs_stream_alone(opt):
    before, stream = repr(opt), torch.get_rng_state()
    opt['datasets']['train']['num_worker_per_gpu'] = 1
    loaders = [build_train_loader(opt, 3)[0], *build_val_loaders(opt)]
    for loader in loaders:
        take(loader, 1)
    opt['datasets']['train']['num_worker_per_gpu'] = 0
    assert repr(opt) == before and torch.equal(torch.get_rng_state(), stream)


def test_validation_loaders(opt):
    opt['datasets']['val'].update(num_worker_per_gpu=1, persistent_workers=True)
    opt['datasets']['val_2'].update(persistent_workers=True)  # without workers: a ValueError in BasicSR
    first, second = build_val_loaders(opt)
    assert first.dataset.opt['name'] == 'val five' and second.dataset.opt['name'] == 'val_2'
    assert len(first) == len(second) == 5
    for _ in range(2):
        assert [os.path.basename(batch['gt_path'][0]) for batch in first] == [f'{n}.png' for n in range(5)]
    assert_same(list(first), list(second))
    assert next(iter(second))['gt'].shape == (1, 3, 24, 24)
    opt['datasets'] = {'test_1': opt['datasets']['val_2']}
    assert len(build_val_loaders(opt)) == 1 and len(build_val_loader(opt, 'test_1')) == 5


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kind', ['PairedImageDataset', 'SRImageDataset'])
def test_a_bad_image_reaches_the_main_process_by_name(opt, tmp_path, workers, kind):
    for name in ('train', 'val'):
        opt['datasets'][name].update(type=kind, num_worker_per_gpu=workers)
    bad = tmp_path / 'lq' / '3.png'
    bad.write_bytes(bad.read_bytes()[:-20])
    for loader in (build_train_loader(opt, 3)[0], build_val_loaders(opt)[0]):
        with pytest.raises(UserError) as caught:
            take(loader, 5)
        message = str(caught.value)
        assert message.endswith(f'truncated file: {bad}') and 'Traceback' not in message


@pytest.mark.parametrize('kind', ['PairedImageDataset', 'SRImageDataset', 'SingleImageDataset'])
def test_one_option_names_all_unfit_training_images_before_the_first(opt, tmp_path, kind):
    train = opt['datasets']['train']
    train.update(type=kind, check_images=True, cache='ram' if kind == 'SRImageDataset' else None)
    build_train_loader(opt, 0)
    (tmp_path / 'lq' / '1.png').write_bytes(b'text')
    cv2.imwrite(str(tmp_path / 'lq' / '4.png'), np.zeros((9, 12, 3), np.uint8))
    content = (tmp_path / 'gt' / '3.png').read_bytes()
    (tmp_path / 'gt' / '3.png').write_bytes(content[: len(content) // 2])
    if kind == 'SingleImageDataset':
        del train['dataroot_gt']
    with pytest.raises(UserError) as caught:
        build_train_loader(opt, 0)
    lines = [line.strip().replace(f'{tmp_path}{os.sep}', '') for line in str(caught.value).splitlines()]
    if kind == 'SingleImageDataset':
        assert lines == ['datasets.train.check_images: unreadable: not an image, or damaged: lq/1.png']
    else:
        assert lines == [
            'datasets.train.check_images: 3 problems',
            'mismatched: sizes do not match at scale 2: gt/4.png is 24x24, lq/4.png is 12x9 (expected 12x12)',
            'unreadable: not an image, or damaged: lq/1.png',
            'unreadable: truncated file: gt/3.png',
        ]
    train['cache'] = None
    build_train_loader(opt, 0, world_size=2, rank=1)  # rank 0 looks for all
    train['check_images'] = False
    build_train_loader(opt, 0)


def test_spawned_workers_load_the_same(opt):
    """Windows and macOS start workers anew; whatever a loader holds must get there."""
    reference = take(build_train_loader(opt, 3)[0], 2)
    opt['datasets']['train']['num_worker_per_gpu'] = 1
    loader, _ = build_train_loader(opt, 3)
    loader.multiprocessing_context = 'spawn'
    assert_same(take(loader, 2), reference)


def test_opencv_has_no_threads_of_its_own_in_workers(opt):
    opt['datasets']['train'].update(type='ThreadsOfOpenCV', num_worker_per_gpu=1)
    (batch,) = take(build_train_loader(opt, 3)[0], 1)
    assert batch['pid'][0] != os.getpid() and set(batch['threads'].tolist()) <= {0, 1}


def test_the_seed_reaches_the_samples(opt):
    opt['datasets']['train'].update(type='ThreadsOfOpenCV')
    draws = [take(build_train_loader(opt, seed)[0], 1)[0]['draw'].tolist() for seed in (3, 4)]
    assert not set(draws[0]) & set(draws[1])


def test_after_an_error_the_workers_end_at_once(opt, tmp_path):
    """torch's error holds its iterator in a ring, whose workers end only when that is collected, after seconds."""
    (tmp_path / 'lq' / '3.png').write_bytes(b'broken')
    opt['datasets']['train'].update(num_worker_per_gpu=2)
    loader, _ = build_train_loader(opt, 3)
    gc.collect()
    others = set(multiprocessing.active_children())
    gc.disable()
    try:
        with pytest.raises(UserError):
            take(loader, 5)
        assert set(multiprocessing.active_children()) <= others
    finally:
        gc.enable()


def test_a_killed_worker_is_an_error_that_helps(opt):
    opt['datasets']['train'].update(type='ThreadsOfOpenCV', num_worker_per_gpu=1, die=True)
    with pytest.raises(UserError, match='five died.*lower num_worker_per_gpu'):
        take(build_train_loader(opt, 3)[0], 1)


def test_other_runtime_errors_pass(opt):
    class Broken(Loader):
        def _get_iterator(self):
            raise RuntimeError('something else')

    with pytest.raises(RuntimeError, match='something else'):
        take(Broken([1, 2]), 1)


@pytest.mark.parametrize(
    'changed, message',
    [
        ({'batch_size_per_gpu': 0}, 'five: batch_size_per_gpu is an integer, at least 1, got 0'),
        ({'num_worker_per_gpu': -1}, 'num_worker_per_gpu'),
        ({'num_worker_per_gpu': True}, 'num_worker_per_gpu'),
        ({'num_prefetch_queue': 0}, 'num_prefetch_queue'),
        ({'dataset_enlarge_ratio': 0}, 'dataset_enlarge_ratio'),
        ({'prefetch_mode': 'gpu'}, 'prefetch_mode is cpu, cuda or empty'),
        ({'type': 'PairedImageDatset'}, 'datasets.train: .*PairedImageDatset'),
        ({'dataroot_lq': 'nowhere'}, 'datasets.train: folder not found: nowhere'),
        ({'dataroot_gt': None}, 'datasets.train: '),
    ],
)
def test_wrong_options(opt, changed, message):
    opt['datasets']['train'].update(changed)
    with pytest.raises(UserError, match=message):
        build_train_loader(opt, 3)


def test_a_missing_key_is_named(opt):
    del opt['datasets']['train']['dataroot_lq']
    with pytest.raises(UserError, match="datasets.train: the key 'dataroot_lq' is missing"):
        build_train_loader(opt, 3)


KILLED = """
import multiprocessing, os, signal, sys, time
import yaml
from dckd_sr.data import build_train_loader

if __name__ == '__main__':
    loader, _ = build_train_loader(yaml.safe_load(open('opt.yml')), seed=3)
    batches = iter(loader)
    next(batches), next(batches)  # one of each worker: both have begun
    workers = [process.pid for process in multiprocessing.active_children()]
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(worker, number)
    time.sleep(0.3)
    next(batches)
    print(*workers, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='reads /proc')
def test_workers_leave_group_signals_to_the_main_process_and_end_with_it(opt):
    """The main process is killed as by the kernel: no worker may stay behind."""
    opt['datasets']['train']['num_worker_per_gpu'] = 2
    Path('opt.yml').write_text(yaml.safe_dump(opt))
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).resolve().parents[2])}
    # Not captured: workers that stayed behind would hold the pipe open.
    with open('printed', 'wb') as printed:
        result = subprocess.run([sys.executable, '-c', KILLED], stdout=printed, env=environment, timeout=120)
    workers = Path('printed').read_text().split()
    assert result.returncode == -signal.SIGKILL and len(workers) == 2
    deadline = time.monotonic() + 20
    while any(os.path.exists(f'/proc/{pid}/stat') for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f'/proc/{pid}/stat') for pid in workers)


@pytest.mark.parametrize('there', [True, False])
def test_pinned_memory_is_for_training_on_gpus(opt, monkeypatch, there):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: there)
    data = opt['datasets']

    def pinned():
        return build_train_loader(opt, 3)[0].pin_memory, build_val_loader(opt, 'val').pin_memory

    assert pinned() == (there, False)
    data['train']['pin_memory'], data['val']['pin_memory'] = False, True
    assert pinned() == (False, there)
    data['train']['prefetch_mode'] = 'cuda'
    assert pinned() == (there, there)
