"""What cuts AP off is refused with what it costs; what does not is let through."""

import numpy as np
import pytest
from dethandlers.detections import Detections
from dettools.coco_metrics import evaluate_coco
from dettools.evaluation.answers import Answer, coco_results
from dettools.evaluation.category_mapping import map_categories
from dettools.evaluation.gate import Limits, limits_of, objections, seen_objections, with_cost
from dettools.ground_truth import CategoryEntry
from small_data_sets import CATEGORIES, answers, data_set

GOOD = Limits(0.001, 100, 0.0)


@pytest.fixture
def truth(tmp_path):
    return data_set(tmp_path, 12)


@pytest.fixture
def mapping(truth):
    return map_categories(CATEGORIES, truth.categories)


def codes(limits, mapping):
    return [one.code for one in objections(limits, mapping)]


def test_good_settings_pass(mapping):
    assert codes(GOOD, mapping) == []
    assert codes(Limits(0.05, 100, None), mapping) == []


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (Limits(0.001, 100, 0.5), "threshold"),
        (Limits(0.051, 100, 0.0), "threshold"),
        (Limits(0.001, 99, 0.0), "max_detections"),
    ],
)
def test_each_setting_that_cuts_ap_off_is_refused(mapping, limits, code):
    assert codes(limits, mapping) == [code]


def test_the_floor_of_the_spec_wins_over_what_is_asked():
    assert limits_of({"min_score_threshold": 0.3}, 0.001, 100).effective_threshold == 0.3
    assert limits_of({"min_score_threshold": 0.0005}, 0.001, 100).effective_threshold == 0.001
    assert limits_of({}, 0.001, 100).floor is None


def test_a_map_that_is_no_bijection_is_refused():
    other = map_categories(CATEGORIES, [CategoryEntry(1, "cat")])

    assert codes(GOOD, other) == ["categories"]


def test_the_cost_is_what_the_cut_answers_score(truth, mapping):
    """Scores are .9, .6 and .3 for the three objects of an image: a threshold of .5 loses the third."""
    whole = answers(truth)
    (objection,) = objections(Limits(0.5, 100, 0.0), mapping)
    priced = with_cost(
        objection, Limits(0.5, 100, 0.0), truth, mapping, lambda: (list(whole.values()), mapping, "in process")
    )

    cut = answers(truth)
    kept = [Answer(one.image_id, one.file_name, one.detections.filtered(0.5, 100)) for one in cut.values()]
    expected = evaluate_coco(truth, coco_results(kept, mapping.category_ids)).ap
    assert priced.cost.ap_without == pytest.approx(1.0)
    assert priced.cost.ap_with == pytest.approx(expected)
    assert 0.6 < expected < 0.72
    assert "It would cost" in priced.sentence()
    assert "on all 12 images" in priced.sentence()


def test_the_cost_of_missing_categories_is_that_they_count_as_nothing(truth):
    only_cats = map_categories(CATEGORIES[:1], truth.categories)
    cats = {
        number: Answer(number, one.file_name, one.detections.take(one.detections.labels == 0))
        for number, one in answers(truth).items()
    }
    (objection,) = objections(GOOD, only_cats)
    priced = with_cost(objection, GOOD, truth, only_cats, lambda: (list(cats.values()), only_cats, "endpoint"))

    assert priced.cost.ap_without == pytest.approx(1.0)
    assert priced.cost.ap_with == pytest.approx(0.5)


def test_without_anything_to_measure_by_there_is_no_cost(truth, mapping):
    (objection,) = objections(Limits(0.5, 100, 0.0), mapping)

    assert with_cost(objection, GOOD, truth, mapping, lambda: None).cost is None


def test_an_endpoint_with_a_threshold_of_its_own_betrays_it(truth):
    above = [Answer(one.image_id, one.file_name, one.detections.filtered(0.5, 100)) for one in answers(truth).values()]

    assert [one.code for one in seen_objections(above, GOOD)] == ["threshold", "max_detections"]
    assert "no score below 0.6" in seen_objections(above, GOOD)[0].message


def test_an_endpoint_that_answers_all_betrays_nothing():
    rng = np.random.default_rng(1)
    free = [
        Answer(number, f"{number}.jpg", Detections(np.ones((count, 4), np.float32), scores, np.zeros(count, np.int64)))
        for number, count in enumerate((3, 7, 12, 5))
        for scores in [np.linspace(0.9, 0.002 + rng.uniform(0, 0.01), count).astype(np.float32)]
    ]

    assert seen_objections(free, GOOD) == []
