"""mmcv's region pooling against its definitions, written as loops in float64."""

import math

import numpy as np
import pytest
import torch
from dethandlers.mmcv_operators import OPERATORS

SCALE = 0.25
BINS = (3, 2)


def sample(plane, y, x):
    """Bilinear interpolation; the border's value up to a pixel outside, 0 beyond."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    total = 0.0
    for row in {math.floor(y), math.ceil(y)}:
        for column in {math.floor(x), math.ceil(x)}:
            total += plane[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def region_bins(roi, ratio, *, half, least, shift=None, gamma=0.0):
    """For every bin, its sample places as (y, x)."""
    x1, y1, x2, y2 = (float(value) * SCALE - half for value in roi[1:])
    wide, high = max(x2 - x1, least), max(y2 - y1, least)
    rows, columns = (ratio or math.ceil(high / BINS[0])), (ratio or math.ceil(wide / BINS[1]))
    bins = {}
    for down in range(BINS[0]):
        for across in range(BINS[1]):
            moved_x, moved_y = (0, 0) if shift is None else gamma * shift[:, down, across] * (wide, high)
            bins[down, across] = [
                (
                    y1 + moved_y + high / BINS[0] * (down + (row + 0.5) / rows),
                    x1 + moved_x + wide / BINS[1] * (across + (column + 0.5) / columns),
                )
                for row in range(rows)
                for column in range(columns)
            ]
    return bins


@pytest.fixture
def features():
    return torch.from_numpy(np.random.default_rng(1).normal(size=(2, 3, 12, 10)).astype(np.float32))


@pytest.fixture
def rois():
    """Inside, across every border, outside, tiny; of both images."""
    return torch.tensor(
        [
            [0, 3.1, 5.2, 30.7, 40.3],
            [1, -9.0, -7.0, 20.0, 13.0],
            [0, 20.0, 30.0, 55.5, 60.1],
            [1, 60.0, 80.0, 90.0, 99.0],
            [1, 10.0, 10.0, 11.0, 10.6],
        ]
    )


def averages(features, rois, **bins):
    shifts = bins.pop("shifts", None)
    found = np.zeros((len(rois), features.shape[1], *BINS))
    for number, roi in enumerate(rois.numpy()):
        shift = None if shifts is None else shifts[number]
        for place, points in region_bins(roi, shift=shift, **bins).items():
            for channel, plane in enumerate(features[int(roi[0])].double().numpy()):
                found[number, channel, *place] = np.mean([sample(plane, *point) for point in points])
    return found


def pooled(name, features, rois, *before, after=(), **options):
    output = features.new_full((len(rois), features.shape[1], *BINS), 99.0)
    OPERATORS[name](features, rois, *before, output, *after, **options)
    return output


def align(features, rois, mode, ratio, aligned):
    unused = torch.zeros(0)
    return pooled(
        "roi_align_forward",
        features,
        rois,
        after=(unused, unused),
        aligned_height=BINS[0],
        aligned_width=BINS[1],
        spatial_scale=SCALE,
        sampling_ratio=ratio,
        pool_mode=mode,
        aligned=aligned,
    )


def deformed(features, rois, offset, ratio, gamma=0.1):
    return pooled(
        "deform_roi_pool_forward",
        features,
        rois,
        offset,
        pooled_height=BINS[0],
        pooled_width=BINS[1],
        spatial_scale=SCALE,
        sampling_ratio=ratio,
        gamma=gamma,
    )


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_is_the_mean_of_its_samples(features, rois, aligned, ratio):
    expected = averages(features, rois, ratio=ratio, half=0.5 if aligned else 0, least=-math.inf if aligned else 1)
    np.testing.assert_allclose(align(features, rois, 1, ratio, aligned), expected, atol=2e-5)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_may_take_the_maximum(features, rois, aligned, ratio):
    found = align(features, rois, 0, ratio, aligned)
    for number, roi in enumerate(rois.numpy()):
        bins = region_bins(roi, ratio, half=0.5 if aligned else 0, least=-math.inf if aligned else 1)
        for place, points in bins.items():
            for channel, plane in enumerate(features[int(roi[0])].double().numpy()):
                highest = max(sample(plane, *point) for point in points)
                assert float(found[number, channel, *place]) == pytest.approx(highest, abs=2e-5)


@pytest.mark.parametrize("ratio", [0, 2])
def test_deformable_pooling_moves_each_bin_by_a_share_of_the_region(features, rois, ratio):
    shifts = np.random.default_rng(2).normal(size=(len(rois), 2, *BINS)).astype(np.float32)
    expected = averages(features, rois, ratio=ratio, half=0.5, least=-math.inf, shifts=shifts, gamma=0.1)
    np.testing.assert_allclose(deformed(features, rois, torch.from_numpy(shifts), ratio), expected, atol=2e-5)


def test_deformable_pooling_without_offsets_is_roi_align(features, rois):
    np.testing.assert_allclose(
        deformed(features, rois, torch.zeros(0), 2), align(features, rois, 1, 2, aligned=True), atol=1e-5
    )


def test_many_regions_are_pooled_piece_by_piece(features, rois, monkeypatch):
    whole = deformed(features, rois.repeat(3, 1), torch.zeros(0), 2)
    monkeypatch.setattr("dethandlers.mmcv_operators.pooling._SAMPLES_AT_ONCE", 1)
    assert torch.equal(deformed(features, rois.repeat(3, 1), torch.zeros(0), 2), whole)


def test_roi_pool_is_the_maximum_of_each_bins_pixels(features, rois):
    found = pooled(
        "roi_pool_forward",
        features,
        rois,
        after=(torch.zeros(0),),
        pooled_height=BINS[0],
        pooled_width=BINS[1],
        spatial_scale=SCALE,
    )
    expected = np.zeros(found.shape)
    for number, roi in enumerate(rois.double().numpy()):
        x1, y1, x2, y2 = roi[1] * SCALE, roi[2] * SCALE, (roi[3] + 1) * SCALE, (roi[4] + 1) * SCALE
        for down in range(BINS[0]):
            for across in range(BINS[1]):
                top, bottom = y1 + (y2 - y1) / BINS[0] * down, y1 + (y2 - y1) / BINS[0] * (down + 1)
                left, right = x1 + (x2 - x1) / BINS[1] * across, x1 + (x2 - x1) / BINS[1] * (across + 1)
                # A pixel belongs to a bin that any part of it lies in.
                pixels = [
                    features[int(roi[0]), :, row, column].numpy()
                    for row in range(12)
                    for column in range(10)
                    if row + 1 > top and row < bottom and column + 1 > left and column < right
                ]
                expected[number, :, down, across] = np.max(pixels, axis=0) if pixels else 0
    np.testing.assert_array_equal(found, expected)


def test_no_regions_give_nothing(features):
    assert deformed(features, torch.zeros(0, 5), torch.zeros(0), 2).shape == (0, 3, *BINS)
    assert align(features, torch.zeros(0, 5), 1, 0, aligned=True).shape == (0, 3, *BINS)
    assert align(features, torch.zeros(0, 5), 0, 0, aligned=True).shape == (0, 3, *BINS)


@pytest.mark.parametrize("mode", [0, 1])
def test_half_precision_is_pooled_in_float32(features, rois, mode):
    half = align(features.half(), rois.half(), mode, 2, aligned=True)
    assert half.dtype == torch.float16
    exact = align(features.half().float(), rois.half().float(), mode, 2, aligned=True)
    assert torch.equal(half, exact.half())


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [0, 1])
def test_the_gpu_pools_the_same(cuda, features, rois, mode):
    found = align(features.to(cuda), rois.to(cuda), mode, 0, aligned=True)
    torch.testing.assert_close(found.cpu(), align(features, rois, mode, 0, aligned=True), atol=1e-5, rtol=1e-5)
    moved = deformed(features.to(cuda), rois.to(cuda), torch.zeros(0), 0)
    torch.testing.assert_close(moved.cpu(), deformed(features, rois, torch.zeros(0), 0), atol=1e-5, rtol=1e-5)
