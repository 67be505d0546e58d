"""The client against a real TorchServe: answers, and what becomes of every kind of error."""

import dataclasses
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from detserve import server
from detserve.client import Client
from detserve.detecting_client import parse_detections
from detserve.errors import ClientError, EndpointError, ServerError
from detserve.instance import Instance
from throwaway import build

LIMIT = 5_000_000


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETSERVE_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be used for the loopback
        settings = server.ServerSettings(ports=None, max_request_bytes=LIMIT, job_queue_size=1)
        yield server.start([build(tmp_path_factory.mktemp("store"))], settings)
        server.stop(drain_timeout_s=1)


@pytest.fixture
def client(running):
    with Client.for_instance() as one:
        yield one


@pytest.mark.server
def test_an_image_goes_in_and_detections_come_out(client, tmp_path):
    (path := tmp_path / "image.jpg").write_bytes(b"x")
    found = client.detect("echo", path)
    np.testing.assert_array_equal(found.boxes_xyxy, np.array([[0, 1, 2, 3]], np.float32))
    assert (found.scores.tolist(), found.labels.tolist(), found.masks, found.keypoints) == ([0.5], [1], None, None)
    assert len(client.detect("echo", b"nothing", masks=True)) == 0
    with pytest.raises(ClientError, match="cannot be read"):
        client.detect("echo", tmp_path / "nix.jpg")


@pytest.mark.server
def test_options_reach_the_worker(client):
    options = {"score_threshold": 0.25, "classes": ["traffic light", "a&b"], "timings": True, "no": None}
    (found,) = client.predict("echo", b"x", options=options)
    assert found["options"] == {"score_threshold": "0.25", "classes": "traffic light,a&b", "timings": "true"}
    assert client.predict("echo", b"x", version="1.0", options={"masks": "rle"})[0]["options"] == {"masks": "rle"}


@pytest.mark.server
def test_masks_and_keypoints_come_only_when_asked_for(client):
    found = client.detect("echo", b"x", masks=True, keypoints=True, max_detections=3)
    assert found.masks == [{"size": [4, 4], "counts": "04"}]
    assert found.keypoints.shape == (1, 1, 3)
    assert client.predict("echo", b"x", options={"masks": None})[0]["options"] == {}


@pytest.mark.server
def test_the_worker_describes_itself(client):
    assert client.describe("echo")["runtime"] == "echo"
    assert client.describe("echo", "1.0")["device"] == "cpu"
    assert client.models() == ["echo"]
    assert client.ready()


@pytest.mark.server
@pytest.mark.parametrize("options", [None, {"masks": "rle"}], ids=["path", "query"])
@pytest.mark.parametrize(
    ("model", "version", "body", "status", "kind", "said"),
    [
        ("nix", None, b"x", 404, "unknown_model", "does not serve 'nix'. It serves: echo."),
        ("echo", "9.0", b"x", 404, "unknown_version", "does not serve 'echo' 9.0. It serves the versions: 1.0."),
        ("echo", None, b"bad", 422, "invalid_image", "got 'bad'"),
        ("echo", None, b"boom", 503, "server_error", "detserve serve logs"),
        ("echo", None, bytes(LIMIT + 1), 413, "body_too_large", f"the limit is {LIMIT} bytes.*--max-request-bytes"),
    ],
    ids=["model", "version", "handler", "exception", "size"],
)
def test_an_error_says_what_to_do(client, model, version, body, status, kind, said, options):
    with pytest.raises(EndpointError, match=said) as error:
        client.predict(model, body, version=version, options=options)
    assert (error.value.status, error.value.type, error.value.retryable) == (status, kind, False)


@pytest.mark.server
def test_a_body_far_over_the_limit_is_still_named(client):
    for _ in range(5):
        with pytest.raises(EndpointError, match="larger than the server takes"):
            client.predict("echo", bytes(20 * LIMIT))


@pytest.mark.server
@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_missing_or_wrong_token_names_the_command(running, token):
    with (
        Client(running.inference_url, token) as client,
        pytest.raises(EndpointError, match="detserve serve token") as e,
    ):
        client.predict("echo", b"x")
    assert (e.value.status, e.value.type) == (400, "unauthorized")
    with Client(running.inference_url, server.token().value) as client:
        assert client.predict("echo", b"x")
        assert client.describe("echo")["runtime"] == "echo"  # asked of the worker itself
        with pytest.raises(ClientError, match="management_url"):
            client.models()
        with pytest.raises(EndpointError, match="detserve serve status"):
            client.predict("nix", b"x")


@pytest.mark.server
def test_a_token_that_is_refused_is_asked_for_again(running):
    tokens = iter(["old", server.token().value])
    with Client(running.inference_url, lambda: next(tokens)) as client:
        assert client.predict("echo", b"x")
        assert client.predict("echo", b"x")
    with Client(running.inference_url, lambda: "wrong") as client, pytest.raises(EndpointError, match="serve token"):
        client.predict("echo", b"x")


@pytest.mark.server
def test_a_netrc_does_not_replace_the_token(running, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with Client.for_instance() as client:
        assert client.predict("echo", b"x")


@pytest.mark.server
def test_a_full_queue_and_a_dead_worker_are_told_apart_and_retried(running):
    errors = []

    def ask(body: bytes, retries: int = 0) -> None:
        with Client.for_instance(retries=retries) as client:
            try:
                client.predict("echo", body)
            except EndpointError as error:
                errors.append(error)

    asking = [threading.Thread(target=ask, args=(b"sleep 1",)) for _ in range(4)]
    for one in asking:
        one.start()
    for one in asking:
        one.join()
    assert {(error.status, error.type, error.retryable) for error in errors} == {(503, "queue_full", True)}
    errors.clear()
    ask(b"die")
    (error,) = errors
    assert (error.status, error.type, error.retryable) == (500, "server_error", True)
    assert "try again" in str(error)
    errors.clear()
    ask(b"x", retries=8)
    assert errors == []


@pytest.mark.server
def test_a_slow_answer_ends_with_a_timeout(running):
    with Client.for_instance(timeout_s=0.3) as client, pytest.raises(ClientError, match=r"within 0\.3 s"):
        client.predict("echo", b"sleep 1")
    time.sleep(0.8)


def test_no_server_names_the_command():
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}") as client:
        assert not client.ready()
        with pytest.raises(ClientError, match=f"Nothing listens on http://127.0.0.1:{port}.*detserve serve start"):
            client.predict("echo", b"x")


def test_no_instance_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("DETSERVE_STATE_DIR", str(tmp_path))
    with pytest.raises(ServerError, match=r"No server runs in instance 'x'.*detserve serve start"):
        Client.for_instance("x")
    assert not Instance.named("x").folder.exists()


@pytest.mark.parametrize("address", ["127.0.0.1:8080", "ftp://x", "http://", ""])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ClientError, match=r"http://127\.0\.0\.1:8080"):
        Client(address)


class Answering(BaseHTTPRequestHandler):
    """Cuts off the first request, answers the second with HTML."""

    seen = 0

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).seen += 1
        if self.seen == 1:
            self.close_connection = True
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *_):
        pass


def test_a_cut_connection_is_tried_again_and_a_foreign_answer_is_named():
    with HTTPServer(("127.0.0.1", 0), Answering) as foreign:
        thread = threading.Thread(target=foreign.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with (
                Client(f"http://127.0.0.1:{foreign.server_port}") as client,
                pytest.raises(ClientError, match="not JSON: '<html>'"),
            ):
                client.predict("echo", b"x")
        finally:
            foreign.shutdown()
            thread.join()
    assert Answering.seen == 2


def test_an_answer_with_timings_is_read_too():
    one = {"class_label": 0, "class_name": "a", "bbox": [1, 2, 3, 4], "score": 0.9}
    plain = parse_detections([one])
    timed = parse_detections({"detections": [one], "timings_ms": {}, "batch_size": 1, "image_size": [5, 5]})
    for field in dataclasses.fields(plain):
        np.testing.assert_array_equal(getattr(plain, field.name), getattr(timed, field.name))
    assert len(parse_detections([])) == 0


@pytest.mark.parametrize("answer", [{"code": 1}, "text", [{"bbox": [1, 2, 3, 4]}], [1], None])
def test_what_is_not_a_list_of_detections_is_refused(answer):
    with pytest.raises(ClientError, match="detections"):
        parse_detections(answer)
