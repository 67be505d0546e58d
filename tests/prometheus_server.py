"""A real Prometheus that scrapes given addresses every second, for the tests that ask what it has found."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests


def program(name: str) -> str:
    """Return the path of ``prometheus`` or ``promtool``; a test is skipped where they are not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian's package prometheus)")
    return path


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    url: str

    def get(self, path: str, **params: str) -> Any:
        """Return the data of an answer of its API."""
        answer = requests.get(f"{self.url}/api/v1/{path}", params=params, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query."""
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found


@contextmanager
def prometheus(folder: Path, target: str, rules: Path | None = None) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes ``target`` (host:port) as the job ``detserve``."""
    executable = program("prometheus")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    scrape = f"{{job_name: detserve, static_configs: [{{targets: ['{target}']}}]}}"
    rule_files = f"rule_files: ['{rules}']\n" if rules else ""
    (folder / "prometheus.yml").write_text(
        f"global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n{rule_files}scrape_configs: [{scrape}]\n"
    )
    command = [
        executable,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        server = Prometheus(f"http://127.0.0.1:{port}")
        wait_for(lambda: requests.get(f"{server.url}/-/ready", timeout=5).status_code == 200)
        wait_for(lambda: [sample["value"][1] for sample in server.query("up")] == ["1"])
        yield server
    finally:
        process.terminate()
        process.wait(20)


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    """Wait until a condition holds; what cannot be reached yet does not hold."""
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except requests.RequestException:
            pass
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
