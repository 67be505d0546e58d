"""Every image is answered or failed; what may pass is waited for, what is wrong is not asked twice."""

import io
import threading
import time

import pytest
from detserve.errors import ClientError, EndpointError
from dettools.evaluation.answers import Failure, open_journal
from dettools.evaluation.stream import EndpointLostError, RetryPolicy, may_pass, stream
from PIL import Image
from small_data_sets import CATEGORIES, data_set, found

RESTARTING = EndpointError("no worker", status=503, type="no_worker", retryable=True)
WORKER_DIED = EndpointError("Worker died", status=507, type="server_error", retryable=True)
RESET = ClientError("closed the connection", type="reset")
GONE = ClientError("Nothing listens", type="refused")
NO_SUCH_MODEL = EndpointError("no such model", status=404, type="unknown_model")
TOO_LARGE = EndpointError("too many pixels", status=413, type="image_too_large")
QUICK = RetryPolicy(patience_s=2.0, longest_wait_s=0.02)


class Answering:
    """Answers each image from the data set, or as its script says: a list of errors to be raised first."""

    name, categories, facts, batch_size = "scripted", CATEGORIES, {}, 1

    def __init__(self, truth, script=None, concurrency=3):
        self.truth, self.concurrency = truth, concurrency
        self.script = {key: list(value) for key, value in (script or {}).items()}
        self.asked = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()

    def ask(self, images):
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            number = self._number(images[0])
            self.asked.append(number)
            error = self.script[number].pop(0) if self.script.get(number) else None
        time.sleep(0.002)
        with self._lock:
            self._now -= 1
        if isinstance(error, Failure):
            return [error]
        if error is not None:
            raise error
        return [found(self.truth, number)]

    def _number(self, image):
        with Image.open(io.BytesIO(image)) as picture:
            return picture.getpixel((0, 0))[0]


@pytest.fixture
def truth(tmp_path):
    return data_set(tmp_path, 12)


def run(truth, tmp_path, answering, **how):
    files, _ = truth.image_files(tmp_path / "images")
    with open_journal(tmp_path / "out" / "answers.jsonl", {}) as journal:
        stream(answering, truth.images, files, journal, retry=QUICK, **how)
    return journal


def test_every_image_is_answered_once_with_bounded_concurrency(truth, tmp_path):
    answering = Answering(truth, concurrency=3)
    told = []

    journal = run(truth, tmp_path, answering, on_answer=told.append)

    assert sorted(answering.asked) == [image.id for image in truth.images]
    assert answering.most_at_once <= 3
    assert {one.image_id for one in told} == set(journal.answers) == truth.image_ids
    assert all(answer.failure is None for answer in journal.answers.values())


@pytest.mark.parametrize("error", [RESTARTING, WORKER_DIED, RESET, GONE, ClientError("late", type="timeout")])
def test_what_may_pass_is_sent_again_and_noted(truth, tmp_path, error):
    answering = Answering(truth, {4: [error, error]})

    journal = run(truth, tmp_path, answering)

    assert journal.answers[4].failure is None
    assert journal.answers[4].attempts == 3
    assert [(event.image, event.type) for event in journal.events] == [("004.png", error.type)] * 2
    assert all(answer.attempts == 1 for number, answer in journal.answers.items() if number != 4)


def test_an_image_of_which_the_endpoint_says_that_it_is_wrong_fails_alone_and_at_once(truth, tmp_path):
    answering = Answering(truth, {4: [Failure("not_an_image", "got text", 415)], 5: [TOO_LARGE]})

    journal = run(truth, tmp_path, answering)

    assert {number for number, one in journal.answers.items() if one.failure} == {4, 5}
    assert answering.asked.count(4) == answering.asked.count(5) == 1
    assert journal.answers[5].failure == Failure("image_too_large", "too many pixels", 413)


def test_an_image_that_exhausts_our_patience_fails_and_the_others_do_not(truth, tmp_path):
    journal = run(truth, tmp_path, Answering(truth, {4: [RESTARTING] * 10_000}))

    assert [number for number, one in journal.answers.items() if one.failure] == [4]
    assert journal.answers[4].failure.type == "no_worker"


def test_what_every_request_would_get_ends_the_run(truth, tmp_path):
    with pytest.raises(EndpointError, match="no such model"):
        run(truth, tmp_path, Answering(truth, {3: [NO_SUCH_MODEL]}))


def test_a_server_that_is_gone_ends_the_run_with_what_was_answered_kept(truth, tmp_path):
    gone_after_five = {number: [GONE] * 10_000 for number in range(6, 13)}

    with pytest.raises(EndpointLostError, match="start again to go on"):
        run(truth, tmp_path, Answering(truth, gone_after_five, concurrency=1))

    back = Answering(truth)
    journal = run(truth, tmp_path, back)
    assert sorted(back.asked) == list(range(6, 13))
    assert journal.resumed == {1, 2, 3, 4, 5}
    assert {one.image_id for one in journal.answers.values() if one.failure is None} == truth.image_ids


def test_an_interrupted_run_goes_on_where_it_was(truth, tmp_path):
    class InterruptedRunError(Exception):
        pass

    told = []

    def interrupt(answer):
        told.append(answer)
        if len(told) == 4:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        run(truth, tmp_path, Answering(truth), on_answer=interrupt)
    again = Answering(truth)
    journal = run(truth, tmp_path, again)

    assert len(journal.resumed) >= 4
    assert len(again.asked) == 12 - len(journal.resumed)
    assert set(journal.answers) == truth.image_ids


def test_failed_images_are_asked_for_again_by_the_next_run(truth, tmp_path):
    run(truth, tmp_path, Answering(truth, {4: [TOO_LARGE]}))
    again = Answering(truth)

    journal = run(truth, tmp_path, again)

    assert again.asked == [4]
    assert journal.answers[4].failure is None


def test_an_image_without_a_file_fails_and_says_so(truth, tmp_path):
    (tmp_path / "images" / "007.png").unlink()

    journal = run(truth, tmp_path, Answering(truth))

    assert journal.answers[7].failure == Failure("no_file", "007.png is not in the image folder.")
    assert sum(one.failure is None for one in journal.answers.values()) == 11


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (RESTARTING, True),
        (WORKER_DIED, True),
        (RESET, True),
        (TOO_LARGE, False),
        (NO_SUCH_MODEL, False),
        (EndpointError("out of memory", status=507, type="inference_failed", retryable=True), False),
        (ClientError("no JSON", type="bad_answer"), False),
        (ValueError("ours"), False),
    ],
)
def test_only_what_is_safe_and_useful_is_sent_again(error, passes):
    assert may_pass(error) is passes


def test_a_worker_that_never_comes_back_ends_the_run_instead_of_failing_every_image(truth, tmp_path):
    dead = Answering(truth, {number: [RESTARTING] * 10_000 for number in range(3, 13)}, concurrency=2)
    quick = RetryPolicy(patience_s=0.2, longest_wait_s=0.02)
    files, _ = truth.image_files(tmp_path / "images")

    with pytest.raises(EndpointLostError), open_journal(tmp_path / "out" / "answers.jsonl", {}) as journal:
        stream(dead, truth.images, files, journal, retry=quick)

    failed = [one for one in journal.answers.values() if one.failure]
    assert len(failed) <= 2
    assert len(journal.answers) <= 4


def test_patience_counts_from_the_first_error_and_not_from_the_first_attempt(truth, tmp_path):
    """An attempt that timed out after longer than the patience is still followed by another."""

    class Slow(Answering):
        def ask(self, images):
            if self._number(images[0]) == 4 and 4 not in self.asked:
                self.asked.append(4)
                time.sleep(0.4)
                raise ClientError("late", type="timeout")
            return super().ask(images)

    files, _ = truth.image_files(tmp_path / "images")
    with open_journal(tmp_path / "out" / "answers.jsonl", {}) as journal:
        stream(Slow(truth), truth.images, files, journal, retry=RetryPolicy(patience_s=0.3, longest_wait_s=0.02))

    assert (journal.answers[4].failure, journal.answers[4].attempts) == (None, 2)
