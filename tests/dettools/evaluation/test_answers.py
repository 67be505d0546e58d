"""The journal: every answer is on disk when its image is done, and comes back bit by bit."""

import json

import numpy as np
import pytest
from dethandlers.detections import Detections
from dettools.evaluation.answers import Answer, Event, Failure, JournalError, coco_results, open_journal

IDENTITY = {"answerer": "shapes", "score_threshold": 0.001}
RNG = np.random.default_rng(0)


def detections(count: int = 4) -> Detections:
    corners = RNG.uniform(0, 300, (count, 2))
    boxes = np.hstack([corners, corners + RNG.uniform(1, 100, (count, 2))]).astype(np.float32)
    return Detections(boxes, RNG.uniform(0, 1, count).astype(np.float32), RNG.integers(0, 5, count))


def test_answers_come_back_bit_by_bit(tmp_path):
    masks = [{"size": [3, 4], "counts": "abc"}] * 4
    full = Detections(*(getattr(detections(), name) for name in ("boxes_xyxy", "scores", "labels")), masks=masks)
    given = [Answer(1, "a.jpg", detections(), attempts=3), Answer(2, "b.jpg", full), Answer(3, "c.jpg", detections(0))]
    with open_journal(tmp_path / "j.jsonl", IDENTITY) as journal:
        for answer in given:
            journal.add(answer)

    with open_journal(tmp_path / "j.jsonl", IDENTITY) as journal:
        for answer in given:
            back = journal.answers[answer.image_id]
            assert np.array_equal(back.detections.boxes_xyxy, answer.detections.boxes_xyxy)
            assert np.array_equal(back.detections.scores, answer.detections.scores)
            assert np.array_equal(back.detections.labels, answer.detections.labels)
            assert back.detections.masks == answer.detections.masks
            assert (back.attempts, back.failure) == (answer.attempts, None)
        assert journal.resumed == {1, 2, 3}


def test_a_failed_image_stays_failed_and_is_no_empty_one(tmp_path):
    with open_journal(tmp_path / "j.jsonl", IDENTITY) as journal:
        journal.add(Answer(1, "a.jpg", failure=Failure("timeout", "No answer", None)))
        journal.add(Answer(2, "b.jpg", detections(0)))
        journal.note(Event(1.5, "a.jpg", "reset", None, "cut"))

    with open_journal(tmp_path / "j.jsonl", IDENTITY) as journal:
        assert journal.answers[1].failure == Failure("timeout", "No answer", None)
        assert journal.answers[1].detections is None
        assert len(journal.answers[2].detections) == 0
        assert journal.resumed == {2}
        assert journal.events == [Event(1.5, "a.jpg", "reset", None, "cut")]


def test_a_line_cut_in_two_is_dropped_and_written_over(tmp_path):
    path = tmp_path / "j.jsonl"
    with open_journal(path, IDENTITY) as journal:
        journal.add(Answer(1, "a.jpg", detections()))
        journal.add(Answer(2, "b.jpg", detections()))
    path.write_bytes(path.read_bytes()[:-30])

    with open_journal(path, IDENTITY) as journal:
        assert list(journal.answers) == [1]
        journal.add(Answer(2, "b.jpg", detections()))

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("image_id") for line in lines] == [None, 1, 2]


def test_answers_of_another_model_are_not_mixed_in(tmp_path):
    with open_journal(tmp_path / "j.jsonl", IDENTITY) as journal:
        journal.add(Answer(1, "a.jpg", detections()))

    with (
        pytest.raises(JournalError, match=r"score_threshold: 0\.001 there, 0\.05 now.*--fresh"),
        open_journal(tmp_path / "j.jsonl", {**IDENTITY, "score_threshold": 0.05}),
    ):
        pass
    with open_journal(tmp_path / "j.jsonl", {**IDENTITY, "score_threshold": 0.05}, fresh=True) as journal:
        assert journal.answers == {}


@pytest.mark.parametrize("content", ["no journal\n", '{"other": 1}\n', '{"journal": 1}\n', "[]\n"])
def test_another_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "j.jsonl"
    path.write_text(content)

    with pytest.raises(JournalError, match="--out"), open_journal(path, IDENTITY):
        pass
    assert path.read_text() == content


def test_results_are_coco_results():
    boxes = np.array([[10, 20, 40, 60], [0, 0, 5, 5]], np.float32)
    answer = Answer(7, "a.jpg", Detections(boxes, np.array([0.9, 0.5], np.float32), np.array([1, 0])))

    assert coco_results([answer, Answer(8, "b.jpg", failure=Failure("x", "y"))], [None, 17]) == [
        {"image_id": 7, "category_id": 17, "bbox": [10, 20, 30, 40], "score": pytest.approx(0.9)}
    ]


def test_a_finished_evaluation_is_not_gone_on_with(tmp_path):
    """The endpoint may have changed since: the next run asks anew."""
    path = tmp_path / "j.jsonl"
    with open_journal(path, IDENTITY) as journal:
        journal.add(Answer(1, "a.jpg", detections()))
        journal.complete()

    with open_journal(path, IDENTITY) as journal:
        assert (journal.answers, journal.resumed, journal.events) == ({}, frozenset(), [])
        journal.add(Answer(2, "b.jpg", detections()))
    with open_journal(path, IDENTITY) as journal:
        assert list(journal.answers) == [2]


def test_labels_that_nobody_knows_are_no_category():
    boxes = np.array([[10, 20, 40, 60]] * 3, np.float32)
    answer = Answer(7, "a.jpg", Detections(boxes, np.array([0.9, 0.5, 0.4], np.float32), np.array([-1, 5, 0])))

    assert [one["category_id"] for one in coco_results([answer], [3, 4])] == [3]
