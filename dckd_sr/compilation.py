"""Networks that torch.compile has compiled, and which run as they are where that fails, forwards or backwards."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch.utils._pytree import tree_leaves

from dckd_sr.errors import UserError, out_of_memory, reason

# CUDA graphs write to the same memory in every call: what one of them has returned is gone with the next step, and a
# gradient with the next backward pass.
WITHOUT_CUDA_GRAPHS = {'reduce-overhead': 'default', 'max-autotune': 'max-autotune-no-cudagraphs'}
# Graphs that torch's compiler makes of one piece of code before it leaves it as it is, without a word: 8. Student,
# teacher and history share their code, and so do all trainings of a process, whose stages have sizes of their own.
_MOST = 2**16
_SETTINGS = (  # with the names that they had before torch 2.6
    (('recompile_limit', 'cache_size_limit'), _MOST),
    (('accumulated_recompile_limit', 'accumulated_cache_size_limit'), _MOST),
    # What is raised is caught here, and told.
    (('fail_on_recompile_limit_hit', 'fail_on_cache_limit_hit'), True),
    (('suppress_errors',), False),
)
_MANY = 8  # compilations after the first step that are told at once; fewer, when they have ended


class Compiler:
    """Compiles the networks of a run at their first call, and counts how often.

    A network itself stays as it is: validation has images of many sizes.

    Args:
        opt: the whole option dict; ``compile_mode``, and what CUDA graphs cannot do: ``train.accum_iter``,
            ``train.gradient_shares``, ``logger.gradients``.
        device: where the networks are.

    Attributes:
        mode: torch.compile's mode.
        cuda_graphs: whether it records CUDA graphs.
        counts: (role, id of the network) -> how many of its calls had to be compiled.
    """

    def __init__(self, opt: dict[str, Any], device: torch.device):
        import torch._dynamo.utils  # seconds, and only here
        from torch._functorch import config as functorch_config

        self.mode = opt.get('compile_mode') or 'default'
        self.cuda_graphs = device.type == 'cuda' and self.mode in WITHOUT_CUDA_GRAPHS
        why = _against_cuda_graphs(opt) if self.cuda_graphs else None
        if why is not None:
            mode, self.cuda_graphs = WITHOUT_CUDA_GRAPHS[self.mode], False
            get_root_logger().warning(
                f'compile_mode: {self.mode} runs as {mode}, without CUDA graphs, because of {why}: these '
                'need gradients that CUDA graphs overwrite'
            )
            self.mode = mode
        self.counts = collections.Counter()
        self._compiled, self._entered = {}, None
        self._first = self._before = None  # compilations until the end of the first step, and of the last one
        self._told = False
        self._counters = torch._dynamo.utils.counters
        # Compiled backward passes otherwise give away the buffers that a second pass through them needs:
        # gradient_shares and the measurement of gradients call them several times.
        functorch_config.donated_buffer = False
        config = torch._dynamo.config
        for names, value in _SETTINGS:
            for name in names:
                if hasattr(config, name):
                    setattr(config, name, value)
                    break
        if config.disable:
            get_root_logger().warning('use_compile: nothing is compiled, because TORCH_COMPILE_DISABLE is set')

    def __call__(self, role: str, net: Callable, *inputs, mode: str | None = None, **arguments):
        """``net(*inputs, **arguments)``, compiled; ``mode`` in place of the run's own."""
        key = role, id(net)
        compiled = self._compiled.get(key)
        if compiled is net:
            return net(*inputs, **arguments)
        graphs = self._graphs()
        try:
            if compiled is None:
                compiled = torch.compile(net, mode=mode or self.mode, dynamic=False)
                self._compiled[key] = compiled
            out = compiled(*inputs, **arguments)
        except Exception as error:
            # No compiler, no Triton, an operation that it does not know: whatever its parts raise.
            if out_of_memory(error):
                raise
            out = net(*inputs, **arguments)  # raises where the fault is not the compiler's
            self._leave(role, net, error)
            return out
        if self._graphs() > graphs:
            self.counts[key] += 1
        if torch.is_grad_enabled():
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaf.register_hook(functools.partial(self._enter, role, net))
        return out

    def backward(self, work: Callable[[], Any], keep: Callable[[], Callable[[], None]]) -> Any:
        """``work()``, a step's losses and their backward pass; again where a compiled network fails in the latter.

        Such a pass is compiled when it is first wanted, which is long after the forward pass was fine.

        Args:
            keep: called before it; returns what undoes all that an attempt has changed.

        Raises:
            UserError: with several processes, whose gradients wait for each other in the wrapper around the network.
        """
        undo = keep()
        while True:
            self._entered = None
            try:
                return work()
            except Exception as error:
                if self._entered is None or out_of_memory(error):
                    raise
                role, net = self._entered
                if torch.distributed.is_available() and torch.distributed.is_initialized():
                    raise UserError(
                        f"use_compile: the {role}'s backward pass cannot be compiled: {_reason(error)}; with several "
                        'processes set use_compile: false'
                    ) from error
                self._leave(role, net, error)
            undo()

    def begin_step(self):
        """Say that what was returned in the last step is not needed any more; tell, once, of compilations after the
        first step."""
        torch.compiler.cudagraph_mark_step_begin()
        total = sum(self.counts.values())
        if self._before is not None and self._first is None:
            self._first = collections.Counter(self.counts)
            if self.cuda_graphs and self._counters['inductor']['cudagraph_skips']:
                get_root_logger().warning(
                    f'compile_mode: {self.mode}: torch makes no CUDA graphs of a part of the step; '
                    'TORCH_LOGS=perf_hints says why'
                )
        ended, self._before = total == self._before, total
        if self._first is None or self._told:
            return
        again = collections.Counter()
        for (role, _), count in (self.counts - self._first).items():
            again[role] += count
        if again and (ended or again.total() >= _MANY):
            self._told = True
            each = ', '.join(f'{role} {count}' for role, count in again.items())
            get_root_logger().info(
                f'use_compile: {again.total()} compilations after the first step ({each}), one for each new size of '
                'batch or images; further ones are not told'
            )

    def _graphs(self):
        return self._counters['stats']['unique_graphs']

    def _enter(self, role, net, _gradient):
        self._entered = role, net

    def _leave(self, role, net, error):
        """Run a network as it is from here on."""
        get_root_logger().warning(f'use_compile: the {role} cannot be compiled and runs as it is: {_reason(error)}')
        self._compiled[role, id(net)] = net
        self._entered = None


def _against_cuda_graphs(opt):
    """The keys of a training that need a gradient for longer than CUDA graphs keep it, or None."""
    if not opt.get('is_train'):
        return None
    train = opt.get('train') or {}
    keys = [f'train.accum_iter: {train["accum_iter"]}'] if (train.get('accum_iter') or 1) > 1 else []
    keys += (
        ['train.gradient_shares'] if any(s is not None for s in (train.get('gradient_shares') or {}).values()) else []
    )
    keys += ['logger.gradients'] if (opt.get('logger') or {}).get('gradients') else []
    return ' and '.join(keys) or None


def _reason(error):
    """Of torch's own wrapper, the first line says only that something was raised."""
    return reason(getattr(error, 'inner_exception', error))
