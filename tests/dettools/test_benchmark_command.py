"""`detserve benchmark` as users type it, against a small detector on a real socket: files, exit codes, Ctrl-C."""

import json
import signal
import subprocess
import sys

import pytest
from checkout import ROOT
from dettools import cli
from dettools.benchmark.run import load_run
from faulty_server import FaultyServer
from throwaway import build

NAMES = [f"{number}.jpg" for number in range(5)]
FOUND = [{"class_label": 0, "class_name": "cat", "bbox": [10.0, 20.0, 60.0, 90.0], "score": 0.9}]
QUICK = ("--window", "200ms", "--max-time", "0.6s", "--warm-up", "0s")


@pytest.fixture(scope="module")
def server():
    with FaultyServer(dict.fromkeys(NAMES, FOUND)).running() as running:
        yield running


@pytest.fixture
def images(server, tmp_path):
    """Files whose content is their name: all that this server looks at."""
    server.begin()
    server.service_s = 0.0
    (folder := tmp_path / "val").mkdir()
    for name in NAMES:
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def annotations(tmp_path):
    document = {
        "images": [{"id": n, "file_name": name, "width": 99, "height": 99} for n, name in enumerate(NAMES, 1)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [10, 20, 50, 70], "area": 3500, "iscrowd": 0}
            for n in range(1, 6)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    path = tmp_path / "val.json"
    path.write_text(json.dumps(document))
    return path


def benchmark(*arguments):
    return cli.main(["benchmark", *map(str, arguments)])


def served(server, images, *arguments):
    return benchmark("served", "shapes", "--url", server.url, "--images", images, *QUICK, *arguments)


def document_of(capsys):
    captured = capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1]), captured.err


def test_a_sweep_of_users_with_everything_written(server, images, annotations, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("--concurrency", "1:3:2", "--annotations", annotations, "--out", out, "--title", "five cats", "--json")
    assert served(server, images, *arguments) == 0
    document, said = document_of(capsys)
    assert document["labels"] == ["concurrency 1", "concurrency 3"]
    assert "2 levels, 1 to 1 s" in said
    assert "concurrency 1: 1 s of at most 0.6 s" in said
    assert sorted(path.name for path in out.iterdir()) == [
        *("report.html", "run.json", "samples.jsonl", "summary.csv", "summary.md")
    ]
    stored = load_run(out)
    for level, samples in zip(stored.run.levels, stored.samples, strict=True):
        assert len(samples) == level.requests > 5
        assert level.errors == {}
        assert level.accuracy.ap_delivered == pytest.approx(1.0)
        assert level.stages_ms["forward"] == 3.0
        assert level.client_cpu_ms > 0
    assert stored.run.images.distinct == 5
    assert stored.run.title == "five cats"
    # A report may be passed on: it names no place of this machine.
    assert str(tmp_path) not in (out / "run.json").read_text()
    assert "/shapes/predict?timings=true" in server.asked


def test_a_sweep_of_rates_with_an_slo(server, images, capsys):
    assert served(server, images, "--rate", "20,40", "--slo-p99", "5s", "--json") == 0
    document, _ = document_of(capsys)
    assert document["labels"] == ["20 req/s poisson", "40 req/s poisson"]
    assert document["slo"]["highest"] == 1
    missed = ("--rate", "20,40", "--arrivals", "constant", "--slo", "p50=0.001ms", "--stop-at-slo", "--json")
    assert served(server, images, *missed) == 1
    document, said = document_of(capsys)
    assert (document["slo"]["highest"], document["labels"]) == (None, ["20 req/s constant"])
    assert "stopped, as --stop-at-slo asks" in said


def test_the_timings_can_be_left_out_and_options_be_given(server, images, capsys):
    assert served(server, images, "--concurrency", "1", "--no-timings", "--json") == 0
    assert document_of(capsys)[0]["levels"][0]["stages_ms"] == {}
    assert set(server.asked) == {"/predictions/shapes"}
    server.begin()
    options = ("--options", "score_threshold=0.3", "classes=cat,dog")
    assert served(server, images, "--concurrency", "1", "--no-timings", *options) == 0
    # The first request asks the worker to describe itself.
    assert set(server.asked[1:]) == {"/shapes/predict?score_threshold=0.3&classes=cat%2Cdog"}
    assert "concurrency 1" in capsys.readouterr().out


def test_a_faulty_server_is_told_in_the_document(server, images, capsys):
    server.begin(failing={"3.jpg"})
    assert served(server, images, "--concurrency", "2", "--json") == 0
    document, said = document_of(capsys)
    assert list(document["levels"][0]["errors"]) == ["inference_failed"]
    assert document["verdicts"][0]["stamp"] == "INVALID"
    assert "failed" in said


def message_of(capsys, code, *arguments):
    assert benchmark(*arguments) == code
    return capsys.readouterr().err


def test_what_concerns_every_request_is_said_before_the_load(server, images, annotations, tmp_path, capsys):
    somewhere = ("served", "shapes", "--images", images, "--url")
    assert "Nothing listens" in message_of(capsys, 2, *somewhere, "http://127.0.0.1:9")
    server.begin(token="right")
    assert "token" in message_of(capsys, 2, *somewhere, server.url, "--token", "wrong")
    server.begin(failing={"0.jpg"})
    assert "as ordered" in message_of(capsys, 2, *somewhere, server.url)
    server.begin()
    (images / "other.jpg").write_text("other.jpg")
    assert "no annotations of 1 of 6" in message_of(capsys, 2, *somewhere, server.url, "--annotations", annotations)
    assert len(server.asked) <= 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--concurrency", "0"], "whole number from 1 on"),
        (["--rate", "a:b"], "--rate: got 'a:b'"),
        (["--window", "9h"], "such as 250ms"),
        (["--window", "9s", "--max-time", "5s"], "--max-time"),
        (["--slo-p99", "fast"], "p99=fast"),
        (["--stop-at-slo"], "needs --slo-p99"),
        (["--options", "score_threshold"], "expected KEY=VALUE"),
        (["--metrics-url", "http://127.0.0.1:9"], "metrics port"),
        (["--annotations", "nowhere.json"], "nowhere.json"),
    ],
)
def test_a_wrong_argument_is_named(server, images, capsys, arguments, said):
    assert said in message_of(capsys, 2, "served", "shapes", "--images", images, "--url", server.url, *arguments)


def test_no_such_images(server, tmp_path, capsys):
    assert "expected an image file" in message_of(
        capsys, 2, "served", "shapes", "--images", tmp_path / "nix", "--url", server.url
    )


def test_two_kinds_of_load_at_once_are_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark("served", "shapes", "--images", "x", "--rate", "5", "--concurrency", "5")
    assert ended.value.code == 2


def test_ctrl_c_keeps_the_finished_levels(server, images, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dettools.cli", "benchmark", "served", "shapes", "--url", server.url]
    command += ["--images", str(images), "--concurrency", "1:4", "--window", "200ms", "--max-time", "1s"]
    command += ["--warm-up", "0s", "--min-time", "1s", "--out", str(out), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stderr:
            if line.startswith("concurrency 2: 0 s"):
                process.send_signal(signal.SIGINT)
                break
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    run = load_run(out).run
    assert [level.stopped for level in run.levels] == ["time", "interrupted"]
    assert run.levels[0].requests > 0
    assert "interrupted" in [code for _, code, _ in run.verdict.reasons]
    assert json.loads(stdout.splitlines()[-1])["labels"] == ["concurrency 1", "concurrency 2"]


def test_diff_finds_the_slower_of_two_runs(server, images, tmp_path, capsys):
    for name, service_s in (("fast", 0.002), ("slow", 0.03)):
        server.service_s = service_s
        longer = ("--concurrency", "1", "--max-time", "2s", "--min-time", "2s", "--out", tmp_path / name)
        assert served(server, images, *longer) == 0
    capsys.readouterr()
    fast, slow = tmp_path / "fast", tmp_path / "slow" / "run.json"
    assert benchmark("diff", fast, slow, "--json") == 0
    assert document_of(capsys)[0]["regressions"] > 0
    assert benchmark("diff", fast, slow, "--fail-on-regression") == 1
    assert benchmark("diff", slow, fast, "--fail-on-regression") == 0
    assert "slower" in capsys.readouterr().out
    assert "Cannot read" in message_of(capsys, 2, "diff", tmp_path / "nix", slow)


@pytest.mark.server
def test_a_real_server_is_watched(tmp_path, capsys, serve):
    """Its token, its processes, its queue and what its worker says of itself; a worker that sleeps makes the queue."""
    name = serve([build(tmp_path)], "watched")
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_text(f"sleep 0.0{number}")
    arguments = ("served", "echo", "--images", *tmp_path.glob("*.jpg"), "--instance", name, *QUICK)
    assert benchmark(*arguments, "--concurrency", "1,4", "--max-time", "1s", "--json") == 0
    document, _ = document_of(capsys)
    alone, together = document["levels"]
    assert (alone["errors"], together["errors"]) == ({}, {})
    assert alone["server_cpu_ms"] > 0
    # One at a time nothing waits; of four, three wait for those before them.
    assert together["resources"]["queue_ms"] > 2 * alone["resources"]["queue_ms"]
    assert document["target"]["runtime"] == "echo"
    assert document["target"]["instance"] == "watched"


SPEC = ROOT / "model_store" / "shapes" / "shapes.yaml"
GOLDEN = ROOT / "model_store" / "shapes" / "golden.jpg"


def test_the_flags_of_the_original_work_or_say_what_replaces_them(tmp_path, capsys):
    old = ["--repeat-num", "1", "--max-iter", "20", "--log-interval", "5", "--num-warmup", "2", "--fuse-conv-bn"]
    old += ["--task", "inference", "--launcher", "none", "--work-dir", str(tmp_path / "out")]
    assert (
        benchmark("eager", SPEC, "--images", GOLDEN, "--min-time", "500ms", "--batch-sizes", "1", *old, "--json") == 0
    )
    document, said = document_of(capsys)
    assert [line.split()[1] for line in said.splitlines() if line.startswith("hint:")] == [
        *("--max-iter:", "--log-interval:", "--num-warmup:", "--fuse-conv-bn:")
    ]
    assert (document["kind"], document["labels"]) == ("eager", ["batch size 1"])
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "dataloader"], "the stage 'decode'"),
        (["--launcher", "pytorch"], "one process is measured"),
        (["--batch-sizes", "1,x"], "expected such as 1,4,8"),
    ],
)
def test_what_the_original_measured_otherwise_is_refused(capsys, arguments, said):
    assert said in message_of(capsys, 2, "runtime", SPEC, "--images", GOLDEN, *arguments)
