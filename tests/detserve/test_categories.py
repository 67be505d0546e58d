"""The category map: which output of a model is which class."""

import json

import pytest
from dethandlers.detections import Category
from detserve.categories import assign_model_labels, candidate_class_counts, read_categories
from detserve.errors import SpecError

# COCO: 80 classes, ids from 1 to 90 with gaps.
COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO = tuple(Category(number, f"class {number}", -1) for number in range(1, 91) if number not in COCO_GAPS)


def test_the_number_of_classes_tells_the_three_conventions_apart():
    assert len(COCO) == 80
    assert candidate_class_counts(COCO) == [81, 91, 80]
    for num_classes, labels in (
        (81, list(range(1, 81))),
        (80, list(range(80))),
        (91, [category.id for category in COCO]),
    ):
        assigned = assign_model_labels(COCO, num_classes)
        assert [category.model_label for category in assigned] == labels
        assert [(category.id, category.name) for category in assigned] == [(item.id, item.name) for item in COCO]


def test_dense_ids_make_two_conventions_one():
    dense = tuple(Category(number, f"{number}", -1) for number in (1, 2, 3))
    assert candidate_class_counts(dense) == [4, 3]
    assert [category.model_label for category in assign_model_labels(dense, 4)] == [1, 2, 3]


def test_ids_from_zero_follow_the_order_of_the_list():
    from_zero = tuple(Category(number, f"{number}", -1) for number in (2, 0, 1))
    # Three classes of three categories: the place in the list, not the id.
    assert [category.model_label for category in assign_model_labels(from_zero, 3)] == [0, 1, 2]
    assert [category.model_label for category in assign_model_labels(from_zero, 4)] == [1, 2, 3]


def test_given_labels_are_kept():
    given = (Category(1, "cat", 7), Category(2, "dog", 0))
    assert assign_model_labels(given, 8) == given


@pytest.mark.parametrize(
    ("labels", "num_classes", "wanted"),
    [
        ((7, 0), 7, "model_label up to 7, expected different ones below the model's 7 classes"),
        ((1, 1), 5, "expected different ones"),
        ((1, -1), 5, "for some, expected it for all or for none"),
    ],
)
def test_given_labels_that_cannot_be_are_refused(labels, num_classes, wanted):
    given = tuple(Category(place, str(place), label) for place, label in enumerate(labels))
    with pytest.raises(SpecError, match=wanted):
        assign_model_labels(given, num_classes)


def test_a_number_of_classes_that_fits_nothing_is_refused_with_what_would_fit():
    with pytest.raises(SpecError, match=r"got 80 for a model with 21 classes, expected 20 \(with background\), 21"):
        assign_model_labels(COCO, 21)


def test_a_coco_file_is_read_in_its_order(tmp_path):
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({"categories": [{"id": 5, "name": "b"}, {"id": 2, "name": "a", "supercategory": "x"}]}))
    assert read_categories(path) == (Category(5, "b", -1), Category(2, "a", -1))
    path.write_text(json.dumps([{"id": 1, "name": "only the list"}]))
    assert read_categories(path) == (Category(1, "only the list", -1),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "{}",
        "3",
        "null",
        '{"categories": 3}',
        '{"categories": [{"name": "a"}]}',
        '{"categories": [{"id": "x", "name": "a"}]}',
        '{"categories": ["a"]}',
        '{"categories": []}',
    ],
)
def test_a_file_without_categories_is_refused_by_name(tmp_path, text):
    path = tmp_path / "coco.json"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"categories: .*coco\.json"):
        read_categories(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(SpecError, match=r"nowhere\.json"):
        read_categories(tmp_path / "nowhere.json")
