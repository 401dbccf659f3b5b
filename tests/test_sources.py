"""What trainings and scores are made from: equal content is equal wherever it lies, and nothing else is."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from small_run import dckd_run, write

from dckd_sr import options, sources, train


@pytest.fixture
def opt(tmp_path):
    return dckd_run(tmp_path)


def made(opt, *overrides):
    return sources.of_training(options.load(write(opt), overrides)[0])


def test_contents_are_the_files_that_are_named(opt):
    found = made(opt)
    keys = {'path.pretrain_network_t', 'datasets.train.dataroot_gt', 'datasets.train.dataroot_lq'}
    assert set(found['contents']) == keys
    assert found['options']['train.optim_g.lr'] == 1e-3 and found['options']['train.cl_opt.weights.1'] == 1.0
    assert json.loads(json.dumps(found)) == found
    assert not any(key.startswith(('val', 'logger', 'name', 'datasets.val')) for key in found['options'])


@pytest.mark.parametrize(
    'change, said',
    [
        (lambda: shutil.copy('HR/0.png', 'HR/4.png'), 'datasets.train.dataroot_gt = HR has other files in it now'),
        (lambda: os.rename('LR/0.png', 'LR/9.png'), 'datasets.train.dataroot_lq = LR has other files in it now'),
        (lambda: shutil.copy('LR/0.png', 'LR/1.png'), 'datasets.train.dataroot_lq = LR has other files in it now'),
        (
            lambda: Path('teacher.pth').write_bytes(b'x' + Path('teacher.pth').read_bytes()),
            'path.pretrain_network_t = teacher.pth has another content now',
        ),
        (lambda: os.unlink('teacher.pth') or shutil.copy('LR/0.png', 'teacher.pth'), 'has another content now'),
        (lambda: [os.utime(path) for path in Path('HR').iterdir()], None),
        (lambda: Path('HR/.prepared.jsonl').write_text('x'), None),
    ],
)
def test_a_change_of_content_is_told(opt, change, said):
    before = made(opt)
    change()
    found = sources.difference(before, made(opt))
    assert found == said if said is None else said in found


def test_folders_that_are_not_read_whole_go_by_their_dates(opt, monkeypatch):
    monkeypatch.setattr(sources, 'WHOLE', 10)
    before = made(opt)
    os.utime('HR/0.png', (1, 1))
    assert 'dataroot_gt = HR' in sources.difference(before, made(opt))


@pytest.mark.parametrize(
    'override, said',
    [
        ('train:optim_g:lr=0.01', 'train.optim_g.lr: 0.001 -> 0.01'),
        ('train:cl_opt:weights=[0.5,0.5]', 'train.cl_opt.weights.1: 1.0 -> 0.5'),
        ('path:pretrain_network_t=other.pth', None),
        ('name=another', None),
        ('val:val_freq=1', None),
        ('logger:print_freq=3', None),
        ('datasets:val_1:dataroot_lq=HR', None),
        ('datasets:train:num_worker_per_gpu=2', None),
        ('datasets:train:batch_size_per_gpu=1', 'datasets.train.batch_size_per_gpu: 2 -> 1'),
        ('datasets:train:dataroot_lq=HR', 'datasets.train.dataroot_lq = HR has other files in it now'),
    ],
)
def test_a_change_of_options_is_told_where_weights_depend_on_it(opt, override, said):
    before = made(opt)
    shutil.copy('teacher.pth', 'other.pth')
    assert sources.difference(before, made(opt, override)) == said


@pytest.mark.parametrize('record', [{}, {'options': 3, 'contents': 4}, {'options': {}, 'contents': {'a': 1}}, []])
def test_a_damaged_record_differs(opt, record):
    assert sources.difference(record, made(opt))


def test_a_training_records_it_and_its_end(opt):
    opt['train']['total_iter'] = 2
    assert train.main(['-opt', write(opt)]) == 0
    folder = Path('experiments/run')
    record = sources.read(folder)
    assert sources.lacking(folder, made(opt)) is None and set(record['weights']) == {'net_g_latest.pth'}
    assert sources.final_weights(folder) == folder / 'models/net_g_latest.pth'
    opt['train']['total_iter'] = 3
    assert 'train.total_iter: 2 -> 3' in sources.lacking(folder, made(opt))
    assert train.main(['-opt', write(opt), '--auto_resume']) == 0
    assert sources.lacking(folder, made(opt)) == 'it was continued with other options: train.total_iter: 2 -> 3'
    with open(folder / 'models/net_g_latest.pth', 'ab') as file:
        file.write(b'x')
    assert sources.final_weights(folder) is None
    (folder / sources.RECORD).write_text('{')
    assert sources.lacking(folder, made(opt)) == 'there is no record of what it was made from'


@pytest.mark.parametrize('there, num_gpu, same', [(False, 1, True), (True, 0, True), (True, 1, False)])
def test_tf32_counts_where_there_is_some(there, num_gpu, same, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: there)
    opt = {'num_gpu': num_gpu, 'path': {}, 'datasets': {}}
    former, now = (sources.describe({**opt, 'use_tf32': value}, (), {}) for value in (False, None))
    assert (sources.difference(former, now) is None) == same
