"""A CUDA device on a machine that has none: tensors with shapes, types and devices, but without values.

What a step needs of a GPU's memory, and whether it would wait for one, is known without running a single kernel. Some
of the interfaces of torch that are used here are private; they were tried with torch 2.13.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dckd_sr.errors import UserError

SOURCE = Path(__file__).with_suffix('.cpp')


@functools.cache
def load() -> ctypes.CDLL | None:
    """Give torch's autograd a device to work for; to be called before the first backward pass of the process.

    Returns:
        the library of fake_gpu.cpp; None on a machine with a GPU, which needs none.

    Raises:
        UserError: no C++ compiler, or one that cannot read torch's headers.
    """
    if torch.cuda.is_available():
        return None
    compiler = shutil.which('g++') or shutil.which('clang++')
    if compiler is None:
        raise UserError('no C++ compiler: a GPU that is not there needs g++ or clang++ to be installed')
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, 'fake_gpu.so')
        command = [compiler, '-shared', '-fPIC', '-std=c++20', '-O0', f'-I{root / "include"}', str(SOURCE)]
        command += [f'-L{root / "lib"}', '-lc10', '-ltorch_cpu', '-o', str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if 'error' in line] or [f'status {done.returncode}']
            raise UserError(f'{compiler} cannot compile {SOURCE.name} for torch {torch.__version__}: {lines[0]}')
        return ctypes.CDLL(str(library))


class _Generator(torch.Generator):
    """A generator of the device that is not there; fakes need no numbers of it."""

    def __new__(cls, device='cpu'):
        return super().__new__(cls, 'cpu')


def _converted(module, convert, recurse=True):
    """``nn.Module._apply`` with new parameters: a fake one cannot take the data of another device."""
    for child in module.children() if recurse else ():
        child._apply(convert)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                module._parameters[name] = nn.Parameter(convert(parameter), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module


@contextlib.contextmanager
def fake_gpu(count: int = 1) -> Iterator[FakeTensorMode]:
    """Inside, every new tensor is a fake one, and ``torch.cuda`` answers as with this many GPUs.

    Reading a value of a fake (``item``, ``bool``) fails outside of `Waits`.
    """
    library = load()
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        'is_available': lambda: True,
        'device_count': lambda: count,
        'current_device': lambda: 0,
        'is_bf16_supported': lambda *_, **__: True,
        'synchronize': lambda *_, **__: None,
        'get_rng_state': lambda *_, **__: state,
        'set_rng_state': lambda *_, **__: None,
        'manual_seed': lambda *_: None,
        'manual_seed_all': lambda *_: None,
        'get_device_name': lambda *_: 'a GPU that is not there',
        'get_device_capability': lambda *_: (9, 0),
        'empty_cache': lambda: None,
    }
    with contextlib.ExitStack() as stack:
        if library is not None:
            library.swap_hooks()
            stack.callback(library.swap_hooks)
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch, 'Generator', _Generator))
        stack.enter_context(mock.patch.object(nn.Module, '_apply', _converted))
        stack.enter_context(mock.patch.object(FakeTensorMode, 'avoid_device_init', property(lambda self: True)))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


class Waits(TorchDispatchMode):
    """Notes where the host would wait for the device, and lets it go on with a value.

    Attributes:
        found: (what, the line of this package or of BasicSR) -> how often.
    """

    READ, UNSCALE, UPDATE = (
        'aten::_local_scalar_dense',
        'aten::_amp_foreach_non_finite_check_and_unscale_',
        'aten::_amp_update_scale_',
    )
    SIZES = ('nonzero', 'masked_select', 'unique', 'bincount')  # only the device knows the size of what they return

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.name(), kwargs or {}
        if name == self.READ:
            if args[0].device.type == 'cuda':
                self._note('item')
            return 1.0 if args[0].dtype.is_floating_point else True if args[0].dtype == torch.bool else 1
        if name in (self.UNSCALE, self.UPDATE):  # kernels that fakes do not know
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            if any(tensor.device.type != 'cuda' for tensor in tensors):
                raise RuntimeError(f'{name} on {sorted({str(tensor.device) for tensor in tensors})}')
            return None if name == self.UNSCALE else args[0]
        there = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.device.type == 'cuda']
        masked = name.startswith('aten::index') and any(leaf.dtype == torch.bool for leaf in there[1:])
        if there and (masked or any(word in name for word in self.SIZES)):
            self._note(name)
        if name in ('aten::copy_', 'aten::_to_copy'):
            source = args[1] if name == 'aten::copy_' else args[0]
            target = args[0].device if name == 'aten::copy_' else torch.device(kwargs.get('device') or source.device)
            blocks = not (args[2] if len(args) > 2 else kwargs.get('non_blocking', False))
            if blocks and source.device.type != target.type:
                self._note(f'copy {source.device.type} to {target.type}, {tuple(source.shape)}')
        return func(*args, **kwargs)

    def _note(self, what):
        lines = [f for f in traceback.extract_stack() if '/dckd_sr/' in f.filename or '/basicsr/' in f.filename]
        lines = [f for f in lines if f.filename != __file__]
        where = f'{Path(lines[-1].filename).name}:{lines[-1].lineno} {lines[-1].line}' if lines else ''
        self.found[what, where] += 1
