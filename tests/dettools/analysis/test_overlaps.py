"""The pairs that every analysis starts from: equal to COCO's own evaluation, ties and crowds included."""

import numpy as np
import pytest
from coco_scenes import checked, scenes
from dettools.analysis.occlusion import OcclusionError
from dettools.analysis.overlaps import find_overlaps, match, pair_off
from dettools.coco_metrics import MetricsError
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def reference(document, results, iou_type, threshold):
    """pycocotools' own matches: (image, detection's place in the results) to annotation id; who is ignored."""
    truth = COCO()
    truth.dataset = document
    truth.createIndex()
    numbered = [{**one, "id": place + 1, "iscrowd": 0} for place, one in enumerate(results)]
    for one in numbered:
        one["area"] = one["bbox"][2] * one["bbox"][3]
    found = COCO()
    found.dataset = {**document, "annotations": numbered}
    found.createIndex()
    evaluator = COCOeval(truth, found, iou_type)
    evaluator.params.iouThrs = np.array([threshold])
    evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluator.evaluate()
    pairs, ignored = {}, set()
    for entry in evaluator.evalImgs:
        if entry is None:
            continue
        for place, detection in enumerate(entry["dtIds"]):
            if target := int(entry["dtMatches"][0, place]):
                pairs[detection - 1] = target
            if entry["dtIgnore"][0, place]:
                ignored.add(detection - 1)
    return pairs, ignored


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.75])
@pytest.mark.parametrize(("seed", "ties", "iou_type"), [(0, False, "bbox"), (1, True, "bbox"), (2, True, "segm")])
def test_the_matches_are_those_of_pycocotools(seed, ties, iou_type, threshold):
    document, results = scenes(seed, images=12 if iou_type == "segm" else 60, ties=ties, masks=iou_type == "segm")
    overlaps = find_overlaps(checked(document), results, iou_type=iou_type)
    matches = match(overlaps, threshold)
    pairs = {
        int(overlaps.result[place]): int(overlaps.object_ids[target])
        for place, target in enumerate(matches.object_of)
        if target >= 0
    }
    expected, ignored = reference(document, results, iou_type, threshold)
    assert expected
    assert pairs == expected
    assert {int(one) for one in overlaps.result[~matches.counted]} == ignored


def two_objects(*detections):
    document = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 100}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    results = [
        {"image_id": 7, "category_id": category, "bbox": box, "score": score} for category, score, box in detections
    ]
    return find_overlaps(checked(document), results)


def test_what_is_left_pairs_off_with_what_is_left():
    overlaps = two_objects((1, 0.9, [0, 0, 10, 10]), (1, 0.8, [0, 0, 10, 10]))
    matches = match(overlaps, 0.5)
    assert matches.detection_of.tolist() == [0, -1]
    free = (matches.object_of < 0)[overlaps.pair_detection] & (matches.detection_of < 0)[overlaps.pair_object]
    confused, _ = pair_off(overlaps, 0.5, free)
    assert confused.tolist() == [-1, 1]


def test_the_score_threshold_and_ignored_objects_are_not_counted():
    overlaps = two_objects((1, 0.9, [0, 0, 10, 10]), (2, 0.2, [0, 0, 10, 10]))
    matches = match(overlaps, 0.5, score_threshold=0.3, ignored=np.array([True, False]))
    assert matches.counted.tolist() == [False, False]
    assert matches.detection_of.tolist() == [-1, -1]
    assert not matches.true_positive.any()


def test_of_each_class_the_best_detections_stay():
    overlaps = two_objects((1, 0.9, [0, 0, 10, 10]), (2, 0.2, [0, 0, 10, 10]))
    crowded = find_overlaps(
        checked(
            {"images": [{"id": 1}], "annotations": [], "categories": [{"id": 4, "name": "x"}, {"id": 5, "name": "y"}]}
        ),
        [{"image_id": 1, "category_id": 4 + one % 2, "bbox": [0, 0, 1, 1], "score": one / 10} for one in range(10)],
        max_detections=2,
    )
    assert crowded.result.tolist() == [9, 8, 7, 6]
    assert overlaps.score.tolist() == [0.9, 0.2]


def test_no_results_and_no_objects_are_no_errors():
    overlaps = two_objects()
    assert match(overlaps, 0.5).detection_of.tolist() == [-1, -1]
    assert overlaps.objects == 2


@pytest.mark.parametrize(
    ("iou_type", "words"), [("keypoints", "expected bbox or segm"), ("segm", "2 of 2 annotations have no segmentation")]
)
def test_what_cannot_overlap_is_refused(iou_type, words):
    document, _ = scenes(0, images=2)
    document["annotations"] = document["annotations"][:2]
    with pytest.raises(MetricsError, match=words):
        find_overlaps(checked(document), [], iou_type=iou_type)


def test_a_threshold_below_what_was_kept_is_refused():
    with pytest.raises(MetricsError, match=r"got the IoU threshold 0.05, expected 0.1 or more"):
        match(two_objects(), 0.05)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ({"size": [100, 100], "counts": "!!!"}, "result 0: its segmentation cannot be read: invalid RLE"),
        (
            {"size": [50, 50], "counts": [0, 100, 2400]},
            r"got a mask of \[50, 50\] \(height, width\), expected \[100, 1",
        ),
    ],
)
def test_a_damaged_mask_and_one_of_another_size_are_refused(mask, words):
    """The second overlapped nothing, and its object counted as missed."""
    document = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 100}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0}
            | {"segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]}
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    results = [{"image_id": 7, "category_id": 1, "score": 0.9, "segmentation": mask}]
    with pytest.raises(OcclusionError, match=words):
        find_overlaps(checked(document), results, iou_type="segm")
