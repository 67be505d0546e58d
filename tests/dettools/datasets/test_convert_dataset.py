"""convert-dataset: round trips lose what the report lists and nothing else; ids, policies, files, splits."""

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import psutil
import pytest
from dataset_trees import (
    annotation,
    cityscapes_tree,
    coco_document,
    coco_tree,
    voc_object,
    voc_tree,
    voc_xml,
    yolo_tree,
)
from dettools.datasets.coco import read_coco
from dettools.datasets.voc import read_voc
from dettools.ground_truth import load_ground_truth

DETSERVE = Path(sys.executable).with_name("detserve")
DIFFICULT = "<pose>Left</pose><truncated>1</truncated><difficult>1</difficult>"
BILLION_LAUGHS = '<!DOCTYPE a [<!ENTITY l "lol"><!ENTITY m "&l;&l;&l;">]><annotation>&m;</annotation>'


def boxes(document) -> list:
    """Everything that every format holds, in any order: file stem, class, box."""
    names = {one["id"]: one["name"] for one in document["categories"]}
    stems = {one["id"]: one["file_name"].rpartition("/")[2].rpartition(".")[0] for one in document["images"]}
    found = [
        (stems[one["image_id"]], names[one["category_id"]], *(round(value, 6) for value in one["bbox"]))
        for one in document["annotations"]
    ]
    return sorted(found)


def sizes(document) -> list:
    stems = (one["file_name"].rpartition("/")[2].rpartition(".")[0] for one in document["images"])
    return sorted(zip(stems, ((one["width"], one["height"]) for one in document["images"]), strict=True))


@pytest.mark.parametrize(
    "box", [("12", "10", "60", "40"), ("12.5", "10.25", "60", "40.75")], ids=["whole", "fractions"]
)
def test_voc_to_coco_to_voc_loses_nothing_but_what_is_not_read(tmp_path, convert, box):
    objects = voc_object("dog", *box, DIFFICULT) + voc_object("a&amp;b", 3, 4, 20, 20)
    source = voc_tree(tmp_path / "voc", a=voc_xml(objects + "<owner>x</owner>"), b=voc_xml("", name="b.jpg"))
    report = convert("voc", source, "--to", "coco", "-o", tmp_path / "coco.json")
    assert report["not_read"] == {"<owner> of an image": 1}
    assert report["not_held_by_target"] == report["skipped"] == {}
    back = convert("coco", tmp_path / "coco.json", "--images", source, "--to", "voc", "-o", tmp_path / "back")
    assert back["not_held_by_target"] == back["skipped"] == {}
    first, second = read_voc(source).document, read_voc(tmp_path / "back").document
    assert boxes(first) == boxes(second)
    assert sizes(first) == sizes(second)
    kept = [one["attributes"] for one in second["annotations"] if one["attributes"].get("pose")]
    assert kept == [{"pose": "Left", "truncated": "1", "difficult": "1"}]
    assert (tmp_path / "back/JPEGImages/a.jpg").is_file()


@pytest.mark.shared_data
@pytest.mark.parametrize("processes", [1, 2])
def test_real_voc_to_coco_and_back_by_any_number_of_processes(tmp_path, convert, shared_data, processes):
    source = shared_data / "voc/raccoon"
    convert("voc", source, "-o", tmp_path / "coco.json", "--nproc", processes)
    back = convert(
        "coco", tmp_path / "coco.json", "--images", source, "--to", "voc", "-o", tmp_path / "back", "--nproc", processes
    )
    assert back["not_held_by_target"] == back["skipped"] == {}
    first, second = read_voc(source).document, read_voc(tmp_path / "back").document
    assert (len(first["images"]), len(first["annotations"])) == (200, 217)
    assert boxes(first) == boxes(second)
    assert sizes(first) == sizes(second)


def test_the_number_of_processes_changes_no_byte(tmp_path, convert):
    files = {f"f{number}": voc_xml(voc_object("cat", 1, 1, number % 40 + 2, 9)) for number in range(300)}
    source = voc_tree(tmp_path / "voc", a=voc_xml(""))
    for stem, text in files.items():
        (source / "Annotations" / f"{stem}.xml").write_text(text)
    written = []
    for processes in (1, 2):
        path = tmp_path / f"{processes}.json"
        convert("voc", source, "-o", path, "--nproc", processes)
        written.append(path.read_bytes())
    assert written[0] == written[1]
    assert [one["id"] for one in json.loads(written[0])["annotations"]] == list(range(1, 301))


@pytest.mark.shared_data
def test_coco_to_yolo_to_coco_loses_what_the_report_lists(tmp_path, convert, shared_data):
    source = next((shared_data / "coco/liz50").glob("*.json"))
    convert_report = convert(
        "coco", source, "--to", "yolo", "-o", tmp_path / "yolo", "--crowd", "keep", "--image-files", "link"
    )
    convert("yolo", tmp_path / "yolo", "--to", "coco", "-o", tmp_path / "back.json")
    first, second = json.loads(source.read_bytes()), json.loads((tmp_path / "back.json").read_bytes())
    assert [one["name"] for one in first["categories"]] == [one["name"] for one in second["categories"]]
    assert len(first["annotations"]) == len(second["annotations"])
    for one, other in zip(boxes(first), boxes(second), strict=True):
        assert one[:2] == other[:2]
        assert one[2:] == pytest.approx(other[2:], abs=1e-5)
    lost = convert_report["not_held_by_target"]
    held = {"id", "image_id", "category_id", "bbox", "area", "iscrowd"}
    for key in {key for one in first["annotations"] for key in one} - held:
        assert lost[f"annotations: {key}"] == sum(bool(one.get(key)) for one in first["annotations"])
    for key in {key for one in first["images"] for key in one} - {"id", "file_name", "width", "height"}:
        assert lost[f"images: {key}"] == sum(bool(one.get(key)) for one in first["images"])
    crowds = sum(one["iscrowd"] for one in first["annotations"])
    assert lost.get("annotations: iscrowd", 0) == crowds


def test_outlines_come_back_from_yolo(tmp_path, convert):
    outline = [4.0, 4.0, 20.0, 6.0, 12.0, 30.0]
    objects = [annotation(1, 1, [4, 4, 16, 26], segmentation=[outline]), annotation(2, 1, [1, 1, 2, 2])]
    source = coco_tree(tmp_path / "coco", coco_document(objects))
    report = convert("coco", source, "--to", "yolo", "--outlines", "-o", tmp_path / "yolo")
    assert report["not_held_by_target"]["outlines of several parts or none: the box instead"] == 1
    assert "annotations: segmentation" not in report["not_held_by_target"]
    convert("yolo", tmp_path / "yolo", "--to", "coco", "-o", tmp_path / "back.json")
    back = json.loads((tmp_path / "back.json").read_text())["annotations"]
    assert back[0]["segmentation"][0] == pytest.approx(outline, abs=1e-6)
    assert back[1]["bbox"] == pytest.approx([1, 1, 2, 2], abs=1e-6)


@pytest.mark.parametrize(
    ("target", "policy", "crowds", "skipped"),
    [
        ("coco", [], [1, 0], 0),
        ("coco", ["--difficult", "keep"], [0, 0], 0),
        ("coco", ["--difficult", "drop"], [0], 1),
        ("yolo", [], None, 1),
        ("yolo", ["--difficult", "keep"], None, 0),
    ],
)
def test_difficult_objects(tmp_path, convert, target, policy, crowds, skipped):
    source = voc_tree(
        tmp_path / "voc", a=voc_xml(voc_object("dog", 1, 1, 9, 9, DIFFICULT) + voc_object("dog", 2, 2, 8, 8))
    )
    out = tmp_path / ("out.json" if target == "coco" else "out")
    report = convert("voc", source, "--to", target, "-o", out, *policy)
    assert report["skipped"].get("difficult", {"count": 0})["count"] == skipped
    if target == "coco":
        assert [one["iscrowd"] for one in json.loads(out.read_text())["annotations"]] == crowds
    else:
        assert len((out / "labels/train/a.txt").read_text().splitlines()) == 2 - skipped


@pytest.mark.parametrize(
    ("policy", "difficult", "lost"), [([], ["1"], 0), (["--crowd", "keep"], ["0"], 1), (["--crowd", "drop"], [], 0)]
)
def test_crowds(tmp_path, convert, policy, difficult, lost):
    source = coco_tree(tmp_path / "coco", coco_document([annotation(1, 1, [4, 4, 16, 26], iscrowd=1)]))
    report = convert("coco", source, "--to", "voc", "-o", tmp_path / "voc", *policy)
    root = ElementTree.parse(tmp_path / "voc/Annotations/1.xml")
    assert [one.text for one in root.findall("object/difficult")] == difficult
    assert report["not_held_by_target"].get("annotations: iscrowd", 0) == lost


def test_what_cannot_be_used_is_skipped_and_told(tmp_path, convert):
    objects = [
        annotation(1, 1, [4, 4, 16, 0]),
        annotation(2, 1, [4, 4, -3, 9]),
        annotation(3, 1, [4, 4, 9, 9], category=7),
        annotation(4, 9, [4, 4, 9, 9]),
        annotation(5, 1, [4, 4, 9, 9]) | {"bbox": [1, 2]},
        annotation(6, 1, [60, 40, 30, 30]),
    ]
    source = coco_tree(tmp_path / "coco", coco_document(objects))
    report = convert("coco", source, "--to", "yolo", "-o", tmp_path / "yolo")
    counts = {reason: one["count"] for reason, one in report["skipped"].items()}
    assert counts == dict.fromkeys(["bad_box", "negative_size", "unknown_category", "unknown_image", "zero_area"], 1)
    assert "[4, 4, 16, 0]" in report["skipped"]["zero_area"]["examples"][0]
    assert report["not_held_by_target"] == {"boxes cut off at the side of their image": 1}
    line = (tmp_path / "yolo/labels/train/1.txt").read_text().split()
    assert [float(one) for one in line] == pytest.approx([0, 62 / 64, 44 / 48, 4 / 64, 8 / 48])


def test_cityscapes_is_written_as_the_original_names_it(tmp_path, convert):
    numbers = np.zeros((48, 64))
    numbers[5:15, 10:30], numbers[20:30, 40:60], numbers[40:44, 2:9] = 26001, 24000, 25
    source = cityscapes_tree(
        tmp_path / "c", {"train/aachen/a": numbers, "val/ulm/b": numbers, "test/bonn/d": np.zeros((48, 64))}
    )
    report = convert("cityscapes", source, "-o", tmp_path / "out", "--nproc", 2)
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [
        "conversion.report.json",
        "instancesonly_filtered_gtFine_train.json",
        "instancesonly_filtered_gtFine_val.json",
    ]
    assert report["skipped"]["no_objects"]["count"] == 1
    train = json.loads((tmp_path / "out/instancesonly_filtered_gtFine_train.json").read_text())
    found = {one["category_id"]: one for one in train["annotations"]}
    assert sorted(one["id"] for one in train["annotations"]) == [1, 2, 3]
    assert found[26]["bbox"] == [10, 5, 20, 10]
    assert found[26]["area"] == 200
    assert [found[key]["iscrowd"] for key in (24, 25, 26)] == [0, 1, 0]
    assert load_ground_truth(tmp_path / "out/instancesonly_filtered_gtFine_val.json").has_masks
    convert("cityscapes", source, "-o", tmp_path / "few", "--boxes-only", "--contiguous-ids", "--split", "val")
    few = json.loads((tmp_path / "few/instancesonly_filtered_gtFine_val.json").read_text())
    assert {one["category_id"] for one in few["annotations"]} == {1, 2, 3}
    assert not any("segmentation" in one for one in few["annotations"])


def test_a_devkit_has_a_file_for_each_split_year_and_both_years(tmp_path, convert):
    for year, splits in (("VOC2007", ("train", "val", "test")), ("VOC2012", ("train",))):
        root = voc_tree(
            tmp_path / "kit" / year, **{f"{year}_{one}": voc_xml(voc_object(one, 1, 1, 9, 9)) for one in splits}
        )
        (root / "ImageSets/Main").mkdir(parents=True)
        for split in splits:
            (root / f"ImageSets/Main/{split}.txt").write_text(f"{year}_{split}\n")
    convert("voc", tmp_path / "kit", "-o", tmp_path / "out", "--out-format", "coco")
    names = {one.stem: len(json.loads(one.read_text())["images"]) for one in (tmp_path / "out").glob("voc*.json")}
    assert names == {"voc07_train": 1, "voc07_val": 1, "voc07_test": 1, "voc12_train": 1, "voc0712_train": 2}
    convert("voc", tmp_path / "kit", "--to", "yolo", "-o", tmp_path / "yolo")
    assert sorted(one.name for one in (tmp_path / "yolo/labels").iterdir()) == ["test", "train", "val"]
    assert len(list((tmp_path / "yolo/labels/train").iterdir())) == 2


def test_classes_and_first_pixel_are_those_of_all_splits(tmp_path, convert):
    source = voc_tree(
        tmp_path / "voc",
        a=voc_xml(voc_object("ant", 0, 4, 20, 20) + voc_object("bee", 4, 4, 20, 20)),
        b=voc_xml(voc_object("bee", 4, 4, 20, 20), name="b.jpg"),
    )
    (source / "ImageSets/Main").mkdir(parents=True)
    for split, stem in (("train", "a"), ("val", "b")):
        (source / f"ImageSets/Main/{split}.txt").write_text(stem)
    convert("voc", source, "-o", tmp_path / "out")
    train, val = (json.loads((tmp_path / f"out/{split}.json").read_text()) for split in ("train", "val"))
    assert train["categories"] == val["categories"] == [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}]
    assert [one["category_id"] for one in val["annotations"]] == [2]
    # The val list alone would look as if it counted from 1.
    assert val["annotations"][0]["bbox"] == [4, 4, 16, 16]
    report = convert("voc", source, "-o", tmp_path / "bees", "--classes", "cow", "bee")
    assert report["skipped"]["unknown_category"]["count"] == 1
    bees = json.loads((tmp_path / "bees/val.json").read_text())
    assert bees["categories"] == [{"id": 1, "name": "cow"}, {"id": 2, "name": "bee"}]


def test_what_coco_says_of_a_class_stays_in_coco(tmp_path, convert):
    document = coco_document([annotation(1, 1, [1, 1, 5, 5])], licenses=[{"id": 3}])
    document["categories"][0]["supercategory"] = "pet"
    source = coco_tree(tmp_path / "coco", document)
    convert("coco", source, "--to", "coco", "-o", tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == document
    report = convert("coco", source, "--to", "voc", "-o", tmp_path / "voc")
    assert report["not_held_by_target"] == {
        "categories: supercategory": 1,
        "classes without any object": 1,
        "licenses": 1,
    }


def test_a_label_without_a_photograph_is_told(tmp_path, convert):
    source = yolo_tree(tmp_path / "yolo", {"train/a": "1 0.5 0.5 0.25 0.25\n"})
    (source / "labels/train/z.txt").write_text("0 0.5 0.5 0.25 0.25\n")
    report = convert("yolo", source, "--to", "coco", "-o", tmp_path / "out.json")
    assert report["skipped"]["missing_file"]["examples"] == ["train/z.txt has no photograph"]


def test_yolo_to_voc_keeps_the_splits(tmp_path, convert):
    source = yolo_tree(tmp_path / "yolo", {"train/a": "1 0.5 0.5 0.25 0.25\n", "val/b": "nonsense\n"})
    report = convert("yolo", source, "--to", "voc", "-o", tmp_path / "voc", "--image-files", "copy")
    assert report["skipped"]["bad_label"]["count"] == 1
    assert (tmp_path / "voc/ImageSets/Main/train.txt").read_text() == "a\n"
    assert not (tmp_path / "voc/JPEGImages/a.jpg").is_symlink()
    assert boxes(read_voc(tmp_path / "voc", split="train").document) == [("a", "dog", 24, 18, 16, 12)]


def test_coco_keeps_its_ids_unless_one_is_0(tmp_path, convert):
    for first, kept in ((5, [5, 9]), (0, [1, 2])):
        document = coco_document([annotation(first, 1, [1, 1, 5, 5]), annotation(9, 1, [2, 2, 5, 5])], info={"year": 1})
        source = coco_tree(tmp_path / f"c{first}", document)
        convert("coco", source, "--to", "coco", "-o", tmp_path / f"{first}.json")
        written = json.loads((tmp_path / f"{first}.json").read_text())
        assert [one["id"] for one in written["annotations"]] == kept
        assert written["info"] == {"year": 1}


def test_images_of_one_name_in_two_folders_stay_apart(tmp_path, convert):
    document = coco_document([annotation(1, 1, [1, 1, 5, 5]), annotation(2, 2, [2, 2, 5, 5], category=2)], images=2)
    for image, folder in zip(document["images"], ("left", "right"), strict=True):
        image["file_name"] = f"{folder}/x.jpg"
    source = coco_tree(tmp_path / "coco", document)
    convert("coco", source, "--to", "voc", "-o", tmp_path / "voc")
    assert [one[:2] for one in boxes(read_voc(tmp_path / "voc").document)] == [("right__x", "dog"), ("x", "cat")]


def test_entities_in_xml_are_refused_and_nothing_is_left(tmp_path, convert):
    source = voc_tree(tmp_path / "voc", a=BILLION_LAUGHS)
    for processes in (1, 2):
        message = convert("voc", source, "-o", tmp_path / "out" / "a.json", "--nproc", processes, code=2)
        assert "entity" in message
        assert "Remove its DOCTYPE" in message
        assert list((tmp_path / "out").iterdir()) == []


def test_what_is_asked_for_in_vain_is_refused(tmp_path, convert):
    source = voc_tree(tmp_path / "voc", a=voc_xml(""))
    assert "use --to coco" in convert("voc", source, "--out-format", "pkl", code=2).lower()
    assert "YOLO has no crowds" in convert("voc", source, "--to", "yolo", "--difficult", "crowd", code=2)
    assert "expected a new or empty folder" in convert("voc", source, "--to", "yolo", "-o", source, code=2)
    (tmp_path / "data.yaml").write_text("names: [a]")
    (tmp_path / "none").mkdir()
    words = ("yolo", tmp_path / "data.yaml", "--images", tmp_path / "none", "--to", "coco", "-o", tmp_path / "x.json")
    assert "got no image" in convert(*words, code=2)
    assert "no such path" in convert("yolo", tmp_path / "nowhere", "--to", "coco", "-o", tmp_path / "x.json", code=2)


def test_a_written_file_is_read_as_it_was_meant(tmp_path, convert):
    source = coco_tree(tmp_path / "coco", coco_document([annotation(1, 1, [1.5, 1, 5, 5])]))
    convert("coco", source, "--to", "coco", "-o", tmp_path / "out/instances.json")
    assert read_coco(tmp_path / "out/instances.json").annotations[0]["bbox"] == [1.5, 1, 5, 5]


def test_where_no_object_is_written_it_is_told(tmp_path, convert):
    source = voc_tree(tmp_path / "voc", a=voc_xml(voc_object("dog", 1, 1, 9, 9)))
    report = convert("yolo", source, "--to", "coco", "-o", tmp_path / "a.json")
    assert "read as yolo: check the format" in report["notes"][-1]
    message = convert("yolo", source, "--to", "coco", "-o", tmp_path / "a", code=2)
    assert "got no object, so that no file is written (no_objects 1)" in message
    truth = cityscapes_tree(tmp_path / "c", {"train/a/a": np.full((48, 64), 26001)})
    assert "--gt-dir: got" in convert(
        "cityscapes", truth, "--gt-dir", "gt", "--to", "yolo", "-o", tmp_path / "y", code=2
    )


def test_a_class_that_is_named_twice_is_one(tmp_path, convert):
    source = voc_tree(tmp_path / "voc", a=voc_xml(voc_object("dog", 1, 1, 9, 9)))
    report = convert("voc", source, "-o", tmp_path / "a.json", "--classes", "dog", "dog")
    assert report["categories"] == [{"id": 1, "name": "dog"}]


def test_names_that_cannot_be_written_are_refused(tmp_path, convert):
    source = coco_tree(tmp_path / "coco", coco_document([annotation(1, 1, [1, 1, 5, 5])]))
    sound = source.read_text()
    for wrong in ("\\ud800.jpg", "a\\u0000.jpg", "x" * 300 + ".jpg"):
        source.write_text(sound.replace("1.jpg", wrong))
        assert "images[0]: got the file_name" in convert("coco", source, "--to", "voc", "-o", tmp_path / "out", code=2)
    source.write_text(sound.replace('"cat"', '"c\\u0001"'))
    assert "categories[0]: got the name" in convert("coco", source, "--to", "voc", "-o", tmp_path / "out", code=2)
    latin = yolo_tree(tmp_path / "yolo", {"train/a": "0 .5 .5 .2 .2"})
    (latin / "images/train/a.jpg").rename(latin / "images/train/caf\udce9.jpg")
    message = convert("yolo", latin, "--to", "coco", "-o", tmp_path / "a.json", code=2)
    assert "expected one in UTF-8. Rename the file" in message
    (tmp_path / "folder.json").mkdir()
    source.write_text(sound)
    message = convert("coco", source, "--to", "coco", "-o", tmp_path / "folder.json", code=2)
    assert f"{tmp_path / 'folder.json'}: Is a directory" in message


def test_a_killed_conversion_leaves_no_process(tmp_path):
    """2,000 objects a file, so that the kill comes while the processes read."""
    text = voc_xml("".join(voc_object("dog", one % 30 + 1, 2, 40, 40) for one in range(2000)))
    source = voc_tree(tmp_path / "voc", **{f"a{one}": text for one in range(200)})
    command = [DETSERVE, "convert-dataset", "voc", source, "--to", "coco", "-o", tmp_path / "out", "--nproc", "2"]
    parent = psutil.Popen([str(one) for one in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers = []
    end = time.monotonic() + 60
    while not workers and parent.poll() is None and time.monotonic() < end:
        workers = [one for one in parent.children() if "--multiprocessing-fork" in one.cmdline()]
        time.sleep(0.02)
    assert workers, "the conversion ended before it was killed"
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    for one in alive:
        one.kill()
    assert not alive
