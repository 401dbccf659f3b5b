"""Option files on disk: finding them by name, reading them with what they build on (``_base_``), overriding keys.

    file = read('train_edsr_x4')
    apply_overrides(file.options, ['train:total_iter=1000'], file.origins)

A file with ``_base_: NAME``, or a list of names, changes what those files say. Blocks are merged key by key, but

- a block whose ``type`` differs from the base's replaces it whole, because its other keys belong to another class;
- lists are replaced, not joined;
- an empty value (``~`` or ``null``) takes the base's block away;
- where a file names other weights, the base's entry of them (``param_key``) and whether they must fit (``strict_load``)
  are dropped, because they belong to the base's weights; so are the base's weights of a network that brings its own.

The same holds for the value of an override (``--force_yml train:cl_opt=null``), and a block that is empty in a file
without a base is as if it were not there. Later names of a list win over earlier ones, and the file wins over all. A
base is looked for beside the file that names it, then among the option files that come with this package, with or
without ``.yml``.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from dckd_sr import imports, safe_yaml
from dckd_sr import option_checks as checks
from dckd_sr import option_keys as keys
from dckd_sr.errors import SeveralErrors, looked_in

BASE = '_base_'
_LARGEST = 4 << 20  # bytes of an option file


class OptionError(SeveralErrors):
    """Mistakes in an option file or an override: full path of the key, its value, what was expected."""


@dataclass
class OptionFile:
    """An option file with its bases merged in.

    Attributes:
        path (Path): where it was found.
        shipped (bool): found by name, among the files that come with this package.
        options (dict): as written, without ``_base_``.
        origins (dict): path of a key (tuple of names) -> where its value was written, ``file:line``.
    """

    path: Path
    shipped: bool
    options: dict
    origins: dict


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def shipped_root():
    """The folder that holds ``options`` and the demo's weights: the clone's, or the copy inside an installed wheel."""
    package = Path(__file__).resolve().parent
    return package / 'shipped' if (package / 'shipped').is_dir() else package.parent


def find(name):
    """An option file by its path, or by its name among the shipped ones.

    Args:
        name: a path, with or without ``.yml``; ``train_edsr_x4``, ``options/train_edsr_x4.yml`` and ``demo/distill``
            also name shipped files.

    Returns:
        tuple[Path, bool]: the file, and whether it is a shipped one that was found by name. The path as given if there
        is none.
    """
    given = Path(keys.expand(name))
    for file in _spellings(given):
        if os.path.isfile(file):
            return file, False
    file = _shipped(given)
    return (given, False) if file is None else (file, True)


def _spellings(path):
    bare = path.name and path.suffix not in ('.yml', '.yaml')
    return [path, path.with_name(f'{path.name}.yml')] if bare else [path]


def _shipped(name):
    """The shipped option file of a name, or None."""
    if name.is_absolute() or '..' in name.parts or not name.name:
        return None
    if name.parts[0] == 'options':
        name = Path(*name.parts[1:])
    files = [shipped_root() / 'options' / spelling for spelling in _spellings(name)] if name.name else []
    return next((file for file in files if os.path.isfile(file)), None)


def _similar(path, reader=None):
    """A hint at the option file meant, among those beside it (but its reader) and those that come with this package."""
    known = {}
    beside = path.parent.glob('*.yml') if os.path.isdir(path.parent) else ()
    for other in [*(shipped_root() / 'options').rglob('*.yml'), *beside]:
        if other != reader:
            known.setdefault(other.stem, other)
    meant = checks.meant(path.stem if path.suffix in ('.yml', '.yaml') else path.name, known)
    return f" (did you mean '{known[meant]}'?)" if meant else ''


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(name):
    """Read an option file and everything that it builds on.

    Args:
        name: see `find`.

    Returns:
        OptionFile.

    Raises:
        OptionError: missing, unreadable, empty, no mapping, not plain YAML, a base that is not there or that comes back
        to the file. One line names the files that led to a base.
    """
    path, shipped = find(name)
    options, origins = _read(path, (), name)
    return OptionFile(path, shipped, options, origins)


def _read(path, above, name):
    """Options and origins of a file that those in `above` led to; `name` is what the user wrote."""
    chain = ' -> '.join(shown(file) for file in (*above, path)) if above else f'-opt {name}'
    try:
        with open(path, 'rb') as file:
            content = file.read(_LARGEST + 1)  # a device may never end
        text = content.decode('utf-8-sig')
    except FileNotFoundError:
        raise OptionError([f'{chain}: no such file{looked_in(path)}{_similar(path)}']) from None
    except UnicodeDecodeError:
        raise OptionError([f'{chain}: not a UTF-8 text file']) from None
    except (OSError, ValueError) as error:  # the latter of a zero byte in the name
        reason = 'a folder, not a file' if os.path.isdir(path) else getattr(error, 'strerror', None) or error
        raise OptionError([f'{chain}: {reason}']) from None
    if len(content) > _LARGEST:
        raise OptionError([f'{chain}: more than {_LARGEST >> 20} MB, no option file'])
    try:
        own, lines = safe_yaml.parse_with_lines(text)
    except safe_yaml.YAMLError as error:
        raise OptionError(error.problems, chain if above else name) from None
    if not isinstance(own, dict):
        raise OptionError([f'{chain}: {"empty" if own is None else "not made of `key: value` lines"}'])
    label, bases = shown(path), own.pop(BASE, None)
    if 'imports' in own:
        # A run's resolved.yml lies in experiments/NAME of the folder that the run was started in.
        around = [path.parent, path.resolve().parent.parent.parent] if path.name == 'resolved.yml' else [path.parent]
        own['imports'] = imports.located(own['imports'], around)
    own_origins = {key: f'{label}:{line}' for key, line in lines.items() if key[0] != BASE}
    options, origins = {}, {}
    for base in bases if isinstance(bases, list) else [bases] if bases is not None else ():
        if not isinstance(base, str) or not base.strip():
            raise OptionError([f'{chain}: {BASE} = {base}: expected the name of an option file, or a list of names'])
        file = _find_base(base, path, above, chain)
        merge(options, *_read(file, (*above, path), base), origins)
    merge(options, own, own_origins, origins)
    return options, origins


def _find_base(name, path, above, chain):
    """The file that `path` names as its base: beside it, then shipped; never itself."""
    given = Path(keys.expand(name))
    candidates = [file for file in _spellings(path.parent / given) if os.path.isfile(file)]
    candidates += [file for file in [_shipped(given)] if file is not None]
    others = [file for file in candidates if not file.samefile(path)]
    if not candidates:
        hint = _similar(path.parent / given, path)
        raise OptionError([f'{chain}: {BASE} = {name}: not beside it and not among the shipped option files{hint}'])
    for file in above:
        if others and file.samefile(others[0]):
            raise OptionError([f'{chain}: {BASE} = {name}: leads back to {shown(file)}, which builds on this file'])
    if not others:
        raise OptionError([f'{chain}: {BASE} = {name}: the file itself'])
    return others[0]


def shown(path):
    """A path as messages show it: relative where it lies under the current folder."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive
        return str(path)
    return str(path) if relative.startswith('..') else relative


def merge(options, over, over_origins, origins, path=()):
    """Change options, and where they come from, to what `over` says; see the module for how."""
    for where in list(_of_other_weights(options, over, path)):
        (options if where[:-1] == path else options['path']).pop(where[-1], None)
        origins.pop(where, None)
    for key, value in over.items():
        where, block = (*path, key), options.get(key)
        together = isinstance(value, dict) and isinstance(block, dict)
        if together and (block.get('type') is None or value.get('type') in (None, block['type'])):
            origins[where] = over_origins[where]
            merge(block, value, over_origins, origins, where)
            continue
        replace(options, where, value, origins)
        if key in options:
            origins.update({name: origin for name, origin in over_origins.items() if name[: len(where)] == where})


def replace(block, path, value, origins):
    """Put a value in the place of what a block has under the last name of a path, or under an older name of that key.

    An empty value (None) in the place of a block takes the block away.
    """
    key, former = path[-1], block.get(path[-1])
    for name in (path, *other_names(path)):
        for old in [inner for inner in origins if inner[: len(name)] == name]:
            del origins[old]
        if name != path:
            block.pop(name[-1], None)
    if value is None and isinstance(former, dict):
        del block[key]
    else:
        block[key] = value


def _of_other_weights(options, over, path):
    """Paths of the keys that say how the base's weights are read, where `over` names other ones, or brings its own."""
    for key, value in over.items():
        block = options.get(key)
        if not path and key.startswith('network_') and isinstance(value, dict) and isinstance(block, dict):
            own = any(value.get(name, block.get(name)) != block.get(name) for name in ('type', 'name', 'path'))
            paths = options.get('path')
            if own and value.get('type', block.get('type')) in ('zoo', *keys.OWN_WEIGHTS) and isinstance(paths, dict):
                said = over.get('path') if isinstance(over.get('path'), dict) else {}
                yield from _keys_of_weights(paths, said, ('path',), key[len('network_') :], ('pretrain_network',))
        elif path == ('path',):
            name = keys.RENAMED['path'].get(key, key)
            former = [options[n] for n in (key, *(p[-1] for p in other_names((*path, key)))) if n in options]
            if name.startswith('pretrain_network_') and former and former[0] not in (None, value):
                yield from _keys_of_weights(options, over, path, name[len('pretrain_network_') :])
        elif path and key in ('pretrain', 'path') and block not in (None, value):
            if 'param_key' in options and 'param_key' not in over:
                yield (*path, 'param_key')


def _keys_of_weights(paths, said, path, role, also=()):
    """Those keys of a section `path` that are about one network's weights and that `said` does not set."""
    for name in (*also, 'param_key', 'strict_load'):
        spellings = [(*path, f'{name}_{role}'), *other_names((*path, f'{name}_{role}'))]
        if not any(spelling[-1] in said for spelling in spellings):
            yield from (spelling for spelling in spellings if spelling[-1] in paths)


def other_names(path):
    """The paths of the names that are read as the same key, in older option files or now."""
    section = 'path' if path[:-1] == ('path',) else 'datasets' if path[0] == 'datasets' and len(path) == 3 else None
    table = keys.RENAMED.get(section, {})
    now = table.get(path[-1], path[-1])
    return [(*path[:-1], name) for name in (now, *table) if table.get(name, name) == now and name != path[-1]]


# ---------------------------------------------------------------------------------------------------------------------
# Overriding


def apply_overrides(opt, overrides, origins=None):
    """Set the ``a:b=value`` entries of --force_yml in opt; values are YAML, keys may be new, null takes a block away.

    Args:
        origins: see `OptionFile`; gets the overridden keys.

    Raises:
        OptionError: an entry without ``=``, one that leads through a plain value, a value with a YAML tag, or the home
            folder where a block or a plain name belongs, because a shell wrote it in the place of ``~``.
    """
    problems, origins = [], {} if origins is None else origins
    for entry in overrides or ():
        path, equals, text = entry.partition('=')
        names = [name.strip() for name in path.split(':')]
        if not equals or not all(names):
            problems.append(f'--force_yml {entry}: expected key:key=value')
            continue
        if names == [BASE]:
            problems.append(f'--force_yml {entry}: only a file can have a base')
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
            taken_for_block = isinstance(block.get(names[-1]), dict) or len(names) == 1 and names != ['imports']
            if taken_for_block and value == keys.expand('~') != '~':
                key = ':'.join(names)
                text = f'this is your home folder, which the shell wrote in the place of ~; write {key}=null'
                problems.append(f'--force_yml {entry}: {text}')
                continue
            replace(block, tuple(names), value, origins)
            if names[-1] in block:
                origins.update(dict.fromkeys(_paths(value, tuple(names)), '--force_yml'))
    if problems:
        raise OptionError(problems)


def _paths(value, path):
    """The path of a value and of everything in it."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from _paths(item, (*path, key))


def _override_value(text):
    if text.lower() == 'none':
        return None
    # A file name template such as {}x4 would be a YAML mapping; other text that is no YAML is meant as text.
    return text if text.startswith('{}') or not safe_yaml.is_yaml(text) else safe_yaml.parse(text)
