import math

import cv2
import golden_data
import numpy as np
import pytest

from dckd_sr.ops.resize import imresize, modcrop


def photo(*shape, seed=0):
    """Smooth random values with edges, uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (shape[0] // 4 + 2, shape[1] // 4 + 2, *shape[2:]), dtype=np.uint8)
    fine = np.repeat(np.repeat(coarse, 4, axis=0), 4, axis=1)[: shape[0], : shape[1]].astype(int)
    return np.clip(fine + rng.integers(-20, 20, fine.shape), 0, 255).astype(np.uint8)


def slow_resize_axis(values, scale):
    """The definition along one list of numbers: pixel centres, widened cubic kernel, edges mirrored."""

    def cubic(x):
        x = abs(x)
        if x <= 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    shrink, n, out = min(scale, 1), len(values), []
    for position in range(math.ceil(n * scale)):
        centre = (position + 0.5) / scale - 0.5
        reach = 2 / shrink
        taps = range(math.floor(centre - reach) - 1, math.ceil(centre + reach) + 2)
        weights = [cubic(shrink * (centre - tap)) for tap in taps]
        pixels = [values[min(tap % (2 * n), 2 * n - 1 - tap % (2 * n))] for tap in taps]
        out.append(sum(w * p for w, p in zip(weights, pixels)) / sum(weights))
    return np.array(out)


@pytest.mark.parametrize('scale, count', [(2, 425592), (3, 187962), (4, 106398)])
def test_set5_equals_matlab_in_every_value(scale, count):
    """Together 719,952 values of the LR images in circulation, made by MATLAB's imresize."""
    folder = golden_data.require_images() / 'Set5'
    values = differing = 0
    for path in sorted((folder / 'HR').glob('*.png')):
        lq = cv2.imread(str(folder / 'LR_bicubic' / f'X{scale}' / f'{path.stem}x{scale}.png'))
        ours = imresize(modcrop(cv2.imread(str(path)), scale), 1 / scale)
        assert ours.shape == lq.shape and ours.dtype == np.uint8
        values += lq.size
        differing += int((ours != lq).sum())
    assert (values, differing) == (count, 0)


@pytest.mark.parametrize('scale, share', [(2, 0.144), (3, 0.117), (4, 0.103)])
def test_double_convention_differs_from_matlabs_uint8_as_known(scale, share):
    folder = golden_data.require_images() / 'Set5'
    pairs = []
    for path in sorted((folder / 'HR').glob('*.png')):
        lq = cv2.imread(str(folder / 'LR_bicubic' / f'X{scale}' / f'{path.stem}x{scale}.png'))
        ours = imresize(modcrop(cv2.imread(str(path)), scale), 1 / scale, 'double')
        pairs.append(np.abs(ours.astype(int) - lq).ravel())
    difference = np.concatenate(pairs)
    assert abs((difference > 0).mean() - share) < 5e-4 and difference.max() == 2


@pytest.mark.parametrize('scale', [1 / 2, 1 / 3, 1 / 4, 0.37, 2, 3, 4, 1.5])
def test_float_images_equal_the_definition(scale):
    image = photo(23, 18).astype(np.float64) / 255
    tall = np.stack([slow_resize_axis(list(column), scale) for column in image.T], axis=1)
    reference = np.stack([slow_resize_axis(list(row), scale) for row in tall])
    ours = imresize(image, scale)
    assert ours.dtype == np.float64 and ours.shape == reference.shape
    np.testing.assert_allclose(ours, reference, atol=1e-12)


@pytest.mark.parametrize('scale', [1 / 2, 1 / 3, 2])
def test_integer_conventions_round_twice_or_once(scale):
    image = photo(22, 19)

    def rounded(values):
        return np.clip(np.floor(values + 0.5), 0, 255)

    def passes(between):
        tall = np.stack([slow_resize_axis([float(v) for v in column], scale) for column in image.T], axis=1)
        return rounded(np.stack([slow_resize_axis(list(row), scale) for row in between(tall)]))

    np.testing.assert_array_equal(imresize(image, scale), passes(rounded))
    np.testing.assert_array_equal(imresize(image, scale, 'double'), passes(lambda values: values))
    assert (passes(rounded) != passes(lambda values: values)).any()


def test_shapes_types_and_channels():
    image = photo(21, 30, 3)
    colour = imresize(image, 1 / 4)
    assert colour.shape == (6, 8, 3)  # MATLAB rounds sizes up
    for channel in range(3):
        np.testing.assert_array_equal(imresize(image[..., channel], 1 / 4), colour[..., channel])
    sixteen = imresize(image.astype(np.uint16) * 257, 1 / 4)
    assert sixteen.dtype == np.uint16 and np.abs(sixteen / 257 - colour).max() <= 1
    assert imresize(image.astype(np.float32) / 255, 2).dtype == np.float32
    flat = np.full((9, 9), 255, np.uint8)
    assert (imresize(flat, 1 / 3) == 255).all() and (imresize(flat, 3) == 255).all()
    np.testing.assert_array_equal(imresize(image, 1), image)


@pytest.mark.parametrize('scale', [1 / 2, 1 / 3, 1 / 4, 2])
@pytest.mark.parametrize('convention', ['uint8', 'double'])
def test_a_region_has_the_values_of_the_whole(scale, convention):
    image = photo(60, 48, 3)
    whole = imresize(image, scale, convention)
    height, width = whole.shape[:2]
    for top, left, h, w in [(0, 0, 4, 5), (height - 3, width - 6, 3, 6), (5, 2, 1, 1), (0, 0, height, width)]:
        part = imresize(image, scale, convention, (top, left, h, w))
        np.testing.assert_array_equal(part, whole[top : top + h, left : left + w])


def test_modcrop():
    image = photo(23, 18, 3)
    assert modcrop(image, 4).shape == (20, 16, 3) and modcrop(image[..., 0], 3).shape == (21, 18)
    np.testing.assert_array_equal(modcrop(image, 4), image[:20, :16])


@pytest.mark.parametrize(
    'args, message',
    [
        ((np.zeros((4, 4), np.uint8), 0.5, 'matlab'), 'convention'),
        ((np.zeros((4, 4), np.int32), 0.5), 'int32'),
        ((np.zeros(4, np.uint8), 0.5), r'\(4,\)'),
        ((np.zeros((4, 4), np.uint8), 0), 'scale'),
        ((np.zeros((8, 8), np.uint8), 0.5, 'uint8', (2, 0, 3, 4)), 'region'),
    ],
)
def test_wrong_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        imresize(*args)
