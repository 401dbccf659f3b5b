"""The command lines of training and testing.

What stands here loads nothing, so that --help answers at once: `answer_help` runs before anything else of the package.
"""

import argparse
import sys
from pathlib import Path


def parser(is_train=True):
    """The command line of training and testing: BasicSR's, and --local-rank as torch's launchers write it."""
    verb = 'train' if is_train else 'test'
    result = argparse.ArgumentParser(prog=f'dckd-{verb}', description=f'{verb.capitalize()} as an option file says.')
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


def answer_help():
    """Print the help and exit (0) where this process is one of our two commands, asked for its help."""
    command = {'train': parser, 'test': test_parser}.get(_command())
    if command and {'-h', '--help'} & set(sys.argv[1:]):
        command().parse_args(['--help'])


def _command():
    """Which command this process is: ``dckd-train``, ``python -m dckd_sr.train`` or ``python dckd_sr/train.py``."""
    program = sys.argv[0] if sys.argv else ''
    if program == '-m':  # python still looks for the module; its name is known since 3.10
        words = getattr(sys, 'orig_argv', [])
        module = words[words.index('-m') + 1] if '-m' in words else ''
        return module.rpartition('dckd_sr.')[2] if module.startswith('dckd_sr.') else None
    path = Path(program)
    if path.suffix == '.py' and path.resolve().parent == Path(__file__).resolve().parent:
        return path.stem
    return path.stem.rpartition('dckd-')[2] if path.stem.startswith('dckd-') else None
