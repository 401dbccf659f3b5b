"""Moving averages of networks: the EMA of the student, and the history network that makes the negatives."""

import torch


@torch.no_grad()
def average_(target, source, decay):
    """target = decay * target + (1 - decay) * source, in place, over parameters; buffers are copied.

    Eq. 6 of the paper with decay = a (0.1 there); decay 0 copies. Both are bare modules of one architecture.
    """
    ours, theirs = list(target.parameters()), list(source.parameters())
    torch._foreach_mul_(ours, decay)
    torch._foreach_add_(ours, theirs, alpha=1 - decay)
    for ours, theirs in zip(target.buffers(), source.buffers()):
        ours.copy_(theirs)


def update_interval(step, iteration, period=100000):
    """Iterations between two history updates at this 1-based iteration.

    Args:
        step: an int, or a list with one entry per ``period`` iterations; past its end the last entry holds
            (the released code raises IndexError there).
    """
    if isinstance(step, int):
        return step
    return step[min((iteration - 1) // period, len(step) - 1)]
