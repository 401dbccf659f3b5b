"""Reading weights, and writing, finding and reading training states: the only module that touches checkpoint files.

A run's folder holds BasicSR's files: ``models/net_g_<iter>.pth`` ({'params': ..., 'params_ema': ...}) and
``training_states/<iter>.state`` (BasicSR's keys, and ours under 'dckd_sr'). The state is written last and names the
network files with sizes and checksums: a checkpoint without a state that verifies does not exist.
"""

import contextlib
import copy
import hashlib
import json
import os
import random
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from basicsr.utils import get_root_logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from dckd_sr import devices, restricted_pickle
from dckd_sr.errors import UserError, looked_in, reason
from dckd_sr.ops.stepping import complete

# What is in a training state, and in its 'dckd_sr' what may be.
_ENTRIES = {'epoch': int, 'iter': int, 'optimizers': list, 'schedulers': list}
_OPTIONAL = {'dckd_sr': dict, 'generators': list, 'best_metric_results': dict, 'extra': dict, 'files': dict}
_OPTIONAL.update(options=str, failures=int)
BARE = 'bare weights'
METADATA = 'dckd_sr'  # name of our entry in files that we export: JSON
# Names of entries with weights, in the order of preference: BasicSR's, Lightning's, other programs'.
ENTRIES = ('params_ema', 'params', 'state_dict', 'model_state_dict', 'model', 'net')
_WRAPPED = re.compile(r'^((module|_orig_mod)\.)+')
# SwinIR stores constants that depend on the training patch; its forward computes them for any other size.
_CONSTANTS = ('attn_mask', 'relative_position_index')


def read_weights(path, param_key=None, option=None, first=None):
    """Read one network's weights from a .pth, .ckpt or .safetensors file, without running code from it.

    Args:
        path: the file.
        param_key: the entry that holds the weights. None: the first of `ENTRIES`, the only entry that holds tensors
            and nothing else, or the file itself (bare weights).
        option: what a user sets to choose an entry, such as ``path.param_key_t``: messages name it, and what a user
            may not expect is logged. None where the file is one of our own making.
        first: an entry that is taken where the file has it, whatever ``param_key`` says.

    Returns:
        (state dict of CPU tensors without ``module.`` and ``_orig_mod.``, which wrappers of torch put before names;
        the entry used or 'bare weights').

    Raises:
        UserError: missing, truncated or foreign file, one that holds anything but tensors, no such entry, or several
            that could be meant.
    """
    weights, used = read_entry(path, param_key, option, first)
    bare = {_WRAPPED.sub('', key): value for key, value in weights.items()}
    if option and list(bare) != list(weights):
        get_root_logger().info(f"{path}: 'module.' and '_orig_mod.', which wrappers put before names, are left out.")
    return bare, used


def read_entry(path, param_key=None, option=None, first=None):
    """As `read_weights`, with the names as the file has them."""
    content = read_file(path)
    if not isinstance(content, dict):
        raise UserError(f'{path} holds a {type(content).__name__}, not the weights of a network')
    entries = [key for key, value in content.items() if isinstance(value, dict)]
    if first is not None and first in entries:
        used = first
    elif param_key is None:
        used = _found(content, entries, path, option)
    elif param_key in entries:
        used = param_key
    elif entries:
        advice = f'; set {option} to one of them' if option else ''
        raise UserError(f"{path} has no entry '{param_key}'; available: {', '.join(map(str, entries))}{advice}")
    else:
        advice = f'; leave out {option}' if option else ''
        raise UserError(f"{path} has no entry '{param_key}': it holds bare weights, without entries{advice}")
    weights = content if used == BARE else content[used]
    foreign = foreign_in(weights)
    if foreign or not weights:
        what = f'entries that are not tensors: {", ".join(foreign[:5])}' if foreign else 'no tensors'
        raise UserError(f'{path} ({used}) holds {what}')
    average = next((name for name in (f'{used}_ema', f'ema_{used}', 'params_ema') if name in entries), used)
    if option and average != used:
        get_root_logger().warning(
            f"{path} holds '{average}', averaged weights, beside '{used}', which is taken: {option} says which."
        )
    return weights, used


def _found(content, entries, path, option):
    """The entry with the weights of a file where nobody says which."""
    sound = [key for key in entries if content[key] and all(_is_weight(*item) for item in content[key].items())]
    named = [key for key in ENTRIES if key in sound] or [key for key in ENTRIES if key in entries]
    if named or len(sound) == 1:
        return (named or sound)[0]
    if sound and not any(isinstance(value, torch.Tensor) for value in content.values()):
        advice = f'; set {option} to one of them' if option else ''
        raise UserError(f'{path} holds several networks: {", ".join(map(str, sound))}{advice}')
    return BARE


def _is_weight(key, value):
    return isinstance(key, str) and isinstance(value, torch.Tensor)


def foreign_in(weights):
    """Names of what is no tensor, each with what it is instead where that is worth saying."""
    kinds = {key: value.name for key, value in weights.items() if isinstance(value, restricted_pickle.Placeholder)}
    return [f'{k} ({kinds[k]})' if k in kinds else str(k) for k, value in weights.items() if not _is_weight(k, value)]


def read_file(path):
    """The content of a file of weights, or of a training state: see `restricted_pickle.load`.

    Raises:
        UserError: missing, damaged, or of no kind that is known.
    """
    path = Path(path)
    if not path.is_file():
        there = 'a folder' if path.is_dir() else f'not there{looked_in(path, " (looked in {})")}'
        raise UserError(f'{path} is {there}; expected a file with weights')
    if not is_safetensors(path):
        return restricted_pickle.load(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f'{path} cannot be read as safetensors: {_first_line(error)}') from error


def is_safetensors(path):
    """Whether a file has this format, by its first bytes; by its name where they are of no kind that is known."""
    try:
        with open(path, 'rb') as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or error}') from error
    return head[8:] == b'{' or (Path(path).suffix == '.safetensors' and head[:2] not in (b'PK', b'\x80\x02'))


def read_metadata(path):
    """What a .safetensors file that we exported says about itself, see `export`; {} of any other file.

    Raises:
        UserError: missing or damaged file.
    """
    if not is_safetensors(path):
        return {}
    try:
        with safe_open(path, 'pt') as file:
            return parse_metadata((file.metadata() or {}).get(METADATA))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f'{path} cannot be read as safetensors: {_first_line(error)}') from error


def parse_metadata(text):
    """The dict of a JSON text; {} of anything else."""
    try:
        told = json.loads(text or '{}')
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_network(net, path, strict=True, param_key=None, option=None, first=None):
    """Load a file's weights into a bare network and log which entry of the file was used.

    Args:
        strict: False leaves out what differs; None means True, as where the option is not set.
        param_key, option, first: see `read_weights`.

    Raises:
        UserError: naming the first keys and shapes that differ (all of them with ``strict``; without it, differing
            entries are left out, unless nothing fits).
    """
    weights, used = read_weights(path, param_key, option, first)
    prefix = load_weights(net, weights, f'{path} ({used})', strict, option)
    get_root_logger().info(f'Loaded {type(net).__name__} from {path}, weights: {used}{prefix}.')


def load_weights(net, weights, source, strict=True, option=None):
    """Load a state dict into a bare network; ``source`` says in messages where it is from. Raises as `load_network`.

    Returns:
        which prefix of the names was left out, in words for a log; '' of none.
    """
    name, own = type(net).__name__, net.state_dict()
    weights, prefix = fitting(weights, own)
    for key in [key for key in {**own, **weights} if key.endswith(_CONSTANTS)]:
        weights[key] = own[key] if key in own else weights.pop(key)
        if key not in own:
            del weights[key]
    missing = [key for key in own if key not in weights]
    unknown = [key for key in weights if key not in own]
    shapes = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if missing or unknown or shapes:
        differences = '; '.join(
            f'{what}: {", ".join(keys[:3])}{f" and {len(keys) - 3} more" if len(keys) > 3 else ""}'
            for what, keys in (
                ('missing in the file', missing),
                ('unknown to the network', unknown),
                (
                    'of another shape',
                    [f'{key} (file {tuple(weights[key].shape)}, network {tuple(own[key].shape)})' for key in shapes],
                ),
            )
            if keys
        )
        fitting_keys = [key for key in own if key in weights and key not in shapes]
        differences = _other_scale(weights, own, shapes, missing + unknown) + differences
        if strict or strict is None or not fitting_keys:
            advice = _advice(own, weights, source)
            role = re.fullmatch(r'path\.param_key_(\w+)', option or '')
            if role and not advice and not missing and not shapes:
                advice = f'; path.strict_load_{role[1]}: false leaves out what is unknown'
            elif role and not advice and fitting_keys and net.training:  # frozen networks need all of their weights
                advice = f'; path.strict_load_{role[1]}: false takes what fits, the rest stays random'
            raise UserError(f'{source} does not fit this {name}: {differences}{advice}')
        get_root_logger().warning(f'{source} fits {name} in part. {differences}')
        weights = {key: weights[key] for key in fitting_keys}
    net.load_state_dict(weights, strict=False)
    return prefix


def prefixes(weights):
    """A state dict as it is, then without the first parts of its names as long as all names have them in common.

    Yields:
        (state dict, prefix that was left out).
    """
    prefix = ''
    while True:
        yield {key[len(prefix) :]: value for key, value in weights.items()}, prefix
        part, dot, _ = next(iter(weights), '')[len(prefix) :].partition('.')
        prefix += part + dot
        if not dot or not all(key.startswith(prefix) for key in weights):
            return


def fitting(weights, own):
    """The weights under the names of a network, whose own ones ``own`` has: programs that train put them into others.

    A prefix that all names of the file have in common (``net_g.``, ``model.``) is left out, one that all of the network
    have is put before, where more names fit then.

    Returns:
        (state dict, what was changed, in words for a log, or '').
    """
    found = [(named, prefix and f', without {prefix} before its names') for named, prefix in prefixes(weights)]
    for _, prefix in prefixes(own):
        found.append(({prefix + key: value for key, value in weights.items()}, f', with {prefix} before its names'))
    return max(found, key=lambda pair: sum(key in own for key in pair[0]))  # the first of several that are equal


def _advice(own, weights, source):
    """The command that takes a part of a file, where all weights are there under a prefix of their own; or ''."""
    key = max(own, key=len, default='')
    for start in [name[: -len(key)] for name in weights if name.endswith(f'.{key}')]:
        if all(start + name in weights for name in own):
            file = str(source).rpartition(' (')[0] or source
            return f'; those that start with {start} fit: python -m dckd_sr.zoo convert {file} --prefix {start}'
    return ''


def _other_scale(weights, own, shapes, more):
    """'of another scale, ...: ' where that is what differs, else ''.

    Where the arch is recognised its layers tell the scales; else one layer does, if its outputs, which
    PixelShuffle makes pixels of, are a square times as many.
    """
    from dckd_sr.archs import spandrel_arch  # which reads weights by this module

    found = [spandrel_arch.infer(each) for each in (weights, own)]
    if all(found) and found[0][0].type == found[1][0].type and found[0][0].scale != found[1][0].scale:
        return f'of another scale, x{found[0][0].scale} instead of x{found[1][0].scale}: '
    layers = {key.rpartition('.')[0]: weights[key].shape[0] / own[key].shape[0] for key in shapes if own[key].dim()}
    same = all(weights[key].shape[1:] == own[key].shape[1:] for key in shapes)
    pairs = [(a, b) for a in (1, 2, 3, 4, 8) for b in (1, 2, 3, 4, 8) if a != b]
    if len(layers) == 1 and same and not more and any(set(layers.values()) == {a * a / (b * b)} for a, b in pairs):
        return 'of another scale, it seems: '
    return ''


class _Hashed:
    """What torch.save writes to: a file, with the size and the SHA-256 of what went into it."""

    def __init__(self, file):
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data):
        self.size += memoryview(data).nbytes
        self.digest.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def write(content, path):
    """Save atomically: a crash or a full disk leaves the former file, never half of a new one.

    Args:
        content: anything that torch.save takes, or bytes.

    Returns:
        (size in bytes, SHA-256 in hexadecimal digits) of the file.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')  # of two writers, each has its own
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as file:
            hashed = _Hashed(file)
            if isinstance(content, bytes):
                hashed.write(content)
            else:
                torch.save(content, hashed)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f'cannot save {path}: {_first_line(error)}') from error
    return hashed.size, hashed.digest.hexdigest()


def _sync_folder(folder):
    """The new name reaches the disk, too; Windows cannot open folders."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_network(nets, path):
    """Save {'params': net, 'params_ema': net, ...} in the layout that BasicSR loads, or each as .safetensors.

    Returns:
        dict: name of each file written -> (size, SHA-256).
    """
    path, tensors = Path(path), {}
    for key, net in nets.items():
        tensors[key] = {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
    if path.suffix != '.safetensors':
        return {path.name: write(tensors, path)}
    files = {_safetensors_file(path, key): to_safetensors(weights) for key, weights in tensors.items()}
    return {file.name: write(content, file) for file, content in files.items()}


def _safetensors_file(path, key):
    """net_g_1000.safetensors holds 'params', net_g_ema_1000.safetensors 'params_ema': this format has no entries."""
    stem, iteration = path.stem.rsplit('_', 1)
    return path.with_name(f'{stem}{key[len("params") :]}_{iteration}{path.suffix}')


def save_state(model, epoch, current_iter):
    """Write ``<iter>.state``: BasicSR's entries; under 'dckd_sr' all else that the next step depends on.

    Call it on all ranks, after the networks of this iteration were saved; rank 0 writes.

    Raises:
        UserError: the file cannot be written, or the ranks' networks differ.
    """
    generators, world_size = [_generators(model.device)], model.opt.get('world_size', 1)
    if world_size > 1:
        generators = _gather(generators[0])
        check_equal(model)
    if model.opt.get('rank', 0) > 0:
        return
    state = {
        'epoch': epoch,
        'iter': current_iter,
        'optimizers': [optimizer.state_dict() for optimizer in model.optimizers],
        'schedulers': [scheduler.state_dict() for scheduler in model.schedulers],
        'dckd_sr': {
            'world_size': world_size,
            'generators': generators,
            'best_metric_results': getattr(model, 'best_metric_results', {}),
            'extra': model.extra_state() if hasattr(model, 'extra_state') else {},
            'files': getattr(model, 'saved_files', {}),
            **getattr(model, 'run_state', {}),
        },
    }
    write(_plain(state), Path(model.opt['path']['training_states']) / f'{current_iter}.state')


def _generators(device):
    """The state of every global generator of this process, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()
    return {
        'torch': torch.get_rng_state(),
        'cuda': None,  # its entry has always been there
        **({} if device.type == 'cpu' else {device.type: devices.generator_state(device)}),
        'numpy': [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        'python': list(random.getstate()),
    }


def _restore_generators(state, device):
    torch.set_rng_state(state['torch'])
    if state.get(device.type) is not None:
        devices.set_generator_state(state[device.type], device)
    kind, keys, *rest = state['numpy']
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, numbers, following = state['python']
    random.setstate((version, tuple(numbers), following))


def _gather(value):
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def check_equal(model):
    """All ranks hold the same networks, bit for bit; collective.

    Raises:
        UserError: they do not: a fault of the machine or of this program, and nothing to save.
    """
    digests = {}
    for name in [f'net_{name}' for name in trained_networks(model.opt)] + ['net_g_ema', 'net_his']:
        net, digest = getattr(model, name, None), hashlib.sha256()
        for parameter in model.get_bare_model(net).parameters() if net is not None else ():
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        digests[name] = digest.hexdigest()
    others = _gather(digests)
    differing = [name for name in digests if any(other[name] != digests[name] for other in others)]
    if differing:
        raise UserError(f'the ranks hold different {", ".join(differing)}; nothing was saved')


def _plain(value):
    """Numpy scalars and Counters as Python's own types: weights_only refuses to read the former back."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, 'item') and not isinstance(value, torch.Tensor) else value


def _checkpoints(opt):
    """Iteration -> the files of a run that belong to it: networks and training states."""
    models, states, files = Path(opt['path']['models']), Path(opt['path']['training_states']), {}
    for file in [*states.glob('*.state'), *models.glob('net_*')]:
        found = re.fullmatch(r'(?:net_.+_)?(\d+)\.(?:state|pth|safetensors)', file.name)
        if found:
            files.setdefault(int(found.group(1)), []).append(file)
    return files


def _named(opt):
    """The files of a run that its options name: it reads them again when it is continued."""
    paths = {Path(path).resolve() for path in opt['path'].values() if isinstance(path, str)}
    folders = [Path(opt['path'][key]) for key in ('models', 'training_states')]
    return {file for folder in folders for file in folder.glob('*') if file.resolve() in paths}


def prune(opt, keep, current_iter, best=()):
    """Delete the checkpoints of a run but the last ``keep`` and those of the iterations ``best``; states go first.

    Those that the options name stay.
    """
    files, named = _checkpoints(opt), _named(opt)
    for iteration in sorted(number for number in files if number <= current_iter)[:-keep]:
        for file in files[iteration] if iteration not in best and not named & set(files[iteration]) else ():
            with contextlib.suppress(OSError):
                file.unlink()


def sweep(opt):
    """Remove what a killed process left half-written."""
    for key in ('models', 'training_states'):
        for file in Path(opt['path'][key]).glob('.*.tmp'):
            with contextlib.suppress(OSError):
                file.unlink()


def find_state(opt):
    """The newest training state that verifies, with its network files.

    With ``auto_resume`` those of the run come first, then ``path.resume_state``.

    Returns:
        (state, path), or (None, None) where there is nothing to resume from.

    Raises:
        UserError: ``path.resume_state`` names a file that cannot be used.
    """
    logger, given = get_root_logger(), opt['path'].get('resume_state')
    if opt.get('auto_resume'):
        folder = Path(opt['path']['training_states'])
        states = sorted(
            (f for f in folder.glob('*.state') if f.stem.isdigit()), key=lambda f: int(f.stem), reverse=True
        )
        for path in states:
            try:
                state = _read_state(path, opt)
            except UserError as error:
                logger.warning(f'Passed over {path}: {error}')
                continue
            if given and not _same_file(path, given):
                logger.info(f'--auto_resume goes on from {path}; path.resume_state = {given} is for a run without one.')
            return state, path
        if given:
            logger.info(f'--auto_resume finds no checkpoint in {folder}: the run starts from path.resume_state.')
    if given:
        path = Path(given)
        return _read_state(path, opt), path
    return None, None


def _same_file(one, other):
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return False


def is_of_run(state_path, opt):
    """Whether a training state lies in the folder of this run, which then goes on, rather than in another's."""
    root, path = Path(opt['path']['experiments_root']).resolve(), Path(state_path).resolve()
    return root in path.parents


def set_aside(opt, state_path, start, moved):
    """Move the checkpoints of a run that it does not go on from to a folder of the same layout, ``moved``.

    These are all after ``start``; all of them where the state is none of the run's own, but one that was moved before;
    and the final weights, unless this was the end.

    The newest state goes last: until then the run is what it was, afterwards it goes on from ``start``, wherever this
    is cut off.

    Returns:
        names of the states that were moved.
    """
    models, states = Path(opt['path']['models']), Path(opt['path']['training_states'])
    own = _same_file(Path(state_path).parent, states)
    names = []
    for iteration, files in sorted(_checkpoints(opt).items()):
        # Networks without a state are left of a save that was cut off, and are written again.
        unfinished = opt.get('auto_resume') and not any(file.parent == states for file in files)
        if own and (iteration <= start or unfinished):
            continue
        # The state first: without it, its networks are no checkpoint.
        for file in sorted(files, key=lambda file: file.parent != states):
            target = moved / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
            names += [file.name] if file.parent == states else []
    if start < int(opt['train']['total_iter']):
        for file in set(models.glob('net_*_latest.*')) - _named(opt):
            (moved / models.name).mkdir(parents=True, exist_ok=True)
            file.rename(moved / models.name / file.name)
    return names


def _read_state(path, opt):
    state = read_file(path)
    _check_entries(state, _ENTRIES, path)
    _check_entries(state.get('dckd_sr') or {}, {}, path)
    folder, named = _models_folder(path, opt), (state.get('dckd_sr') or {}).get('files') or {}
    for name, written in named.items():
        if not isinstance(written, (list, tuple)) or len(written) != 2:
            raise UserError(f'{path} is not a training state: it holds no size and checksum of {name}')
        _check_file(folder / str(name), *written)
    for name in trained_networks(opt) if not named else ():
        read_weights(folder / f'net_{name}_{state["iter"]}.pth', 'params')
    return state


def _check_entries(state, needed, path):
    lacking = [key for key in needed if not isinstance(state, dict) or key not in state]
    if lacking:
        raise UserError(f'{path} is not a training state: it lacks {", ".join(lacking)}')
    for key, kind in {**needed, **_OPTIONAL}.items():
        if key in state and not isinstance(state[key], kind):
            raise UserError(f'{path} is not a training state: its {key} is a {type(state[key]).__name__}')


def _check_file(file, size, sha256):
    try:
        found = file.stat().st_size
        if found != size:
            raise UserError(f'{file} has {found} bytes, {size} were written')
        digest = hashlib.sha256()
        with open(file, 'rb') as content:
            while block := content.read(2**20):
                digest.update(block)
    except OSError as error:
        raise UserError(f'{file} cannot be read: {error.strerror}') from error
    if digest.hexdigest() != sha256:
        raise UserError(f'{file} is damaged: its checksum is not the one that was written')


def trained_networks(opt):
    """Suffixes of the networks that are trained and therefore saved: g, d, ... but no teacher, history or encoder."""
    return [key[8:] for key in opt if key.startswith('network_') and key[8:] not in ('t', 'his', 'vqgan')]


def _models_folder(state_path, opt):
    beside = Path(state_path).parent.parent / 'models'
    return beside if beside.is_dir() else Path(opt['path']['models'])


def resume(model, opt, state, path, new_rates=False):
    """Put a training state into a freshly built model: trained networks, their EMA, optimisers and everything else.

    Teacher and encoder keep the files that the option file names (BasicSR's check_resume redirects these, too, to files
    that were never written).

    Args:
        new_rates: the option file has other settings of optimisers or schedule than the state, and they count: rates
            are those that the new schedule has at this iteration. What optimisers have gathered stays.
    """
    rates = _settings(model) if new_rates else None
    folder, ours = _models_folder(path, opt), state.get('dckd_sr') or {}
    for name in trained_networks(opt):
        file = folder / f'net_{name}_{state["iter"]}.pth'
        net, average = getattr(model, f'net_{name}'), getattr(model, f'net_{name}_ema', None)
        for module, key in ((net, 'params'), (average, 'params_ema')):
            plain = _safetensors_file(file.with_suffix('.safetensors'), key)
            if module is not None and plain.name in (ours.get('files') or {}):
                load_network(model.get_bare_model(module), plain)
            elif module is not None:
                load_network(model.get_bare_model(module), file, first=key)
    try:
        model.resume_training(state)
        if new_rates:
            _replay(model, rates)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f'{path} does not fit this run: {reason(error)}') from error


def _settings(model):
    """Copies of what the options have made of optimisers and schedules."""
    groups = [
        [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
        for optimizer in model.optimizers
    ]
    return groups, [copy.deepcopy(scheduler.state_dict()) for scheduler in model.schedulers]


def _replay(model, settings):
    """Put back the settings, and bring the schedules to where they have been: many know their last step only."""
    steps = [scheduler.last_epoch for scheduler in model.schedulers]
    for optimizer, groups in zip(model.optimizers, settings[0]):
        for group, values in zip(optimizer.param_groups, groups):
            group.update(values)
        complete(optimizer)
    for scheduler, fresh, count in zip(model.schedulers, settings[1], steps):
        scheduler.load_state_dict(fresh)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that the optimiser has not stepped in between
            for _ in range(count):
                scheduler.step()


def restore_state(model, state):
    """Optimisers, schedulers, generators, best metrics and the model's own extra state."""
    for kind, owned in (('optimizers', model.optimizers), ('schedulers', model.schedulers)):
        if len(state[kind]) != len(owned):
            raise UserError(
                f'the training state has {len(state[kind])} {kind}, this run {len(owned)}: not the same recipe'
            )
        for target, saved in zip(owned, state[kind]):
            try:
                target.load_state_dict(saved)
            except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
                raise UserError(
                    f'the {kind} of the training state do not fit this run: {_first_line(error)}'
                ) from error
    ours, logger = state.get('dckd_sr') or {}, get_root_logger()
    generators, rank = ours.get('generators') or [], model.opt.get('rank', 0)
    if not ours:
        logger.warning(
            "This training state is BasicSR's or the released code's: it lacks random generators, best metrics, the "
            'history network and the options. The run continues, but not exactly.'
        )
    elif len(generators) != model.opt.get('world_size', 1):
        logger.warning(
            f'This training state is of {len(generators)} process(es), this run has {model.opt.get("world_size", 1)}: '
            'it continues, but not exactly.'
        )
    else:
        _restore_generators(generators[rank], model.device)
    if hasattr(model, 'queue_size'):
        logger.warning('The pool of training pairs of Real-ESRGAN starts empty: the run continues, but not exactly.')
    if ours.get('best_metric_results'):
        model.best_metric_results = ours['best_metric_results']
    if hasattr(model, 'load_extra_state'):
        model.load_extra_state(ours.get('extra') or {})
