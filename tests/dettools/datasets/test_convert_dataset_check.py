"""convert-dataset check: what each metric trap costs; the original converters' id 0 beside ours."""

import contextlib
import io
import json

import numpy as np
import pytest
from dataset_trees import annotation, coco_document, coco_tree, photograph, voc_object, voc_tree, voc_xml
from dettools import cli
from dettools.datasets.coco import read_coco
from dettools.datasets.metric_traps import find_traps
from dettools.predictions import PredictionsError
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IMAGES, OBJECTS = 12, 3


def sound_document() -> dict:
    random = np.random.default_rng(3)
    objects = []
    for image in range(1, IMAGES + 1):
        for _ in range(OBJECTS):
            x, y = (int(random.integers(1, high)) for high in (300, 200))
            box = [x, y, int(random.integers(15, 90)), int(random.integers(15, 90))]
            objects.append(annotation(len(objects) + 1, image, box, category=int(random.integers(1, 3)) * 10))
    document = coco_document(objects, images=IMAGES, size=(400, 300))
    document["categories"] = [{"id": 10, "name": "cat"}, {"id": 20, "name": "dog"}]
    return document


def perfect_results(document) -> list:
    return [
        {
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            "bbox": one["bbox"],
            "score": 0.9 - place / 100,
        }
        for place, one in enumerate(document["annotations"])
    ]


def check(tmp_path, document, results):
    (tmp_path / "a.json").write_text(json.dumps(document))
    (tmp_path / "r.json").write_text(json.dumps(results))
    return find_traps(read_coco(tmp_path / "a.json"), tmp_path / "r.json")


def by_pycocotools(document, results) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(document))
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def entries(document):
    return document["annotations"]


def set_id_0(document):
    entries(document)[0]["id"] = 0


def set_corners(document):
    for one in entries(document):
        x, y, width, height = one["bbox"]
        one["bbox"] = [x, y, x + width, y + height]


def set_fractions(document):
    for one in entries(document):
        x, y, width, height = one["bbox"]
        one["bbox"] = [x / 400, y / 300, width / 400, height / 300]


def set_centres(document):
    for one in entries(document):
        x, y, width, height = one["bbox"]
        one["bbox"] = [(x + width / 2) / 400, (y + height / 2) / 300, width / 400, height / 300]


def set_index(document):
    for one in entries(document):
        one["category_id"] = one["category_id"] // 10 - 1


def set_index_from_one(document):
    for one in entries(document):
        one["category_id"] = one["category_id"] // 10


def set_ids_twice(document):
    """As two files joined whose ids begin anew."""
    for place, one in enumerate(entries(document)):
        one["id"] = place % (IMAGES * OBJECTS // 2) + 1


def set_ids_twice_from_zero(document):
    for place, one in enumerate(entries(document)):
        one["id"] = place % (IMAGES * OBJECTS // 2)


def set_duplicates(document):
    entries(document).extend({**one, "id": one["id"] + 1000} for one in entries(document)[:5])


def set_zero(document):
    entries(document).append(annotation(999, 1, [5, 5, 0, 10], category=10))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("id_zero", set_id_0),
        ("xyxy_as_xywh", set_corners),
        ("normalised_boxes", set_fractions),
        ("normalised_boxes", set_centres),
        ("category_index", set_index),
        ("category_index", set_index_from_one),
        ("duplicate_id", set_ids_twice),
        ("duplicate_box", set_duplicates),
        ("zero_area", set_zero),
    ],
)
def test_a_trap_costs_what_pycocotools_loses(tmp_path, kind, change):
    document = sound_document()
    results = perfect_results(document)
    assert by_pycocotools(document, results) == pytest.approx(1)
    change(document)
    lost = by_pycocotools(document, results)
    found = check(tmp_path, document, results)
    assert [one.kind for one in found.traps] == [kind]
    assert found.ap == pytest.approx(max(lost, 0), abs=1e-9)
    assert found.ap_undone == pytest.approx(1)
    assert found.traps[0].cost == pytest.approx(1 - max(lost, 0), abs=1e-9)
    assert found.traps[0].cost > 0.005


def test_a_sound_file_has_no_trap(tmp_path):
    document = sound_document()
    assert check(tmp_path, document, perfect_results(document)).traps == ()


def test_ids_that_are_there_twice_and_0_cost_what_pycocotools_loses(tmp_path):
    document = sound_document()
    results = perfect_results(document)
    set_ids_twice_from_zero(document)
    found = check(tmp_path, document, results)
    assert [one.kind for one in found.traps] == ["id_zero", "duplicate_id"]
    assert found.ap == pytest.approx(by_pycocotools(document, results), abs=1e-9)
    assert found.ap_undone == pytest.approx(1)


def test_a_detection_of_the_object_with_the_id_0_finds_no_neighbour_instead(tmp_path):
    """pycocotools matches it, and then counts the match as none."""
    objects = [annotation(0, 1, [10, 10, 20, 20]), annotation(1, 1, [12, 10, 20, 20])]
    document = coco_document(objects)
    results = [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "score": 0.9}]
    assert by_pycocotools(document, results) == 0
    assert check(tmp_path, document, results).ap == 0


def test_a_crowd_is_no_trap(tmp_path):
    """It need not be found, whatever its id, and were it there twice or empty."""
    document = sound_document()
    results = perfect_results(document)
    crowds = ((0, [1, 1, 9, 9]), (901, [1, 1, 9, 9]), (902, [3, 3, 0, 5]))
    entries(document).extend(annotation(number, 1, box, category=10, iscrowd=1) for number, box in crowds)
    assert check(tmp_path, document, results).traps == ()
    assert by_pycocotools(document, results) == pytest.approx(1)


def test_sides_in_the_wrong_order_without_exif_move_no_box(tmp_path):
    document = coco_document([annotation(1, 1, [4, 6, 20, 10])], size=(48, 64))
    photograph(tmp_path / "val/1.jpg", (64, 48))
    (tmp_path / "instances_val.json").write_text(json.dumps(document))
    assert find_traps(read_coco(tmp_path / "instances_val.json")).traps == ()


def test_what_cannot_be_undone_is_told(tmp_path):
    document = sound_document()
    results = [{**one, "category_id": 77} for one in perfect_results(document)[:4]] + perfect_results(document)[4:]
    entries(document)[0]["category_id"] = "10"
    entries(document)[1]["image_id"] = 999
    found = check(tmp_path, document, results)
    assert found.ap == pytest.approx(by_pycocotools(document, results), abs=1e-9)
    assert [note.partition(":")[0] for note in found.notes] == [
        "unknown_image (1)",
        "unknown_category (1)",
        "4 results are of a class that the annotations do not have",
    ]


def test_what_metrics_do_not_need_may_be_odd(tmp_path):
    document = sound_document()
    document["images"][0] |= {"license": "CC BY", "date_captured": 2014, "width": 400.0}
    document["categories"][0]["supercategory"] = None
    # pycocotools takes any text for a crowd's mark.
    entries(document).append(annotation(900, 1, [1, 1, 9, 9], category=10, iscrowd="0"))
    assert by_pycocotools(document, perfect_results(document)[:-1]) == pytest.approx(1)
    assert check(tmp_path, document, perfect_results(document)[:-1]).ap == pytest.approx(1)


def test_an_error_in_predictions_names_their_file(tmp_path):
    document = sound_document()
    with pytest.raises(PredictionsError, match=f"^{tmp_path / 'r.json'}: result 0: got the score None"):
        check(tmp_path, document, [{"image_id": 1, "category_id": 10, "bbox": [1, 2, 3, 4]}])


def test_traps_of_predictions(tmp_path):
    document = sound_document()
    results = {"annotations": perfect_results(document)}
    set_corners(results)
    set_index(results)
    found = check(tmp_path, document, results["annotations"])
    assert {(one.kind, one.where) for one in found.traps} == {
        ("xyxy_as_xywh", "predictions"),
        ("category_index", "predictions"),
    }
    assert (found.ap, found.ap_undone) == (0, pytest.approx(1))


def test_two_traps_cost_what_each_costs_alone(tmp_path):
    document = sound_document()
    results = perfect_results(document)
    set_id_0(document)
    alone = check(tmp_path, document, results).traps[0].cost
    set_index(document)
    costs = {one.kind: one.cost for one in check(tmp_path, document, results).traps}
    assert costs["id_zero"] == pytest.approx(alone)
    assert costs["category_index"] == pytest.approx(1)


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_boxes_of_a_photograph_that_exif_turns(tmp_path, orientation):
    stored = (64, 48)
    document = coco_document([annotation(1, 1, [4, 6, 20, 10])], size=stored)
    photograph(tmp_path / "val/1.jpg", stored, orientation)
    # As a viewer shows it, by its definition: what is stored as row 0 and column 0 lies where.
    corners = {2: (40, 6), 3: (40, 32), 4: (4, 32), 5: (6, 4), 6: (32, 4), 7: (32, 40), 8: (6, 40)}
    size = (20, 10) if orientation < 5 else (10, 20)
    results = [{"image_id": 1, "category_id": 1, "bbox": [*corners[orientation], *size], "score": 0.9}]
    (tmp_path / "instances_val.json").write_text(json.dumps(document))
    (tmp_path / "r.json").write_text(json.dumps(results))
    found = find_traps(read_coco(tmp_path / "instances_val.json"), tmp_path / "r.json")
    if orientation < 5:
        # The size is the same either way: nothing tells whose boxes they are.
        assert found.traps == ()
        return
    assert [(one.kind, one.cost) for one in found.traps] == [("exif_swapped", pytest.approx(1))]


def test_id_0_costs_the_original_a_true_positive_and_ours_none(tmp_path, capsys):
    """MMDetection's pascal_voc.py and cityscapes.py count annotation ids from 0."""
    source = voc_tree(tmp_path / "voc", a=voc_xml(voc_object("dog", 5, 5, 30, 30) + voc_object("dog", 40, 10, 60, 40)))
    assert cli.main(["convert-dataset", "voc", str(source), "-o", str(tmp_path / "ours.json")]) == 0
    ours = json.loads((tmp_path / "ours.json").read_text())
    results = perfect_results(ours)
    original = {**ours, "annotations": [{**one, "id": place} for place, one in enumerate(ours["annotations"])]}
    assert by_pycocotools(ours, results) == pytest.approx(1)
    # The first of two detections is a false positive: precision 1/2 up to recall 1/2, at 51 of 101 points.
    assert by_pycocotools(original, results) == pytest.approx(51 / 101 / 2)
    capsys.readouterr()


def test_the_command_tells_and_its_exit_code_too(tmp_path, capsys):
    document = sound_document()
    path = coco_tree(tmp_path, document)
    (tmp_path / "r.json").write_text(json.dumps(perfect_results(document)))
    words = ["convert-dataset", "check", str(path), "--predictions", str(tmp_path / "r.json")]
    assert cli.main(words) == 0
    assert "no metric trap found" in capsys.readouterr().out
    set_id_0(document)
    path.write_text(json.dumps(document))
    assert cli.main([*words, "--json"]) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["kind"] for one in told["traps"]] == ["id_zero"]
    assert told["ap_undone"] == pytest.approx(1)
    assert cli.main(words[:3]) == 1
    assert "never found" in capsys.readouterr().out
