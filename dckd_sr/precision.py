"""Which precision float32 networks have on CUDA, and what a run says about it.

torch has two interfaces for TF32. Since 2.9, reading the older one fails where only the newer one was set, and parts of
torch itself, such as its compiler, read the one or the other: so both are set here, and always agree.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class TF32(NamedTuple):
    """What is rounded to the 10 bits of TF32 before it is multiplied, on GPUs that have it."""

    convolutions: bool
    products: bool


def tf32() -> TF32:
    """How torch is set now."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(cudnn, 'conv'):  # since torch 2.9
        return TF32(cudnn.conv.fp32_precision == 'tf32', matmul.fp32_precision == 'tf32')
    return TF32(cudnn.allow_tf32, matmul.allow_tf32)


DEFAULT = tf32()  # torch's own: convolutions, and products where its environment variable says so


def set_tf32(use: bool | None) -> TF32:
    """Set torch for this process: True both, False none, None as torch does by itself; returns what is set."""
    return _set(DEFAULT if use is None else TF32(use, use))


def _set(wanted):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch 2.9 calls the older interface deprecated, and still reads it
        cudnn.allow_tf32, matmul.allow_tf32 = wanted
    if hasattr(cudnn, 'conv'):
        # The older interface leaves convolutions to torch.backends.fp32_precision when it turns TF32 off.
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = 'tf32' if wanted.convolutions else 'ieee'
    return wanted


@contextlib.contextmanager
def tf32_as(use: bool | None) -> Iterator[None]:
    """`set_tf32` inside; afterwards as before."""
    former = tf32()
    set_tf32(use)
    try:
        yield
    finally:
        _set(former)


def rounds(device: torch.device | str) -> TF32:
    """What TF32 is used for on a device now: for nothing on CPUs and on GPUs before Ampere."""
    device = torch.device(device)
    # AMD's GPUs have numbers of their own; which of them have TF32, torch decides.
    there = device.type == 'cuda' and (torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0))
    return tf32() if there else TF32(False, False)


def describe(opt: dict[str, Any], device: torch.device | str) -> str:
    """The precision of a run on CUDA in a line.

    Args:
        opt: ``use_amp``, ``amp_bf16``, ``amp_networks``; what ``use_tf32`` asks for has been set.
        device: of the run.
    """
    rounded, parts = rounds(device), []
    if opt.get('use_amp'):
        networks = ', '.join(opt.get('amp_networks') or ()) or 'all networks'
        parts.append(f'{"bfloat16" if opt.get("amp_bf16") else "float16"} in {networks}')
    names = [name for name, used in zip(('convolutions', 'matrix products'), rounded) if used]
    parts.append(f'float32 with TF32 {" and ".join(names)}' if names else 'float32 without TF32')
    if opt.get('use_tf32') is None and rounded.convolutions:
        parts[-1] += " (torch's default; use_tf32: false is bit-true float32)"
    return f'Precision: {"; else ".join(parts)}.'


def advice(opt: dict[str, Any], device: torch.device | str) -> str | None:
    """Why a training that asks for float16 should ask for bfloat16, on a GPU that has it; or None."""
    device, networks = torch.device(device), opt.get('amp_networks') or ('student', 'encoder')
    scaled = opt.get('use_amp') and not opt.get('amp_bf16') and {'student', 'encoder'} & set(networks)
    if not scaled or device.type != 'cuda' or not torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    return (
        'use_amp: float16 cannot hold gradients as small as those of weakly weighted losses: the first level of the '
        'contrastive loss is 5 to 10 % off at loss_weight 0.01 and a scale of 65536, 20 to 40 % at 0.001. amp_bf16: '
        "true has float32's range, and this GPU can do it."
    )
