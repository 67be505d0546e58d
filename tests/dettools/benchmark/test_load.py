"""What the load generator sends, when, and what it keeps: schedule, bounds, cap, drain, Ctrl-C, tokens."""

import os
import signal

import numpy as np
import pytest
from detserve.async_client import Target
from detserve.errors import DetserveError
from dettools.benchmark.load import Bounds, Picture, run_load
from dettools.benchmark.measurement import Load
from dettools.benchmark.schedule import arrival_times, image_order
from faulty_server import FaultyServer

PICTURES = [Picture(f"{number}.jpg", f"{number}.jpg".encode()) for number in range(7)]
SHORT = Bounds(min_time_s=0.6, max_time_s=0.6, window_s=0.2, drain_s=3)


@pytest.fixture(scope="module")
def server():
    with FaultyServer({}).running() as running:
        yield running


@pytest.fixture
def target(server):
    server.begin()
    server.service_s = 0.0
    return Target.served(server.url, "model")


def level_of(target, load, bounds=SHORT, **options):
    with run_load(target, PICTURES, load, bounds, **options) as measured:
        return measured.level


@pytest.mark.parametrize("arrivals", ["poisson", "constant"])
def test_an_open_loop_follows_its_schedule_to_the_request(target, arrivals):
    level = level_of(target, Load("open", 60, arrivals), seed=4)
    due = [sample.scheduled_s for sample in level.samples]
    np.testing.assert_array_equal(due, arrival_times(60, arrivals, 0.6, seed=4))
    order = image_order(len(PICTURES), 4)
    assert [sample.image for sample in level.samples] == [PICTURES[next(order)].name for _ in due]
    assert all(sample.sent_s >= sample.scheduled_s for sample in level.samples)
    assert all(sample.ok for sample in level.samples)


def test_a_slow_server_does_not_slow_an_open_loop(server, target):
    """50 requests a second to a server that answers 10: the queue grows, the sending does not wait for it."""
    server.service_s = 0.1
    level = level_of(target, Load("open", 50, "constant"), Bounds(0.6, 0.6, 0.2, drain_s=10))
    assert len(level.samples) == 30
    assert level.stopped == "time"
    # The k-th request is done after k turns of the worker, and was due at k / 50: arithmetic, not luck.
    last = level.samples[-1]
    assert last.done_s >= 30 * 0.1
    assert last.latency_ms >= 2400
    assert np.median([sample.sent_s - sample.scheduled_s for sample in level.samples]) < 0.05


def test_a_closed_loop_keeps_so_many_in_flight(server, target):
    server.service_s = 0.01
    level = level_of(target, Load("closed", 3))
    times = np.array([(sample.sent_s, sample.done_s) for sample in level.samples])
    in_flight = [((times[:, 0] <= at) & (at < times[:, 1])).sum() for at in times[3:-3, 0] + 1e-9]
    assert max(in_flight) == 3
    assert level.stopped == "time"


def test_beyond_the_cap_requests_are_counted_not_delayed(server, target):
    server.begin(silent=True)
    bounds = Bounds(0.6, 0.6, 0.2, drain_s=0.1, most_in_flight=8)
    level = level_of(target, Load("open", 50, "constant"), bounds)
    words = [sample.error for sample in level.samples]
    assert words == ["unanswered"] * 8 + ["client_overflow"] * 22
    assert {sample.status for sample in level.samples} == {0}


def test_what_has_no_answer_at_the_end_of_the_drain_is_told(server, target):
    server.begin(silent=True)
    level = level_of(target, Load("closed", 4), Bounds(0.3, 0.3, 0.1, drain_s=0.3))
    assert [sample.error for sample in level.samples] == ["unanswered"] * 4
    assert min(sample.latency_ms for sample in level.samples) >= 500
    assert level.resources.wall_s < 5


def test_a_timeout_is_told(server, target):
    server.begin(silent=True)
    level = level_of(target, Load("open", 20, "constant"), Bounds(0.3, 0.3, 0.1, timeout_s=0.5))
    assert {(sample.status, sample.error) for sample in level.samples} == {(0, "timeout")}


def test_nothing_listens():
    nobody = Target.served("http://127.0.0.1:9", "model")
    level = level_of(nobody, Load("closed", 2))
    assert {(sample.status, sample.error) for sample in level.samples} == {(0, "refused")}
    assert len(level.samples) < 20  # a user who is refused waits a little


def test_a_stable_level_ends_early_but_not_before_its_shortest_time(target):
    bounds = Bounds(0.4, 5.0, 0.1)
    seen = []

    def stable(samples, elapsed_s):
        seen.append((len(samples), elapsed_s))
        return True

    level = level_of(target, Load("closed", 1), bounds, stable=stable)
    assert level.stopped == "stable"
    assert [elapsed for _, elapsed in seen] == [pytest.approx(0.4)]
    few = level_of(target, Load("closed", 1), Bounds(0.2, 0.6, 0.2, min_samples=10**6), stable=stable)
    assert few.stopped == "time"  # not before there are enough samples


def ctrl_c(*_):
    """As a level's ``on_progress``: Ctrl-C at the end of its first window, however slow the machine is."""
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("load", [Load("closed", 2), Load("open", 50, "poisson")], ids=["closed", "open"])
def test_ctrl_c_ends_the_level_and_keeps_what_there_is(target, load):
    level = level_of(target, load, Bounds(20, 20, 0.5), on_progress=ctrl_c)
    assert level.stopped == "interrupted"
    assert len(level.samples) >= 5
    assert all(sample.ok for sample in level.samples)
    assert max(sample.scheduled_s for sample in level.samples) < 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_does_not_wait_for_what_never_comes(server, target):
    server.begin(silent=True)
    level = level_of(target, Load("closed", 2), Bounds(20, 20, 0.3, drain_s=60), on_progress=ctrl_c)
    assert (level.stopped, level.samples) == ("interrupted", ())
    assert level.resources.wall_s < 10


def test_a_token_that_runs_out_in_the_middle_of_a_level_is_renewed_once(server):
    server.begin(token="first")
    asked = []

    def token():
        asked.append(server.faults.token)
        return server.faults.token

    target = Target.served(server.url, "model", token=token)
    level = level_of(target, Load("closed", 6), on_progress=lambda *_: setattr(server.faults, "token", "second"))
    assert asked == ["first", "second"]
    assert {(sample.status, sample.error) for sample in level.samples} == {(200, "")}


def test_a_wrong_token_is_an_error_not_an_endless_loop(server):
    server.begin(token="right")
    level = level_of(Target.served(server.url, "model", token=lambda: "wrong"), Load("closed", 1))
    assert {(sample.status, sample.error) for sample in level.samples} == {(400, "unauthorized")}


def test_a_foreign_server_takes_its_own_path_and_body(server):
    server.begin()
    bodies = []
    target = Target(server.url, "/infer", encode=lambda image: bodies.append(image) or b"wrapped " + image)
    level = level_of(target, Load("closed", 1))
    assert set(server.asked) == {"/infer"}
    assert {sample.request_bytes for sample in level.samples} == {len(b"wrapped 0.jpg")}


def test_an_encoder_that_fails_is_not_swallowed(server):
    target = Target(server.url, "/infer", encode=lambda _: 1 // 0)
    for load in (Load("closed", 2), Load("open", 50, "constant")):
        with pytest.raises(ZeroDivisionError):
            level_of(target, load)


@pytest.mark.parametrize(
    ("load", "pictures", "said"),
    [
        (Load("closed", 1), [], "no images"),
        (Load("closed", 1.5), PICTURES, "whole number"),
        (Load("closed", 0), PICTURES, "whole number"),
        (Load("open", 5), PICTURES, "poisson or constant"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused(load, pictures, said):
    with pytest.raises(DetserveError, match=said):
        run_load(Target("http://127.0.0.1:9", "/"), pictures, load)


def test_bounds_that_make_no_sense_are_refused():
    with pytest.raises(DetserveError, match="--window"):
        Bounds(min_time_s=5, max_time_s=2, window_s=1)
    with pytest.raises(DetserveError, match="--window"):
        Bounds(min_time_s=1, max_time_s=2, window_s=3)
