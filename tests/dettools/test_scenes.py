import argparse
import json

import numpy as np
import pytest
from dettools.commands import scenes as scenes_command
from dettools.datasets.scenes import CATEGORIES, SceneError, SceneParameters, render_scene, write_dataset
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

SMALL = SceneParameters(image_side_px=(320, 400))
CROWDED = SceneParameters(image_side_px=(320, 400), object_count=(6, 6), overlap_chance=1.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """annotations.json of eight small scenes, seeds 11 to 18."""
    return write_dataset(tmp_path_factory.mktemp("scenes") / "set", count=8, seed=11, parameters=SMALL)


def test_a_seed_decides_every_pixel():
    first, second = render_scene(7, SMALL), render_scene(7, SMALL)
    assert first.image.tobytes() == second.image.tobytes()
    assert np.array_equal(first.boxes_xyxy, second.boxes_xyxy)
    assert np.array_equal(first.masks, second.masks)
    assert np.array_equal(first.labels, second.labels)


def test_other_seeds_give_other_scenes():
    assert render_scene(7, SMALL).image.tobytes() != render_scene(8, SMALL).image.tobytes()


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_boxes_enclose_the_visible_masks_exactly(seed):
    scene = render_scene(seed, SMALL)
    height, width = scene.masks.shape[1:]
    assert (width, height) == scene.image.size
    assert scene.boxes_xyxy.dtype == np.float32
    for (x1, y1, x2, y2), mask in zip(scene.boxes_xyxy.astype(int), scene.masks, strict=True):
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        inside = mask[y1:y2, x1:x2]
        assert inside.sum() == mask.sum()
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()


def test_a_pixel_belongs_to_one_object_only():
    assert render_scene(5, CROWDED).masks.sum(axis=0).max() == 1


def test_no_object_is_covered_beyond_the_bound():
    occlusions = np.concatenate([render_scene(seed, CROWDED).occlusions for seed in range(20, 32)])
    assert occlusions.max() <= CROWDED.max_occlusion + 1e-6
    assert (occlusions > 0.02).sum() >= 5, "crowded scenes are expected to overlap"


def test_scenes_keep_to_the_parameters():
    p = SceneParameters()
    scenes = [render_scene(seed) for seed in range(40, 52)]
    for scene in scenes:
        assert p.image_side_px[0] <= min(scene.image.size)
        assert max(scene.image.size) <= p.image_side_px[1]
        assert max(scene.image.size) / min(scene.image.size) <= p.max_aspect_ratio + 0.01
        assert p.object_count[0] <= len(scene.labels) <= p.object_count[1]
        sides = scene.boxes_xyxy[:, 2:] - scene.boxes_xyxy[:, :2]
        assert sides.min() >= 0.09 * min(scene.image.size)
    assert len({scene.image.size for scene in scenes}) > 6
    assert {label for scene in scenes for label in scene.labels.tolist()} == set(range(len(CATEGORIES)))


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # pycocotools' decode
def test_the_coco_file_agrees_with_the_masks(dataset):
    coco = COCO(str(dataset))
    assert sorted(coco.imgs) == list(range(1, 9))
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    for image in coco.dataset["images"]:
        scene = render_scene(11 + image["id"] - 1, SMALL)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        assert len(annotations) == len(scene.labels)
        with Image.open(dataset.parent / image["file_name"]) as picture:
            assert picture.format == "JPEG"
            assert picture.size == (image["width"], image["height"]) == scene.image.size
        for annotation, mask, label in zip(annotations, scene.masks, scene.labels, strict=True):
            assert np.array_equal(coco.annToMask(annotation).astype(bool), mask)
            assert annotation["area"] == mask.sum() == coco_mask.area(annotation["segmentation"])
            assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()
            assert annotation["category_id"] == label + 1
            assert annotation["iscrowd"] == 0


def test_the_coco_file_names_the_classes_and_how_it_was_made(dataset):
    document = json.loads(dataset.read_text(encoding="utf-8"))
    assert [category["id"] for category in document["categories"]] == [1, 2, 3, 4, 5, 6]
    names = [category["name"] for category in document["categories"]]
    assert names == ["circle", "square", "triangle", "star", "ring", "cross"]
    assert document["info"]["seed"] == 11
    assert document["info"]["parameters"]["image_side_px"] == [320, 400]


def test_writing_twice_gives_the_same_bytes(dataset, tmp_path):
    again = write_dataset(tmp_path / "again", count=8, seed=11, parameters=SMALL)
    assert again.read_bytes() == dataset.read_bytes()
    for picture in sorted((dataset.parent / "images").iterdir()):
        assert (again.parent / "images" / picture.name).read_bytes() == picture.read_bytes()


@pytest.mark.parametrize("count", [0, -3])
def test_a_bad_count_is_refused_before_anything_is_written(tmp_path, count):
    with pytest.raises(SceneError, match=f"number of scenes is {count}; expected at least 1"):
        write_dataset(tmp_path / "set", count=count, seed=1)
    assert not (tmp_path / "set").exists()


def test_a_pair_in_the_wrong_order_is_refused():
    with pytest.raises(SceneError, match=r"object_count is \(5, 2\)"):
        SceneParameters(object_count=(5, 2))


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(SceneError, match="seed is -1"):
        write_dataset(tmp_path / "set", count=2, seed=-1)
    assert not (tmp_path / "set").exists()


def test_a_data_set_is_never_overwritten(dataset):
    with pytest.raises(SceneError, match="already holds a data set"):
        write_dataset(dataset.parent, count=1, seed=1)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SceneError, match="file/set cannot be made: Not a directory"):
        write_dataset(tmp_path / "file" / "set", count=1, seed=1)


def parse(*words):
    """The arguments of `detserve scenes …`."""
    parser = argparse.ArgumentParser()
    scenes_command.add_parser(parser.add_subparsers())
    return parser.parse_args(["scenes", *words])


def test_the_command_prints_json_last_and_progress_apart(tmp_path, capsys):
    grid = tmp_path / "docs" / "grid.jpg"
    args = parse("--out", str(tmp_path / "set"), "--count", "2", "--seed", "3", "--grid", str(grid), "--json")
    assert scenes_command.run(args) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out.splitlines()[-1])
    annotations = str(tmp_path / "set" / "annotations.json")
    assert answer == {"annotations": annotations, "images": 2, "seed": 3, "grid": str(grid)}
    with Image.open(grid) as sheet:
        assert sheet.width == 1400
    assert "2 of 2" in captured.err
    assert len(list((tmp_path / "set" / "images").glob("*.jpg"))) == 2
