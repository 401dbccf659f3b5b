"""Kill a training run again and again, damage what it saved, resume it: it must end as if nothing had happened.

    python -m tests.chaos --kills 20

The demo's distillation runs once undisturbed, and once killed by SIGKILL, SIGTERM and SIGINT at random moments of
starting up, training, validating and saving. After a quarter of the kills the newest checkpoint is damaged. Every start
uses --auto_resume and 0, 1 or 2 loader workers. At the end both runs' weights, EMA, history, optimiser, schedulers,
generators, best metrics and logged losses are hashed; the exit code is 0 if the hashes are equal and nothing else was
odd, 1 if not.
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from dckd_sr import demo

ROOT = Path(__file__).resolve().parents[1]
STRIDE = 3  # iterations a kill, on average
PATIENCE = 120  # seconds in which a process must come to where it is to be killed, or end
# How a process ends that was sent the signal: after its last save, or at once where it had not begun to train.
CODES = {'SIGKILL': (-9,), 'SIGTERM': (143, -15), 'SIGINT': (130, -2)}
MOMENTS = ('start-up', 'step', 'save', 'step', 'save')
DAMAGES = {
    'truncated': lambda data, rng: data[: rng.randrange(1, len(data))],
    'zeroed': lambda data, rng: bytes(len(data)),
    'bit flipped': lambda data, rng: flip(data, rng.randrange(8 * len(data))),
    'emptied': lambda data, rng: b'',
    'deleted': lambda data, rng: None,
}


class Odd(Exception):
    """Something that must not happen, whatever was killed."""


def flip(data, bit):
    """The bytes with one bit turned."""
    place = bit // 8
    return data[:place] + bytes([data[place] ^ 1 << bit % 8]) + data[place + 1 :]


def dealt(values, count, rng):
    """`count` of the values in random order, each equally often."""
    deck = [value for _ in range(-(-count // len(values))) for value in rng.sample(values, len(values))]
    return deck[:count]


class Training:
    """One process that trains, in a group of its own; what it prints goes to a file.

    Attributes:
        text (str): what `look` has seen so far of what it printed.
    """

    def __init__(self, name, folder, total, workers):
        overrides = {
            'name': name,
            'train:total_iter': total,
            'train:scheduler:periods': f'[{total}]',
            'train:step': '[3]',
            'train:check_teacher': 'false',
            'val:val_freq': 3,
            'logger:print_freq': 1,
            'logger:save_checkpoint_freq': 2,
            'datasets:train:num_worker_per_gpu': workers,
        }
        weights = [*demo.shipped('t', 'teacher_EDSR_x4.pth'), *demo.shipped('vqgan', 'codebook.pth')]
        command = [sys.executable, str(ROOT / 'dckd_sr' / 'train.py'), '--auto_resume']
        command += ['-opt', str(ROOT / 'options' / 'demo' / 'distill.yml'), '--force_yml', *weights]
        command += [f'{key}={value}' for key, value in overrides.items()]
        self.folder, self.experiment, self.text = folder, folder / 'experiments' / name, ''
        self._output = open(folder / f'{name}.txt', 'w+', encoding='utf-8', errors='replace')
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={'OMP_NUM_THREADS': '1', **os.environ, 'PYTHONUNBUFFERED': '1'},
            start_new_session=True,
        )
        self._reader = open(folder / f'{name}.txt', encoding='utf-8', errors='replace')

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._output.close()
        self._reader.close()

    def look(self):
        """Read what is new; returns whether the process still runs."""
        running = self.process.poll() is None
        self.text += self._reader.read()
        return running

    def until(self, condition):
        """Wait for a condition; returns whether it came true while the process ran."""
        ends = time.monotonic() + PATIENCE
        while self.look():
            if condition():
                return True
            if time.monotonic() > ends:
                raise Odd(f'it does not get there within {PATIENCE} s\n{self.text}')
            time.sleep(0.001)
        return False

    def end(self):
        """Wait until the process is gone; returns its exit code."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Odd(f'it does not end within {PATIENCE} s') from None
        self.look()
        return self.process.returncode

    @property
    def iteration(self):
        """The last iteration that was logged, or None."""
        found = re.findall(r'iter: +([\d,]+), lr', self.text)
        return int(found[-1].replace(',', '')) if found else None

    @property
    def resumed(self):
        """The iteration that it went on from, or None."""
        found = re.search(r'Resuming from .*, iteration (\d+)\.', self.text)
        return int(found.group(1)) if found else None


class Chaos:
    """The disturbed run, and what was done to it.

    Attributes:
        signals, moments, damages (Counter): what happened how often.
        halves (int): kills that left files of an unfinished save.
        passed_over (int): checkpoints that a start found damaged.
        resumes, repeated (int): starts from a checkpoint, and iterations that were done again after them.
    """

    def __init__(self, folder, kills, rng, startup):
        self.folder, self.kills, self.rng, self.startup = folder, kills, rng, startup
        self.total, self.experiment = length(kills), folder / 'experiments' / 'disturbed'
        self.signals, self.moments, self.damages = Counter(), Counter(), Counter()
        self.halves = self.passed_over = self.resumes = self.repeated = self.reached = 0
        self.damaged = []  # (iteration, file, what was left of it)
        self.flipped = None  # the last of them, if it was one bit of a state

    def run(self):
        """All kills, and the run's end.

        Raises:
            Odd: a process did what none should.
        """
        rng, kills = self.rng, self.kills
        signals, moments = dealt(list(CODES), kills, rng), dealt(MOMENTS, kills, rng)
        quarter = -(-kills // 4)
        ways, due = dealt(list(DAMAGES), quarter, rng), set(rng.sample(range(kills), quarter))
        for index in range(kills):
            moment = moments[index]
            while not self.kill(index, signals[index], moment):
                moment = 'start-up'  # the run is at its end: there are no more steps
            # A kill that leaves nothing whole to damage leaves its damage to the next one.
            newest = self.whole()
            if newest is not None and quarter - len(ways) < sum(place <= index for place in due):
                self.damage(newest, ways.pop())
        with self.start() as training:
            self.expect(training, 'the last start', (0,))

    def whole(self):
        """The newest checkpoint whose files are not as damage left them, or None."""
        spoiled = {number for number, file, data in self.damaged if content_of(file) == data}
        return max((number for number in states(self.experiment) if number not in spoiled), default=None)

    def start(self):
        """A process, with what it may go on from noted."""
        self.sources = {self.whole()}
        # A bit may be one that nothing depends on.
        self.sources |= {self.flipped[0]} if self.flipped and content_of(self.flipped[1]) == self.flipped[2] else set()
        return Training('disturbed', self.folder, self.total, self.rng.randrange(3))

    def kill(self, index, name, moment):
        """Start the run and send it a signal; returns whether that came in time."""
        rng, before = self.rng, half_saved(self.experiment)
        with self.start() as training:
            if moment == 'start-up':
                time.sleep(rng.uniform(0, self.startup))
            else:
                # Kills advance through the run, so that none comes after its end.
                latest = self.total * (index + 1) // (self.kills + 1)
                target = rng.randint(min(max(states(self.experiment), default=0) + 1, latest), latest)
                training.until(lambda: (training.iteration or 0) >= target)
                if moment == 'save':
                    training.until(lambda: any(self.experiment.glob('*/.*.tmp')))
                    time.sleep(rng.uniform(0, 0.01))
                else:
                    time.sleep(rng.uniform(0, 0.8))
            # A terminal and a batch system tell the whole group; `kill` and a machine without memory one process.
            everybody = name == 'SIGINT' or rng.random() < 0.5
            if training.process.poll() is None:
                (os.killpg if everybody else os.kill)(training.process.pid, getattr(signal, name))
            code = self.expect(training, f'{name} at {moment}', (0, *CODES[name]))
            if code == 0:
                return False
            self.signals[name] += 1
            self.moments['training' if training.iteration else 'start-up'] += 1
            self.halves += bool(half_saved(self.experiment) - before)
            where = f'iteration {training.iteration}' if training.iteration else 'start-up'
            newest = max(states(self.experiment), default='none')
            print(f'{index + 1:4} {name} in {where}, exit code {code}, newest checkpoint: {newest}', flush=True)
        return True

    def expect(self, training, what, codes):
        """Wait for the end of a process, and look at how it began and ended; returns its exit code."""
        code, text = training.end(), training.text
        last = '\n'.join(text.splitlines()[-25:])
        if code not in codes:
            raise Odd(f'{what}: exit code {code}, expected {" or ".join(map(str, codes))}\n{last}')
        if 'Traceback' in text and 'KeyboardInterrupt' not in text:
            raise Odd(f'{what}: a traceback\n{last}')
        if training.iteration is not None:
            if training.resumed not in self.sources:
                raise Odd(
                    f'{what}: it went on from {training.resumed}, the newest that is whole: {self.sources}\n{last}'
                )
            self.resumes += training.resumed is not None
            self.passed_over += text.count('Passed over')
            self.repeated += max(0, self.reached - (training.resumed or 0))
            self.reached = training.iteration
        if 'Stopped by' in text and training.iteration not in states(self.experiment):
            raise Odd(f'{what}: iteration {training.iteration} was not saved\n{last}')
        return code

    def damage(self, newest, way):
        """Spoil the newest state, or a network that it names."""
        files = [f'training_states/{newest}.state', f'models/net_g_{newest}.pth']
        file = self.experiment / self.rng.choice(files)
        data = DAMAGES[way](file.read_bytes(), self.rng)
        if data is None:
            file.unlink()
        else:
            file.write_bytes(data)
        self.damaged.append((newest, file, data))
        self.flipped = self.damaged[-1] if way == 'bit flipped' and file.suffix == '.state' else None
        self.damages[way] += 1
        print(f'     {file.name} {way}', flush=True)


def states(experiment):
    """Iterations that have a training state, in order."""
    return sorted(int(file.stem) for file in experiment.glob('training_states/*.state'))


def half_saved(experiment):
    """Temporary files and networks without the state that commits them: {(name, time of writing)}."""
    committed = {f'net_g_{number}.pth' for number in states(experiment)}
    nets = (file for file in experiment.glob('models/net_g_[0-9]*.pth') if file.name not in committed)
    return {(file.name, file.stat().st_mtime_ns) for file in [*nets, *experiment.glob('*/.*.tmp')]}


def content_of(file):
    return file.read_bytes() if file.is_file() else None


def length(kills):
    """Iterations of a run that is killed so often."""
    return STRIDE * (kills + 1)


def result(experiment, total):
    """What a run came to: name -> value, nested.

    Args:
        experiment: its folder; those that a fresh start moved aside lie beside it.
        total: its last iteration.
    """
    state = torch.load(experiment / 'training_states' / f'{total}.state', weights_only=True)
    del state['dckd_sr']['options']  # the name and the workers differ
    nets = {
        name: torch.load(experiment / 'models' / f'{name}.pth', weights_only=True)
        for name in (f'net_g_{total}', 'net_g_latest')
    }
    logged = {}
    for file in experiment.parent.glob(f'{experiment.name}*/train_*.log'):
        text = file.read_text(encoding='utf-8', errors='replace')
        for iteration, rate, losses in re.findall(r'iter: +([\d,]+), lr:\((.*?)\).*\] (l_.*)\n', text):
            logged.setdefault(int(iteration.replace(',', '')), set()).add(f'{rate} {losses.strip()}')
    return {'state': state, 'nets': nets, 'logged': {key: sorted(logged[key]) for key in sorted(logged)}}


def digests(value, name=''):
    """The leaves of nested values: path -> SHA-256 over type, shape and bytes."""
    if isinstance(value, dict):
        leaves = {f'{name}.{key}': item for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        leaves = {f'{name}.{index}': item for index, item in enumerate(value)}
    else:
        digest = hashlib.sha256()
        if isinstance(value, torch.Tensor):
            digest.update(f'{value.dtype} {tuple(value.shape)} '.encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
        else:
            digest.update(f'{type(value).__name__} {value!r}'.encode())
        return {name: digest.hexdigest()}
    return {path: digest for key, item in leaves.items() for path, digest in digests(item, key).items()}


def fingerprint(leaves):
    """One hash of all."""
    return hashlib.sha256('\n'.join(f'{path} {digest}' for path, digest in leaves.items()).encode()).hexdigest()


def compare(folder, total):
    """Print the hashes of both runs, and what differs; returns whether nothing does."""
    leaves = {name: digests(result(folder / 'experiments' / name, total)) for name in ('undisturbed', 'disturbed')}
    for name, its in leaves.items():
        print(f'{name:<12} {fingerprint(its)}')
    one, other = leaves.values()
    paths = [path for path in {**one, **other} if one.get(path) != other.get(path)]
    for path in paths[:20]:
        print(f'differs: {path[1:]}')
    return not paths and fingerprint(one) == fingerprint(other)


def chaos(folder, kills, seed):
    """Both runs in a folder; returns whether they are equal.

    Raises:
        Odd: a process did what none should.
    """
    demo.make_photographs(folder / 'datasets' / 'demo')
    began, total = time.monotonic(), length(kills)
    with Training('undisturbed', folder, total, 0) as training:
        training.until(lambda: training.iteration is not None)
        startup = time.monotonic() - began
        if training.end() != 0:
            raise Odd(f'the undisturbed run failed\n{training.text}')
    disturbed = Chaos(folder, kills, random.Random(seed), startup)
    disturbed.run()

    def listed(counter):
        return ', '.join(f'{name} {count}' for name, count in counter.items())

    where = f'{listed(disturbed.moments)}; {disturbed.halves} in the middle of a save'
    print(f'kills: {listed(disturbed.signals)}; in {where}')
    print(f'corruptions: {listed(disturbed.damages)}; passed over: {disturbed.passed_over}')
    print(f'resumes: {disturbed.resumes}; iterations: {total}, done again after a kill: {disturbed.repeated}')
    equal = compare(folder, total)
    print(f'{"equal" if equal else "NOT EQUAL"} after {time.monotonic() - began:.0f} s, seed {seed}')
    return equal


def main(argv=None):
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog='python -m tests.chaos', description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=20, help='default: 20, about eight minutes on two cores')
    parser.add_argument('--seed', type=int, default=0, help='of signals, moments and damages; default: 0')
    parser.add_argument('--folder', type=Path, help='an empty folder for both runs, which stay there; default: none')
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background has it switched off
    folder = args.folder or Path(tempfile.mkdtemp(prefix='chaos_'))
    try:
        return 0 if chaos(folder.resolve(), args.kills, args.seed) else 1
    except Odd as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == '__main__':
    sys.exit(main())
