"""Every kind of problem is found where it was put, and nothing in sound data; figures by hand; filters."""

import json

import pytest
from dataset_trees import annotation, coco_document, coco_tree, photograph
from dettools.datasets.dataset import DatasetFormatError
from dettools.datasets.formats import Source, load_dataset
from dettools.datasets.inspection import KINDS, find_problems
from dettools.datasets.selection import Filters, most_telling, select_images
from dettools.datasets.statistics import statistics_of

FINE = (10, 10, 20, 20)


def loaded(tmp_path, document):
    return load_dataset(Source(coco_tree(tmp_path, document)))


def kinds(tmp_path, document, **options):
    return list(find_problems(loaded(tmp_path, document), **options).counts)


def test_sound_data_has_no_problem(tmp_path):
    rle = {"size": [48, 64], "counts": [10, 20, 3042]}
    sound = [
        annotation(1, 1, FINE, segmentation=[[10, 10, 30, 10, 30, 30]]),
        annotation(2, 1, (0, 0, 64, 48), iscrowd=1, segmentation=rle),
        annotation(3, 1, (43.5, 0, 21.2, 48)),
        annotation(4, 2, FINE, segmentation=[]),
        {"id": 5, "image_id": 2, "category_id": 2, "segmentation": rle, "iscrowd": 0},
    ]
    inspection = find_problems(loaded(tmp_path, coco_document(sound, images=2)), read_pixels=True)
    assert inspection.counts == {}
    assert inspection.files_opened == 2


BROKEN = {
    "id_zero": annotation(0, 1, FINE),
    "duplicate_id": annotation(9, 1, (30, 10, 5, 5)),
    "strange_id": annotation("a", 1, FINE),
    "unknown_image": annotation(2, 77, FINE),
    "unknown_category": annotation(2, 1, FINE, category=44),
    "bad_box": annotation(2, 1, FINE) | {"bbox": [1, 2, None, 4]},
    "negative_size": annotation(2, 1, (30, 30, -10, 10)),
    "zero_area": annotation(2, 1, (10, 10, 0, 5)),
    "box_outside": annotation(2, 1, (50, 10, 16, 10)),
    "duplicate_box": annotation(2, 1, (1.2, 1, 5, 5)),
    "two_classes": annotation(2, 1, (1, 1, 5, 5), category=2),
    "area_mismatch": annotation(2, 1, FINE, area=999),
    "bad_segmentation": annotation(2, 1, FINE, segmentation=[[1, 2, 3]]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_annotation_is_found(tmp_path, kind):
    inspection = find_problems(loaded(tmp_path, coco_document([annotation(9, 1, (1, 1, 5, 5)), BROKEN[kind]])))
    assert list(inspection.counts) == [kind]
    problem = inspection.problems[0]
    assert problem.annotation == 1
    assert problem.image == (None if kind == "unknown_image" else 0)


@pytest.mark.parametrize(
    "segmentation",
    [{"size": [64, 48], "counts": "x"}, {"size": [48, 64]}, "polygon", [[1, 2, 3, 4, 5, "6"]], [1, 2, 3, 4, 5, 6]],
)
def test_a_segmentation_that_is_none_is_found(tmp_path, segmentation):
    assert kinds(tmp_path, coco_document([annotation(1, 1, FINE, segmentation=segmentation)])) == ["bad_segmentation"]


def test_what_is_wrong_with_images_and_classes_is_found(tmp_path):
    document = coco_document(images=2)
    document["images"].append(document["images"][0] | {"width": 0})
    document["categories"].append({"id": 3, "name": "cat"})
    found = find_problems(loaded(tmp_path, document | {"images": document["images"][:2]}))
    assert list(found.counts) == ["duplicate_category"]
    path = tmp_path / "instances_val.json"
    path.write_text(json.dumps(document))
    inspection = find_problems(load_dataset(Source(path)))
    assert list(inspection.counts) == ["no_size", "duplicate_image_id", "duplicate_file_name", "duplicate_category"]


def test_files_that_do_not_fit_are_found(tmp_path):
    path = coco_tree(tmp_path, coco_document(images=8))
    files = [tmp_path / "val" / f"{number}.jpg" for number in range(1, 9)]
    files[0].unlink()
    files[1].write_text("no image")
    photograph(files[2], (60, 48))
    photograph(files[3], (48, 64))
    photograph(files[4], (64, 48), orientation=6)
    photograph(files[5], (48, 64), orientation=6)
    photograph(files[6], (64, 48), orientation=3)
    content = files[7].read_bytes()
    files[7].write_bytes(content[: len(content) // 2])
    expected = ["missing_file", "unreadable_image", "size_mismatch", "exif_swapped", "exif_swapped"]
    dataset = load_dataset(Source(path))
    inspection = find_problems(dataset)
    assert [inspection.of_image[place][0].kind for place in range(7)] == [*expected, "exif_turned", "exif_turned"]
    # Only the pixels tell that a file is cut off.
    assert 7 not in inspection.of_image
    assert find_problems(dataset, read_pixels=True).of_image[7][0].kind == "unreadable_image"
    assert "annotated 64 × 48, the file has 48 × 64" in inspection.of_image[3][0].detail
    assert "EXIF orientation 6 turns it" in inspection.of_image[4][0].detail
    assert find_problems(dataset, open_files=False).counts == {}


def test_corners_instead_of_sizes_are_suspected_of_the_whole_data_set(tmp_path):
    corners = [annotation(n, 1, (20 + n, 10 + n, 50 + n, 40)) for n in range(1, 10)]
    inspection = find_problems(loaded(tmp_path, coco_document(corners)))
    assert inspection.counts["xyxy_as_xywh"] == 9
    assert "9 of 9 boxes could be x1, y1, x2, y2" in inspection.notes[0]
    # One box that leaves its image among sound ones is just that.
    sound = [annotation(n, 1, (30, 20 + n, 10, 5)) for n in range(1, 10)]
    inspection = find_problems(loaded(tmp_path, coco_document([*sound, annotation(10, 1, (30, 20, 40, 45))])))
    assert list(inspection.counts) == ["box_outside"]


@pytest.mark.parametrize("evidence", [{"area": 10 * 25}, {"segmentation": [[30, 20, 40, 20, 40, 45, 30, 45]]}])
def test_corners_are_suspected_of_one_box_whose_area_or_outline_says_so(tmp_path, evidence):
    assert "xyxy_as_xywh" in kinds(tmp_path, coco_document([annotation(1, 1, (30, 20, 40, 45), **evidence)]))


def test_every_kind_has_a_word_and_a_meaning_and_is_tested():
    tested = {*BROKEN, "duplicate_category", "no_size", "duplicate_image_id", "duplicate_file_name", "xyxy_as_xywh"}
    tested |= {"missing_file", "unreadable_image", "size_mismatch", "exif_swapped", "exif_turned", "bad_label"}
    assert tested == set(KINDS)
    assert all(one.word and one.meaning for one in KINDS.values())


@pytest.mark.shared_data
def test_the_real_data_sets(shared_data):
    for name, problems in {
        "coco/liz50/instances_val2017.json": {},
        "voc/raccoon": {},
        "eval/mmdet_coco_sample.json": {"unknown_category": 1, "zero_area": 1, "duplicate_box": 1},
        # Its tool cut sizes down by a pixel or two and counted annotations from 0.
        "preds/hoovichen/data/package/test2017/_annotations.coco.json": {"size_mismatch": 75, "id_zero": 1},
    }.items():
        assert find_problems(load_dataset(Source(shared_data / name))).counts == problems


# Figures.


def test_figures_by_hand(tmp_path):
    document = coco_document(
        [
            annotation(1, 1, (0, 0, 32, 32)),
            annotation(2, 1, (0, 0, 20, 10)),
            annotation(3, 1, (0, 0, 10, 40), category=2),
            annotation(4, 1, (0, 0, 30, 30), iscrowd=1),
            annotation(5, 2, (0, 0, 0, 30)),
        ],
        images=3,
        size=(100, 100),
    )
    found = statistics_of(loaded(tmp_path, document))
    assert (found.images, found.empty_images, found.objects, found.crowds) == (3, 1, 3, 1)
    assert found.sizes == {"small": 2, "medium": 1, "large": 0}
    cat, dog = found.classes
    assert (cat.objects, cat.images, cat.crowds, cat.small, cat.medium) == (2, 2, 1, 1, 1)
    assert (dog.objects, dog.median_side_px) == (1, 20)
    assert found.objects_per_image.counts == (2, 0, 0, 1)
    assert (found.aspect_ratio.median, found.aspect_ratio.p05) == (1, pytest.approx(0.25 + 0.1 * 0.75))
    assert found.relative_side.counts[6] == 1
    assert found.image_sizes == ((100, 100, 3),)
    assert sum(map(sum, found.centres)) == 3
    assert found.centres[3][3] == 1
    assert json.dumps(found.to_json())


def test_figures_of_nothing(tmp_path):
    found = statistics_of(loaded(tmp_path, coco_document()))
    assert (found.objects, found.aspect_ratio.median) == (0, None)
    assert found.classes_without_objects == ("cat", "dog")


# Filters.


@pytest.fixture
def mixed(tmp_path):
    document = coco_document(
        [
            annotation(1, 1, (0, 0, 10, 10)),
            annotation(2, 1, (0, 0, 60, 40), category=2),
            annotation(3, 2, (0, 0, 60, 40)),
            annotation(4, 3, (0, 0, 60, 40), iscrowd=1, category=2),
            annotation(0, 5, (0, 0, 10, 10), category=2),
        ],
        images=6,
    )
    dataset = loaded(tmp_path, document)
    return dataset, find_problems(dataset)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"classes": ["cat"]}, [0, 1]),
        # A small dog, not a dog and something small.
        ({"classes": ["dog"], "sizes": ["small"]}, [4]),
        ({"sizes": ["medium"]}, [0, 1, 2]),
        ({"crowd": True}, [2]),
        ({"classes": ["cat"], "crowd": True}, []),
        ({"empty": True}, [3, 5]),
        ({"empty": True, "classes": ["cat"]}, [0, 1, 3, 5]),
        ({"problems": []}, [4]),
        ({"problems": ["zero_area"]}, []),
        ({"first": 1, "end": 3}, [1, 2]),
        ({"first": 4}, [4, 5]),
    ],
)
def test_filters(mixed, filters, expected):
    assert select_images(*mixed, Filters(**filters)) == expected


def test_a_sample_is_the_same_again_and_has_its_size(mixed):
    one, again, other = (select_images(*mixed, Filters(sample=3, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert len(set(one)) == 3
    assert len(select_images(*mixed, Filters(sample=99))) == 6


def test_images_with_problems_come_first(mixed):
    assert most_telling(range(6), mixed[1], 1, seed=0) == [4]
    assert 4 in most_telling(range(6), mixed[1], 3, seed=0)
    assert len(most_telling(range(6), mixed[1], 3, seed=0)) == 3


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"classes": ["horse"]}, "got 'horse', expected one of cat, dog"),
        ({"sizes": ["tiny"]}, "expected one of small, medium, large"),
        ({"problems": ["ugly"]}, "expected one of missing_file"),
    ],
)
def test_a_filter_for_what_does_not_exist_is_refused(mixed, filters, message):
    with pytest.raises(DatasetFormatError, match=message):
        select_images(*mixed, Filters(**filters))
