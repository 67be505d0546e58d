"""Predictions on disk: COCO JSON, pickles of both MMDetections, the folder of an evaluation; and what labels mean."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_scenes import checked, scenes
from dettools.coco_metrics import evaluate_coco
from dettools.ground_truth import GroundTruth, load_ground_truth
from dettools.label_order import LabelOrderError
from dettools.mmdetection_results import ResultsFormatError
from dettools.predictions import PredictionsError, load_predictions
from dettools.restricted_pickle import RestrictedPickleError

Results = list[dict[str, Any]]


@pytest.fixture
def scene() -> tuple[GroundTruth, Results]:
    document, results = scenes(11)
    return checked(document), results


def written(path: Path, value: object) -> Path:
    path.write_bytes(pickle.dumps(value, 2) if path.suffix == ".pkl" else json.dumps(value).encode())
    return path


def xyxy(results: Results) -> np.ndarray:
    return np.array([[x, y, x + width, y + height] for x, y, width, height in (one["bbox"] for one in results)])


def version_3(
    truth: GroundTruth, results: Results, label_of: Callable[[int], int], *, masks: bool = False
) -> list[Any]:
    """What tools/test.py --out of MMDetection 3.x writes."""
    entries = []
    for image in truth.images:
        mine = [one for one in results if one["image_id"] == image.id]
        found = {
            "bboxes": torch.tensor(xyxy(mine).reshape(-1, 4)),
            "scores": torch.tensor([one["score"] for one in mine], dtype=torch.float64),
            "labels": torch.tensor([label_of(one["category_id"]) for one in mine], dtype=torch.int64),
        }
        if masks:
            rles = [one["segmentation"] for one in mine]
            found["masks"] = [{"size": list(rle["size"]), "counts": rle["counts"].encode()} for rle in rles]
        shape = (image.height, image.width)
        name = f"data/val/{image.file_name}"
        entries.append({"img_id": image.id, "img_path": name, "ori_shape": shape, "pred_instances": found})
    return entries


def version_2(truth: GroundTruth, results: Results, classes: list[int], *, masks: bool = False) -> list[Any]:
    """What tools/test.py --out of MMDetection 2.x writes."""
    entries = []
    for image in truth.images:
        mine = [[one for one in results if (one["image_id"], one["category_id"]) == (image.id, id_)] for id_ in classes]
        boxes = [
            np.hstack([xyxy(some), [[one["score"]] for one in some]]) if some else np.zeros((0, 5), np.float32)
            for some in mine
        ]
        rles = (
            [
                [{**one["segmentation"], "counts": one["segmentation"]["counts"].encode()} for one in some]
                for some in mine
            ]
            if masks
            else None
        )
        entries.append(boxes if rles is None else (boxes, rles))
    return entries


def figures(truth: GroundTruth, results: Any) -> list[float]:
    return [-1 if value is None else value for value in evaluate_coco(truth, results).figures.values()]


def as_all(category_id: int) -> int:
    return category_id // 2 - 1


# COCO results.


def test_coco_results_and_the_folder_of_an_evaluation(scene, tmp_path):
    truth, results = scene
    path = written(tmp_path / "results.json", results)
    found = load_predictions(path, truth)
    assert (found.results, found.source, found.label_rule, found.notes) == (tuple(results), "COCO results", None, ())
    folder = load_predictions(tmp_path, truth)
    assert (folder.results, folder.source, folder.path) == (tuple(results), "detserve evaluate", path)
    written(tmp_path / "metrics.json", {"failed": 2})
    assert load_predictions(tmp_path, truth).notes == (
        "2 images failed in this evaluation: here they count as images without detections",
    )
    assert load_predictions(written(tmp_path / "none.json", []), truth).results == ()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"image_id": 1}, "1 of 3 results have an image_id that scenes.json does not have: 1."),
        ({"image_id": "0"}, "have an image_id that scenes.json does not have: '0'"),
        ({"category_id": 0}, "COCO results hold category_id as in the annotation file, not the label"),
        ({"category_id": None}, "have a category_id"),
        ({"category_id": [2]}, "does not have: [2]"),
        ({"score": float("nan")}, "result 1: got the score nan, expected a number"),
        ({"score": None}, "result 1: got the score None"),
        ({"bbox": [1, 2, float("inf"), 4]}, "result 1: got the bbox [1, 2, inf, 4]"),
        ({"bbox": [1, 2, 3]}, "result 1: got the bbox [1, 2, 3], expected [x, y, width, height]"),
        ({"bbox": None}, "result 1: has no bbox, no segmentation"),
    ],
)
def test_a_result_that_cannot_be_scored_is_named(scene, change, expected, tmp_path):
    truth, results = scene
    bad = [
        results[0],
        {key: value for key, value in (results[1] | change).items() if key != "bbox" or value},
        results[2],
    ]
    with pytest.raises(PredictionsError) as error:
        load_predictions(written(tmp_path / "results.json", bad), truth)
    assert expected in str(error.value)


def test_other_json_is_refused(scene, tmp_path):
    truth, results = scene
    for document, expected in (({"annotations": []}, "got COCO annotations"), ({}, "a JSON object"), ([3], "got int")):
        with pytest.raises(PredictionsError, match=expected):
            load_predictions(written(tmp_path / "results.json", document), truth)
    (tmp_path / "results.json").write_text("[")
    with pytest.raises(PredictionsError, match="expected COCO results in JSON"):
        load_predictions(tmp_path / "results.json", truth)
    (tmp_path / "results.json").unlink()
    with pytest.raises(PredictionsError, match=r"a folder of detserve evaluate has a results\.json"):
        load_predictions(tmp_path, truth)
    with pytest.raises(PredictionsError, match="--categories is for pickles"):
        load_predictions(written(tmp_path / "results.json", results), truth, categories=["ids"])


def test_a_negative_size_stays_a_false_positive(scene, tmp_path):
    truth, results = scene
    turned = {**results[0], "bbox": [10, 10, -5, 5], "score": 1.5}
    found = load_predictions(written(tmp_path / "results.json", [turned, *results]), truth)
    assert found.results[0]["bbox"] == [10, 10, 0, 5]
    assert [note.split(" ", 1)[1] for note in found.notes] == [
        "boxes have a negative width or height; they count as false positives without area",
        "scores are not between 0 and 1: COCO ranks by them all the same",
    ]
    # Leaving it out would have raised AP.
    assert evaluate_coco(truth, found.results).ap < evaluate_coco(truth, results).ap


# MMDetection.


@pytest.mark.parametrize("masks", [False, True])
def test_a_pickle_of_mmdetection_3_has_the_figures_of_its_json(masks, tmp_path):
    document, results = scenes(12, masks=masks)
    truth = checked(document)
    found = load_predictions(written(tmp_path / "result.pkl", version_3(truth, results, as_all, masks=masks)), truth)
    assert (found.source, found.label_rule, len(found.results)) == ("MMDetection 3.x", "all", len(results))
    np.testing.assert_allclose(figures(truth, found.results), figures(truth, results), rtol=0, atol=1e-12)
    if masks:
        ours = evaluate_coco(truth, found.results, iou_type="segm").figures
        assert ours == evaluate_coco(truth, results, iou_type="segm").figures


@pytest.mark.parametrize("masks", [False, True])
def test_a_pickle_of_mmdetection_2_has_the_figures_of_its_json(masks, tmp_path):
    document, results = scenes(13, masks=masks)
    # Not sorted by id: 2.x results follow the file's order.
    document["images"].reverse()
    truth = checked(document)
    entries = version_2(truth, results, [category.id for category in truth.categories], masks=masks)
    found = load_predictions(written(tmp_path / "result.pkl", entries), truth)
    assert (found.source, found.label_rule, len(found.results)) == ("MMDetection 2.x", "all", len(results))
    assert found.notes[0] == "MMDetection 2.x: images are taken in the order of the annotation file"
    np.testing.assert_allclose(figures(truth, found.results), figures(truth, results), rtol=0, atol=1e-12)
    if masks:
        ours = evaluate_coco(truth, found.results, iou_type="segm").figures
        assert ours == evaluate_coco(truth, results, iou_type="segm").figures
    # The wrong figure, were they sorted.
    document["images"].reverse()
    other = load_predictions(tmp_path / "result.pkl", checked(document), categories=["all"])
    assert evaluate_coco(truth, other.results).ap < 0.5 * evaluate_coco(truth, results).ap


def test_mask_scores_of_both_versions_are_kept(tmp_path):
    document, results = scenes(12, masks=True)
    truth = checked(document)
    three = version_3(truth, results, as_all, masks=True)
    for entry in three:
        entry["pred_instances"]["mask_scores"] = entry["pred_instances"]["scores"] / 2
    found = load_predictions(written(tmp_path / "3.pkl", three), truth)
    assert all(one["mask_score"] == one["score"] / 2 for one in found.results)
    two = version_2(truth, results, [2, 4, 6, 8], masks=True)
    two = [(boxes, (masks, [some[:, 4] / 2 for some in boxes])) for boxes, masks in two]
    found = load_predictions(written(tmp_path / "2.pkl", two), truth)
    assert all(one["mask_score"] == one["score"] / 2 for one in found.results)


def test_a_pickle_of_other_images_is_refused(scene, tmp_path):
    truth, results = scene
    two = version_2(truth, results, [2, 4, 6, 8])
    with pytest.raises(ResultsFormatError, match=r"got 11 entries, but scenes\.json has 12 images"):
        load_predictions(written(tmp_path / "r.pkl", two[1:]), truth)
    three = version_3(truth, results, as_all)
    three[4]["img_path"] = "data/val/7.jpg"
    with pytest.raises(
        ResultsFormatError, match=r"entry 4: got img_id 12 and img_path 'data/val/7.jpg', but .*'4.jpg'"
    ):
        load_predictions(written(tmp_path / "r.pkl", three), truth)
    three = version_3(truth, results, as_all)
    with pytest.raises(ResultsFormatError, match="image 0 comes more than once"):
        load_predictions(written(tmp_path / "r.pkl", [*three, three[0]]), truth)
    found = load_predictions(written(tmp_path / "r.pkl", three[2:]), truth)
    assert "2 of 12 images have no entry: they count as images without detections" in found.notes


def test_images_are_found_by_name_where_ids_differ(scene, tmp_path):
    truth, results = scene
    three = version_3(truth, results, as_all)
    for number, entry in enumerate(three):
        entry["img_id"] = 1000 + number
    found = load_predictions(written(tmp_path / "r.pkl", three), truth)
    assert "images are found by their file names" in found.notes[0]
    assert figures(truth, found.results) == pytest.approx(figures(truth, results), abs=1e-12)
    for entry in three:
        entry["ori_shape"] = (100, 100)
    found = load_predictions(written(tmp_path / "r.pkl", three), truth)
    assert "12 of 12 images have another size" in found.notes[1]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"a": 1}, "got a dict with a, expected MMDetection's list"),
        ([{"img_id": 0}], "expected pred_instances with bboxes, scores and labels"),
        (["x"] * 12, "expected one \\(N, 5\\) array per class"),
        ([[np.zeros((3, 4))]] * 12, "expected an array of the shape \\(N, 5\\), got an array of the shape \\(3, 4\\)"),
        ([[np.zeros((0, 5))]] * 11 + [[np.zeros((0, 5))] * 2], "entries with \\[1, 2\\] classes"),
    ],
)
def test_other_pickles_are_refused(scene, document, expected, tmp_path):
    with pytest.raises(ResultsFormatError, match=expected):
        load_predictions(written(tmp_path / "r.pkl", document), scene[0])


def test_rotated_boxes_and_uneven_lists_are_refused(scene, tmp_path):
    truth, results = scene
    entries = version_3(truth, results, as_all)
    for key, value, expected in (
        ("bboxes", torch.zeros(3, 5), "expected an array of the shape \\(N, 4\\)"),
        ("scores", torch.zeros(99), "99 scores"),
        ("labels", ["x"], "expected an array of the shape \\(N,\\)"),
        ("masks", [3], "masks as COCO RLE"),
    ):
        entries = version_3(truth, results, as_all)
        entries[0]["pred_instances"][key] = value
        with pytest.raises(ResultsFormatError, match=expected):
            load_predictions(written(tmp_path / "r.pkl", entries), truth)


def test_a_malicious_pickle_is_not_obeyed(scene, tmp_path):
    (tmp_path / "r.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(RestrictedPickleError, match=r"r\.pkl: names os\.system"):
        load_predictions(tmp_path / "r.pkl", scene[0])


# What labels mean.


@pytest.fixture
def with_a_parent(scene) -> tuple[GroundTruth, Results]:
    """An export whose first category is a super-category that no annotation has; the model has not learnt it."""
    truth, results = scene
    parent = {"id": 1, "name": "things"}
    used = {one["category_id"] for one in truth.annotations}
    categories = [parent, *(one for one in truth.document["categories"] if one["id"] in used)]
    return checked({**truth.document, "categories": categories}), [one for one in results if one["category_id"] in used]


def test_labels_that_are_off_by_a_super_category_are_refused_not_scored(with_a_parent, tmp_path):
    truth, results = with_a_parent
    ids = sorted({one["category_id"] for one in truth.annotations})
    path = written(tmp_path / "r.pkl", version_3(truth, results, ids.index))
    with pytest.raises(LabelOrderError, match=r"name \d+% of .* by “used” .* Decide with --categories all, --cat"):
        load_predictions(path, truth)
    right = evaluate_coco(truth, results).ap
    found = load_predictions(path, truth, categories=["used"])
    assert found.label_rule == "used"
    assert evaluate_coco(truth, found.results).ap == pytest.approx(right, abs=1e-12)
    names = {category.id: category.name for category in truth.categories}
    found = load_predictions(path, truth, categories=[names[one] for one in ids])
    assert (found.label_rule, found.notes) == ("names", ())
    assert evaluate_coco(truth, found.results).ap == pytest.approx(right, abs=1e-12)
    # The wrong figure is to be had by insisting, and then it is marked.
    insisted = load_predictions(path, truth, categories=["all"])
    assert "by “used”" in insisted.notes[0]
    assert evaluate_coco(truth, insisted.results).ap < 0.3 * right


def test_the_number_of_classes_in_2_x_decides(with_a_parent, tmp_path):
    truth, results = with_a_parent
    ids = sorted({one["category_id"] for one in truth.annotations})
    found = load_predictions(written(tmp_path / "r.pkl", version_2(truth, results, ids)), truth)
    assert found.label_rule == "used"
    assert evaluate_coco(truth, found.results).ap == pytest.approx(evaluate_coco(truth, results).ap, abs=1e-12)


def test_the_right_default_is_kept_and_told(with_a_parent, tmp_path):
    truth, results = with_a_parent
    ids = [category.id for category in truth.categories]
    found = load_predictions(written(tmp_path / "r.pkl", version_3(truth, results, ids.index)), truth)
    assert found.label_rule == "all"
    assert evaluate_coco(truth, found.results).ap == pytest.approx(evaluate_coco(truth, results).ap, abs=1e-12)


def test_a_few_hits_are_no_reason_to_doubt(with_a_parent, tmp_path):
    truth, results = with_a_parent
    ids = sorted({one["category_id"] for one in truth.annotations})
    best = [one for one in results if evaluate_coco(truth, [one]).figures["AR1"]][:8]
    found = load_predictions(written(tmp_path / "r.pkl", version_3(truth, best, ids.index)), truth)
    assert found.label_rule == "all"
    assert "which names 0% of 8 objects rightly (used 100%" in found.notes[0]


def test_labels_that_are_category_ids(scene, tmp_path):
    truth, results = scene
    found = load_predictions(written(tmp_path / "r.pkl", version_3(truth, results, int)), truth)
    assert found.label_rule == "ids"
    assert figures(truth, found.results) == pytest.approx(figures(truth, results), abs=1e-12)


def test_categories_that_do_not_fit_are_named(scene, tmp_path):
    truth, results = scene
    path = written(tmp_path / "r.pkl", version_3(truth, results, as_all))
    with pytest.raises(LabelOrderError, match="got 'dog', expected one of the rules all, used, ids, or names of"):
        load_predictions(path, truth, categories=["dog"])
    with pytest.raises(
        LabelOrderError, match="got the label 1, but --categories class 0 gives a category to the labels"
    ):
        load_predictions(path, truth, categories=["class 0"])
    path = written(tmp_path / "r.pkl", version_3(truth, results, lambda one: one + 100))
    with pytest.raises(LabelOrderError, match=r"got the labels 102 to 108, but .* has 4 categories"):
        load_predictions(path, truth)


# Real predictions.


@pytest.mark.shared_data
def test_the_pickle_of_a_real_model(shared_data):
    folder = shared_data / "preds" / "hoovichen"
    truth = load_ground_truth(folder / "data" / "package" / "test2017" / "_annotations.coco.json")
    found = load_predictions(folder / "result.pkl", truth)
    assert (found.source, found.label_rule, len(found.results), found.notes) == ("MMDetection 3.x", "all", 587, ())
