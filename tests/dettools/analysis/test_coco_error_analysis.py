"""Stacks and TIDE errors: equal to the original algorithm and to hotcoco, or both figures where they are not."""

import contextlib
import io

import numpy as np
import pytest
from coco_scenes import checked, scenes
from dettools.analysis.confusion import confusion_of
from dettools.analysis.error_stacks import AREAS, CURVES, error_overlaps, error_stacks
from dettools.analysis.overlaps import find_overlaps
from dettools.analysis.tide_errors import KINDS, tide_errors
from dettools.coco_metrics import MetricsError
from dettools.ground_truth import load_ground_truth
from dettools.predictions import load_predictions
from hotcoco import COCO, COCOeval
from original_error_analysis import original_stacks

IMAGE = {"id": 1, "file_name": "a.jpg", "width": 400, "height": 400}
CATEGORIES = [
    {"id": 1, "name": "cat", "supercategory": "animal"},
    {"id": 2, "name": "dog", "supercategory": "animal"},
    {"id": 3, "name": "car", "supercategory": "vehicle"},
]


def grouped(document):
    for place, one in enumerate(document["categories"]):
        one["supercategory"] = "ab"[place % 2]
    return document


def original(document, results, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return original_stacks(document, results, *arguments)


def scene(objects, detections, categories=CATEGORIES):
    """Objects as (category, box, crowd), detections as (category, score, box), all in one image."""
    annotations = [
        {"id": place, "image_id": 1, "category_id": kind, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
        for place, (kind, box, crowd) in enumerate(objects, start=1)
    ]
    results = [{"image_id": 1, "category_id": kind, "score": score, "bbox": box} for kind, score, box in detections]
    return {"images": [IMAGE], "categories": categories, "annotations": annotations}, results


def analysed(document, results):
    truth = checked(document)
    overlaps = error_overlaps(truth, results)
    return error_stacks(truth, overlaps), tide_errors(overlaps)


def hotcoco_tide(document, results):
    truth = COCO(document)
    evaluator = COCOeval(truth, truth.load_res(results), "bbox")
    evaluator.evaluate()
    return evaluator.tide_errors()


@pytest.mark.parametrize(
    ("seed", "ties", "iou_type", "areas"),
    [
        (0, False, "bbox", None),
        (1, True, "bbox", None),
        (2, False, "bbox", (500.0, 20_000.0, 60_000.0)),
        (3, True, "bbox", None),
        (4, False, "segm", None),
    ],
)
def test_the_stacks_are_those_of_the_original(seed, ties, iou_type, areas):
    masks = iou_type == "segm"
    document, results = scenes(seed, images=10 if masks else 40, classes=6, ties=ties, masks=masks)
    truth = checked(grouped(document))
    stacks = error_stacks(truth, error_overlaps(truth, results, iou_type=iou_type), areas=areas or AREAS)
    expected = original(document, results, iou_type, areas)
    mine = stacks.precision.transpose(0, 3, 2, 1)
    without = np.isnan(mine)
    assert without[:, :, -1].all(), "the last class has no object"
    np.testing.assert_allclose(mine[~without], expected[~without], atol=1e-12)
    # Where there is no object the original draws that nothing was found.
    assert not expected[:6][without[:6]].any()
    # The errors that are told apart occur.
    assert (np.diff(mine, axis=0) > 0).any(axis=(1, 2, 3)).all()


def test_a_class_without_objects_does_not_lower_the_mean():
    document, results = scene([(1, [0, 0, 50, 50], 0)], [(1, 0.9, [0, 0, 50, 50])])
    stacks, _ = analysed(document, results)
    assert original(document, results)[1, :, :, 0].mean() == pytest.approx(1 / 3)
    assert stacks.ap(0)["C50"] == pytest.approx(1.0)
    assert stacks.ap(0, label=2) is None


def test_an_object_on_the_border_is_of_one_size():
    document, results = scene([(1, [0, 0, 32, 32], 0)], [(1, 0.9, [0, 0, 32, 32])])
    stacks, errors = analysed(document, results)
    of_sizes = original(document, results)[1, :, 0].mean(axis=0)[1:]
    assert of_sizes.tolist() == pytest.approx([1, 1, 0]), "the original counts it twice"
    assert stacks.objects[1:, 0].tolist() == [0, 1, 0]
    assert [errors.figures(area).objects for area in range(4)] == [1, 0, 1, 0]


def test_without_supercategories_a_class_is_similar_to_itself_only():
    categories = [{"id": one["id"], "name": one["name"]} for one in CATEGORIES]
    document, results = scene(
        [(1, [0, 0, 50, 50], 0), (2, [200, 0, 50, 50], 0)],
        [(1, 0.9, [200, 0, 50, 50]), (1, 0.8, [0, 0, 50, 50]), (2, 0.7, [200, 0, 50, 50])],
        categories,
    )
    with pytest.raises(KeyError, match="supercategory"):
        original(document, results)
    stacks, _ = analysed(document, results)
    assert stacks.alone == ("cat", "dog", "car")
    ap = stacks.ap(0, label=0)
    assert (ap["Loc"], ap["Sim"], ap["Oth"]) == (0.5, 0.5, 1.0)
    document["categories"] = CATEGORIES
    assert analysed(document, results)[0].ap(0, label=0)["Sim"] == 1.0


def test_a_small_detection_on_a_large_object_of_another_class_is_no_background():
    # Its IoU is 0.01, but all of it lies on the dog.
    document, results = scene(
        [(2, [0, 0, 300, 300], 0), (1, [320, 0, 50, 50], 0)], [(1, 0.9, [0, 0, 30, 30]), (1, 0.8, [320, 0, 50, 50])]
    )
    ap = analysed(document, results)[0].ap(0, label=0)
    assert (ap["Loc"], ap["Sim"]) == (0.5, 1.0)


def test_each_kind_of_error():
    document, results = scene(
        [
            (1, [0, 0, 50, 50], 0),
            (1, [100, 0, 50, 50], 0),
            (2, [200, 0, 50, 50], 0),
            (3, [300, 0, 50, 50], 0),
            (1, [0, 200, 50, 50], 0),
            (1, [100, 200, 50, 50], 1),
        ],
        [
            (1, 0.95, [0, 0, 50, 50]),  # right
            (1, 0.9, [0, 2, 50, 50]),  # Dupe
            (1, 0.8, [125, 0, 50, 50]),  # Loc
            (1, 0.7, [200, 0, 50, 50]),  # Cls
            (1, 0.6, [325, 0, 50, 50]),  # Both
            (1, 0.5, [300, 300, 50, 50]),  # Bkg
            (1, 0.4, [110, 210, 30, 30]),  # in the crowd: not counted
        ],
    )
    _, errors = analysed(document, results)
    figures = errors.figures()
    assert figures.counts == {"Cls": 1, "Loc": 1, "Both": 1, "Dupe": 1, "Bkg": 1, "Miss": 2}
    assert [KINDS[one] if one >= 0 else one for one in errors.kind.tolist()] == [
        *(-1, "Dupe", "Loc", "Cls", "Both", "Bkg", -2)
    ]
    assert (figures.objects, figures.found, figures.missed, figures.detections) == (5, 1, 4, 6)
    assert errors.target.tolist() == [0, 0, 1, 2, 3, -1, -1]
    # Of the two Miss objects both are whole; the one of the class car is taken for a badly placed cat.
    assert {int(errors.overlaps.object_ids[one]) for one in errors.worst("Miss", 5)} <= {4, 5}
    assert errors.worst("Bkg", 3) == [5]
    assert errors.worst("Bkg", 3, among=[2]) == []


def test_what_mending_an_error_is_worth():
    document, results = scene([(2, [0, 0, 50, 50], 0)], [(1, 0.9, [0, 0, 50, 50]), (3, 0.8, [0, 0, 50, 50])])
    figures = analysed(document, results)[1].figures()
    assert figures.ap == 0
    # The better of the two becomes right, the other goes; without the object there is nothing that could be missed.
    assert figures.delta_ap == {"Cls": 1, "Loc": 0, "Both": 0, "Dupe": 0, "Bkg": 0, "Miss": 0, "FP": 0, "FN": 0}


@pytest.mark.parametrize("seed", range(6))
def test_tide_is_that_of_hotcoco_where_there_are_no_crowds(seed):
    document, results = scenes(seed, images=20, classes=5)
    document["annotations"] = [one for one in document["annotations"] if not one["iscrowd"]]
    truth = checked(document)
    figures = tide_errors(error_overlaps(truth, results)).figures()
    expected = hotcoco_tide(document, results)
    assert figures.counts == expected["counts"]
    assert figures.ap == pytest.approx(expected["ap_base"], abs=1e-12)
    assert figures.delta_ap == pytest.approx(expected["delta_ap"], abs=1e-12)
    assert sum(figures.counts.values()) > 20


def test_a_crowd_is_no_object_that_can_be_badly_placed():
    document, results = scene([(1, [0, 0, 100, 100], 1), (1, [300, 300, 50, 50], 0)], [(1, 0.9, [70, 0, 100, 100])])
    truth = checked(document)
    counts = hotcoco_tide(document, results)["counts"]
    assert (counts["Loc"], counts["Bkg"]) == (1, 0), "hotcoco, against the paper: crowds are not among the objects"
    counts = tide_errors(error_overlaps(truth, results)).figures().counts
    assert (counts["Loc"], counts["Bkg"]) == (0, 1)


@pytest.mark.parametrize("score_threshold", [0.0, 0.3])
def test_the_counts_add_up_and_are_those_of_the_confusion_matrix(score_threshold):
    document, results = scenes(5, images=40, classes=6)
    truth = checked(document)
    errors = tide_errors(error_overlaps(truth, results, score_threshold=score_threshold))
    figures = errors.figures()
    confusion = confusion_of(find_overlaps(truth, results), iou_threshold=0.5, score_threshold=score_threshold)
    assert (figures.objects, figures.found, figures.detections) == (
        *(truth.objects, confusion.found, confusion.detections),
    )
    assert figures.found + figures.missed == figures.objects
    assert figures.found + sum(figures.counts[kind] for kind in KINDS[:-1]) == figures.detections
    parts = [
        [errors.figures(0, label) for label in range(len(truth.categories))],
        [errors.figures(area) for area in (1, 2, 3)],
    ]
    for split in parts:
        for key in ("objects", "found", "missed", "detections"):
            assert sum(getattr(one, key) for one in split) == getattr(figures, key)
        for kind in KINDS:
            assert sum(one.counts[kind] for one in split) == figures.counts[kind]


def test_results_keep_their_places_below_a_score_threshold():
    document, results = scene([], [(1, 0.1, [0, 0, 9, 9]), (1, 0.9, [0, 0, 9, 9])])
    assert error_overlaps(checked(document), results, score_threshold=0.5).result.tolist() == [1]


def test_nothing_to_find_and_nothing_found_are_no_errors():
    for objects, detections in (([], []), ([], [(1, 0.9, [0, 0, 9, 9])]), ([(1, [0, 0, 9, 9], 0)], [])):
        stacks, errors = analysed(*scene(objects, detections))
        assert (stacks.ap(0) is None) == (not objects)
        assert errors.figures().counts["Miss"] == len(objects)
        assert errors.figures().counts["Bkg"] == len(detections)


def test_overlaps_and_areas_that_cannot_be_used_are_refused():
    document, results = scene([(1, [0, 0, 9, 9], 0)], [(1, 0.9, [0, 0, 9, 9])])
    truth = checked(document)
    with pytest.raises(MetricsError, match=r"overlaps from IoU 0.1 on, expected those of error_overlaps"):
        error_stacks(truth, find_overlaps(truth, results))
    with pytest.raises(MetricsError, match=r"areas 9216 1024 1e\+10, expected three rising"):
        error_stacks(truth, error_overlaps(truth, results), areas=(9216, 1024, 1e10))


@pytest.mark.shared_data
def test_cocos_own_results_have_cocos_own_figures(shared_data):
    truth = load_ground_truth(shared_data / "eval/instances_val2014_100.json")
    for iou_type, expected in (("bbox", (0.573, 0.697)), ("segm", (0.299, 0.562))):
        file = shared_data / f"eval/cocoapi/results/instances_val2014_fake{iou_type}100_results.json"
        overlaps = error_overlaps(truth, load_predictions(file, truth).results, iou_type=iou_type)
        ap = error_stacks(truth, overlaps).ap(0)
        assert (round(ap["C75"], 3), round(ap["C50"], 3)) == expected
        assert list(ap) == list(CURVES)
        assert sorted(ap.values()) == list(ap.values())


@pytest.mark.shared_data
def test_the_real_pickle_adds_up_and_its_object_of_id_0_is_found(shared_data):
    folder = shared_data / "preds/hoovichen"
    truth = load_ground_truth(folder / "data/package/test2017/_annotations.coco.json")
    results = load_predictions(folder / "result.pkl", truth).results
    overlaps = error_overlaps(truth, results)
    figures = tide_errors(overlaps).figures()
    assert (figures.objects, figures.found, figures.missed) == (235, 220, 15)
    assert confusion_of(find_overlaps(truth, results), score_threshold=0.0).found == 220
    # .892 is pycocotools' figure: it never finds the annotation whose id is 0.
    assert round(error_stacks(truth, overlaps).ap(0)["C50"], 3) == 0.902
