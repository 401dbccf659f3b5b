"""Restormer's datasets: which pixels come out, seen against OpenCV's and numpy's own operations."""

import random

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset

import dckd_sr.data  # noqa: F401
from dckd_sr.data.restormer_dataset import flip_and_rotate
from dckd_sr.data.seeded import SeededDataset
from dckd_sr.errors import UserError


def write(folder, name, image):
    folder.mkdir(exist_ok=True)
    cv2.imwrite(str(folder / name), image)
    return image


@pytest.fixture
def pair(tmp_path):
    """A pair whose LQ is GT's complement, so that every pixel tells where it comes from."""
    gt = np.arange(9 * 7 * 3, dtype=np.uint8).reshape(9, 7, 3)
    return write(tmp_path / 'gt', 'a.png', gt), write(tmp_path / 'lq', 'a.png', 255 - gt)


def paired(**options):
    opt = {
        'name': 'a',
        'type': 'Dataset_PairedImage',
        'dataroot_gt': 'gt',
        'dataroot_lq': 'lq',
        'io_backend': {'type': 'disk'},
    }
    return build_dataset({**opt, 'phase': 'train', 'scale': 1, 'gt_size': 4, 'geometric_augs': True, **options})


def bgr(tensor):
    """A sample's tensor as the uint8 image that it came from."""
    return (tensor * 255).round().byte().permute(1, 2, 0).numpy()[..., ::-1]


def places(gt, size):
    """Every crop in every one of the eight positions, as bytes."""
    images = [
        gt[y : y + size, x : x + size] for y in range(gt.shape[0] - size + 1) for x in range(gt.shape[1] - size + 1)
    ]
    turned = [np.rot90(image, k) for image in images for k in range(4)]
    return {image.tobytes() for image in turned + [image[::-1] for image in turned]}


def test_training_gives_equal_crops_of_both_in_all_eight_positions(pair):
    data, seen = SeededDataset(paired(gt_size=7), 0), set()
    for position in range(120):
        sample = data[(position, 0)]
        torch.testing.assert_close(sample['lq'], 1 - sample['gt'])
        seen.add(bgr(sample['gt']).tobytes())
    assert seen == places(pair[0], 7)


@pytest.mark.parametrize('mode', range(8))
def test_the_modes_are_restormers(mode):
    image = np.random.default_rng(0).random((4, 3, 2))
    wanted = np.rot90(image, [0, 0, 1, 1, 2, 2, 3, 3][mode])
    assert np.array_equal(flip_and_rotate(image, mode), wanted[::-1] if mode in (1, 3, 5, 7) else wanted)


def test_without_geometric_augs_the_crop_is_as_it_was(pair):
    dataset = paired(geometric_augs=False)
    plain = {pair[0][y : y + 4, x : x + 4].tobytes() for y in range(6) for x in range(4)}
    assert {bgr(dataset[0]['gt']).tobytes() for _ in range(60)} <= plain


def test_small_images_continue_as_their_mirror_image(pair):
    dataset = paired(gt_size=24, geometric_augs=False)
    for image, key in zip(pair, ('gt', 'lq')):
        wanted = cv2.copyMakeBorder(image, 0, 15, 0, 17, cv2.BORDER_REFLECT)
        assert np.array_equal(bgr(dataset[0][key]), wanted)


def test_validation_gives_whole_images(pair):
    sample = paired(phase='val')[0]
    assert np.array_equal(bgr(sample['gt']), pair[0]) and sample['lq_path'].endswith('a.png')


def gaussian(**options):
    opt = {
        'name': 'a',
        'type': 'Dataset_GaussianDenoising',
        'dataroot_gt': 'gt',
        'dataroot_lq': None,
        'io_backend': {'type': 'disk'},
    }
    return build_dataset({**opt, 'phase': 'val', 'scale': 1, 'sigma_test': 25, 'in_ch': 3, **options})


@pytest.fixture
def gray(tmp_path):
    return write(tmp_path / 'gt', 'a.png', np.full((80, 60, 3), 128, np.uint8))


def test_validation_noise_is_restormers(pair):
    sample = gaussian()[0]
    image = cv2.cvtColor(pair[0], cv2.COLOR_BGR2RGB).astype(np.float32) / 255.0
    np.random.seed(seed=0)
    image += np.random.normal(0, 25 / 255.0, image.shape)
    torch.testing.assert_close(sample['lq'], torch.from_numpy(image.transpose(2, 0, 1)))
    assert np.array_equal(bgr(sample['gt']), pair[0])


def test_gray_images_have_one_channel(pair):
    sample = gaussian(in_ch=1, sigma_test=0)[0]
    wanted = cv2.imread('gt/a.png', cv2.IMREAD_GRAYSCALE)
    assert np.array_equal((sample['gt'][0] * 255).round().numpy(), wanted) and torch.equal(sample['lq'], sample['gt'])


@pytest.mark.parametrize(
    'sigma_type, sigma_range, least, most',
    [('constant', 30, 30, 30), ('random', [10, 50], 10, 50), ('choice', [5, 40], 5, 40)],
)
def test_training_noise_has_the_strength_asked_for(gray, sigma_type, sigma_range, least, most):
    options = {'sigma_type': sigma_type, 'sigma_range': sigma_range, 'gt_size': 48}
    data = SeededDataset(gaussian(phase='train', **options), 0)
    samples = [data[(position, 0)] for position in range(24)]
    found = [255 * (sample['lq'] - sample['gt']).std().item() for sample in samples]
    assert least * 0.96 < min(found) < least * 1.3 and most * 0.8 < max(found) < most * 1.04
    if sigma_type == 'choice':
        assert all(min(abs(f / s - 1) for s in sigma_range) < 0.05 for f in found)


def test_training_noise_follows_the_sample_alone(gray):
    data = SeededDataset(gaussian(phase='train', sigma_range=[0, 50], gt_size=48), 3)
    first = data[(7, 0)]['lq']
    random.random(), torch.rand(1)
    assert torch.equal(data[(7, 0)]['lq'], first) and not torch.equal(data[(8, 0)]['lq'], first)


@pytest.mark.parametrize(
    'options, text',
    [
        ({'sigma_test': None}, 'sigma_test is a number, got None'),
        ({'phase': 'train', 'gt_size': 4, 'sigma_range': 5}, 'sigma_range is a list of two numbers, got 5'),
        ({'phase': 'train', 'gt_size': 4, 'sigma_type': 'all'}, 'sigma_type is constant or random or choice'),
    ],
)
def test_noise_that_is_none_is_refused(pair, options, text):
    with pytest.raises(UserError, match=text):
        gaussian(**options)


def test_dual_pixel_joins_both_views_in_16_bits(tmp_path):
    rng = np.random.default_rng(0)
    views = [
        write(tmp_path / name, 'a.png', rng.integers(0, 65536, (6, 5, 3)).astype(np.uint16))
        for name in ('gt', 'l', 'r')
    ]
    opt = {
        'name': 'a',
        'type': 'Dataset_DefocusDeblur_DualPixel_16bit',
        'dataroot_gt': 'gt',
        'dataroot_lqL': 'l',
        'dataroot_lqR': 'r',
    }
    opt.update(io_backend={'type': 'disk'}, scale=1, phase='val')
    sample = build_dataset(opt)[0]
    gt, left, right = (
        torch.from_numpy((view[..., ::-1] / 65535).astype(np.float32)).permute(2, 0, 1) for view in views
    )
    torch.testing.assert_close(sample['lq'], torch.cat([left, right]))
    torch.testing.assert_close(sample['gt'], gt)
    patch = build_dataset({**opt, 'phase': 'train', 'gt_size': 8})[0]
    assert patch['lq'].shape == (6, 8, 8) and patch['gt'].shape == (3, 8, 8)
    write(tmp_path / 'r', 'a.png', np.zeros((4, 5, 3), np.uint16))
    with pytest.raises(UserError, match='r/a.png has another size or depth than l/a.png'):
        build_dataset(opt)[0]
