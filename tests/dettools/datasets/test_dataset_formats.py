"""Each format becomes one COCO document, as strangers write it; the original converters' figures beside ours."""

import json

import numpy as np
import pytest
from dataset_trees import (
    annotation,
    cityscapes_tree,
    coco_document,
    coco_tree,
    photograph,
    voc_object,
    voc_tree,
    voc_xml,
    yolo_tree,
)
from detserve.errors import DetserveError
from dettools.datasets.dataset import DatasetFormatError, read_header
from dettools.datasets.formats import Source, format_of, load_dataset
from dettools.datasets.voc import XmlRefusedError, read_voc
from dettools.datasets.yolo import read_yolo
from dettools.ground_truth import ground_truth_of


def boxes(dataset):
    return [one["bbox"] for one in dataset.annotations]


# COCO.


def test_a_coco_file_is_read_as_it_is(tmp_path):
    document = coco_document([annotation(0, 1, (1, 2, -3, 4), category=9)])
    dataset = load_dataset(Source(coco_tree(tmp_path, document)))
    assert dataset.document == document
    assert dataset.files == (tmp_path / "val" / "1.jpg",)
    assert dataset.annotations_of == {0: [0]}


def test_without_its_images_a_coco_file_is_still_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(coco_document()))
    dataset = load_dataset(Source(path))
    assert dataset.files == (None,)
    assert not dataset.files_known
    assert "Name their folder with --images" in dataset.notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "got a list, as COCO results are"),
        ("{", "expected a COCO annotation file in JSON"),
        ('{"images": [], "annotations": [], "categories": []}', "got no image"),
        ('{"images": [1], "annotations": [], "categories": []}', r"images\[0\] is no object"),
        ('{"images": [{}], "annotations": []}', "categories is no list"),
    ],
)
def test_what_is_no_coco_file_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DatasetFormatError, match=message):
        load_dataset(Source(tmp_path / "a.json"))


def test_a_list_of_images_is_read_without_annotations(tmp_path):
    (tmp_path / "a.json").write_text('{"images": [{"id": 1, "file_name": "x.jpg"}], "categories": []}')
    dataset = load_dataset(Source(tmp_path / "a.json"))
    assert dataset.annotations == []
    assert "no annotations" in dataset.notes[0]


# Pascal VOC.


def test_voc_counts_pixels_from_one(tmp_path):
    """xmin=1, xmax=64 is the whole width of 64; MMDetection's converter takes 1 off both and makes it 63."""
    folder = voc_tree(tmp_path, a=voc_xml(voc_object("cat", 1, 1, 64, 48) + voc_object("ape", 11, 21, 30, 40)))
    original = [64 - 1 - (1 - 1), 48 - 1 - (1 - 1)]
    dataset = read_voc(folder)
    assert original == [63, 47]
    assert boxes(dataset) == [[0, 0, 64, 48], [10, 20, 20, 20]]
    assert dataset.names == {1: "ape", 2: "cat"}
    assert [one["category_id"] for one in dataset.annotations] == [2, 1]
    assert [one["id"] for one in dataset.annotations] == [1, 2]


def test_voc_from_zero_is_noticed(tmp_path):
    folder = voc_tree(tmp_path, a=voc_xml(voc_object("cat", 0, 0, 64, 48)), b=voc_xml(voc_object("cat", 5, 5, 7, 9)))
    dataset = read_voc(folder)
    assert boxes(dataset) == [[0, 0, 64, 48], [5, 5, 2, 4]]
    assert "count from 0" in dataset.notes[0]
    assert boxes(read_voc(folder, first_pixel=1)) == [[-1, -1, 65, 49], [4, 4, 3, 5]]


def test_voc_with_decimals_and_without_size_or_difficult(tmp_path):
    """The original stops at int('10.5') and at an object without <difficult>; a file without <size> likewise."""
    with pytest.raises(ValueError, match="invalid literal"):
        int("10.5")
    more = "<truncated>1</truncated><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    folder = voc_tree(tmp_path, a=voc_xml(voc_object("cat", "10.5", "20", "30.25", "40", more), size=""))
    dataset = read_voc(folder)
    assert boxes(dataset) == [[10.5, 20, 19.75, 20]]
    assert dataset.annotations[0]["attributes"] == {"truncated": "1"}
    assert (dataset.images[0]["width"], dataset.images[0]["height"]) == (64, 48)


def test_a_bad_object_or_file_of_voc_does_not_end_the_rest(tmp_path):
    folder = voc_tree(
        tmp_path,
        a=voc_xml(voc_object("cat", "x", 2, 3, 4) + "<object><name>a</name></object>" + voc_object("cat", 1, 2, 3, 4)),
        b="<annotation><obj",
    )
    dataset = read_voc(folder)
    assert len(dataset.annotations) == 1
    assert [one.kind for one in dataset.problems] == ["bad_label"] * 3
    assert "object 1 (cat): xmin 'x'" in dataset.problems[0].detail
    assert "cannot be parsed as XML" in dataset.problems[2].detail


def test_entities_are_refused(tmp_path):
    """Ten lines that stand for a billion words ("billion laughs"), and a file of this machine."""
    levels = "".join(f'<!ENTITY l{n + 1} "{f"&l{n};" * 10}">' for n in range(9))
    laughs = f'<!DOCTYPE a [<!ENTITY l0 "lol">{levels}]><annotation><filename>&l9;</filename></annotation>'
    stolen = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;</filename></annotation>'
    for place, text in enumerate((laughs, stolen)):
        with pytest.raises(XmlRefusedError, match="declaration of the entity"):
            read_voc(voc_tree(tmp_path / str(place), a=text))


def test_the_photograph_of_an_xml_file_is_found_under_its_own_name(tmp_path):
    folder = voc_tree(tmp_path, a=voc_xml(voc_object("cat", 1, 1, 9, 9), name="C:\\from\\elsewhere.png"))
    assert read_voc(folder).images[0]["file_name"] == "JPEGImages/a.jpg"
    (folder / "JPEGImages" / "a.jpg").unlink()
    dataset = read_voc(folder)
    assert dataset.files == (None,)
    assert dataset.images[0]["file_name"] == "elsewhere.png"


def test_voc_splits_and_years(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        voc_tree(tmp_path / year, a=voc_xml(voc_object("cat", 1, 1, 9, 9)), b=voc_xml(voc_object("dog", 1, 1, 9, 9)))
        lists = tmp_path / year / "ImageSets" / "Main"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("b\n")
        (lists / "cat_train.txt").write_text("b -1\n")
    assert format_of(tmp_path) == "voc"
    assert len(load_dataset(Source(tmp_path)).images) == 4
    train = load_dataset(Source(tmp_path, split="train"))
    assert [image["file_name"] for image in train.images] == ["VOC2007/JPEGImages/b.jpg", "VOC2012/JPEGImages/b.jpg"]
    with pytest.raises(DatasetFormatError, match="There are train"):
        load_dataset(Source(tmp_path, split="val"))


@pytest.mark.shared_data
def test_the_raccoons(shared_data):
    dataset = load_dataset(Source(shared_data / "voc" / "raccoon"))
    assert (len(dataset.images), len(dataset.annotations), dataset.problems) == (200, 217, ())
    # raccoon-1.xml: 81, 88 to 522, 408.
    assert boxes(dataset)[0] == [80, 87, 442, 321]
    assert ground_truth_of(dataset.document, path=dataset.path).objects == 217


# YOLO.


def test_yolo_boxes_outlines_and_keypoints(tmp_path):
    text = "0 0.5 0.5 0.25 0.5\n1 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n"
    dataset = read_yolo(yolo_tree(tmp_path / "a", {"train/x": text}))
    assert boxes(dataset) == [[24, 12, 16, 24], [16, 12, 32, 24]]
    assert dataset.annotations[1]["area"] == 32 * 24
    assert dataset.annotations[1]["segmentation"] == [[16, 12, 48, 12, 48, 36, 16, 36]]
    assert [one["category_id"] for one in dataset.annotations] == [1, 2]
    # With keypoints, a line as long as an outline is a box and points.
    pose = yolo_tree(tmp_path / "b", {"train/x": "0 0.5 0.5 0.25 0.5 0.1 0.1 0.2 0.2"}, more="kpt_shape: [2, 2]")
    assert boxes(read_yolo(pose)) == [[24, 12, 16, 24]]
    assert "segmentation" not in read_yolo(pose).annotations[0]


def test_yolo_fractions_are_of_the_photograph_turned(tmp_path):
    folder = yolo_tree(tmp_path, {"train/x": "0 0.5 0.5 1 1"})
    photograph(folder / "images/train/x.jpg", (64, 48), orientation=6)
    assert read_header(folder / "images/train/x.jpg").stored == (64, 48)
    assert boxes(read_yolo(folder)) == [[0, 0, 48, 64]]


def test_yolo_splits_lists_and_layouts(tmp_path):
    folder = yolo_tree(tmp_path / "a", {"train/x": "", "train/y": "1 .5 .5 .1 .1", "val/x": "0 .5 .5 .1 .1"})
    assert format_of(folder) == format_of(folder / "data.yaml") == "yolo"
    every = load_dataset(Source(folder))
    assert [image["file_name"] for image in every.images] == [
        "images/train/x.jpg",
        "images/train/y.jpg",
        "images/val/x.jpg",
    ]
    assert len(load_dataset(Source(folder / "data.yaml", split="val")).images) == 1
    with pytest.raises(DatasetFormatError, match="has train, val"):
        load_dataset(Source(folder, split="test"))
    # A list of files, names by number, and no data.yaml at all.
    (folder / "list.txt").write_text("images/train/y.jpg\n")
    (folder / "data.yaml").write_text("train: list.txt\nnames: {0: cat, 2: cow}")
    listed = load_dataset(Source(folder))
    assert [image["file_name"] for image in listed.images] == ["images/train/y.jpg"]
    assert list(listed.names.values()) == ["cat", "class 1", "cow"]
    (folder / "data.yaml").unlink()
    bare = load_dataset(Source(folder))
    assert list(bare.names.values()) == ["class 0", "class 1"]
    assert "called by their numbers" in bare.notes[0]


def test_bad_lines_and_lonely_labels_of_yolo_are_told(tmp_path):
    folder = yolo_tree(
        tmp_path, {"train/x": "0 .5 .5 .1 .1\ncat .5 .5 .1 .1\n0 .5 .5 .1\n0.5 1 1 1 1\n0 .5 .5 .1 nan\n"}
    )
    (folder / "labels/train/lonely.txt").write_text("0 .5 .5 .1 .1")
    dataset = read_yolo(folder)
    assert len(dataset.annotations) == 1
    assert [one.kind for one in dataset.problems] == ["bad_label"] * 4 + ["missing_file"]
    assert dataset.problems[0].detail == "x.txt, line 2: got 'cat .5 .5 .1 .1'"


def test_yolo_labels_of_pixels_of_no_photograph_and_with_a_byte_order_mark(tmp_path):
    labels = {
        "train/pixels": "0 32 24 10 10\n0 .1 .1 5 .1 .5 .5\n",
        "train/huge": "1000000000 .5 .5 .1 .1\n",
        "train/lost": "0 .5 .5 .1 .1\n1 .5 .5 .1 .1\n",
        "train/windows": "\ufeff1 .5 .5 .25 .25\n",
    }
    folder = yolo_tree(tmp_path, labels, names="[cat, dog]")
    (folder / "images/train/lost.jpg").write_bytes(b"no photograph")
    dataset = read_yolo(folder)
    assert [(one["category_id"], one["bbox"]) for one in dataset.annotations] == [(2, [24, 18, 16, 12])]
    assert [(one.kind, one.detail.partition(", expected")[0]) for one in dataset.problems] == [
        ("bad_label", "huge.txt, line 1: got '1000000000 .5 .5 .1 .1'"),
        ("bad_label", "lost.txt: 2 lines with fractions of a photograph without a size"),
        ("bad_label", "pixels.txt, line 1: got '0 32 24 10 10'"),
        ("bad_label", "pixels.txt, line 2: got '0 .1 .1 5 .1 .5 .5'"),
    ]


def test_a_damaged_data_yaml_is_not_passed_over(tmp_path):
    folder = yolo_tree(tmp_path, {"train/x": "0 .5 .5 .1 .1"})
    (folder / "data.yaml").write_text("names: [cat\ntrain: images/train")
    with pytest.raises(DatasetFormatError, match="cannot be read as YAML"):
        load_dataset(Source(folder))


def test_aliases_of_yaml_are_not_written_out(tmp_path):
    """Each line is nine times the one before: as text, the last would have 9^20 letters."""
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 21))]
    folder = yolo_tree(tmp_path, {"train/x": ""})
    for names in ("*a20", "{0: *a20}"):
        (folder / "data.yaml").write_text("\n".join([*lines, f"names: {names}", "train: images/train"]))
        with pytest.raises(DatasetFormatError, match="expected a list of names"):
            load_dataset(Source(folder))


def test_a_data_yaml_that_names_nothing_is_refused(tmp_path):
    folder = yolo_tree(tmp_path, {"train/x": ""})
    (folder / "data.yaml").write_text("train: nowhere\nnames: [cat]")
    with pytest.raises(DatasetFormatError, match="neither a folder nor a list of images"):
        load_dataset(Source(folder))
    (folder / "data.yaml").write_text("train: images/train\nnames: 3")
    with pytest.raises(DatasetFormatError, match="expected a list of names"):
        load_dataset(Source(folder))


# Cityscapes.


def street():
    numbers = np.full((48, 64), 7)
    numbers[10:20, 5:15] = 26_000
    numbers[10:20, 30:40] = 26_001
    numbers[30:40, 5:25] = 24
    numbers[40:45, 40:50] = 29_000
    return numbers


def test_cityscapes_objects_groups_and_what_is_not_evaluated(tmp_path):
    folder = cityscapes_tree(tmp_path, {"train/aachen/x": street(), "val/bonn/y": np.full((48, 64), 3)})
    dataset = load_dataset(Source(folder))
    assert dataset.format == "cityscapes"
    assert [image["file_name"] for image in dataset.images] == [
        "train/aachen/x_leftImg8bit.png",
        "val/bonn/y_leftImg8bit.png",
    ]
    assert [(one["category_id"], one["iscrowd"], one["bbox"], one["area"]) for one in dataset.annotations] == [
        (24, 1, [5, 30, 20, 10], 200),
        (26, 0, [5, 10, 10, 10], 100),
        (26, 0, [30, 10, 10, 10], 100),
    ]
    assert len(load_dataset(Source(folder, split="val")).images) == 1
    with pytest.raises(DatasetFormatError, match="there are train, val"):
        load_dataset(Source(folder, split="test"))


def test_the_masks_of_cityscapes_are_pycocotools_own(tmp_path):
    from pycocotools import mask

    random = np.random.default_rng(0)
    for size in ((1, 1), (1, 9), (9, 1), (7, 5), (12, 12)):
        # Objects of many parts, which reach every border.
        numbers = random.choice([7, 26_000, 26_001, 24], size)
        numbers[-1, -1] = 26_000
        folder = cityscapes_tree(tmp_path / f"{size}", {"val/bonn/x": numbers})
        found = load_dataset(Source(folder)).annotations
        values = [value for value in (24, 26_000, 26_001) if (numbers == value).any()]
        assert len(found) == len(values)
        for one, value in zip(found, values, strict=True):
            rle = mask.encode(np.asfortranarray(numbers == value, np.uint8))
            assert one["segmentation"] == {"size": list(size), "counts": rle["counts"].decode()}
            assert (one["bbox"], one["area"]) == (mask.toBbox(rle).tolist(), mask.area(rle))


def test_cityscapes_ids_begin_with_one(tmp_path):
    """[REPRO] the original counts annotations from 0: pycocotools then never finds the first object."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    dataset = load_dataset(Source(cityscapes_tree(tmp_path, {"train/aachen/x": street()})))

    def average_recall(first_id):
        document = json.loads(json.dumps(dataset.document))
        # The crowd comes first and would take the id that does the harm.
        document["annotations"] = document["annotations"][1:]
        for number, one in enumerate(document["annotations"]):
            one["id"] = number + first_id
        truth = COCO()
        truth.dataset = {**document, "info": {}}
        truth.createIndex()
        results = [
            {**{k: one[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9}
            for one in truth.dataset["annotations"]
        ]
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        return float(evaluation.eval["recall"][0, 2, 0, -1])

    assert average_recall(0) == 0.5
    assert average_recall(1) == 1.0
    assert [one["id"] for one in dataset.annotations] == [1, 2, 3]


def test_the_truth_of_another_size_is_left_out(tmp_path):
    """Its masks would not fit the photograph, and pycocotools would not tell."""
    folder = cityscapes_tree(tmp_path, {"train/aachen/x": street(), "train/aachen/y": street()})
    photograph(folder / "leftImg8bit/train/aachen/y_leftImg8bit.png", (32, 24))
    dataset = load_dataset(Source(folder))
    assert {one["image_id"] for one in dataset.annotations} == {1}
    details = [(one.kind, one.detail) for one in dataset.problems]
    assert details == [("bad_label", "y_gtFine_instanceIds.png: got 64 × 48, the photograph has 32 × 24")]


def test_cityscapes_without_truth_is_told(tmp_path):
    folder = cityscapes_tree(tmp_path, {"test/berlin/x": street()})
    (folder / "gtFine/test/berlin/x_gtFine_instanceIds.png").unlink()
    dataset = load_dataset(Source(folder))
    assert dataset.annotations == []
    assert "count as empty" in dataset.notes[0]


# MMDetection configs, and what is none of all this.


def test_a_config_names_the_training_data_and_its_classes(tmp_path):
    """Repeated data is taken once; the original's window showed each image as often [#4240]."""
    coco_tree(tmp_path, coco_document([annotation(1, 1, (1, 1, 5, 5)), annotation(2, 1, (9, 9, 5, 5), category=2)]))
    inner = (
        "dict(type='CocoDataset', data_root='', ann_file='instances_val.json', data_prefix=dict(img='val/'), "
        "metainfo=dict(classes=('dog',)))"
    )
    config = tmp_path / "config.py"
    config.write_text(f"train_dataloader = dict(dataset=dict(type='RepeatDataset', times=3, dataset={inner}))")
    dataset = load_dataset(Source(config))
    assert (dataset.format, len(dataset.images)) == ("mmdet", 1)
    assert dataset.names == {2: "dog"}
    assert boxes(dataset) == [[9, 9, 5, 5]]
    assert any("RepeatDataset" in note for note in dataset.notes)
    with pytest.raises(DetserveError, match="val_dataloader"):
        load_dataset(Source(config, split="val"))


def test_what_is_no_data_set_is_told_with_what_would_be(tmp_path):
    with pytest.raises(DatasetFormatError, match="There is no such path"):
        load_dataset(Source(tmp_path / "nowhere"))
    with pytest.raises(DatasetFormatError, match="a folder of Pascal VOC XML files, YOLO's data"):
        load_dataset(Source(tmp_path))
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(DatasetFormatError, match="Name the format with --format"):
        load_dataset(Source(tmp_path / "x.txt"))
