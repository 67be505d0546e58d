"""Stopping behind an edge loses no request; limits of one client; one address before two instances."""

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from detserve import server
from detserve.client import Client
from detserve.edge import EdgeSettings
from detserve.grpc_client import GrpcClient
from detserve.instance import Instance
from edge_clients import Load
from throwaway import build

pytestmark = pytest.mark.server

TOKEN = "token-of-the-edge-tests"
DETSERVE = [sys.executable, "-m", "dettools.cli"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETSERVE_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.delenv("DETSERVE_INSTANCE", raising=False)
        folder = tmp_path_factory.mktemp("edge")
        (folder / "tokens").write_text(f"{TOKEN}\n")
        build(folder)
        yield folder


def start(folder: Path, name: str, ports: server.Ports | None = None, **edge: int) -> server.Ports:
    settings = EdgeSettings(tokens=folder / "tokens", **{"rate": 0, **edge})
    told = server.ServerSettings(ports=ports, workers=1, warm_up_s=0, edge=settings)
    server.start([folder / "echo-1.0.mar"], told, instance=Instance.named(name))
    return Instance.named(name).require_running().ports


def post(url: str, body: bytes = b"x", **more: object) -> requests.Response:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return requests.post(f"{url}/predictions/echo", body, headers=headers, timeout=30, **more)


def slowly(seconds: float):
    """A body that is still on its way when the stop begins."""
    yield b"sleep"
    time.sleep(seconds)
    yield b" 0.5"


@pytest.fixture
def foreground(folder):
    """A server in the foreground, as in a container: the process and its address."""
    command = [*DETSERVE, "serve", "start", "--instance", "front", "--foreground", "--edge", "--port", "free"]
    command += ["--edge-tokens", str(folder / "tokens"), "--models", str(folder / "echo-1.0.mar")]
    command += ["--rate", "5", "--burst", "5", "--connections", "4", "--warm-up", "0", "--workers", "1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    status = json.loads(process.stdout.readline())
    yield process, status
    process.kill()
    process.stdout.close()
    process.wait()
    server.stop(Instance.named("front"))


def test_a_keeper_that_is_killed_comes_back_and_follows_the_tokens(foreground, folder):
    """Without one nginx would serve on, and a token that is revoked would stay good."""
    _, status = foreground
    url, tokens = status["inference_url"], folder / "tokens"
    instance = Instance.named("front")
    (keeper,) = (one for one in instance.processes() if "detserve.edge.keeper" in one.cmdline())
    keeper.kill()
    tokens.write_text("the-next-token-of-the-tests\n")
    try:
        deadline = time.monotonic() + 30
        while (code := code_of(url)) != 401:
            assert time.monotonic() < deadline, f"{code}: the token that was revoked"
            time.sleep(0.3)
        tokens.write_text(f"{TOKEN}\n")
        while (code := code_of(url)) != 200:
            assert time.monotonic() < deadline, f"{code}: the token that holds"
            time.sleep(0.3)
        assert [one.pid != keeper.pid for one in instance.processes() if "detserve.edge.keeper" in one.cmdline()] == [
            True
        ]
    finally:
        tokens.write_text(f"{TOKEN}\n")


def code_of(url: str) -> int:
    """Return the status, 0 while nothing listens."""
    try:
        return post(url).status_code
    except requests.ConnectionError:
        return 0


def test_a_client_has_limits_and_sigterm_answers_what_is_in_flight(foreground):
    process, status = foreground
    url = status["inference_url"]
    with ThreadPoolExecutor(12) as pool:
        # More than four at once, then more than five and five a second.
        at_once = list(pool.map(lambda _: post(url, b"sleep 0.4"), range(6)))
        assert sorted(answer.status_code for answer in at_once) == [200] * 4 + [429] * 2
        time.sleep(2.0)
        codes = [post(url).status_code for _ in range(12)]
        assert codes[:5] == [200] * 5
        assert 429 in codes
        refused = next(answer for answer in at_once if answer.status_code == 429)
        assert (refused.headers["Retry-After"], refused.json()["type"]) == ("1", "too_many_requests")
        time.sleep(2.0)

        in_flight = [pool.submit(post, url, b"sleep 1.5"), pool.submit(post, url, slowly(1.0))]
        time.sleep(0.5)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        refusals = []
        while process.poll() is None and time.monotonic() - began < 20:
            try:
                refusals.append(post(url))
            except requests.ConnectionError:
                break
            time.sleep(0.3)
        assert [one.result().status_code for one in in_flight] == [200, 200]
    # What was asked before the server had heard of its end may have been answered.
    drained = [answer for answer in refusals if answer.status_code == 503]
    assert len(drained) >= 2
    assert {answer.status_code for answer in refusals[len(refusals) - len(drained) :]} == {503}
    assert drained[0].headers["Retry-After"] == "1"
    assert drained[0].json()["type"] == "draining"
    assert process.wait(20) == 0
    assert Instance.named("front").processes() == []


def test_a_rolling_restart_of_two_instances_loses_nothing(folder, tmp_path):
    ports = {name: start(folder, name) for name in ("a", "b")}
    free = server.free_ports()
    where = ["--port", str(free.inference), "--grpc-port", str(free.management)]
    front = subprocess.Popen(
        [*DETSERVE, "edge", "--instances", "a", "b", *where, "--rate", "0", "--logs", str(tmp_path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    grpc_answers = []
    ended = threading.Event()

    def ask_over_grpc() -> None:
        with GrpcClient(f"127.0.0.1:{free.management}", TOKEN, retries=20) as client:
            while not ended.is_set():
                grpc_answers.append(client.predict("echo", b"x")[0]["class_name"])
                time.sleep(0.02)

    try:
        assert "Ready" in front.stderr.readline()
        url = f"http://127.0.0.1:{free.inference}"
        thread = threading.Thread(target=ask_over_grpc)
        thread.start()
        with Load(url, TOKEN, body=b"sleep 0.02") as load:
            for name in ("a", "b"):
                report = server.stop(Instance.named(name))
                assert report.was_running
                assert report.drained
                start(folder, name, ports[name])
                time.sleep(0.5)
        ended.set()
        thread.join()
        assert load.failures == []
        assert load.statuses[200] > 100
        assert set(grpc_answers) == {"cat"}
        # Both have answered, and no answer took longer than some requests' time.
        lines = [json.loads(line) for line in (tmp_path / "edge.log").read_text().splitlines()]
        addresses = {line["upstream"].split(", ")[-1] for line in lines if line["method"] == "POST"}
        assert len(addresses) == 4
        front.send_signal(signal.SIGTERM)
        out, _ = front.communicate(timeout=20)
        assert json.loads(out) == {"drained": True}
        assert front.returncode == 0
    finally:
        ended.set()
        front.kill()
        front.communicate()
        for name in ("a", "b"):
            server.stop(Instance.named(name))


@pytest.mark.nightly
def test_stopping_under_load_fails_only_with_retry_after(folder):
    ports = start(folder, "c")
    url = f"http://127.0.0.1:{ports.inference}"
    results: list[str] = []

    def patient() -> None:
        with Client(url, TOKEN, retries=40) as client:
            results.extend(client.predict("echo", b"sleep 0.05")[0]["class_name"] for _ in range(60))

    threads = [threading.Thread(target=patient) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    assert server.stop(Instance.named("c")).drained
    start(folder, "c", ports)
    for thread in threads:
        thread.join()
    assert server.stop(Instance.named("c")).was_running
    assert results == ["cat"] * 240
    assert [path.name for path in Instance.named("c").folder.iterdir()] == ["logs"]
