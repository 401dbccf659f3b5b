"""Feature maps of any network by the paths of its modules: ``body.3``, ``layers.1``, ``upsample:input``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import nn

from dckd_sr.errors import UserError

_INPUT = ':input'
_SHOWN = 8


class Taps:
    """Reads what modules put out, or take in, while their network runs.

        with taps as maps:
            output = net(x)
        # maps[i] is the tensor at paths[i], of this call

    A tensor is copied when its module returns: what the network adds to it later in place (BasicSR's EDSR and RCAN add
    the long skip to the output of ``conv_after_body``) is not in it. ``upsample:input`` is that sum. Of a module that
    runs several times in a call the last output counts. Hooks are there inside the ``with`` only, and nothing is kept
    after it: other calls of the network are as if there were no taps. Networks that torch.compile has compiled do not
    call hooks that came later: run them as they are.

    Args:
        net: a network, or DistributedDataParallel around it.
        paths: of modules, as in ``named_modules``; with ``:input`` for a module's first argument.
        where: put before messages, such as the option key of the paths.

    Raises:
        UserError: no such module, or a mere list of modules; the message has the nearest of those that run. On leaving
            the ``with``: a module that did not run, or whose output is no tensor.
    """

    def __init__(self, net: nn.Module, paths: Sequence[str], where: str = ''):
        net = net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net
        modules = {
            name: module
            for name, module in (net.named_modules() if paths else ())
            if name and type(module).forward is not nn.Module.forward  # a ModuleList is never called
        }
        self.paths, self.where = list(paths), where
        self._modules = []
        for path in self.paths:
            name = path[: -len(_INPUT)] if path.endswith(_INPUT) else path
            if name not in modules:
                near = difflib.get_close_matches(name, modules, n=_SHOWN, cutoff=0)
                more = f', and {len(modules) - len(near)} more' if len(modules) > len(near) else ''
                raise UserError(f'{where}{type(net).__name__} has no module {path}; nearest: {", ".join(near)}{more}')
            self._modules.append(modules[name])
        self._handles, self._maps = [], None

    def __enter__(self) -> list[torch.Tensor]:
        self._maps = maps = [None] * len(self.paths)
        for index, (path, module) in enumerate(zip(self.paths, self._modules)):
            self._handles.append(_hook(module, path.endswith(_INPUT), maps, index))
        return maps

    def __exit__(self, kind, error, traceback):
        for handle in self._handles:
            handle.remove()
        maps, self._handles, self._maps = self._maps, [], None
        if kind is not None:
            return
        for path, value in zip(self.paths, maps):
            if value is None:
                raise UserError(f'{self.where}the module {path} does not run in this network, or gives no tensor')


def _hook(module, takes_input, maps, index):
    def keep(value):
        if isinstance(value, torch.Tensor):
            maps[index] = value.clone()

    if takes_input:
        return module.register_forward_pre_hook(lambda module, inputs: keep(inputs[0] if inputs else None))
    return module.register_forward_hook(lambda module, inputs, output: keep(output))
