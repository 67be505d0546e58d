"""What the bare TorchServe does with requests that harm it, beside what the edge answers to the very same.

The bare half is no wish: it says what TorchServe 0.12 really does, so that the table of docs/edge.md stays true.
"""

import contextlib
import json
import re
import time
import zipfile
from dataclasses import dataclass

import grpc
import psutil
import pytest
import requests
from checkout import ROOT
from detserve import server
from detserve.edge import EdgeSettings
from detserve.instance import Instance
from edge_clients import MANAGEMENT, OPEN_INFERENCE, PREDICTIONS, grpc_code, predictions_request, text_field
from throwaway import build

pytestmark = pytest.mark.server

TOKEN = "token-of-the-edge-tests"
IMAGE = predictions_request(b"echo", b"x")
TENSOR = text_field(1, b"data") + text_field(2, b"BYTES") + b"\x18\x01" + text_field(5, text_field(8, b"x"))
INFER = text_field(1, b"echo") + text_field(3, b"id") + text_field(5, TENSOR)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("DETSERVE_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.delenv("DETSERVE_INSTANCE", raising=False)
        folder = tmp_path_factory.mktemp("edge")
        (folder / "tokens").write_text(f"{TOKEN}\n")
        own = build(folder)
        # With the Open Inference Protocol on, for a handler that does not speak it: what `serve start` does not do.
        (folder / "open").mkdir()
        opened = build(folder / "open")
        with zipfile.ZipFile(opened, "a") as members:
            members.writestr("dethandlers/open_inference.py", "")
        edged = EdgeSettings(tokens=folder / "tokens", rate=0)
        for name, archive, edge in (("bare", opened, None), ("edge", own, edged)):
            instance = Instance.named(name)
            settings = server.ServerSettings(ports=None, workers=1, warm_up_s=0, edge=edge)
            server.start([archive], settings, instance=instance)
            stack.callback(server.stop, instance)
        yield {name: Side(Instance.named(name)) for name in ("bare", "edge")}


@dataclass(frozen=True)
class Side:
    """One of the two servers."""

    instance: Instance

    @property
    def state(self):
        return self.instance.require_running()

    def token(self, kind: str = "inference") -> str:
        return server.token(self.instance, kind).value

    def rest(self, method: str, path: str, *, kind: str = "inference") -> str:
        """Ask at the address that clients have."""
        headers = {"Authorization": f"Bearer {self.token(kind)}"}
        answer = requests.request(method, self.state.inference_url + path, data=b"x", headers=headers, timeout=30)
        return f"HTTP {answer.status_code}"

    def grpc(self, path: str, request: bytes, *, stream: bool = False) -> str:
        with grpc.insecure_channel(self.state.grpc_address) as channel:
            return grpc_code(channel, path, request, self.token(), stream=stream)[0]

    def worker(self) -> int:
        (model,) = server.status(self.instance, ask_workers=False).models
        return max((worker.pid for worker in model.workers), default=0)

    def calls(self) -> int:
        """How many requests the worker has answered."""
        url = f"{self.state.inference_url}/predictions/echo"
        headers = {"Authorization": f"Bearer {self.token()}"}
        return requests.post(url, b"x", headers=headers, timeout=30).json()[0]["calls"]


def lost(side: Side, pid: int) -> bool:
    """Whether the worker of that pid dies within some seconds."""
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


def back(side: Side) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            if side.calls():
                return
        time.sleep(0.2)
    raise AssertionError("the worker is not back")


INFERENCE = [
    "GET /predictions/echo",
    "DELETE /predictions/echo",
    "PUT /predictions/echo",
    "PATCH /predictions/echo",
    "POST /explanations/echo",
    "POST /v1/models/echo:predict",
    "POST /v2/models/echo/infer",
    "POST /models/echo/invoke",
    "POST /invocations?model_name=echo",
]


@pytest.mark.parametrize("request_line", INFERENCE)
def test_inference_by_another_way(servers, request_line):
    method, _, path = request_line.partition(" ")
    outcomes = {}
    for name, side in servers.items():
        before = side.calls()
        said = side.rest(method, path)
        outcomes[name] = said, side.calls() - before - 1
    assert outcomes["edge"][0] in {"HTTP 404", "HTTP 405"}
    assert outcomes["edge"][1] == 0
    assert row(request_line)[0] == words(outcomes["bare"])
    assert row(request_line)[1] == outcomes["edge"][0]


def words(outcome: tuple[str, int]) -> str:
    said, ran = outcome
    return f"{said}, runs inference" if ran else said


KILLERS = [
    ("gRPC InferenceAPIsService/StreamPredictions", PREDICTIONS + "StreamPredictions", IMAGE, True),
    ("gRPC GRPCInferenceService/ModelInfer", OPEN_INFERENCE + "ModelInfer", INFER, False),
]


@pytest.mark.parametrize(("name", "path", "request_bytes", "stream"), KILLERS, ids=lambda part: None)
def test_what_kills_a_worker(servers, name, path, request_bytes, stream):
    edge = servers["edge"]
    pid = edge.worker()
    said = edge.grpc(path, request_bytes, stream=stream)
    assert said == row(name)[1] == "UNIMPLEMENTED"
    assert edge.worker() == pid
    assert psutil.pid_exists(pid)
    bare = servers["bare"]
    pid = bare.worker()
    said = bare.grpc(path, request_bytes, stream=stream)
    dies = lost(bare, pid)
    assert row(name)[0] == f"{said}, {'the worker dies' if dies else 'the worker lives'}"
    back(bare)


def test_management_is_not_at_the_address_of_clients(servers):
    """With its own token too: scaling would take every worker away."""
    for request_line in ("PUT /models/echo?min_worker=0&max_worker=0", "GET /models", "GET /token?type=inference"):
        method, _, path = request_line.partition(" ")
        assert servers["edge"].rest(method, path, kind="management") == row(request_line)[1] == "HTTP 404"
        assert servers["bare"].rest(method, path, kind="management") == row(request_line)[0]
    for method in ("ScaleWorker", "ListModels"):
        name = f"gRPC ManagementAPIsService/{method}"
        assert servers["edge"].grpc(MANAGEMENT + method, text_field(1, b"echo")) == row(name)[1]
        assert servers["bare"].grpc(MANAGEMENT + method, text_field(1, b"echo")) == row(name)[0]


def test_options_lists_the_api_without_a_token_on_the_bare_one_only(servers):
    said = {name: requests.options(side.state.inference_url + "/", timeout=9) for name, side in servers.items()}
    assert (f"HTTP {said['bare'].status_code}", f"HTTP {said['edge'].status_code}") == row("OPTIONS / without a token")
    assert "openapi" in said["bare"].text


def test_curls_default_type_fails_and_echoes_the_body_on_the_bare_one_only(servers):
    said = {}
    for name, side in servers.items():
        headers = {"Authorization": f"Bearer {side.token()}", "Content-Type": "application/x-www-form-urlencoded"}
        url = f"{side.state.inference_url}/predictions/echo"
        said[name] = requests.post(url, b"\xff\xd8%zz=secret", headers=headers, timeout=9)
    line = "POST with curl --data-binary's Content-Type"
    assert (f"HTTP {said['bare'].status_code}", f"HTTP {said['edge'].status_code}") == row(line)


def row(request: str) -> tuple[str, str]:
    """Return the bare server's and the edge's answer as docs/edge.md has them."""
    text = (ROOT / "docs" / "edge.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| `{re.escape(request)}` \| ([^|]*) \| ([^|]*) \|$", text, re.M)
    assert found, f"docs/edge.md has no row for {request}"
    return found[1].strip(), found[2].strip()


def test_every_row_of_the_page_is_tested():
    text = (ROOT / "docs" / "edge.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([^`]*)` \|", text, re.M))
    tested = set(INFERENCE) | {name for name, *_ in KILLERS}
    tested |= {"PUT /models/echo?min_worker=0&max_worker=0", "GET /models", "GET /token?type=inference"}
    tested |= {"gRPC ManagementAPIsService/ScaleWorker", "gRPC ManagementAPIsService/ListModels"}
    tested |= {"OPTIONS / without a token", "POST with curl --data-binary's Content-Type"}
    assert json.dumps(sorted(rows)) == json.dumps(sorted(tested))
