"""Reading weights, and writing, finding and reading training states: the only module that touches checkpoint files.

A run's folder holds BasicSR's files: ``models/net_g_<iter>.pth`` ({'params': ..., 'params_ema': ...}) and
``training_states/<iter>.state`` (BasicSR's keys, and ours under 'dckd_sr').
"""

import contextlib
import os
from pathlib import Path

import torch
from basicsr.utils import get_root_logger
from safetensors import SafetensorError
from safetensors.torch import load_file

from dckd_sr import restricted_pickle
from dckd_sr.errors import UserError

BARE = 'bare weights'
_KEYS = ('params_ema', 'params', 'state_dict')
# SwinIR stores constants that depend on the training patch; its forward computes them for any other size.
_CONSTANTS = ('attn_mask', 'relative_position_index')


def read_weights(path, param_key=None):
    """Read one network's weights from a .pth, .ckpt or .safetensors file, without running code from it.

    Args:
        path: the file.
        param_key: the entry that holds the weights. Where it is missing but 'params' is there, that one is taken, as
            BasicSR does; None takes bare weights, else the first of 'params_ema', 'params', 'state_dict'.

    Returns:
        (state dict of CPU tensors without a 'module.' prefix, the key used or 'bare weights').

    Raises:
        UserError: missing, truncated or foreign file, one that holds anything but tensors, or no such entry.
    """
    path = Path(path)
    content = _read(path)
    if not isinstance(content, dict):
        raise UserError(f'{path} holds a {type(content).__name__}, not the weights of a network')
    entries = [key for key, value in content.items() if isinstance(value, dict)]
    if param_key in entries:
        used = param_key
    elif param_key is not None and 'params' in entries:
        used = 'params'
    elif entries and param_key is not None:
        raise UserError(f"{path} has no entry '{param_key}'; available: {', '.join(map(str, entries))}")
    else:
        used = next((key for key in _KEYS if key in entries), BARE)
    weights = content if used == BARE else content[used]
    foreign = [key for key, value in weights.items() if not isinstance(value, torch.Tensor) or not isinstance(key, str)]
    if foreign or not weights:
        what = f'entries that are not tensors: {", ".join(map(str, foreign[:5]))}' if foreign else 'no tensors'
        raise UserError(f'{path} ({used}) holds {what}')
    return {key[7:] if key.startswith('module.') else key: value for key, value in weights.items()}, used


def _read(path):
    """The content of a weights file, read with weights_only first and the restricted reader after it."""
    if not path.is_file():
        raise UserError(f'{path} is {"a folder" if path.is_dir() else "not there"}; expected a file with weights')
    if path.suffix == '.safetensors':
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f'{path} cannot be read as safetensors: {_first_line(error)}') from error
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception:  # on damaged files torch raises whatever its parts raise
        return restricted_pickle.load(path)


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_network(net, path, strict=True, param_key=None):
    """Load a file's weights into a bare network and log which entry of the file was used.

    Raises:
        UserError: naming the first keys and shapes that differ (all of them with ``strict``; without it, differing
            entries are left out, unless nothing fits).
    """
    weights, used = read_weights(path, param_key)
    name = type(net).__name__
    own = net.state_dict()
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
        fitting = [key for key in own if key in weights and key not in shapes]
        if strict or not fitting:
            raise UserError(f'{path} ({used}) does not fit this {name}: {differences}')
        get_root_logger().warning(f'{path} ({used}) fits {name} in part. {differences}')
        weights = {key: weights[key] for key in fitting}
    net.load_state_dict(weights, strict=False)
    get_root_logger().info(f'Loaded {name} from {path}, weights: {used}.')


def write(content, path):
    """Save atomically: a crash or a full disk leaves the former file, never half of a new one.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f'cannot save {path}: {_first_line(error)}') from error


def save_network(nets, path):
    """Save {'params': net, 'params_ema': net, ...} in the layout that BasicSR loads."""
    write({key: {name: value.cpu() for name, value in net.state_dict().items()} for key, net in nets.items()}, path)


def save_state(model, epoch, current_iter):
    """Write ``<iter>.state``: BasicSR's entries; under 'dckd_sr' generators, best metrics, the model's extra state."""
    state = {
        'epoch': epoch,
        'iter': current_iter,
        'optimizers': [optimizer.state_dict() for optimizer in model.optimizers],
        'schedulers': [scheduler.state_dict() for scheduler in model.schedulers],
        'dckd_sr': {
            'generator': torch.get_rng_state(),
            'generator_cuda': torch.cuda.get_rng_state(model.device) if model.device.type == 'cuda' else None,
            'best_metric_results': _plain(getattr(model, 'best_metric_results', {})),
            'extra': model.extra_state() if hasattr(model, 'extra_state') else {},
        },
    }
    write(_plain(state), Path(model.opt['path']['training_states']) / f'{current_iter}.state')


def _plain(value):
    """Numpy scalars and Counters as Python's own types: weights_only refuses to read the former back."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, 'item') and not isinstance(value, torch.Tensor) else value


def find_state(opt):
    """The newest training state that can be read, with its network files.

    Returns:
        (state, path), or (None, None) where there is nothing to resume from.

    Raises:
        UserError: ``path.resume_state`` names a file that cannot be used.
    """
    logger = get_root_logger()
    if opt.get('auto_resume'):
        folder = Path(opt['path']['training_states'])
        states = sorted(
            (f for f in folder.glob('*.state') if f.stem.isdigit()), key=lambda f: int(f.stem), reverse=True
        )
        for path in states:
            try:
                return _read_state(path, opt), path
            except UserError as error:
                logger.warning(f'Passed over {path}: {error}')
    elif opt['path'].get('resume_state'):
        path = Path(opt['path']['resume_state'])
        return _read_state(path, opt), path
    return None, None


def _read_state(path, opt):
    state = _read(path)
    lacking = [
        key for key in ('epoch', 'iter', 'optimizers', 'schedulers') if not isinstance(state, dict) or key not in state
    ]
    if lacking:
        raise UserError(f'{path} is not a training state: it lacks {", ".join(lacking)}')
    for name in trained_networks(opt):
        read_weights(_network_file(path, opt, name, state['iter']), 'params')
    return state


def trained_networks(opt):
    """Suffixes of the networks that are trained and therefore saved: g, d, ... but no teacher, history or encoder."""
    return [key[8:] for key in opt if key.startswith('network_') and key[8:] not in ('t', 'his', 'vqgan')]


def _network_file(state_path, opt, name, iteration):
    beside = Path(state_path).parent.parent / 'models'
    folder = beside if beside.is_dir() else Path(opt['path']['models'])
    return folder / f'net_{name}_{iteration}.pth'


def resume(model, opt, state, path):
    """Put a training state into a freshly built model: trained networks, their EMA, optimisers and everything else.

    Teacher and encoder keep the files that the option file names (BasicSR's check_resume redirects these, too, to files
    that were never written).
    """
    for name in trained_networks(opt):
        file = _network_file(path, opt, name, state['iter'])
        load_network(model.get_bare_model(getattr(model, f'net_{name}')), file, True, 'params')
        average = getattr(model, f'net_{name}_ema', None)
        if average is not None:
            load_network(average, file, True, 'params_ema')
    model.resume_training(state)


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
            except (ValueError, KeyError) as error:
                raise UserError(
                    f'the {kind} of the training state do not fit this run: {_first_line(error)}'
                ) from error
    ours = state.get('dckd_sr', {})
    if not ours:
        get_root_logger().warning("This training state is BasicSR's: it lacks random generators and best metrics.")
    if 'generator' in ours:
        torch.set_rng_state(ours['generator'])
    if ours.get('generator_cuda') is not None and model.device.type == 'cuda':
        torch.cuda.set_rng_state(ours['generator_cuda'], model.device)
    if ours.get('best_metric_results'):
        model.best_metric_results = ours['best_metric_results']
    if hasattr(model, 'load_extra_state'):
        model.load_extra_state(ours.get('extra', {}))
