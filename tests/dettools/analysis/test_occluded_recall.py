"""Occluded and separated objects on drawn scenes, their recall against the original's way, and the command."""

import json

import numpy as np
import pytest
from dettools.analysis.occluded_recall import OccludedRecall, wilson_interval
from dettools.analysis.occlusion import OcclusionError, OcclusionRule, load_subsets, make_subsets
from dettools.cli import main
from dettools.ground_truth import ground_truth_of
from hotcoco import mask as rle_masks

HEIGHT, WIDTH = 120, 200


def rectangle(left, top, right, bottom):
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    drawn[top:bottom, left:right] = 1
    return drawn


def rle(drawn):
    encoded = rle_masks.encode(drawn)
    counts = encoded["counts"]
    return {"size": [HEIGHT, WIDTH], "counts": counts.decode() if isinstance(counts, bytes) else counts}


def box_of(drawn):
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    return [float(columns[0]), float(rows[0]), float(np.ptp(columns) + 1), float(np.ptp(rows) + 1)]


def document(*images, crowd=()):
    """One image for each list of (category, mask); ids count from 1."""
    annotations = []
    for image_id, objects in enumerate(images, start=1):
        for category, drawn in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box_of(drawn),
                    "area": int(drawn.sum()),
                    "iscrowd": int(len(annotations) + 1 in crowd),
                    "segmentation": rle(drawn),
                }
            )
    return {
        "images": [
            {"id": one, "file_name": f"{one}.jpg", "width": WIDTH, "height": HEIGHT}
            for one in range(1, len(images) + 1)
        ],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "post"}],
        "annotations": annotations,
    }


def truth_of(tmp_path, *images, crowd=()):
    path = tmp_path / "val.json"
    path.write_text(json.dumps(document(*images, crowd=crowd)), encoding="utf-8")
    return ground_truth_of(document(*images, crowd=crowd), path=path, sha256="0")


def kinds(subsets):
    return {kind: [one.annotation_id for one in getattr(subsets, kind)] for kind in ("occluded", "separated")}


POST = rectangle(90, 10, 110, 110)
# The dog behind the post: a head on its left and a tail on its right.
CUT_DOG = rectangle(40, 40, 160, 80) * (1 - POST)
# The dog that a corner of the post's foot bites into.
FOOT = rectangle(90, 60, 150, 110)
BITTEN_DOG = rectangle(40, 30, 120, 90) * (1 - FOOT)
FREE = rectangle(10, 5, 30, 25)
SCENES = [(1, CUT_DOG), (2, POST)], [(1, BITTEN_DOG), (2, FOOT)], [(1, FREE), (2, rectangle(60, 60, 80, 80))]


def test_an_object_that_is_cut_and_one_that_is_bitten(tmp_path):
    subsets = make_subsets(truth_of(tmp_path, *SCENES))
    assert kinds(subsets) == {"occluded": [3], "separated": [1]}
    assert [one.occluders for one in (*subsets.separated, *subsets.occluded)] == [(2,), (4,)]
    assert (subsets.objects, subsets.split_alone) == (6, 0)


def test_who_stands_in_front_is_told_by_the_hull_not_by_the_order(tmp_path):
    turned = [list(reversed(scene)) for scene in SCENES]
    assert kinds(make_subsets(truth_of(tmp_path, *turned))) == {"occluded": [4], "separated": [2]}


def test_two_straight_halves_may_occlude_each_other(tmp_path):
    halves = [(1, rectangle(40, 20, 100, 60)), (2, rectangle(40, 60, 100, 100))]
    assert kinds(make_subsets(truth_of(tmp_path, halves)))["occluded"] == [1, 2]


def test_parts_that_nothing_cuts_are_no_separated_object(tmp_path):
    parts = np.maximum(rectangle(10, 10, 40, 40), rectangle(100, 10, 140, 40))
    subsets = make_subsets(truth_of(tmp_path, [(1, parts)], [(1, parts), (2, rectangle(100, 41, 140, 60))]))
    assert kinds(subsets)["separated"] == []
    assert subsets.split_alone == 2


def test_specks_are_no_parts(tmp_path):
    speck = BITTEN_DOG.copy()
    speck[5:7, 5:7] = 1
    scene = [(1, speck), (2, FOOT)]
    assert kinds(make_subsets(truth_of(tmp_path, scene)))["occluded"] == [1]
    assert kinds(make_subsets(truth_of(tmp_path, scene), OcclusionRule(min_part=0.0)))["occluded"] == []


def test_a_crowd_neither_occludes_nor_is_occluded(tmp_path):
    assert kinds(make_subsets(truth_of(tmp_path, *SCENES, crowd=[2, 3]))) == {"occluded": [], "separated": []}


def test_the_gap_between_masks_may_be_some_pixels(tmp_path):
    near, far = rectangle(103, 20, 140, 60), rectangle(105, 20, 140, 60)
    target = rectangle(40, 20, 100, 60)
    rule = OcclusionRule(contact_px=4)
    assert len(make_subsets(truth_of(tmp_path, [(1, target), (2, near)]), rule).occluded) == 2
    assert not make_subsets(truth_of(tmp_path, [(1, target), (2, far)]), rule).occluded


def test_polygons_and_uncompressed_masks_are_masks_too(tmp_path):
    drawn = document(*SCENES[:1])
    drawn["annotations"][1]["segmentation"] = [[90, 10, 110, 10, 110, 110, 90, 110]]
    counts, value, run = [], 0, 0
    for pixel in CUT_DOG.flatten(order="F"):
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    drawn["annotations"][0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [*counts, run]}
    assert kinds(make_subsets(ground_truth_of(drawn, path=tmp_path / "x.json")))["separated"] == [1]


def test_annotations_without_masks_are_refused(tmp_path):
    drawn = document(*SCENES)
    for one in drawn["annotations"]:
        del one["segmentation"]
    with pytest.raises(OcclusionError, match="annotations without segmentation, expected masks"):
        make_subsets(ground_truth_of(drawn, path=tmp_path / "x.json"))


def test_subsets_survive_their_file(tmp_path):
    truth = truth_of(tmp_path, *SCENES)
    subsets = make_subsets(truth, OcclusionRule(contact_px=2))
    file = tmp_path / "occlusion.json"
    file.write_text(json.dumps(subsets.to_json()), encoding="utf-8")
    assert load_subsets(file, truth) == subsets
    with pytest.raises(OcclusionError, match="2 of 2 objects are not in"):
        load_subsets(file, truth_of(tmp_path, [(2, FREE)]))
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(OcclusionError, match="expected what --make-subsets writes"):
        load_subsets(file, truth)
    with pytest.raises(OcclusionError, match="a pickle, which runs code"):
        load_subsets(tmp_path / "occluded_coco.pkl", truth)


def detection(category, score, drawn):
    x, y, width, height = box_of(drawn)
    return {"category_ids": category, "scores": score, "boxes_xyxy": [x, y, x + width, y + height], "masks": rle(drawn)}


def given(*detections):
    return {key: [one[key] for one in detections] for key in ("category_ids", "scores", "boxes_xyxy", "masks")}


def original_found(objects, detections, score_threshold=0.3, iou_threshold=0.75):
    """The original's way: bitmaps, and a detection finds every object that it overlaps enough."""
    found = 0
    for category, target in objects:
        for other, score, drawn in detections:
            union = np.logical_or(target, drawn).sum()
            if other == category and score >= score_threshold:
                found += np.logical_and(target, drawn).sum() / union >= iou_threshold
                if np.logical_and(target, drawn).sum() / union >= iou_threshold:
                    break
    return found


def test_one_detection_finds_one_object(tmp_path):
    """One box over two dogs that stand nearly in the same place: the original counts 2 of 2, it found 1."""
    first, second = rectangle(40, 20, 100, 80), rectangle(42, 22, 102, 82)
    truth = truth_of(tmp_path, [(1, first), (1, second)])
    # Both touch along half of their outline.
    subsets = make_subsets(truth)
    recall = OccludedRecall(truth, subsets)
    recall.update(1, **given(detection(1, 0.9, first)))
    result = recall.result()
    assert original_found([(1, first), (1, second)], [(1, 0.9, first)]) == 2
    assert sum(result.of(kind).all.found for kind in ("occluded", "separated", "others")) == 1
    assert result.found["segm"] == result.found["bbox"] == {1}


def test_the_better_detection_comes_first(tmp_path):
    first, second = rectangle(40, 20, 100, 80), rectangle(42, 22, 102, 82)
    truth = truth_of(tmp_path, [(1, first), (1, second)])
    recall = OccludedRecall(truth, make_subsets(truth))
    recall.update(1, **given(detection(1, 0.5, first), detection(1, 0.9, second)))
    assert recall.result().found["segm"] == {1, 2}


def test_score_class_and_overlap_must_do(tmp_path):
    truth = truth_of(tmp_path, *SCENES)
    subsets = make_subsets(truth)
    shifted = np.roll(CUT_DOG, 20, axis=1)
    for found, wanted in (
        (detection(1, 0.3, CUT_DOG), 1),
        (detection(1, 0.29, CUT_DOG), 0),
        (detection(2, 0.9, CUT_DOG), 0),
        (detection(1, 0.9, shifted), 0),
    ):
        recall = OccludedRecall(truth, subsets)
        recall.update(1, **given(found))
        assert recall.result().of("separated").all.found == wanted


def test_masks_and_boxes_differ(tmp_path):
    """The whole dog predicted through the post: its box is right, a quarter of its mask is the post."""
    truth = truth_of(tmp_path, *SCENES)
    whole = rectangle(40, 40, 160, 80)
    recall = OccludedRecall(truth, make_subsets(truth), iou_threshold=0.9)
    recall.update(1, **given(detection(1, 0.9, whole)))
    result = recall.result()
    assert (result.of("separated", "segm").all.found, result.of("separated", "bbox").all.found) == (0, 1)
    assert (result.images, result.images_left) == (1, 2)
    # Objects of images that did not come count nowhere.
    assert result.of("occluded").all.recall is None
    assert result.of("separated").by_size["medium"].total == 1
    assert CUT_DOG.sum() == 4000


def test_what_is_not_comparable_is_refused(tmp_path):
    truth = truth_of(tmp_path, *SCENES)
    recall = OccludedRecall(truth, make_subsets(truth))
    empty = {"category_ids": [], "scores": [], "boxes_xyxy": [], "masks": []}
    recall.update(1, **empty)
    with pytest.raises(OcclusionError, match="image 1 came before"):
        recall.update(1, **empty)
    with pytest.raises(OcclusionError, match="image 9 is not in the annotations"):
        recall.update(9, **empty)
    boxes = {**given(detection(1, 0.9, CUT_DOG)), "masks": None}
    with pytest.raises(OcclusionError, match="detections without masks, which segm compares"):
        recall.update(2, **boxes)
    small = {**given(detection(1, 0.9, CUT_DOG)), "masks": [{"size": [5, 5], "counts": "i0"}]}
    with pytest.raises(OcclusionError, match=r"got a mask of \[5, 5\]"):
        recall.update(2, **small)
    damaged = {**small, "masks": [{"size": [100, 100], "counts": "!!!"}]}
    with pytest.raises(OcclusionError, match="image 2: detection 0: its segmentation cannot be read"):
        recall.update(2, **damaged)
    # A refused image may come again, and is not one that was given.
    assert recall.result().images == 1
    recall.update(2, **given(detection(1, 0.9, CUT_DOG)))
    with pytest.raises(OcclusionError, match="lists of"):
        recall.update(3, category_ids=[1], scores=[], boxes_xyxy=[], masks=[])


def test_an_endpoints_answer_counts_the_same(tmp_path):
    truth = truth_of(tmp_path, *SCENES)
    subsets = make_subsets(truth)
    answer = [
        {"class_label": 0, "class_name": "dog", "bbox": [40, 40, 160, 80], "score": 0.9, "segmentation": rle(CUT_DOG)},
        {"class_label": 7, "class_name": "zebra", "bbox": [0, 0, 9, 9], "score": 0.9, "segmentation": rle(FREE)},
    ]
    served = OccludedRecall(truth, subsets)
    served.update_served(1, answer)
    results = OccludedRecall(truth, subsets)
    found = {"image_id": 1, "category_id": 1, "score": 0.9, "bbox": [40, 40, 120, 40], "segmentation": rle(CUT_DOG)}
    results.update_results([found])
    assert served.result().found == results.result().found == {"segm": {1}, "bbox": {1}}
    assert results.result().images_left == 0
    boxes = OccludedRecall(truth, subsets, iou_types=["bbox"])
    boxes.update_served(1, [{key: one[key] for key in one if key != "segmentation"} for one in answer])
    assert boxes.result().found == {"bbox": {1}}


@pytest.mark.parametrize(
    ("found", "total", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)]
)
def test_wilsons_interval(found, total, low, high):
    """The last one is Newcombe's worked example (1998, table I, method 3)."""
    assert wilson_interval(found, total) == pytest.approx((low, high), abs=5e-5)


def test_random_masks_agree_with_bitmaps(tmp_path):
    """On objects that do not overlap, one-to-one or not is the same: parity with the original's way."""
    random = np.random.default_rng(3)
    images, predictions, original = [], [], 0
    for image_id in range(1, 7):
        objects, found = [], []
        for column in range(4):
            left = column * 50
            drawn = rectangle(left, 10, left + int(random.integers(20, 50)), int(random.integers(40, 110)))
            category, score = int(random.integers(1, 3)), float(random.uniform(0.2, 1))
            objects.append((category, drawn))
            moved = np.roll(drawn, int(random.integers(0, 5)), axis=0)
            found.append((category, score, moved))
            predictions.append(
                {
                    "image_id": image_id,
                    "category_id": category,
                    "score": score,
                    "segmentation": rle(moved),
                    "bbox": box_of(moved),
                }
            )
        images.append(objects)
        original += original_found(objects, found)
    truth = truth_of(tmp_path, *images)
    recall = OccludedRecall(truth, make_subsets(truth))
    recall.update_results(predictions)
    assert len(recall.result().found["segm"]) == original > 5


@pytest.fixture
def project(tmp_path, monkeypatch):
    truth_of(tmp_path, *SCENES)
    found = [
        {"image_id": 1, "category_id": 1, "score": 0.9, "bbox": box_of(CUT_DOG), "segmentation": rle(CUT_DOG)},
        {"image_id": 3, "category_id": 1, "score": 0.8, "bbox": box_of(FREE), "segmentation": rle(FREE)},
    ]
    (tmp_path / "results.json").write_text(json.dumps(found), encoding="utf-8")
    boxes = [{key: one[key] for key in one if key != "segmentation"} for one in found]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_originals_block_is_printed(project, capsys):
    assert main(["occluded-recall", "results.json", "--ann", "val.json", "--out", "out/recall.json", "--json"]) == 0
    printed = capsys.readouterr()
    assert "COCO occluded mask recall: 0.00%\nCOCO occluded mask success num: 0\n" in printed.err
    assert "COCO separated mask recall: 100.00%\nCOCO separated mask success num: 1\n" in printed.err
    assert "| mask type | recall  | num correct |" in printed.err
    assert "| separated | 100.00% | 1           |" in printed.err
    document = json.loads(printed.out.splitlines()[-1])
    assert (document["occluded_recall"], document["separated_recall"]) == (0.0, 100.0)
    assert json.loads((project / "out/recall.json").read_bytes()) == document


ORIGINAL = [
    (["results.json", "--ann", "val.json"], 0, "COCO separated mask recall: 100.00%"),
    (["results.json", "--ann", "val.json", "--score-thr", "0.95"], 0, "COCO separated mask recall: 0.00%"),
    (["results.json", "--ann", "val.json", "--iou-thr", "0.75"], 0, "recall at IoU 0.75"),
    (["results.json", "--ann", "val.json", "--out", "x.json"], 0, "Evaluation results have been saved to x.json."),
    (["results.json", "--ann", "val.json", "--out", "x.pkl"], 2, "the figures are written as JSON"),
    (["results.json"], 2, "no annotations: give --annotations val.json"),
    (["--annotations", "val.json", "--make-subsets", "s.json"], 0, "1 occluded, 1 separated"),
    (["--annotations", "val.json"], 2, "got no RESULTS"),
    (["boxes.json", "--ann", "val.json"], 0, "COCO separated box recall: 100.00%"),
    (["boxes.json", "--ann", "val.json", "--iou-type", "segm"], 2, "detections without masks"),
    (["results.json", "--ann", "val.json", "--subsets", "occluded_coco.pkl"], 2, "which runs code when it is read"),
    (["results.json", "--ann", "val.json", "--iou-thr", "7"], 2, "got an IoU threshold of 7.0"),
    (["results.json", "--ann", "val.json", "--score-thr", "nan"], 2, "got the score threshold nan, expected 0 to 1"),
    (["results.json", "--ann", "val.json", "--contact-px", "-1"], 2, "got a contact of -1 px, expected 0 or more"),
    (["results.json", "--ann", "val.json", "--min-contact", "nan"], 2, "got min contact nan, expected a share, 0 to 1"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), ORIGINAL)
def test_arguments_of_the_original(project, capsys, arguments, code, text):
    assert main(["occluded-recall", *arguments]) == code
    printed = capsys.readouterr()
    assert text in printed.out + printed.err


@pytest.mark.shared_data
def test_real_masks(shared_data, tmp_path, capsys):
    """The annotations as their own predictions: everything is found, whatever subset it is in."""
    file = shared_data / "coco/liz50/instances_val2017.json"
    document = json.loads(file.read_bytes())
    sizes = {one["id"]: (one["height"], one["width"]) for one in document["images"]}
    perfect = []
    for one in document["annotations"]:
        if not one["iscrowd"]:
            mask = rle_masks.merge(rle_masks.fr_py_objects(one["segmentation"], *sizes[one["image_id"]]))
            perfect.append(
                {
                    **{key: one[key] for key in ("image_id", "category_id", "bbox")},
                    "score": 1.0,
                    "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
                }
            )
    (tmp_path / "perfect.json").write_text(json.dumps(perfect), encoding="utf-8")
    assert main(["occluded-recall", str(tmp_path / "perfect.json"), "--annotations", str(file), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    totals = {(one["subset"], one["iou_type"]): one["all"] for one in figures["subsets"]}
    assert sum(one["total"] for (_, iou_type), one in totals.items() if iou_type == "segm") == len(perfect) == 377
    assert all(one["found"] == one["total"] for one in totals.values())
    assert totals["occluded", "segm"]["total"] > 50
    assert totals["separated", "segm"]["total"] > 5
