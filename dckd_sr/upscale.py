"""Restore or enlarge images with a trained network.

python -m dckd_sr.upscale photo.jpg -m experiments/NAME/models/net_g_latest.pth
python -m dckd_sr.upscale FOLDER -m net_g_latest.onnx -o OUT --tile 256
python -m dckd_sr.upscale a.png b.jpg -m net_g_latest.pth
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from dckd_sr import checkpoint, pictures
from dckd_sr.commands import Parser
from dckd_sr.data.files import not_searched
from dckd_sr.errors import UserError, entry_point, looked_in, out_of_memory, reason
from dckd_sr.inference import infer, padding_of
from dckd_sr.model_files import Model, load
from dckd_sr.ops.resize import imresize
from dckd_sr.speed import Speed

TILE, WHOLE = 512, 1 << 20  # side of the tiles that images of more LQ pixels than WHOLE are cut into
_BAND = 1 << 22  # LQ pixels that are held as floats at a time, where there are tiles


@entry_point()
def main(argv=None):
    """Command line entry point.

    Returns:
        exit code: 0 done; 2 a mistake in arguments, or images that could not be read or written (one line each, the
        others are done); 130 interrupted.
    """
    return 2 if run(_parser().parse_intermixed_args(argv)) else 0  # images may stand on both sides of -m FILE


def _parser():
    parser = Parser(prog='python -m dckd_sr.upscale', description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('input', nargs='+', help='images, or a folder whose images are done (not those of its sub-folders)')
    add('-m', '--model', required=True, help='checkpoint (.pth, .safetensors), .onnx or TorchScript file')
    add('-o', '--output', metavar='OUT', help='a file for one image, else a folder; default: INPUT_xSCALE beside it')
    add('-opt', '--opt', metavar='FILE', help="a checkpoint's option file; default: the run's, or tensors tell")
    add('--network', choices=['g', 't'], default='g', help='of -opt: network_g (default) or network_t')
    add('--param_key', help='the entry with the weights; default: params_ema, params, state_dict, ...')
    add('--tile', type=int, metavar='N', help=f'side of tiles; 0: none; default: {TILE} for more than a megapixel')
    add('--overlap', type=int, metavar='N', help='pixels that tiles share; default: a quarter of the tile, at most 32')
    add('--format', choices=['png', 'webp', 'jpg'], help='of outputs that -o does not name; default: png')
    add('--device', help='cpu, cuda, cuda:1, mps; default: a GPU if there is one')
    add('--half', action='store_true', help='mixed precision, for GPUs; checkpoints only')
    add('--force', action='store_true', help='replace outputs that exist; without it they are kept')
    return parser


def run(args: argparse.Namespace) -> int:
    """Restore what the command line names.

    Returns:
        how many images failed.

    Raises:
        UserError: nothing could be started.
    """
    for name in ('tile', 'overlap'):
        if (getattr(args, name) or 0) < 0:
            raise UserError(f'--{name} {getattr(args, name)}: at least 0')
    images = _images([Path(name) for name in args.input])
    device = _device(args.device)
    model = load(args.model, args.opt, args.network, args.param_key, device)
    if args.half and not isinstance(model.run, torch.nn.Module):
        raise UserError(f'--half: {args.model} was exported in the precision that it has')
    speed = Speed({'use_amp': args.half, 'amp_bf16': device.type == 'cpu'}, device)
    targets = _targets(images, args, model.scale)
    print(f'model       {model.about}')
    counts = Counter()
    for number, (image, target) in enumerate(zip(images, targets), 1):
        label = f'{number}/{len(images)} {image.name}' if len(images) > 1 else image.name
        try:
            kept = target.exists() and not args.force
            if not kept:
                _one(image, target, model, args, speed, label)
            counts['kept' if kept else 'done'] += 1
        except UserError as error:
            print(f'error: {error}', file=sys.stderr)
            counts['failed'] += 1
    if len(images) > 1:
        kept = f', {counts["kept"]} kept because their outputs exist (--force replaces them)' if counts['kept'] else ''
        failed = f', {counts["failed"]} failed' if counts['failed'] else ''
        folders = dict.fromkeys(str(target.parent) for target in targets)
        print(f'{len(images)} images: {counts["done"]} done{kept}{failed}; outputs in {", ".join(folders)}')
    return counts['failed']


def _device(name):
    if name is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {name}: not usable here: {reason(error)}') from error


# ---------------------------------------------------------------------------------------------------------------------
# Where outputs go


def _images(sources):
    """What the command line names: images, or those of one folder."""
    for source in sources:
        if not source.exists():
            raise UserError(
                f'{source} is not there{looked_in(source, " (looked in {})")}; expected an image or a folder'
            )
        if source.is_dir() and len(sources) > 1:
            raise UserError(
                f'{source} is a folder; expected it alone, or images: the outputs of a folder get their own'
            )
    if sources[0].is_dir():
        images, told = pictures.list_folder(sources[0]), not_searched(sources[0]).removeprefix('; ')
        if told:
            print(f'{sources[0]}: {told}')
        return images
    return list({source.resolve(): source for source in sources}.values())


def _targets(images, args, scale):
    """Path of the output of each image."""
    out, ending = Path(args.output) if args.output else None, f'_x{scale}' if scale > 1 else '_restored'
    suffix, source = f'.{args.format or "png"}', Path(args.input[0])
    is_file = out is not None and out.suffix and not out.is_dir()
    if source.is_dir():
        source = source.resolve()  # a dot has no name of its own
        out, ending = out or source.with_name(f'{source.name}{ending}'), ''
        if out.resolve() == source:
            raise UserError(f'{out} holds the inputs; name another folder with -o')
    elif len(images) == 1:
        if is_file and out.suffix.lower() not in pictures.FORMATS:
            raise UserError(f'{out}: cannot write {out.suffix}; one of {", ".join(pictures.FORMATS)}')
        target = out if is_file else (out or source.parent) / f'{source.stem}{"" if out else ending}{suffix}'
        if target.resolve() == source.resolve():
            raise UserError(f'{target} is the input; name another file with -o')
        if target.exists() and not args.force:
            raise UserError(f'{target} exists; name another file with -o or add --force')
        return [target]
    elif is_file and out.suffix.lower() in pictures.FORMATS:
        raise UserError(f'-o {out}: the name of one file for {len(images)} images; name a folder')
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f'{out} is a file; the outputs of {len(images)} images need a folder')
    # File systems may take a.png and A.png for one.
    places = [(out or image.parent, image.stem.casefold()) for image in images]
    targets = [
        folder / f'{image.stem if places.count((folder, stem)) == 1 else image.name}{"" if out else ending}{suffix}'
        for image, (folder, stem) in zip(images, places)
    ]
    inputs, taken = {image.resolve() for image in images}, {}
    for image, target in zip(images, targets):
        other = taken.setdefault(str(target.resolve()).casefold(), image)
        if other is not image:
            raise UserError(
                f'{target} would be the output of {other} and of {image}; name another folder for one of them'
            )
        if args.force and target.resolve() in inputs:
            raise UserError(f'{target}, the output of {image}, is an input, too; leave out --force, or name a folder')
    return targets


# ---------------------------------------------------------------------------------------------------------------------
# One image


def _one(image, target, model, args, speed, label):
    """Restore one image file.

    Raises:
        UserError: it cannot be read, restored or written.
    """
    start = time.perf_counter()
    picture = pictures.read(image)
    height, width = picture.pixels.shape[:2]
    tile = args.tile if args.tile is not None else TILE if height * width > WHOLE else 0
    notes = picture.notes + pictures.losses(picture, target.suffix.lower())
    if tile and not args.tile:
        notes.append(f'in tiles of {tile}')
    fixed, least = getattr(model.run, 'fixed_size', None), model.smallest_side
    if fixed and (height, width) != fixed:
        notes.append(f'in tiles of {fixed[1]}x{fixed[0]}, which the file is for')
    elif not fixed and min(height, width) < least and least > padding_of(model.run):
        notes.append(f'padded to {least} pixels, which the network needs')
    try:
        result = restore(picture, model, tile, args.overlap, speed, label)
    except UserError as error:
        raise UserError(f'{image}: {error}') from error
    except Exception as error:
        if out_of_memory(error):
            how = f'lower --tile ({tile} now)' if tile else 'set --tile, such as 256'
            raise UserError(f'{image}: not enough memory; {how}') from error
        if isinstance(error, RuntimeError):
            raise UserError(f'{image}: {reason(error)}') from error
        raise
    checkpoint.write(pictures.encode(result, target.suffix.lower()), target)
    said = f' ({"; ".join(notes)})' if notes else ''
    size = f'{width}x{height} -> {result.pixels.shape[1]}x{result.pixels.shape[0]}'
    print(f'{label}  {size}  {time.perf_counter() - start:.1f} s  {target}{said}')


def restore(
    picture: pictures.Picture,
    model: Model,
    tile: int = 0,
    overlap: int | None = None,
    speed: Speed | None = None,
    label: str = '',
) -> pictures.Picture:
    """An image through a network, as the kind of image that it was.

    Gray images stay gray: a network of three channels gets them three times, the mean of its outputs counts; one of one
    channel gets the channels of a colour image one by one. Alpha is enlarged by bicubic interpolation: a mask has flat
    areas, which have to stay exactly opaque or clear, and networks trained on photographs would put texture there.
    Colours of wholly clear pixels are nobody's choice (often black): before, the nearest visible ones replace them, or
    the network would draw them into the edge.

    With tiles, memory grows with the width of the image, not with its height.

    Args:
        picture: see `pictures.Picture`.
        model: the network.
        tile, overlap: see `inference.infer`; 0: the whole image at once.
        speed: how it runs, and where; default: float32 on the CPU.
        label: what the progress bar says; it shows tiles and only on terminals.

    Raises:
        UserError: an overlap as large as the tile, or output that is not finite.
    """
    pixels, limit = picture.pixels, np.iinfo(picture.pixels.dtype).max
    if picture.alpha is not None:
        pixels = _fill_clear(pixels, picture.alpha)
    height, width, count = pixels.shape
    net, scale, speed = model.run, model.scale, speed or Speed({}, 'cpu')
    tile = max(getattr(net, 'fixed_size', None) or (tile,))
    sizes = {'tile_size': tile, 'tile_overlap': overlap}
    result = np.empty((height * scale, width * scale, count), pixels.dtype)
    bands = _bands(height, width, model.grid, tile, overlap)
    total = sum(
        _tiles(min(height, end + margin) - max(0, top - margin), width, model, sizes) for top, end, margin in bands
    )
    with tqdm(total=total, desc=label, unit='tile', leave=False, disable=None, dynamic_ncols=True) as bar:

        def run(net, x):
            out = speed('student', net, x)
            bar.update()
            return out

        for top, bottom, margin in bands:
            first = max(0, top - margin)
            part = pixels[first : bottom + margin].astype(np.float32) / limit
            lq = torch.from_numpy(part).permute(2, 0, 1)[None].to(speed.device)
            if count != model.channels:
                lq = lq.expand(-1, 3, -1, -1).contiguous() if count == 1 else lq.permute(1, 0, 2, 3).contiguous()
            with torch.inference_mode():
                out = infer(net, lq, scale, **sizes, run=run).float()
            if not torch.isfinite(out).all():
                raise UserError('the output holds nan or infinite values; broken weights, or too much for half')
            if count != model.channels:
                out = out.mean(1, keepdim=True) if count == 1 else out.permute(1, 0, 2, 3)
            out = out[0, :, (top - first) * scale : (bottom - first) * scale].clamp(0, 1).mul(limit).round()
            result[top * scale : bottom * scale] = out.permute(1, 2, 0).cpu().numpy().astype(pixels.dtype)
    alpha = picture.alpha
    if alpha is not None and scale > 1:
        alpha = imresize(alpha, scale)
    return pictures.Picture(result, alpha, picture.profile, list(picture.notes))


def _fill_clear(pixels, alpha):
    """Colours with those of wholly transparent pixels replaced by the nearest visible ones."""
    clear = (alpha == 0).astype(np.uint8)
    if not clear.any() or clear.all():
        return pixels
    _, labels = cv2.distanceTransformWithLabels(clear, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    places = np.zeros(labels.max() + 1, np.int64)
    visible = np.flatnonzero(clear.ravel() == 0)
    places[labels.ravel()[visible]] = visible
    return pixels.reshape(-1, pixels.shape[2])[places[labels]]


def _bands(height, width, grid, tile, overlap):
    """(top, bottom, margin) of the parts of an image that are held as floats at a time; one where there are no tiles.

    The margin, which is computed and dropped, is what tiles share, so seams are seen as little as theirs.
    """
    margin = -(-(overlap if overlap is not None else min(32, tile // 4)) // grid) * grid
    rows = max(_BAND // width, 2 * tile) // grid * grid
    if not tile or height <= rows + margin:
        return [(0, height, 0)]
    return [(top, min(top + rows, height), margin) for top in range(0, height, rows)]


def _tiles(height, width, model, sizes):
    """How many tiles an image is cut into: counted with tensors that have shapes and no values."""
    tiles = []

    def run(net, x):
        tiles.append(x)
        return x.new_empty((*x.shape[:2], x.shape[2] * model.scale, x.shape[3] * model.scale))

    infer(model.run, torch.empty((1, 1, height, width), device='meta'), model.scale, **sizes, run=run)
    return len(tiles)


if __name__ == '__main__':
    sys.exit(main())
