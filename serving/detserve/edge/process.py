"""The edge of one instance: started when its server is ready, drained and ended before it.

TorchServe's own inference token stays with the edge. It is valid as long as the server: a new one replaces the old at
once, and would fail the requests on their way; and who can read the file with it can read the key that makes new ones.
What runs out, and is changed while requests are served, are the edge's tokens.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from detserve.edge.configuration import EdgePlan, plan_for, read_plan
from detserve.edge.nginx import configure, find_nginx, in_flight, leave_to_finish, nginx_processes, wait_until_idle
from detserve.edge.settings import EdgeSettings
from detserve.edge.tokens import backend_token, publish_tokens, write_new_token
from detserve.errors import ServerError
from detserve.instance import FOLDER_VARIABLE, EdgeState, Instance, InstanceState, Ports

TOKEN_MINUTES = 10 * 365 * 24 * 60.0
"""How long TorchServe's own tokens are valid behind an edge: as long as any server runs."""

_MODULE = "detserve.edge.keeper"
_START_S = 15.0

log = logging.getLogger("detserve.edge")


def edge_state(settings: EdgeSettings, instance: Instance, *, token_auth: bool) -> EdgeState:
    """Return where an edge and what is behind it will listen: four ports that nobody uses.

    Raises:
        ServerError: there is no nginx.
    """
    find_nginx()
    sockets = [socket.socket() for _ in range(4)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        backend, backend_grpc, local, local_grpc = (one.getsockname()[1] for one in sockets)
    finally:
        for one in sockets:
            one.close()
    secure = settings.tls_certificate is not None
    tokens = settings.tokens.absolute() if settings.tokens else instance.edge_folder / "tokens"
    return EdgeState(
        backend_port=backend,
        backend_grpc_port=backend_grpc,
        local_port=local if secure else None,
        local_grpc_port=local_grpc if secure else None,
        tokens_file=str(tokens) if token_auth else None,
    )


def behind(ports: Ports, edge: EdgeState) -> Ports:
    """Return where TorchServe itself listens when the edge has its place."""
    return replace(ports, inference=edge.backend_port, grpc_inference=edge.backend_grpc_port)


class EdgeProcess:
    """The keeper of an instance's edge, as the process that starts it sees it.

    Args:
        in_flight: requests at the same time: what the queue of a model holds.
    """

    def __init__(
        self,
        instance: Instance,
        state: InstanceState,
        settings: EdgeSettings,
        *,
        in_flight: int,
    ) -> None:
        if state.edge is None:
            raise ServerError(f"The server of instance {instance.name!r} was started without an edge.")
        self._instance = instance
        self._state = state
        folder = instance.edge_folder
        folder.mkdir(mode=0o700, exist_ok=True)
        edge, backend = state.edge, state.backend_url
        tokens_file = edge.tokens_file
        if tokens_file is not None:
            if settings.tokens is None:
                write_new_token(Path(tokens_file))
            publish_tokens(Path(tokens_file), folder / "valid")
        monitor = state.monitor_url
        local = (edge.local_port, edge.local_grpc_port) if edge.local_port and edge.local_grpc_port else None
        self.plan: EdgePlan = plan_for(
            settings,
            folder=folder,
            socket_folder=Path(state.temp_folder),
            log_folder=instance.log_folder,
            draining=instance.draining_path,
            host=state.host,
            port=state.ports.inference,
            grpc_port=state.ports.grpc_inference,
            local_ports=local,
            rest_upstreams=(f"127.0.0.1:{edge.backend_port}",),
            grpc_upstreams=(f"127.0.0.1:{edge.backend_grpc_port}",),
            in_flight=in_flight,
            max_request_bytes=state.max_request_bytes,
            tokens_file=tokens_file,
            tokens_folder=None if tokens_file is None else str(folder / "valid"),
            backend_token=backend_token(instance) if state.token_auth else None,
            open_inference=state.open_inference,
            health={
                "/ping": f"{backend}/ping",
                "/v2/health/live": f"{monitor}/live",
                "/v2/health/ready": f"{monitor}/ready",
            },
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return when it listens.

        Raises:
            ServerError: nginx does not take the configuration or an address.
        """
        plan_path = Path(self.plan.folder) / "plan.json"
        plan_path.touch(mode=0o600)
        plan_path.write_text(json.dumps(self.plan.to_json()), encoding="utf-8")
        configure(self.plan)
        self._start_keeper()
        deadline = time.monotonic() + _START_S
        while in_flight(self.plan) is None:
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"The edge did not start: {self._last_words()}")
            time.sleep(0.05)

    def keep(self) -> None:
        """Start the keeper again when it was killed; requests in hand are answered meanwhile."""
        if self._process is None or self._process.poll() is None or self._instance.draining_path.exists():
            return
        log.warning("the edge's keeper ended (%s) and is started again", self._process.returncode)
        leave_to_finish(self.plan)
        with contextlib.suppress(OSError):  # no process left for it: the next turn
            self._start_keeper()

    def _start_keeper(self) -> None:
        with Path(self.plan.error_log).open("ab") as log_file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, self.plan.folder],
                cwd=self.plan.folder,
                env=os.environ | {FOLDER_VARIABLE: str(self._instance.folder), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def leave(self) -> None:
        """Leave it to itself: from here on it is not ours to wait for."""
        if self._process is not None and self._process.poll() is None:
            self._process.returncode = 0

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = Path(self.plan.error_log).read_text("utf-8", "replace").splitlines()
            return next((line for line in reversed(lines) if "[emerg]" in line), " / ".join(lines[-3:]))
        return f"its log is {self.plan.error_log}."


def drain_edge(instance: Instance, timeout_s: float) -> bool:
    """Wait until the edge has no request in hand; it takes no new one since the instance drains.

    Returns:
        Whether that came in time; True without an edge.
    """
    if not (instance.edge_folder / "plan.json").is_file():
        return True
    try:
        return wait_until_idle(read_plan(instance.edge_folder), timeout_s)
    except ServerError:
        return False


def end_edge(instance: Instance, processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Tell the keeper and nginx of an instance to end, without waiting; return those that were told.

    Args:
        processes: of the instance.
    """
    told = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if _MODULE in process.cmdline():
                process.terminate()
                told.append(process)
    if instance.edge_folder.is_dir():
        for process in nginx_processes(instance.edge_folder):
            with contextlib.suppress(psutil.Error):
                # With the keeper alive it is told twice, which does nothing.
                process.send_signal(signal.SIGQUIT)
                told.append(process)
    return told
