"""The load generator against servers that are faulty on purpose, over real sockets: every fault is found."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from detserve.async_client import Target
from dettools.benchmark.load import Bounds, Picture, run_load
from dettools.benchmark.measurement import Load
from dettools.benchmark.scoring import images_by_name, score_level
from dettools.benchmark.statistics import summarise
from dettools.ground_truth import load_ground_truth
from faulty_server import FaultyServer

NAMES = [f"{number:02d}.jpg" for number in range(20)]
PICTURES = [Picture(name, name.encode()) for name in NAMES]


def objects(number: int) -> list[dict[str, object]]:
    """What picture ``number`` holds: two boxes that no other picture has."""
    first = [10.0 + number, 20.0, 60.0 + number, 90.0]
    second = [100.0, 30.0 + number, 180.0, 140.0 + number]
    return [
        {"class_label": 0, "class_name": "cat", "bbox": first, "score": 0.9},
        {"class_label": 1, "class_name": "dog", "bbox": second, "score": 0.8},
    ]


@pytest.fixture(scope="module")
def server():
    with FaultyServer({name: objects(number) for number, name in enumerate(NAMES)}).running() as running:
        yield running


@pytest.fixture(scope="module")
def ground_truth(tmp_path_factory):
    categories = [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}]
    annotations = []
    for number in range(len(NAMES)):
        for one, category in zip(objects(number), (7, 9), strict=True):
            x1, y1, x2, y2 = one["bbox"]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number + 1, "category_id": category, "iscrowd": 0}
                | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            )
    images = [{"id": n + 1, "file_name": name, "width": 200, "height": 200} for n, name in enumerate(NAMES)]
    path = tmp_path_factory.mktemp("truth") / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return load_ground_truth(path)


def level_of(server, load, seconds=1.0, **options):
    target = Target.served(server.url, "model", options={"timings": True})
    bounds = Bounds(min_time_s=seconds, max_time_s=seconds, window_s=seconds, drain_s=5, timeout_s=10)
    with run_load(target, PICTURES, load, bounds, **options) as measured:
        return measured.level


class TestAStall:
    """The worker stands still for 0.5 s of 4 s."""

    STALL = (1.5, 2.0)

    @pytest.fixture(scope="class")
    @classmethod
    def open_loop(cls, server):
        server.begin(stall=cls.STALL)
        return level_of(server, Load("open", 50, "constant"), 4.0)

    @pytest.fixture(scope="class")
    @classmethod
    def closed_loop(cls, server):
        server.begin(stall=cls.STALL)
        return level_of(server, Load("closed", 1), 4.0)

    def test_the_open_loop_shows_it(self, open_loop):
        """Of 200 requests, the ten due in the stall's first 0.2 s wait for 0.3 s or more: 5 %, so p99 is above that."""
        assert len(open_loop.samples) == 200
        waited = [sample.latency_ms for sample in open_loop.samples]
        assert sum(one >= 300 for one in waited) >= 10 - 1  # the first may be sent before the stall, or after
        assert np.percentile(waited, 99) >= 300

    def test_the_closed_loop_hides_it(self, closed_loop):
        """One user meets one stall once: one of hundreds of requests, which p99 does not see."""
        waited = np.array([sample.latency_ms for sample in closed_loop.samples])
        assert len(waited) > 200
        assert 1 <= (waited >= 300).sum() <= 0.01 * len(waited)
        assert np.percentile(waited, 99) < 300

    def test_sent_to_done_would_hide_it_in_the_open_loop_too_if_the_client_waited(self, open_loop):
        """The wrong figure beside the right one: a client that waits for each answer before it sends the next request,
        and counts from the sending, has one slow request where its users had dozens."""
        due = np.array([sample.scheduled_s for sample in open_loop.samples])
        start = due[0]
        sent, done, now = [], [], start
        for at in due:
            now = max(now, at)
            sent.append(now)
            stalled = self.STALL[0] <= now - start < self.STALL[1]
            now = start + self.STALL[1] if stalled else now + 0.001
            done.append(now)
        wrong = (np.array(done) - np.array(sent)) * 1e3
        right = (np.array(done) - due) * 1e3
        assert (np.percentile(wrong, 99) < 300, np.percentile(right, 99) > 300) == (True, True)

    def test_the_server_had_all_requests_though_it_stalled(self, open_loop):
        """The generator went on sending on schedule: none of the requests in the stall was held back by the client."""
        late = np.array([sample.sent_s - sample.scheduled_s for sample in open_loop.samples])
        assert np.median(late) < 0.02
        assert sum(sample.sent_s < self.STALL[1] for sample in open_loop.samples) >= 95


class TestDroppedImages:
    """Every tenth image."""

    DROPPED = frozenset(NAMES[9::10])

    @pytest.mark.parametrize(
        ("fault", "status", "word"), [("broken", 0, "reset"), ("failing", 500, "inference_failed")]
    )
    @pytest.mark.parametrize("load", [Load("closed", 4), Load("open", 100, "poisson")], ids=["closed", "open"])
    def test_each_is_counted_by_its_code(self, server, fault, status, word, load):
        server.begin(**{fault: self.DROPPED})
        level = level_of(server, load)
        expected = {s.image: (status, word) if s.image in self.DROPPED else (200, "") for s in level.samples}
        assert {s.image: (s.status, s.error) for s in level.samples} == expected
        dropped = sum(sample.image in self.DROPPED for sample in level.samples)
        assert dropped >= 2
        assert summarise(level, resamples=0).errors == {word: dropped}
        # Nothing is tried again: the server saw each request once.
        assert len(server.asked) == len(level.samples)


class TestShedding:
    """With more than two requests in its queue the server says that it found nothing, status 200."""

    @pytest.fixture(scope="class")
    @classmethod
    def levels(cls, server, ground_truth):
        server.begin(shed_over=2)
        server.service_s = 0.02
        target = Target.served(server.url, "model", options={"timings": True})
        found = {}
        for users in (1, 12):
            bounds = Bounds(min_time_s=1, max_time_s=1, window_s=1)
            with run_load(target, PICTURES, Load("closed", users), bounds, keep_answers=True) as measured:
                found[users] = score_level(measured, ground_truth, images_by_name(ground_truth, NAMES), target.read)
        server.service_s = 0.0
        return found

    def test_the_status_says_nothing(self, levels):
        for level in levels.values():
            assert {(sample.status, sample.error) for sample in level.samples} == {(200, "")}

    def test_the_accuracy_tells_it_per_level(self, levels):
        assert levels[1].accuracy.ap_answered == pytest.approx(1.0)
        assert levels[1].accuracy.ap_delivered == pytest.approx(1.0)
        assert levels[12].accuracy.ap_answered < 0.7
        assert levels[12].accuracy.requests == len(levels[12].samples)
        assert levels[12].accuracy.failed == 0

    def test_the_throughput_alone_would_praise_it(self, levels):
        assert len(levels[12].samples) > 2 * len(levels[1].samples)


def test_a_failed_request_costs_delivered_ap_only(server, ground_truth):
    server.begin(failing=frozenset(NAMES[::4]))
    target = Target.served(server.url, "model", options={"timings": True})
    bounds = Bounds(min_time_s=1, max_time_s=1, window_s=1)
    with run_load(target, PICTURES, Load("closed", 2), bounds, keep_answers=True) as measured:
        level = score_level(measured, ground_truth, images_by_name(ground_truth, NAMES), target.read)
    failed = sum(not sample.ok for sample in level.samples)
    assert level.accuracy.failed == failed > 0
    assert level.accuracy.ap_answered == pytest.approx(1.0)
    # All found are right, and the others are missed: AP is COCO's interpolated recall, at 101 points.
    recall = 1 - failed / len(level.samples)
    assert level.accuracy.ap_delivered == pytest.approx(recall, abs=0.011)


def test_the_split_and_the_order_of_the_samples(server):
    server.begin()
    level = level_of(server, Load("closed", 3), timings=True)
    assert all(sample.stages_ms["forward"] == 3.0 and sample.batch_size == 1 for sample in level.samples)
    assert all(one.scheduled_s <= two.scheduled_s for one, two in pairwise(level.samples))
    assert set(server.asked) == {"/model/predict?timings=true"}
    counts = Counter(sample.image for sample in level.samples)
    assert max(counts.values()) - min(counts.values()) <= 1  # each pass sends each picture once
