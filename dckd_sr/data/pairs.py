"""Pairs of degraded and clean images: ``prepare pairs`` and ``prepare check``."""

from __future__ import annotations

import os
from dataclasses import dataclass

from dckd_sr import locks
from dckd_sr.data import jobs, pair_sizes
from dckd_sr.data.decoding import decode
from dckd_sr.data.files import lmdb_difference, lmdb_keys, other_template, read_bytes, read_lmdb
from dckd_sr.data.preparing import Result, pixels_of, refuse_inside, stems_of, unfit_text
from dckd_sr.errors import SeveralErrors, UserError, looked_in

RAIN_TEST_SETS = ('Test100', 'Rain100H', 'Rain100L', 'Test2800', 'Test1200')


def make_pairs(args):
    """``pairs``: blur/sharp or input/target folders as lq/gt folders."""
    if not os.path.isdir(args.source):
        raise UserError(f'folder not found: {args.source}{looked_in(args.source, " (looked in {})")}')
    refuse_inside([args.out], [args.source])
    groups = (_gopro if args.dataset == 'gopro' else _rain13k)(args.source)
    result, todo, counts = Result(), [], {}
    for target, prefix, lq_folder, gt_folder in groups:
        low, high = stems_of(lq_folder, result.problems), stems_of(gt_folder, result.problems)
        for stem in sorted(set(low) ^ set(high)):
            have, lack = (lq_folder, gt_folder) if stem in low else (gt_folder, lq_folder)
            result.problems.append(f'unpaired: {have}/{(low if stem in low else high)[stem]} is not in {lack}')
        for stem in sorted(set(low) & set(high)):
            counts[target] = counts.get(target, 0) + 1
            for kind, folder, name in (('lq', lq_folder, low[stem]), ('gt', gt_folder, high[stem])):
                path = os.path.join(args.out, target, kind, prefix + name)
                todo.append((os.path.join(folder, name), path, args.copy))
    repeated = len(todo) - len({path for _, path, _ in todo})
    if repeated:
        raise UserError(f'{args.source}: {repeated} files would get a name that another one has')
    with locks.preparing(args.out):
        result.problems += [problem for problem in jobs.run(_place, todo, args.workers, args.command) if problem]
    result.problems.sort()
    listed = ', '.join(f'{target} {count} pairs' for target, count in counts.items())
    result.summary = f'{args.out}: {listed}{unfit_text(result)}'
    return result


def _place(job):
    source, path, copy = job
    try:
        if not os.path.getsize(source):
            raise UserError(f'empty file: {source}')
        jobs.place(source, path, copy)
    except jobs.CannotWrite:
        raise
    except UserError as error:
        return str(error)
    return None


def _gopro(source):
    """(target folder, prefix of names, blurred, sharp) of every sequence."""
    groups = []
    for split in ('train', 'test'):
        folder = os.path.join(source, split)
        for sequence in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            pair = [os.path.join(folder, sequence, kind) for kind in ('blur', 'sharp')]
            if all(os.path.isdir(path) for path in pair):
                groups.append((split, f'{sequence}_', *pair))
    if not groups:
        raise UserError(f'no train/SEQUENCE/{{blur,sharp}} or test/SEQUENCE/{{blur,sharp}} in {source}')
    return groups


def _rain13k(source):
    """As `_gopro`, of the training set and the test sets that are there."""
    places = [('train', os.path.join('train', 'Rain13K'))]
    places += [(os.path.join('test', name), os.path.join('test', name)) for name in RAIN_TEST_SETS]
    groups = []
    for target, place in places:
        pair = [os.path.join(source, place, kind) for kind in ('input', 'target')]
        if all(os.path.isdir(path) for path in pair):
            groups.append((target, '', *pair))
    if not groups:
        raise UserError(f'no train/Rain13K/{{input,target}} or test/Test100/{{input,target}} in {source}')
    return groups


@dataclass
class CheckJob:
    """A GT image and its LQ image: (folder, name) each; folders may be LMDBs."""

    gt: tuple
    lq: tuple | None
    scale: int
    gt_size: int


def check(args):
    """``check``: everything that training would stumble over, at once."""
    result = Result()
    high = _entries(args.gt, result.problems)
    low = _entries(args.lq, result.problems) if args.lq else {}
    if not args.lq and args.filename_tmpl != '{}':
        raise UserError('--filename_tmpl needs LQ')
    is_lmdb = args.gt.endswith('.lmdb')
    todo, used = [], set()
    if args.lq and not any((stem if is_lmdb else args.filename_tmpl.format(stem)) in low for stem in high):
        raise UserError(_no_pair(args, high, low, is_lmdb))
    for stem, name in high.items():
        wanted = stem if is_lmdb else args.filename_tmpl.format(stem)
        partner = (args.lq, low[wanted]) if wanted in low else None
        if args.lq and partner is None:
            result.problems.append(f'unpaired: {args.gt}/{name} has no {wanted} in {args.lq}')
        used.add(wanted)
        todo.append(CheckJob((args.gt, name), partner, args.scale, args.gt_size))
    result.problems += [f'unpaired: {args.lq}/{low[s]} has no partner in {args.gt}' for s in low if s not in used]
    rests = 0
    for problems, lost, has_rest in jobs.run(_check, todo, args.workers, args.command):
        result.problems += problems
        result.add_lost(lost)
        rests += has_rest
    result.problems.sort()
    images = f'{len(high)} pairs' if args.lq else f'{len(high)} images'
    rest = f'; {rests} GT images are no multiples of {args.scale}, their borders are cut while loading' if rests else ''
    result.summary = f'{images} checked: {f"{len(result.problems)} problems" if result.problems else "all fit"}{rest}'
    return result


def check_dataset(dataset, opt):
    """``datasets.train.check_images``: all training images at once.

    Args:
        dataset: any dataset with ``paths``.
        opt: its options, for the crop.

    Raises:
        SeveralErrors: some are unfit.
    """
    pairs = list(pair_sizes.pairs_of(dataset))
    if not pairs:
        entries = getattr(dataset, 'paths', None) or ()
        paths = dict.fromkeys(str(path) for e in entries for path in (e.values() if isinstance(e, dict) else [e]))
        in_lmdb = (opt.get('io_backend') or {}).get('type') == 'lmdb'
        folder = (opt.get('dataroot_gt') or opt.get('dataroot_lq')) if in_lmdb else ''
        pairs = [((folder, path), None) for path in paths]
    crop = max([opt.get('gt_size') or 1, *(opt.get('gt_sizes') or [])])
    if not hasattr(dataset, 'pairs_of_files') or getattr(dataset, 'pads', False):
        crop = 1  # it makes its patches in its own way
    todo = [CheckJob(gt, lq, opt.get('scale', 1), crop) for gt, lq in pairs]
    found = [line for problems, *_ in jobs.run(_check, todo, jobs.cores(), 'check_images') for line in problems]
    if found:
        raise SeveralErrors(sorted(found), 'datasets.train.check_images')


def _no_pair(args, high, low, is_lmdb):
    """One line for the whole folder, where no image has a partner."""
    if is_lmdb:
        return lmdb_difference(args.gt, args.lq, list(high), list(low))
    template = other_template(high.values(), low, args.filename_tmpl)
    hint = f"; --filename_tmpl '{template}'?" if template else ''
    wanted = args.filename_tmpl.format(next(iter(high)))
    return f'none of {len(high)} images in {args.gt} has a partner in {args.lq}, such as {wanted}{hint}'


def _entries(folder, problems):
    if folder.endswith('.lmdb'):
        return {key: key for key in lmdb_keys(folder)}
    return stems_of(folder, problems)


def _check(job):
    """(problems, what was lost, whether the GT is no multiple of the scale) of one pair."""
    problems, losses, images = [], [], []
    for folder, name in filter(None, (job.gt, job.lq)):
        path = os.path.join(folder, name)
        try:
            content = read_lmdb(folder, name) if folder.endswith('.lmdb') else read_bytes(path)
            image, lost = pixels_of(decode(content, path), path)
        except UserError as error:
            problems.append(f'unreadable: {error}')
            continue
        images.append(image)
        losses += lost
    if not images or (problems and job.lq):
        return problems, losses, False
    (height, width), path = images[0].shape[:2], os.path.join(*job.gt)
    if min(height, width) // job.scale * job.scale < max(job.gt_size, job.scale):
        problems.append(f'too small: {path} is {width}x{height}, at least {max(job.gt_size, job.scale)} are needed')
    if len(images) == 2:
        problem = pair_sizes.misfit(path, images[0].shape, os.path.join(*job.lq), images[1].shape, job.scale)
        problems += [f'mismatched: {problem}'] if problem else []
    return problems, losses, bool(height % job.scale or width % job.scale)
