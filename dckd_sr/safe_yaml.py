"""YAML as people write option files: plain values only, ``1e-4`` is a number, a key that is set twice is a mistake."""

import json
import re

import yaml

from dckd_sr.errors import UserError, one_line

# PyYAML follows YAML 1.1, where a float needs a point and its exponent a sign; these are YAML 1.2's.
_FLOAT = re.compile(r'[-+]?((\.\d+|\d+\.\d*)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))\Z|\.(nan|NaN|NAN)\Z')
_PREFIX = 'tag:yaml.org,2002:'
_DEPTH, _SIZE = 100, 100_000  # of an option file: levels, and values with those that aliases repeat
BACKSLASHES = 'in double quotes \\ begins an escape such as \\n; use single quotes, or / in the place of \\'
_TAGS = {_PREFIX + name for name in ('null', 'bool', 'int', 'float', 'str', 'seq', 'map', 'merge')}


class YAMLError(UserError):
    """A text that is no plain YAML.

    Attributes:
        problems (list[str]): one each, with its line.
    """

    def __init__(self, problems):
        self.problems = [one_line(problem) for problem in problems]
        super().__init__('\n'.join(self.problems))


class _Loader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):
    """PyYAML's safe loader without dates, with YAML 1.2's floats."""


class _Dumper(getattr(yaml, 'CSafeDumper', yaml.SafeDumper)):
    """Its counterpart, which quotes text that the loader would take for a number."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != _PREFIX + 'timestamp']
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_PREFIX + 'float', _FLOAT, list('-+.0123456789'))
_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def parse(text):
    """Parse one document.

    Returns:
        dict, list, str, int, float, bool or None; aliases (``*name``) are copies.

    Raises:
        YAMLError: bad syntax, duplicate keys, any tag that is not plain, such as ``!!python/object``, or more levels or
            values than an option file ever has.
    """
    return parse_with_lines(text)[0]


def parse_with_lines(text):
    """Parse one document, and say where its keys stand.

    Returns:
        tuple: the value as `parse` gives it, and a dict: path of a key (tuple of names) -> its line, from 1. Keys that
        come through ``<<`` stand where they were written.
    """
    loader = None
    try:
        _check_depth(text)
        loader = _Loader(text)
        loader.text = text
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > _SIZE:
            raise YAMLError([f'more than {_SIZE} values, with those that aliases repeat'])
        problems = [] if node is None else list(_problems(node, loader, ()))
        if not problems:
            value = None if node is None else _separate(loader.construct_document(node))
            return value, dict(_lines(node))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, 'problem_mark', None)
        where = f'line {mark.line + 1}, column {mark.column + 1}: ' if mark else ''
        problem = str(getattr(error, 'problem', None) or error).replace('\n', ' ')
        escape = 'escape' in problem or 'hexdecimal' in problem
        problems = [where + problem + (f': {BACKSLASHES}' if escape else '')]
    finally:
        if loader is not None:
            loader.dispose()
    raise YAMLError(problems)


def is_yaml(text):
    """Whether a text has YAML's syntax, whatever its tags."""
    try:
        _check_depth(text)
        yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        return False
    except YAMLError:
        pass  # too much of it
    return True


def dump(value):
    """Plain values as YAML, in the given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def inline(value):
    """A plain value as YAML in one line."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=1 << 30)
    text = text.removesuffix('...\n').rstrip('\n')
    # YAML writes a line break as one, JSON as \n.
    return json.dumps(value, ensure_ascii=False) if '\n' in text else text


def _check_depth(text):
    """Refuse a text of too many levels: PyYAML's C code composes them by recursion, and the process is gone.

    From 6.0.4 on it refuses 1000 itself, and looks ahead: it may do so before this has seen 100 of them.
    """
    loader, depth = _Loader(text), 0
    try:
        while loader.check_event():
            event = loader.get_event()
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEPTH:
                raise YAMLError([f'line {event.start_mark.line + 1}: more than {_DEPTH} levels'])
    except yaml.MarkedYAMLError as error:
        if 'nesting depth' not in (error.problem or ''):
            raise
        raise YAMLError([f'line {error.problem_mark.line + 1}: more than {_DEPTH} levels']) from error
    finally:
        loader.dispose()


def _size(node, sizes):
    """The number of values that a node stands for; each alias counts whole."""
    if id(node) not in sizes:
        sizes[id(node)] = 0  # until it is known: a block in itself is told elsewhere
        items = node.value if isinstance(node, yaml.CollectionNode) else ()
        inner = [part for item in items for part in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in inner)
    return sizes[id(node)]


def _problems(node, loader, parents):
    """What a node holds that an option file may not: other tags, duplicate keys, keys that are no text, loops."""
    where = f'line {node.start_mark.line + 1}: '
    if node in parents:
        yield where + 'this block contains itself'
    elif node.tag not in _TAGS:
        yield where + f'the tag {node.tag.replace(_PREFIX, "!!")} is not allowed, values are plain YAML'
    elif isinstance(node, yaml.ScalarNode):
        if node.style == '"' and re.match(r'"[A-Za-z]:\\[^\\"]', loader.text[node.start_mark.index :]):
            yield where + _shown(loader.text[node.start_mark.index : node.end_mark.index]) + f': {BACKSLASHES}'
        try:
            loader.construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError):
            yield where + f"'{_shown(node.value)}' is not of the type {node.tag.replace(_PREFIX, '!!')}"
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _problems(item, loader, (*parents, node))
    else:
        lines = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag != _PREFIX + 'merge':
                if key.tag != _PREFIX + 'str':
                    yield f'line {line}: the key {key.value!r} is not text, write it in quotes'
                elif key.value in lines:
                    yield f"line {line}: the key '{key.value}' is already set in line {lines[key.value]}"
                lines.setdefault(str(key.value), line)
            yield from _problems(value, loader, (*parents, node))


def _shown(text):
    return text if len(text) <= 80 else f'{text[:77]}...'


def _lines(node, path=()):
    """(path, line) of each key of a node that was constructed, which brought in what ``<<`` names, overridden last."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        yield (*path, key.value), key.start_mark.line + 1
        yield from _lines(value, (*path, key.value))


def _separate(value):
    """The same values, with a copy wherever an alias shares one."""
    if isinstance(value, dict):
        return {key: _separate(item) for key, item in value.items()}
    return [_separate(item) for item in value] if isinstance(value, list) else value
