"""Jobs on files: every result arrives, killed workers are said, records survive a power cut."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from dckd_sr.data import jobs
from dckd_sr.errors import UserError


def square(number):
    return number * number


def fail_at_three(number):
    if number == 3:
        raise UserError('three')
    return number


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize('workers', [1, 2])
def test_run(workers):
    assert sorted(jobs.run(square, range(20), workers, 'x')) == [n * n for n in range(20)]
    assert list(jobs.run(square, [], workers, 'x')) == []
    with pytest.raises(UserError, match='three'):
        list(jobs.run(fail_at_three, range(20), workers, 'x'))


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='signals')
def test_a_killed_worker_is_said():
    with pytest.raises(UserError, match='killed.*--workers'):
        list(jobs.run(die, range(4), 2, 'x'))


def note_process(number):
    Path(f'process{os.getpid()}').touch()
    time.sleep(0.02)


def run_for_long():
    list(jobs.run(note_process, range(10**6), 2, 'x'))


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='signals')
def test_workers_end_with_a_killed_main_process(tmp_path):
    main = multiprocessing.get_context('fork').Process(target=run_for_long)
    main.start()
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.005)
    main.kill()
    main.join()
    workers = [int(path.name[len('process') :]) for path in tmp_path.iterdir()]
    deadline = time.monotonic() + 20
    while any(is_running(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    left = [worker for worker in workers if is_running(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f'/proc/{process}/stat')
    return not status.exists() or status.read_text().rsplit(')', 1)[1].split()[0] != 'Z'


def test_record_survives_a_power_cut(tmp_path):
    Path('source').write_text('a')
    Path('out').mkdir()
    Path('out/a').write_text('made')
    record, stamp = jobs.Record('out'), jobs.stamp('source', 4)
    record.add('a', stamp, ['out/a'])
    record.add('b', stamp, ['out/b'])
    with open('out/.prepared.jsonl', 'a') as file:
        file.write('\n{"job": "c", "sta')
    record = jobs.Record('out')
    assert record.is_done('a', stamp) and record.files('a') == {os.path.join('out', 'a')}
    assert not record.is_done('b', stamp), 'its file is gone'
    assert not record.is_done('c', stamp)
    record.add('d', stamp, ['out/a'])
    assert jobs.Record('out').is_done('d', stamp)
    Path('out/a').write_text('another')
    assert not record.is_done('a', stamp) and record.files('a') == set(), 'somebody else wrote it: it is not replaced'
    Path('out/a').write_text('made')
    assert not record.is_done('a', jobs.stamp('source', 2))
    os.utime('source', ns=(1, 1))
    assert not record.is_done('a', jobs.stamp('source', 4))


def test_a_temporary_link_of_a_killed_run_is_not_written_through(tmp_path):
    Path('source.png').write_bytes(b'mine')
    os.link('source.png', '.out.png.tmp')
    jobs.write_png(np.zeros((2, 2, 3), np.uint8), 'out.png')
    assert Path('source.png').read_bytes() == b'mine' and sorted(os.listdir()) == ['out.png', 'source.png']


def test_place_copies_where_links_do_not_work(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr(os, 'link', refuse)
    Path('a').write_bytes(b'123')
    jobs.place('a', 'folder/b')
    assert Path('folder/b').read_bytes() == b'123' and not Path('a').samefile('folder/b')
    Path('a').write_bytes(b'124')
    with pytest.raises(UserError, match='folder/b exists and differs from a'):
        jobs.place('a', 'folder/b')
    jobs.place('a', 'folder/b', replace=True)
    assert Path('folder/b').read_bytes() == b'124'
