"""What is read from the server's metrics: the text as TorchServe writes it, and a real server's queue."""

import threading

import pytest
from detserve import server
from detserve.client import Client
from detserve.errors import ClientError
from detserve.server_metrics import parse_counters, read_counters
from throwaway import build

TEXT = """\
# HELP QueueTime Torchserve prometheus gauge metric with unit: Milliseconds
# TYPE QueueTime gauge
QueueTime{Level="Host",Hostname="vm",} 3.0
# TYPE ts_queue_latency_microseconds counter
ts_queue_latency_microseconds{model_name="shapes",model_version="default",hostname="vm",} 4500.5
ts_queue_latency_microseconds{model_name="shapes",model_version="1.0",hostname="vm",} 1.5E3
ts_queue_latency_microseconds{model_name="other",model_version="default",hostname="vm",} 9e9
ts_inference_requests_total{model_name="shapes",model_version="default",hostname="vm",} 8.0
ts_inference_requests_total{model_name="shapes",model_version="1.0",hostname="vm",} 4.0 1700000000000
ts_inference_requests_total{model_name="other",model_version="default",hostname="vm",} 7.0
Requests2XX{Level="Host",Hostname="vm",} 62.0
Requests4XX{Level="Host",Hostname="vm",} 3.0
"""


def test_the_counters_of_one_model_over_its_versions():
    found = parse_counters(TEXT, "shapes")
    assert (found.queue_us, found.requests) == (6000.5, 12)
    assert (found.status_2xx, found.status_4xx, found.status_5xx) == (62, 3, 0)
    assert found.queue_ms == pytest.approx(0.5, abs=1e-3)
    assert parse_counters("", "shapes").queue_ms is None


def test_only_what_was_added_counts():
    before = parse_counters(TEXT, "shapes")
    after = parse_counters(TEXT.replace("4500.5", "104500.5").replace(" 8.0", " 18.0"), "shapes")
    assert after.since(before).queue_ms == pytest.approx(10.0)
    assert after.queue_ms == pytest.approx(106 / 22, abs=0.01)  # the wrong figure: since the server began
    assert before.since(after).queue_ms is None  # the server was started anew in between


def test_metrics_that_cannot_be_read_are_said():
    with pytest.raises(ClientError, match="metrics port"):
        read_counters("http://127.0.0.1:9", "shapes", timeout_s=1)


@pytest.fixture
def running(tmp_path, monkeypatch):
    monkeypatch.setenv("DETSERVE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be used for the loopback
    yield server.start([build(tmp_path)], server.ServerSettings(ports=None))
    server.stop(drain_timeout_s=1)


@pytest.mark.server
def test_a_request_behind_another_one_waits_in_the_queue(running):
    def ask(body):
        with Client.for_instance() as client:
            client.predict("echo", body)

    ask(b"x")
    before = read_counters(running.metrics_url, "echo")
    threads = [threading.Thread(target=ask, args=(b"sleep 0.5",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    added = read_counters(running.metrics_url + "/metrics", "echo").since(before)
    assert added.requests == 2
    # One of the two waits until the other is done, unless it comes 0.5 s later: then for as much less.
    assert 100 < added.queue_ms < 2000
    assert added.status_2xx >= 2
    with pytest.raises(ClientError, match="HTTP 400"):
        read_counters(running.inference_url, "echo")
