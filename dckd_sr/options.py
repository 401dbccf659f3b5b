"""Option files: read, override, check and resolve. Every configuration error of the package comes from here.

    opt, warnings = load('options/train_edsr_x4.yml', ['train:total_iter=1000'])

Sections are checked against the pydantic models of `option_keys`; blocks with a ``type`` (networks, losses, metrics,
optimisers) against the signature of what the type names, in `option_checks`. All problems are reported at once, each
with the full path of its key.
"""

import argparse
import copy
import os
import random
from pathlib import Path

import torch
from basicsr.utils.registry import MODEL_REGISTRY

from dckd_sr import option_checks as checks
from dckd_sr import option_keys as keys
from dckd_sr import safe_yaml
from dckd_sr.errors import UserError, nearest
from dckd_sr.option_checks import Report, check_file  # noqa: F401  (check_file: for entry points)


class OptionError(UserError):
    """Mistakes in an option file or an override.

    Attributes:
        problems (list[str]): one line each: full path of the key, its value, what was expected.
    """

    def __init__(self, problems, source=None):
        self.problems = list(problems)
        lines = self.problems
        if source is not None or len(lines) > 1:
            count = f'{len(lines)} problem{"s" if len(lines) > 1 else ""}'
            lines = [f'{source}: {count}' if source is not None else count, *lines]
        super().__init__('\n  '.join(lines))


# ---------------------------------------------------------------------------------------------------------------------
# Entry points


def parser(is_train=True):
    """The command line of training and testing: BasicSR's, and --local-rank as torch's launchers write it."""
    verb = 'train' if is_train else 'test'
    result = argparse.ArgumentParser(prog=f'dckd-{verb}', description=f'{verb.capitalize()} as an option file says.')
    add = result.add_argument
    add('-opt', '--opt', required=True, metavar='FILE', help='option file (YAML)')
    add('--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='what started several processes')
    add('--auto_resume', action='store_true', help="continue from the run's last state, if there is one")
    add('--debug', action='store_true', help='validate and save every 8 iterations')
    add('--local_rank', '--local-rank', type=int, default=0, help='set by launchers')
    add('--force_yml', nargs='+', metavar='A:B=VALUE', help='set keys of the file; values are YAML')
    return result


def parse(argv, is_train=True, command=None):
    """Read a command line and the option file that it names.

    Args:
        argv (list[str]): arguments, without the program's name.
        is_train: for training or for a test.
        command: a parser with more arguments than ``parser(is_train)``.

    Returns:
        tuple[dict, argparse.Namespace, list[str]]: options, arguments, warnings.

    Raises:
        OptionError: as `load`. SystemExit: --help (0), or a wrong command line (2).
    """
    args = (command or parser(is_train)).parse_args(argv)
    opt, warnings = load(
        args.opt, args.force_yml, is_train, debug=args.debug, launcher=args.launcher, auto_resume=args.auto_resume
    )
    return opt, args, warnings


def load(path, overrides=(), is_train=True, root_path=None, debug=False, launcher='none', auto_resume=False):
    """Read, override, check and resolve an option file; creates nothing on disk.

    Args:
        path: the file.
        overrides: entries ``a:b=value``, as --force_yml takes them.
        is_train: a test skips what only training needs, and marks missing sets by a key ``missing``, the reason.
        root_path: folder for the outputs; the current one if None.
        debug: BasicSR's debug mode: frequent validation and saving, the name prefixed.
        launcher: none, pytorch or slurm.

    Returns:
        tuple[dict, list[str]]: what BasicSR's parse_options gives, in plain dicts with all defaults, and warnings.

    Raises:
        OptionError: everything that is wrong, in one message.
    """
    raw, report = read_file(path), Report()
    apply_overrides(raw, overrides)
    opt = resolve(raw, is_train, report, debug, launcher, auto_resume, root_path)
    if report.problems:
        raise OptionError(report.problems, path)
    return opt, report.warnings


def check(opt, is_train=True):
    """Check an option dict, as read from a file, without changing it.

    Returns:
        tuple[list[str], list[str]]: problems, warnings.
    """
    report = Report()
    resolve(opt, is_train, report)
    return report.problems, report.warnings


def to_yaml(opt):
    """The text of an option file that loads again: resolved options without what a run adds (ranks, output paths)."""
    opt = {key: value for key, value in opt.items() if key not in keys.RUNTIME_KEYS}
    opt['path'] = {key: value for key, value in opt['path'].items() if key not in keys.RUNTIME_PATHS}
    opt['datasets'] = {
        name: {key: value for key, value in block.items() if key not in keys.RUNTIME_DATASET_KEYS}
        for name, block in opt['datasets'].items()
    }
    return safe_yaml.dump(opt)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_file(path):
    """Read an option file.

    Returns:
        dict: as written.

    Raises:
        OptionError: missing, unreadable, empty, no mapping, or not plain YAML.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_bytes().decode('utf-8-sig')
    except FileNotFoundError:
        raise OptionError([f'-opt {path}: no such file{_similar_file(file)}']) from None
    except UnicodeDecodeError:
        raise OptionError([f'-opt {path}: not a UTF-8 text file']) from None
    except OSError as error:
        reason = 'a folder, not a file' if file.is_dir() else error.strerror
        raise OptionError([f'-opt {path}: {reason}']) from None
    try:
        opt = safe_yaml.parse(text)
    except safe_yaml.YAMLError as error:
        raise OptionError(error.problems, path) from None
    if not isinstance(opt, dict):
        raise OptionError([f'-opt {path}: {"empty" if opt is None else "not made of `key: value` lines"}'])
    return opt


def _similar_file(file):
    """The option file meant, among those beside it and those that come with this package."""
    shipped = Path(__file__).resolve().parents[1] / 'options'
    known = {}
    for other in [*shipped.rglob('*.yml'), *(file.parent.glob('*.yml') if file.parent.is_dir() else ())]:
        known.setdefault(other.stem, other)
    meant = checks.meant(file.stem, known)
    return f" (did you mean '{known[meant]}'?)" if meant else ''


def apply_overrides(opt, overrides):
    """Set the ``a:b=value`` entries of --force_yml in opt; values are YAML, keys may be new.

    Raises:
        OptionError: an entry without ``=``, one that leads through a plain value, or a value with a YAML tag.
    """
    problems = []
    for entry in overrides or ():
        path, equals, text = entry.partition('=')
        names = [name.strip() for name in path.split(':')]
        if not equals or not all(names):
            problems.append(f'--force_yml {entry}: expected key:key=value')
            continue
        try:
            value = _override_value(text.strip())
        except safe_yaml.YAMLError as error:
            problems += [f'--force_yml {entry}: {problem}' for problem in error.problems]
            continue
        block = opt
        for name in names[:-1]:
            if block.get(name) is None:
                block[name] = {}
            block = block[name]
            if not isinstance(block, dict):
                problems.append(f"--force_yml {entry}: '{name}' is a value here, not a block of keys")
                break
        else:
            block[names[-1]] = value
    if problems:
        raise OptionError(problems)


def _override_value(text):
    if text.lower() == 'none':
        return None
    # A file name template such as {}x4 would be a YAML mapping; other text that is no YAML is meant as text.
    return text if text.startswith('{}') or not safe_yaml.is_yaml(text) else safe_yaml.parse(text)


# ---------------------------------------------------------------------------------------------------------------------
# Resolving


def resolve(raw, is_train, report, debug=False, launcher='none', auto_resume=False, root_path=None):
    """Check a dict as read from a file and complete it; problems and warnings go to the report.

    Returns:
        dict: a new one, with what BasicSR's parse_options gives. Of use only where there are no problems.
    """
    raw = copy.deepcopy(raw)
    rename(raw, report)
    model_type, spec = model_keys(raw, report, is_train)
    train_raw, datasets, given = raw.get('train'), raw.pop('datasets', None), set(raw)
    if not is_train:
        raw.pop('train', None)  # nothing of it matters
    model, report.homes = checks.file_model(spec, is_train)
    opt = checks.validate(model, raw, report)
    opt['model_type'] = model_type
    for key, text in (('name', 'the name of the run'), ('network_g', 'the network')):
        if opt.get(key) is None:
            report.missing(key, text)
    for path in spec.needs if is_train else ():
        section, _, key = path.rpartition('.')
        if (opt[section] if section else opt).get(key) is None:
            report.missing(path, f'{model_type} needs it')
    networks = [name for name in spec.networks if opt.get(f'network_{name}') is not None]
    classes = {name: checks.check_network(report, opt, name) for name in networks}
    classes = {name: cls for name, cls in classes.items() if cls is not None}
    if 'g' in classes and 't' in classes:
        checks.check_channels(report, opt, classes['g'], classes['t'])
    if is_train:
        checks.check_train(report, opt, spec)
        if 't' in spec.networks:
            checks.check_distillation(report, opt, given)
    elif train_raw is not None:
        opt['train'] = train_raw
    checks.check_paths(report, opt, is_train)
    checks.check_val(report, opt, classes)
    opt['datasets'] = checks.check_datasets(report, opt, datasets, is_train)
    finish(opt, is_train, report, debug, launcher, auto_resume, root_path)
    return opt


def rename(opt, report):
    """Give keys of older option files their present names, and drop those without meaning, in place."""
    sections = [('path', 'path', opt.get('path'))]
    if isinstance(opt.get('datasets'), dict):
        sections += [('datasets', f'datasets.{name}', block) for name, block in opt['datasets'].items()]
    for table, where, block in sections:
        if not isinstance(block, dict):
            continue
        for old, new in keys.RENAMED[table].items():
            if old in block:
                report.warn(f'{where}.{old}', f'read as {new}, its present name')
                value = block.pop(old)
                block.setdefault(new, value)
        for key, reason in keys.NEEDLESS[table].items():
            if key in block:
                report.warn(f'{where}.{key}', f'without effect: {reason}')
                del block[key]


def model_keys(opt, report, is_train):
    """The model type (DCKDModel for a file with our blocks) and its keys; sets whether unknown keys are problems."""
    types, name = checks.known_types(MODEL_REGISTRY), opt.get('model_type')
    if name is None:
        report.error('model_type', f'missing; {checks.one_of(types)}')
        return None, keys.MODELS['DCKDModel']
    name = checks.bare(name)
    if name not in types:
        report.error(
            'model_type', f'no such model{nearest(name, types) or "; " + checks.one_of(types)}', opt['model_type']
        )
        name = checks.meant(name, types) or name
    train = opt['train'] if isinstance(opt.get('train'), dict) else {}
    ours = [key for key in keys.DROP_IN_NETWORKS if opt.get(key)]
    ours += [f'train.{key}' for key in keys.DROP_IN_LOSSES if train.get(key)]
    if name in keys.DROP_IN_TYPES and ours:
        if is_train:
            report.warn('model_type', f'runs as DCKDModel, because the file has {", ".join(ours)}', name)
        name = 'DCKDModel'
    report.strict = name in types and types[name].__module__.startswith('dckd_sr.')
    return name, keys.MODELS.get(name, keys.OTHER_MODEL)


def finish(opt, is_train, report, debug, launcher, auto_resume, root_path):
    """Add what BasicSR's parse_options adds: seed, devices, debug mode, output folders."""
    root = os.path.abspath(root_path or os.getcwd())
    opt.update(
        is_train=is_train, auto_resume=auto_resume, dist=launcher != 'none', rank=0, world_size=1, root_path=root
    )
    if opt.get('manual_seed') is None:
        # Processes cannot agree on a drawn number before they are connected.
        opt['manual_seed'] = 0 if opt['dist'] else random.SystemRandom().randint(1, 10000)
    name = opt.get('name') or ''
    if debug and not name.startswith('debug'):
        name = opt['name'] = f'debug_{name}'
    resolve_gpus(opt, report, launcher)
    outputs = os.path.join(root, 'experiments' if is_train else 'results', name)
    if is_train:
        opt['path']['experiments_root'] = outputs
        opt['path']['models'] = os.path.join(outputs, 'models')
        opt['path']['training_states'] = os.path.join(outputs, 'training_states')
        if 'debug' in name:
            opt['val']['val_freq'] = opt['logger']['save_checkpoint_freq'] = 8
            opt['logger']['print_freq'] = 1
    else:
        opt['path']['results_root'] = outputs
    opt['path']['log'] = outputs
    opt['path']['visualization'] = os.path.join(outputs, 'visualization')


def resolve_gpus(opt, report, launcher):
    """num_gpu is an upper bound: what is there is used, and one warning states the effective batch."""
    wanted, there = opt['num_gpu'], torch.cuda.device_count()
    wanted = there if wanted == 'auto' else wanted
    opt['num_gpu'] = min(wanted, there) if opt['dist'] else min(wanted, there, 1)
    if wanted <= opt['num_gpu']:
        return
    if there == 0:
        text = 'no GPU here, the CPU is used'
    elif there < wanted:
        text = f'{there} here'
    else:
        text = 'a run that torchrun did not start uses one'
    if opt['is_train']:
        count = os.environ.get('WORLD_SIZE' if launcher == 'pytorch' else 'SLURM_NTASKS', '1') if opt['dist'] else '1'
        batch = opt['datasets'].get('train', {}).get('batch_size_per_gpu', 1)
        text += f'; the effective batch is {batch} x {count} = {batch * int(count)}'
    report.warn('num_gpu', text, wanted)
