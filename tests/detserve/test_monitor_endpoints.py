"""The monitor's parts: files of killed workers put together, queue times from counters, one text, reasons."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from detserve.instance import Instance
from detserve.monitor import endpoint
from detserve.monitor.exposition import exposition, passed_on
from detserve.monitor.queue_times import QueueTimes
from detserve.monitor.readiness import alive_workers, model_reasons, readiness
from detserve.monitor.worker_files import WorkerFiles
from detserve.server.status import ModelStatus, WorkerStatus
from detserve.server_metrics import parse_queues
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

WORKER = """
import os, signal, sys
from dethandlers.request_log import RequestRecord
from dethandlers.worker_metrics import open_worker_metrics
metrics = open_worker_metrics("m", "1.0")
metrics.started("ready", golden_passed=True)
for number in range(int(sys.argv[1])):
    metrics.observe([RequestRecord("i", "f", 200, "ok", 1, 9, (1, 1), 3, 1, {"decode": 1.0, "handler": 30.0})])
print("counted", flush=True)
signal.pause()
"""


def worker(folder, count):
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(count)],
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "counted\n"
    return process


def kill(process):
    process.kill()
    process.wait()
    process.stdout.close()


def counts(files):
    """Images, the handler's histogram (count, sum), starts, and how many workers are there."""
    values = {}
    for family in files.read().families:
        for sample in family.samples:
            values.setdefault(sample.name, []).append(sample.value)
    return (
        sum(values.get("detserve_images_total", [])),
        sum(values.get("detserve_handler_seconds_count", [])),
        round(sum(values.get("detserve_handler_seconds_sum", [])), 6),
        sum(values.get("detserve_worker_starts_total", [])),
        len(values.get("detserve_worker_start_time_seconds", [])),
    )


def test_what_killed_workers_counted_stays_and_their_files_do_not(tmp_path):
    files = WorkerFiles(tmp_path)
    alive = worker(tmp_path, 5)
    try:
        for round_ in range(1, 4):
            kill(worker(tmp_path, 10))
            files.compact(lambda pid: pid == alive.pid)
            images = 5 + 10 * round_
            assert counts(files) == (images, images, pytest.approx(images * 0.03), 1 + round_, 1)
            names = {path.name for path in tmp_path.iterdir() if str(alive.pid) not in path.name}
            assert names == {"counter_0.db", "histogram_0.db"}
            assert files.read().golden == {("m", "1.0"): True}
    finally:
        kill(alive)
    files.compact(lambda pid: False)
    assert counts(files) == (35, 35, pytest.approx(35 * 0.03), 4, 0)
    assert files.read().golden == {}


@pytest.mark.parametrize("step", ["replace", "unlink"])
def test_a_compaction_that_is_cut_off_counts_nothing_twice(tmp_path, monkeypatch, step):
    """Every place at which the monitor may be killed between its journal and the end."""
    for _ in range(2):
        kill(worker(tmp_path, 10))
    whole = counts(WorkerFiles(tmp_path))

    class CutOffError(Exception):
        pass

    def cut(allowed):
        calls = iter(range(allowed))
        original = getattr(type(tmp_path), step)

        def act(path, *args, **kwargs):
            if next(calls, None) is None:
                raise CutOffError
            return original(path, *args, **kwargs)

        return act

    for allowed in range(20):
        with monkeypatch.context() as patch:
            patch.setattr(type(tmp_path), step, cut(allowed))
            try:
                WorkerFiles(tmp_path).compact(lambda pid: False)
                break
            except CutOffError:
                pass
        WorkerFiles(tmp_path).compact(lambda pid: True)  # the next monitor finishes what the journal says
        assert counts(WorkerFiles(tmp_path))[:4] == whole[:4]
    assert allowed > 1
    assert counts(WorkerFiles(tmp_path)) == (*whole[:4], 0)


def test_a_damaged_file_costs_only_itself(tmp_path, caplog):
    process = worker(tmp_path, 5)
    try:
        (tmp_path / "histogram_99.db").write_bytes(b"")
        (tmp_path / "counter_98.db").write_bytes((1 << 20).to_bytes(4, "little") + b"\xff" * 100)
        files = WorkerFiles(tmp_path)
        assert counts(files)[0] == 5
        assert "histogram_99.db is left out" in caplog.text
        files.compact(lambda pid: pid == process.pid)
        assert counts(files)[0] == 5
        assert not (tmp_path / "histogram_99.db").exists()
    finally:
        kill(process)


# the queue


def buckets(queues, key=("m", "default")):
    (family,) = queues.collect()
    found = {}
    for sample in family.samples:
        if (sample.labels["model_name"], sample.labels["model_version"]) == key:
            found[sample.name.removeprefix("detserve_queue_seconds_"), sample.labels.get("le")] = sample.value
    return found


def test_the_requests_of_each_second_count_with_their_mean():
    queues = QueueTimes()
    queues.take({("m", "default"): (0.0, 0)})
    queues.take({("m", "default"): (0.3, 100)})  # 3 ms each
    queues.take({("m", "default"): (0.3, 100)})  # nobody came
    queues.take({("m", "default"): (15.3, 110)})  # 1.5 s each
    found = buckets(queues)
    assert (found["bucket", "0.002"], found["bucket", "0.005"], found["bucket", "1.0"]) == (0, 100, 100)
    assert (found["bucket", "2.0"], found["bucket", "+Inf"], found["count", None]) == (110, 110, 110)
    assert found["sum", None] == pytest.approx(15.3)


def test_what_happened_before_the_first_reading_counts_too():
    queues = QueueTimes()
    queues.take({("m", "1.0"): (0.5, 10)})
    assert buckets(queues, ("m", "1.0"))["bucket", "0.05"] == 10


def test_a_time_that_is_read_before_its_request_is_not_lost():
    queues = QueueTimes()
    queues.take({("m", "default"): (0.0, 0)})
    queues.take({("m", "default"): (4.0, 0)})
    queues.take({("m", "default"): (4.0, 1)})
    assert buckets(queues)["bucket", "5.0"] == 1
    assert buckets(queues)["sum", None] == 4.0


TORCHSERVE = """# HELP Requests2XX Torchserve prometheus counter metric with unit: Count
# TYPE Requests2XX counter
Requests2XX{Level="Host",Hostname="vm",} 153.0
# HELP ts_queue_latency_microseconds Torchserve prometheus counter metric with unit: Microseconds
# TYPE ts_queue_latency_microseconds counter
ts_queue_latency_microseconds{model_name="shapes",model_version="default",hostname="vm",} 1876.049
# HELP ts_inference_requests_total Torchserve prometheus counter metric with unit: Count
# TYPE ts_inference_requests_total counter
ts_inference_requests_total{model_name="shapes",model_version="default",hostname="vm",} 3.0
# HELP GPUUtilization Torchserve prometheus gauge metric with unit: Percent
# TYPE GPUUtilization gauge
"""


def test_queues_are_read_from_what_torchserve_writes():
    assert parse_queues(TORCHSERVE) == {("shapes", "default"): (pytest.approx(0.001876049), 3.0)}


# one text


def test_torchserve_s_families_come_as_they_are_and_ours_after_them():
    text = exposition(TORCHSERVE, [GaugeMetricFamily("detserve_ready", "x", 1.0)])
    assert text.startswith(TORCHSERVE)
    families = [family.name for family in text_string_to_metric_families(text)]
    assert "detserve_ready" in families
    assert len(families) == len(set(families))


def test_without_torchserve_ours_alone():
    ours = [GaugeMetricFamily("detserve_ready", "x", 0.0)]
    registry = CollectorRegistry()
    registry.register(type("Ours", (), {"collect": lambda self: ours})())
    assert exposition(None, ours) == generate_latest(registry).decode()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('# TYPE detserve_ready gauge\ndetserve_ready 1\nother{a="b",} 2\n', 'other{a="b",} 2\n'),
        ("good 1\nbad{ 2\n", "good 1\n"),
        ("good 1\nbad x\n", "good 1\n"),
        ("# a comment\n\n# EOF\ngood 1\n", "good 1\n"),
        ("b 1\na 1\nb 2\n", "b 1\nb 2\na 1\n"),
        (
            '# TYPE h histogram\nh_bucket{le="+Inf"} 1\nh_sum 1\nh_count 1\n',
            '# TYPE h histogram\nh_bucket{le="+Inf"} 1\nh_sum 1\nh_count 1\n',
        ),
        ("<html>no metrics</html>\n", ""),
    ],
    ids=["ours", "unparsable", "no number", "comments", "scattered", "histogram", "html"],
)
def test_what_would_cost_a_scraper_the_answer_is_left_out(text, left):
    assert passed_on(text) == left


# ready


def model(*workers, wanted=1):
    return ModelStatus(
        name="m",
        version="1.0",
        default=True,
        archive="m.mar",
        batch_size=1,
        max_batch_delay_ms=1,
        min_workers=wanted,
        max_workers=4,
        response_timeout_s=1,
        workers=tuple(WorkerStatus("9000", state, 1, "cpu", memory, "") for state, memory in workers),
        pending_requests=0,
        queue_left=1,
        reported={},
    )


READY, LOADING, DEAD = ("READY", 1 << 20), ("UNLOADING", 1 << 20), ("READY", 0)


@pytest.mark.parametrize(
    ("workers", "wanted", "golden", "reasons"),
    [
        ([READY], 1, True, []),
        ([READY], 1, None, []),
        ([READY, READY], 1, True, []),
        ([], 0, None, []),
        ([], 1, None, ["m 1.0: 0 of 1 workers are ready"]),
        ([READY, LOADING], 2, True, ["m 1.0: 1 of 2 workers are ready"]),
        ([READY, LOADING], 1, True, ["m 1.0: 1 of 2 workers are ready"]),
        ([READY, DEAD], 2, True, ["m 1.0: 1 of 2 workers are ready"]),
        ([READY], 1, False, ["m 1.0: a worker does not reproduce its golden image"]),
    ],
)
def test_why_a_model_is_not_ready(workers, wanted, golden, reasons):
    described = model(*workers, wanted=wanted)
    assert model_reasons(described, golden) == reasons
    assert alive_workers(described) == workers.count(READY)


def test_without_a_server_nothing_is_ready(tmp_path):
    found = readiness(Instance("none", tmp_path), {})
    assert (found.ready, found.to_json()) == (
        False,
        {"ready": False, "reasons": ["no server runs"], "draining": False, "models": []},
    )


def test_a_drain_is_said_first(tmp_path):
    instance = Instance("none", tmp_path)
    instance.draining_path.touch()
    found = readiness(instance, {})
    assert (found.draining, found.reasons[0]) == (True, "the server is being stopped")
    assert json.dumps(found.to_json())


def test_a_monitor_without_a_server_ends_at_once(tmp_path):
    command = [sys.executable, "-m", "detserve.monitor", str(tmp_path), "127.0.0.1", "0"]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


class Living:
    """A server that lives, as far as the endpoint asks."""

    def live(self):
        return ""


def test_clients_that_send_a_byte_now_and_then_do_not_keep_their_places(monkeypatch):
    """A liveness probe that finds no room restarts a pod that does its work."""
    monkeypatch.setattr(endpoint, "_TIMEOUT_S", 0.8)
    with endpoint.Endpoint("127.0.0.1", 0, Living()) as here:
        threading.Thread(target=here.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        slow = [socket.create_connection(here.server_address) for _ in range(endpoint._MOST_AT_ONCE)]
        cut = set()
        for _ in range(100):
            for number, connection in enumerate(slow):
                try:
                    connection.sendall(b"G")
                except OSError:
                    cut.add(number)
            if len(cut) == len(slow):
                break
            time.sleep(0.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{here.server_address[1]}/live", timeout=10) as answer:
            assert answer.status == 200
        here.shutdown()
        for connection in slow:
            connection.close()
    assert len(cut) == len(slow)
