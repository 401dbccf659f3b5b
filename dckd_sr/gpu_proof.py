"""Runs the parts of `gpu_parts`, each caught on its own, in processes that may hang, crash or lose their GPU.

Parts of a group share a process while all goes well. A part that fails and leaves a GPU that answers no more, that ends
its process or takes too long, costs that process; the parts after it get a new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from dckd_sr import gpu_parts, logs
from dckd_sr.errors import UserError, nearest, one_line, reason
from dckd_sr.gpu_parts import PARTS, Place

TOTAL = 465  # seconds for all parts on a GPU: with what is around them, less than 8 minutes
START = 60  # more seconds for the first part of a process, which loads torch
SLOWER = 4  # times as long a part may take on a CPU
_WIDTH = max(len(part.title) for part in PARTS.values())
_POISONED = 75  # exit code of a process whose GPU answers no more: the part that did it has its row


def names_of(only: Sequence[str] | None) -> list[str]:
    """The parts that are asked for, in their order; what is no name stands for all that begin with it.

    Raises:
        UserError: there is no such part.
    """
    wanted = set() if only else set(PARTS)
    for word in only or ():
        found = {word} & set(PARTS) or {name for name in PARTS if name.startswith(word)}
        if not found:
            raise UserError(f'--only {word}: no such part{nearest(word, PARTS)}; known: {", ".join(PARTS)}')
        wanted |= found
    return [name for name in PARTS if name in wanted]


def prove(
    device: str, small: bool = False, only: Sequence[str] | None = None, tell: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Run parts in processes of their own.

    Args:
        device: cuda or cpu.
        small: at a reduced size, without a limit for the whole.
        only: names of parts; see `names_of`.
        tell: takes a line about each part as it ends.

    Returns:
        one dict a part: name, title, ok, seconds, figures, and where it failed the reason and its traceback.
    """
    pending, rows = names_of(only), []
    deadline = time.monotonic() + TOTAL if device == 'cuda' and not small else float('inf')
    folder = Path(tempfile.mkdtemp(prefix='dckd_doctor_'))
    former = signal.getsignal(signal.SIGTERM)
    alone = threading.current_thread() is threading.main_thread()
    if alone:  # its processes end with it
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        while pending:
            group = list(takewhile(lambda name: PARTS[name].group == PARTS[pending[0]].group, pending))
            for row in _in_a_process(group, device, small, folder / str(len(rows)), deadline):
                rows.append(row)
                pending.remove(row['name'])
                tell(line(row))
    finally:
        if alone:
            signal.signal(signal.SIGTERM, former)
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def _in_a_process(names, device, small, folder, deadline):
    """Yield the rows of parts, as far as one process comes with them; at least one."""
    folder.mkdir()
    if time.monotonic() > deadline:
        for name in names:
            yield _row(name, False, 0, reason=f'not reached: the {TOTAL} s are over')
        return
    results, log = folder / 'rows.jsonl', folder / 'log.txt'
    results.touch()
    command = [sys.executable, '-m', 'dckd_sr.doctor', '--gpu', '--device', device, *(['--small'] if small else [])]
    with open(log, 'wb') as output:
        process = subprocess.Popen(
            [*command, '--worker', str(results), '--only', *names],
            cwd=folder,
            env=gpu_parts.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    left, began, limit = list(names), time.monotonic(), START
    factor = 1 if device == 'cuda' else SLOWER
    try:
        with open(results, encoding='utf-8') as reader:
            while left:
                ended = process.poll() is not None
                text = reader.readline()
                if text.endswith('\n'):
                    row = json.loads(text)
                    left.remove(row['name'])
                    began, limit = time.monotonic(), 0
                    yield row
                    continue
                reader.seek(reader.tell() - len(text.encode()))
                if ended:
                    if process.returncode != _POISONED:
                        told = _last_line(log)
                        seconds = time.monotonic() - began
                        yield _row(left[0], False, seconds, reason=f'{_ending(process.returncode)}: {told}')
                    return
                allowed = factor * (PARTS[left[0]].seconds + limit)
                now = time.monotonic()
                if now > began + allowed or now > deadline:
                    text = f'no answer within {allowed} s' if now <= deadline else f'the {TOTAL} s are over'
                    yield _row(left[0], False, now - began, reason=text)
                    return
                time.sleep(0.05)
    finally:
        _end(process)


def _end(process):
    """End a process and all that it has started."""
    with contextlib.suppress(OSError):
        if hasattr(os, 'killpg'):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _ending(code):
    if code < 0:
        with contextlib.suppress(ValueError):
            return f'its process ended by {signal.Signals(-code).name}'
    return f'its process ended with {code}'


def _last_line(log):
    lines = [line for line in log.read_text(encoding='utf-8', errors='replace').splitlines() if line.strip()]
    return one_line(lines[-1])[:300] if lines else 'it said nothing'


def _row(name, ok, seconds, **more):
    return {'name': name, 'title': PARTS[name].title, 'ok': ok, 'seconds': round(seconds, 2), 'figures': {}, **more}


# ---------------------------------------------------------------------------------------------------------------------
# Inside of such a process


def work(names: Sequence[str], device: str, small: bool, results: str) -> int:
    """Run parts in this process and write a line about each; returns the exit code.

    A part that fails is a row with its reason; where the GPU answers no more afterwards, the process ends.
    """
    logs.start()
    warnings.simplefilter('ignore')
    place = torch.device(device)
    for name in names:
        folder = Path(results).parent / name
        folder.mkdir()
        row = run_part(name, Place(place, small, folder))
        alive = True
        try:
            gpu_parts.clean(place)
        except RuntimeError:
            alive = False
        with open(results, 'a', encoding='utf-8') as file:
            file.write(json.dumps(row, default=str) + '\n')
        if not alive:
            os._exit(_POISONED)  # what is left of CUDA would complain at length
    return 0


def run_part(name: str, place: Place) -> dict[str, Any]:
    """The row of one part, run here."""
    begin = time.perf_counter()
    try:
        figures, more = PARTS[name].run(place), {}
        return {**_row(name, True, time.perf_counter() - begin), 'figures': figures}
    except Exception as error:
        more = {'reason': _why(error), 'traceback': traceback.format_exc()}
        return _row(name, False, time.perf_counter() - begin, **more)


def _why(error):
    """One line: what was raised, and the line of this project or of BasicSR that it came from."""
    text = one_line(reason(error) if not isinstance(error, gpu_parts.Failed) else str(error))[:300]
    if isinstance(error, (gpu_parts.Failed, UserError)):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if {'dckd_sr', 'basicsr'} & set(Path(f.filename).parts)]
    ours = [f for f in ours if Path(f.filename).name not in ('gpu_parts.py', 'gpu_proof.py')] or ours
    return f'{text} ({Path(ours[-1].filename).name}:{ours[-1].lineno})' if ours else text


# ---------------------------------------------------------------------------------------------------------------------
# Words


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    what = 'ok' if row['ok'] else 'FAILED'
    text = _figures(row['figures']) if row['ok'] else row['reason']
    return f'{what:6}  {row["title"]:{_WIDTH}}  {row["seconds"]:6.1f} s  {text}'.rstrip()


def _figures(figures):
    shown = []
    for name, value in figures.items():
        if isinstance(value, (dict, list)) or value is None:
            continue  # for the JSON file
        number = f'{value:.3g}' if isinstance(value, float) else str(value)
        shown.append(f'{name} {number}')
    return ', '.join(shown)


def table(rows: list[dict[str, Any]], device: str, small: bool) -> str:
    """The page that is printed at the end: what failed comes last, where it is seen."""
    failed = [row for row in rows if not row['ok']]
    size = ', at reduced size' if small else ''
    head = f'{len(rows) - len(failed)} of {len(rows)} parts hold on {device}{size}, in {_total(rows):.0f} s'
    lines = [head, *(f'  {line(row)}' for row in [*(row for row in rows if row['ok']), *failed])]
    if failed:
        lines.append(f'Again, one alone: python -m dckd_sr.doctor --gpu --only {failed[0]["name"]}')
    return '\n'.join(lines)


def _total(rows):
    return sum(row['seconds'] for row in rows)
