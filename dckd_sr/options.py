"""Option files: read, override, check and resolve. Every configuration error of the package comes from here.

    opt, warnings = load('options/train_edsr_x4.yml', ['train:total_iter=1000'])

Sections are checked against the pydantic models of `option_keys`; blocks with a ``type`` (networks, losses, metrics,
optimisers) against the signature of what the type names, in `option_checks`. All problems are reported at once, each
with the full path of its key. Files are found, read and merged with their bases in `option_files`.

    python -m dckd_sr.options show FILE      the resolved file, with where each value came from
    python -m dckd_sr.options schema         a JSON schema, for completion in editors
"""

import copy
import os
import random
import sys

import torch
from basicsr.utils.registry import MODEL_REGISTRY

from dckd_sr import devices, imports, safe_yaml
from dckd_sr import option_checks as checks
from dckd_sr import option_files as files
from dckd_sr import option_keys as keys
from dckd_sr.commands import Parser, parser
from dckd_sr.errors import UserError, entry_point
from dckd_sr.option_checks import Report, check_file  # noqa: F401  (check_file: for entry points)
from dckd_sr.option_files import OptionError, apply_overrides

# ---------------------------------------------------------------------------------------------------------------------
# Entry points


def parse(argv, is_train=True, command=None):
    """Read a command line and the option file that it names.

    Args:
        argv (list[str]): arguments, without the program's name.
        is_train: for training or for a test.
        command: a parser with more arguments than ``parser(is_train)``.

    Returns:
        tuple[dict, argparse.Namespace, list[str]]: options, arguments (opt is the file that was found), warnings.

    Raises:
        OptionError: as `load`. SystemExit: --help (0), or a wrong command line (2).
    """
    args = (command or parser(is_train)).parse_args(argv)
    opt, warnings = load(
        args.opt, args.force_yml, is_train, debug=args.debug, launcher=args.launcher, auto_resume=args.auto_resume
    )
    args.opt = str(files.find(args.opt)[0])
    return opt, args, warnings


def load(path, overrides=(), is_train=True, root_path=None, debug=False, launcher='none', auto_resume=False):
    """Read, override, check and resolve an option file; creates nothing on disk.

    Args:
        path: the file, or the name of one that comes with this package.
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
    file, report = files.read(path), Report()
    if file.shipped:
        report.warn(f'-opt {path}', f'read from {file.path}, which comes with dckd_sr')
    apply_overrides(file.options, overrides)
    opt = resolve(file.options, is_train, report, debug, launcher, auto_resume, root_path)
    if report.problems:
        raise OptionError(report.problems, file.path if file.shipped else path)
    return opt, report.warnings


def read_file(path):
    """An option file as written, with its bases merged in; see `option_files.read` for the errors."""
    return files.read(path).options


def check(opt, is_train=True):
    """Check an option dict, as read from a file, without changing it.

    Returns:
        tuple[list[str], list[str]]: problems, warnings.
    """
    report = Report()
    resolve(opt, is_train, report)
    return report.problems, report.warnings


def to_yaml(opt):
    """The text of an option file that loads again, and gives these resolved options."""
    return safe_yaml.dump(portable(opt))


def portable(opt):
    """Resolved options without what a run adds: ranks, output paths."""
    opt = {key: value for key, value in opt.items() if key not in keys.RUNTIME_KEYS}
    opt['path'] = {key: value for key, value in opt['path'].items() if key not in keys.RUNTIME_PATHS}
    opt['datasets'] = {
        name: {key: value for key, value in block.items() if key not in keys.RUNTIME_DATASET_KEYS}
        for name, block in opt['datasets'].items()
    }
    return opt


# ---------------------------------------------------------------------------------------------------------------------
# Resolving


def resolve(raw, is_train, report, debug=False, launcher='none', auto_resume=False, root_path=None):
    """Check a dict as read from a file and complete it; problems and warnings go to the report.

    Returns:
        dict: a new one, with what BasicSR's parse_options gives. Of use only where there are no problems.
    """
    raw = copy.deepcopy(raw)
    import_modules(raw.get('imports'), report)
    rename(raw, report)
    report.lacks_scale = raw.get('scale') is None
    checks.resolve_zoo(report, raw)
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
    classes = {name: checks.check_network(report, opt, name, is_train or name == 'g') for name in networks}
    classes = {name: cls for name, cls in classes.items() if cls is not None}
    if 'g' in classes and 't' in classes:
        checks.check_channels(report, opt, classes['g'], classes['t'])
    if is_train and 'g' in classes and 'vqgan' in classes:
        checks.check_encoder_channels(report, opt, classes['g'])
    if is_train:
        checks.check_train(report, opt, spec)
        checks.check_speed(report, opt, spec, given)
        if 't' in spec.networks:
            checks.check_distillation(report, opt, given)
    elif train_raw is not None:
        opt['train'] = train_raw
    checks.check_paths(report, opt, is_train)
    checks.check_val(report, opt)
    opt['datasets'] = checks.check_datasets(report, opt, datasets, is_train)
    if is_train:
        checks.check_teacher_cache(report, opt, spec)
        checks.check_batches(report, opt)
    finish(opt, is_train, report, debug, launcher, auto_resume, root_path)
    return opt


def import_modules(entries, report):
    """Import what `imports` names, see `imports.load`."""
    for entry in entries if isinstance(entries, list) else [entries]:
        if not keys.is_entry(entry):
            continue  # the check of the section says so
        try:
            for note in imports.load(entry):
                report.warn('imports', note, entry)
        except UserError as error:
            report.error('imports', str(error), entry)


def rename(opt, report):
    """Give keys of older option files their present names, and drop those without meaning, in place."""
    sections = [(name, name, opt.get(name)) for name in ('path', 'val')]
    if isinstance(opt.get('datasets'), dict):
        sections += [('datasets', f'datasets.{name}', block) for name, block in opt['datasets'].items()]
    for table, where, block in sections:
        if not isinstance(block, dict):
            continue
        for old, new in keys.RENAMED.get(table, {}).items():
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
        report.error('model_type', checks.no_such('model', name, types), opt['model_type'])
    train = opt['train'] if isinstance(opt.get('train'), dict) else {}
    if 'grad_clip' not in train:
        for key, value in keys.TYPE_DEFAULTS.get(name, {}).items():
            train.setdefault(key, value)
    ours = [key for key in keys.DROP_IN_NETWORKS if opt.get(key)]
    ours += [f'train.{key}' for key in keys.DROP_IN_LOSSES if train.get(key)]
    if name in keys.DROP_IN_TYPES and ours:
        if is_train:
            report.warn('model_type', f'runs as DCKDModel, because the file has {", ".join(ours)}', name)
        name = 'DCKDModel'
    fast = [key for key in keys.SPEED_KEYS if opt.get(key)]
    if name in keys.SPEED_TYPES and fast and is_train:
        report.warn('model_type', f'runs as KDModel, because the file has {", ".join(fast)}', name)
        name = 'KDModel'
    ancestry = [cls for cls in types[name].__mro__ if cls.__module__.startswith('dckd_sr.')] if name in types else []
    report.strict = bool(ancestry) and ancestry[0] is types[name]
    report.known = name in types and checks.is_known(types[name])
    report.read = checks.texts_in(types[name]) if name in types else frozenset()
    # A model that derives from one of ours has its keys.
    inherited = next((keys.MODELS[cls.__name__] for cls in ancestry if cls.__name__ in keys.MODELS), keys.OTHER_MODEL)
    return name, keys.MODELS.get(name, inherited)


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
    kind = opt.get('device')
    if kind not in (None, *devices.available()):
        report.error('device', f'not usable here; expected one of {", ".join(devices.available())}', kind)
    if kind in ('mps', 'xpu') and opt['dist']:
        report.error('device', f'trains in one process here, without --launcher {launcher}', kind)
    if kind in ('cpu', 'mps', 'xpu'):
        opt['num_gpu'] = int(kind != 'cpu')
        return
    if kind == 'cuda' and opt['num_gpu'] == 0:
        report.error('device', 'num_gpu is 0, which asks for the CPU; expected another num_gpu, or no device', kind)
    wanted, there = opt['num_gpu'], torch.cuda.device_count()
    wanted = there if wanted == 'auto' else wanted
    opt['num_gpu'] = min(wanted, there) if opt['dist'] else min(wanted, there, 1)
    if wanted <= opt['num_gpu']:
        return
    if there == 0:
        others = [kind for kind in devices.available() if kind not in ('cpu', 'cuda')]
        text = f'no GPU here, the CPU is used{"".join(f" (device: {kind} asks for what is here)" for kind in others)}'
    elif there < wanted:
        text = f'{there} here'
    else:
        text = 'a run that torchrun did not start uses one'
    if opt['is_train']:
        count = os.environ.get('WORLD_SIZE' if launcher == 'pytorch' else 'SLURM_NTASKS', '1') if opt['dist'] else '1'
        batch = opt['datasets'].get('train', {}).get('batch_size_per_gpu', 1)
        text += f'; the effective batch is {batch} x {count} = {batch * int(count)}'
    report.warn('num_gpu', text, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@entry_point()
def main(argv=None):
    """``python -m dckd_sr.options``.

    Returns:
        exit code: 0 done, 2 a mistake in options or arguments (one message, no traceback).
    """
    from dckd_sr import option_schema, option_show  # they read what is defined above

    top = Parser(prog='python -m dckd_sr.options', description='Look at option files.')
    commands = top.add_subparsers(dest='command', required=True, metavar='COMMAND')
    option_show.add_command(commands)
    option_schema.add_command(commands)

    args = top.parse_args(argv)
    args.run(args)


if __name__ == '__main__':
    sys.exit(main())
