"""Locks that remove their file on leaving: whoever waited for it, and whoever comes new, are never in together."""

import multiprocessing
import time

import pytest

from dckd_sr import locks


def test_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, 'PATIENCE', 0.2)
    with locks.sole_writer(tmp_path) as first, locks.sole_writer(tmp_path) as second:
        assert first and not second
    assert list(tmp_path.iterdir()) == []
    with locks.sole_writer(tmp_path) as alone:
        assert alone


def test_who_waited_and_who_comes_new_are_not_in_together(tmp_path):
    """The one that waited has opened the file before its holder removed it."""
    path = tmp_path / '.lock'
    holder = locks.hold(path)
    waiting = open(path, 'a+b')
    locks.release(holder, path)
    newcomer = locks.hold(path)
    assert newcomer is not None and locks.lock(waiting)  # of the file that is gone: it tells nothing
    assert not locks.is_at(waiting, path) and locks.is_at(newcomer, path)
    assert locks.hold(path) is None
    waiting.close()
    locks.release(newcomer, path)
    assert not path.exists()


def test_a_lock_removes_no_file_of_another(tmp_path):
    """Its folder was moved, and a run of the same name has begun."""
    folder = tmp_path / 'run'
    folder.mkdir()
    with locks.sole_writer(folder) as first:
        folder.rename(tmp_path / 'archived')
        folder.mkdir()
        other = locks.hold(folder / '.lock')
        assert first and other is not None
    assert (folder / '.lock').exists() and locks.hold(folder / '.lock') is None
    locks.release(other, folder / '.lock')


def _work(folder, counter, overlaps, rounds):
    for _ in range(rounds):
        with locks.sole_writer(folder) as alone:
            if alone:
                with counter.get_lock():
                    counter.value += 1
                    overlaps.value += counter.value > 1
                time.sleep(0.001)
                with counter.get_lock():
                    counter.value -= 1


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='needs fork')
def test_many_processes_that_come_and_go(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.time, 'sleep', lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.001)))
    context = multiprocessing.get_context('fork')
    counter, overlaps = context.Value('i', 0), context.Value('i', 0)
    processes = [context.Process(target=_work, args=(tmp_path, counter, overlaps, 60)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert overlaps.value == 0 and [process.exitcode for process in processes] == [0] * 4


def test_a_file_that_cannot_be_made_is_told(tmp_path):
    with pytest.raises(OSError), locks.sole_writer(tmp_path / 'absent'):
        pass
