"""What keeps an edge in order while it runs: its tokens, its logs, its processes found again."""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import requests
from detserve.edge import EdgeSettings
from detserve.edge.configuration import EdgePlan, plan_for
from detserve.edge.keeper import Keeper
from detserve.edge.nginx import configure, end_nginx, in_flight, nginx_processes, roll_logs, start_nginx
from detserve.edge.tokens import publish_tokens
from detserve.instance import Instance
from detserve.server import free_ports

OLD, NEW = "a-token-that-is-revoked", "a-token-that-is-new"


@pytest.fixture
def plan(tmp_path) -> EdgePlan:
    """An edge in a folder that is reached by a link, as a home folder may be."""
    (tmp_path / "real").mkdir()
    folder = tmp_path / "link"
    folder.symlink_to(tmp_path / "real")
    ports = free_ports()
    return plan_for(
        EdgeSettings(),
        folder=folder,
        socket_folder=folder,
        log_folder=folder,
        draining=folder / "draining",
        host="127.0.0.1",
        port=ports.inference,
        grpc_port=ports.grpc_inference,
        local_ports=None,
        rest_upstreams=["127.0.0.1:1"],
        grpc_upstreams=["127.0.0.1:1"],
        in_flight=4,
        max_request_bytes=1000,
        tokens_file=str(tmp_path / "tokens"),
        tokens_folder=str(folder / "valid"),
    )


def wait_started(plan: EdgePlan, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while in_flight(plan) is None:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_token_that_is_revoked_before_the_keeper_looks_is_not_valid(plan):
    tokens, valid = Path(plan.tokens_file), Path(plan.tokens_folder)
    tokens.write_text(f"{OLD}\n")
    assert publish_tokens(tokens, valid)
    assert not publish_tokens(tokens, valid)
    tokens.write_text(f"{NEW}\n")
    Keeper(Instance("none", Path(plan.folder)), plan).follow_tokens()
    assert [path.name for path in valid.iterdir()] == [NEW]


def test_both_logs_have_an_end(plan):
    access, errors = Path(plan.access_log), Path(plan.error_log)
    for number in range(8):
        access.write_text(f"access {number}")
        errors.write_text(f"error {number}")
        assert roll_logs(plan, most_bytes=5)
    assert not roll_logs(plan, most_bytes=5)
    kept = sorted(path.name for path in access.parent.glob("*.log"))
    assert kept == [f"edge.{n}.log" for n in range(1, 6)] + [f"edge_error.{n}.log" for n in range(1, 6)]
    assert errors.with_suffix(".1.log").read_text() == "error 7"
    assert errors.with_suffix(".5.log").read_text() == "error 3"


def test_nginx_is_found_where_a_link_leads(plan):
    folder = Path(plan.folder)
    configure(plan)
    process = start_nginx(folder)
    try:
        wait_started(plan, process)
        found = nginx_processes(folder)
        assert process.pid in {one.pid for one in found}
        assert len(found) == 1 + plan.processes
    finally:
        end_nginx(process, grace_s=2.0)
    assert nginx_processes(folder) == []


def test_headers_that_mean_something_to_torchserve_do_not_pass(plan):
    """Seen by what stands in TorchServe's place; the word that asks a model to describe itself is the clients' own."""
    seen: dict[str, str] = {}

    class Upstream(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.update({name.lower(): value for name, value in self.headers.items()})
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    folder, tokens = Path(plan.folder), Path(plan.tokens_file)
    tokens.write_text(f"{NEW}\n")
    publish_tokens(tokens, Path(plan.tokens_folder))
    with HTTPServer(("127.0.0.1", 0), Upstream) as upstream:
        thread = threading.Thread(target=upstream.serve_forever, args=(0.05,))
        thread.start()
        told = replace(plan, rest_upstreams=(f"127.0.0.1:{upstream.server_port}",), backend_token="TorchServes_own")
        configure(told)
        process = start_nginx(folder)
        try:
            wait_started(told, process)
            headers = {"Authorization": f"Bearer {NEW}", "explain": "True", "Explain-Not": "1", "describe": "True"}
            answer = requests.post(f"http://{told.listen}/predictions/m", b"x", headers=headers, timeout=10)
        finally:
            end_nginx(process, grace_s=2.0)
            upstream.shutdown()
            thread.join()
    assert answer.status_code == 200
    assert (seen["explain-not"], seen["describe"]) == ("1", "True")
    assert "explain" not in seen
    assert seen["authorization"] == "Bearer TorchServes_own"


def test_the_keeper_needs_little():
    """It stays as long as the server, so it does not load what makes detectors."""
    code = "import sys, detserve.edge.keeper; print(sorted({'torch', 'numpy', 'requests', 'grpc'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
