"""The decoding of MMDetection's maps, by hand."""

import math

import pytest
import torch
from dethandlers.errors import ArtefactError
from dethandlers.mmdet_decoding import Frame, Wanted, decode_head, read_head
from dethandlers.mmdet_decoding.selection import Suppression, suppressed
from torchvision.ops import box_iou

CLASSES = 2
FRAME = Frame((32, 40), (1.0, 1.0))
POINTS = {"strides": [[8, 8]], "priors": [[[4, 4]]], "nms_pre": 100, "nms": {"iou_threshold": 0.5}}
ANCHORS = {**POINTS, "priors": [[[-4, -4, 4, 4], [-8, -4, 8, 4]]]}


def logit(score):
    return math.log(score / (1 - score))


def wanted(threshold=0.1, most=100, known=(True,) * CLASSES):
    return Wanted(threshold, most, torch.tensor(known))


def decode(outputs, head, *, frame=FRAME, **limits):
    return decode_head({name: torch.as_tensor(value) for name, value in outputs.items()}, head, frame, wanted(**limits))


def dense(channels, cells, *, anchors=1):
    """Maps of 4 × 5 cells where nothing is found but what ``cells`` puts there: ``(anchor, y, x): (scores, raw)``."""
    scores = torch.full((anchors * CLASSES, 4, 5), -20.0)
    boxes = torch.zeros(anchors * channels, 4, 5)
    for (anchor, y, x), (found, raw) in cells.items():
        for label, score in found.items():
            scores[anchor * CLASSES + label, y, x] = logit(score)
        boxes[anchor * channels : (anchor + 1) * channels, y, x] = torch.tensor(raw)
    return {"scores_0": scores, "boxes_0": boxes}


def test_distances_are_measured_from_the_point_of_the_cell():
    head = read_head({"kind": "dense", "boxes": {"kind": "distance"}, **POINTS})
    found = decode(dense(4, {(0, 1, 2): ({1: 0.75}, [3.0, 2.0, 5.0, 6.0])}), head)
    assert found.boxes.tolist() == [[20 - 3, 12 - 2, 20 + 5, 12 + 6]]
    assert found.labels.tolist() == [1]
    assert found.scores.tolist() == pytest.approx([0.75], abs=1e-6)


def test_boxes_are_clipped_unless_the_coder_does_not_and_taken_back_to_the_original():
    cells = {(0, 3, 4): ({0: 0.5}, [1.0, 1.0, 50.0, 60.0])}
    frame = Frame((32, 40), (2.0, 3.0))
    head = read_head({"kind": "dense", "boxes": {"kind": "distance"}, **POINTS})
    assert decode(dense(4, cells), head, frame=frame).boxes.tolist() == [[70, 81, 80, 96]]
    head = read_head({"kind": "dense", "boxes": {"kind": "distance", "clip": False}, **POINTS})
    assert decode(dense(4, cells), head, frame=frame).boxes.tolist() == [[70, 81, 172, 264]]


def deltas(**more):
    coding = {"kind": "delta", "means": [0, 0, 0, 0], "stds": [1, 1, 1, 1], "wh_ratio_clip": 16 / 1000}
    return {**coding, "ctr_clamp": None, "clip": False, **more}


def test_deltas_move_and_grow_their_anchor():
    head = read_head({"kind": "dense", "boxes": deltas(stds=[0.5, 0.5, 1, 1]), **ANCHORS})
    # The second anchor is 16 × 8 around (16, 8): moved by a quarter of its sides, twice as wide, half as high.
    cells = {(1, 1, 2): ({0: 0.5}, [0.5, -0.5, math.log(2), math.log(0.5)])}
    (box,) = decode(dense(4, cells, anchors=2), head).boxes.tolist()
    assert box == pytest.approx([20 - 16, 6 - 2, 20 + 16, 6 + 2], abs=1e-4)


def test_deltas_are_held_within_what_the_coder_allows():
    cells = {(0, 1, 2): ({0: 0.5}, [9.0, 0.0, 99.0, -99.0])}
    head = read_head({"kind": "dense", "boxes": deltas(), **ANCHORS})
    (box,) = decode(dense(4, cells, anchors=2), head).boxes.tolist()
    assert box[2] - box[0] == pytest.approx(8 / 0.016, rel=1e-4)
    assert box[3] - box[1] == pytest.approx(8 * 0.016, abs=1e-4)
    head = read_head({"kind": "dense", "boxes": deltas(ctr_clamp=32.0), **ANCHORS})
    (box,) = decode(dense(4, cells, anchors=2), head).boxes.tolist()
    assert (box[0] + box[2]) / 2 == pytest.approx(16 + 32, abs=1e-3)
    assert box[3] == box[1]  # such a coder clamps growth alone


def test_a_distribution_is_its_mean_in_strides():
    raw = torch.full((4, 3), -30.0)
    raw[0, 2] = raw[1, 1] = raw[3, 0] = 30.0
    raw[2, 0] = raw[2, 2] = 30.0
    head = read_head({"kind": "dense", "boxes": {"kind": "distribution", "bins": 3}, **POINTS, "priors": [[[0, 0]]]})
    found = decode(dense(12, {(0, 2, 3): ({0: 0.9}, raw.flatten().tolist())}), head)
    assert found.boxes[0].tolist() == pytest.approx([24 - 16, 16 - 8, 24 + 8, 16], abs=1e-4)


def test_corners_are_in_strides_and_scores_may_be_scores_already():
    head = read_head({"kind": "dense", "scores": "none", "boxes": {"kind": "corners", "clip": False}, **POINTS})
    maps = dense(4, {(0, 0, 0): ({}, [1.0, 0.5, 2.0, 3.0])})
    maps["scores_0"] = torch.zeros(CLASSES, 4, 5)
    maps["scores_0"][1, 0, 0] = 0.25
    found = decode(maps, head)
    assert found.boxes.tolist() == [[8, 4, 16, 24]]
    assert found.scores.tolist() == [0.25]


def test_softmax_leaves_the_background_out():
    head = read_head({"kind": "dense", "scores": "softmax", "boxes": {"kind": "distance"}, **POINTS})
    scores = torch.zeros(CLASSES + 1, 4, 5)
    scores[CLASSES] = 20.0
    scores[:, 1, 1] = torch.tensor([math.log(5), math.log(3), math.log(2)])
    found = decode({"scores_0": scores, "boxes_0": torch.ones(4, 4, 5)}, head)
    assert found.scores.tolist() == pytest.approx([0.5, 0.3])
    assert found.labels.tolist() == [0, 1]


def test_factors_come_after_the_threshold():
    head = read_head({"kind": "dense", "factors": True, "boxes": {"kind": "distance"}, **POINTS})
    maps = dense(4, {(0, 0, 0): ({0: 0.6}, [4.0] * 4), (0, 3, 3): ({0: 0.2}, [4.0] * 4)})
    maps["factors_0"] = torch.full((1, 4, 5), logit(0.5))
    found = decode(maps, head, threshold=0.4)
    assert found.scores.tolist() == pytest.approx([0.3], abs=1e-6)


def test_a_score_at_the_threshold_is_found_and_each_level_gives_its_best():
    cells = {(0, 0, x): ({0: 0.3 + x / 10}, [2.0] * 4) for x in range(5)}
    head = read_head({"kind": "dense", "boxes": {"kind": "distance"}, **POINTS, "nms_pre": 3})
    found = decode(dense(4, cells), head)
    assert found.boxes[:, 0].tolist() == [34, 26, 18]
    edge = float(found.scores[1])
    assert len(decode(dense(4, cells), head, threshold=edge).scores) == 2
    # MMDetection's default, -1, drops the worst of the level.
    head = read_head({"kind": "dense", "boxes": {"kind": "distance"}, **POINTS, "nms_pre": -1})
    assert len(decode(dense(4, cells), head).scores) == 4


def test_small_boxes_and_unknown_classes_are_dropped_before_the_number_is_cut():
    cells = {
        (0, 0, 0): ({0: 0.9}, [0.0, 4.0, 2.0, 4.0]),
        (0, 0, 2): ({1: 0.8}, [4.0] * 4),
        (0, 3, 4): ({0: 0.7}, [4.0] * 4),
    }
    head = read_head({"kind": "dense", "boxes": {"kind": "distance"}, **POINTS, "least_side": 2})
    found = decode(dense(4, cells), head, most=1, known=(True, False))
    assert found.scores.tolist() == pytest.approx([0.7])


def test_yolox():
    head = read_head({"kind": "yolox", **POINTS, "priors": [[[0, 0]]]})
    maps = dense(4, {(0, 1, 3): ({0: 0.5, 1: 0.8}, [0.5, 0.25, math.log(2), math.log(0.5)])})
    maps["factors_0"] = torch.full((1, 4, 5), logit(0.5))
    found = decode(maps, head)
    assert found.labels.tolist() == [1]  # the best class of a cell alone
    assert found.scores.tolist() == pytest.approx([0.4], abs=1e-6)
    assert found.boxes[0].tolist() == pytest.approx([28 - 8, 10 - 2, 28 + 8, 10 + 2], abs=1e-4)
    assert len(decode(maps, head, threshold=0.41).scores) == 0


def test_yolov3():
    maps = torch.full((2 * (5 + CLASSES), 4, 5), -20.0)
    second = maps[5 + CLASSES :]
    second[:, 2, 1] = torch.tensor([logit(0.75), logit(0.5), math.log(2), 0.0, logit(0.5), logit(0.8), logit(0.6)])
    head = read_head({"kind": "yolov3", **ANCHORS, "least_objectness": 0.01})
    found = decode({"maps_0": maps}, head)
    # The anchor is 16 × 8 around (8, 16); a quarter of a cell to the right.
    assert found.boxes[0].tolist() == pytest.approx([10 - 16, 16 - 4, 10 + 16, 16 + 4], abs=1e-4)
    assert found.scores.tolist() == pytest.approx([0.4, 0.3], abs=1e-6)
    assert found.labels.tolist() == [0, 1]
    assert len(decode({"maps_0": maps}, read_head({**ANCHORS, "kind": "yolov3", "least_objectness": 0.6})).scores) == 0


@pytest.mark.parametrize(
    ("how", "raw", "scores", "labels"),
    [
        ("softmax", [[math.log(2), math.log(6), math.log(2)], [0.0, 0.0, 9.0]], [0.6], [1]),
        ("sigmoid", [[logit(0.3), logit(0.6)], [-9.0, logit(0.7)]], [0.7, 0.6, 0.3], [1, 1, 0]),
    ],
)
def test_queries(how, raw, scores, labels):
    head = read_head({"kind": "queries", "scores": how})
    outputs = {"scores": raw, "boxes": [[0.5, 0.25, 0.5, 0.5], [0.9, 0.5, 0.4, 0.2]]}
    found = decode(outputs, head, frame=Frame((32, 40), (2.0, 1.0)))
    assert found.scores.tolist() == pytest.approx(scores)
    assert found.labels.tolist() == labels
    assert found.boxes[-1].tolist() == pytest.approx([20, 0, 60, 16])
    if how == "sigmoid":
        assert found.boxes[0].tolist() == pytest.approx([56, 12.8, 80, 19.2])
        assert len(decode(outputs, head, most=2).scores) == 2


def random_boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 5 + torch.rand(count, 2, generator=generator) * 30], dim=1)
    return boxes, torch.rand(count, generator=generator), torch.randint(0, 3, (count,), generator=generator)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("split_thr", [10_000, 10])
def test_nms_keeps_what_its_definition_keeps(agnostic, split_thr):
    boxes, scores, labels = random_boxes(80, 1)
    settings = Suppression(0.4, class_agnostic=agnostic, split_thr=split_thr)
    overlaps = box_iou(boxes, boxes)
    expected = []
    for place in scores.argsort(descending=True).tolist():
        rivals = [one for one in expected if (agnostic or split_by_class(labels, one, place))]
        if all(float(overlaps[one, place]) <= 0.4 for one in rivals):
            expected.append(place)
    if not (agnostic and split_thr == 10):  # mmcv splits by class from there on, whatever was asked for
        assert suppressed(boxes, scores, labels, settings).tolist() == expected


def split_by_class(labels, one, other):
    return int(labels[one]) == int(labels[other])


def test_nms_has_limits_of_its_own():
    boxes, scores, labels = random_boxes(80, 2)
    every = suppressed(boxes, scores, labels, Suppression(0.4))
    assert suppressed(boxes, scores, labels, Suppression(0.4, max_num=5)).tolist() == every[:5].tolist()
    limited = suppressed(boxes, scores, labels, Suppression(0.4, score_threshold=0.5))
    assert limited.tolist() == [place for place in every.tolist() if scores[place] > 0.5]
    assert suppressed(boxes[:0], scores[:0], labels[:0], Suppression(0.4)).tolist() == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"kind": "fourier"}, "got kind 'fourier'"),
        ({"kind": "dense", "strife": [[8, 8]]}, "strife"),
        ({"kind": "dense", "strides": 8}, "not the settings of a head"),
        ({"kind": "dense", "nms": {"type": "soft_nms"}}, "not the settings of a head"),
    ],
)
def test_settings_that_are_none_are_refused(value, message):
    with pytest.raises(ArtefactError, match=message):
        read_head(value)


def test_maps_of_another_head_are_refused():
    head = read_head({"kind": "dense", "boxes": {"kind": "distance"}, **POINTS})
    with pytest.raises(ArtefactError, match="no maps of a dense head"):
        decode({"maps": torch.zeros(3, 4, 5)}, head)
