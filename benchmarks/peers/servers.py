"""Servers while they run: on a free port of 127.0.0.1, answering before anybody measures, ended by their pids."""

import asyncio
import contextlib
import importlib.metadata
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from detserve import server
from detserve.async_client import AsyncClient, Target
from detserve.errors import ClientError, DetserveError
from detserve.instance import Instance
from peers import DEMO, Peer, Workplace

OURS = "detserve"
_START_S = 240.0
_GRACE_S = 15.0


@dataclass(frozen=True)
class Endpoint:
    """A server that answers.

    Attributes:
        title, settings: for the table.
        processes: its processes, for their CPU time.
        score_threshold: below this it answers nothing.
    """

    name: str
    title: str
    settings: str
    target: Target
    processes: Callable[[], list[psutil.Process]]
    score_threshold: float


@contextlib.contextmanager
def ours(archive: Path, folder: Path) -> Iterator[Endpoint]:
    """Run detserve's server with its own defaults; every start has a state folder of its own."""
    before = os.environ.get("DETSERVE_STATE_DIR")
    os.environ["DETSERVE_STATE_DIR"] = str(folder)
    instance = Instance.named("peers")
    try:
        started = server.start([archive], server.ServerSettings(ports=None), instance=instance, timeout_s=_START_S)
        (model,) = started.models
        settings = (
            f"defaults: {len(model.workers)} worker, batch size {model.batch_size}, delay "
            f"{model.max_batch_delay_ms} ms, {model.reported.get('threads')} torch threads"
        )
        pid = started.pid
        yield Endpoint(
            OURS,
            f"detserve {importlib.metadata.version('detserve')} (ours)",
            settings,
            Target.served(started.inference_url, model.name, token=lambda: server.token(instance, "inference").value),
            lambda: [psutil.Process(pid)],
            float(model.reported.get("score_threshold", 0.05)),
        )
    finally:
        if instance.running() is not None:
            server.stop(instance)
        if before is None:
            del os.environ["DETSERVE_STATE_DIR"]
        else:
            os.environ["DETSERVE_STATE_DIR"] = before


@contextlib.contextmanager
def running(peer: Peer, python: Path, weights: Path, folder: Path, probe: bytes) -> Iterator[Endpoint]:
    """Run a peer until the block is left.

    Args:
        folder: new for each start; its log is there.
        probe: an image that it must answer before it counts as started.

    Raises:
        DetserveError: it does not start, with the end of what it said.
    """
    folder.mkdir(parents=True)
    port = _free_port()
    launch = peer.launch(Workplace(python, folder, weights, port))
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TS_", "VIRTUAL_ENV"))},
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": str(DEMO),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PEERS_WEIGHTS": str(weights),
        "TMPDIR": str(folder),
        **launch.environment,
    }
    with (folder / "console.log").open("wb") as console:
        process = subprocess.Popen(
            launch.command, cwd=folder, env=environment, stdout=console, stderr=console, start_new_session=True
        )
    try:
        target = peer.target(f"http://127.0.0.1:{port}")
        _wait(peer, target, process, probe, folder / "console.log")
        version = _version(python, peer.package)
        yield Endpoint(
            peer.name,
            peer.title.format(version=version),
            peer.settings,
            target,
            lambda: [psutil.Process(process.pid)],
            peer.score_threshold,
        )
    finally:
        _end(process)


def answers(target: Target, images: list[bytes], *, timeout_s: float = 60.0) -> list[list[dict[str, object]]]:
    """Send images all at once, so that the server forms batches, and return their detections in this order.

    Raises:
        ClientError: one of them was not answered.
    """

    async def ask() -> list[list[dict[str, object]]]:
        async with AsyncClient(target, timeout_s=timeout_s) as client:
            replies = await asyncio.gather(*(client.send(image) for image in images))
        for reply in replies:
            if reply.error:
                raise ClientError(
                    f"{target.base_url}{target.path} answered {reply.status} {reply.error}: {reply.body[:200]!r}"
                )
        return [target.read(reply.body) for reply in replies]

    return asyncio.run(ask())


def _wait(peer: Peer, target: Target, process: subprocess.Popen[bytes], probe: bytes, log: Path) -> None:
    until = time.monotonic() + _START_S
    said = "no answer yet"
    while time.monotonic() < until and process.poll() is None:
        try:
            answers(target, [probe], timeout_s=20)
        except ClientError as error:
            said = str(error)
            time.sleep(0.5)
        else:
            return
    tail = log.read_text("utf-8", "replace")[-1500:]
    raise DetserveError(f"{peer.name} does not start ({said}). The end of its log:\n{tail}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the first process to end; kill of its tree, as it was, what is left."""
    tree: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(process.pid)
        tree = [*root.children(recursive=True)]
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    if process.poll() is None:
        process.kill()
        process.wait(10)
    _, left = psutil.wait_procs(tree, timeout=3)
    for one in left:
        with contextlib.suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(left, timeout=10)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _version(python: Path, package: str) -> str:
    script = f"import importlib.metadata as m; print(m.version({package!r}))"
    answer = subprocess.run([str(python), "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return answer.stdout.strip()
