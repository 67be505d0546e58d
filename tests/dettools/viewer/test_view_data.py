"""What the page is told: a score threshold is a filter, whichever of objects, predictions and photographs there are."""

import json
from pathlib import Path

import coco_scenes
import numpy as np
import pytest
from dettools.analysis.overlaps import find_overlaps, match
from dettools.reports.pictures import upright_rgb
from dettools.viewer.data import ViewData
from dettools.viewer.photographs import Photographs, read_header
from dettools.viewer.sources import Sources, SourcesError, find_sources
from PIL import Image
from viewing import data_set


def view_of(document, results, **how) -> ViewData:
    truth = coco_scenes.checked(document)
    return ViewData(Sources("scenes", truth, results, {}, has_truth=True, has_predictions=True, **how))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("iou", [0.1, 0.5, 0.75])
def test_the_matches_of_all_scores_filtered_are_those_of_each_threshold(seed, iou):
    document, results = coco_scenes.scenes(seed, ties=seed % 2 == 0)
    overlaps = find_overlaps(coco_scenes.checked(document), results)
    view = view_of(document, results)
    index, found = view.index, view.matches(iou)
    by_image = np.argsort(overlaps.object_image, kind="stable")

    score, object_of = np.array(index["score"]), np.array(found["object_of"])
    detection_of, crowd = np.array(found["detection_of"]), np.array(index["crowd"], bool)
    for threshold in (0.0, 0.2, 0.5, 0.500001, 0.9, 1.0):
        expected = match(overlaps, iou, score_threshold=threshold)
        shown = score >= threshold
        in_crowd = (object_of >= 0) & crowd[object_of]
        assert (shown & (object_of >= 0) & ~in_crowd).tolist() == expected.true_positive.tolist()
        assert (shown & (object_of < 0)).tolist() == expected.false_positive.tolist()
        missed = ~crowd & ~((detection_of >= 0) & (score[detection_of] >= threshold))
        assert missed.tolist() == (~overlaps.crowd & (expected.detection_of < 0))[by_image].tolist()


def test_details_are_in_the_order_of_the_index():
    document, results = coco_scenes.scenes(3, masks=True)
    view = view_of(document, results, iou_type="segm")
    index, found = view.index, view.matches(0.5)
    truth = coco_scenes.checked(document)
    place_of = {one["id"]: place for place, one in enumerate(document["categories"])}
    ends = [(0, 0), *zip(index["detection_ends"], index["object_ends"], strict=True)]
    for image, entry in enumerate(truth.images):
        (first, begin), (last, end) = ends[image], ends[image + 1]
        details = view.details(image)
        mine = sorted((one for one in results if one["image_id"] == entry.id), key=lambda one: -one["score"])
        assert index["score"][first:last] == [one["score"] for one in mine]
        assert index["label"][first:last] == [place_of[one["category_id"]] for one in mine]
        assert [one["box"] for one in details["detections"]] == [pytest.approx(one["bbox"], abs=0.006) for one in mine]
        assert [one["mask"] for one in details["detections"]] == [one["segmentation"] for one in mine]
        objects = [one for one in document["annotations"] if one["image_id"] == entry.id]
        assert [one["box"] for one in details["objects"]] == [pytest.approx(one["bbox"], abs=0.006) for one in objects]
        assert index["crowd"][begin:end] == [one["iscrowd"] for one in objects]
        for detection in range(first, last):
            if (target := found["object_of"][detection]) >= 0:
                pairs = {(d, o): iou for d, o, iou in details["pairs"]}
                assert begin <= target < end
                assert pairs[detection - first, target - begin] >= 0.5
    assert json.loads(json.dumps(view.index)) == view.index


def test_an_image_that_is_not_there_is_an_index_error():
    view = view_of(*coco_scenes.scenes(0))
    for image in (-1, 12):
        with pytest.raises(IndexError):
            view.details(image)


def test_ground_truth_alone_and_an_annotation_file_without_objects(tmp_path):
    annotations, results = data_set(tmp_path, 4)
    alone = find_sources(None, annotations, None)
    assert (alone.has_truth, alone.has_predictions) == (True, False)
    assert len(alone.files) == 4
    assert set(ViewData(alone).matches(0.5)["detection_of"]) == {-1}

    document = json.loads(annotations.read_text())
    annotations.write_text(json.dumps({**document, "annotations": []}))
    names_only = find_sources(results, annotations, None)
    assert (names_only.has_truth, names_only.has_predictions) == (False, True)
    assert len(ViewData(names_only).index["score"]) == len(json.loads(results.read_text()))


def test_coco_results_without_annotations_find_their_photographs_by_number(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "COCO_val2014_000000000042.jpg")
    Image.new("RGB", (64, 48)).save(tmp_path / "cover.jpg")
    results = tmp_path / "results.json"
    one = {"image_id": 42, "category_id": 17, "bbox": [1, 2, 3, 4], "score": 0.5}
    results.write_text(json.dumps([one, {**one, "image_id": 43}]))

    found = find_sources(results, None, tmp_path)

    assert not found.has_truth
    assert found.files == {42: tmp_path / "COCO_val2014_000000000042.jpg"}
    assert [image.file_name for image in found.ground_truth.images] == ["COCO_val2014_000000000042.jpg", "image 43"]
    assert ViewData(found).index["missing"] == [1]
    assert [category.name for category in found.ground_truth.categories] == ["category 17"]


def test_the_lines_of_predict_name_their_photographs(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg")
    answered = {"class_label": 3, "class_name": "star", "bbox": [1.0, 2.0, 11.0, 22.0], "score": 0.75}
    lines = [
        {"image": str(tmp_path / "a.jpg"), "detections": [answered]},
        {"image": str(tmp_path / "gone.jpg"), "error": {"message": "not an image"}},
        {"model": "shapes", "images": 2, "answered": 1, "failed": 1, "pictures": None},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))

    found = find_sources(path, None, None)
    view = ViewData(found)

    assert view.index["names"] == ["a.jpg", "gone.jpg"]
    assert view.index["categories"] == ["star"]
    assert view.details(0)["detections"] == [{"box": [1.0, 2.0, 10.0, 20.0], "mask": None}]
    assert found.files == {1: tmp_path / "a.jpg"}
    assert len(found.notes) == 2

    path.write_text(json.dumps({"image": "a.jpg", "detections": [{**answered, "score": float("nan")}]}))
    with pytest.raises(SourcesError, match=r"a\.jpg: detections\[0\]"):
        find_sources(path, None, None)


@pytest.mark.parametrize(
    ("name", "content", "images", "words"),
    [
        ("result.pkl", b"\x80\x04]q\x00.", None, "--annotations"),
        ("results.json", b"[]", None, "--images"),
        ("val.json", b'{"images": [], "annotations": [], "categories": []}', ".", "Give it with --annotations"),
        ("results.json", b'[{"image_id": 7, "category_id": 1}]', ".", "none of the 1 images"),
        ("results.json", b"{", ".", "expected COCO results"),
        ("answers.jsonl", b'{"image": "a.jpg", ', None, "a JSON object a line"),
    ],
)
def test_what_cannot_be_shown_is_said_with_the_remedy(tmp_path, name, content, images, words):
    (tmp_path / name).write_bytes(content)
    Image.new("RGB", (8, 8)).save(tmp_path / "000003.png")
    with pytest.raises(SourcesError, match=words):
        find_sources(tmp_path / name, None, tmp_path / images if images else None)


def photograph(path: Path, *, orientation: int = 1, size=(60, 40)) -> Path:
    """Red on its left third as stored, blue elsewhere."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 3, size[1]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, quality=95, exif=exif)
    return path


def test_boxes_lie_right_on_a_photograph_with_an_orientation(tmp_path):
    """Annotations of the pixels as stored keep the photograph as stored; all others get it turned."""
    made, path = Photographs(upright_rgb), photograph(tmp_path / "turned.jpg", orientation=6)
    for annotated, size, red in (
        ((60, 40), (60, 40), (5, 20)),
        ((40, 60), (40, 60), (20, 5)),
        ((0, 0), (40, 60), (20, 5)),
    ):
        assert made.size(path, annotated) == (size, False)
        for variant in ("view", "full", "thumbnail"):
            picture = made.picture(path, annotated, variant)
            target = tmp_path / "made.jpg"
            target.write_bytes(picture.content)
            with Image.open(target) as image:
                assert image.size == size
                assert image.getexif().get(0x0112, 1) == 1
                pixel = image.getpixel(red)
            assert pixel[0] > 200 > 60 > pixel[2]


def test_a_plain_photograph_is_sent_as_it_is_and_a_large_one_smaller(tmp_path):
    made = Photographs(upright_rgb)
    small = photograph(tmp_path / "small.jpg")
    assert made.picture(small, (60, 40), "view").content == small
    large = photograph(tmp_path / "large.png", size=(3000, 100))
    assert made.size(large, (0, 0)) == ((3000, 100), True)
    assert made.picture(large, (0, 0), "full").content == large
    (tmp_path / "view.jpg").write_bytes(made.picture(large, (0, 0), "view").content)
    assert read_header(tmp_path / "view.jpg").size == (2048, 68)
    # Browsers show no TIFF, and no 16 bits as we do.
    for name, mode in (("scan.tif", "RGB"), ("depth.png", "I;16")):
        Image.new(mode, (20, 10)).save(tmp_path / name)
        assert made.picture(tmp_path / name, (0, 0), "view").media_type == "image/jpeg"


def test_what_is_no_image_is_an_os_error(tmp_path):
    (tmp_path / "a.jpg").write_text("hello")
    with pytest.raises(OSError, match=r"a\.jpg"):
        read_header(tmp_path / "a.jpg")
