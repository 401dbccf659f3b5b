"""How the networks of a step run: precision, memory format, compilation, activation checkpointing.

What changes more than rounding is off unless the option file asks for it; `docs/performance.md` says what each brings.
Losses are computed in float32 whatever the networks run in.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch import nn
from torch.utils.checkpoint import checkpoint

from dckd_sr import precision
from dckd_sr.compilation import Compiler
from dckd_sr.errors import UserError
from dckd_sr.ops import winograd

ROLES = ('student', 'teacher', 'history', 'encoder')


class Speed:
    """Runs networks as the option file asks.

    Args:
        opt: the whole option dict: ``use_amp`` (mixed precision, float16 or with ``amp_bf16`` bfloat16) for the roles
            in ``amp_networks`` (all), ``use_channels_last``, ``use_compile`` with ``compile_mode``, ``use_checkpoint``,
            ``use_tf32`` (absent: as torch does by itself). Other absent keys are off.
        device: where the networks are.

    Attributes:
        scaler: the gradient scaler that float16 needs in training, or None.
    """

    def __init__(self, opt: dict[str, Any], device: torch.device | str):
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if opt.get('amp_bf16') else torch.float16
        self.amp = tuple(opt.get('amp_networks') or ROLES) if opt.get('use_amp') else ()
        self.channels_last = ROLES if opt.get('use_channels_last') else ()
        if self.device.type == 'cpu':
            self.channels_last = {*self.channels_last, 'encoder'}  # the same numbers up to rounding, sooner
        if self.amp and not torch.amp.is_autocast_available(self.device.type):
            raise UserError(
                f'use_amp: torch has no mixed precision for the device {self.device.type}; set use_amp: false'
            )
        if self.amp and self.device.type == 'cpu' and torch.backends.cpu.get_cpu_capability() == 'AVX2':
            get_root_logger().warning('use_amp: this processor has no instructions for 16 bits; it will be much slower')
        self.checkpointing = bool(opt.get('use_checkpoint'))
        self.compile_mode = (opt.get('compile_mode') or 'default') if opt.get('use_compile') else None
        scaled = self.dtype == torch.float16 and {'student', 'encoder'} & set(self.amp)  # gradients pass through these
        self.scaler = torch.amp.GradScaler(self.device.type) if scaled else None
        self._uncompiled, self._plainly = set(), False
        if self.compile_mode is not None:
            self.compiler = Compiler(opt, self.device)
            self.compile_mode = self.compiler.mode
        precision.set_tf32(opt.get('use_tf32'))

    def prepare(self, role: str, net: nn.Module) -> nn.Module:
        """Set up a network, in place, before training; its parameters' names and values stay.

        Activation checkpointing is for the student, whose activations wait for the backward pass.
        """
        if role != 'student' and self.device.type == 'cpu':
            winograd.speed_up(net)
        if role in self.channels_last:
            net.to(memory_format=torch.channels_last)
        if role == 'student' and self.checkpointing:
            for block in _blocks(net):
                block.forward = functools.partial(_recomputed, block.forward)
        return net

    def keep_uncompiled(self, role: str, why: str):
        """Run the networks of a role as they are, whatever the option file asks for: their hooks must be called."""
        self._uncompiled.add(role)
        if self.compile_mode is not None:
            get_root_logger().warning(f'use_compile: the {role} is not compiled, because {why}')

    def begin_step(self, measured: bool = False) -> Compiler | None:
        """Begin a step.

        Args:
            measured: several backward passes will go through its networks. CUDA graphs keep a gradient only until the
                next one: such a step runs without them.

        Returns:
            the `Compiler` that knows what to do where a backward pass fails, or None where nothing is compiled.
        """
        if self.compile_mode is None:
            return None
        self.compiler.begin_step()
        self._plainly = measured and self.compiler.cuda_graphs
        return self.compiler

    def compiled(self, function, name: str):
        """A function of tensors, compiled where the option file asks for it; ``name`` is for messages."""
        if self.compile_mode is None or self.device.type == 'cpu':
            return function
        return functools.partial(self.compiler, name, function, mode='default')

    def __call__(self, role: str, net, x: torch.Tensor, **arguments):
        """``net(x, **arguments)``, x being (B, C, h, w). Output images are float32, also where the network is not."""
        if role in self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with self.autocast(role):
            plain = self.compile_mode is None or self._plainly or role in self._uncompiled
            out = net(x, **arguments) if plain else self.compiler(role, net, x, **arguments)
        half = isinstance(out, torch.Tensor) and out.dtype in (torch.float16, torch.bfloat16)
        return out.float() if half else out

    def autocast(self, role: str, use: bool = True):
        """The context of mixed precision, where the option file asks for it."""
        if not use or role not in self.amp:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def _blocks(net):
    """The blocks whose activations are worth computing twice: members, with layers inside, of a network's lists."""
    for module in net.children():
        members = [m for m in module.children() if next(m.children(), None) is not None]
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(members) > 1:
            yield from members
        else:
            yield from _blocks(module)


def _recomputed(forward, *inputs):
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)
