"""Data sets of MMDetection configs: found where MMDetection finds them, refused where they are not COCO's."""

import importlib.util
import json
from pathlib import Path

import pytest
from detserve.mmdet_config import NotLiteralError
from detserve.mmdet_dataset import DatasetError, read_dataset

COCO = "data_root='data', ann_file='ann/val.json', data_prefix=dict(img='val/')"


def written(folder, dataset, *, split="test", more=""):
    """A config with that data set."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.py"
    path.write_text(f"{more}\n{split}_dataloader = dict(batch_size=1, dataset={dataset})\n")
    return path


def coco(folder, names=("cat", "dog")):
    """Annotations and a folder of images below ``folder``, as COCO names them."""
    (folder / "ann").mkdir(parents=True, exist_ok=True)
    (folder / "val").mkdir(exist_ok=True)
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    document = {"images": [], "annotations": [], "categories": categories}
    (folder / "ann" / "val.json").write_text(json.dumps(document))
    return folder


def test_paths_are_found_from_the_current_folder_first(tmp_path, monkeypatch):
    config = written(tmp_path / "configs", f"dict(type='CocoDataset', {COCO})")
    beside = coco(tmp_path / "configs" / "data")
    found = read_dataset(config)
    assert (found.annotations, found.images) == (beside / "ann/val.json", beside / "val")
    here = coco(tmp_path / "work" / "data")
    monkeypatch.chdir(tmp_path / "work")
    found = read_dataset(config)
    assert (found.annotations, found.images) == (here / "ann/val.json", here / "val")
    assert (found.class_names, found.type, found.notes) == ((), "CocoDataset", ())


def test_absolute_paths_and_no_data_root(tmp_path):
    data = coco(tmp_path / "data")
    config = written(
        tmp_path,
        f"dict(type='mmdet.datasets.CocoDataset', data_root='elsewhere', ann_file='{data}/ann/val.json', "
        f"data_prefix=dict(img='{data}/val'))",
    )
    assert read_dataset(config).images == data / "val"
    config = written(tmp_path, "dict(type='CocoDataset', ann_file='data/ann/val.json', data_prefix=dict(img='data/'))")
    assert read_dataset(config).images == data


def test_the_environment_moves_the_data_root(tmp_path, monkeypatch):
    moved = coco(tmp_path / "moved")
    config = written(tmp_path, f"dict(type='CocoDataset', {COCO})", more="data_root = 'data'")
    monkeypatch.setenv("MMDET_DATASETS", str(moved))
    found = read_dataset(config)
    assert found.annotations == moved / "ann/val.json"
    assert "as $MMDET_DATASETS says" in found.notes[0]


def test_explicit_paths_win_and_the_config_s_classes_are_its_annotations_own(tmp_path):
    data = coco(tmp_path / "data")
    config = written(tmp_path, f"dict(type='CocoDataset', {COCO}, metainfo=dict(classes=('dog',)))")
    assert read_dataset(config).class_names == ("dog",)
    (tmp_path / "other").mkdir()
    found = read_dataset(config, images=tmp_path / "other")
    assert (found.images, found.annotations) == (tmp_path / "other", data / "ann/val.json")
    found = read_dataset(config, annotations=tmp_path / "mine.json")
    assert (found.annotations, found.class_names, found.images) == (tmp_path / "mine.json", (), data / "val")


def test_what_is_not_there_names_both_places(tmp_path, monkeypatch):
    config = written(tmp_path / "configs", f"dict(type='CocoDataset', {COCO})")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError) as caught:
        read_dataset(config)
    told = str(caught.value)
    assert "ann_file: got data/ann/val.json" in told
    assert str(tmp_path / "data/ann/val.json") in told
    assert str(tmp_path / "configs/data/ann/val.json") in told
    assert "--annotations" in told
    (coco(tmp_path / "data") / "val").rmdir()
    with pytest.raises(DatasetError, match=r"data_prefix: got data/val/, which is no folder.*--images"):
        read_dataset(config)


def test_wrappers_are_taken_off(tmp_path):
    data = coco(tmp_path / "data")
    inner = f"dict(type='CocoDataset', {COCO})"
    found = read_dataset(written(tmp_path, f"dict(type='RepeatDataset', times=3, dataset={inner})"))
    assert found.annotations == data / "ann/val.json"
    assert found.notes == ("RepeatDataset is taken off: every image is evaluated once",)
    assert read_dataset(written(tmp_path, f"dict(type='ConcatDataset', datasets=[{inner}])")).images == data / "val"


def test_of_several_joined_one_has_to_be_named(tmp_path):
    coco(tmp_path / "data")
    two = coco(tmp_path / "two")
    other = f"dict(type='CocoDataset', {COCO.replace('data_root=' + repr('data'), 'data_root=' + repr('two'))})"
    config = written(tmp_path, f"dict(type='ConcatDataset', datasets=[dict(type='CocoDataset', {COCO}), {other}])")
    with pytest.raises(DatasetError, match=r"2 data sets joined, expected one.*--dataset N \(1: ann/val.json, 2: ann"):
        read_dataset(config)
    assert read_dataset(config, number=2).annotations == two / "ann/val.json"
    with pytest.raises(DatasetError, match="got number 3 of 2"):
        read_dataset(config, number=3)


def test_a_split_that_is_not_there_names_those_that_are(tmp_path):
    coco(tmp_path / "data")
    config = written(tmp_path, f"dict(type='CocoDataset', {COCO})", split="val")
    with pytest.raises(DatasetError, match=r"no test_dataloader with a dataset\. Take another with --split: val"):
        read_dataset(config)
    assert read_dataset(config, split="val").type == "CocoDataset"
    (tmp_path / "old.py").write_text("data = dict(test=dict(type='CocoDataset'))\n")
    with pytest.raises(DatasetError, match=r"a config of MMDetection 2, .* Give --annotations"):
        read_dataset(tmp_path / "old.py")


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("dict(type='VOCDataset', ann_file='test.txt')", r"got a VOCDataset \(one XML file an image\).*--annotations"),
        ("dict(type='LVISV1Dataset', ann_file='a.json')", "federated"),
        ("dict(type='CocoPanopticDataset', ann_file='a.json')", "panoptic"),
        ("dict(type='CocoDataset', ann_file='s3://bucket/a.json')", "expected a file on this machine"),
        ("dict(type='CocoDataset', ann_file='a.json', backend_args=dict(backend='petrel'))", "files on 'petrel'"),
        ("dict(type='CocoDataset', ann_file=['a.json', 'b.json'])", "expected one file"),
        ("dict(type='CocoDataset')", "names no ann_file"),
        ("dict(type='MyDataset', ann_file='config.py')", "of a MyDataset, which is no COCO annotation file"),
    ],
)
def test_what_is_not_coco_s_is_refused_with_the_remedy(tmp_path, dataset, words):
    with pytest.raises(DatasetError, match=words):
        read_dataset(written(tmp_path, dataset))


def test_one_s_own_class_is_taken_when_its_file_is_coco_s(tmp_path):
    coco(tmp_path / "data")
    found = read_dataset(written(tmp_path, f"dict(type='MyDataset', {COCO})"))
    assert found.notes == ("MyDataset is not MMDetection's own; its annotation file is COCO's, and is read as such",)


def test_labels_in_another_order_than_the_file_are_told(tmp_path):
    coco(tmp_path / "data", ("bird", "cat", "dog"))
    config = written(tmp_path, f"dict(type='CocoDataset', {COCO}, metainfo=dict(classes=('dog', 'cat')))")
    found = read_dataset(config)
    assert found.class_names == ("dog", "cat")
    [note] = found.notes
    assert "'cat' before 'dog'" in note
    assert "answers with wrong names" in note
    same = written(tmp_path, f"dict(type='CocoDataset', {COCO}, metainfo=dict(classes=('cat', 'dog')))")
    assert read_dataset(same).notes == ()
    more = written(tmp_path, f"dict(type='CocoDataset', {COCO}, metainfo=dict(classes=('cat', 'cow')))")
    assert "1 of the config's 2 classes are not in val.json (cow)" in read_dataset(more).notes[0]


def test_classes_may_stand_in_a_file(tmp_path):
    coco(tmp_path / "data")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    config = written(tmp_path, f"dict(type='CocoDataset', {COCO}, metainfo=dict(classes='classes.txt'))")
    assert read_dataset(config).class_names == ("cat", "dog")
    config = written(tmp_path, f"dict(type='CocoDataset', {COCO}, metainfo=dict(classes='cat'))")
    assert read_dataset(config).class_names == ("cat",)


def test_an_evaluator_of_another_file_and_of_masks_is_told(tmp_path):
    coco(tmp_path / "data")
    more = "test_evaluator = dict(type='CocoMetric', ann_file='data/ann/other.json', metric=['bbox', 'segm'])"
    notes = read_dataset(written(tmp_path, f"dict(type='CocoDataset', {COCO})", more=more)).notes
    assert (
        notes[0] == "test_evaluator reads data/ann/other.json, the data set data/ann/val.json; the data set's is taken"
    )
    assert "--iou-type bbox segm" in notes[1]


def test_a_config_that_would_have_to_be_run_is_refused(tmp_path):
    config = written(tmp_path, f"dict(type='CocoDataset', {COCO})", more="import os")
    with pytest.raises(NotLiteralError, match="more than an assignment"):
        read_dataset(config)


MMDET = importlib.util.find_spec("mmdet")


@pytest.mark.skipif(MMDET is None, reason="MMDetection is not installed (the extra detserve[mmdet])")
@pytest.mark.filterwarnings("ignore")
def test_mmdetection_s_own_class_finds_the_same_files(tmp_path, monkeypatch):
    """The independent definition: the data set built by MMDetection joins the paths, and numbers the labels."""
    from dethandlers.mmcv_operators import provide

    provide()
    from mmdet.datasets import CocoDataset

    data = coco(tmp_path / "data", ("cat", "dog"))
    document = json.loads((data / "ann/val.json").read_text())
    document["images"] = [{"id": 7, "file_name": "a.jpg", "width": 20, "height": 20}]
    box = {"id": 1, "image_id": 7, "category_id": 2, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
    document["annotations"] = [box]
    (data / "ann/val.json").write_text(json.dumps(document))
    monkeypatch.chdir(tmp_path)
    settings = {"data_root": "data", "ann_file": "ann/val.json", "data_prefix": {"img": "val/"}}
    theirs = CocoDataset(**settings, metainfo={"classes": ("dog", "cat")}, pipeline=[], test_mode=True)
    found = read_dataset(written(tmp_path, f"dict(type='CocoDataset', {COCO}, metainfo=dict(classes=('dog', 'cat')))"))
    entry = theirs.get_data_info(0)
    assert Path(theirs.ann_file).absolute() == found.annotations
    assert Path(entry["img_path"]).absolute().parent == found.images
    # The box is a dog's, and MMDetection's label for it is named cat: what the note says.
    assert theirs.metainfo["classes"][entry["instances"][0]["bbox_label"]] == "cat"
    assert any("answers with wrong names" in note for note in found.notes)
