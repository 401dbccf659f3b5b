"""What stands between gradients and weights: accumulation, clipping, and the refusal of numbers that are not finite.

Every optimiser of every model passes through here, BasicSR's models included, so that their code stays as it is.
"""

import contextlib
import inspect
import types
import weakref
from collections import namedtuple

import torch

Step = namedtuple('Step', 'iteration micro ok terms')


# Optimisers whose fused kernels can be told on the device to leave a step out. That of SGD starts its momentum in a
# step that it leaves out, from memory that nobody has written to, and that of Adagrad is for CPUs.
TOLD = torch.optim.Adam, torch.optim.AdamW


def device_settings(cls: type[torch.optim.Optimizer], device: torch.device, given: dict) -> dict[str, bool]:
    """What an optimiser is to be built with, so that no step waits for the device; empty on CPUs.

    Args:
        given: what the option file sets; it counts.
    """
    if device.type == 'cpu':
        return {}
    if issubclass(cls, TOLD) and not {'fused', 'foreach', 'capturable'} & set(given):
        with contextlib.suppress(RuntimeError):  # no such kernel for this kind of device
            if _leaves_steps_out(cls, device):
                return {'fused': True}
    counts = 'capturable' in inspect.signature(cls).parameters and device.type in ('cuda', 'xpu')
    # Its counters are then on the device, too.
    return {'capturable': True} if counts and not given.get('fused') and 'capturable' not in given else {}


def _leaves_steps_out(cls, device):
    """Whether the fused kernel of this kind of device heeds ``found_inf``, which is tried once, when a run begins."""
    probe = torch.ones(1, device=device, requires_grad=True)
    probe.grad = torch.full_like(probe, torch.nan)
    optimizer = cls([probe], fused=True)
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones((), device=device)
    optimizer.step()
    return probe.item() == 1


class Stepping:
    """Gates the optimisers of one model.

    Args:
        accum_iter: micro-batches whose gradients are averaged into one step.
        grad_clip: largest 2-norm of an optimiser's gradient, or None.

    Attributes:
        scaler: torch's GradScaler where gradients are float16 on their way, or None.
        micro: which micro-batch is next, 0 to accum_iter - 1; the training loop sets it.
        ok: whether this iteration's gradients were finite: a bool on the CPU, a 0-d tensor on devices, where nobody
            waits for it.
        log: the `Step` of every micro-batch since `take`.
    """

    def __init__(self, accum_iter=1, grad_clip=None):
        self.accum_iter, self.grad_clip = accum_iter, grad_clip
        self.iteration, self.micro, self.ok, self.log = 0, accum_iter - 1, True, []
        self.scaler = self._sums = None
        self._stepped = weakref.WeakKeyDictionary()  # optimiser -> ids of the parameters that it has stepped

    def begin(self, iteration, micro=0):
        """Announce a micro-batch; without it, every one is an iteration of its own."""
        self.iteration, self.micro, self.ok = iteration, micro, True

    @property
    def due(self):
        """Whether this micro-batch ends an iteration: only then weights, EMA and history move."""
        return self.micro == self.accum_iter - 1

    def scaled(self, loss):
        """The loss to call ``backward`` on."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def attach(self, optimizer):
        """Put the gate before an optimiser's step; states that it loads become those of its device."""
        optimizer.register_load_state_dict_pre_hook(_with_own_kernels)
        optimizer.register_load_state_dict_post_hook(_align)
        step, zero_grad = optimizer.step, optimizer.zero_grad

        def gated_step(optimizer, closure=None):
            if self.due:
                self._step(optimizer, step)

        def gated_zero_grad(optimizer, set_to_none=True):
            if self.micro == 0 or self.accum_iter == 1:
                zero_grad(set_to_none)

        # Bound methods, because torch's schedulers wrap `step.__func__`.
        optimizer.step = types.MethodType(gated_step, optimizer)
        optimizer.zero_grad = types.MethodType(gated_zero_grad, optimizer)
        return optimizer

    @torch.no_grad()
    def _step(self, optimizer, step):
        parameters = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        if not gradients:
            return step()
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        if self.accum_iter > 1:
            torch._foreach_div_(gradients, self.accum_iter)
        if self.grad_clip is not None:
            largest = torch.nn.utils.clip_grad_norm_(parameters, self.grad_clip)
        else:
            largest = torch.stack([norm.float() for norm in torch._foreach_norm(gradients, torch.inf)]).max()
        finite = torch.isfinite(largest)
        if not _at_hand(finite) and isinstance(optimizer, TOLD) and all(g.get('fused') for g in optimizer.param_groups):
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
            step()
            del optimizer.grad_scale, optimizer.found_inf
        elif not _at_hand(finite) and self._can_undo(optimizer, parameters):
            now = [*parameters, *(value for p in parameters for value in _tensors(optimizer.state[p]))]
            before = [tensor.clone() for tensor in now]
            step()
            for tensor, kept in zip(now, before):
                tensor.copy_(torch.where(finite, tensor, kept))
        else:
            finite = bool(finite)  # the only wait: what such a step leaves behind cannot be taken back
            if finite:
                step()
        self._stepped.setdefault(optimizer, set()).update(map(id, parameters))
        self.ok = finite if self.ok is True else self.ok & finite
        if self.scaler is not None:
            self.scaler.update()  # lowers the scale after a gradient that was not finite

    def _can_undo(self, optimizer, parameters):
        """Whether all that a step changes is on the device, and there already."""
        if not self._stepped.get(optimizer, set()).issuperset(map(id, parameters)):
            return False
        states = [(p, value) for p in parameters for value in optimizer.state[p].values()]
        return all(value is None or isinstance(value, torch.Tensor) and value.device == p.device for p, value in states)

    def record(self, terms):
        """Note the losses of a micro-batch (0-d tensors, already averaged over processes).

        Returns:
            dict: their means over the iteration so far, still on the device.
        """
        self.log.append(Step(self.iteration, self.micro, self.ok, terms))
        if self.micro == 0 or self._sums is None or self.accum_iter == 1:
            self._sums = dict(terms)
        else:
            self._sums = {name: self._sums.get(name, 0) + value for name, value in terms.items()}
        count = min(self.micro, self.accum_iter - 1) + 1
        return {name: value / count if count > 1 else value for name, value in self._sums.items()}

    def take(self):
        """The micro-batches since the last call whose loss or gradient was not finite; waits for the device.

        Returns:
            (list of Step with plain numbers, int: how many iterations were looked at)
        """
        log, self.log = self.log, []
        plain = [
            Step(step.iteration, step.micro, bool(step.ok), {name: float(v) for name, v in step.terms.items()})
            for step in log
        ]
        finite = (torch.isfinite(torch.tensor(list(step.terms.values()))).all() for step in plain)
        # A gradient that overflows while the scaler finds its scale is no failure.
        lenient = self.scaler is not None and bool(plain) and self.scaler.get_scale() > 1
        return [step for step, good in zip(plain, finite) if not (good and (step.ok or lenient))], plain


def _at_hand(tensor):
    """Whether reading the tensor needs no waiting."""
    return tensor.device.type == 'cpu'


def _tensors(state):
    return [value for value in state.values() if isinstance(value, torch.Tensor)]


def _with_own_kernels(optimizer, saved):
    """A state dict with the kernels that this optimiser's groups have; torch would take those of the saved groups.

    It also decides by them where counters are kept.
    """
    groups = [
        {**theirs, **{key: ours[key] for key in ('fused', 'foreach', 'capturable') if key in ours}}
        for theirs, ours in zip(saved['param_groups'], optimizer.param_groups)
    ]
    return {**saved, 'param_groups': groups + saved['param_groups'][len(groups) :]}


def _align(optimizer):
    """Averages in the memory format of their weights, in which fused kernels read both."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            alike = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if alike and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def complete(optimizer: torch.optim.Optimizer) -> None:
    """Begin, at zero, what an optimiser's settings need and its loaded state lacks, such as the maxima of amsgrad."""
    known = inspect.signature(type(optimizer)).parameters
    for group in optimizer.param_groups:
        probe = torch.zeros_like(group['params'][0].detach().flatten()[:1], requires_grad=True)
        probe.grad = torch.zeros_like(probe)
        settings = {key: value for key, value in group.items() if key in known and key != 'params'}
        scratch = type(optimizer)([probe], **settings)
        scratch.step()
        for parameter in group['params']:
            state = optimizer.state.get(parameter) or {}
            for name, value in scratch.state[probe].items() if state else ():
                if state.get(name) is None and isinstance(value, torch.Tensor):
                    state[name] = torch.zeros_like(parameter) if value.shape == probe.shape else value.clone()
