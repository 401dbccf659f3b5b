"""Scores of restored images, over whole sets, with BasicSR's metrics; and the files and tables that show them."""

from __future__ import annotations

import csv
import inspect
import itertools
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from basicsr.metrics import calculate_metric
from basicsr.utils import get_root_logger, tensor2img
from basicsr.utils.registry import METRIC_REGISTRY
from tqdm import tqdm

from dckd_sr import devices
from dckd_sr.errors import UserError, out_of_memory, reason
from dckd_sr.inference import infer
from dckd_sr.ops.resize import imresize

_SHOWN = 3  # images that a note names
MOST_THREADS = 8  # that score images beside the network
SSIM_WINDOW = 11  # side of the Gaussian window in BasicSR's calculate_ssim
NIQE_BLOCK = 96  # side of the blocks that BasicSR's calculate_niqe compares; it needs two


class NotMeasuredError(UserError):
    """A metric has no value for this image; the others may."""


class TooSmallError(NotMeasuredError):
    """An image has too few pixels for a metric."""


@dataclass
class Result:
    """Scores of one network on one set.

    Attributes:
        rows: one dict per image: 'image', one entry per metric (None where it could not be measured), 'seconds'.
        means: metric -> mean over the images that have a finite value; inf where every image equals its ground truth.
            Metrics without any value are absent.
        notes: what a reader of the means must know: images left out of them and why.
        left_out: metric -> why it has no value, a line an image.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    means: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def measured(self, metric: str) -> int:
        """On how many images a metric was measured."""
        return sum(row.get(metric) is not None for row in self.rows)


class Bicubic:
    """MATLAB's bicubic enlargement in a network's place: the baseline of every table."""

    training = False

    def __init__(self, scale: int):
        self.scale = scale

    def __call__(self, lq: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) in [0, 1], rounded to 8 bits -> (B, C, h * scale, w * scale) in [0, 1]."""
        if self.scale == 1:
            return lq
        images = (lq.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        enlarged = np.stack([imresize(image, self.scale) for image in images])
        return torch.from_numpy(enlarged).permute(0, 3, 1, 2).to(lq.device, torch.float32) / 255


def bicubic(scale: int) -> Bicubic:
    """A callable that enlarges as MATLAB's ``imresize(uint8 image, scale)``; scale 1 returns the input."""
    return Bicubic(scale)


def tensor2bgr(tensor: torch.Tensor) -> np.ndarray:
    """(1, C, h, w) or (C, h, w), RGB in [0, 1] -> uint8 (h, w, 3) BGR or (h, w), rounded; the tensor stays as it is."""
    return tensor2img(tensor.detach().clamp(0, 1))  # tensor2img clamps its argument's own memory


def score(
    sr: np.ndarray, gt: np.ndarray | None, metrics: Mapping[str, Mapping[str, Any]], image: str = 'the image'
) -> dict[str, float]:
    """Scores of one image by BasicSR's own metric functions.

    Args:
        sr: uint8 (h, w, 3) BGR or (h, w).
        gt: the same, or None: metrics that need a ground truth are then left out.
        metrics: name -> {'type': 'calculate_psnr', 'crop_border': 4, 'test_y_channel': True}, as in ``val.metrics``.
        image: its name, for messages.

    Returns:
        name -> float; PSNR of equal images is inf.

    Raises:
        NotMeasuredError: too little is left inside the border, or the metric fails, whatever its reason.
        UserError: sizes that differ, or an unknown metric.
    """
    if gt is not None and sr.shape != gt.shape:
        raise UserError(_other_size(image, sr, gt))
    values = {}
    for name, metric_opt in metrics.items():
        kind = metric_opt.get('type')
        if kind not in METRIC_REGISTRY:
            known = ', '.join(key for key, _ in METRIC_REGISTRY)
            raise UserError(f'val.metrics.{name}.type: no metric named {kind!r}; known: {known}')
        if gt is None and _needs_gt(METRIC_REGISTRY.get(kind)):
            continue
        border = metric_opt.get('crop_border', 0)
        needed = _lacks_pixels(kind, [side - 2 * border for side in sr.shape[:2]])
        if needed:
            raise TooSmallError(
                f'{image} ({_size(sr)}) is too small for {name}: it needs {needed} inside crop_border {border}'
            )
        data = {'img': sr} if gt is None else {'img': sr, 'img2': gt}
        try:
            values[name] = float(calculate_metric(data, metric_opt))
        except Exception as error:  # such as NIQE's of an image that is still noise, or a network's that wants more
            raise NotMeasuredError(f'val.metrics.{name} ({kind}) fails on {image}: {reason(error)}') from error
        if math.isnan(values[name]):
            raise NotMeasuredError(f'val.metrics.{name} ({kind}) gives no number for {image}')
    return values


def _lacks_pixels(kind, sides):
    """What one of BasicSR's metrics needs more than an image has inside the border, in words, or None."""
    if 'niqe' in kind:
        return 'two blocks of 96x96 px' if math.prod(max(0, side) // NIQE_BLOCK for side in sides) < 2 else None
    least = SSIM_WINDOW if 'ssim' in kind else 1
    return f'{least} px a side' if min(sides) < least else None


def evaluate(
    net: Callable[[torch.Tensor], torch.Tensor],
    loader: Iterable[dict[str, Any]],
    *,
    scale: int,
    metrics: Mapping[str, Mapping[str, Any]] | None,
    device: torch.device | str,
    window_size: int | None = None,
    tile_size: int | None = None,
    tile_overlap: int | None = None,
    tile_batch_size: int | None = None,
    self_ensemble: bool = False,
    run: Callable[..., torch.Tensor] | None = None,
    save_dir: str | os.PathLike | None = None,
    suffix: str = '',
    progress: bool = False,
) -> Result:
    """Run a network over a validation or test set and score every image.

    Args:
        net: a network on ``device`` (put into eval mode, its modes restored) or ``bicubic(scale)``.
        loader: batches of one image: 'lq' (1, C, h, w) in [0, 1], 'lq_path' and, for metrics that compare, 'gt'.
        scale: output size over input size.
        metrics: as for ``score``; may be empty.
        window_size, tile_size, tile_overlap, tile_batch_size, self_ensemble, run: see ``inference.infer``; not used by
            bicubic.
        save_dir: where the outputs go as ``<image><suffix>.png``; None saves nothing.
        progress: show a bar, on a terminal only.

    Raises:
        UserError: an empty set, an output that is not finite or of another size than the ground truth, a file that
            cannot be written.
    """
    device = torch.device(device)
    options = {
        'window_size': window_size,
        'tile_size': tile_size,
        'tile_overlap': tile_overlap,
        'tile_batch_size': tile_batch_size,
        'self_ensemble': self_ensemble,
        'run': run,
    }
    if isinstance(net, Bicubic):
        options = {}  # enlarged whole: padding and tiles would change its borders

    def restore(batch):
        lq = batch['lq'].to(device)
        devices.wait(device)
        start = time.perf_counter()
        output = infer(net, lq, scale, **options)
        devices.wait(device)
        return output, time.perf_counter() - start

    def path_of(image):
        return Path(save_dir) / f'{image}{suffix}.png'

    with _eval_mode(net), torch.no_grad():
        result = _run(restore, loader, metrics or {}, path_of if save_dir is not None else None, progress)
    return _averaged(result, metrics or {})


def validate(model, loader, current_iter, tb_logger, save_img: bool) -> Result:
    """``SRModel.nondist_validation`` with scores per image and the checks of ``evaluate``.

    Runs the model's own ``feed_data`` and ``test``, and keeps BasicSR's attributes (``metric_results``,
    ``best_metric_results``), log lines, TensorBoard names and image paths.
    """
    val, path, name = model.opt.get('val') or {}, model.opt['path'], loader.dataset.opt['name']
    metrics = val.get('metrics')

    def restore(batch):
        model.feed_data(batch)
        devices.wait(model.device)
        start = time.perf_counter()
        model.test()
        devices.wait(model.device)
        return model.output, time.perf_counter() - start

    def path_of(image):
        folder = Path(path['visualization'])
        if model.opt['is_train']:
            # Two sets may have images of one name.
            folder = folder / name if _count_val_sets(model.opt) > 1 else folder
            return folder / image / f'{image}_{current_iter}.png'
        return folder / name / f'{image}_{val.get("suffix") or model.opt["name"]}.png'

    result = _run(restore, loader, metrics or {}, path_of if save_img else None, val.get('pbar', False))
    if model.opt.get('world_size', 1) > 1:
        result = _gathered(result)
    _averaged(result, metrics or {})
    for attribute in ('lq', 'gt', 'output'):
        model.__dict__.pop(attribute, None)
    for note in result.notes:
        get_root_logger().warning(f'{name}: {note}')
    if metrics is not None:
        model.metric_results = dict(result.means)
        model._initialize_best_metric_results(name)
        for metric, value in result.means.items():
            model._update_best_metric_result(name, metric, value, current_iter)
        model._log_validation_metric_values(current_iter, name, tb_logger)
    return result


def _run(restore, loader, metrics, path_of, progress) -> Result:
    """Metrics and files of an image are made in threads, while a GPU has the next ones."""
    result, names, waiting = Result(), _Names(loader), deque()
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads)

    def collect():
        image, seconds, job = waiting.popleft()
        values, left_out = job.result()
        for metric, why in left_out.items():
            result.left_out.setdefault(metric, []).append(why)
        result.rows.append({'image': image, **values, 'seconds': seconds})

    try:
        bar = tqdm(loader, disable=None if progress else True, unit='image', leave=False, dynamic_ncols=True)
        for number, batch in enumerate(bar):
            image = names.of(number, batch['lq_path'][0])
            try:
                output, seconds = restore(batch)
            except Exception as error:
                if isinstance(error, UserError) or not out_of_memory(error):
                    raise
                height, width = batch['lq'].shape[-2:]
                where = 'GPU ' if isinstance(error, torch.cuda.OutOfMemoryError) else ''
                raise UserError(
                    f'{batch["lq_path"][0]} ({width}x{height}): not enough {where}memory; set val.tile_size, such as '
                    '256, or lower it'
                ) from error
            # The sum tells at once, unless finite values are too large for it.
            if not (torch.isfinite(output.sum()) or torch.isfinite(output).all()):
                raise UserError(
                    f'{image}: the output holds nan or infinite values; these weights are broken or not of this network'
                )
            gt = tensor2bgr(batch['gt']) if 'gt' in batch else None
            sr = tensor2bgr(output)
            if gt is not None and sr.shape != gt.shape:
                files = ', '.join(str(batch[key][0]) for key in ('lq_path', 'gt_path') if key in batch)
                raise UserError(f'{_other_size(image, sr, gt)} ({files})')
            path = path_of(image) if path_of is not None else None
            submit = pool.submit if _in_threads(metrics, output.device) else _at_once
            waiting.append((image, seconds, submit(_finish, sr, gt, metrics, image, path)))
            while len(waiting) > threads:  # no more images than that are held in memory
                collect()
        while waiting:
            collect()
    finally:
        pool.shutdown(cancel_futures=True)
    return result


def _finish(sr, gt, metrics, image, path):
    """Score and save one image.

    Returns:
        metric -> value, metric -> why it has none.
    """
    values, left_out = {}, {}
    for name, metric_opt in metrics.items():
        try:
            values[name] = score(sr, gt, {name: metric_opt}, image).get(name)
            if values[name] is None:
                left_out[name] = f'{image} has no ground truth'
        except NotMeasuredError as error:
            values[name], left_out[name] = None, str(error)
    if path is not None:
        write_image(path, sr)
    return values, left_out


def _in_threads(metrics, device):
    """Not on the CPU, where they take the cores from the network; BasicSR's metrics only: others may be networks."""
    kinds = [metric_opt.get('type') for metric_opt in metrics.values()]
    functions = [METRIC_REGISTRY.get(kind) for kind in kinds if kind in METRIC_REGISTRY]
    return device.type != 'cpu' and all(function.__module__.startswith('basicsr.') for function in functions)


def _at_once(function, *arguments):
    done = Future()
    done.set_result(function(*arguments))
    return done


def _gathered(result) -> Result:
    """The images of all ranks in the order of the set, of which each rank had every world_size-th."""
    parts = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, result)
    rows = [row for group in itertools.zip_longest(*(part.rows for part in parts)) for row in group if row is not None]
    whole = Result(rows=rows)
    for part in parts:
        for metric, lines in part.left_out.items():
            whole.left_out.setdefault(metric, []).extend(lines)
    return whole


def _averaged(result, metrics) -> Result:
    if not result.rows:
        raise UserError('there are no images in this set')
    for name in metrics:
        values = [row[name] for row in result.rows if row[name] is not None]
        finite = [value for value in values if math.isfinite(value)]
        count, lines = result.measured(name), result.left_out.get(name, [])
        if lines:
            shown = '; '.join(lines[:_SHOWN]) + (f'; and {len(lines) - _SHOWN} more' if len(lines) > _SHOWN else '')
            of = f'was measured on {count} of {len(result.rows)} images' if count else 'was not measured on any image'
            result.notes.append(f'{name} {of}: {shown}')
        if values:
            result.means[name] = float(np.mean(finite)) if finite else values[0]
        equal = [row['image'] for row in result.rows if row[name] == math.inf]
        if equal:
            of_mean = 'left out of the mean' if finite else 'so is the mean'
            why = ' (output equal to the ground truth)' if 'psnr' in metrics[name]['type'] else ''
            result.notes.append(f'{name} is inf for {", ".join(equal)}{why}; {of_mean}')
    return result


def _needs_gt(function):
    parameter = inspect.signature(function).parameters.get('img2')
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _other_size(image, sr, gt):
    alike = sr.shape[:2] == gt.shape[:2]
    what = 'color of the set and the channels of network_g' if alike else 'scale and the pairing'
    return f'{image}: the output is {_size(sr)}, its ground truth {_size(gt)}; check {what}'


def _size(image):
    return f'{image.shape[1]}x{image.shape[0]}' + (f'x{image.shape[2]}' if image.ndim == 3 else '')


class _Names:
    """Names of a set's images, by which they are listed and saved: all of them differ, on whichever rank they are.

    Args:
        loader: of several processes, each has every so-many-th image of the set.
    """

    def __init__(self, loader):
        order = getattr(loader, 'sampler', None)
        self.order = order if isinstance(order, range) and order.step > 1 else None
        self.used, self.stems, self.known = set(), [], []
        paths = getattr(getattr(loader, 'dataset', None), 'paths', None) if self.order else None
        for path in paths if isinstance(paths, (list, tuple)) else ():
            self.stems.append(self.stem(path.get('lq_path', '') if isinstance(path, dict) else path))
            self.known.append(_unique(self.stems[-1], self.used))

    @staticmethod
    def stem(path):
        return os.path.splitext(os.path.basename(str(path)))[0]

    def of(self, number, path):
        """The name of image ``number`` of this loader, from the path that came with it."""
        stem = self.stem(path)
        if self.order is None:
            return _unique(stem, self.used)
        index = self.order[number]
        if index < len(self.stems) and self.stems[index] == stem:
            return self.known[index]
        return f'{stem}_{index}'  # a dataset that does not say what the other processes have


def _count_val_sets(opt):
    return sum(key.split('_')[0] in ('val', 'test') for key in opt.get('datasets') or {})


def _unique(name, used):
    """Images of the same name in different folders must not overwrite each other."""
    unique, count = name, 1
    while unique in used:
        count += 1
        unique = f'{name}_{count}'
    used.add(unique)
    return unique


@contextmanager
def _eval_mode(net):
    modes = {module: module.training for module in net.modules()} if isinstance(net, torch.nn.Module) else {}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def write_image(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write a uint8 BGR or gray image as PNG, whatever characters its path has; folders are made.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(cv2.imencode('.png', image)[1].tobytes())
    except OSError as error:
        raise UserError(f'cannot write {path}: {error}') from error


def _columns(results: Mapping[str, Mapping[str, Result]]) -> list[tuple[str, str]]:
    """(set, metric) in order of appearance."""
    columns = {}
    for sets in results.values():
        for set_name, result in sets.items():
            for row in result.rows[:1]:
                columns.update({(set_name, name): None for name in row if name not in ('image', 'seconds')})
    return list(columns)


def _cells(results):
    columns = _columns(results)
    for network, sets in results.items():
        means = [sets[set_name].means.get(metric) if set_name in sets else None for set_name, metric in columns]
        yield network, [format_value(metric, value) for (_, metric), value in zip(columns, means)]


def format_value(metric: str, value: float | None) -> str:
    """Two digits for PSNR, four for others, '-' for nothing."""
    if value is None:
        return '-'
    return f'{value:.2f}' if 'psnr' in metric.lower() else f'{value:.4f}'


def format_table(results: Mapping[str, Mapping[str, Result]]) -> str:
    """Networks down, sets and their metrics across, for a terminal.

    Args:
        results: network -> set -> Result.
    """
    columns = _columns(results)
    sets, metrics = [''] + [name for name, _ in columns], [''] + [metric.upper() for _, metric in columns]
    # A set's name stands over its first metric only.
    sets = [name if i == 0 or name != sets[i - 1] else '' for i, name in enumerate(sets)]
    lines = [sets, metrics, *([network, *cells] for network, cells in _cells(results))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(metrics))]
    rows = [[cell.rjust(width) for cell, width in zip(line, widths)] for line in lines]
    return '\n'.join('  '.join([line[0].ljust(widths[0]), *row[1:]]).rstrip() for line, row in zip(lines, rows))


def write_results(
    folder: str | os.PathLike,
    results: Mapping[str, Mapping[str, Result]],
    about: Sequence[str] = (),
    made_from: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``results.md``, ``results.csv`` (means) and ``results.json`` (every image); older ones are replaced.

    Args:
        folder: made where absent; other files in it stay.
        results: network -> set -> Result.
        about: lines that say what was measured and how, for the .md and .json.
        made_from: see `sources.of_test`, for the .json.

    Returns:
        The three paths.

    Raises:
        UserError: a file cannot be written.
    """
    folder, columns = Path(folder), _columns(results)
    paths = [folder / f'results.{kind}' for kind in ('md', 'csv', 'json')]
    notes = [
        f'{network} on {name}: {note}'
        for network, sets in results.items()
        for name, result in sets.items()
        for note in result.notes
    ]
    rows = [['network', *(f'{name} {metric.upper()}' for name, metric in columns)]]
    rows += [[network, *cells] for network, cells in _cells(results)]
    markdown = ['| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |' for row in rows]
    markdown.insert(1, '| --- |' + ' ---: |' * len(columns))
    listed = [f'- {line}' for line in (*about, *notes)]
    content = {
        'about': list(about),
        **({'made_from': dict(made_from)} if made_from else {}),
        'results': {
            network: {
                name: {
                    'means': _json(r.means),
                    'measured': {metric: r.measured(metric) for set_name, metric in columns if set_name == name},
                    'notes': r.notes,
                    'images': [_json(row) for row in r.rows],
                }
                for name, r in sets.items()
            }
            for network, sets in results.items()
        },
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths[0].write_text('\n'.join(markdown + ([''] + listed if listed else [])) + '\n', encoding='utf-8')
        metrics = list(dict.fromkeys(metric for _, metric in columns))
        with open(paths[1], 'w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file)
            writer.writerow(['network', 'set', 'images', *metrics])
            for network, sets in results.items():
                for name, r in sets.items():
                    writer.writerow([network, name, len(r.rows), *(r.means.get(metric, '') for metric in metrics)])
        paths[2].write_text(json.dumps(content, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    except OSError as error:
        raise UserError(f'cannot write the results to {folder}: {error}') from error
    return paths


def _json(values):
    """JSON has no inf: 'inf' as text."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
