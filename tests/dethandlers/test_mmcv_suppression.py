"""mmcv's NMS and soft-NMS against their definitions, written as loops over float32 numbers."""

import math

import numpy as np
import pytest
import torch
from dethandlers.mmcv_operators import nms, softnms


def overlap(one, other, offset):
    """IoU of two boxes in float32, each step rounded."""
    one, other, extra = one.astype(np.float32), other.astype(np.float32), np.float32(offset)
    wide = max(np.float32(0), min(one[2], other[2]) - max(one[0], other[0]) + extra)
    high = max(np.float32(0), min(one[3], other[3]) - max(one[1], other[1]) + extra)
    areas = [(box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (one, other)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return wide * high / (areas[0] + areas[1] - wide * high)


def suppressed(boxes, scores, threshold, offset):
    kept = []
    for place in sorted(range(len(scores)), key=lambda place: -scores[place]):  # sorted() is stable
        if not any(overlap(boxes[better], boxes[place], offset) > np.float32(threshold) for better in kept):
            kept.append(place)
    return kept


def softened(boxes, scores, threshold, sigma, lowest, method, offset):
    """Bodla et al. 2017, figure 2: take the best, lower the others, drop those below the lowest score.

    The list is kept as the original C code keeps it: the best changes places with the first, the last replaces what is
    dropped.
    """
    rows = [(boxes[place].astype(np.float32), np.float32(scores[place]), place) for place in range(len(scores))]
    chosen = []
    while rows:
        best = 0
        for place in range(1, len(rows)):
            if rows[best][1] < rows[place][1]:
                best = place
        rows[0], rows[best] = rows[best], rows[0]
        chosen.append(rows.pop(0))
        place = 0
        while place < len(rows):
            box, score, number = rows[place]
            iou = overlap(chosen[-1][0], box, offset)
            if method == 2:
                weight = np.float32(math.exp(-(iou * iou) / np.float32(sigma)))
            elif iou >= np.float32(threshold):
                weight = np.float32(0) if method == 0 else np.float32(1) - iou
            else:
                weight = np.float32(1)
            if score * weight < np.float32(lowest):
                last = rows.pop()
                if place < len(rows):
                    rows[place] = last
            else:
                rows[place] = (box, score * weight, number)
                place += 1
    return chosen


def scene(seed, count, ties):
    """Boxes that crowd together; with ties, scores of one decimal."""
    random = np.random.default_rng(seed)
    corner = random.uniform(0, 60, (count, 2))
    boxes = np.concatenate([corner, corner + random.uniform(1, 40, (count, 2))], 1).astype(np.float32)
    scores = random.uniform(0.05, 1, count)
    return boxes, (scores.round(1) if ties else scores).astype(np.float32)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_nms_keeps_what_its_definition_keeps(ties, offset, threshold):
    boxes, scores = scene(3, 80, ties)
    kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold, offset)
    assert kept.tolist() == suppressed(boxes, scores, threshold, offset)
    assert kept.dtype == torch.int64


def test_nms_keeps_the_first_of_equals():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 3 + [[20.0, 0.0, 30.0, 10.0]])
    assert nms(boxes, torch.tensor([0.5, 0.5, 0.5, 0.5]), 0.5).tolist() == [0, 3]


@pytest.mark.parametrize("offset", [0, 1])
def test_an_overlap_of_exactly_the_threshold_is_kept(offset):
    """3 of 5 pixels overlap: in float32 their IoU is above the double 0.6, yet not above the float 0.6."""
    high = 1.0 - offset
    boxes = torch.tensor([[0.0, 0.0, 5.0 - offset, high], [0.0, 0.0, 3.0 - offset, high]])
    assert float(np.float32(3) / np.float32(5)) > 0.6
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.6, offset).tolist() == [0, 1]
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.59, offset).tolist() == [0]


@pytest.mark.parametrize("offset", [0, 1])
def test_nothing_is_suppressed_among_nothing(offset):
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5, offset).tolist() == []
    dets = torch.zeros(0, 5)
    assert softnms(torch.zeros(0, 4), torch.zeros(0), dets, 0.5, 0.5, 0.01, 1, offset).tolist() == []


def test_boxes_without_area_are_never_suppressed():
    boxes = torch.tensor([[5.0, 5.0, 5.0, 5.0]] * 2)
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.1).tolist() == [0, 1]
    dets = torch.zeros(2, 5)
    assert softnms(boxes, torch.tensor([0.9, 0.8]), dets, 0.1, 0.5, 0.01, 1).tolist() == [0, 1]
    assert dets[:, 4].tolist() == pytest.approx([0.9, 0.8])


def test_half_precision_boxes_are_suppressed_in_float32():
    boxes, scores = scene(5, 60, ties=False)
    half = torch.from_numpy(boxes).half(), torch.from_numpy(scores).half()
    assert nms(*half, 0.5).tolist() == suppressed(half[0].float().numpy(), half[1].float().numpy(), 0.5, 0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", [0, 1, 2])
@pytest.mark.parametrize("lowest", [0.0, 0.05, 0.4])
def test_softnms_scores_and_orders_as_its_definition(ties, offset, method, lowest):
    boxes, scores = scene(7, 60, ties)
    dets = torch.full((60, 5), -1.0)
    places = softnms(torch.from_numpy(boxes), torch.from_numpy(scores), dets, 0.3, 0.5, lowest, method, offset)
    expected = softened(boxes, scores, 0.3, 0.5, lowest, method, offset)
    assert places.tolist() == [number for _, _, number in expected]
    np.testing.assert_array_equal(dets[: len(expected), 4], [score for _, score, _ in expected])
    np.testing.assert_array_equal(dets[: len(expected), :4], [box for box, _, _ in expected])
    assert (dets[len(expected) :] == -1).all()


def test_softnms_leaves_what_it_is_given():
    boxes, scores = (torch.from_numpy(part) for part in scene(8, 20, ties=False))
    before = boxes.clone(), scores.clone()
    softnms(boxes, scores, torch.zeros(20, 5), 0.3, 0.5, 0.01, 1)
    assert torch.equal(boxes, before[0])
    assert torch.equal(scores, before[1])


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0, 1])
def test_the_gpu_keeps_the_same(cuda, offset):
    boxes, scores = (torch.from_numpy(part) for part in scene(9, 300, ties=True))
    kept = nms(boxes.to(cuda), scores.to(cuda), 0.5, offset)
    assert kept.device.type == "cuda"
    assert kept.tolist() == nms(boxes, scores, 0.5, offset).tolist()
