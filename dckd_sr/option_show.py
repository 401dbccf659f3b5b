"""``python -m dckd_sr.options show FILE``: an option file as a run would see it, with where each value came from.

Each line that holds a value ends with a comment: ``FILE:LINE``, of the file or of one of its bases; ``--force_yml``;
``default``; or ``derived``, from other values or from the machine. The rest is the text of an option file.
"""

import inspect

from dckd_sr import option_checks as checks
from dckd_sr import option_files as files
from dckd_sr import option_keys as keys
from dckd_sr import options, safe_yaml

_COLUMN = 60  # of the comments, where the value leaves room


def add_command(commands):
    """Add ``show`` to the subparsers of ``python -m dckd_sr.options``."""
    command = commands.add_parser('show', help='print the resolved file and where each value came from')
    command.add_argument('file', metavar='FILE', help='option file, or the name of a shipped one')
    command.add_argument('--test', action='store_true', help='as a test resolves it; otherwise as a training does')
    command.add_argument('--force_yml', nargs='+', metavar='A:B=VALUE', help='as in training and testing')
    command.set_defaults(run=_run)


def _run(args):
    text, report, path = show(args.file, args.force_yml, not args.test)
    print(text, end='')
    if report.problems:
        raise files.OptionError(report.problems, path)


def show(path, overrides=(), is_train=True):
    """Resolve an option file and note where its values came from.

    Args:
        path, overrides, is_train: see `options.load`.

    Returns:
        tuple[str, options.Report, pathlib.Path]: YAML with comments, also of a file with problems (as far as it could
        be resolved); problems and warnings; the file that was found.

    Raises:
        OptionError: see `option_files.read` and `option_files.apply_overrides`.
    """
    file, report = files.read(path), checks.Report()
    files.apply_overrides(file.options, overrides, file.origins)
    opt = options.portable(options.resolve(file.options, is_train, report))
    _, spec = options.model_keys(file.options, checks.Report(), is_train)
    model, _ = checks.file_model(spec, is_train)
    lines = [f'# {files.shown(file.path)}, for {"training" if is_train else "a test"}']
    lines += [f'# {warning}' for warning in report.warnings]
    for path_, text in _lines(opt):
        if path_ is not None:
            text = f'{text:<{_COLUMN}}  # {_source(file, path_, _value(opt, path_), model)}'
        lines.append(text)
    return '\n'.join(lines) + '\n', report, file.path


def _lines(block, path=()):
    """(path of the key, or None for the head of a block; text) of each line."""
    indent = '  ' * len(path)
    for key, value in block.items():
        name = f'{indent}{safe_yaml.inline(key)}:'
        if isinstance(value, dict) and value:
            yield None, name
            yield from _lines(value, (*path, key))
        else:
            yield (*path, key), f'{name} {safe_yaml.inline(value)}'


def _value(opt, path):
    """The value at a path, or None."""
    for key in path:
        opt = opt.get(key) if isinstance(opt, dict) else None
    return opt


def _source(file, path, value, model):
    """Where a resolved value came from."""
    for written in [path, *files.other_names(path)]:
        there = _value(file.options, written)
        if written in file.origins and (there is not None or value is None):
            if written != path:
                return f'{file.origins[written]}, written {safe_yaml.inline({written[-1]: there})}'
            return file.origins[path] + ('' if there == value else f', written {safe_yaml.inline(there)}')
    return 'default' if _is_default(path, value, model, file.options) else 'derived'


def _is_default(path, value, model, raw):
    """Whether a value is what its section says for an empty key."""
    if path[0] == 'datasets':
        if len(path) < 3:
            return False  # no set is left
        kind = checks.bare((_value(raw, path[:2]) or {}).get('type'))
        model, path = checks.dataset_model(kind, path[1] == 'train'), path[2:]
    for i, key in enumerate(path):
        if model is None or key not in model.model_fields:
            return False
        field = model.model_fields[key]
        default = field.get_default(call_default_factory=True)
        if isinstance(default, dict):
            return _value(default, path[i + 1 :]) == value
        if i == len(path) - 1:
            return default == value
        kinds = [field.annotation, *getattr(field.annotation, '__args__', ())]
        model = next((kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, keys.Section)), None)
    return False
