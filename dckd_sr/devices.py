"""Where networks are: CUDA and ROCm (which torch calls cuda), Apple's MPS, Intel's XPU, or the CPU."""

from __future__ import annotations

from typing import Any

import torch

KINDS = ('cpu', 'cuda', 'mps', 'xpu')


def available() -> list[str]:
    """The kinds of devices that torch can use here."""
    return [kind for kind in KINDS if kind == 'cpu' or torch.get_device_module(kind).is_available()]


def of(opt: dict[str, Any]) -> torch.device:
    """Where a run has its networks: on ``device`` of its options, else on a GPU of CUDA unless num_gpu is 0."""
    kind = opt.get('device') or ('cuda' if opt.get('num_gpu', 1) != 0 and torch.cuda.is_available() else 'cpu')
    return torch.device(kind, torch.cuda.current_device()) if kind == 'cuda' else torch.device(kind)


def wait(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type != 'cpu':
        torch.get_device_module(device).synchronize()


def generator_state(device: torch.device) -> torch.Tensor | None:
    """The state of the device's own global generator; None on the CPU."""
    module = torch.get_device_module(device)
    if device.type == 'mps':
        return module.get_rng_state()
    return None if device.type == 'cpu' else module.get_rng_state(device)


def set_generator_state(state: torch.Tensor, device: torch.device) -> None:
    """Put back what `generator_state` returned for a device of this kind."""
    module = torch.get_device_module(device)
    module.set_rng_state(state) if device.type == 'mps' else module.set_rng_state(state, device)
