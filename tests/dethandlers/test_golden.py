"""The golden check: what drifted is said in one sentence, and what rounding explains is not called drift."""

import numpy as np
import pytest
from dethandlers.detections import Category, Detections
from dethandlers.golden import TOLERANCES, box_iou, describe_drift

CATEGORIES = (Category(1, "circle", 1), Category(2, "star", 2))
THRESHOLD = 0.05
GOLDEN = Detections(
    np.array([[10, 10, 110, 110], [200, 50, 260, 90], [12, 12, 111, 109]], np.float32),
    np.array([0.9, 0.6, 0.3], np.float32),
    np.array([0, 1, 1], np.int64),
)


def drift(found, precision="fp32", golden=GOLDEN):
    return describe_drift(golden, found, THRESHOLD, TOLERANCES[precision], CATEGORIES)


def changed(*, boxes=None, scores=None, labels=None):
    return Detections(
        GOLDEN.boxes_xyxy if boxes is None else np.asarray(boxes, np.float32),
        GOLDEN.scores if scores is None else np.asarray(scores, np.float32),
        GOLDEN.labels if labels is None else np.asarray(labels, np.int64),
    )


def appended(box, score, label):
    return Detections(
        np.vstack([GOLDEN.boxes_xyxy, np.asarray([box], np.float32)]),
        np.append(GOLDEN.scores, np.float32(score)),
        np.append(GOLDEN.labels, np.int64(label)),
    )


def test_the_same_detections_are_no_drift():
    assert drift(GOLDEN) == ""


def test_another_order_is_no_drift():
    assert drift(GOLDEN.take(np.array([2, 0, 1]))) == ""


@pytest.mark.parametrize("precision", list(TOLERANCES))
def test_each_precision_has_its_own_tolerance(precision):
    allowed = TOLERANCES[precision]
    inside = changed(boxes=GOLDEN.boxes_xyxy + 0.9 * allowed.box_px, scores=GOLDEN.scores - 0.9 * allowed.score)
    assert drift(inside, precision) == ""
    moved = changed(boxes=GOLDEN.boxes_xyxy + np.array([0, 0, 0, 1.1 * allowed.box_px]))
    assert "circle 0.900 on the golden image moved by" in drift(moved, precision)
    assert f"allowed in {precision} are {allowed.box_px} px and {allowed.score}" in drift(moved, precision)
    lower = changed(scores=GOLDEN.scores - np.array([0, 1.1 * allowed.score, 0]))
    assert "star 0.600 on the golden image moved by 0.00 px" in drift(lower, precision)


def test_the_tolerance_of_fp32_is_the_tightest():
    assert TOLERANCES["fp32"].box_px < TOLERANCES["fp16"].box_px < TOLERANCES["bf16"].box_px
    assert TOLERANCES["fp32"].score < TOLERANCES["fp16"].score < TOLERANCES["bf16"].score


def test_a_missing_detection_is_named():
    assert drift(GOLDEN.take(np.array([0, 2]))) == (
        "eager found star 0.600 on the golden image, this worker does not find it"
    )


def test_nothing_found_at_all_names_the_first():
    assert "eager found circle 0.900" in drift(Detections.empty())


def test_another_class_at_the_same_place_is_a_missing_detection():
    assert "eager found circle 0.900" in drift(changed(labels=[1, 1, 1]))


def test_one_detection_does_not_stand_for_two():
    twice = changed(boxes=GOLDEN.boxes_xyxy[[0, 1, 1]], scores=[0.9, 0.6, 0.6], labels=[0, 1, 1])
    assert "eager found star 0.600" in drift(GOLDEN.take(np.array([0, 1])), golden=twice)


def test_an_extra_detection_is_named():
    assert drift(appended([300, 300, 340, 360], 0.4, 1)) == (
        "this worker finds star 0.400 on the golden image, eager did not"
    )


def test_detections_at_the_threshold_s_edge_may_come_and_go():
    edge = appended([300, 300, 340, 360], THRESHOLD + 0.004, 1)
    assert drift(edge) == ""
    assert drift(GOLDEN, golden=edge) == ""
    beyond = appended([300, 300, 340, 360], THRESHOLD + 0.006, 1)
    assert "eager did not" in drift(beyond)
    assert "does not find it" in drift(GOLDEN, golden=beyond)
    assert drift(beyond, "fp16") == ""


def test_a_box_without_area_is_found_where_it_was():
    flat = changed(boxes=[[10, 10, 10, 40], [200, 50, 200, 50], [12, 12, 111, 109]])
    assert drift(flat, golden=flat) == ""
    assert "eager found circle 0.900" in drift(flat.take(np.array([1, 2])), golden=flat)


def test_an_empty_golden_image_is_reproduced_by_nothing_and_broken_by_anything():
    empty = Detections.empty()
    assert drift(empty, golden=empty) == ""
    assert "this worker finds circle 0.900" in drift(GOLDEN, golden=empty)


def test_iou_of_known_boxes():
    box = np.array([0, 0, 10, 10], np.float32)
    others = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [3, 3, 3, 3], [20, 20, 10, 10]], np.float32)
    assert box_iou(box, others) == pytest.approx([1, 1 / 3, 0, 0, 0])
    assert box_iou(box, np.zeros((0, 4), np.float32)).shape == (0,)
