"""What `report` needs networks for: pictures, the overlap of code distributions, costs."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from dckd_sr import compare, complexity, devices, evaluation, logs, options, test
from dckd_sr.data import build_val_loader
from dckd_sr.encoder import build_encoder
from dckd_sr.errors import UserError
from dckd_sr.inference import VAL_KEYS, infer
from dckd_sr.ops.padding import pad_to_multiple

SIDE, ENCODED, CROP = 592, 256, 96  # most pixels a side: of pictures, of what is encoded, of crops
MOST_BYTES = 8e6  # of pictures, which keeps a page below 10 MB
TRUTH = 'ground truth'


@dataclass
class Cost:
    """What a network costs; multiply_adds for an output of 1280x720, seconds for one input of ``shape``."""

    type: str
    parameters: int
    multiply_adds: int
    seconds: float
    shape: tuple


class Scene:
    """The middle of a few images, and what networks make of it.

    Args:
        opt: resolved options of a test.
        batches: of one image, with 'lq' and perhaps 'gt'.
        encoder: the VQGAN, or None.
        teacher: (network, its block), or None.

    Attributes:
        made: of each image, label -> uint8 BGR or gray.
        overlaps: label -> one (overlap, share of equal codes) with the teacher a run.
        costs: label -> Cost.
    """

    def __init__(self, opt, batches, encoder, teacher):
        self.scale, self.device = opt.get('scale', 1), devices.of(opt)
        val = opt.get('val') or {}
        self.sizes = {key: val.get(key) for key in VAL_KEYS}
        metrics = (metric for metric in (val.get('metrics') or {}).values() if metric['type'] == 'calculate_psnr')
        default = {'type': 'calculate_psnr', 'crop_border': self.scale, 'test_y_channel': True}
        self.metric = next(metrics, default)
        self.names = [Path(batch['lq_path'][0]).stem for batch in batches]
        self.lq = [middle(batch['lq'], max(1, SIDE // self.scale)) for batch in batches]
        self.made, self.overlaps, self.costs = [{} for _ in batches], {}, {}
        self.encoder, self.target, self._costs = encoder and encoder.to(self.device), None, {}
        if teacher is not None:
            self.run(compare.TEACHER, *teacher)
        if all('gt' in batch for batch in batches):
            self.add(TRUTH, [middle(batch['gt'], SIDE // self.scale * self.scale) for batch in batches])
        if self.lq[0].shape[1] in (1, 3):
            enlarged = [evaluation.bicubic(self.scale)(lq) for lq in self.lq]
            self.add('bicubic' if self.scale > 1 else 'input', enlarged)

    def run(self, label, net, block):
        """The images of a network; those of a label's first run are kept to look at."""
        net = net.to(self.device)
        with torch.no_grad(), logs.explained(label):
            outputs = [infer(net, lq.to(self.device), self.scale, **self.sizes) for lq in self.lq]
            if str(block) not in self._costs:
                self._costs[str(block)] = measured(net, block['type'], self.scale, self.lq[0].shape[1], self.device)
        self.costs.setdefault(label, self._costs[str(block)])
        self.add(label, outputs)

    @torch.no_grad()
    def add(self, label, outputs):
        """Keep images (1, C, h, w), and how their codes compare with those of the first, the teacher's."""
        for image, output in zip(self.made, outputs):
            image.setdefault(label, evaluation.tensor2bgr(output))
        if self.encoder is not None:
            codes = torch.cat([distribution(self.encoder, output.to(self.device)) for output in outputs])
            if self.target is None:
                self.target = codes
            else:
                self.overlaps.setdefault(label, []).append(overlap(codes, self.target))


def restore(runs, count, notes):
    """Run the networks on the first validation images.

    Args:
        runs: list of `report.Run`.
        count: how many images at most.
        notes: what could not be done is added here.

    Returns:
        what the page shows of it: ``pictures`` (image -> label -> data URI), ``sides`` that the slider begins with,
        ``psnr`` (image -> label -> text), ``crops`` (rows of (image, [(label, text, pixels, data URI)])), ``overlap``
        (rows of texts), ``costs`` (label -> Cost), and sentences ``about`` them; {} where no network ran.
    """
    found = []
    for run in runs:
        try:
            found.append((run, tested_options(run)))
        except UserError as error:
            notes.append(f'{run.name}: no pictures: {error}')
    opt, batches = first_images([opt for _, opt in found], count, notes)
    if not batches:
        return {}
    teacher = build_first(found, 'network_t', lambda o: (test.load_network(o, 't'), o['network_t']), notes)
    encoder = build_first(found, 'network_vqgan', encoder_of, notes) if teacher else None
    if encoder is None:
        notes.append('No overlap of codes: that takes the weights of a teacher and of a codebook.')
    scene = Scene(opt, batches, encoder, teacher)
    for run, its in found:
        if run.label in scene.costs and encoder is None:
            continue  # pictures are those of a label's first run
        try:
            scene.run(run.label, test.load_network(its, 'g'), its['network_g'])
        except UserError as error:
            notes.append(f'{run.name}: no pictures: {error}')
    students = [label for label in scene.costs if label != compare.TEACHER]
    return arrange(scene, students) if students else {}


def newest_weights(folder):
    """The file of a run's student, or None."""
    files = {}
    for file in (folder / 'models').glob('net_g*'):
        if found := re.fullmatch(r'net_g(_ema)?_(latest|\d+)\.(pth|safetensors)', file.name):
            at = math.inf if found[2] == 'latest' else int(found[2])
            files[at, bool(found[1])] = file
    return files[max(files)] if files else None


def tested_options(run):
    """The run's options as for a test of its newest weights."""
    weights = newest_weights(run.path)
    if weights is None or not run.text:
        raise UserError('there are no weights in its folder models' if run.text else 'it has no resolved.yml')
    # The file says how the weights that the run began with are read.
    began = [f'path:{key}_g=null' for key in ('pretrain_network', 'param_key', 'strict_load')]
    opt, _ = options.load(run.path / 'resolved.yml', began, is_train=False)
    opt['path']['pretrain_network_g'] = str(weights)
    return opt


def first_images(found, count, notes):
    """(options, first batches of their first set); no batches where none is there."""
    for opt in found:
        for name, block in opt['datasets'].items():
            if block.get('missing') is not None:
                notes.append(f'{block.get("name", name)}: no images to look at: {block["missing"]}')
            else:
                return opt, list(itertools.islice(build_val_loader(opt, name), count))
    return None, []


def build_first(found, key, build, notes):
    """``build`` of the first options that have ``key``, or None."""
    for _, opt in found:
        if opt.get(key):
            try:
                return build(opt)
            except UserError as error:
                notes.append(f'{key} is not at hand: {error}')
                return None
    return None


def encoder_of(opt):
    return build_encoder(
        opt['network_vqgan'], opt['path'].get('pretrain_network_vqgan'), opt['path'].get('param_key_vqgan')
    )


def middle(x, side):
    """At most ``side`` pixels a side from the middle of (B, C, h, w)."""
    top, left = (max(0, size - side) // 2 for size in x.shape[2:])
    return x[:, :, top : top + side, left : left + side]


def distribution(encoder, image):
    """Probabilities of the codes (positions, codes) in the middle of one image (1, C, h, w): C of Eq. 8."""
    image = pad_to_multiple(middle(image, ENCODED), 2 ** (encoder.num_levels - 1))
    return encoder(image, levels=False).logits.softmax(1)


def overlap(p, q):
    """How alike distributions (positions, codes) are.

    Returns:
        (mean over positions of the sum over codes of the lesser probability: 1 where they are equal, 0 where they share
        no code; share of positions with the same most probable code).
    """
    return float(torch.minimum(p, q).sum(1).mean()), float((p.argmax(1) == q.argmax(1)).float().mean())


def measured(net, kind, scale, channels, device):
    """`Cost` of a network; a CPU is timed on an image of 192x192, out of patience."""
    shape = whole = complexity.paper_shape(scale, channels)
    if device.type == 'cpu':
        shape = (1, channels, *2 * (max(1, 192 // scale),))
    adds = complexity.multiply_adds(net, whole)
    return Cost(kind, complexity.parameters(net), adds, complexity.latency(net, shape, device, repeats=5), shape)


def arrange(scene, students):
    """Pictures, crops and tables of a scene, as `restore` returns them."""
    order = [TRUTH, 'bicubic', 'input', compare.TEACHER, *students]
    labels = [label for label in order if label in scene.made[0]]
    reference = next((label for label in (TRUTH, compare.TEACHER) if label in labels), students[0])
    pictures, texts, crops, size = {}, {}, [], 0
    for name, made in zip(scene.names, scene.made):
        shown = {label: data_uri(made[label], 'WEBP', quality=90) for label in labels}
        where = most_different([made[label] for label in students], made[reference])
        parts = {label: np.ascontiguousarray(made[label][where]) for label in labels}
        said = {label: psnr(parts, label, {**scene.metric, 'crop_border': 0}) for label in labels}
        crop = [(label, said[label], part, data_uri(part, 'PNG')) for label, part in parts.items()]
        size += sum(map(len, shown.values())) + sum(len(part[-1]) for part in crop)
        if pictures and size > MOST_BYTES:
            break
        pictures[name], texts[name] = shown, {label: psnr(made, label, scene.metric) for label in labels}
        crops.append((name, crop))
    rows = [[label, *(f'{statistics.fmean(part):.4f}' for part in zip(*v))] for label, v in scene.overlaps.items()]
    shape, threads = next(iter(scene.costs.values())).shape, f', threads: {torch.get_num_threads()}'
    positions, codes = (0, 0) if scene.target is None else scene.target.shape
    about = {
        'pictures': f'The first {len(pictures)} validation images, their middle up to {SIDE} px a side; of each method '
        'its first run. PSNR is that of the part shown.',
        'overlap': f'{positions:,} positions in the middle (up to {ENCODED} px a side) of {len(scene.names)} images, '
        f'{codes:,} codes; mean over the runs of a method.',
        'costs': f'Multiply-adds for an output of 1280x720. Seconds: median of 5 forward passes, {shape[3]}x{shape[2]} '
        f'px in, on {scene.device.type}{threads if scene.device.type == "cpu" else ""}.',
    }
    left = next((label for label in (compare.TEACHER, TRUTH) if label in labels), labels[0])
    return {
        **{'pictures': pictures, 'psnr': texts, 'crops': crops, 'sides': [left, students[-1]]},
        **{'overlap': rows, 'costs': scene.costs, 'about': about},
    }


def psnr(made, label, metric):
    """'29.59 dB' of an image against the ground truth; '' without one."""
    if TRUTH not in made or label == TRUTH:
        return ''
    try:
        return f'{evaluation.score(made[label], made[TRUTH], {"psnr": metric})["psnr"]:.2f} dB'
    except evaluation.NotMeasuredError:
        return ''


def most_different(images, reference, side=CROP):
    """The window in which the squared errors of images differ most; of a single image, in which its error is largest.

    Args:
        images: list of uint8 (h, w, 3) or (h, w).
        reference: the same.

    Returns:
        (slice of rows, slice of columns).
    """
    errors = [np.square(image.astype(np.float64) - reference).reshape(*image.shape[:2], -1).sum(2) for image in images]
    sums = np.stack([cv2.boxFilter(e, -1, (side, side), anchor=(0, 0), normalize=False) for e in errors])
    rows, columns = (max(1, size - side + 1) for size in reference.shape[:2])
    spread = (sums.max(0) - sums.min(0) if len(sums) > 1 else sums[0])[:rows, :columns]
    top, left = np.unravel_index(spread.argmax(), spread.shape)
    return slice(top, top + side), slice(left, left + side)


def data_uri(image, kind, **how):
    """uint8 BGR or gray -> data URI."""
    target = io.BytesIO()
    Image.fromarray(image if image.ndim == 2 else image[..., ::-1]).save(target, kind, **how)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(target.getvalue()).decode()}'
