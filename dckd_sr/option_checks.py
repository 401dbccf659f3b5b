"""The checks of option files: sections, blocks with a ``type``, files, and what blocks need from each other.

Each check takes a `Report` and adds to it; none raises, so that all mistakes of a file are told at once.
"""

import copy
import difflib
import functools
import inspect
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from basicsr.archs.vgg_arch import NAMES as VGG_LAYERS
from basicsr.archs.vgg_arch import insert_bn
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY
from pydantic import ValidationError, create_model

from dckd_sr import imports, safe_yaml, zoo
from dckd_sr import option_keys as keys
from dckd_sr.archs import ensemble_arch, spandrel_arch, vqgan_arch
from dckd_sr.data.files import not_searched
from dckd_sr.errors import UserError, looked_in, nearest, one_line
from dckd_sr.ops.schedulers import SCHEDULERS
from dckd_sr.vgg import vgg_places


@dataclass
class Report:
    """Problems and warnings found so far.

    Attributes:
        strict: every unknown key is a problem, because the model is ours.
        known: the model is ours or BasicSR's: an unknown key that looks like a mistake is a problem. Otherwise, and in
            files of other models, unknown keys are warnings.
        lacks_scale: the file has no `scale`; its default, 1, may not be what is meant.
        read: the texts in the code of a model that is not ours, among them the keys that it reads.
        homes: (section, its keys) for each section, to say where a misplaced key belongs.
    """

    strict: bool = True
    known: bool = True
    lacks_scale: bool = False
    read: frozenset = frozenset()
    homes: list = field(default_factory=list)
    problems: list = field(default_factory=list)
    warnings: list = field(default_factory=list)

    def error(self, path, text, *value):
        self.problems.append(one_line(f'{_shown(path, *value)}: {text}'))

    def warn(self, path, text, *value):
        self.warnings.append(one_line(f'{_shown(path, *value)}: {text}'))

    def missing(self, path, text):
        """A missing key, unless its value was wrong."""
        if not self.reported(path):
            self.error(path, f'missing; {text}')

    def reported(self, path):
        """Whether there is a problem with a key, with something in it, or with a block around it."""
        names = path.split('.')
        around = ['.'.join(names[: i + 1]) for i in range(len(names))]
        starts = (*(f'{name} = ' for name in around), *(f'{name}: ' for name in around), f'{path}.')
        return any(problem.startswith(starts) for problem in self.problems)

    def unknown(self, path, value, valid, what='key', given=(), fatal=False):
        """An unknown key, with the name that it has here, the section that it belongs in, or the nearest valid name.

        Args:
            given: the keys beside it.
            fatal: what is built from the block refuses the key.
        """
        key, near = path.rpartition('.')[2], nearest(path.rpartition('.')[2], valid)
        home = next(
            (f"'{section}'" if section else 'the top level' for section, known in self.homes if key in known), None
        )
        named_in_code = what == 'key' and key in self.read and path in (key, f'train.{key}')
        if named_in_code and not self.strict and key not in keys.SET_BY_PROGRAM:
            return
        if value is None and key in keys.known_anywhere():
            return  # taken away from what another model has
        if key in keys.SET_BY_PROGRAM:
            hint = f'; {keys.SET_BY_PROGRAM[key]}, remove it'
        elif key in keys.OTHER_NAMES:
            hint = f'; here it is {keys.OTHER_NAMES[key]}'
        elif home and not (near and what != 'key'):
            hint = f'; it belongs in {home}'
        else:
            hint = near or f'; known: {", ".join(map(str, valid)) or "none"}'
        # The name here has a default, which would hold without a word.
        renamed = keys.OTHER_NAMES.get(key) in valid and keys.OTHER_NAMES[key] not in given
        refused = self.strict or (self.known and (fatal or renamed or is_misspelt(key, valid)))
        (self.error if refused else self.warn)(path, f'unknown {what}{hint}', value)


def _shown(path, *value):
    if not value:
        return path
    if value[0] is None:
        return f'{path} = ~'
    text, most = (value[0], 200) if isinstance(value[0], str) else (json.dumps(value[0], default=str), 80)
    return f'{path} = {text if len(text) <= most else text[: most - 3] + "..."}'


def is_misspelt(key, valid):
    """Whether an unknown key is a valid one with a slip in it, and no key of its own that a fork has beside it."""
    near = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.8)
    near = near or [name for name in valid if sorted(name) == sorted(key)]  # tpye
    if not near or key in keys.FORK_KEYS or key in keys.known_anywhere():
        return False
    # gt_size_h is no gt_size, resize_prob3 no resize_prob2, and optim_e no optim_g.
    stem, stem_near = (re.sub(r'(_[a-z]|_?\d+)$', '', name) for name in (key, near[0]))
    return stem not in (near[0], stem_near) and not key.startswith(f'{near[0]}_')


def meant(name, known):
    """The known name that is closest to a name, or None."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1)), None)


def one_of(known):
    """'one of a, b', for messages."""
    return f'one of {", ".join(known)}'


def no_such(what, name, known):
    """What is said about a name that is not registered: it may be the user's own, or a misspelt one of those known."""
    return f'no such {what}; {imports.ADVICE}{nearest(name, known, 0.7) or "; known: " + ", ".join(known)}'


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def validate(model, data, report, where=''):
    """Check data against a section, and fill in its defaults.

    Wrong values are reported and left out, so that later checks see clean types.

    Returns:
        dict: plain values; the given keys first, in their order; unknown keys stay.
    """
    data, unknown = copy.deepcopy(data), []
    try:
        valid = model.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
        for problem, (block, section, key) in [(p, _locate(data, model, p['loc'])) for p in found]:
            path = '.'.join([where] * bool(where) + [str(key) for key in problem['loc']])
            if problem['type'] == 'extra_forbidden':
                report.unknown(path, problem['input'], section.model_fields, given=block)
                unknown.append((problem['loc'], problem['input']))
            else:
                report.error(path, _expected(problem), problem['input'])
            block.pop(key, None)
        valid = model.model_validate(data)
    result = _plain(valid, data)
    for loc, value in unknown:
        block = result
        for key in loc[:-1]:
            block = block[key]
        block[loc[-1]] = value
    return result


def _locate(data, model, loc):
    """The innermost dict that an error's location reaches, its section, and the key in it."""
    for key, following in zip(loc, loc[1:]):
        if not isinstance(data.get(key), dict) or following not in data[key]:
            return data, model, key
        data, kind = data[key], model.model_fields[key].annotation
        candidates = [kind, *getattr(kind, '__args__', ())]
        model = next((c for c in candidates if inspect.isclass(c) and issubclass(c, keys.Section)), model)
    return data, model, loc[-1]


def _expected(problem):
    if problem['type'] in ('model_type', 'dict_type', 'model_attributes_type'):
        return 'expected a block of keys'
    if problem['type'] == 'string_type':
        return 'expected text; write it in quotes'
    if problem['type'] == 'too_short':
        return 'expected at least one value'
    return re.sub(r'^Value error, ', '', problem['msg']).replace('Input should be', 'expected')


def _plain(section, given):
    """The given keys in their order, then the defaults that are not empty, as plain values."""
    result = {}
    for key in [*given, *type(section).model_fields]:
        value = getattr(section, key, given.get(key))
        if isinstance(value, keys.Section):
            value = _plain(value, given.get(key) or {})
        if value is not None or key in given:
            result.setdefault(key, copy.deepcopy(value))
    return result


@functools.cache
def file_model(spec, is_train):
    """The pydantic model of whole files of a model type, without `datasets`, and the keys of each section of it."""
    paths = {'resume_state': (Optional[keys.PathName], None)}
    for name in spec.networks:
        paths[f'pretrain_network_{name}'] = (Optional[keys.PathName], None)
        paths[f'strict_load_{name}'] = (Optional[bool], None)
        paths[f'param_key_{name}'] = (Optional[str], None)
    path_model = create_model('Path', __base__=keys.Section, **paths)
    fields = {f'network_{name}': (Optional[keys.Block], None) for name in spec.networks}
    if 'vqgan' in spec.networks:
        fields['network_his'] = (Any, None)  # a flag, as released: any true value
    fields['path'] = (path_model, path_model())
    if is_train:
        fields['train'] = (spec.train, spec.train())
    model = create_model('Options', __base__=keys.Top, **fields)
    homes = [('', [*model.model_fields, 'datasets', 'train']), ('path', paths), ('train', spec.train.model_fields)]
    homes += [('val', keys.Val.model_fields), ('logger', keys.Logger.model_fields)]
    homes.append(('datasets.train', {key for kind in keys.DATASETS.values() for key in kind.model_fields} - {'type'}))
    return model, homes


@functools.cache
def dataset_model(kind, in_training):
    """The pydantic model of a dataset block."""
    model = keys.DATASETS.get(kind, keys.OtherDataset)
    return create_model(kind, __base__=(keys.TrainLoader, model)) if in_training else model


# ---------------------------------------------------------------------------------------------------------------------
# Blocks with a type


def known_types(registry):
    """Name -> class of a BasicSR registry, without the suffix that BasicSR gives to some of its own names."""
    return {bare(name): cls for name, cls in registry}


def bare(name):
    """A type's name without that suffix."""
    return name[: -len('_basicsr')] if str(name).endswith('_basicsr') else str(name)


def optimizers():
    """Name -> class of the optimisers of torch.optim that a training step can use."""
    classes = {name: cls for name, cls in vars(torch.optim).items() if inspect.isclass(cls)}
    fit = set(classes) - set(keys.UNFIT_OPTIMIZERS)
    return {name: classes[name] for name in sorted(fit) if issubclass(classes[name], torch.optim.Optimizer)}


def schedulers():
    """Name -> class of the learning rate schedules."""
    return SCHEDULERS


def parameters(cls):
    """Name -> inspect.Parameter of a constructor or function, and whether it takes other names as well.

    BasicSR's own ``**kwargs`` swallow misspelt names: they do not count.
    """
    found = inspect.signature(cls).parameters
    named = {name: p for name, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    checked_elsewhere = cls is spandrel_arch.spandrel
    open_ended = checked_elsewhere or not is_known(cls)
    return named, open_ended and any(p.kind == p.VAR_KEYWORD for p in found.values())


def is_known(cls):
    return cls.__module__.split('.')[0] in ('basicsr', 'dckd_sr')


@functools.cache
def texts_in(cls):
    """The texts in the code of a class and of those that it derives from, among them the option keys that it reads."""

    def texts(code):
        for constant in code.co_consts:
            if inspect.iscode(constant):
                yield from texts(constant)
            else:
                yield from constant if isinstance(constant, tuple) else [constant]

    functions = [inspect.unwrap(f) for base in cls.__mro__ for f in vars(base).values() if inspect.isfunction(f)]
    return frozenset(item for f in functions for item in texts(f.__code__) if isinstance(item, str))


def members(where, cls, block):
    """(key, class, block) of a network, or of each of those that an Ensemble is made of."""
    if cls is not ensemble_arch.Ensemble:
        return [(where, cls, block)]
    inner = block.get('networks') if isinstance(block.get('networks'), list) else []
    types = known_types(ARCH_REGISTRY)
    found = [(f'{where}.networks.{index}', member) for index, member in enumerate(inner) if isinstance(member, dict)]
    return [(key, types[bare(member['type'])], member) for key, member in found if bare(member.get('type')) in types]


def argument(cls, block, names):
    """The first of the names that a constructor takes, with its value in a block or else its default."""
    if cls is spandrel_arch.spandrel:
        told = told_by_file(block)
        return next(((name, told[name]) for name in names if name in told), (None, None))
    named = parameters(cls)[0]
    for name in names:
        if name in named and (name in block or named[name].default is not inspect.Parameter.empty):
            return name, block.get(name, named[name].default)
    return None, None


def told_by_file(block):
    """What the weights file of a block of type spandrel tells, under BasicSR's names; {} of a file that is refused."""
    try:
        found = spandrel_arch.describe(block['path'], block.get('param_key'))
    except (KeyError, TypeError, UserError):
        return {}
    told = {'upscale': found.scale, 'num_in_ch': found.num_in_ch, 'num_out_ch': found.num_out_ch}
    return {**told, 'window_size': found.window_size} if found.window_size > 1 else told


def check_block(report, where, block, types, what, filled=(), also=(), values=None, imported=True):
    """Check a block with a ``type``.

    Args:
        types: name -> class or function that the type may be.
        what: what the types are, for messages.
        filled: arguments that the program gives.
        also: keys that a reader takes out before the call.
        values: argument name -> valid values, for BasicSR's classes and ours.
        imported: whether `imports` can add types.

    Returns:
        the class, or None where there is none.
    """
    if not isinstance(block, dict):
        report.error(where, f'expected a block of keys with the type of {what}', block)
        return None
    if block.get('type') is None:
        report.error(f'{where}.type', f'missing; {one_of(types)}')
        return None
    name = bare(block['type'])
    if name not in types:
        text = (
            no_such(what, name, types) if imported else f'no such {what}{nearest(name, types) or "; " + one_of(types)}'
        )
        report.error(f'{where}.type', text, block['type'])
        return None
    cls = types[name]
    arguments = {key: value for key, value in block.items() if key != 'type'}
    check_arguments(report, where, arguments, cls, name, filled, also, values if is_known(cls) else None)
    return cls


def check_arguments(report, where, block, function, name, filled=(), also=(), values=None):
    """Check keys against a signature: unknown, missing, or plainly of another type."""
    named, open_ended = parameters(function)
    named = {key: parameter for key, parameter in named.items() if key not in filled}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    for key, value in block.items():
        if key in named:
            problem = _argument_problem(named[key], value, (values or {}).get(key))
            if problem:
                report.error(f'{where}.{key}', problem, value)
        elif key not in also and not open_ended:
            report.unknown(f'{where}.{key}', value, [*named, *also], f'argument of {name}', fatal=not takes_any)
    for key, parameter in named.items():
        if parameter.default is parameter.empty and key not in block:
            report.error(f'{where}.{key}', f'missing; {name} needs it')


def _argument_problem(parameter, value, values):
    """What is wrong with a value, as far as its name and default tell."""
    if values is not None and value not in values:
        return f'expected {" or ".join(v if isinstance(v, str) else json.dumps(v) for v in values)}'
    least = 0 if re.match(_MAYBE_NONE, parameter.name) else 1
    fine, expected = {
        'truth': (value in (True, False), 'true or false'),
        'number': (_numbers([value]), 'a number'),
        'count': (_whole(value, least), f'a whole number, at least {least}'),
        'size': (_numbers([value]) or _numbers(value), 'a number'),
        'list': (isinstance(value, list), 'a list'),
        'text': (isinstance(value, str), 'text'),
        'number or null': (value is None or _numbers([value]), 'a number, or null'),
        None: (True, ''),
    }[argument_kind(parameter)]
    return None if fine else f'expected {expected}'


_COUNTS = r'num_|(in|out)_ch|(n_embed|embed_dim|upscale|scale|resolution|ch|crop_border|n_gt_sub|pool_size)$'
_MAYBE_NONE = r'num_.*(block|group|layer|class)|crop_border'


def argument_kind(parameter):
    """What an argument is, as far as its name and default tell.

    Returns:
        truth, count (a whole number), number, size (or sizes), list, text, number or null, or None.
    """
    default = parameter.default
    if parameter.annotation == 'float | None':
        return 'number or null'
    if isinstance(default, bool):
        return 'truth'
    if re.match(_COUNTS, parameter.name) and (default is parameter.empty or isinstance(default, int)):
        return 'count'
    if isinstance(default, (int, float)):
        return 'size' if parameter.name.endswith('_size') else 'number'
    if isinstance(default, (tuple, list)):
        return 'list'
    return 'text' if isinstance(default, str) else None


# ---------------------------------------------------------------------------------------------------------------------
# What belongs together


def check_file(report, where, path, folder=False):
    """Report a path that is not there or of the wrong kind; returns whether it is fine."""
    if os.path.isdir(path) if folder else os.path.isfile(path):
        return True
    if os.path.exists(path):
        text = 'a file, not a folder' if os.path.isfile(path) else 'neither a file nor a folder'
        text = 'a folder, not a file' if os.path.isdir(path) else text
    else:
        table = keys.DATA_SOURCES if folder else keys.WEIGHT_SOURCES
        source = next((f'; from {text}' for names, text in table.items() if re.search(names, path)), '')
        source = '; written by a training' if re.search(r'experiments.+models[\\/]net_', path) else source
        command = None if folder else zoo.command_for(path)
        source = f'; get it: {command}' if command else source
        text = f'no such {"folder" if folder else "file"}{looked_in(path)}{source}'
        text = 'a link that leads nowhere' if os.path.islink(path) else text
        text += f'; {safe_yaml.BACKSLASHES}' if re.search(r'[\x00-\x1f]', path) else ''
    report.error(where, text, path)
    return False


def resolve_zoo(report, raw):
    """Put plain blocks, and the paths of their weights, in the place of networks of ``type: zoo``."""
    for name in ('g', 't', 'vqgan'):
        where, scale = f'network_{name}', 1 if report.lacks_scale else raw['scale']
        block, paths = raw.get(where), raw.get('path') or {}
        if not isinstance(block, dict) or block.get('type') != 'zoo' or not isinstance(paths, dict):
            continue
        try:
            raw[where], raw['path'], entry = zoo.resolve_zoo(block, paths, name)
        except UserError as error:
            report.error(f'{where}.name', str(error), block.get('name'))
            del raw[where]
            continue
        if name != 'vqgan' and entry.scale != scale and report.lacks_scale:
            report.missing('scale', f'{where}.name = {entry.name} is of scale {entry.scale}')
        elif name != 'vqgan' and entry.scale != scale:
            report.error(f'{where}.name', f'a network of scale {entry.scale}, but scale = {scale}', entry.name)
    teacher = raw.get('network_t')
    networks = teacher.get('networks') if isinstance(teacher, dict) else None
    for index, block in enumerate(networks if isinstance(networks, list) else ()):
        if isinstance(block, dict) and block.get('type') == 'zoo':
            try:
                plain, paths, _ = zoo.resolve_zoo(block, {}, 't')
            except UserError as error:
                report.error(f'network_t.networks.{index}.name', str(error), block.get('name'))
                continue
            renamed = {'pretrain_network_t': 'pretrain', 'param_key_t': 'param_key'}
            networks[index] = {**plain, **{renamed[key]: value for key, value in paths.items()}}


def check_network(report, opt, name, is_needed=True):
    """Check a network block, and that it has the file's scale; returns its class or None.

    Args:
        is_needed: otherwise a block of type spandrel whose file is not there, and an Ensemble, are passed over.
    """
    where, block = f'network_{name}', opt[f'network_{name}']
    if not is_needed and block.get('type') == 'spandrel' and not os.path.isfile(str(block.get('path'))):
        return None
    if not is_needed and block.get('type') == 'Ensemble':
        return None
    also = ('allow_random',) if name in ('t', 'vqgan') else ()
    cls = check_arch(report, where, block, also)
    if cls is None or name not in ('g', 't'):
        return cls
    if opt['model_type'] == 'VQGANModel' and (cls is not vqgan_arch.VQGAN or not block.get('decoder')):
        report.error(where, 'expected a VQGAN with decoder: true')
    for inner, kind, member in members(where, cls, block):
        check_scale(report, opt, inner, kind, member)
    return cls


def check_scale(report, opt, where, cls, block):
    """A network enlarges by the file's scale."""
    key, value = argument(cls, block, keys.SCALE_KEYS)
    # SwinIR without an upsampler keeps the size, whatever upscale says.
    sizes = cls.__name__ != 'SwinIR' or argument(cls, block, ('upsampler',))[1]
    said = report.reported('scale') or report.reported(f'{where}.name')  # the latter of a network of the zoo
    if key and sizes and value != opt['scale'] and report.lacks_scale:
        report.missing('scale', f'{where}.{key} = {value}{"" if key in block else ", its default"}')
    elif key and sizes and value != opt['scale'] and not said:
        default = '' if key in block else f' (the default of {block["type"]})'
        default = f' (told by {block["path"]})' if cls is spandrel_arch.spandrel else default
        report.error(f'{where}.{key}', f'differs from scale = {opt["scale"]}{default}', value)


def check_arch(report, where, block, also=()):
    """Check a network block, with the nested ddconfig of a VQGAN; returns its class or None."""
    cls = check_block(report, where, block, known_types(ARCH_REGISTRY), 'arch', also=also, values=keys.ARCH_VALUES)
    if cls is vqgan_arch.VQGAN and 'ddconfig' in block:
        where = f'{where}.ddconfig'
        if not isinstance(block['ddconfig'], dict):
            report.error(where, 'expected a block of keys', block['ddconfig'])
        else:
            check_arguments(report, where, block['ddconfig'], vqgan_arch._check_ddconfig, 'VQGAN')
            if not report.reported(where):
                try:
                    vqgan_arch._check_ddconfig(**block['ddconfig'])
                except (UserError, TypeError) as error:  # the latter of lists that hold more than numbers
                    report.error(where, str(error))
    if cls is spandrel_arch.spandrel and 'path' in block:
        check_spandrel(report, where, block, also)
    if cls is ensemble_arch.Ensemble and 'networks' in block:
        check_ensemble(report, where, block)
    return cls


def check_ensemble(report, where, block):
    """Each network of an Ensemble, with its weights."""
    networks, weights = block['networks'], block.get('weights')
    if not isinstance(networks, list) or not networks:
        report.error(f'{where}.networks', 'expected a list of blocks, one per network', networks)
        return
    for index, member in enumerate(networks):
        key = f'{where}.networks.{index}'
        if report.reported(key):  # no network of the zoo
            continue
        kind = bare(member.get('type')) if isinstance(member, dict) else None
        if kind == 'Ensemble':
            report.error(f'{key}.type', 'an Ensemble cannot hold another', kind)
            continue
        if check_arch(report, key, member, () if kind == 'spandrel' else ensemble_arch.OWN_KEYS) is None:
            continue
        if kind == 'spandrel':  # is built with the weights of its path
            continue
        if member.get('pretrain') is not None:
            member['pretrain'] = keys.expand(str(member['pretrain']))
            check_file(report, f'{key}.pretrain', member['pretrain'])
        elif not member.get('allow_random'):
            report.error(f'{key}.pretrain', 'missing; a teacher needs trained weights')
    fine = weights is None or (_numbers(weights) and len(weights) == len(networks) and min(weights) > 0)
    if not fine:
        report.error(f'{where}.weights', f'expected {len(networks)} positive numbers, one per network', weights)


def check_spandrel(report, where, block, also=()):
    """The file of a block of type spandrel holds a network, and the block's other keys are options of it."""
    if not isinstance(block['path'], str):
        report.error(f'{where}.path', 'expected a file', block['path'])
        return
    path = block['path'] = keys.expand(block['path'])
    if not check_file(report, f'{where}.path', path):
        return
    extra = {key: value for key, value in block.items() if key not in ('type', 'path', 'param_key', *also)}
    try:
        spandrel_arch.check_options(path, spandrel_arch.describe(path, block.get('param_key')), extra)
    except UserError as error:
        report.error(f'{where}.path', str(error).replace(f'{path} ', '', 1), path)


def check_channels(report, opt, student, teacher):
    """Student and teacher read and write images with the same channels."""
    for where, cls, block in members('network_t', teacher, opt['network_t']):
        for what, names in keys.CHANNEL_KEYS.items():
            ours, theirs = argument(student, opt['network_g'], names), argument(cls, block, names)
            if _numbers([ours[1], theirs[1]]) and ours[1] != theirs[1]:
                report.error(f'{where}.{theirs[0]}', f'network_g.{ours[0]} = {ours[1]}: another {what}', theirs[1])


def check_encoder_channels(report, opt, student):
    """network_vqgan reads what network_g writes; gray images enter it as equal channels."""
    name, channels = argument(student, opt['network_g'], keys.CHANNEL_KEYS['output'])
    ddconfig = opt['network_vqgan'].get('ddconfig')
    found = ddconfig.get('in_channels') if isinstance(ddconfig, dict) else None
    if _numbers([channels, found]) and channels not in (1, found):
        report.error('network_vqgan.ddconfig.in_channels', f'network_g.{name} = {channels}: other channels', found)


def losses_for(where):
    """Name -> class of the losses that fit a block: those with the method that is called there, else of two images."""
    method = keys.FEATURE_LOSSES.get(where)
    return {
        name: loss
        for name, loss in known_types(LOSS_REGISTRY).items()
        if (hasattr(loss, method) if method else getattr(loss, 'forward', None) is not torch.nn.Module.forward)
    }


def check_loss(report, where, block):
    """Check a loss block; cl_opt and ce_opt get the features of network_vqgan, others bring their encoder."""
    method, types = keys.FEATURE_LOSSES.get(where), losses_for(where)
    cls = check_block(report, where, block, types, f'loss for {where}' if method else 'loss', values=keys.LOSS_VALUES)
    if cls is None:
        return
    encoder = block.get('encoder')
    if method and encoder is not None:
        if 'encoder' in parameters(cls)[0]:
            report.error(f'{where}.encoder', 'not used here; network_vqgan is the encoder')
    elif encoder is not None:
        check_encoder(report, f'{where}.encoder', encoder)
    elif not method and is_known(cls) and 'encoder' in parameters(cls)[0]:
        report.error(f'{where}.encoder', f'missing; {block["type"]} compares features: a block with type and pretrain')
    reads_vgg = is_known(cls) and 'pretrain' in parameters(cls)[0] and block.get('features', 'vgg') == 'vgg'
    if block['type'] == 'PerceptualLoss' or reads_vgg:
        check_vgg(report, where, block)


def check_encoder(report, where, block):
    """Check the encoder block of a loss that is used by its name."""
    if check_arch(report, where, block, ('pretrain', 'param_key', 'allow_random')) is None:
        return
    if block.get('pretrain') is not None:
        block['pretrain'] = keys.expand(str(block['pretrain']))
        check_file(report, f'{where}.pretrain', block['pretrain'])
    elif not block.get('allow_random'):
        report.error(f'{where}.pretrain', f'missing; an encoder needs trained weights: {keys.ENCODER_ADVICE}')


def check_vgg(report, where, block):
    """VGG's weights: BasicSR looks in the current folder, else it downloads, in the middle of building the model."""
    vgg_type = str(block.get('vgg_type', 'vgg19'))
    if vgg_type.replace('_bn', '') not in VGG_LAYERS:
        report.error(f'{where}.vgg_type', f'expected {one_of(VGG_LAYERS)}', vgg_type)
        return
    layers = VGG_LAYERS[vgg_type.replace('_bn', '')]
    layers = insert_bn(layers) if vgg_type.endswith('_bn') else layers
    if not isinstance(block.get('layer_weights') or {}, dict):
        report.error(f'{where}.layer_weights', 'expected a block of layer: weight', block['layer_weights'])
        return
    for layer, weight in (block.get('layer_weights') or {}).items():
        if layer not in layers:
            report.error(f'{where}.layer_weights.{layer}', f'no such layer of {vgg_type}{nearest(layer, layers)}')
        elif not _numbers([weight]):
            report.error(f'{where}.layer_weights.{layer}', 'expected a number', weight)
    if block.get('pretrain') is not None:
        block['pretrain'] = keys.expand(str(block['pretrain']))
        check_file(report, f'{where}.pretrain', block['pretrain'])
        return
    places, url = vgg_places(vgg_type)
    if not any(os.path.isfile(place) for place in places) and not block.get('allow_random'):
        report.error(where, f'no weights of {vgg_type} at {" or ".join(places)}; download them from {url}')


def check_train(report, opt, spec):
    """Check the section `train` block by block."""
    train = opt['train']
    for key, text in (('total_iter', 'the number of iterations'), ('optim_g', 'the optimiser')):
        if train.get(key) is None:
            report.missing(f'train.{key}', text)
    for key in ('optim_g', 'optim_d'):
        if train.get(key) is not None:
            where = f'train.{key}'
            check_block(
                report, where, train[key], optimizers(), 'optimiser of torch.optim', ('params',), imported=False
            )
            check_optimizer(report, where, train[key])
    check_schedule(report, train)
    for key, block in train.items():
        loss = isinstance(block, dict) and str(block.get('type')).endswith('Loss')
        if (key.endswith('_opt') or loss) and block is not None and not report.reported(f'train.{key}'):
            if is_computed(report, opt['model_type'], key, block) and key.endswith('_opt'):
                check_loss(report, f'train.{key}', block)
    if spec.losses and not any(train.get(key) or report.reported(f'train.{key}') for key in spec.losses):
        report.error('train', f'no loss; expected {one_of(spec.losses)}')


def is_computed(report, model_type, key, block):
    """Whether a model computes the loss of a block; reports a block of a model of BasicSR's that does not."""
    able = keys.COMPUTED_BY.get(key, model_type if key in report.read else None)
    if report.strict or not report.known or able == model_type:
        return True
    if isinstance(block, dict) and block.get('loss_weight') == 0:
        return False  # it is meant to have no effect
    others = [able] if able else [name for name, spec in keys.MODELS.items() if key in spec.train.model_fields]
    others = f'one that does, such as {others[-1]}' if others else 'a model that computes it'
    report.error(f'train.{key}', f'{model_type} does not compute this loss; remove the block, or take {others}', block)
    return False


def check_optimizer(report, where, block):
    """The learning rate and the betas, which torch refuses late or by an index error."""
    rate, betas = block.get('lr'), block.get('betas', [0, 0])
    if 'lr' not in block:
        report.error(f'{where}.lr', 'missing; the learning rate')
    elif not (_numbers([rate]) and 0 <= rate < float('inf')) and not report.reported(f'{where}.lr'):
        report.error(f'{where}.lr', 'expected a number, at least 0', rate)
    fine = isinstance(betas, list) and len(betas) == 2 and _numbers(betas) and all(0 <= beta < 1 for beta in betas)
    if not fine and not report.reported(f'{where}.betas'):
        report.error(f'{where}.betas', 'expected two numbers from 0 to below 1', betas)


def check_schedule(report, train):
    """Numbers of a schedule make sense, its lists belong together, and it reaches the end."""
    where, block = 'train.scheduler', train['scheduler']
    cls = check_block(report, where, block, schedulers(), 'schedule', ('optimizer', 'last_epoch'), imported=False)
    if cls is None:
        return
    names = ('milestones', 'periods', 'restarts', 'restart_weights', 'eta_mins')
    lists = {key: block[key] for key in names if key in block}
    for key, value in lists.items():
        if not _numbers(value) or (key == 'periods' and min(value, default=0) <= 0):
            if not report.reported(f'{where}.{key}'):
                above = ' above 0' if key == 'periods' else ''
                report.error(f'{where}.{key}', f'expected a list of numbers{above}', value)
            return
    for key, parameter in parameters(cls)[0].items():
        needed = parameter.default is parameter.empty and key in block and key not in names
        if (needed or key == 'total_steps') and block.get(key, 1) is not None:
            if not _numbers([block.get(key, 1)]) or block.get(key, 1) <= 0:
                report.error(f'{where}.{key}', 'expected a number above 0', block[key])
                return
    partner = 'periods' if 'periods' in block else 'restarts'
    for key in ('restart_weights', *(['eta_mins'] if 'eta_mins' in parameters(cls)[0] else [])):
        if len(lists.get(partner, [0])) != len(lists.get(key, [1])):
            report.error(f'{where}.{key}', f'expected as many values as {partner} has', block.get(key))
    total = train.get('total_iter') or 0
    if 'periods' in lists and sum(lists['periods']) < total:
        report.error(f'{where}.periods', f'they end before total_iter = {total}', block['periods'])
    if (block.get('total_steps') or total) < total:
        report.error(f'{where}.total_steps', f'they end before total_iter = {total}', block['total_steps'])
    if block.get('T_max', total) < total:
        report.warn(f'{where}.T_max', f'below total_iter = {total}; the rate rises again from there', block['T_max'])


def _numbers(value):
    return isinstance(value, (list, tuple)) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in value
    )


def _whole(value, least):
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_speed(report, opt, spec, given):
    """The keys that say how networks run belong to the models that read them, and to the keys that they refine."""
    if not issubclass(spec.train, keys.KDTrain):
        for key in keys.SPEED_KEYS:
            if opt[key]:
                report.error(key, f'{opt["model_type"]} does not read it; KDModel and DCKDModel do', True)
        if opt['logger']['gradients']:
            report.error('logger.gradients', f'{opt["model_type"]} does not read it; KDModel and DCKDModel do', True)
    for key, other in (('amp_bf16', 'use_amp'), ('amp_networks', 'use_amp'), ('compile_mode', 'use_compile')):
        if key in given and opt.get(key) not in (None, False, 'default') and not opt[other]:
            report.warn(key, f'without effect: {other} is false', opt[key])


def check_distillation(report, opt, given):
    """What teacher, history, encoder and losses need from each other, in training."""
    train, teacher, encoder = opt['train'], opt.get('network_t'), opt.get('network_vqgan')
    for key in ('logits_opt', 'lcr_opt', 'fakd_opt', 'dukd_opt'):
        if train.get(key) and teacher is None and not report.reported('network_t'):
            report.error(f'train.{key}', 'needs network_t, the teacher')
    brings_weights = teacher is not None and (
        teacher.get('allow_random') or bare(teacher.get('type')) in keys.OWN_WEIGHTS
    )
    if teacher is not None and not brings_weights and opt['path'].get('pretrain_network_t') is None:
        report.missing('path.pretrain_network_t', 'a teacher needs trained weights')
    for key in encoder_losses(train):
        if encoder is None and not report.reported('network_vqgan'):
            report.error(f'train.{key}', f'needs network_vqgan, the encoder: {keys.ENCODER_ADVICE}')
    if encoder is not None and needs_encoder(opt) and not encoder.get('allow_random'):
        if opt['path'].get('pretrain_network_vqgan') is None:
            report.missing('path.pretrain_network_vqgan', f'an encoder needs trained weights: {keys.ENCODER_ADVICE}')
    if brings_weights and opt['path'].get('pretrain_network_t') and bare(teacher['type']) == 'Ensemble':
        text = 'not for an Ensemble: each of its networks names its file as pretrain'
        report.error('path.pretrain_network_t', text, opt['path']['pretrain_network_t'])
    if teacher is None and train.get('cl_opt') and not report.reported('network_t'):
        assume_share(report, train)
    check_shares(report, train)
    if train.get('cl_opt') or train.get('mclir_opt'):
        check_history(report, opt, given)
    if train.get('cl_opt'):
        check_contrast(report, opt)
    for key in ('mclir_opt', 'csd_opt'):
        if train.get(key):
            check_levels(report, opt, f'train.{key}')
    if train.get('fakd_opt'):
        check_taps(report, train['fakd_opt'])


def assume_share(report, train):
    """Without a teacher, cl_opt gets a share of the gradient, because the gradient of its ratio has no bound.

    A small student never reaches GT, so that the numerator stays, while the denominator falls as the history follows.
    """
    beside = any(train.get(key) for key in ('pixel_opt', 'perceptual_opt'))
    if 'gradient_shares' in train or not beside or bare(train['cl_opt'].get('type')) == 'ContrasLoss':
        return
    train['gradient_shares'] = {'cl_opt': 0.1}
    report.warn(
        'train.gradient_shares',
        '{cl_opt: 0.1} is assumed in place of cl_opt.loss_weight, because without network_t the gradient of cl_opt '
        'outgrows that of the pixel loss; null keeps the weight',
    )


def check_shares(report, train):
    """What gradient_shares names is there, and so is something that the shares are of."""
    shares = {key: share for key, share in (train.get('gradient_shares') or {}).items() if share is not None}
    for key, share in shares.items():
        if not train.get(key):
            report.warn(f'train.gradient_shares.{key}', f'without effect: there is no train.{key}', share)
    others = ('pixel_opt', 'perceptual_opt', 'logits_opt', 'lcr_opt', *keys.GradientShares.model_fields)
    if shares and not any(train.get(key) for key in others if key not in shares):
        report.error(
            'train.gradient_shares', "of what? There is no other loss of the student's output, as pixel_opt is"
        )


def check_taps(report, block):
    """fakd_opt has as many modules of the student as of the teacher; whether there are such, the networks say."""
    where, lengths = 'train.fakd_opt', []
    for role in ('student', 'teacher'):
        paths = [block[role]] if isinstance(block.get(role), str) else block.get(role)
        if role not in block:
            return
        if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
            report.error(f'{where}.{role}', 'expected a list of modules, such as [body.1, conv_after_body]', paths)
        lengths.append(len(paths) if isinstance(paths, list) else 0)
    if lengths[0] != lengths[1] and not report.reported(where):
        text = f'expected as many modules as train.fakd_opt.student has, {lengths[0]}'
        report.error(f'{where}.teacher', text, block['teacher'])


def check_batches(report, opt):
    """What dukd_opt and csd_opt need of the training batches."""
    if opt['train'].get('dukd_opt'):
        check_upcycling(report, opt)
    if opt['train'].get('csd_opt'):
        check_batch(report, opt)


def check_upcycling(report, opt):
    """dukd_opt cuts GT into scale x scale tiles, and shrinks LQ by scale once more."""
    block, scale, data = opt['train']['dukd_opt'], opt['scale'], opt['datasets'].get('train', {})
    where, tiles, prob = 'train.dukd_opt', block.get('n_gt_sub', 1), block.get('prob', 0.3)
    if scale < 2:
        report.error(where, f'is for super-resolution: GT is cut into scale x scale tiles, and scale = {scale}')
        return
    if isinstance(tiles, int) and tiles > scale**2:
        report.error(f'{where}.n_gt_sub', f'GT has {scale} x {scale} tiles', tiles)
    if _numbers([prob]) and not 0 <= prob <= 1:
        report.error(f'{where}.prob', 'expected a number from 0 to 1', prob)
    sizes = {f'gt_sizes.{index}': size for index, size in enumerate(data.get('gt_sizes') or [])}
    for key, size in {'gt_size': data.get('gt_size'), **sizes}.items():
        if isinstance(size, int) and size % scale**2 and not size % scale and block.get('zoom_out', True):
            text = f'expected a multiple of {scale} x {scale}: dukd_opt shrinks LQ once more, unless zoom_out is false'
            report.error(f'datasets.train.{key}', text, size)


def check_batch(report, opt):
    """csd_opt takes its negatives from the batch."""
    data, count = opt['datasets'].get('train', {}), opt['train']['csd_opt'].get('num_neg', 10)
    sizes = data.get('mini_batch_sizes') or [data.get('batch_size_per_gpu')]
    least = min((size for size in sizes if isinstance(size, int)), default=None)
    if isinstance(count, int) and least is not None and count > least:
        report.error('train.csd_opt.num_neg', f'they are taken from the batch, which has {least} images', count)


def check_teacher_cache(report, opt, spec):
    """datasets.train.teacher_cache has outputs for images as they are, turned and cropped; nothing else will do."""
    data, train = opt['datasets'].get('train', {}), opt['train']
    where, path = 'datasets.train.teacher_cache', data.get('teacher_cache')
    if path is None:
        return
    if not path.endswith('.lmdb'):
        report.error(where, 'expected a folder *.lmdb', path)
    types = known_types(DATASET_REGISTRY)
    able = [name for name, cls in types.items() if getattr(cls, 'takes_teacher_cache', False)]
    if bare(data.get('type')) not in able and bare(data.get('type')) in types:
        report.error(where, f'{data["type"]} does not read it; {" and ".join(able)} do', path)
    if not issubclass(spec.train, keys.KDTrain) or opt.get('network_t') is None:
        report.error(where, 'needs network_t, the teacher', path)
    elif bare(opt['network_t'].get('type')) == 'Ensemble':
        report.error(where, 'is not made of an Ensemble: its outputs are computed in training', path)
    needs = {'lcr_opt': 'on augmented input', 'dukd_opt': 'on other input', 'fakd_opt': "with its modules' outputs"}
    for key, what in needs.items():
        if train.get(key):
            report.error(f'train.{key}', f'needs the teacher {what}, which {where} does not have')
    if (train.get('mixing_augs') or {}).get('mixup'):
        report.error('train.mixing_augs.mixup', f'needs the teacher on mixed input, which {where} does not have', True)


def check_history(report, opt, given):
    """cl_opt and mclir_opt take their negatives from the history."""
    key = 'cl_opt' if opt['train'].get('cl_opt') else 'mclir_opt'
    if 'network_his' not in given:
        opt['network_his'] = True
        report.warn('network_his', f'true is assumed: {key} takes its negatives from the history')
    elif not opt.get('network_his'):
        report.error('network_his', f'{key} takes its negatives from the history; write true', opt.get('network_his'))


def check_contrast(report, opt):
    """cl_opt has negatives and one weight per encoder level."""
    train = opt['train']
    if not train['num_neg'] and not train['neg_clean']:
        report.error('train.num_neg', 'cl_opt needs negatives; set num_neg or neg_clean', train['num_neg'])
    check_levels(report, opt, 'train.cl_opt')


def check_levels(report, opt, where):
    """A loss of features has one weight per level of the encoder, or per layer that it reads of VGG19."""
    block = opt['train'][where.partition('.')[2]]
    cls = known_types(LOSS_REGISTRY).get(bare(block.get('type')))
    if cls is None or argument(cls, block, ('features',))[1] == 'vgg':
        return
    weights = argument(cls, block, ('weights',))[1]
    ddconfig = (opt.get('network_vqgan') or {}).get('ddconfig')
    levels = ddconfig.get('ch_mult') if isinstance(ddconfig, dict) else None
    what = 'per level of network_vqgan.ddconfig.ch_mult'
    if where == 'train.csd_opt':
        levels, what = getattr(cls, 'LAYERS', None), f'for each of {", ".join(getattr(cls, "LAYERS", ()))}'
    if not isinstance(weights, (list, tuple)):
        return
    if not _numbers(weights):
        report.error(f'{where}.weights', 'expected a list of numbers', weights)
    elif isinstance(levels, (list, tuple)) and len(weights) != len(levels):
        report.error(f'{where}.weights', f'expected {len(levels)} numbers, one {what}', weights)


def needs_encoder(opt):
    """Whether a loss of the model reads the features of network_vqgan."""
    return bool(encoder_losses(opt.get('train') or {}))


def encoder_losses(train):
    """The blocks of `train` that read the features of network_vqgan."""
    mclir = train.get('mclir_opt')
    reads = {'mclir_opt': isinstance(mclir, dict) and mclir.get('features') == 'vqgan'}
    return [key for key in ('cl_opt', 'ce_opt', 'mclir_opt') if reads.get(key, train.get(key))]


def check_paths(report, opt, is_train):
    """Weights that are named and used exist; a test uses network_g's."""
    for key, path in opt['path'].items():
        network = key[len('pretrain_') :] if key.startswith('pretrain_') else None
        if path is None or (network is None and key != 'resume_state') or not (is_train or network == 'network_g'):
            continue
        if network and (opt.get(network) is None or (network == 'network_vqgan' and not needs_encoder(opt))):
            report.warn(f'path.{key}', f'not used, nothing needs {network}', path)
        else:
            check_file(report, f'path.{key}', path)


_BETTER = ('higher', 'lower')


def check_val(report, opt):
    """Check the metrics and the tiling of validation, and complete which values of a metric are the better ones."""
    val = opt['val']
    for name, block in (val.get('metrics') or {}).items():
        where, types = f'val.metrics.{name}', known_types(METRIC_REGISTRY)
        check_block(report, where, block, types, 'metric', filled=('img', 'img2'), also=('better',))
        if not isinstance(block, dict):
            continue
        if block.get('better') is None:  # BasicSR takes whatever is not 'higher' for 'lower', also ~
            block.pop('better', None)
            if 'niqe' in str(block.get('type')).lower():
                block['better'] = 'lower'
        elif block['better'] not in _BETTER:
            text = f'expected higher or lower{nearest(block["better"], _BETTER)}'
            report.error(f'{where}.better', text, block['better'])
    if val.get('tile_overlap') is not None and val['tile_overlap'] >= (val.get('tile_size') or 0):
        report.error('val.tile_overlap', 'expected less than val.tile_size', val['tile_overlap'])
    if val.get('tile_batch_size') is not None and not val.get('tile_size'):
        report.warn('val.tile_batch_size', 'without effect: val.tile_size is empty', val['tile_batch_size'])


def check_datasets(report, opt, blocks, is_train):
    """Check and complete all datasets that a run uses."""
    first = 'train' if is_train else 'test_1'
    if isinstance(blocks, dict):
        blocks = {name: block for name, block in blocks.items() if block is not None}  # taken away
    if not isinstance(blocks, dict) or not blocks:
        if blocks:
            report.error('datasets', f'expected a block of keys, such as {first}', blocks)
        else:
            report.error('datasets', f'missing; a block such as {first} says which images')
        return {}
    result, titles = {}, {}
    for name, block in blocks.items():
        where, phase = f'datasets.{name}', name.split('_')[0]
        if name != 'train' and phase not in ('val', 'test'):
            hint = nearest(name, ['train', 'val', 'test', *(f'{p}_{i}' for p in ('val', 'test') for i in range(1, 10))])
            report.error(where, f'expected train, val, val_* or test_*{hint}')
        elif not keys.is_name_part(name):
            report.error(where, 'expected a plain name, without / or \\')
        elif phase == ('test' if is_train else 'train'):
            report.warn(where, f'not used in {"training" if is_train else "a test"}')
        elif not isinstance(block, dict):
            report.error(where, 'expected a block of keys', block)
        else:
            result[name] = check_dataset(report, opt, name, block, is_train)
            title = phase, result[name]['name']  # a test that has test sets leaves those of validation alone
            if phase != 'train' and title in titles:
                report.error(f'{where}.name', f'datasets.{titles[title]} has the same name', title[1])
            titles.update({title: name} if phase != 'train' else {})
    if is_train and 'train' not in blocks:
        report.error('datasets.train', 'missing; the training images')
    return result


def check_dataset(report, opt, name, block, is_train):
    """Check and complete one dataset; in a test, a missing one gets the key ``missing``."""
    where, phase = f'datasets.{name}', name.split('_')[0]
    types, kind = known_types(DATASET_REGISTRY), bare(block.get('type'))
    if block.get('type') is None:
        report.error(f'{where}.type', f'missing; {one_of(types)}')
    elif kind not in types:
        report.error(f'{where}.type', no_such('dataset', kind, types), block['type'])
    data = validate(dataset_model(kind, phase == 'train'), block, report, where)
    if kind in types and kind not in keys.DATASETS and is_known(types[kind]):  # one of BasicSR's without a section here
        valid = {*dataset_model(kind, phase == 'train').model_fields, *texts_in(types[kind])}
        for key in block:
            if key not in valid and is_misspelt(key, valid):
                report.unknown(f'{where}.{key}', block[key], valid)
    data['name'] = data['name'] or name
    if data.get('meta_info_file', '') is None:
        del data['meta_info_file']  # SingleImageDataset opens it where the key exists
    if kind == 'SRImageDataset' and data.get('dataroot_lq') is None and report.lacks_scale:
        report.missing('scale', f'{where} makes LQ from GT, scale times smaller')
    always, in_training = keys.DATASET_NEEDS.get(kind, ((), ()))
    for key in [*always, *(in_training if phase == 'train' else ())]:
        if data.get(key) is None:
            report.missing(f'{where}.{key}', f'{kind} needs it')
    if phase == 'train':
        if kind == 'SingleImageDataset' and opt['model_type'] in keys.MODELS:
            report.error(f'{where}.type', 'has no ground truth to train on', block['type'])
        check_patch(report, f'{where}.gt_size', data.get('gt_size'), opt)
        check_stages(report, where, data, opt)
    data['phase'], data['scale'] = phase, opt['scale']
    found = report if is_train else Report()
    if kind == 'SRImageDataset' and phase != 'train':
        make_missing_lq(report, where, data)
    check_data_files(found, report, where, data)
    if found is not report and found.problems:
        data['missing'] = '; '.join(found.problems)
        report.warnings += [f'{problem}; skipped' for problem in found.problems]
    return data


def make_missing_lq(report, where, data):
    """Bicubic LR images that are not there are made from HR: the same pixels, if HR is cut as MATLAB's users do."""
    path, gt = data.get('dataroot_lq'), data.get('dataroot_gt')
    there = not isinstance(path, str) or os.path.lexists(path) or not isinstance(gt, str) or not os.path.isdir(gt)
    if there or data['scale'] < 2 or not re.search('bicubic|LRbic', path) or path.endswith('.lmdb'):
        return
    report.warn(
        f'{where}.dataroot_lq', f"no such folder{looked_in(path)}; LR is made from HR, as MATLAB's imresize", path
    )
    del data['dataroot_lq']


def check_data_files(found, report, where, data):
    """Report files that a dataset lacks to `found`; drop lists that BasicSR's wheel should hold and does not."""
    lmdb = data['io_backend']['type'] == 'lmdb'
    for key in ('dataroot_gt', 'dataroot_lq', 'dataroot_lqL', 'dataroot_lqR'):
        if isinstance(data.get(key), str):
            if lmdb and not data[key].endswith('.lmdb'):
                found.error(f'{where}.{key}', 'expected a folder *.lmdb, because io_backend.type is lmdb', data[key])
            fine = check_file(found, f'{where}.{key}', data[key], folder=True)
            told = not_searched(data[key]).removeprefix('; ') if fine and not lmdb else ''
            if told and not any(data.get(key) for key in ('meta_info_file', 'meta_info')):
                report.warn(f'{where}.{key}', told, data[key])
    for key in ('meta_info_file', 'meta_info'):
        path = data.get(key)
        if lmdb or not isinstance(path, str) or os.path.isfile(path):
            continue
        if Path(path).as_posix().startswith('basicsr/data/meta_info/'):
            report.warn(f'{where}.{key}', "not in BasicSR's wheel; all images of the folder are used", path)
            del data[key]
        else:
            check_file(found, f'{where}.{key}', path)


def check_stages(report, where, data, opt):
    """The three lists of a progressive schedule belong together, and each of its crops fits."""
    given = {key: data[key] for key in ('iters', 'mini_batch_sizes', 'gt_sizes') if data.get(key) is not None}
    if given and len({len(value) for value in given.values()}) * len(given) != 3:
        lengths = ', '.join(f'{key} has {len(value)}' for key, value in given.items())
        text = f'iters, mini_batch_sizes and gt_sizes go together, one value a stage each; {lengths}'
        report.error(f'{where}.{next(iter(given))}', text, next(iter(given.values())))
    for number, size in enumerate(given.get('gt_sizes', [])):
        check_patch(report, f'{where}.gt_sizes.{number}', size, opt)


def check_patch(report, where, size, opt):
    """The training crop fits the scale and the windows of the networks."""
    scale = opt['scale']
    if not isinstance(size, int):
        return
    if size % scale:
        report.error(where, f'expected a multiple of scale = {scale}', size)
    if opt['model_type'] == 'VQGANModel':
        ddconfig = (opt.get('network_g') or {}).get('ddconfig')
        ch_mult = ddconfig.get('ch_mult') if isinstance(ddconfig, dict) else None
        factor = 2 ** max(len(ch_mult) - 1, 0) if isinstance(ch_mult, list) else 1
        if size % factor:
            report.error(where, f'expected a multiple of {factor}, by which network_g reduces images', size)
    for name in ('network_g', 'network_t'):
        network = opt.get(name)
        if not isinstance(network, dict):
            continue  # missing, or no key of this model
        cls = known_types(ARCH_REGISTRY).get(bare(network.get('type')))
        for key, kind, block in members(name, cls, network) if cls else ():
            window = argument(kind, block, ('window_size',))[1]
            if isinstance(window, int) and window > 0 and size % (scale * window):
                text = f'expected a multiple of scale times {key}.window_size, {scale} x {window}'
                report.error(where, text, size)
