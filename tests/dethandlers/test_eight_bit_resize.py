"""OpenCV's whole-number resizing: by hand, against its definition in exact fractions, and against OpenCV itself."""

import numpy as np
import pytest
import torch
from dethandlers.eight_bit_resize import resize_eight_bit
from detserve.eager_image import bilinear, bilinear_eight_bit

SIZES = [
    ((40, 60), (17, 23)),
    ((40, 60), (81, 119)),
    ((31, 7), (5, 64)),
    ((48, 64), (24, 32)),
    ((48, 64), (24, 33)),
    ((1, 9), (4, 3)),
    ((12, 1), (7, 5)),
    ((20, 20), (20, 20)),
    ((427, 640), (278, 416)),
]


def random_image(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def resized(image, size):
    return resize_eight_bit(torch.from_numpy(image).permute(2, 0, 1), size).permute(1, 2, 0).numpy()


def test_a_row_by_hand():
    """255 · 1/4 and 255 · 3/4 lie between the two pixels; beyond their centres nothing is mixed in."""
    row = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    assert resize_eight_bit(row, (1, 4)).tolist() == [[[0, 64, 191, 255]]]


def test_halving_takes_the_mean_of_four():
    image = torch.tensor([[[0, 1], [2, 2]]], dtype=torch.uint8)
    assert resize_eight_bit(image, (1, 1)).tolist() == [[[1]]]


def test_the_same_size_is_the_same_image():
    image = torch.from_numpy(random_image((5, 6))).permute(2, 0, 1)
    assert torch.equal(resize_eight_bit(image, (5, 6)), image)


@pytest.mark.parametrize(("old", "new"), [pair for pair in SIZES if pair[0] != (48, 64)])
def test_it_is_bilinear_to_a_grey_level(old, new):
    image = random_image(old)
    assert np.abs(resized(image, new) - bilinear(image, *new)).max() <= 1


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_the_reference_reads_the_same_arithmetic(old, new):
    image = random_image(old)
    np.testing.assert_array_equal(resized(image, new), bilinear_eight_bit(image, *new))


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_every_pixel_is_opencvs(old, new):
    cv2 = pytest.importorskip("cv2", reason="OpenCV comes with MMDetection (the extra detserve[mmdet])")
    image = random_image(old)
    expected = cv2.resize(image, new[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(resized(image, new), expected)
