"""Networks from files of any kind: checkpoints with the options that belong to them, ONNX, TorchScript."""

from __future__ import annotations

import inspect
import io
import json
import math
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY

from dckd_sr import checkpoint, imports, network_facts, option_checks, option_files, options, restricted_pickle, zoo
from dckd_sr.archs import spandrel_arch
from dckd_sr.checkpoint import METADATA
from dckd_sr.errors import UserError, looked_in, reason
from dckd_sr.inference import padding_of

SCRIPT_METADATA = f'{METADATA}.json'
ONNX_NEEDED = 'this needs onnx and onnxruntime: pip install "dckd_sr[onnx]"'


@dataclass
class Model:
    """A network that is ready to run.

    Attributes:
        run: (B, channels, h, w) float32 in [0, 1] -> (B, channels, h * scale, w * scale) float32, unclamped. It has
            what `inference.infer` looks for: ``window_size``, ``padder_size`` and ``smallest_side`` where sides matter.
        scale: output size over input size.
        channels: 1 or 3.
        about: what it is and where its architecture is from, for people.
        arch: network block (type and arguments) that builds it, or None where nothing but the file tells.
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    scale: int
    channels: int
    about: str
    arch: dict[str, Any] | None = None

    @property
    def smallest_side(self) -> int:
        """Smaller images are padded to it."""
        return getattr(self.run, 'smallest_side', None) or 1

    @property
    def grid(self) -> int:
        """Tiles start at multiples of it."""
        return math.lcm(padding_of(self.run), getattr(self.run, 'padder_size', 1))

    def metadata(self, precision: str, size: tuple[int, int] | None = None) -> str:
        """What an exported file says about itself, as JSON; ``size`` where it is for images of one size."""
        fixed = {'size': list(size)} if size else {}
        told = {'arch': self.arch, 'scale': self.scale, 'channels': self.channels, 'padder_size': self.grid}
        return json.dumps({**told, **fixed, 'smallest_side': self.smallest_side, 'precision': precision})


def load(
    path: str,
    opt_file: str | None = None,
    letter: str = 'g',
    param_key: str | None = None,
    device: str | torch.device = 'cpu',
) -> Model:
    """The model of a file.

    The architecture of a checkpoint is what the first of these says: ``opt_file``; the file's own metadata (a
    .safetensors that we exported); ``resolved.yml`` of the run whose ``models`` folder it lies in; its tensors, see
    `archs.spandrel_arch`. ONNX and TorchScript files carry their network. A TorchScript file is a program: it does what
    it was written to do.

    Args:
        path: .pth, .ckpt, .safetensors, .onnx, or a TorchScript file.
        opt_file: option file whose ``network_<letter>`` it is, for checkpoints.
        letter: 'g' student, 't' teacher.
        param_key: the entry with the weights, see `checkpoint.read_weights`.
        device: where it runs.

    Raises:
        UserError: unreadable, of no known architecture, or no network from images to images.
    """
    file, device = Path(path), torch.device(device)
    if not file.is_file():
        there = 'a folder' if file.is_dir() else f'not there{looked_in(path, " (looked in {})")}'
        raise UserError(f'{path} is {there}; expected the file of a network')
    kind = 'onnx' if file.suffix == '.onnx' else 'script' if _is_script(file) else None
    if kind and (opt_file or param_key):
        raise UserError(f'{path} carries its network: -opt and --param_key are for checkpoints')
    if kind is not None:
        try:
            net = OnnxNetwork(str(file), device) if kind == 'onnx' else ScriptNetwork(str(file), device)
            about = f'{net.kind}, {net.told.get("precision", "as it is")}'
            return _measured(net, net.told.get('arch'), (net.channels,), about, device)
        except UserError as error:
            raise UserError(f'{file}: {error}') from error
    block, origin = _block(file, opt_file, letter)
    net, used = _build(file, block, origin, param_key)
    net = net.to(device).eval().requires_grad_(False)
    about = f'{(block or {}).get("type") or type(net).__name__}, weights: {used}, architecture from {origin}'
    return _measured(net, block, network_facts.CHANNELS, about, device)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def _block(file, opt_file, letter):
    """(network block or None, where it is from)."""
    if opt_file is not None:
        return _block_of(option_files.read(opt_file), letter), opt_file
    block = checkpoint.read_metadata(file).get('arch')
    if block:
        try:
            block = _checked(block, f'{file}: its metadata')
        except UserError as error:
            if imports.ADVICE in str(error):  # of an option file: this file is not asked what to run
                raise UserError(f'{error}; -opt FILE, with imports and network_{letter}') from error
            raise
        arguments = inspect.signature(ARCH_REGISTRY.get(block['type'])).parameters
        # Option files are the user's own; this may be anybody's, and some archs read or fetch files when built.
        if block['type'] == 'VGGFeatureExtractor' or any(name.endswith('path') for name in arguments):
            raise UserError(f'{file}: its metadata: {block["type"]} reads other files; -opt FILE says what it is')
        return block, 'the metadata of the file'
    resolved = file.resolve().parent.parent / 'resolved.yml'
    if file.resolve().parent.name == 'models' and resolved.is_file():
        letter = 't' if file.name.startswith('net_t') else 'g'
        return _block_of(option_files.read(str(resolved)), letter), option_files.shown(resolved)
    return None, 'its tensors'


def _block_of(file, letter):
    """network_<letter> of an option file, as far as its other parts matter for it: `imports`, which are imported."""
    where, name, report = option_files.shown(file.path), f'network_{letter}', option_checks.Report()
    options.import_modules(file.options.get('imports'), report)
    if report.problems:
        raise UserError(f'{where}: {"; ".join(report.problems)}')
    block = file.options.get(name)
    if not isinstance(block, dict):
        others = [key for key in file.options if key.startswith('network_') and isinstance(file.options[key], dict)]
        raise UserError(f'{where} has no {name}' + (f'; it has {", ".join(others)}' if others else ''))
    if block.get('type') == 'zoo':
        block = zoo.resolve_zoo(block, {}, letter)[0]
    block = {key: value for key, value in block.items() if key != 'allow_random'}
    if block.get('type') == 'spandrel':  # the file is the one to load
        return {key: value for key, value in block.items() if key not in ('path', 'param_key')}
    return _checked(block, f'{where}: {name}')


def _checked(block, where):
    report = option_checks.Report()
    if not isinstance(block, dict) or block.get('type') == 'spandrel':
        raise UserError(f'{where}: expected the type and the arguments of an arch')
    cls = option_checks.check_arch(report, 'arch', block)
    if report.problems:
        raise UserError(f'{where}: {"; ".join(report.problems)}')
    if not inspect.isclass(cls) or not issubclass(cls, torch.nn.Module):
        raise UserError(f'{where}: {block["type"]} is no network')
    return block


def _build(file, block, origin, param_key):
    if block is None or block['type'] == 'spandrel':
        options = {key: value for key, value in (block or {}).items() if key != 'type'}
        try:
            return spandrel_arch.build(str(file), param_key, options, '--param_key')
        except UserError as error:
            if spandrel_arch.UNKNOWN in str(error):
                raise UserError(f'{file} is of no arch that its tensors tell: -opt FILE, with its network') from error
            raise
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of torch, about lines of archs that a user cannot change
            net = build_network(dict(block))
    except Exception as error:  # whatever a constructor makes of its arguments
        raise UserError(f'{origin}: {block["type"]} cannot be built: {reason(error)}') from error
    weights, used = checkpoint.read_weights(file, param_key, '--param_key')
    found = spandrel_arch.infer(weights)  # which renames what has the names of other programs
    checkpoint.load_weights(net, found[1] if found else weights, f'{file} ({used})')
    return net, used


def describe_arch(path: str, block: dict[str, Any] | None, param_key: str | None = None) -> dict[str, Any] | None:
    """The plain block that builds a checkpoint's network without the file, or None where only spandrel builds it."""
    if block is not None and block['type'] != 'spandrel':
        return block
    found = spandrel_arch.describe(path, param_key)
    if not found.is_ours:
        return None
    options = {key: value for key, value in (block or {}).items() if key != 'type'}
    return {'type': found.type, **found.options, **options}


# ---------------------------------------------------------------------------------------------------------------------
# Exported files


def import_onnxruntime():
    """The module, quiet.

    Raises:
        UserError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(ONNX_NEEDED) from error
    onnxruntime.set_default_logger_severity(3)
    return onnxruntime


class OnnxNetwork:
    """An ONNX model in a network's place: (B, C, h, w) tensor -> tensor.

    Args:
        content: the model, as bytes or path.
        device: 'cuda' where onnxruntime has it.

    Raises:
        UserError: no valid model, or not one of one image in and one out.
    """

    kind = 'ONNX'

    def __init__(self, content: bytes | str, device: torch.device):
        runtime = import_onnxruntime()
        wanted = ['CPUExecutionProvider']
        if device.type == 'cuda':
            if 'CUDAExecutionProvider' not in runtime.get_available_providers():
                raise UserError(f'--device {device}: this onnxruntime has no CUDA: pip install onnxruntime-gpu')
            wanted.insert(0, ('CUDAExecutionProvider', {'device_id': device.index or 0}))
        elif device.type != 'cpu':
            raise UserError(f'--device {device}: onnxruntime runs on cpu and cuda here')
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(content, options, providers=wanted)
        except Exception as error:  # onnxruntime's own kinds, and protobuf's
            raise UserError(f'no ONNX model that onnxruntime can run: {reason(error)}') from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or len(inputs[0].shape) != 4 or 'float' not in inputs[0].type:
            names = ', '.join(f'{each.name} {each.type} {each.shape}' for each in inputs)
            raise UserError(f'expected one image in (B, C, h, w) and one out; this model takes {names}')
        self.name, self.half = inputs[0].name, 'float16' in inputs[0].type
        self.told = checkpoint.parse_metadata(self.session.get_modelmeta().custom_metadata_map.get(METADATA))
        fixed = inputs[0].shape[1]
        self.channels = fixed if isinstance(fixed, int) else 3
        self.padder_size = _whole(self.told.get('padder_size'))
        sides = inputs[0].shape[2:]
        self.fixed_size = tuple(sides) if all(isinstance(side, int) for side in sides) else None
        self.smallest_side = 1
        if self.fixed_size is None and 'smallest_side' in self.told:
            self.smallest_side = _whole(self.told['smallest_side'])
        elif self.fixed_size is None:
            self.smallest_side = _smallest_side(content, self.name, self.channels, self.half)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        image = x.detach().cpu().numpy().astype(np.float16 if self.half else np.float32)
        try:
            [out] = self.session.run(None, {self.name: image})
        except Exception as error:
            raise UserError(f'the ONNX model fails on {x.shape[3]}x{x.shape[2]}: {reason(error)}') from error
        return torch.from_numpy(out.astype(np.float32)).to(x.device)


# onnxruntime ends the process on sizes that some operations cannot take, so a process of its own finds out.
_TRY_SIZES = """
import sys, numpy, onnxruntime
content, name, channels, kind = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
session = onnxruntime.InferenceSession(content or sys.stdin.buffer.read(), options, ['CPUExecutionProvider'])
for side in (64, 32, 24, 16, 12, 8, 4, 2, 1):
    [out] = session.run(None, {name: numpy.full((1, int(channels), side, side), 0.5, kind)})
    if not out.shape[2] or out.shape[2] % side or not numpy.isfinite(out).all():
        break
    print(side, flush=True)
"""


def _smallest_side(content, name, channels, half):
    """A side that an ONNX model takes that does not say it, near the smallest; 64 where it takes none."""
    path, piped = (content, None) if isinstance(content, str) else ('', content)
    command = [sys.executable, '-c', _TRY_SIZES, path, name, str(channels), 'float16' if half else 'float32']
    printed = subprocess.run(command, input=piped, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    return min(map(int, printed.split()), default=64)


def _is_script(file):
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name.partition('/')[2] for name in archive.namelist()]
            script = 'constants.pkl' in names and any(name.startswith('code/') for name in names)
            if script:
                restricted_pickle.refuse_bombs(archive, file.stat().st_size)
    except (OSError, zipfile.BadZipFile):
        return False
    return script


class ScriptNetwork:
    """A TorchScript file in a network's place: (B, C, h, w) tensor -> tensor.

    Raises:
        UserError: no such file, or one of another torch.
    """

    kind = 'TorchScript'

    def __init__(self, file: str | io.BytesIO, device: torch.device):
        extra = {SCRIPT_METADATA: ''}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of torch: advice to write other files
                self.module = torch.jit.load(file, map_location=device, _extra_files=extra).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(f'no TorchScript file that this torch reads: {reason(error)}') from error
        self.told = checkpoint.parse_metadata(extra[SCRIPT_METADATA])
        self.channels, self.padder_size = self.told.get('channels', 3), _whole(self.told.get('padder_size'))
        self.fixed_size, self.smallest_side = _sides(self.told.get('size')), None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return self.module(x)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            line = str(error).strip().splitlines()[-1]  # after the module's own lines
            raise UserError(f'the TorchScript module fails on {x.shape[3]}x{x.shape[2]}: {line}') from error


def _whole(value):
    return value if isinstance(value, int) and 0 < value <= 4096 else 1


def _sides(value):
    fine = isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value)
    return tuple(value) if fine else None


def _measured(net, arch, channels, about, device):
    """The `Model` of a network, measured: what files say of themselves is not needed for that."""
    if channels[0] not in network_facts.CHANNELS:
        raise UserError(f'this network reads {channels[0]} channels; images have 1 or 3')
    smallest, fixed = getattr(net, 'smallest_side', None), getattr(net, 'fixed_size', None)
    found = network_facts.measure(net, padding_of(net), device, channels, smallest, fixed)
    net.smallest_side = found[2]
    return Model(net, found[1], found[0], f'{about}, x{found[1]}', arch)
