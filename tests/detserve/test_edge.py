"""A real nginx before a real TorchServe: what gets through, what does not, and what the answer says."""

import contextlib
import json
import os
import signal
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
import requests
from detserve import server
from detserve.client import Client
from detserve.edge import EdgeSettings
from detserve.edge.nginx import nginx_processes
from detserve.errors import EndpointError
from detserve.grpc_client import GrpcClient
from detserve.instance import Instance
from edge_clients import (
    MANAGEMENT,
    OPEN_INFERENCE,
    PREDICTIONS,
    Load,
    certificate,
    grpc_code,
    json_of,
    plain_tls,
    predictions_request,
    raw,
    status_of,
)
from throwaway import build

pytestmark = pytest.mark.server

FIRST, SECOND = "first-token-of-the-edge", "second_token_of_the_edge"
LARGEST = 300_000


@pytest.fixture(scope="module")
def edge(tmp_path_factory):
    """One server behind an edge with TLS, a short queue and short patience."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETSERVE_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.delenv("DETSERVE_INSTANCE", raising=False)
        folder = tmp_path_factory.mktemp("edge")
        pem, key = certificate(folder)
        (folder / "tokens").write_text(f"# of the tests\n{FIRST}\n")
        settings = EdgeSettings(pem, key, folder / "tokens", rate=0, connections=64, client_timeout_s=2)
        told = server.ServerSettings(
            ports=None, workers=1, warm_up_s=0, max_request_bytes=LARGEST, job_queue_size=4, edge=settings
        )
        server.start([build(folder)], told)
        instance = Instance.named()
        try:
            yield instance, folder
        finally:
            assert server.stop().killed == ()
            assert instance.processes() == []
            assert [path.name for path in instance.folder.iterdir()] == ["logs"]


@pytest.fixture(scope="module")
def instance(edge):
    return edge[0]


@pytest.fixture
def url(instance):
    return instance.require_running().inference_url


@pytest.fixture
def secure(instance):
    state = instance.require_running()
    return f"https://127.0.0.1:{state.ports.inference}"


@pytest.fixture
def channel(instance):
    with grpc.insecure_channel(instance.require_running().grpc_address) as channel:
        yield channel


def post(url: str, path: str = "/predictions/echo", body: bytes = b"x", **more) -> requests.Response:
    headers = {"Authorization": f"Bearer {FIRST}", **more.pop("headers", {})}
    return requests.post(url + path, data=body, headers=headers, timeout=30, **more)


def log_lines(instance: Instance) -> list[dict]:
    return [json.loads(line) for line in (instance.log_folder / "edge.log").read_text().splitlines()]


def logged(instance: Instance, request_id: str) -> dict:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        for line in log_lines(instance):
            if line["request_id"] == request_id:
                return line
        time.sleep(0.05)
    raise AssertionError(request_id)


def test_clients_go_through_the_edge_and_its_token(instance, url):
    assert instance.require_running().edge is not None
    assert server.token().value == FIRST
    with Client.for_instance() as client:
        assert client.base_url == url
        assert client.ready()
        assert client.predict("echo", b"x", options={"score_threshold": 0.5})[0]["options"] == {
            "score_threshold": "0.5"
        }
        assert client.predict("echo", b"x", version="1.0")[0]["class_name"] == "cat"
        with pytest.raises(EndpointError) as bad:
            client.predict("echo", b"bad")
    assert (bad.value.status, bad.value.type) == (422, "invalid_image")
    with GrpcClient.for_instance() as client:
        assert client.predict("echo", b"x")[0]["class_name"] == "cat"


def test_tls_is_1_2_or_newer(edge, secure):
    pem = edge[1] / "edge.pem"
    assert post(secure, verify=str(pem)).status_code == 200
    port = int(secure.rpartition(":")[2])
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            plain_tls(pem, version).wrap_socket(plain, server_hostname="localhost") as spoken,
        ):
            assert spoken.version() == version.name.replace("_", ".")
    answer = raw(f"http://127.0.0.1:{port}", b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status_of(answer), json_of(answer)["type"]) == (400, "https_expected")


def test_grpc_over_tls(edge, instance):
    credentials = grpc.ssl_channel_credentials((edge[1] / "edge.pem").read_bytes())
    port = instance.require_running().ports.grpc_inference
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        request = predictions_request(b"echo", b"x")
        assert grpc_code(channel, PREDICTIONS + "Predictions", request, FIRST) == ("OK", "")


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong-token-0123456789", f"bearer {FIRST}", f"Bearer  {FIRST}", FIRST]
)
def test_without_a_valid_token_there_is_no_answer(url, header):
    answer = requests.post(
        f"{url}/predictions/echo", b"x", headers={"Authorization": header} if header else {}, timeout=9
    )
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json().keys() == {"code", "type", "message", "request_id"}


def test_torchserves_own_token_is_not_one_of_the_edges(instance, url):
    own = json.loads(instance.key_path.read_text())
    for key in (own["inference"]["key"], own["management"]["key"], own["API"]["key"]):
        answer = requests.post(f"{url}/predictions/echo", b"x", headers={"Authorization": f"Bearer {key}"}, timeout=9)
        assert answer.status_code == 401


def test_tokens_are_changed_without_a_failed_request(edge, url):
    tokens = edge[1] / "tokens"
    with Load(url, FIRST, clients=2) as first:
        tokens.write_text(f"{FIRST}\n{SECOND}\n")
        wait_for(lambda: post(url, headers={"Authorization": f"Bearer {SECOND}"}).status_code == 200)
    with Load(url, SECOND, clients=2) as second:
        tokens.write_text("not a token!\n")  # as a file that is being written may look
        time.sleep(0.6)
        tokens.write_text(f"{SECOND}\n")
        wait_for(lambda: post(url).status_code == 401)
        assert server.token().value == SECOND
        tokens.write_text(f"{FIRST}\n{SECOND}\n")
        wait_for(lambda: post(url).status_code == 200)
    assert first.statuses.keys() | second.statuses.keys() == {200}


def wait_for(true, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_request_has_one_id_everywhere(instance, url):
    answer = post(url, headers={"X-Request-Id": "photo-17:a"})
    assert answer.headers["X-Request-Id"] == "photo-17:a"
    line = logged(instance, "photo-17:a")
    assert (line["status"], line["model"], line["method"], line["upstream_status"]) == (200, "echo", "POST", "200")
    assert line["seconds"] >= 0
    assert float(line["upstream_seconds"]) >= 0
    made = post(url, headers={"X-Request-Id": 'not"allowed {}'}).headers["X-Request-Id"]
    assert len(made) == 32
    assert logged(instance, made)["status"] == 200
    refused = requests.get(f"{url}/predictions/echo", headers={"X-Request-Id": "r1"}, timeout=9)
    assert (refused.status_code, refused.json()["request_id"]) == (405, "r1")
    line = logged(instance, "r1")
    assert (line["method"], line["status"]) == ("GET", 405)


def test_health_needs_no_token_and_tells_the_truth(url):
    assert [
        requests.get(url + path, timeout=9).status_code for path in ("/ping", "/v2/health/live", "/v2/health/ready")
    ] == [
        200,
        200,
        200,
    ]
    for path in ("/ping?from=balancer", "/v2/health/ready?verbose"):
        assert requests.get(url + path, timeout=9).status_code == 200
    assert requests.post(f"{url}/ping", b"x", timeout=9).headers["Allow"] == "GET, HEAD"


METHODS = ["GET", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "post"]


@pytest.mark.parametrize("path", ["/predictions/echo", "/echo/predict", "/predictions/echo/1.0?score_threshold=0.1"])
@pytest.mark.parametrize("method", METHODS)
def test_only_post_asks_for_detections(url, method, path):
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {FIRST}\r\nConnection: close\r\n\r\n"
    answer = raw(url, head.encode())
    assert status_of(answer) in ({405} if method.isupper() else {400, 404})


REFUSED_PATHS = [
    "/",
    "/models",
    "/models/echo",
    "/models/echo/predict",
    "/models/echo/invoke",
    "/metrics",
    "/token?type=inference",
    "/api-description",
    "/explanations/echo",
    "/explanations/echo/predict",
    "/workflows/echo",
    "/wfpredict/echo",
    "/wfpredict/echo/predict",
    "/invocations",
    "/v1/models/echo:predict",
    "/v2/models/echo/infer",
    "/v2/repository/index",
    "//predictions/echo",
    "/predictions//echo",
    "/predictions/echo/",
    "/predictions/./echo",
    "/predictions/../predictions/echo",
    "/predictions/%2e%2e/models",
    "/predictions/..%2fmodels",
    "/predictions/..;/models",
    "/predictions/echo;v=1",
    "/predictions/ech%6f",
    "/predictions/echo%00",
    "/predictions/echo%0d%0aX: y",
    "/predictions/echo\\..\\models",
    "/PREDICTIONS/echo",
    "/Predictions/echo",
    "/predictions/échó",
    "/predictions/echo#x/../models",
    "/predictions/echo/1.0/predict/more",
    "/_edge/bad_request",
    "/status",
    "*",
]


@pytest.mark.parametrize("path", REFUSED_PATHS)
def test_every_other_path_is_refused_before_torchserve_sees_it(instance, url, path):
    given = f"id-{REFUSED_PATHS.index(path)}"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {FIRST}\r\nX-Request-Id: {given}\r\n"
    answer = raw(url, head.encode() + b"Content-Length: 1\r\nConnection: close\r\n\r\nx")
    assert status_of(answer) in {400, 404}
    assert json_of(answer)["type"] in {"unknown_path", "bad_request"}
    if status_of(answer) == 404:
        assert logged(instance, given)["upstream"] == ""


def test_an_address_with_a_host_in_it_goes_to_the_same_place(url):
    head = f"HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {FIRST}\r\nConnection: close\r\n\r\n"
    assert status_of(raw(url, f"POST http://elsewhere/models {head}".encode())) == 404


SMUGGLED = [
    b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
    b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"Content-Length: -1\r\n\r\n",
    b" folded: x\r\n\r\n",
    b"\x00: x\r\n\r\n",
]


@pytest.mark.parametrize("rest", SMUGGLED)
def test_ambiguous_requests_are_no_requests(url, rest):
    head = f"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {FIRST}\r\n".encode()
    answer = raw(url, head + rest)
    assert status_of(answer) in {400, 501}
    assert answer.count(b"HTTP/1.1 ") == 1
    assert json_of(answer)["code"] == status_of(answer)


def test_curls_default_content_type_is_an_image(url):
    answer = post(url, headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert (answer.status_code, answer.json()[0]["class_name"]) == (200, "cat")


def test_a_body_has_a_limit(url):
    assert post(url, body=bytes(LARGEST)).status_code == 200
    for body in (bytes(LARGEST + 1), (part for part in [bytes(LARGEST), b"x"])):
        answer = post(url, body=body)
        assert (answer.status_code, answer.json()["type"]) == (413, "body_too_large")
    assert str(LARGEST) in answer.json()["message"]


def test_a_head_has_a_limit(url):
    answer = post(url, headers={"X-Long": "x" * 40_000})
    assert (answer.status_code, answer.json()["type"]) == (431, "head_too_large")


@pytest.mark.parametrize(
    "begun", [b"POST /predic", b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc"]
)
def test_a_client_that_says_no_more_is_hung_up_on(url, begun):
    host, _, port = url.removeprefix("http://").partition(":")
    begun = begun.replace(b"Host: x", f"Host: x\r\nAuthorization: Bearer {FIRST}".encode())
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(begun)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1000) == b""


def test_a_full_queue_is_429_and_the_client_that_waits_loses_nothing(url):
    """Six at once and room for four: nobody hears of "no worker"."""
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: post(url, body=b"sleep 0.7"), range(6)))
        assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 2
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["type"] == "too_many_requests"

        def patient(_: int) -> str:
            with Client.for_instance(retries=20) as client:
                return client.predict("echo", b"sleep 0.1")[0]["class_name"]

        assert list(pool.map(patient, range(20))) == ["cat"] * 20


def test_over_grpc_a_full_queue_is_resource_exhausted(channel):
    request = predictions_request(b"echo", b"sleep 0.7")
    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(lambda _: grpc_code(channel, PREDICTIONS + "Predictions", request, FIRST), range(6)))
    codes = [code for code, _ in said]
    assert sorted(codes) == ["OK"] * 4 + ["RESOURCE_EXHAUSTED"] * 2, said


REFUSED_METHODS = [
    PREDICTIONS + "StreamPredictions",
    PREDICTIONS + "StreamPredictions2",
    PREDICTIONS + "predictions",
    PREDICTIONS + "Predictions/",
    PREDICTIONS + "../x/Predictions",
    "/" + PREDICTIONS + "Predictions",
    OPEN_INFERENCE + "ModelInfer",  # the echo archive does not understand it, and its worker would die
    OPEN_INFERENCE + "ServerMetadata",
    *(MANAGEMENT + name for name in ("ListModels", "RegisterModel", "ScaleWorker", "SetDefault", "UnregisterModel")),
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/predictions/echo",
    "/ping",
]


@pytest.mark.parametrize("path", REFUSED_METHODS)
def test_other_methods_of_grpc_are_not_implemented(channel, path):
    code, text = grpc_code(channel, path, predictions_request(b"echo", b"x"), FIRST)
    assert (code, text) == ("UNIMPLEMENTED", "this method is not served here")


def test_grpc_needs_the_token_too(channel, instance):
    request = predictions_request(b"echo", b"x")
    assert grpc_code(channel, PREDICTIONS + "Predictions", request)[0] == "UNAUTHENTICATED"
    assert grpc_code(channel, PREDICTIONS + "Ping", b"")[0] == "UNAUTHENTICATED"
    assert grpc_code(channel, PREDICTIONS + "Ping", b"", FIRST)[0] == "OK"
    given = iter(["wrong-token-0123456789", FIRST])
    with GrpcClient(instance.require_running().grpc_address, lambda: next(given)) as client:
        assert client.predict("echo", b"x")[0]["class_name"] == "cat"


def test_a_grpc_message_has_a_limit(instance):
    with GrpcClient.for_instance() as client, pytest.raises(EndpointError) as large:
        client.predict("echo", bytes(LARGEST + 1))
    assert (large.value.status, large.value.type) == (413, "body_too_large")


def test_http_1_gets_no_answer_on_grpcs_port(edge, instance):
    port = instance.require_running().ports.grpc_inference
    request = predictions_request(b"echo", b"x")
    framed = bytes([0]) + len(request).to_bytes(4, "big") + request
    answer = requests.post(
        f"https://127.0.0.1:{port}{PREDICTIONS}Predictions",
        framed,
        headers={"Authorization": f"Bearer {FIRST}", "Content-Type": "application/grpc"},
        verify=str(edge[1] / "edge.pem"),
        timeout=9,
    )
    assert (answer.headers["grpc-status"], answer.content) == ("12", b"")


def test_torchserve_itself_listens_on_this_machine_only(instance):
    state = instance.require_running()
    java = psutil.Process(state.pid)
    listening = {one.laddr.ip.removeprefix("::ffff:") for one in java.net_connections("inet") if one.status == "LISTEN"}
    assert listening == {"127.0.0.1"}
    ports = {one.laddr.port for one in java.net_connections("inet") if one.status == "LISTEN"}
    assert state.ports.inference not in ports
    assert state.ports.grpc_inference not in ports


def test_the_edges_files_are_private(instance):
    folder = instance.edge_folder
    assert folder.stat().st_mode & 0o077 == 0
    for name in ("nginx.conf", "plan.json"):
        assert (folder / name).stat().st_mode & 0o077 == 0
    assert FIRST not in (instance.log_folder / "edge.log").read_text()


def test_a_dead_worker_is_503_with_retry_after(url):
    assert post(url, body=b"die").status_code in {500, 503, 507}
    answer = post(url)
    assert answer.status_code == 200 or answer.headers.get("Retry-After") == "1" or "Worker" in answer.text
    with Client.for_instance(retries=20) as client:
        assert client.predict("echo", b"x")[0]["class_name"] == "cat"


def test_nginx_is_started_again(instance, url):
    folder = instance.edge_folder
    master = int((folder / "nginx.pid").read_text())
    answers = []
    slow = threading.Thread(target=lambda: answers.append(post(url, body=b"sleep 1.5").status_code))
    slow.start()
    time.sleep(0.3)
    os.kill(master, signal.SIGKILL)
    with Client.for_instance(retries=20) as client:
        assert client.predict("echo", b"x")[0]["class_name"] == "cat"
    slow.join()
    assert answers == [200]
    wait_for(lambda: (folder / "nginx.pid").is_file() and int((folder / "nginx.pid").read_text() or 0) != master)
    wait_for(lambda: len([one for one in nginx_processes(folder) if one.ppid() == 1]) == 0)


def test_a_new_certificate_is_served(edge, instance, secure):
    fresh = certificate(edge[1] / "fresh")
    for path, name in zip(fresh, ("edge.pem", "edge.key"), strict=True):
        Path(path).replace(edge[1] / name)

    def served() -> bool:
        try:
            return post(secure, verify=str(edge[1] / "edge.pem")).status_code == 200
        except requests.exceptions.SSLError:
            return False

    wait_for(served)


def test_every_line_of_the_log_is_json(instance, url, channel):
    request = predictions_request(b"echo", b"x")
    assert grpc_code(channel, PREDICTIONS + "Predictions", request, FIRST)[0] == "OK"
    assert grpc_code(channel, PREDICTIONS + "Predictions", request)[0] == "UNAUTHENTICATED"
    assert grpc_code(channel, PREDICTIONS + "StreamPredictions", request, FIRST)[0] == "UNIMPLEMENTED"
    assert post(url).status_code == 200
    wait_for(lambda: {line["grpc_status"] for line in log_lines(instance)} >= {"", "0", "12", "16"})
    wanted = {"time", "request_id", "client", "method", "path", "model", "status", "seconds", "upstream_seconds"}
    assert all(line.keys() >= wanted for line in log_lines(instance))
