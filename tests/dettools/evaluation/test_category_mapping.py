"""A bijection by name passes; everything else is named."""

import pytest
from dethandlers.detections import Category
from dettools.evaluation.category_mapping import map_categories
from dettools.ground_truth import CategoryEntry

MODEL = (Category(1, "cat", 1), Category(2, "dog", 2), Category(5, "car", 3))


def data(*entries):
    return [CategoryEntry(*entry) for entry in entries]


def test_the_same_map_in_another_order_is_a_bijection():
    mapping = map_categories(MODEL, data((5, "car"), (2, "dog"), (1, "cat")))

    assert mapping.category_ids == (1, 2, 5)
    assert (mapping.problem, mapping.note) == ("", "")


def test_other_ids_are_matched_by_name_and_told():
    mapping = map_categories(MODEL, data((0, "cat"), (1, "dog"), (2, "car")))

    assert mapping.category_ids == (0, 1, 2)
    assert mapping.problem == ""
    assert "another category id" in mapping.note


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([(1, "cat"), (2, "dog")], "1 of the model's 3 classes are not in the data set (car)"),
        (
            [(1, "cat"), (2, "dog"), (5, "car"), (6, "bus")],
            "1 of the data set's 4 categories are not in the model (bus)",
        ),
        ([(1, "Cat"), (2, "Dog"), (5, "Car")], "--categories-by id"),
        ([(1, "cat"), (2, "dog"), (5, "car"), (6, "car")], "several categories of the name car"),
    ],
)
def test_what_is_no_bijection_is_named(entries, words):
    assert words in map_categories(MODEL, data(*entries)).problem


def test_by_id_takes_other_names_and_tells_them():
    mapping = map_categories(MODEL, data((1, "Cat"), (2, "dog"), (5, "automobile")), by="id")

    assert mapping.category_ids == (1, 2, 5)
    assert mapping.problem == ""
    assert "cat → Cat" in mapping.note


def test_swapped_names_are_followed_by_name_where_ids_would_be_wrong():
    """Going by id here would call every cat a dog."""
    mapping = map_categories(MODEL, data((1, "dog"), (2, "cat"), (5, "car")))

    assert mapping.category_ids == (2, 1, 5)
    assert "cat, dog" in mapping.note
