"""The peers' table: medians, ratios and marks from known figures; the run itself needs minutes and the network."""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from checkout import ROOT
from detserve.errors import ClientError, DetserveError

PEERS = ROOT / "benchmarks" / "peers"


def module(name: str) -> ModuleType:
    """Import a module of the benchmark, which is a program and no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PEERS))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def standings() -> ModuleType:
    return module("standings")


def figure(standings, server, turn, rps, latencies, *, concurrency=8, errors=None):
    return standings.Figure(
        server=server,
        round=turn,
        concurrency=concurrency,
        throughput_rps=rps,
        latencies_ms=tuple(latencies),
        requests=len(latencies) + sum((errors or {}).values()),
        errors=errors or {},
        client_cpu_ms=0.3,
        server_cpu_ms=20.0 + turn,
    )


def three_rounds(standings):
    """Ours 30, 40, 20 req/s beside 10, 20, 5: the machine halved in the last round, for both."""
    ours = [(1, 30.0), (2, 40.0), (3, 20.0)]
    theirs = [(1, 10.0), (2, 20.0), (3, 5.0)]
    figures = [figure(standings, "ours", turn, rps, range(1, 101)) for turn, rps in ours]
    return figures + [figure(standings, "peer", turn, rps, range(2, 202, 2)) for turn, rps in theirs]


def test_throughput_is_the_median_and_its_ratio_that_of_the_rounds(standings):
    ours, peer = standings.standings(three_rounds(standings), "ours")
    assert (ours.throughput_rps.median, ours.throughput_rps.least, ours.throughput_rps.greatest) == (30, 20, 40)
    assert peer.throughput_rps.median == 10
    # Within the rounds 3, 2 and 4; the ratio of the best to the best (2), or of the sums (2.57), would be another.
    assert (peer.throughput_ratio.median, peer.throughput_ratio.least, peer.throughput_ratio.greatest) == (3, 2, 4)
    assert ours.throughput_ratio is None
    assert peer.server_cpu_ms == 22
    assert peer.rounds == 3


def test_latencies_are_pooled_over_the_rounds_and_the_ratio_is_of_the_pools(standings):
    ours, peer = standings.standings(three_rounds(standings), "ours")
    assert ours.p99_ms == pytest.approx(np.percentile(np.tile(np.arange(1, 101), 3), 99))
    assert peer.p99_ms == pytest.approx(2 * ours.p99_ms)
    assert peer.p99_ratio == pytest.approx(0.5)
    assert ours.p99_ratio is None
    assert peer.p99_rough  # 300 answers; its interval needs 368


def test_a_round_that_one_server_missed_is_left_out_of_the_ratio(standings):
    figures = [one for one in three_rounds(standings) if (one.server, one.round) != ("peer", 1)]
    _, peer = standings.standings(figures, "ours")
    assert peer.throughput_ratio.median == pytest.approx((2 + 4) / 2)
    (alone,) = standings.standings([one for one in figures if one.server == "peer"], "ours")
    assert alone.throughput_ratio is None
    assert alone.p99_ratio is None


def test_a_server_that_answers_nothing_has_no_ratio_and_its_errors_are_counted(standings):
    figures = [
        figure(standings, "ours", 1, 10.0, [5.0, 6.0]),
        figure(standings, "peer", 1, 0.0, [], errors={"reset": 3, "timeout": 1}),
    ]
    _, peer = standings.standings(figures, "ours")
    assert peer.throughput_ratio is None
    assert peer.p99_ms is None
    assert peer.errors == {"reset": 3, "timeout": 1}
    assert peer.requests == 4
    json.dumps(peer.to_json())


def test_concurrencies_come_in_order_and_apart(standings):
    figures = [
        figure(standings, server, 1, rps, [1.0], concurrency=concurrency)
        for server, concurrency, rps in (("ours", 8, 8.0), ("ours", 1, 4.0), ("peer", 8, 2.0), ("peer", 1, 2.0))
    ]
    rows = standings.standings(figures, "ours")
    assert [(row.concurrency, row.server) for row in rows] == [(1, "ours"), (1, "peer"), (8, "ours"), (8, "peer")]
    assert [row.throughput_ratio.median for row in rows if row.server == "peer"] == [2, 4]


def test_the_page_marks_what_is_not_comparable(standings):
    contest, page = module("contest"), module("page")
    entrants = [
        contest.Entrant("ours", "ours 1.0", "defaults"),
        contest.Entrant("peer", "peer 2.0", "its own", difference="1 of 8 images differ (a.jpg: missing)"),
        contest.Entrant("gone", "gone", failure="gone does not start\n(no answer)"),
    ]
    environment = {
        "date": "2026-01-02T03:04:05+00:00",
        "cpu": {"model": "Some CPU", "usable_cores": 2},
        "memory_gb": 8,
        "os": "Linux",
        "python": "CPython 3",
        "packages": {"torch": "2"},
        "java": None,
    }
    plan = contest.Plan(3, (8,), 10.0, 4.0)
    text = page.markdown_page(
        entrants, standings.standings(three_rounds(standings), "ours"), plan, environment, "9 images"
    )
    (ours,) = re.findall(r"^\| ours.*$", text, re.MULTILINE)
    (peer,) = re.findall(r"^\| peer.*$", text, re.MULTILINE)
    assert ours == "| ours 1.0 | 30.0 (20.0–40.0) | – | 50.5 | ~99.0 | – | 0 | 22.0, 0.30 | = |"
    assert peer.endswith("| 10.0 (5.0–20.0) | 3.00 (2.00–4.00) | 101.0 | ~198.0 | 0.50 | 0 | 22.0, 0.30 | **≠** |")
    assert "gone does not start (no answer)" in text
    assert "1 of 8 images differ" in text


@pytest.mark.parametrize(
    ("share", "said"),
    [(None, "is not known"), (0.04, "at most 4% of the cores in any level\n"), (0.4, "at most 40%")],
)
def test_the_page_says_what_others_took_of_the_machine(standings, share, said):
    contest, page = module("contest"), module("page")
    row = dataclasses.replace(figure(standings, "ours", 1, 1.0, [1.0]), others_share=share)
    environment = {
        "date": "2026-01-02",
        "cpu": {"model": "", "usable_cores": 2},
        "memory_gb": 8,
        "os": "",
        "python": "",
    }
    text = page.markdown_page(
        [contest.Entrant("ours", "ours")],
        standings.standings([row], "ours"),
        contest.Plan(1, (8,), 1.0, 1.0),
        {**environment, "packages": {}, "java": None},
        "",
        "only a trial",
    )
    assert said in text
    assert ("measure again" in text) == (share == 0.4)
    assert "**only a trial**" in text


def test_a_server_that_fails_leaves_the_others_measured():
    contest = module("contest")

    def broken(turn):
        raise DetserveError("it does not start")

    entrants, figures = contest.contest({"broken": broken}, [], None, contest.Plan(2, (1,), 1.0, 1.0))
    assert figures == []
    assert [one.failure for one in entrants] == ["it does not start"]


def test_ctrl_c_keeps_the_rounds_that_are_done(monkeypatch, standings):
    contest = module("contest")
    levels = iter([None, "first", None, KeyboardInterrupt])

    def level(*_):
        found = next(levels)
        if found is KeyboardInterrupt:
            raise found
        return found

    @contextlib.contextmanager
    def opened(turn):
        yield SimpleNamespace(title="one", settings="its own")

    monkeypatch.setattr(contest, "_level", level)
    monkeypatch.setattr(contest, "_figure", lambda name, turn, _: figure(standings, name, turn, 9.0, [1.0]))
    monkeypatch.setattr(contest, "disagreement", lambda *_: "")
    entrants, figures = contest.contest({"one": opened}, [], None, contest.Plan(3, (8,), 1.0, 1.0))
    assert [one.round for one in figures] == [1]
    assert [one.title for one in entrants] == ["one"]


def test_detections_are_compared_with_eagers(monkeypatch):
    from dethandlers.detections import Detections
    from dettools.benchmark.load import Picture

    contest = module("contest")
    box = np.array([[1, 2, 30, 40]], np.float32)
    reference = Detections(box, np.array([0.9], np.float32), np.array([2], np.int64))
    eager = SimpleNamespace(detect=lambda *_: reference)
    endpoint = SimpleNamespace(target=None, score_threshold=0.05)
    answered = {"class_label": 2, "class_name": "triangle", "bbox": [1, 2, 30, 40], "score": 0.9}
    pictures = [Picture("a.jpg", b"a"), Picture("b.jpg", b"b")]

    monkeypatch.setattr(contest, "answers", lambda *_: [[answered], [answered]])
    assert contest.disagreement(endpoint, pictures, eager) == ""
    monkeypatch.setattr(contest, "answers", lambda *_: [[answered], [answered | {"class_label": 1}]])
    assert contest.disagreement(endpoint, pictures, eager).startswith("1 of 2 images differ (b.jpg: ")
    monkeypatch.setattr(contest, "answers", lambda *_: [[], [answered | {"bbox": [1, 2, 30, 44]}]])
    assert contest.disagreement(endpoint, pictures, eager).startswith("2 of 2 images differ")


def test_foreign_answers_are_read_as_ours():
    peers = module("peers")
    one = {"class_label": 3, "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.75}
    assert peers.read_object_detector(b'[{"star": [1.0, 2.0, 3.0, 4.0], "score": 0.75}]') == [one]
    assert peers.read_first(json.dumps([[one]]).encode()) == [one]
    for read in (peers.read_object_detector, peers.read_first):
        with pytest.raises(ClientError, match="Expected"):
            read(b'{"error": "no"}')


def test_the_form_holds_the_image_as_it_is():
    parts = module("peers").form("image")
    body = parts["encode"](b"\xff\xd8 jpeg \r\n bytes")
    boundary = parts["content_type"].partition("boundary=")[2].encode()
    head, _, rest = body.partition(b"\r\n\r\n")
    assert b'name="image"' in head
    assert rest == b"\xff\xd8 jpeg \r\n bytes\r\n--" + boundary + b"--\r\n"


def test_every_peer_has_its_pinned_requirements():
    for peer in module("peers").PEERS:
        lines = (PEERS / peer.folder / "requirements.txt").read_text("utf-8").splitlines()
        packages = [line for line in lines if line and not line.startswith("#")]
        assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][\w.]*", line) for line in packages)
        names = {line.partition("==")[0].lower() for line in packages}
        assert peer.package in names
        assert not names & {"torch", "torchvision", "numpy"}


def test_every_peer_stands_there_twice_and_the_command_knows_them_all():
    peers, run = module("peers"), module("run")
    assert ("detserve", *(peer.name for peer in peers.PEERS)) == run.NAMES
    assert len(set(run.NAMES)) == 1 + 2 * len(peers.DEFAULTS)


def test_tuned_changes_threads_and_workers_and_nothing_else(tmp_path):
    peers = module("peers")
    plain, tuned = (one for one in peers.PEERS if one.folder == "litserve")
    place = peers.Workplace(tmp_path / "python", tmp_path, tmp_path / "w.pth", 1)
    assert plain.launch(place).command == tuned.launch(place).command
    assert plain.launch(place).environment == {}
    assert tuned.launch(place).environment == {
        "OMP_NUM_THREADS": "1",
        "PEERS_WORKERS": str(len(os.sched_getaffinity(0))),
    }
    assert tuned.target is plain.target


def test_the_command_explains_itself_without_measuring():
    command = [sys.executable, str(PEERS / "run.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert "--quick" in shown.stdout
    refused = subprocess.run([*command, "--servers", "tomcat"], capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 2
    assert "got tomcat, expected some of detserve" in refused.stderr
