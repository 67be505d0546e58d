"""COCO metrics against pycocotools, and the bootstrap against one that evaluates every resample anew."""

import copy
import json
import math

import numpy as np
import pytest
from coco_scenes import Document, Results, checked, scenes
from dettools.coco_metrics import (
    MetricsError,
    _matches,
    ap_interval,
    compare_coco,
    evaluate_coco,
    prepared_results,
)
from dettools.ground_truth import load_ground_truth
from dettools.published_figures import published_figures
from dettools.reports.metrics_tables import coco_lines
from dettools.resampling import RECALLS, ApDifference, ResamplingError, _recalls_reached, resampled
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

REFERENCE = {
    "bbox": [0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564],
    "segm": [0.320, 0.562, 0.299, 0.387, 0.310, 0.327, 0.268, 0.415, 0.417, 0.469, 0.377, 0.381],
}
NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def by_pycocotools(document: Document, results: Results, iou_type: str = "bbox") -> COCOeval:
    truth = COCO()
    truth.dataset = copy.deepcopy(document)
    truth.createIndex()
    found = truth.loadRes(copy.deepcopy(results))
    evaluation = COCOeval(truth, found, iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def as_stats(figures) -> list[float]:
    return [-1 if value is None else value for value in figures.values()]


# The reference table.


@pytest.mark.shared_data
@pytest.mark.parametrize("iou_type", REFERENCE)
def test_the_24_reference_numbers_of_cocoapi(iou_type, shared_data, capsys):
    folder = shared_data / "eval"
    truth = load_ground_truth(folder / "instances_val2014_100.json")
    fake = folder / "cocoapi" / "results" / f"instances_val2014_fake{iou_type}100_results.json"
    results = json.loads(fake.read_text())
    metrics = evaluate_coco(truth, results, iou_type=iou_type)
    assert list(metrics.figures) == NAMES
    assert [round(value, 3) for value in metrics.figures.values()] == REFERENCE[iou_type]
    assert (metrics.images, metrics.objects, metrics.detections) == (100, 830, len(results))
    assert capsys.readouterr() == ("", "")
    theirs = by_pycocotools(dict(truth.document), results, iou_type)
    np.testing.assert_allclose(as_stats(metrics.figures), theirs.stats, rtol=0, atol=1e-12)
    printed = [line for line in capsys.readouterr().out.splitlines() if "@[" in line]
    assert coco_lines(metrics) == printed


# Generated scenes.


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_parity_with_pycocotools(seed, iou_type):
    document, results = scenes(seed, ties=seed % 2 == 1, masks=iou_type == "segm")
    metrics = evaluate_coco(checked(document), results, iou_type=iou_type)
    theirs = by_pycocotools(document, prepared_results(results, iou_type), iou_type)
    np.testing.assert_allclose(as_stats(metrics.figures), theirs.stats, rtol=0, atol=1e-12)
    for place, one in enumerate(metrics.per_class):
        ours = as_stats({"ap": one.ap, "ap50": one.ap50, "ar": one.ar})
        precision, recall = theirs.eval["precision"][:, :, place, 0, 2], theirs.eval["recall"][:, place, 0, 2]
        np.testing.assert_allclose(ours, [precision.mean(), precision[0].mean(), recall.mean()], atol=1e-12)
    assert metrics.per_class[-1].ap is None
    assert metrics.per_class[-1].objects == 0
    assert metrics.per_class[-1].detections > 0


def test_keypoints_have_parity_too():
    random = np.random.default_rng(1)
    document, _ = scenes(1)
    results = []
    for one in document["annotations"]:
        x, y, width, height = one["bbox"]
        points = np.stack([x + random.random(17) * width, y + random.random(17) * height, np.full(17, 2)], 1)
        one |= {"keypoints": points.ravel().tolist(), "num_keypoints": 17, "category_id": 2}
        moved = points + random.normal(0, 0.04, points.shape) * width
        results.append(
            {
                "image_id": one["image_id"],
                "category_id": 2,
                "keypoints": moved.ravel().tolist(),
                "score": random.random(),
            }
        )
    metrics = evaluate_coco(checked(document), results, iou_type="keypoints")
    theirs = by_pycocotools(document, results, "keypoints")
    assert list(metrics.figures) == ["AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"]
    np.testing.assert_allclose(as_stats(metrics.figures), theirs.stats, rtol=0, atol=1e-12)


def test_a_subset_of_the_images_is_as_if_the_others_were_not_there():
    document, results = scenes(3)
    some = [0, 3, 12]
    truth = checked(document)
    metrics = evaluate_coco(truth, results, image_ids=some)
    alone = evaluate_coco(truth.restricted_to(some), [one for one in results if one["image_id"] in some])
    assert metrics == alone
    assert metrics.images == 3
    assert metrics.figures != evaluate_coco(truth, results).figures
    with pytest.raises(MetricsError, match="image id 1, which"):
        evaluate_coco(truth, results, image_ids=[1])


def test_other_numbers_of_detections_and_thresholds():
    document, results = scenes(4)
    metrics = evaluate_coco(checked(document), results, max_detections=[10, 2, 5], iou_thresholds=[0.5, 0.6])
    assert list(metrics.figures)[6:9] == ["AR2", "AR5", "AR10"]
    assert metrics.figures["AP75"] is None
    # pycocotools answers -1 here.
    theirs = by_pycocotools(document, results)
    theirs.params.maxDets = [2, 5, 10]
    theirs.params.iouThrs = np.array([0.5, 0.6])
    theirs.evaluate()
    theirs.accumulate()
    precision = theirs.eval["precision"][:, :, :, 0, 2]
    assert metrics.ap == pytest.approx(precision[precision > -1].mean(), abs=1e-12)
    with pytest.raises(MetricsError, match="0 detections"):
        evaluate_coco(checked(document), results, max_detections=[0])
    with pytest.raises(MetricsError, match="IoU thresholds"):
        evaluate_coco(checked(document), results, iou_thresholds=[5])


# Nothing found, nothing to find.


def test_no_results_have_an_ap_of_0(capsys):
    document, results = scenes(5)
    metrics = evaluate_coco(checked(document), [])
    assert metrics.ap == metrics.ap50 == 0
    assert metrics.detections == 0
    assert json.loads(json.dumps(metrics.to_json()))["figures"]["AP"] == 0
    difference = compare_coco(checked(document), results, [], resamples=20)
    assert difference.ap_other == 0
    assert difference.high < 0
    assert capsys.readouterr() == ("", "")


def test_without_objects_there_is_no_figure():
    document, results = scenes(5)
    truth = checked({**document, "annotations": []})
    metrics = evaluate_coco(truth, results)
    assert set(metrics.figures.values()) == {None}
    assert metrics.ap == 0
    with pytest.raises(MetricsError, match="no object to be found"):
        ap_interval(truth, results)


def test_what_no_metric_reads_may_be_odd():
    """hotcoco refuses a licence that is no number; pycocotools reads none."""
    document, results = scenes(5)
    plain = evaluate_coco(checked(document), results)
    for image in document["images"]:
        image |= {"license": "CC BY", "width": float(image["width"])}
    document["categories"][0]["supercategory"] = None
    assert evaluate_coco(checked(document), results) == plain


def test_what_is_not_there_cannot_be_measured():
    document, results = scenes(5)
    truth = checked(document)
    with pytest.raises(MetricsError, match=r"annotations of scenes\.json have no segmentation"):
        evaluate_coco(truth, results, iou_type="segm")
    masks = checked(scenes(5, masks=True)[0])
    with pytest.raises(MetricsError, match="results have no segmentation"):
        evaluate_coco(masks, results, iou_type="segm")
    with pytest.raises(MetricsError, match="a result of the image 1, which"):
        evaluate_coco(truth, [results[0] | {"image_id": 1}])


def test_masks_are_ranked_by_their_own_score():
    document, results = scenes(6, masks=True)
    truth = checked(document)
    turned = [one | {"mask_score": 1 - one["score"]} for one in results]
    expected = evaluate_coco(truth, [one | {"score": 1 - one["score"]} for one in results], iou_type="segm")
    assert evaluate_coco(truth, turned, iou_type="segm").figures == expected.figures
    assert evaluate_coco(truth, turned).figures == evaluate_coco(truth, results).figures


# The annotation with the id 0.


def test_pycocotools_loses_the_annotation_with_the_id_0_and_we_do_not():
    document, _ = scenes(2)
    for number, one in enumerate(document["annotations"]):
        one |= {"id": number, "iscrowd": 0}
    keys = ("image_id", "category_id", "bbox")
    perfect = [{key: one[key] for key in keys} | {"score": 0.9} for one in document["annotations"]]
    wrong = by_pycocotools(document, perfect).stats
    truth = checked(document)
    metrics = evaluate_coco(truth, perfect)
    assert wrong[0] < 0.99
    assert metrics.ap == 1
    # The wrong figure is shown beside, for it is the one in the logs.
    assert list(published_figures(truth, perfect, metrics).values()) == pytest.approx(wrong.tolist(), abs=1e-12)
    # With any other id pycocotools agrees.
    for one in document["annotations"]:
        one["id"] += 1
    assert by_pycocotools(document, perfect).stats[0] == 1
    assert published_figures(checked(document), perfect, metrics) is None


# The bootstrap.


def drawn_with_pycocotools(document: Document, results: Results, draw: list[int]) -> float:
    """Every drawn image as an image of its own: slow, and beyond doubt."""
    images, annotations, found = [], [], []
    for copied, image_id in enumerate(sorted(draw), start=1):
        images.append({"id": copied, "file_name": "", "width": 640, "height": 480})
        for one in document["annotations"]:
            if one["image_id"] == image_id:
                annotations.append({**one, "id": len(annotations) + 1, "image_id": copied})
        found += [{**one, "image_id": copied} for one in results if one["image_id"] == image_id]
    new = {**document, "images": images, "annotations": annotations}
    return float(by_pycocotools(new, found).stats[0])


@pytest.mark.parametrize("seed", range(4))
def test_weighing_images_is_evaluating_their_copies(seed):
    document, results = scenes(seed)
    truth = checked(document)
    table = _matches(truth, results, "bbox", truth.image_ids, None)
    ids = sorted(truth.image_ids)
    assert table.average_precision() == pytest.approx(evaluate_coco(truth, results).ap, abs=1e-12)
    random = np.random.default_rng(seed)
    for _ in range(5):
        draw = random.integers(0, len(ids), len(ids))
        expected = drawn_with_pycocotools(document, results, [ids[place] for place in draw])
        weights = np.bincount(draw, minlength=len(ids))
        assert table.average_precision(weights) == pytest.approx(expected, abs=1e-12)


def test_the_bootstrap_is_paired():
    """Both sides get the same images: two results that differ in one image differ in the draws that hold it only."""
    document, results = scenes(7)
    truth = checked(document)
    ids = sorted(truth.image_ids)
    changed = next(one["image_id"] for one in document["annotations"] if not one["iscrowd"])
    other = [one for one in results if one["image_id"] != changed]
    difference = compare_coco(truth, results, other, resamples=50, seed=3)
    random = np.random.default_rng(3)
    draws = [random.integers(0, len(ids), len(ids)) for _ in range(50)]
    without = np.array([ids.index(changed) not in draw for draw in draws])
    assert 0 < without.sum() < 50
    assert max(abs(difference.differences[without])) < 1e-12
    assert max(abs(difference.differences)) > 1e-3
    chosen = [ids[place] for place in draws[0]]
    expected = drawn_with_pycocotools(document, other, chosen) - drawn_with_pycocotools(document, results, chosen)
    assert difference.differences[0] == pytest.approx(expected, abs=1e-12)
    assert difference.difference == pytest.approx(evaluate_coco(truth, other).ap - evaluate_coco(truth, results).ap)


def test_equal_results_are_equivalent_and_a_worse_one_is_not():
    document, results = scenes(8, images=40)
    truth = checked(document)
    same = compare_coco(truth, results, copy.deepcopy(results), resamples=200)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    assert same.p_values(0.001) == (1 / 201, 1 / 201)
    assert same.equivalent(0.001)
    shifted = [one | {"bbox": [one["bbox"][0] + 0.1 * one["bbox"][2], *one["bbox"][1:]]} for one in results]
    worse = compare_coco(truth, results, shifted, resamples=200)
    assert worse.difference < -0.02
    assert worse.low <= worse.difference <= worse.high < 0
    assert not worse.equivalent(0.001)
    assert worse.p_values(0.001)[0] > 0.5
    assert worse.equivalent(0.5)
    document = json.loads(json.dumps(worse.to_json()))
    assert (document["resamples"], document["confidence"]) == (200, 0.9)


def test_the_same_seed_gives_the_same_interval():
    document, results = scenes(9)
    truth = checked(document)
    first = ap_interval(truth, results, resamples=50, seed=1)
    assert first == ap_interval(truth, results, resamples=50, seed=1)
    assert first != ap_interval(truth, results, resamples=50, seed=2)
    assert first.low < first.ap < first.high
    for wrong in ({"confidence": 95}, {"resamples": 0}):
        with pytest.raises(ResamplingError, match="got"):
            ap_interval(truth, results, **wrong)


def test_two_sided_p_values_count_the_draw_itself():
    differences = np.array([-0.002, 0.0, 0.0, 0.003])
    difference = ApDifference(0.5, 0.5, -0.002, 0.003, 0.9, differences, 0)
    assert difference.p_values(0.001) == (2 / 5, 2 / 5)
    assert difference.p_values(0.0025) == (1 / 5, 2 / 5)


def test_a_draw_without_objects_is_drawn_again():
    document, results = scenes(10, images=4)
    keep = document["annotations"][0] | {"iscrowd": 0}
    truth = checked({**document, "annotations": [keep]})
    table = _matches(truth, results, "bbox", truth.image_ids, None)
    values = resampled([table], resamples=100, seed=0)
    assert values.shape == (100, 1)
    assert not np.isnan(values).any()
    assert math.isnan(table.average_precision(np.zeros(4, np.int64)))


def test_recalls_are_counted_as_searchsorted_does():
    recall = np.array([hits / objects for objects in range(1, 130) for hits in range(objects + 1)])
    expected = np.searchsorted(RECALLS, recall, side="right")
    np.testing.assert_array_equal(_recalls_reached(recall), expected)
