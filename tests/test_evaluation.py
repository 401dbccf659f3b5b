import ast
import csv
import json
import math
import threading
import time
from pathlib import Path

import cv2
import golden_data
import numpy as np
import pytest
import torch
from basicsr.metrics import psnr_ssim
from basicsr.models import build_model
from skimage.metrics import structural_similarity

from dckd_sr import evaluation
from dckd_sr.data import build_val_loader
from dckd_sr.errors import UserError
from dckd_sr.evaluation import (
    Result,
    TooSmallError,
    bicubic,
    evaluate,
    format_table,
    score,
    tensor2bgr,
    validate,
    write_results,
)
from dckd_sr.ops.resize import imresize

PSNR = {'type': 'calculate_psnr', 'crop_border': 2, 'test_y_channel': True}
SSIM = {'type': 'calculate_ssim', 'crop_border': 2, 'test_y_channel': True}


def image(height, width, seed=0):
    """A uint8 BGR image with structure."""
    coarse = np.random.default_rng(seed).random((6, 6, 3)).astype(np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * 255, 0, 255).astype(np.uint8)


def tensor(bgr):
    return torch.from_numpy(bgr[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255


def batch(name, gt, scale=2, with_gt=True):
    entries = {'lq': tensor(imresize(gt, 1 / scale)), 'lq_path': [f'folder/{name}.png']}
    return {**entries, 'gt': tensor(gt)} if with_gt else entries


def luma(bgr):
    """ITU-R BT.601 luma of an 8-bit image as MATLAB's rgb2ycbcr, not rounded."""
    return bgr.astype(np.float64) @ np.array([24.966, 128.553, 65.481]) / 255 + 16


class Nearest(torch.nn.Module):
    """Repeats pixels; remembers how it was called. The inner layers are in different modes."""

    def __init__(self, scale=2):
        super().__init__()
        self.scale = scale
        self.frozen = torch.nn.BatchNorm2d(3).eval()
        self.trained = torch.nn.Dropout(0.5)
        self.calls = []

    def forward(self, x):
        self.calls.append((tuple(x.shape[-2:]), self.training, self.trained.training, torch.is_grad_enabled()))
        return x.repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)


def nearest_psnr(gt):
    """PSNR of pixel repetition, computed by hand."""
    up = imresize(gt, 0.5).repeat(2, 0).repeat(2, 1)
    return 10 * math.log10(255**2 / np.mean((luma(up)[2:-2, 2:-2] - luma(gt)[2:-2, 2:-2]) ** 2))


def test_scores_agree_with_other_implementations():
    gt = image(40, 52)
    sr = np.clip(gt + np.random.default_rng(1).normal(0, 9, gt.shape), 0, 255).astype(np.uint8)
    inside = np.s_[2:-2, 2:-2]
    y = {'data_range': 255, 'gaussian_weights': True, 'sigma': 1.5, 'use_sample_covariance': False}
    metrics = {'psnr': PSNR, 'ssim': SSIM, 'rgb': {**PSNR, 'test_y_channel': False, 'crop_border': 0}}
    values = score(sr, gt, metrics)
    assert values['psnr'] == pytest.approx(
        10 * math.log10(255**2 / np.mean((luma(sr) - luma(gt))[inside] ** 2)), abs=1e-4
    )
    assert values['ssim'] == pytest.approx(structural_similarity(luma(sr)[inside], luma(gt)[inside], **y), abs=1e-5)
    assert values['rgb'] == pytest.approx(10 * math.log10(255**2 / np.mean((sr * 1.0 - gt) ** 2)), abs=1e-9)
    assert metrics['psnr'] == PSNR  # arguments stay as they were


def test_ssim_is_basicsrs_own_to_rounding(monkeypatch):
    """Its function as it stands in BasicSR's file, which `compat` replaces by a faster one."""
    source = Path(psnr_ssim.__file__).read_text()
    (own,) = [node for node in ast.parse(source).body if getattr(node, 'name', '') == '_ssim']
    scope = {'np': np, 'cv2': cv2}
    exec(compile(ast.Module([own], []), 'own', 'exec'), scope)
    rng = np.random.default_rng(0)
    for size, noise in (((40, 61), 9), ((15, 120), 60), ((200, 180), 0.4), ((64, 64), 0)):
        gt = image(*size)
        sr = np.clip(gt + rng.normal(0, noise, gt.shape), 0, 255).astype(np.uint8)
        for metric in (SSIM, {**SSIM, 'test_y_channel': False}):
            fast = score(sr, gt, {'ssim': metric})['ssim']
            with monkeypatch.context() as patched:
                patched.setattr(psnr_ssim, '_ssim', scope['_ssim'])
                assert fast == pytest.approx(score(sr, gt, {'ssim': metric})['ssim'], abs=1e-11)
    assert psnr_ssim._ssim.__module__ == 'dckd_sr.compat'


def test_score_edges():
    gt = image(14, 30)
    assert score(gt, gt, {'psnr': PSNR}) == {'psnr': math.inf}
    assert set(score(gt, gt, {'psnr': PSNR}, 'tiny')) == {'psnr'}
    with pytest.raises(TooSmallError, match=r'tiny \(30x14x3\) is too small for ssim: it needs 11 px'):
        score(gt, gt, {'psnr': PSNR, 'ssim': SSIM}, 'tiny')
    assert score(image(15, 15), image(15, 15), {'ssim': SSIM})['ssim'] == pytest.approx(1)  # 11 px are enough
    with pytest.raises(TooSmallError, match='too small for psnr'):
        score(gt, gt, {'psnr': {**PSNR, 'crop_border': 7}})
    with pytest.raises(UserError, match='baby: the output is 28x14x3, its ground truth 30x14x3; check scale and'):
        score(gt[:, :28], gt, {'psnr': PSNR}, 'baby')
    with pytest.raises(UserError, match='the output is 30x14x3, its ground truth 30x14; check color of the set'):
        score(gt, gt[..., 0], {'psnr': PSNR}, 'baby')
    with pytest.raises(UserError, match="val.metrics.p.type: no metric named 'psnr'; known: .*calculate_psnr"):
        score(gt, gt, {'p': {'type': 'psnr'}})
    with pytest.raises(UserError, match='val.metrics.p .calculate_psnr. fails on the image'):
        score(gt, gt, {'p': {'type': 'calculate_psnr', 'crop_border': 0, 'input_order': 'XYZ'}})
    assert score(gt, None, {'psnr': PSNR}) == {}


def test_tensor2bgr_rounds_clips_and_leaves_its_argument():
    values = torch.tensor([-0.2, 0.5019, 0.5, 1.3]).view(1, 1, 2, 2).repeat(1, 3, 1, 1)
    values[:, 0] = 0
    before = values.clone()
    bgr = tensor2bgr(values)
    assert bgr.dtype == np.uint8 and bgr.shape == (2, 2, 3)
    assert bgr[..., 0].tolist() == [[0, 128], [128, 255]] and not bgr[..., 2].any()
    assert torch.equal(values, before)


@pytest.mark.parametrize('scale, psnr, ssim', [(2, 33.66, 0.9299), (3, 30.39, 0.8682), (4, 28.42, 0.8104)])
def test_bicubic_reaches_the_published_scores_of_set5(scale, psnr, ssim):
    # Published (Y, border = scale) with luma alone enlarged and an LR that was not rounded: hence the tolerance.
    folder = golden_data.require_images() / 'Set5'
    dataset = {'type': 'SRImageDataset', 'dataroot_gt': str(folder / 'HR'), 'filename_tmpl': f'{{}}x{scale}'}
    dataset['dataroot_lq'] = str(folder / 'LR_bicubic' / f'X{scale}')
    loader = build_val_loader({'scale': scale, 'datasets': {'val': dataset}}, 'val')
    metrics = {'psnr': {**PSNR, 'crop_border': scale}, 'ssim': {**SSIM, 'crop_border': scale}}
    result = evaluate(bicubic(scale), loader, scale=scale, metrics=metrics, device='cpu')
    assert len(result.rows) == 5
    assert result.means['psnr'] == pytest.approx(psnr, abs=0.02)
    assert result.means['ssim'] == pytest.approx(ssim, abs=1e-3)


def test_bicubic_is_imresize_of_the_whole_8_bit_image():
    gt = image(40, 36)
    lq = imresize(gt, 0.5)
    assert np.array_equal(tensor2bgr(bicubic(2)(tensor(lq))), imresize(lq, 2))
    unrounded = torch.rand(1, 3, 4, 4)
    assert torch.equal(bicubic(1)(unrounded), unrounded)
    # Padding and tiles would change it.
    plain = evaluate(bicubic(2), [batch('a', gt)], scale=2, metrics={'psnr': PSNR}, device='cpu')
    tiled = evaluate(
        bicubic(2), [batch('a', gt)], scale=2, metrics={'psnr': PSNR}, device='cpu', window_size=16, tile_size=8
    )
    assert plain.means == tiled.means


def test_evaluate_rows_means_and_modes():
    images = {'one': image(32, 40, 1), 'two': image(36, 24, 2)}
    net = Nearest().train()
    net.frozen.eval()
    result = evaluate(
        net,
        [batch(name, gt) for name, gt in images.items()],
        scale=2,
        metrics={'psnr': PSNR},
        device='cpu',
        window_size=8,
    )
    assert [list(row) for row in result.rows] == [['image', 'psnr', 'seconds']] * 2
    assert [row['image'] for row in result.rows] == ['one', 'two'] and all(row['seconds'] > 0 for row in result.rows)
    expected = [nearest_psnr(gt) for gt in images.values()]
    assert [row['psnr'] for row in result.rows] == pytest.approx(expected, abs=1e-4)
    assert result.means == {'psnr': pytest.approx(sum(expected) / 2, abs=1e-4)} and not result.notes
    # Padded to the window, eval mode, no gradients; then every module is in its former mode.
    assert net.calls == [((16, 24), False, False, False), ((24, 16), False, False, False)]
    assert net.training and net.trained.training and not net.frozen.training


def test_evaluate_restores_modes_after_an_error_and_names_broken_outputs():
    class Broken(Nearest):
        def forward(self, x):
            return super().forward(x) * torch.tensor(float('nan'))

    net = Broken()
    with pytest.raises(UserError, match='baby: the output holds nan'):
        evaluate(net, [batch('baby', image(32, 32))], scale=2, metrics={}, device='cpu')
    assert net.training
    with pytest.raises(UserError, match='no images'):
        evaluate(net, [], scale=2, metrics={}, device='cpu')


def test_means_leave_out_what_cannot_be_averaged_and_say_so():
    flat = np.full((32, 32, 3), 77, np.uint8)  # repeating pixels restores it exactly
    gt = image(32, 32, 3)
    metrics = {'psnr': PSNR, 'ssim': SSIM}
    batches = [batch('flat', flat), batch('photo', gt), batch('small', image(14, 14))]
    result = evaluate(Nearest(), batches, scale=2, metrics=metrics, device='cpu')
    assert result.rows[0]['psnr'] == math.inf and result.rows[2]['ssim'] is None
    assert result.means['psnr'] == pytest.approx((result.rows[1]['psnr'] + result.rows[2]['psnr']) / 2)
    assert result.means['ssim'] == pytest.approx((result.rows[0]['ssim'] + result.rows[1]['ssim']) / 2)
    assert any('small (14x14x3) is too small for ssim' in note for note in result.notes)
    assert any('psnr is inf for flat (output equal to the ground truth); left out' in note for note in result.notes)

    result = evaluate(Nearest(), [batch('flat', flat)], scale=2, metrics={'psnr': PSNR}, device='cpu')
    assert result.means == {'psnr': math.inf} and 'so is the mean' in result.notes[0]
    result = evaluate(Nearest(), [batch('lone', gt, with_gt=False)], scale=2, metrics=metrics, device='cpu')
    assert result.means == {} and result.rows[0]['psnr'] is None and len(result.notes) == 2


def fails_on(*names, error=None):
    """A metric without a value for images whose first pixel says so."""

    def calculate_own(img, img2=None):
        if img2[0, 0, 0] in names:
            if error is None:
                return math.nan
            raise error
        return 1.0

    return calculate_own


@pytest.mark.parametrize(
    'error', [None, RuntimeError('min(): Expected'), ValueError('x'), np.linalg.LinAlgError('SVD'), MemoryError()]
)
def test_a_metric_that_fails_on_an_image_is_left_out_and_counted(monkeypatch, tmp_path, error):
    gts = [image(32, 32, seed) for seed in range(5)]
    for seed, gt in enumerate(gts):
        gt[0, 0] = 10 * seed
    monkeypatch.setitem(evaluation.METRIC_REGISTRY._obj_map, 'calculate_own', fails_on(10, 30, error=error))
    metrics = {'own': {'type': 'calculate_own'}, 'psnr': PSNR}
    batches = [batch(f'i{seed}', gt) for seed, gt in enumerate(gts)]
    result = evaluate(Nearest(), batches, scale=2, metrics=metrics, device='cpu')
    assert result.means['own'] == 1 and [row['own'] for row in result.rows] == [1, None, 1, None, 1]
    assert all(row['psnr'] is not None for row in result.rows)
    [note] = result.notes
    assert note.startswith('own was measured on 3 of 5 images: val.metrics.own (calculate_own)') and 'i3' in note
    write_results(tmp_path, {'student': {'Set': result}})
    assert f'- student on Set: {note}' in (tmp_path / 'results.md').read_text()
    content = json.loads((tmp_path / 'results.json').read_text())['results']['student']['Set']
    assert content['measured'] == {'own': 3, 'psnr': 5}


def test_niqe_needs_two_blocks_and_never_ends_a_test():
    def noise(height, width):
        return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)

    metrics = {'niqe': {'type': 'calculate_niqe', 'crop_border': 2}}
    batches = [batch('large', noise(196, 104)), batch('one_block', noise(100, 100)), batch('small', noise(98, 98))]
    result = evaluate(Nearest(), batches, scale=2, metrics=metrics, device='cpu')
    assert [row['niqe'] is None for row in result.rows] == [False, True, True]
    assert result.means['niqe'] == result.rows[0]['niqe'] > 0
    assert result.notes[0].startswith('niqe was measured on 1 of 3 images: one_block (100x100x3) is too small for niqe')


@pytest.mark.parametrize(
    'error, message',
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: 9"), 'memory'),
        (RuntimeError('[enforce fail] not enough memory: you tried to allocate 9 bytes.'), 'memory'),
        (MemoryError('std::bad_alloc'), 'memory'),
        (torch.cuda.OutOfMemoryError('CUDA out of memory.'), 'GPU memory'),
    ],
)
def test_too_little_memory_names_the_image_and_the_key(error, message):
    class Large(Nearest):
        def forward(self, x):
            raise error

    with pytest.raises(UserError) as caught:
        evaluate(Large(), [batch('baby', image(32, 40))], scale=2, metrics={}, device='cpu')
    expected = f'folder/baby.png (20x16): not enough {message}; set val.tile_size, such as 256, or lower it'
    assert str(caught.value) == expected


def test_an_output_of_another_size_than_gt_names_both_files():
    wrong = {**batch('b', image(20, 24)), 'gt': tensor(image(22, 24)), 'gt_path': ['HR/b.png']}
    with pytest.raises(UserError, match=r'b: the output is 24x20x3, .* 24x22x3; .* \(folder/b\.png, HR/b\.png\)'):
        evaluate(Nearest(), [wrong], scale=2, metrics={}, device='cpu')


class Part(list):
    """What one of several processes gets of a set."""

    def __init__(self, paths, rank, processes, known=True):
        self.sampler = range(rank, len(paths), processes)
        super().__init__(paths[index] for index in self.sampler)
        self.dataset = type('Set', (), {'paths': [{'lq_path': path} for path in paths]} if known else {})()


@pytest.mark.parametrize('processes', [2, 3])
def test_images_of_one_name_have_the_same_names_on_several_processes_as_on_one(processes):
    paths = [f'{folder}/{name}.png' for folder in 'ab' for name in ('x', 'y', 'x_2')] + ['c/x.jpg', 'y']

    def named(rank, count, known=True):
        part = Part(paths, rank, count, known)
        names = evaluation._Names(part)
        return {index: names.of(number, path) for number, (index, path) in enumerate(zip(part.sampler, part))}

    single = named(0, 1)
    assert len(set(single.values())) == len(paths)
    several = {index: name for rank in range(processes) for index, name in named(rank, processes).items()}
    assert several == single
    unknown = [name for rank in range(processes) for name in named(rank, processes, False).values()]
    assert len(set(unknown)) == len(paths)


def test_scoring_in_threads_keeps_order_and_memory(monkeypatch):
    """The first image takes longest; no more images wait for it than there are threads."""
    loaded, order, loaded_meanwhile = [], [], []
    true_score = evaluation.score

    def slow_score(sr, gt, metrics, name):
        assert threading.current_thread() is not threading.main_thread()
        if name == '0':
            time.sleep(0.3)
            loaded_meanwhile.append(len(loaded))
        order.append(name)
        return true_score(sr, gt, metrics, name)

    def batches():
        for seed in range(12):
            loaded.append(seed)
            yield batch(str(seed), image(24, 30, seed))

    monkeypatch.setattr(evaluation, 'score', slow_score)
    monkeypatch.setattr(evaluation, '_in_threads', lambda metrics, device: True)
    monkeypatch.setattr(evaluation.os, 'cpu_count', lambda: 2)
    result = evaluate(Nearest(), batches(), scale=2, metrics={'psnr': PSNR}, device='cpu')
    assert [row['image'] for row in result.rows] == [str(seed) for seed in range(12)]
    assert [row['psnr'] for row in result.rows] == pytest.approx([nearest_psnr(image(24, 30, s)) for s in range(12)])
    assert order[0] != '0' and loaded_meanwhile == [3]


def test_threads_are_for_basicsrs_metrics_beside_a_gpu(monkeypatch):
    """Metrics of others may be networks, and a thread has its own gradient mode."""
    monkeypatch.setitem(evaluation.METRIC_REGISTRY._obj_map, 'calculate_own', lambda img, img2: 1.0)
    own, gpu = {'own': {'type': 'calculate_own'}, 'psnr': PSNR}, torch.device('cuda')
    assert evaluation._in_threads({'psnr': PSNR, 'ssim': SSIM}, gpu) and evaluation._in_threads({}, gpu)
    assert not evaluation._in_threads(own, gpu) and not evaluation._in_threads({'psnr': PSNR}, torch.device('cpu'))
    result = evaluate(Nearest(), [batch('a', image(20, 24))], scale=2, metrics=own, device='cpu')
    assert result.means['own'] == 1


def test_an_error_in_a_thread_ends_the_evaluation(monkeypatch):
    monkeypatch.setattr(evaluation, '_in_threads', lambda metrics, device: True)
    wrong = {**batch('b', image(20, 24)), 'gt': tensor(image(22, 24))}
    loaded = []

    def batches():
        for number in range(40):
            loaded.append(number)
            yield wrong if number == 1 else batch(str(number), image(20, 24))

    with pytest.raises(UserError, match='b: the output is 24x20x3, its ground truth 24x22x3'):
        evaluate(Nearest(), batches(), scale=2, metrics={'psnr': PSNR}, device='cpu')
    assert len(loaded) < 20  # eight threads at most
    assert not [thread for thread in threading.enumerate() if 'ThreadPool' in thread.name]


def test_evaluate_saves_images_without_overwriting_namesakes(tmp_path):
    batches = [batch('same', image(32, 32, 1)), batch('same', image(32, 32, 2))]
    folder = tmp_path / 'größe' / 'Set'
    net = Nearest()
    evaluate(net, batches, scale=2, metrics={}, device='cpu', save_dir=folder, suffix='_x')
    assert sorted(path.name for path in folder.iterdir()) == ['same_2_x.png', 'same_x.png']
    for name, entry in zip(('same_x', 'same_2_x'), batches):
        written = cv2.imdecode(np.fromfile(folder / f'{name}.png', np.uint8), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(written, tensor2bgr(net(entry['lq'])))
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write'):
        evaluate(net, batches, scale=2, metrics={}, device='cpu', save_dir=tmp_path / 'file')


def results():
    row = {'image': 'a', 'psnr': 30.123456, 'ssim': 0.91239, 'seconds': 0.5}
    one = Result([row, {**row, 'image': 'b', 'psnr': math.inf}], {'psnr': 30.123456, 'ssim': 0.91239}, ['b is equal'])
    two = Result([{'image': 'c', 'psnr': 28.0, 'seconds': 0.1}], {'psnr': 28.0}, [])
    return {'bicubic': {'Set5': one, 'B|1': two}, 'student': {'Set5': one}}


def test_table():
    assert format_table(results()).splitlines() == [
        '          Set5            B|1',
        '          PSNR    SSIM   PSNR',
        'bicubic  30.12  0.9124  28.00',
        'student  30.12  0.9124      -',
    ]


def test_results_files(tmp_path):
    folder = tmp_path / 'results' / 'run'
    folder.mkdir(parents=True)
    for name in ('keep.png', 'results.md'):
        (folder / name).write_text('old')
    paths = write_results(folder, results(), about=['psnr: Y'])
    assert [path.name for path in paths] == ['results.md', 'results.csv', 'results.json']
    assert (folder / 'keep.png').read_text() == 'old'
    assert paths[0].read_text().splitlines() == [
        '| network | Set5 PSNR | Set5 SSIM | B\\|1 PSNR |',
        '| --- | ---: | ---: | ---: |',
        '| bicubic | 30.12 | 0.9124 | 28.00 |',
        '| student | 30.12 | 0.9124 | - |',
        '',
        '- psnr: Y',
        '- bicubic on Set5: b is equal',
        '- student on Set5: b is equal',
    ]
    with open(paths[1], newline='') as file:
        assert list(csv.reader(file)) == [
            ['network', 'set', 'images', 'psnr', 'ssim'],
            ['bicubic', 'Set5', '2', '30.123456', '0.91239'],
            ['bicubic', 'B|1', '1', '28.0', ''],
            ['student', 'Set5', '2', '30.123456', '0.91239'],
        ]
    content = json.loads(paths[2].read_text(), parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
    assert content['about'] == ['psnr: Y']
    five = content['results']['bicubic']['Set5']
    assert five['means'] == {'psnr': 30.123456, 'ssim': 0.91239}
    assert [(entry['image'], entry['psnr']) for entry in five['images']] == [('a', 30.123456), ('b', 'inf')]
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write the results'):
        write_results(tmp_path / 'file', results())


class Loader(list):
    def __init__(self, batches):
        super().__init__(batches)
        self.dataset = self
        self.opt = {'name': 'Mixed'}


def model(tmp_path):
    network = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 1, 'upscale': 2}
    return build_model(
        {
            'name': 'run',
            'model_type': 'SRModel',
            'scale': 2,
            'num_gpu': 0,
            'dist': False,
            'is_train': False,
            'network_g': network,
            'path': {'visualization': str(tmp_path)},
            'val': {'metrics': {'psnr': PSNR}},
        }
    )


def test_validate_scores_an_image_without_gt_against_nothing(tmp_path):
    sr_model = model(tmp_path)
    gts = [image(32, 32, 1), image(32, 32, 2)]
    result = validate(sr_model, Loader([batch('a', gts[0]), batch('b', gts[1], with_gt=False)]), 7, None, True)
    with torch.no_grad():
        up = tensor2bgr(sr_model.net_g(batch('a', gts[0])['lq']))
    expected = 10 * math.log10(255**2 / np.mean((luma(up)[2:-2, 2:-2] - luma(gts[0])[2:-2, 2:-2]) ** 2))
    assert [row['psnr'] for row in result.rows] == [pytest.approx(expected, abs=1e-4), None]
    assert sr_model.metric_results == {'psnr': pytest.approx(expected, abs=1e-4)}
    assert sr_model.best_metric_results['Mixed']['psnr'] == {
        'better': 'higher',
        'val': pytest.approx(expected, abs=1e-4),
        'iter': 7,
    }
    assert sorted(path.name for path in (tmp_path / 'Mixed').iterdir()) == ['a_run.png', 'b_run.png']
    sr_model.opt['is_train'] = True
    validate(sr_model, Loader([batch('a', gts[0])]), 9, None, True)
    assert [path.name for path in (tmp_path / 'a').iterdir()] == ['a_9.png']
    with pytest.raises(UserError, match='no images'):
        validate(sr_model, Loader([]), 9, None, False)
    # A second set may have an image of the same name.
    sr_model.opt['datasets'] = {'train': {}, 'val_1': {}, 'val_2': {}}
    for name, gt in zip(('One', 'Two'), gts):
        loader = Loader([batch('a', gt)])
        loader.opt = {'name': name}
        validate(sr_model, loader, 9, None, True)
    written = [(tmp_path / name / 'a' / 'a_9.png').read_bytes() for name in ('One', 'Two')]
    assert written[0] != written[1]


def test_validate_without_metrics_only_runs(tmp_path):
    sr_model = model(tmp_path)
    del sr_model.opt['val']
    assert len(validate(sr_model, Loader([batch('a', image(32, 32))]), 1, None, False).rows) == 1
    assert not hasattr(sr_model, 'metric_results')
