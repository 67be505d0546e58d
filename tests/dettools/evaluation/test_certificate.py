"""Equality is shown, not assumed: equal sides pass, a loss fails, too few images decide nothing."""

import numpy as np
import pytest
from dethandlers.detections import Detections
from dettools.evaluation.answers import Answer
from dettools.evaluation.category_mapping import map_categories
from dettools.evaluation.certificate import Side, certify
from small_data_sets import CATEGORIES, answers, data_set, failed


@pytest.fixture
def truth(tmp_path):
    return data_set(tmp_path, 40)


def sides(truth, served, reference=None):
    mapping = map_categories(CATEGORIES, truth.categories)
    return Side("eager", reference or noisy(truth), mapping), Side("served", served, mapping)


def noisy(truth, *, seed=0, extra=0.0):
    """Answers as a detector gives them: moved boxes, uneven scores; ``extra`` px more on every box."""
    rng = np.random.default_rng(seed)
    result = {}
    for number, one in answers(truth).items():
        boxes = one.detections.boxes_xyxy + rng.normal(0, 3, (3, 4)).astype(np.float32)
        scores = np.sort(rng.uniform(0.1, 0.95, 3).astype(np.float32))[::-1].copy()
        result[number] = Answer(
            number, one.file_name, Detections(boxes + np.float32(extra), scores, one.detections.labels)
        )
    return result


def run(truth, reference, served, **how):
    ids = [image.id for image in truth.images]
    return certify(truth, reference, served, ids, score_threshold=0.001, max_detections=100, resamples=400, **how)


def test_equal_sides_are_certified(truth):
    certificate = run(truth, *sides(truth, noisy(truth)))

    assert certificate.outcome == "equivalent"
    assert (certificate.difference, certificate.low, certificate.high) == (0, 0, 0)
    assert certificate.p_lower == certificate.p_upper == pytest.approx(1 / 401)
    assert certificate.counterexamples == ()
    assert "served = reference within ±0.1 AP at 95 %" in certificate.sentence()


def test_rounding_is_certified_and_differs_bit_by_bit(truth):
    certificate = run(truth, *sides(truth, noisy(truth, extra=1e-3)))

    assert certificate.passed
    assert certificate.comparison.tier == "numeric"


def test_a_loss_is_found_with_its_images_and_reason_codes(truth):
    served = noisy(truth)
    for number in (3, 8, 21):
        kept = served[number].detections.take(np.array([2]))
        served[number] = Answer(number, served[number].file_name, kept)

    certificate = run(truth, *sides(truth, served))

    assert not certificate.passed
    assert certificate.difference < -0.01
    assert {one.image for one in certificate.counterexamples} == {"003.png", "008.png", "021.png"}
    assert all(one.reasons == ("missing",) and one.ap_effect < 0 for one in certificate.counterexamples)


def test_a_shift_of_every_box_is_different_beyond_the_margin(truth):
    certificate = run(truth, *sides(truth, noisy(truth, extra=6.0)))

    assert certificate.outcome == "different"
    assert certificate.high < -0.001
    assert "box_drift" in certificate.counterexamples[0].reasons


def test_no_difference_found_on_few_images_is_no_certificate(tmp_path):
    """Differences that cancel: ΔAP near 0, and yet nothing is shown. A t-test's 'not significant' would pass this."""
    truth = data_set(tmp_path, 6)
    certificate = run(truth, *sides(truth, noisy(truth, seed=1), noisy(truth, seed=2)))

    assert certificate.outcome == "undecided"
    assert certificate.low < 0 < certificate.high
    assert "More images decide it" in certificate.sentence()


def test_a_failed_image_forbids_the_certificate(truth):
    served = noisy(truth)
    served[5] = failed(served[5])

    certificate = run(truth, *sides(truth, served))

    assert certificate.outcome == "incomplete"
    assert certificate.failed == 1
    assert certificate.difference < 0
    assert certificate.counterexamples[0].reasons == ("request_failed",)


def test_a_wider_margin_certifies_what_a_narrow_one_does_not(truth):
    served = noisy(truth, extra=0.4)

    assert not run(truth, *sides(truth, served), margin=0.001).passed
    assert run(truth, *sides(truth, served), margin=0.2).passed


def test_the_json_says_how_it_was_done(truth):
    document = run(truth, *sides(truth, noisy(truth))).to_json()

    assert document["passed"] is True
    assert document["interval_confidence"] == pytest.approx(0.9)
    assert document["method"] == "paired bootstrap over images, two one-sided tests"
    assert document["images"] == 40
