"""What changed in the options since a checkpoint was written."""

from dckd_sr import safe_yaml
from dckd_sr.errors import UserError

# The weights or optimiser states of another one of these would be another run.
_FIXED = ('model_type', 'scale', 'network_g', 'network_d', 'train.optim_g.type', 'train.optim_d.type')
_RATES = ('train.optim_g', 'train.optim_d', 'train.scheduler')
# Nothing that is trained depends on these.
_NOT_COMPARED = ('num_gpu', 'device', 'datasets.train.num_worker_per_gpu', 'name')


def compare(state, text):
    """Compare the resolved options that a training state holds with the present ones.

    Args:
        state: the training state's dict.
        text: the present options, as `options.to_yaml` writes them.

    Returns:
        dict: key that changed -> a line about it.

    Raises:
        UserError: something changed that cannot change, such as the network.
    """
    saved = (state.get('dckd_sr') or {}).get('options')
    if not saved:
        return {}
    former = safe_yaml.parse(saved)
    if not isinstance(former, dict):
        raise UserError('the options in the training state are no options')
    old, new = dict(_flat(former)), dict(_flat(safe_yaml.parse(text)))
    changes, wrong = {}, []
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key) != new.get(key) and not _is_in(key, _NOT_COMPARED):
            line = f'{key}: {_shown(old, key)} -> {_shown(new, key)}'
            if _is_in(key, _FIXED):
                wrong.append(line)
            else:
                changes[key] = f'changed since the checkpoint: {line}'
    if wrong:
        raise UserError(
            'the checkpoint was written with other options that cannot change: '
            f'{"; ".join(wrong)}. Another name starts a new run'
        )
    return changes


def concern_rates(changes):
    """Whether one of the keys belongs to an optimiser or to the schedule: training states keep those, too."""
    return any(_is_in(key, _RATES) for key in changes)


def _is_in(key, names):
    return any(key == name or key.startswith(f'{name}.') for name in names)


def _flat(block, prefix=''):
    for key, value in block.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', value


def _shown(options, key):
    return options[key] if key in options else '(not there)'
