"""DUKD's inputs: tiles that make GT again, and MATLAB's shrinking."""

import numpy as np
import pytest
import torch

from dckd_sr.ops.resize import imresize
from dckd_sr.ops.upcycling import draw_tiles, shrink, tiles


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_all_tiles_make_gt_again(scale):
    gt = torch.rand(2, 3, 4 * scale, 6 * scale)
    found = tiles(gt, scale, range(scale * scale))
    assert found.shape == (scale * scale * 2, 3, 4, 6)
    rows = [torch.cat(list(found[2 * row * scale :].split(2)[:scale]), 3) for row in range(scale)]
    assert torch.equal(torch.cat(rows, 2), gt)


def test_chosen_tiles_are_those_of_all_images_in_their_order():
    gt = torch.rand(2, 3, 8, 8)
    found = tiles(gt, 2, [3, 1])
    assert torch.equal(found[:2], gt[:, :, 4:, 4:]) and torch.equal(found[2:], gt[:, :, :4, 4:])


def test_tiles_are_drawn_without_repeats_and_by_the_iteration():
    drawn = [draw_tiles(3, 2, 5, iteration, 0) for iteration in range(200)]
    assert all(len(set(numbers)) == 3 and set(numbers) <= set(range(4)) for numbers in drawn)
    assert drawn[7] == draw_tiles(3, 2, 5, 7, 0) != draw_tiles(3, 2, 5, 7, 1)
    counts = np.bincount(np.concatenate(drawn), minlength=4)
    assert counts.min() > 120  # 150 each
    assert sorted(draw_tiles(16, 4, 0, 1, 0)) == list(range(16))


@pytest.mark.parametrize('scale, height, width', [(2, 48, 20), (3, 48, 27), (4, 48, 36), (4, 4, 8)])
def test_shrinking_is_matlabs(scale, height, width):
    images = torch.rand(2, 3, height, width)
    small = shrink(images, scale)
    assert small.shape == (2, 3, height // scale, width // scale) and small.dtype == torch.float32
    for image, found in zip(images, small):
        wanted = imresize(image.permute(1, 2, 0).double().numpy(), 1 / scale)
        assert np.abs(found.permute(1, 2, 0).numpy() - wanted).max() < 1e-6


def test_sizes_are_exact_for_every_multiple():
    for scale in (2, 3, 4, 5, 6, 7, 8):
        for length in range(1, 130):
            assert shrink(torch.zeros(1, 1, scale * length, scale), scale).shape[2] == length
