"""Accuracy under load: each request is an image of its own."""

import json

import pytest
from detserve.async_client import read_list
from dettools.benchmark.answers import Answers, stage_times
from dettools.benchmark.load import MeasuredLevel
from dettools.benchmark.measurement import Level, Load, Resources, Sample
from dettools.benchmark.scoring import (
    ScoringError,
    check_categories,
    images_by_name,
    one_image_per_request,
    score_level,
)
from dettools.coco_metrics import evaluate_coco
from dettools.ground_truth import ground_truth_of

BOXES = {"a.jpg": [10, 10, 50, 60], "b.jpg": [5, 20, 70, 30]}  # xywh
RIGHT = {name: [x, y, x + w, y + h] for name, (x, y, w, h) in BOXES.items()}


@pytest.fixture
def truth(tmp_path):
    images = [{"id": 5 + n, "file_name": f"val/{name}", "width": 99, "height": 99} for n, name in enumerate(BOXES)]
    annotations = [
        {"id": n + 1, "image_id": 5 + n, "category_id": 3, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, box in enumerate(BOXES.values())
    ]
    document = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "cat"}]}
    return ground_truth_of(document, path=tmp_path / "val.json")


def measured(replies):
    """A level of requests ``(image, detections, raw bytes, or None for a failure)``."""
    answers, samples = Answers(), []
    for number, (image, reply) in enumerate(replies):
        error = "reset" if reply is None else ""
        samples.append(Sample(image, number, number, number + 0.1, 0 if error else 200, error))
        if reply is not None:
            answers.keep(number, reply if isinstance(reply, bytes) else json.dumps(reply).encode())
    return MeasuredLevel(Level(Load("closed", 1), tuple(samples), Resources(1, 1), 1.0, "time"), answers)


def found(image, **other):
    return [{"class_label": 0, "class_name": "cat", "bbox": RIGHT[image], "score": 0.9} | other]


def scored(truth, replies):
    with measured(replies) as level:
        return score_level(level, truth, images_by_name(truth, list(BOXES)), read_list)


def test_a_photograph_sent_often_is_as_many_images(truth):
    """One good answer of five: AP over requests says 0.2; over photographs, the good one would stand for all."""
    level = scored(truth, [("a.jpg", found("a.jpg")), *[("a.jpg", [])] * 4])
    assert level.accuracy.ap_delivered == pytest.approx(0.2, abs=0.011)
    assert (level.accuracy.requests, level.accuracy.failed) == (5, 0)
    wrong = evaluate_coco(
        truth.restricted_to([5]), [{"image_id": 5, "category_id": 3, "bbox": BOXES["a.jpg"], "score": 0.9}]
    )
    assert wrong.ap == pytest.approx(1.0)


def test_what_failed_counts_in_what_was_delivered(truth):
    level = scored(truth, [("a.jpg", found("a.jpg")), ("b.jpg", None), ("b.jpg", found("b.jpg")), ("a.jpg", None)])
    assert level.accuracy.ap_answered == pytest.approx(1.0)
    assert level.accuracy.ap_delivered == pytest.approx(0.5, abs=0.011)
    assert (level.accuracy.requests, level.accuracy.failed) == (4, 2)
    nothing = scored(truth, [("a.jpg", None)])
    assert (nothing.accuracy.ap_answered, nothing.accuracy.ap_delivered) == (0, 0)


@pytest.mark.parametrize(
    "reply", [b"<html>", b'[{"class_name": "cat"}]', b'[{"class_name":"cat","bbox":[1],"score":1}]']
)
def test_an_answer_that_cannot_be_read_becomes_an_error(truth, reply):
    level = scored(truth, [("a.jpg", found("a.jpg")), ("b.jpg", reply)])
    assert [sample.error for sample in level.samples] == ["", "bad_answer"]
    assert level.accuracy.failed == 1


def test_the_answers_own_category_id_wins(truth):
    level = scored(truth, [("a.jpg", found("a.jpg", class_name="Felis catus", category_id=3))])
    assert level.accuracy.ap_answered == pytest.approx(1.0)


def test_other_classes_are_refused_before_the_load_and_told_after_it(truth):
    with pytest.raises(ScoringError, match=r"the class 'dog', expected one of the annotations' \(cat"):
        check_categories(truth, found("a.jpg", class_name="dog"))
    check_categories(truth, found("a.jpg"))
    with pytest.raises(ScoringError, match=r"None of the classes.*: dog"):
        scored(truth, [("a.jpg", found("a.jpg", class_name="dog"))])


def test_pictures_without_annotations_are_refused(truth):
    assert images_by_name(truth, ["b.jpg", "folder/a.jpg"]) == {"b.jpg": 6, "folder/a.jpg": 5}
    with pytest.raises(ScoringError, match=r"no annotations of 1 of 2 images, such as c\.jpg"):
        images_by_name(truth, ["a.jpg", "c.jpg"])


def test_each_request_has_its_own_copy_of_the_annotations(truth):
    expanded = one_image_per_request(truth, [6, 5, 6])
    assert [image.id for image in expanded.images] == [1, 2, 3]
    assert [(one["image_id"], one["bbox"]) for one in expanded.annotations] == [
        (1, BOXES["b.jpg"]),
        (2, BOXES["a.jpg"]),
        (3, BOXES["b.jpg"]),
    ]


def test_the_stage_times_stand_behind_the_detections():
    beside = {"timings_ms": {"decode": 1.5, "forward": 20}, "batch_size": 4, "image_size": [3, 4]}
    body = json.dumps({"detections": [{"class_name": '"timings_ms": {'}], **beside}).encode()
    assert stage_times(body) == ({"decode": 1.5, "forward": 20.0}, 4)
    in_another_order = json.dumps({**beside, "detections": [1]}).encode()
    assert stage_times(in_another_order) == ({"decode": 1.5, "forward": 20.0}, 4)
    for none in (b"[]", b"", b'{"timings_ms": 3}', b'{"timings_ms": {"decode": "x"}}', b'"timings_ms"'):
        assert stage_times(none) is None


def test_answers_are_kept_in_a_file_and_found_by_their_new_numbers():
    with Answers() as answers:
        for number, body in enumerate((b"zero", b"", b"two" * 100_000)):
            answers.keep(number, body)
        answers.renumber({2: 0, 0: 1, 7: 2})
        assert (answers.body(0), answers.body(1), len(answers), 2 in answers) == (b"two" * 100_000, b"zero", 2, False)
