"""The command lines of training, testing and the doctor, and what all commands share.

What stands here loads nothing, so that --help answers at once: `answer_help` runs before anything else of the package.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from dckd_sr.errors import one_line

_NEEDED = ('torch', 'torchvision', 'basicsr', 'numpy', 'cv2', 'lmdb', 'PIL', 'pydantic', 'yaml', 'safetensors')
_NEEDED += ('skimage', 'scipy', 'spandrel', 'tqdm')
_OLDEST = (3, 9)


class Parser(argparse.ArgumentParser):
    """argparse's, which says what was meant where an option file stands without -opt, or with it and must not."""

    def parse_known_args(self, args=None, namespace=None):
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message):
        super().error(one_line(message + self.hint(message)))

    def hint(self, message):
        """' (did you mean -opt my.yml?)' for a message of argparse, or ''."""
        given, needs_opt = self._given, message.endswith('required: -opt/--opt')
        files = [word for word in given if word.endswith(('.yml', '.yaml'))]
        if needs_opt and given and not given[0].startswith('-'):
            files.append(given[0])  # perhaps the name of a shipped file
        if not files:
            return ''
        takes_opt, commands = '-opt' in self._option_string_actions, self._commands()
        meant = ''
        if needs_opt or (takes_opt and '-opt' not in given and message.startswith('unrecognized arguments')):
            meant = f'-opt {files[0]}'
        elif commands and given[0] == files[0]:
            names = [name for name, command in commands.items() if '-opt' in command._option_string_actions]
            meant = f'{names[0]} -opt {files[0]}' if names else f'{next(iter(commands))} {files[0]}'
        elif '-opt' in given and not takes_opt:
            meant = f'{files[0]}, without -opt'
        return f' (did you mean {meant}?)' if meant else ''

    def _commands(self):
        """Name -> parser of the commands below this one."""
        found = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return found[0] if found else {}


def parser(is_train=True):
    """The command line of training and testing: BasicSR's, and --local-rank as torch's launchers write it."""
    verb = 'train' if is_train else 'test'
    result = Parser(prog=f'dckd-{verb}', description=f'{verb.capitalize()} as an option file says.')
    add = result.add_argument
    add('-opt', '--opt', required=True, metavar='FILE', help='option file (YAML), or the name of a shipped one')
    add('--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='what started several processes')
    add('--auto_resume', action='store_true', help="continue from the run's last state, if there is one")
    add('--debug', action='store_true', help='validate and save every 8 iterations')
    add('--local_rank', '--local-rank', type=int, default=0, help='set by launchers')
    add('--force_yml', nargs='+', metavar='A:B=VALUE', help='set keys of the file; values are YAML')
    return result


def test_parser():
    """The command line of testing: that of `parser`, and what only tests know."""
    result = parser(is_train=False)
    result.add_argument('--with_teacher', action='store_true', help="add network_t's row (path.pretrain_network_t)")
    baseline = result.add_mutually_exclusive_group()
    baseline.add_argument('--bicubic', action='store_true', help="add bicubic's row, the default where scale > 1")
    baseline.add_argument('--no_bicubic', action='store_true', help="leave bicubic's row out")
    result.add_argument('--save_img', action='store_true', help='save the images, as val.save_img: true does')
    result.add_argument('--self_ensemble', action='store_true', help='as val.self_ensemble: mean over 8 orientations')
    result.add_argument('--device', help='cpu, cuda, cuda:1, mps; default: a GPU if there is one and num_gpu is not 0')
    return result


def doctor_parser():
    """The command line of the doctor."""
    result = Parser(prog='dckd-doctor', description='Look at this machine, and at what an option file lacks here.')
    add = result.add_argument
    add('-opt', '--opt', metavar='FILE', help='option file of a training or a test, or the name of a shipped one')
    add('--force_yml', nargs='+', metavar='A:B=VALUE', help='set keys of the file; values are YAML')
    add('--json', metavar='FILE', help='write the findings there; - prints them in place of the text')
    add('--gpu', action='store_true', help='prove that everything works on this GPU, in less than 8 minutes')
    add(
        '--device',
        choices=['cuda', 'cpu'],
        help='of --gpu; cpu tries the proof itself, at reduced size, in many minutes',
    )
    add('--small', action='store_true', help='of --gpu: at reduced size')
    add('--only', nargs='+', metavar='PART', help='of --gpu: these parts, by the beginning of their names')
    add('--worker', metavar='FILE', help=argparse.SUPPRESS)  # a process that --gpu starts
    return result


def answer_help():
    """Print the help and exit (0) where this process is one of these commands, asked for its help."""
    command = {'train': parser, 'test': test_parser, 'doctor': doctor_parser}.get(_command())
    if command and {'-h', '--help'} & set(sys.argv[1:]):
        command().parse_args(['--help'])


def check_python():
    """Exit (2) with one line where one of our commands is started with a Python that is too old for the package."""
    if sys.version_info < _OLDEST and _is_ours():
        _leave(f'Python {".".join(map(str, _OLDEST))} or newer is needed, and {sys.executable} is older')


def explain(error):
    """Exit (2) with one line where one of our commands cannot be imported; callers of the library get the error itself.

    Args:
        error: the ImportError or OSError.
    """
    if not _is_ours():
        return
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    text = ' '.join(str(error).split())
    if missing:
        python = Path(__file__).resolve().parents[1] / '.venv' / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
        found = python if python.exists() else python.with_suffix('.exe')
        cure = (
            f'start {found} instead' if found.exists() else 'activate its environment, or install it as README.md says'
        )
        more = f' and {len(missing) - 4} more' if len(missing) > 4 else ''
        text = f'{sys.executable} does not have {", ".join(missing[:4])}{more}: {cure}'
    elif 'libGL' in text or 'libgthread' in text:
        text += '; OpenCV needs it: install libgl1, or opencv-python-headless in the place of opencv-python'
    _leave(text)


def _leave(text):
    print(f'error: {one_line(text)}', file=sys.stderr)
    raise SystemExit(2)


def _is_ours():
    """Whether this process is one of our commands."""
    unnamed = sys.argv[:1] == ['-m'] and not hasattr(sys, 'orig_argv')  # with Python 3.9, see _command
    return unnamed or _command() is not None


def _command():
    """Which command this process is: ``dckd-train``, ``python -m dckd_sr.train``, ``python dckd_sr/train.py``."""
    program = sys.argv[0] if sys.argv else ''
    if program == '-m':  # python still looks for the module; its name is known since 3.10
        words = getattr(sys, 'orig_argv', [])
        module = words[words.index('-m') + 1] if '-m' in words else ''
        return module.rpartition('dckd_sr.')[2] if module.startswith('dckd_sr.') or module == 'dckd_sr' else None
    path = Path(program)
    if path.suffix == '.py' and path.resolve().parent == Path(__file__).resolve().parent:
        return path.stem
    return path.stem.rpartition('dckd-')[2] if path.stem.startswith('dckd-') else None
