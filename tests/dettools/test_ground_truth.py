"""Annotation files: repaired where that is safe, refused where a figure would change unseen."""

import copy
import hashlib
import json

import pytest
from coco_scenes import checked, scenes
from dettools.ground_truth import GroundTruthError, base_name, load_ground_truth


@pytest.fixture
def document():
    return {
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 640, "height": 480},
            {"id": 3, "file_name": "sub/b.jpg", "width": 100, "height": 200},
        ],
        "annotations": [
            {"id": 5, "image_id": 7, "category_id": 2, "bbox": [1, 2, 30, 40], "area": 1000, "iscrowd": 0},
            {"id": 6, "image_id": 3, "category_id": 9, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 1},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "bicycle"}],
    }


def message_of(document: object) -> str:
    with pytest.raises(GroundTruthError) as error:
        checked(document)
    assert str(error.value).startswith("scenes.json: ")
    return str(error.value)


def test_a_file_is_read_in_its_own_order(document, tmp_path):
    path = tmp_path / "val.json"
    path.write_text(json.dumps(document))
    truth = load_ground_truth(path)
    assert [image.id for image in truth.images] == [7, 3]
    assert [(category.id, category.name) for category in truth.categories] == [(9, "dog"), (2, "bicycle")]
    assert truth.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (truth.has_masks, truth.has_keypoints, truth.notes, truth.zero_id) == (False, False, (), None)
    assert truth.objects_per_category == {9: 0, 2: 1}
    assert truth.objects == 1
    assert truth.document == document


def test_an_annotation_with_the_id_0_gets_another(document):
    document["annotations"][1]["id"] = 0
    before = copy.deepcopy(document)
    truth = checked(document)
    assert [one["id"] for one in truth.annotations] == [1, 2]
    assert truth.zero_id == 2
    assert "an annotation has the id 0" in truth.notes[0]
    assert document == before


def test_what_can_be_computed_is_added(document):
    for one in document["annotations"]:
        del one["id"], one["area"], one["iscrowd"]
    truth = checked(document)
    assert [one["area"] for one in truth.annotations] == [1200, 12]
    assert [one["id"] for one in truth.annotations] == [1, 2]
    assert truth.objects == 2
    assert [note.partition(":")[0] for note in truth.notes] == [
        "2 annotations without iscrowd count as single objects",
        "2 annotations without area got that of their box",
        "2 annotations without id",
    ]


def test_masks_and_keypoints_are_seen(document):
    document["annotations"][0]["segmentation"] = []
    assert not checked(document).has_masks
    document["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    document["annotations"][1]["keypoints"] = [1, 2, 2]
    assert checked(document).has_masks
    assert checked(document).has_keypoints


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d.pop("annotations"), 'no list annotations. Images without any object still need "annotations": []'),
        (lambda d: d.update(images={}), "there is no list images"),
        (lambda d: d.update(images=[]), "got no image"),
        (lambda d: d["images"].append(3), "images[2] is no object"),
        (lambda d: d["images"][0].update(id="7"), "images[0]: got the id '7', expected a whole number"),
        (lambda d: d["images"][0].update(id=3), "the image id 3 comes more than once"),
        (lambda d: d["images"][0].update(width=-1), "image 7: expected file_name as text, width and height"),
        (lambda d: d["categories"][0].update(id=2), "the category id 2 comes more than once"),
        (lambda d: d["categories"][0].pop("name"), "category 9: got no name"),
        (lambda d: d["annotations"][0].update(id=6), "the annotation id 6 comes more than once"),
        (lambda d: d["annotations"][0].update(id="x"), "got the annotation id 'x'"),
        (lambda d: d["annotations"][0].update(image_id=1), "1 of 2 annotations are of no image that the file has"),
        (lambda d: d["annotations"][0].pop("category_id"), "of no category that the file has (category_id None)"),
        (lambda d: d["annotations"][0].update(image_id=[7]), "of no image that the file has"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, -3, 4]), "got the bbox [1, 2, -3, 4]"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "got the bbox"),
        (lambda d: d["annotations"][0].update(bbox=None, area=None), "neither an area nor a bbox"),
    ],
)
def test_contradictions_are_refused(document, change, expected):
    change(document)
    assert expected in message_of(document)


def test_other_files_are_refused(tmp_path):
    assert "got a list, as COCO results are" in message_of([])
    assert "got int, expected COCO annotations" in message_of(3)
    with pytest.raises(GroundTruthError, match=r"none\.json: cannot be read"):
        load_ground_truth(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("no json")
    with pytest.raises(GroundTruthError, match="expected a COCO annotation file in JSON"):
        load_ground_truth(tmp_path / "text.json")


def test_two_categories_of_one_name_are_noted(document):
    document["categories"][0]["name"] = "bicycle"
    assert checked(document).notes == ("more than one category has the name 'bicycle'",)


# The images' files.


def test_images_are_found_by_name_and_below(document, tmp_path):
    document["images"] += [
        {"id": 1, "file_name": "C:\\data\\c.jpg"},
        {"id": 2, "file_name": "elsewhere/d.jpg"},
        {"id": 4, "file_name": "none.jpg"},
        {"id": 5, "file_name": "../outside.jpg"},
    ]
    folder = tmp_path / "images"
    for name in ("a.jpg", "sub/b.jpg", "c.jpg", "deep/deeper/d.jpg", "../outside.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    found, missing = checked(document).image_files(folder)
    assert {one: path.relative_to(folder).as_posix() for one, path in found.items()} == {
        7: "a.jpg",
        3: "sub/b.jpg",
        1: "c.jpg",
        2: "deep/deeper/d.jpg",
    }
    assert list(found) == [7, 3, 1, 2]
    assert [image.file_name for image in missing] == ["none.jpg", "../outside.jpg"]


def test_two_files_for_one_image_are_no_answer(document, tmp_path):
    for name in ("one/a.jpg", "two/a.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.raises(GroundTruthError, match=r"image 7 \(a\.jpg\) could be .*one/a\.jpg or .*two/a\.jpg"):
        checked(document).image_files(tmp_path)
    with pytest.raises(GroundTruthError, match="expected the folder with the images"):
        checked(document).image_files(tmp_path / "none")


def test_a_base_name_is_that_of_any_system():
    assert base_name("a/b.jpg") == base_name("C:\\a\\b.jpg") == base_name("b.jpg") == "b.jpg"
    assert base_name("") == ""


# A part of them.


def test_restricted_to_some_images():
    document, _ = scenes(0)
    truth = checked(document)
    some = truth.restricted_to([3, 9])
    assert some.image_ids == {3, 9}
    assert {one["image_id"] for one in some.annotations} == {3, 9}
    assert some.objects < truth.objects == checked(document).objects
    assert some.categories == truth.categories
    assert some.objects == sum(some.objects_per_category.values())
    with pytest.raises(GroundTruthError, match=r"no image with the id 1, 2$"):
        truth.restricted_to([1, 2, 3])


def test_restricted_to_some_categories():
    document, _ = scenes(0)
    truth = checked(document)
    first = truth.categories[0]
    some = truth.with_categories({first.name, "of no category"})
    assert some.categories == (first,)
    assert {one["category_id"] for one in some.annotations} == {first.id}
    assert some.objects == truth.objects_per_category[first.id]
    assert some.images == truth.images
    with pytest.raises(GroundTruthError, match=r"has no category of the names 'a', 'b'$"):
        truth.with_categories({"b", "a"})


@pytest.mark.shared_data
def test_real_annotations(shared_data):
    truth = load_ground_truth(shared_data / "eval" / "instances_val2014_100.json")
    assert (len(truth.images), len(truth.annotations), truth.objects, truth.has_masks) == (100, 839, 830, True)
    package = shared_data / "preds" / "hoovichen" / "data" / "package" / "test2017"
    truth = load_ground_truth(package / "_annotations.coco.json")
    assert truth.zero_id == 1
    found, missing = truth.image_files(package)
    assert len(found) + len(missing) == len(truth.images) == 198
    assert len(found) == len(list(package.glob("*.jp*g")))
    with pytest.raises(GroundTruthError, match="of no category that the file has"):
        load_ground_truth(shared_data / "eval" / "mmdet_coco_sample.json")
