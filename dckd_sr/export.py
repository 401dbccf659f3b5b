"""A trained network as a file for other programs.

python -m dckd_sr.export net_g_latest.pth --to onnx          any image size; checked by onnxruntime against torch
python -m dckd_sr.export net_g_latest.pth --to torchscript
python -m dckd_sr.export net_g_latest.pth --to safetensors   weights that say which architecture they are for
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import io
import itertools
import logging
import math
import os
import re
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import skimage
import spandrel
import torch
from safetensors.torch import save as to_safetensors

from dckd_sr import checkpoint, pictures
from dckd_sr.archs import spandrel_arch
from dckd_sr.commands import Parser
from dckd_sr.data import pair_sizes
from dckd_sr.errors import UserError, entry_point, reason
from dckd_sr.evaluation import score, tensor2bgr
from dckd_sr.exportable import Exportable, SizeFree, recorded
from dckd_sr.inference import infer
from dckd_sr.model_files import (
    METADATA,
    ONNX_NEEDED,
    SCRIPT_METADATA,
    OnnxNetwork,
    ScriptNetwork,
    describe_arch,
    import_onnxruntime,
    load,
)
from dckd_sr.ops.resize import imresize, modcrop

CPU = torch.device('cpu')
SUFFIXES = {'onnx': '.onnx', 'torchscript': '.pt', 'safetensors': '.safetensors'}
SIZES = ((61, 94), (104, 75))  # height and width of the check's images: neither square nor multiples of a window
SMALL_SIZES = ((21, 38), (44, 27))  # where torch computes float16 on a CPU, which is slow
PHOTOGRAPH = Path(skimage.__file__).parent / 'data' / 'chelsea.png'
TOLERANCE = 0.1 / 255  # of float32: more is a network that was exported wrongly, not rounding
LEAST_OF_HALF = 35  # dB of float16: less is more than rounding
_LONGEST = 300  # characters of torch's messages, which may hold a whole network
_EXAMPLE = (2, 48, 40)  # batch, height, width of the image that export records with
_OPSET = 17
_TIMED = 128  # side of the image that is timed
_CALIBRATION = 32, 256  # images, and side of the part of each that counts


@entry_point()
def main(argv=None):
    """Command line entry point.

    Returns:
        exit code: 0 done, 2 a mistake in arguments or files (one message, no traceback), 130 interrupted.
    """
    run(_parser().parse_args(argv))


def _parser():
    parser = Parser(prog='python -m dckd_sr.export', description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('checkpoint', help='.pth, .ckpt or .safetensors')
    add('--to', required=True, choices=list(SUFFIXES), help='kind of file')
    add('-o', '--output', metavar='FILE', help='default: beside the checkpoint')
    add('-opt', '--opt', metavar='FILE', help="option file with the network; default: the run's, or tensors tell")
    add('--network', choices=['g', 't'], default='g', help='of -opt: network_g (default) or network_t')
    add('--param_key', help='the entry with the weights; default: params_ema, params, state_dict, ...')
    add('--half', action='store_true', help='float16; inputs and outputs stay float32')
    add('--int8', action='store_true', help='8-bit integers (onnx only); needs --calibration')
    add('--calibration', metavar='FOLDER', help='images as the network will get them (LQ), some 10 to 100')
    add('--image', help='what the export is checked on; default: a photograph of scikit-image')
    add('--test', nargs=2, metavar=('LQ', 'GT'), help='folders of pairs: PSNR of float32 and of the exported file')
    add(
        '--size',
        metavar='HxW',
        help='for images of one LQ size alone, which some networks need; others are tiled to it',
    )
    add('--force', action='store_true', help='replace FILE if it exists')
    return parser


def run(args: argparse.Namespace) -> Path:
    """Export as the command line says, check it, print what was found.

    Returns:
        the file.

    Raises:
        UserError: see the messages; nothing is written then.
    """
    target = _target(args)
    pairs = _pairs(*args.test) if args.test else []
    calibration = _calibration(args.calibration) if args.int8 else []
    check, size = pictures.read(args.image or PHOTOGRAPH).pixels, _size(args)
    least = [max(sides) for sides in zip(*([size] if size else SIZES))]
    if args.image and any(have < wanted for have, wanted in zip(check.shape, least)):
        raise UserError(f'--image {args.image}: at least {least[1]}x{least[0]} px are needed for the check')
    check = _fitted(check, least, None)
    model = load(args.checkpoint, args.opt, args.network, args.param_key)
    if not isinstance(model.run, torch.nn.Module):
        raise UserError(f'{args.checkpoint} is an exported file; expected a checkpoint')
    for lq, low, gt, high in pairs:
        problem = pair_sizes.misfit(gt, high.shape, lq, low.shape, model.scale)
        if problem:
            raise UserError(f'--test: {problem}')
    model.arch = describe_arch(args.checkpoint, model.arch, args.param_key)
    precision = 'float16' if args.half else 'int8' if args.int8 else 'float32'
    print(f'network     {model.about}, {sum(p.numel() for p in model.run.parameters()):,} parameters')
    told, plain = model.metadata(precision, size), None
    slow = args.half and args.to == 'torchscript'
    sizes = [size] if size else SMALL_SIZES if slow else SIZES
    if args.to == 'safetensors':
        content = _safetensors(model, args.half, told)
        exported, theirs = _from_safetensors(content, model)
    elif args.to == 'torchscript':
        content = _torchscript(model, args.half, told, size)
        exported = ScriptNetwork(io.BytesIO(content), CPU)
    else:
        content, exported = _onnx(model, args.half, told, check, sizes, size)
        if args.int8:
            plain = exported
            images = [
                _channels(_fitted(image, size or (model.smallest_side,) * 2, size), model.channels)
                for image in calibration
            ]
            content = _int8(content, images)
            exported = OnnxNetwork(content, CPU)
    with torch.inference_mode():
        if args.to != 'onnx' or args.int8:
            _tell(_compare(model, exported, check, precision, sizes))
        if slow:
            print('speed       torch computes float16 on GPUs; on a CPU it takes many times as long')
        elif args.to == 'safetensors':
            _open_in_spandrel(model, theirs, check)
        else:
            _speed(model, [plain, exported] if plain else [exported], precision, size)
        if pairs:
            _cost(model, exported, pairs, precision)
    size, _ = checkpoint.write(content, target)
    print(f'written     {target} ({size / 1e6:.2f} MB)')
    return target


def _size(args):
    """(height, width) of --size, or None."""
    if args.size is None:
        return None
    found = re.fullmatch(r'(\d{1,5})x(\d{1,5})', args.size)
    if not found or not min(int(side) for side in found.groups()):
        raise UserError(f'--size {args.size}: expected height and width in LQ pixels, such as 64x64')
    if args.to == 'safetensors':
        raise UserError(f'--size {args.size} --to safetensors: weights are for any size')
    return int(found[1]), int(found[2])


def _target(args):
    if args.int8 and args.to != 'onnx':
        raise UserError(f'--int8 --to {args.to}: 8-bit integers are for --to onnx')
    if args.int8 and args.half:
        raise UserError('--int8 --half: one of the two')
    if args.int8 != bool(args.calibration):
        raise UserError('--int8 and --calibration FOLDER belong together')
    if args.to == 'onnx':
        import_onnxruntime()
        if importlib.util.find_spec('onnx') is None:
            raise UserError(ONNX_NEEDED)
    source, suffix = Path(args.checkpoint), SUFFIXES[args.to]
    ending = '_fp16' if args.half else '_int8' if args.int8 else ''
    target = Path(args.output) if args.output else source.with_name(f'{source.stem}{ending}{suffix}')
    if target.is_dir():
        target = target / f'{source.stem}{ending}{suffix}'
    if target.suffix != suffix:
        raise UserError(f'{target} should end in {suffix}')
    if target.exists() and target.resolve() == source.resolve():
        raise UserError(f'{target} is the checkpoint itself; name another file with -o')
    if target.exists() and not args.force:
        raise UserError(f'{target} exists; name another file with -o or add --force')
    return target


# ---------------------------------------------------------------------------------------------------------------------
# The files


def _safetensors(model, half, told):
    weights = {}
    for key, value in spandrel_arch.as_spandrel_reads(model.run).items():
        weights[key] = (value.half() if half and value.is_floating_point() else value).contiguous().clone()
    return to_safetensors(weights, {METADATA: told, 'format': 'pt'})


def _from_safetensors(content, model):
    """The network that we read, and what spandrel makes of the file, or None."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f'exported{SUFFIXES["safetensors"]}'
        checkpoint.write(content, path)
        again = load(str(path))
        try:
            theirs = spandrel.ModelLoader('cpu').load_from_file(path)
        except Exception:  # UnsupportedModelError, or of a variant that it cannot build
            theirs = None
    if again.scale != model.scale:
        raise UserError(f'the file would be read as {again.about}, which is not x{model.scale}; it was not written')
    return again.run, theirs


def _example(model, size):
    batch, *sides = (1, *size) if size else _EXAMPLE
    return torch.full((batch, model.channels, *(max(side, model.smallest_side) for side in sides)), 0.5)


def _torchscript(model, half, told, size):
    net, file = Exportable(model.run, model.scale, half), io.BytesIO()
    with torch.no_grad(), _quiet('TorchScript', size), recorded():
        traced = torch.jit.trace(net, _example(model, size), check_trace=False)
        torch.jit.save(traced, file, _extra_files={SCRIPT_METADATA: told})
    return file.getvalue()


def _onnx(model, half, told, check, sizes, size):
    """The file and its network, recorded by the faster of torch's exporters, or where it cannot by the other one."""
    try:
        content = _record(model, half, size)
    except UserError as error:
        if 'dynamo' not in inspect.signature(torch.onnx.export).parameters:
            raise
        if importlib.util.find_spec('onnxscript') is None:
            raise UserError(f"{error}; torch's other exporter may, with pip install onnxscript") from error
        print(f'onnx        {error}')
        print("            torch's other exporter is tried, which may take minutes", flush=True)
        try:
            content = _record_otherwise(model, half, size)
        except UserError:
            raise error from None  # it is about an operation; the other's are about torch's own graph
    content = _described(content, model, told, size)
    exported = OnnxNetwork(content, CPU)
    with torch.inference_mode():
        _tell(_compare(model, exported, check, 'float16' if half else 'float32', sizes))
    return content, exported


def _record(model, half, size):
    net, file, axes = Exportable(model.run, model.scale, half), io.BytesIO(), {0: 'batch', 2: 'height', 3: 'width'}
    options = {
        'input_names': ['lq'],
        'output_names': ['sr'],
        'dynamic_axes': None if size else {'lq': axes, 'sr': axes},
    }
    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:
        options['dynamo'] = False
    with torch.no_grad(), _quiet('ONNX', size), recorded(), SizeFree():
        torch.onnx.export(net, (_example(model, size),), file, opset_version=_OPSET, **options)
    return file.getvalue()


def _record_otherwise(model, half, size):
    net, any_size = Exportable(model.run, model.scale, half), torch.export.Dim.DYNAMIC
    shapes = None if size else ({0: any_size, 2: any_size, 3: any_size},)
    options = {'input_names': ['lq'], 'output_names': ['sr'], 'dynamic_shapes': shapes, 'verbose': False}
    with torch.no_grad(), _quiet('ONNX', size), recorded():
        program = torch.onnx.export(net, (_example(model, size),), dynamo=True, opset_version=_OPSET + 1, **options)
        return program.model_proto.SerializeToString()


def _described(content, model, told, size):
    import onnx

    proto = onnx.load_from_string(content)
    sizes = proto.graph.output[0].type.tensor_type.shape.dim
    sizes[1].dim_value = model.channels
    for axis, name in ((2, 'height'), (3, 'width')) if not size else ():
        sizes[axis].dim_param = f'{name} x {model.scale}'
    onnx.helper.set_model_props(proto, {METADATA: told})
    return proto.SerializeToString()


@contextlib.contextmanager
def _quiet(what, size):
    """Without the exporters' progress and advice on their own code; what they cannot do, in one short line."""
    loggers = [logging.getLogger(name) for name in ('torch', 'torch.onnx', 'onnxscript')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), _muted():
            warnings.simplefilter('ignore')
            yield
    except Exception as error:  # of the operations of any network, whatever export makes of them
        text = reason(error).partition(' [Caused by')[0].partition('. Please feel free')[0]
        text = text if len(text) <= _LONGEST else f'{text[:_LONGEST]} ...'
        hint = _hint(size) if re.search(r'siz|shape|constant|dynamic', text) else ''
        raise UserError(f'this network cannot be exported to {what}: {text}{hint}') from error
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextlib.contextmanager
def _muted():
    """Nothing reaches the process's own streams: torch's C++ part prints the graph of a network that fails there."""
    sys.stdout.flush()
    sys.stderr.flush()
    printed = io.StringIO()
    with open(os.devnull, 'w') as nowhere, contextlib.ExitStack() as back:
        for stream in (1, 2):
            with contextlib.suppress(OSError):  # there is none
                back.callback(_give_back, os.dup(stream), stream)
                os.dup2(nowhere.fileno(), stream)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield


def _give_back(kept, stream):
    os.dup2(kept, stream)
    os.close(kept)


def _hint(size):
    return '' if size else '; --size HxW exports it for images of one size'


def _int8(content, images):
    """Static quantisation of the layers with weights, but for the first and the last.

    Those read and make the pixels themselves: with the two in 8 bits the demo's teacher loses 1.6 dB on Set5, without
    them 0.1 dB.
    """
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.images = iter(images)

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {'lq': image.numpy()}

    weighted = [node.name for node in onnx.load_from_string(content).graph.node if node.op_type == 'Conv']
    if len(weighted) < 3:
        raise UserError(f'--int8: this network has {len(weighted)} convolutions; the first and the last stay float32')
    level = logging.getLogger().level
    try:
        logging.getLogger().setLevel(logging.ERROR)  # advice on preparing the model, which export has done
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in ('float32.onnx', 'int8.onnx')]
            paths[0].write_bytes(content)
            quantization.quantize_static(
                str(paths[0]),
                str(paths[1]),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=['Conv', 'MatMul', 'Gemm'],
                nodes_to_exclude=[weighted[0], weighted[-1]],
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                # Products of two activations, in attention, stay float32.
                extra_options={'MatMulConstBOnly': True},
            )
            return paths[1].read_bytes()
    except Exception as error:  # of its parts, whatever they make of a graph
        raise UserError(f'--int8: onnxruntime cannot quantise this network: {reason(error)}') from error
    finally:
        logging.getLogger().setLevel(level)


# ---------------------------------------------------------------------------------------------------------------------
# The checks


def _channels(pixels, channels):
    """uint8 or uint16 (h, w, 1 | 3) -> float32 (1, channels, h, w) in [0, 1]."""
    image = torch.from_numpy(pixels.astype(np.float32) / np.iinfo(pixels.dtype).max).permute(2, 0, 1)[None]
    if channels == 1 and image.shape[1] == 3:
        return image.mean(1, keepdim=True)
    return image.expand(-1, channels, -1, -1).contiguous()


def _crops(pixels, scale, sizes):
    """The middle of an image, made smaller by ``scale`` as LQ images are, in these sizes."""
    for height, width in sizes:
        factor = scale if min(pixels.shape[0] // height, pixels.shape[1] // width) >= scale else 1
        top, left = (max(0, (have - want * factor) // 2) for have, want in zip(pixels.shape, (height, width)))
        part = modcrop(pixels[top : top + height * factor, left : left + width * factor], factor)
        yield imresize(part, 1 / factor) if factor > 1 else part


def _compare(model, exported, pixels, precision, sizes):
    """How far the exported network is from torch's, in lines to print.

    Raises:
        UserError: further than its precision explains.
    """
    worst, least, lines = 0, math.inf, []
    fixed = exported.fixed_size if hasattr(exported, 'fixed_size') else None
    for part in _crops(pixels, model.scale, sizes):
        lq = _channels(part, model.channels)
        expected = infer(model.run, lq, model.scale)
        found = infer(exported, lq, model.scale)
        if found.shape != expected.shape or not torch.isfinite(found).all():
            raise UserError(f'the exported network fails on {lq.shape[3]}x{lq.shape[2]}; nothing was written')
        difference = (found - expected).abs().max().item()
        psnr = 10 * math.log10(1 / max((found - expected).square().mean().item(), 1e-30))
        worst, least = max(worst, difference), min(least, psnr)
        words = f'differs from torch in float32 by at most {difference * 255:.2g} of 255, {psnr:.1f} dB'
        words = words if difference else 'equal to torch in float32'
        lines.append(f'{precision:<11} {lq.shape[3]}x{lq.shape[2]}: {words}')
    if (precision == 'float32' and worst > TOLERANCE) or (precision == 'float16' and least < LEAST_OF_HALF):
        raise UserError(
            f'the exported network differs from torch by {worst * 255:.2g} of 255, more than rounding: its operations '
            f'depend on the size of the image; nothing was written{_hint(fixed)}'
        )
    return lines


def _tell(lines):
    print(*lines, sep='\n')


def _open_in_spandrel(model, theirs, pixels):
    """Print whether the library of other programs opens the file, and how far its network is from ours."""
    if theirs is None:
        print('spandrel    does not know this architecture; programs that use it need --to onnx')
        return
    lq = _channels(next(_crops(pixels, model.scale, SIZES)), model.channels)
    found = theirs(lq.clone()).float()  # some of its networks write into their input
    worst = (found - infer(model.run, lq, model.scale).clamp(0, 1)).abs().max().item() * 255
    print(f'spandrel    opens it as {theirs.architecture.name}; differs from torch by at most {worst:.2g} of 255')


def _speed(model, files, precision, size):
    """Print medians of alternating runs, torch's float32 among them, on this machine's CPU."""
    height, width = size or (_TIMED, _TIMED)
    lq = torch.rand(1, model.channels, height, width, generator=torch.Generator().manual_seed(0))
    nets = [('torch float32', model.run), *zip(['onnx float32', f'this file ({precision})'][-len(files) :], files)]
    seconds = {name: [] for name, _ in nets}
    for turn, (name, net) in itertools.product(range(4), nets):
        start = time.perf_counter()
        infer(net, lq, model.scale)
        if turn:  # the first one prepares
            seconds[name].append(time.perf_counter() - start)
    listed = ', '.join(f'{name} {statistics.median(values):.3f} s' for name, values in seconds.items())
    print(f'speed       {width}x{height} on {torch.get_num_threads()} CPU threads: {listed}')


def _cost(model, exported, pairs, precision):
    """Print mean PSNR against the ground truth, of torch's float32 and of the exported network."""
    metric = {'psnr': {'type': 'calculate_psnr', 'crop_border': model.scale, 'test_y_channel': True}}
    sums = np.zeros(2)
    for name, lq, _, gt in pairs:
        lq, gt = _channels(lq, model.channels), tensor2bgr(_channels(gt, model.channels))
        outs = [infer(net, lq, model.scale) for net in (model.run, exported)]
        sums += [
            score(tensor2bgr(out), gt[: out.shape[2], : out.shape[3]], metric, os.path.basename(name))['psnr']
            for out in outs
        ]
    full, ours = sums / len(pairs)
    print(
        f'PSNR        {len(pairs)} pairs, Y, border {model.scale}: torch float32 {full:.3f} dB, '
        f'this file ({precision}) {ours:.3f} dB, cost {round(full - ours, 3) + 0.0:.3f} dB'
    )


def _calibration(folder):
    """Up to 32 images of a folder, evenly spread, of each the middle 256 x 256."""
    count, side = _CALIBRATION
    paths, images = pictures.list_folder(folder), []
    spread = np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)
    for path in (paths[index] for index in spread):
        pixels = pictures.read(path).pixels
        top, left = (max(0, (have - side) // 2) for have in pixels.shape[:2])
        images.append(pixels[top : top + side, left : left + side])
    return images


def _fitted(pixels, least, exactly):
    """An image that a network takes: mirrored to the smallest size, cut to the one size of ``exactly``."""
    missing = [max(0, wanted - have) for have, wanted in zip(pixels.shape, least)]
    pixels = np.pad(pixels, [(0, missing[0]), (0, missing[1]), (0, 0)], mode='symmetric')
    return pixels[: exactly[0], : exactly[1]] if exactly else pixels


def _pairs(lq_folder, gt_folder):
    """(path, LQ, path, GT) of images whose names agree, but for an ending such as x4 of the LQ's."""
    gts, pairs = {path.stem: path for path in pictures.list_folder(gt_folder)}, []
    for path in pictures.list_folder(lq_folder):
        stem = path.stem
        gt = gts.get(stem) or gts.get(stem.rpartition('x')[0] if stem.rpartition('x')[2].isdigit() else stem)
        if gt is None:
            raise UserError(f'--test: no image in {gt_folder} for {path}')
        pairs.append((str(path), pictures.read(path).pixels, str(gt), pictures.read(gt).pixels))
    return pairs


if __name__ == '__main__':
    sys.exit(main())
