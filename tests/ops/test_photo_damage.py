import math

import cv2
import numpy as np
import pytest

from dckd_sr.ops import photo_damage


def smooth(seed=0, shape=(60, 80)):
    image = cv2.resize(np.random.default_rng(seed).random((8, 10, 3)), shape[::-1], interpolation=cv2.INTER_CUBIC)
    return np.clip(image * 160 + 40, 0, 255).round().astype(np.uint8)


def test_a_straight_path_has_its_length():
    for length in (3, 7.5, 12):
        kernel = photo_damage.path_kernel(np.random.RandomState(1), length, 0.5, bend=0)
        assert kernel.sum() == pytest.approx(1) and kernel.min() >= 0 and kernel.shape[0] % 2 == 1
        # The variance of a uniform distribution over the length is length^2 / 12; sharing adds 1/6 an axis.
        y, x = np.mgrid[: len(kernel), : len(kernel)]
        variance = sum((kernel * (axis - (kernel * axis).sum()) ** 2).sum() for axis in (x, y))
        assert math.sqrt(12 * variance - 4) == pytest.approx(length, abs=0.4)
        middle = len(kernel) // 2 + length / 2 * np.array([math.cos(0.5), math.sin(0.5)])  # it sets out from the centre
        assert [(kernel * axis).sum() for axis in (x, y)] == pytest.approx(middle, abs=0.1)


def test_paths_bend_and_differ():
    kernels = [photo_damage.path_kernel(np.random.RandomState(seed), 10, 0) for seed in range(8)]
    assert len({kernel.tobytes() for kernel in kernels}) == 8
    assert all(kernel.sum() == pytest.approx(1) for kernel in kernels)


def test_blur_keeps_the_brightness_and_takes_detail():
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    blurred = photo_damage.motion_blur(image, np.random.RandomState(0))
    assert blurred.shape == image.shape and blurred.dtype == np.uint8
    assert blurred.mean() == pytest.approx(image.mean(), abs=2)
    assert blurred.std() < 0.7 * image.std()
    flat = np.full((20, 30, 3), 90, np.uint8)
    assert np.array_equal(photo_damage.motion_blur(flat, np.random.RandomState(0)), flat)


def test_rain_is_gray_light_in_upright_streaks():
    image = smooth()
    wet = photo_damage.rain(image, np.random.RandomState(3))
    added = wet.astype(int) - image
    assert added.min() >= -1 and 0.02 < (added > 20).mean() < 0.6
    unclipped = wet.max(axis=2) < 255
    assert np.ptp(added, axis=2)[unclipped].max() <= 1  # the same in every channel
    layer = added.mean(axis=2)
    along, across = np.abs(np.diff(layer, axis=0)).mean(), np.abs(np.diff(layer, axis=1)).mean()
    assert across > 1.5 * along


@pytest.mark.parametrize('damage', [photo_damage.motion_blur, photo_damage.rain])
def test_damage_is_a_function_of_image_and_seed(damage):
    image, again = smooth(), smooth()
    first = damage(image, np.random.RandomState(5))
    assert np.array_equal(first, damage(again, np.random.RandomState(5))) and np.array_equal(image, again)
    assert not np.array_equal(first, damage(image, np.random.RandomState(6)))
