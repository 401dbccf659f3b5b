"""What `imports:` of an option file names: modules, files and folders that register archs, losses, models, ...

    imports: [my_package.archs, ../BSRN/basicsr/archs/BSRN_arch.py, my_archs/]

Files are loaded where they lie. Forks of BasicSR carry a `basicsr` folder of their own, which must not hide the one
that is installed: of it, only what BasicSR does not have is taken, for the files that ask for it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import types
import zlib
from collections.abc import Iterable
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from basicsr.utils.registry import ARCH_REGISTRY, Registry

from dckd_sr import option_keys as keys
from dckd_sr.errors import UserError

ADVICE = 'name its module, file or folder in imports: if it is your own'
_ROOTS = ('.git', 'setup.py', 'pyproject.toml', 'README.md', 'requirements.txt')  # what marks the folder of a project
_loaded = {}  # file -> module


def load(entry: str) -> list[str]:
    """Import what one entry names; a second time does nothing.

    Args:
        entry: a module, looked for among what is installed, then in the current folder; or the path of a file or
            folder. Of a folder, the files are loaded that register something.

    Returns:
        warnings.

    Raises:
        UserError: not there, or an error while it is imported.
    """
    path = Path(keys.expand(entry))
    by_path = not keys.is_module_name(entry) or path.is_file() or entry.endswith('.py')
    if by_path or (path.is_dir() and not _is_module(entry)):
        if path.is_dir():
            return _load_folder(path)
        if path.is_file():
            return _load_file(path, replaces=True)
        raise UserError(f'no such module, file or folder; looked for in {os.getcwd()}')
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    if entry in sys.modules:
        return []
    with _registering(replaces=True) as (notes, new):
        try:
            module = importlib.import_module(entry)
        except (Exception, SystemExit) as error:  # whatever a module does when it is imported
            absent = isinstance(error, ModuleNotFoundError) and f'{entry}.'.startswith(f'{error.name}.')
            if absent:
                raise UserError(f'no such module: {error.name} is neither installed nor in {folder}') from error
            raise UserError(f'cannot be imported: {_cause(error)}') from error
        if not new and hasattr(module, '__path__'):  # a package whose files nothing reads
            with contextlib.suppress(UserError):
                notes += _load_folder(Path(module.__path__[0]))
    return notes


def located(entries: object, folders: Iterable[Path]) -> object:
    """`imports` of an option file, with the paths of entries that the current folder lacks and one of these has.

    Args:
        entries: the value of the key, of whatever type.
        folders: where the option file lies, and the like.
    """
    if isinstance(entries, list):
        return [located(entry, folders) for entry in entries]
    if not isinstance(entries, str) or not entries.strip() or os.path.exists(keys.expand(entries)):
        return entries
    names = [entries]
    if keys.is_module_name(entries):
        inner = entries.replace('.', os.sep)
        if _is_module(entries.partition('.')[0]) or any(os.path.exists(name) for name in (inner, f'{inner}.py')):
            return entries
        names += [f'{inner}.py', inner]
    places = (Path(folder, name) for folder in folders for name in names)
    return next((str(place.resolve()) for place in places if place.exists()), entries)


def _is_module(name):
    """Whether a name is an installed module or one of the current folder: not a mere folder, which Python admits."""
    try:
        spec = importlib.util.find_spec(name) or PathFinder.find_spec(name, [os.getcwd()])
    except (ImportError, ValueError, AttributeError):  # of a parent that is none; of `__main__`
        return False
    return spec is not None and spec.origin is not None


def _cause(error):
    text = (str(error).splitlines() or [''])[0]
    return f'{type(error).__name__}: {text}' if text else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _load_folder(folder):
    texts = {file: file.read_text(encoding='utf-8', errors='replace') for file in sorted(folder.glob('*.py'))}
    files = [file for file, text in texts.items() if '_REGISTRY.register' in text]
    if not files:
        raise UserError('no file in this folder registers anything (such as @ARCH_REGISTRY.register()); name the file')
    notes, failed = [], []
    for file in files:
        try:
            notes += _load_file(file, replaces=False)
        except UserError as error:
            failed.append(f'{file.name} is left out: {error}')
    if len(failed) == len(files):
        raise UserError('; '.join(failed))
    return notes + failed


def _load_file(file, replaces):
    """Load a file as a module of its own; one that registers nothing has its networks registered under their names."""
    file = file.resolve()
    if file in _loaded:
        return []
    # The packages around it are known by their paths alone: relative imports find them, their code is not run.
    packages, top = [], file.parent
    while (top / '__init__.py').is_file():
        packages, top = [top, *packages], top.parent
    name = f'imports_{zlib.crc32(str(top).encode()):08x}'
    for package in [top, *packages]:
        name = name if package == top else f'{name}.{package.name}'
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(package)]
    name = f'{name}.{file.stem}'
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise UserError('expected a Python file, NAME.py')
    module = importlib.util.module_from_spec(spec)
    _beside.search([file.parent, top, *_project(file)])
    with _registering(replaces) as (notes, new):
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # whatever a file does when it is run
            del sys.modules[name]
            raise UserError(f'cannot be imported: {_cause(error)}') from error
        if not new:
            notes += _register_networks(module)
    _loaded[file] = module
    return notes


def _project(file):
    """The folder of the project that a file belongs to, if one of those above it looks like it."""
    return [next((str(above) for above in list(file.parents)[:5] if any((above / n).exists() for n in _ROOTS)), None)]


def _register_networks(module):
    networks = [
        value for value in vars(module).values() if isinstance(value, type) and issubclass(value, torch.nn.Module)
    ]
    own = [
        network
        for network in networks
        if network.__module__ == module.__name__ and network.__name__ not in ARCH_REGISTRY
    ]
    for network in own:
        ARCH_REGISTRY.register(network)
    return [] if own else ['nothing in it registers an arch, a loss, a dataset, a model or a metric']


@contextlib.contextmanager
def _registering(replaces):
    """While files register: a name that is taken goes to the file that was named, not to one of a named folder.

    BasicSR would stop with an assertion. A file that is read again, as a part of another, changes nothing.
    """
    notes, new, original = [], set(), Registry._do_register

    def register(self, name, obj, suffix=None):
        key = f'{name}_{suffix}' if isinstance(suffix, str) else name
        taken = self._obj_map.get(key)
        if (key, obj.__module__) in new:
            original(self, name, obj, suffix)  # twice in one file: BasicSR's own message
        new.add((key, obj.__module__))
        if taken is not None and _source(taken) != _source(obj):
            ours, theirs = (f'{_source(each)}' for each in (obj, taken))
            if replaces:
                notes.append(f'{self._name} {name} is that of {ours}, in place of {theirs}')
                self._obj_map[key] = obj
            else:
                notes.append(f'{self._name} {name} is that of {theirs}; the one of {ours} is not used')
        elif taken is None:
            self._obj_map[key] = obj

    Registry._do_register = register
    try:
        yield notes, new
    finally:
        Registry._do_register = original


def _source(obj):
    return getattr(sys.modules.get(obj.__module__), '__file__', None) or obj.__module__


class _Beside:
    """Finds what files that were loaded by path import and nothing else has: beside them, or in their project.

    Of packages that are loaded and carried by a project as well (`basicsr`), it finds the modules that are missing.
    """

    def __init__(self):
        self.folders, self.found = [], []

    def search(self, folders):
        """Look in these first. Modules that lie beside an earlier file are not those that this one means."""
        for name in self.found:
            sys.modules.pop(name, None)
        self.found = []
        new = [str(folder) for folder in folders if folder is not None]
        self.folders = list(dict.fromkeys([*new, *self.folders]))
        if self not in sys.meta_path:
            sys.meta_path.append(self)

    def find_spec(self, name, path=None, target=None):
        *packages, _ = name.split('.')
        if packages[:1] not in ([], ['basicsr']):
            return None
        spec = PathFinder.find_spec(name, [os.path.join(folder, *packages) for folder in self.folders])
        if spec is not None:
            self.found.append(name)
        return spec


_beside = _Beside()
