"""Moving averages of networks: the EMA of the student, and the history network that makes the negatives."""

import torch


@torch.no_grad()
def average_(target, source, decay, ok=True):
    """target = decay * target + (1 - decay) * source, in place, over parameters; buffers are copied.

    Eq. 6 of the paper with decay = a (0.1 there); decay 0 copies. Both are bare modules of one architecture. Where
    ``ok``, a bool or a 0-d tensor on their device, is false, nothing moves; a tensor is not waited for.
    """
    ours, theirs = list(target.parameters()), list(source.parameters())
    if isinstance(ok, torch.Tensor):
        differences = torch._foreach_sub(theirs, ours)
        torch._foreach_mul_(differences, ok * (1 - decay))
        torch._foreach_add_(ours, differences)
    elif ok:
        torch._foreach_mul_(ours, decay)
        torch._foreach_add_(ours, theirs, alpha=1 - decay)
    else:
        return
    for ours, theirs in zip(target.buffers(), source.buffers()):
        ours.copy_(torch.where(ok, theirs, ours) if isinstance(ok, torch.Tensor) else theirs)


def update_interval(step, iteration, period=100000):
    """Iterations between two history updates at this 1-based iteration.

    Args:
        step: an int, or a list with one entry per ``period`` iterations; past its end the last entry holds
            (the released code raises IndexError there).
    """
    if isinstance(step, int):
        return step
    return step[min((iteration - 1) // period, len(step) - 1)]
