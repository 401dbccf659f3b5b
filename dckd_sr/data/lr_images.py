"""LR images of HR images, and crops of both: ``prepare sr`` and ``prepare subimages``."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np

from dckd_sr.data import jobs, pair_sizes
from dckd_sr.data.decoding import decode
from dckd_sr.data.files import read_bytes
from dckd_sr.data.preparing import (
    Outcome,
    pixels_of,
    read_image,
    ready_text,
    refuse_inside,
    run_jobs,
    size_text,
    some,
    stems_of,
    unfit_text,
)
from dckd_sr.errors import UserError
from dckd_sr.ops.resize import imresize, modcrop


@dataclass
class SRJob:
    """One HR image: where it is, what to cut it to (1: nothing), and the files to write."""

    key: str
    path: str
    hr_out: str | None
    crop: int
    lr_out: dict
    convention: str
    copy: bool


def make_sr(args):
    """``sr``: LR images, and the HR images beside them."""
    out, scales, alike, crop = args.out, sorted(set(args.scales)), [], 1
    stems = stems_of(args.hr, alike)
    if args.layout == 'basicsr':
        crop = math.lcm(12, *scales)
        hr_folder, lr_folders, template = f'GTmod{crop}', {s: f'LRbicx{s}' for s in scales}, '{}'
    else:
        hr_folder, lr_folders, template = 'HR', {s: os.path.join('LR_bicubic', f'X{s}') for s in scales}, '{}x{}'
    hr_folder = os.path.join(out, hr_folder)
    in_place = crop == 1 and os.path.realpath(hr_folder) == os.path.realpath(args.hr)
    lr_folders = {s: os.path.join(out, folder) for s, folder in lr_folders.items()}
    refuse_inside([*lr_folders.values(), *([] if in_place else [out, hr_folder])], [args.hr])

    todo, stamps, record = [], {}, jobs.Record(out)
    for stem, name in stems.items():
        path = os.path.join(args.hr, name)
        lr_out = {s: os.path.join(folder, template.format(stem, s) + '.png') for s, folder in lr_folders.items()}
        hr_out = None if in_place else os.path.join(hr_folder, stem + '.png')
        todo.append(SRJob(f'{path} {args.layout} {scales}', path, hr_out, crop, lr_out, args.convention, args.copy))
        stamps[todo[-1].key] = jobs.stamp(path, args.convention)
    result, ready = run_jobs(_sr, todo, args, record, stamps)
    done, result.problems = len(todo) - len(result.problems), sorted([*result.problems, *alike])
    result.summary = (
        f'{out}: LR at {", ".join(f"x{s}" for s in scales)} of {done} images{ready_text(ready)}{unfit_text(result)}'
    )
    return result


def _sr(job, ours):
    stored = decode(read_bytes(job.path), job.path)
    image, lost = pixels_of(stored, job.path)
    least = max(job.crop, *job.lr_out)
    if min(image.shape[:2]) < least:
        raise UserError(f'too small: {job.path} is {size_text(image)}, at least {least} pixels are needed')
    if job.crop > 1:
        image = modcrop(image, job.crop)
    files = []
    if job.hr_out:
        replace = os.path.normpath(job.hr_out) in ours
        if job.crop == 1 and stored.plain:
            jobs.place(job.path, job.hr_out, job.copy, replace)
        else:
            jobs.write_png(image, job.hr_out, replace)
        files.append(job.hr_out)
    for scale, path in job.lr_out.items():
        low = imresize(modcrop(image, scale), 1 / scale, job.convention)
        jobs.write_png(low, path, os.path.normpath(path) in ours)
        files.append(path)
    return Outcome(files, lost=lost)


@dataclass
class CropJob:
    """One image with its LR files: {scale: file} and {scale: folder}, scale 1 being the image itself."""

    key: str
    path: str
    stem: str
    sources: dict
    folders: dict
    size: int
    step: int
    thresh: int


def make_subimages(args):
    """``subimages``: crops of HR images and of their LR images at the same places."""
    scales = _lr_scales(args)
    multiple = math.lcm(1, *scales)
    for name, value in (('size', args.size), ('step', args.step)):
        if value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise UserError(f'--{name} {value} is no multiple of {multiple} (scales {scales}): {near} is')
    left_out = []
    stems = stems_of(args.images, left_out)
    folders, sources = {1: args.out}, {stem: {1: os.path.join(args.images, name)} for stem, name in stems.items()}
    for scale in scales:
        folders[scale] = os.path.join(args.lr_out or args.lr, f'X{scale}_sub')
        low = stems_of(os.path.join(args.lr, f'X{scale}'), left_out)
        template = args.filename_tmpl or f'{{}}x{scale}'
        missing = [template.format(stem) for stem in stems if template.format(stem) not in low]
        if missing:
            raise UserError(f'{args.lr}/X{scale} lacks {len(missing)} images of {args.images}: {some(missing, 3)}')
        for stem in stems:
            sources[stem][scale] = os.path.join(args.lr, f'X{scale}', low[template.format(stem)])
    refuse_inside(folders.values(), [args.images, *(os.path.join(args.lr, f'X{s}') for s in scales)])

    left_out += _leave_out_small(sources, multiple, args)
    todo, stamps, record = [], {}, jobs.Record(args.out)
    for stem, paths in sources.items():
        job = CropJob(f'{paths[1]} {scales}', paths[1], stem, paths, folders, args.size, args.step, args.thresh)
        todo.append(job)
        stamps[job.key] = [jobs.stamp(path, folders[s]) for s, path in paths.items()]
        stamps[job.key].append([args.size, args.step, args.thresh])
    result, ready = run_jobs(_subimages, todo, args, record, stamps)
    count = sum(len(record.files(job.key)) for job in todo) // len(folders)
    done, result.problems = len(todo) - len(result.problems), sorted([*result.problems, *left_out])
    result.summary = (
        f'{", ".join(folders.values())}: {count} crops each of {done} images{ready_text(ready)}{unfit_text(result)}'
    )
    return result


def _leave_out_small(sources, multiple, args):
    """Take the images out that no crop fits in, as their headers say; returns one line about all of them.

    Raises:
        UserError: there would be none left.
    """
    sizes = {stem: pair_sizes.header_size('', paths[1]) for stem, paths in sources.items()}
    sides = {stem: min(size) // multiple * multiple for stem, size in sizes.items() if size}
    small = {stem: side for stem, side in sides.items() if side < args.size}
    if not small:
        return []
    first, least = min(small, key=small.get), min(small.values())
    (height, width), path = sizes[first], sources[first][1]
    text = f'{len(small)} of {len(sources)} images are smaller than a crop, {args.size}x{args.size}'
    text += f', such as {path} ({width}x{height})'
    if least:
        text += f': --size {least}'
        text += f' --step {max(multiple, least // 2 // multiple * multiple)}' if args.step > least else ''
        text += ' takes all'
    if len(small) == len(sources):
        raise UserError(text)
    for stem in small:
        del sources[stem]
    return [f'too small, left out: {text}']


def _lr_scales(args):
    if not args.lr:
        for name in ('scales', 'lr_out', 'filename_tmpl'):
            if getattr(args, name):
                raise UserError(f'--{name} needs --lr, the folder with X2, X3, X4 (made by `sr`)')
        return []
    scales = sorted(set(args.scales or (s for s in (2, 3, 4, 8) if os.path.isdir(os.path.join(args.lr, f'X{s}')))))
    if not scales:
        raise UserError(f'no folder X2, X3, X4 or X8 in {args.lr}')
    return scales


def _subimages(job, ours):
    images, losses = {}, []
    for scale, path in job.sources.items():
        images[scale], lost = read_image(path)
        losses += lost
    multiple = math.lcm(*images)
    height, width = modcrop(images[1], multiple).shape[:2]
    if min(height, width) < job.size:
        raise UserError(f'too small: {job.path} is {size_text(images[1])}, a crop is {job.size}x{job.size}')
    for scale, image in images.items():
        problem = pair_sizes.misfit(job.path, images[1].shape, job.sources[scale], image.shape, scale)
        if problem:
            raise UserError(problem)
    corners = [(top, left) for top in _places(height, job) for left in _places(width, job)]
    files = []
    for scale, image in images.items():
        side = job.size // scale
        for number, (top, left) in enumerate(corners, 1):
            path = os.path.join(job.folders[scale], f'{job.stem}_s{number:03d}.png')
            crop = image[top // scale : top // scale + side, left // scale : left // scale + side]
            jobs.write_png(np.ascontiguousarray(crop), path, os.path.normpath(path) in ours)
            files.append(path)
    return Outcome(files, lost=losses)


def _places(length, job):
    """Where crops begin along an axis, as BasicSR's extract_subimages: every step, and a last one at the border."""
    places = list(range(0, length - job.size + 1, job.step))
    if length - (places[-1] + job.size) > job.thresh:
        places.append(length - job.size)
    return places
