"""Damage done to sharp, dry photographs, for demonstrations: motion blur of a jolted camera, and rain streaks."""

from __future__ import annotations

import math

import cv2
import numpy as np


def motion_blur(image: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Average a photograph over an exposure: the camera is still for half of it, then jolted along a bent path.

    Args:
        image: uint8 (h, w, 3).
        rng: draws the path: 8 to 14 pixels long, setting out within 20 degrees from level.

    Returns:
        uint8 (h, w, 3).
    """
    kernel = path_kernel(rng, rng.uniform(8, 14), math.radians(rng.uniform(-20, 20)))
    moved = cv2.filter2D(image.astype(np.float64), -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    return (0.5 * image + 0.5 * moved).round().astype(np.uint8)


def path_kernel(rng: np.random.RandomState, length: float, heading: float, bend: float = 0.03) -> np.ndarray:
    """Weights (k, k), float64, sum 1, of a path of so many pixels from the centre in a direction (radians from level).

    ``bend`` is the standard deviation of its turns, eight a pixel, in radians.
    """
    points = 8 * math.ceil(length)
    headings = heading + np.cumsum(rng.normal(0, bend, points))
    path = np.cumsum([np.cos(headings), np.sin(headings)], axis=1) * length / points
    half = math.ceil(np.abs(path).max())
    kernel = np.zeros((2 * half + 2, 2 * half + 2))
    for x, y in (path + half).T:  # shared among the four pixels around each point
        i, j = int(y), int(x)
        down, right = y - i, x - j
        kernel[i : i + 2, j : j + 2] += np.outer([1 - down, down], [1 - right, right])
    return kernel[:-1, :-1] / kernel[:-1, :-1].sum()


def rain(image: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Add bright streaks of one direction: drops that fall during the exposure.

    Args:
        image: uint8 (h, w, 3).
        rng: draws direction (up to 25 degrees from upright), length, density and the drops.

    Returns:
        uint8 (h, w, 3).
    """
    angle, length = math.radians(rng.uniform(-25, 25)), rng.uniform(15, 30)
    drops = (rng.random_sample(image.shape[:2]) < rng.uniform(0.004, 0.01)) * rng.uniform(0.3, 1, image.shape[:2])
    streak = path_line(angle, length)
    layer = cv2.filter2D(drops, -1, streak / streak.max(), borderType=cv2.BORDER_REFLECT_101)
    layer = cv2.GaussianBlur(np.minimum(layer, 1), (3, 3), 0.6)
    return np.clip(image + 180 * layer[..., None], 0, 255).round().astype(np.uint8)


def path_line(angle: float, length: float) -> np.ndarray:
    """(k, k) float64: an upright line of so many pixels, turned by ``angle`` radians."""
    half = math.ceil(length / 2)
    line = np.zeros((2 * half + 1, 2 * half + 1))
    x, y = math.sin(angle) * length / 2, math.cos(angle) * length / 2
    ends = [tuple(int(round(16 * (half + sign * value))) for value in (x, y)) for sign in (-1, 1)]
    cv2.line(line, *ends, 1.0, 1, cv2.LINE_8, shift=4)
    return line
