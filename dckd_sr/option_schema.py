"""``python -m dckd_sr.options schema``: a JSON schema (draft 7) of option files, for completion and checks in editors.

It is generated from what the checks read: the sections of `option_keys`, and the signatures of everything that is
registered, so that it changes with them. A schema knows names, types and ranges of keys, and in a block with a ``type``
the arguments of that type. What needs more than one key, the disk or the defaults of a base is left to the checks:
nothing but the top level's own keys is required, because a file with ``_base_`` holds what it changes.
"""

import json
import re
from pathlib import Path

from basicsr.utils.registry import (
    ARCH_REGISTRY,
    DATASET_REGISTRY,
    METRIC_REGISTRY,
    MODEL_REGISTRY,
)

from dckd_sr import option_checks as checks
from dckd_sr import option_files as files
from dckd_sr import option_keys as keys
from dckd_sr import options, zoo
from dckd_sr.archs import ensemble_arch, vqgan_arch
from dckd_sr.errors import UserError

_NULL = {'type': 'null'}
_ARGUMENTS = {
    'truth': {'type': 'boolean'},
    'count': {'type': 'integer', 'minimum': 0},
    'number': {'type': 'number'},
    'number or null': {'type': ['number', 'null']},
    'size': {'anyOf': [{'type': 'number'}, {'type': 'array', 'items': {'type': 'number'}}]},
    'list': {'type': 'array'},
    'text': {'type': 'string'},
    None: {},
}
# pydantic leaves limits behind a validator in its own words.
_LIMITS = {
    'ge': 'minimum',
    'gt': 'exclusiveMinimum',
    'le': 'maximum',
    'lt': 'exclusiveMaximum',
    'min_length': 'minItems',
    'max_length': 'maxItems',
}


def add_command(commands):
    """Add ``schema`` to the subparsers of ``python -m dckd_sr.options``."""
    command = commands.add_parser('schema', help='print a JSON schema of option files, for editors')
    command.add_argument('-o', '--output', metavar='FILE', help='write it there instead')
    command.add_argument('--imports', nargs='+', default=[], metavar='MODULE', help='with what these modules register')
    command.set_defaults(run=_run)


def _run(args):
    report = checks.Report()
    for entry in args.imports:
        if not keys.is_entry(entry):
            report.error('--imports', 'expected a module, a file or a folder', entry)
    options.import_modules(args.imports, report)
    if report.problems:
        raise files.OptionError(report.problems)
    text = json.dumps(schema(), indent=1) + '\n'
    if args.output is None:
        print(text, end='')
        return
    try:
        Path(args.output).write_text(text, encoding='utf-8')
    except OSError as error:
        raise UserError(f'--output {args.output}: {error.strerror}') from error


def schema():
    """The schema of option files, with everything that is registered now.

    Returns:
        dict: JSON values.
    """
    definitions = {}
    archs = checks.known_types(ARCH_REGISTRY)
    networks, arch_values = {**archs, 'zoo': zoo.find}, {**keys.ARCH_VALUES, 'name': list(zoo.ENTRIES)}
    trained, encoder = ('allow_random',), ('pretrain', 'param_key', 'allow_random')
    _typed(definitions, 'network', networks, arch_values)
    _typed(definitions, 'network_t', networks, arch_values, also=trained)
    _typed(definitions, 'encoder', archs, keys.ARCH_VALUES, also=encoder)
    for where in ('loss', *keys.FEATURE_LOSSES):
        _typed(definitions, where, checks.losses_for(where), keys.LOSS_VALUES)
    _typed(definitions, 'metric', checks.known_types(METRIC_REGISTRY), filled=('img', 'img2'), also=('better',))
    _typed(definitions, 'optimizer', checks.optimizers(), filled=('params',))
    _typed(definitions, 'schedule', checks.schedulers(), filled=('optimizer', 'last_epoch'))
    for kind, in_training in (('dataset', False), ('dataset.train', True)):
        names = checks.known_types(DATASET_REGISTRY)
        for name in names:
            definitions[f'{kind}.{name}'] = _section(checks.dataset_model(name, in_training), definitions, 'datasets')
        definitions[kind] = _by_type(kind, names, 'dataset class')
    top = _section(keys.Top, definitions)
    letters = list(dict.fromkeys(name for spec in keys.MODELS.values() for name in spec.networks))
    top['properties'].update(
        {
            files.BASE: {
                'description': 'option files that this one changes: beside it, or shipped',
                'anyOf': [{'type': 'string'}, {'type': 'array', 'items': {'type': 'string'}}],
            },
            'datasets': {
                'type': 'object',
                'properties': {'train': _ref('dataset.train')},
                'patternProperties': {'^(val|test)(_.*)?$': {'anyOf': [_ref('dataset'), _NULL]}},
                'additionalProperties': False,
            },
            'network_his': {'description': 'true for the history network', 'type': ['boolean', 'null', 'object']},
            'path': {'type': ['object', 'null']},
            'train': {'type': ['object', 'null']},
            **{f'network_{name}': {'anyOf': [_ref(_network(name)), _NULL]} for name in letters},
        }
    )
    models = checks.known_types(MODEL_REGISTRY)
    top['properties']['model_type'] = {'enum': list(models), 'description': 'model class'}
    return {
        '$schema': 'http://json-schema.org/draft-07/schema#',
        'title': 'dckd_sr option file',
        **top,
        'allOf': [
            {
                'if': {'not': {'required': [files.BASE]}},
                'then': {'required': ['name', 'model_type', 'network_g', 'datasets']},
            },
            *(_model(name, definitions, letters) for name in models),
        ],
        'definitions': definitions,
    }


def _model(name, definitions, letters):
    """What a file of a model type has in `path` and `train`, and which networks."""
    known = 'DCKDModel' if name in keys.DROP_IN_TYPES else name  # it may gain our blocks
    spec = keys.MODELS.get(known, keys.OTHER_MODEL)
    model, _ = checks.file_model(spec, True)
    properties = {}
    for key in ('path', 'train'):
        section = model.model_fields[key].annotation
        block = _section(section, definitions, key)
        block['additionalProperties'] = spec is keys.OTHER_MODEL
        definitions[f'{key}.{name}'] = block
        properties[key] = {'anyOf': [_ref(f'{key}.{name}'), _NULL]}
    if spec is not keys.OTHER_MODEL:
        properties.update({f'network_{other}': False for other in letters if other not in spec.networks})
    return {'if': _is('model_type', name), 'then': {'properties': properties}}


def _network(name):
    return 'network_t' if name in ('t', 'vqgan') else 'network'


def _ref(name):
    return {'$ref': f'#/definitions/{name}'}


def _is(key, value):
    return {'properties': {key: {'const': value}}, 'required': [key]}


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def _section(model, definitions, table=None):
    """The schema of a section of `option_keys`; sections inside it become definitions.

    Args:
        table: its name in `option_keys.RENAMED`, for the earlier names of its keys.
    """
    found = model.model_json_schema(ref_template='#/definitions/{model}')
    for name, inner in found.pop('$defs', {}).items():
        definitions[name] = _tidy(inner)
    result = _tidy(found)
    result.setdefault('properties', {})
    for old, new in keys.RENAMED.get(table, {}).items():
        if new in result['properties']:
            result['properties'][old] = {'description': f'earlier name of {new}', 'deprecationMessage': f'now {new}'}
    for old, reason in keys.NEEDLESS.get(table, {}).items():
        result['properties'][old] = {'description': reason, 'deprecationMessage': f'without effect: {reason}'}
    return result


def _with_block(key, value):
    """The schema of a key, with what pydantic does not know: which blocks it holds, if its name says so."""
    if any(part.get('type') == 'number' for part in value.get('anyOf', ())):  # gradient_shares names blocks, too
        return value
    block = _ref(f'train.{key}') if f'train.{key}' in keys.FEATURE_LOSSES else None
    for pattern, kind in (('optim_.', 'optimizer'), ('scheduler', 'schedule'), ('.*_opt', 'loss')):
        block = block or (_ref(kind) if re.fullmatch(pattern, key) else None)
    if key == 'metrics':
        block = {'type': 'object', 'additionalProperties': _ref('metric')}
    if block is None:
        return value
    return {**{name: value[name] for name in ('description', 'default') if name in value}, 'anyOf': [block, _NULL]}


def _tidy(value, names=False):
    """Pydantic's schema in draft 7's words, without titles; every key of a section may be empty."""
    if isinstance(value, list):
        return [_tidy(item) for item in value]
    if not isinstance(value, dict):
        return value
    if names:
        return {key: _nullable(_with_block(key, _tidy(item))) for key, item in value.items()}
    result = {
        _LIMITS.get(key, key): _tidy(item, names=key == 'properties')
        for key, item in value.items()
        if key not in ('title', 'required') and not (key == 'default' and item is None)
    }
    if 'const' not in result and len(result.get('enum', ())) == 1:
        result['const'] = result.pop('enum')[0]
    return result


def _nullable(value):
    if _NULL in value.get('anyOf', ()) or not {'type', 'anyOf', 'allOf', 'enum', 'const', '$ref'} & set(value):
        return value
    outside = {key: value.pop(key) for key in ('description', 'default') if key in value}
    return {**outside, 'anyOf': [*value.pop('anyOf', ()), *([value] if value else []), _NULL]}


# ---------------------------------------------------------------------------------------------------------------------
# Blocks with a type


def _typed(definitions, kind, types, values=None, filled=(), also=()):
    """Definitions ``kind.NAME`` of each type, and `kind`, which chooses among them; see `option_checks.check_block`."""
    for name, cls in types.items():
        block = _arguments(cls, values if checks.is_known(cls) else None, filled, also)
        block['properties']['type'] = {'const': name}
        definitions[f'{kind}.{name}'] = block
    definitions[kind] = _by_type(kind, types)


def _by_type(kind, names, description='class'):
    return {
        'type': 'object',
        'properties': {'type': {'enum': list(names), 'description': description}},
        'allOf': [{'if': _is('type', name), 'then': _ref(f'{kind}.{name}')} for name in names],
    }


def _arguments(function, values, filled=(), also=()):
    """The schema of the arguments of a constructor or function."""
    named, open_ended = checks.parameters(function)
    texts = _argument_texts(function)
    properties = {}
    for name, parameter in named.items():
        if name in filled:
            continue
        entry = dict(_ARGUMENTS[checks.argument_kind(parameter)])
        if name in (values or {}):
            entry = {'enum': list(values[name])}
        elif name == 'encoder' and checks.is_known(function):
            entry = {'anyOf': [_ref('encoder'), _NULL]}
        elif name == 'networks' and function is ensemble_arch.Ensemble:
            entry = {'type': 'array', 'items': _ref('encoder'), 'minItems': 1}
        elif name == 'ddconfig' and function is vqgan_arch.VQGAN:
            entry = _arguments(vqgan_arch._check_ddconfig, None)
        default = _json(parameter.default)
        if default is not None:
            entry['default'] = default
        if name in texts:
            entry['description'] = texts[name]
        properties[name] = entry
    properties.update({name: {} for name in also})
    about = (function.__doc__ or '').strip().partition('\n\n')[0]
    return {
        'type': 'object',
        **({'description': ' '.join(about.split())} if about else {}),
        'properties': properties,
        'additionalProperties': open_ended,
    }


def _json(default):
    """A default as a JSON value, or None where it is none."""
    if default is None or isinstance(default, (bool, int, str)):
        return default
    try:
        return json.loads(json.dumps(default, allow_nan=False))
    except (TypeError, ValueError):
        return None


def _argument_texts(function):
    """Argument -> its description, from a docstring with lines ``name (type): text`` or ``name: text``."""
    texts, name, margin = {}, None, 0
    documents = [cls.__doc__ or '' for cls in getattr(function, '__mro__', [function])]  # an alias inherits
    _, _, lines = next((text for text in documents if 'Args:' in text), '').partition('Args:')
    for line in lines.splitlines():
        match = re.match(r'( +)(\w+)(?: \([^)]*\))?: (.*)', line)
        if match and (name is None or len(match[1]) <= margin):
            margin, name, texts[match[2]] = len(match[1]), match[2], match[3].strip()
        elif name and line.strip() and len(line) - len(line.lstrip()) > margin:
            texts[name] += ' ' + line.strip()
        elif name and not line.strip():
            break
    return texts
