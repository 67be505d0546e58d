"""One nginx before the edges of several instances on this machine, so that one of them can be stopped and started.

    clients ─► front ─┬─► edge of instance a ─► TorchServe
                      └─► edge of instance b ─► TorchServe

What an instance refuses because it drains, is full or is gone, the front asks the next one. It is loss-free for REST,
whose bodies it holds; gRPC streams through, and its clients try again what is UNAVAILABLE, as ours do. Tokens are
checked by the instances: they share a token file.
"""

import logging
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from detserve.edge.configuration import EdgePlan, plan_for
from detserve.edge.nginx import configure, end_nginx, in_flight, roll_logs, start_nginx, wait_until_idle
from detserve.edge.settings import EdgeSettings
from detserve.errors import ServerError
from detserve.instance import Instance, InstanceState

_POLL_S = 0.2
_START_S = 10.0
_IN_FLIGHT = 4096

log = logging.getLogger("detserve.edge")


@dataclass(frozen=True)
class FrontReport:
    """What became of the front.

    Attributes:
        drained: whether no request was in flight when it ended.
    """

    drained: bool


def run_front(
    instances: Sequence[Instance],
    settings: EdgeSettings,
    *,
    host: str,
    port: int,
    grpc_port: int,
    log_folder: Path | None = None,
    drain_timeout_s: float = 30.0,
    on_ready: Callable[[], None] = lambda: None,
) -> FrontReport:
    """Serve until SIGTERM or Ctrl-C, then answer what is in flight and end.

    Raises:
        ServerError: an instance has no edge or other tokens, or nginx does not start.
    """
    states = [instance.require_running() for instance in instances]
    _require_alike(instances, states)
    ended: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        ended.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    folder = Path(tempfile.mkdtemp(prefix="detserve-edge-"))
    try:
        plan = _plan(states, settings, folder, log_folder or folder, host, port, grpc_port)
        configure(plan)
        process = start_nginx(folder)
        try:
            _wait_started(plan, process)
            on_ready()
            while not ended:
                if process.poll() is not None:
                    raise ServerError(f"nginx ended by itself (exit code {process.returncode}). {_last_words(plan)}")
                try:
                    plan = _followed(plan, instances, process)
                    if roll_logs(plan):
                        process.send_signal(signal.SIGUSR1)
                except (ServerError, OSError) as error:
                    # It goes on as it was; what is wrong now may be right in a second.
                    log.warning("%s", error)
                    time.sleep(1.0)
                time.sleep(_POLL_S)
            Path(plan.draining).touch()
            drained = wait_until_idle(plan, drain_timeout_s)
        finally:
            end_nginx(process, grace_s=5.0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return FrontReport(drained)


def _require_alike(instances: Sequence[Instance], states: Sequence[InstanceState]) -> None:
    for instance, state in zip(instances, states, strict=True):
        if state.edge is None:
            raise ServerError(
                f"Instance {instance.name!r} has no edge: start it with `detserve serve start --edge --edge-tokens "
                "FILE`, the others with the same file."
            )
    if len({state.edge.tokens_file for state in states if state.edge is not None}) > 1:
        raise ServerError(
            f"The instances {', '.join(instance.name for instance in instances)} do not let the same tokens in. Start "
            "them with the same `--edge-tokens FILE`."
        )


def _plan(
    states: Sequence[InstanceState],
    settings: EdgeSettings,
    folder: Path,
    log_folder: Path,
    host: str,
    port: int,
    grpc_port: int,
) -> EdgePlan:
    rest, grpc = _upstreams(states)
    return plan_for(
        settings,
        folder=folder,
        socket_folder=folder,
        log_folder=log_folder,
        draining=folder / "draining",
        host=host,
        port=port,
        grpc_port=grpc_port,
        local_ports=None,
        rest_upstreams=rest,
        grpc_upstreams=grpc,
        in_flight=_IN_FLIGHT,
        max_request_bytes=min(state.max_request_bytes for state in states),
        pass_authorization=True,
        retry=True,
        # The edges of the instances know whether their workers understand it.
        open_inference=True,
        health={path: f"http://rest{path}" for path in ("/ping", "/v2/health/live", "/v2/health/ready")},
    )


def _upstreams(states: Sequence[InstanceState]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    rest = tuple(state.inference_url.removeprefix("http://") for state in states)
    return rest, tuple(state.grpc_address for state in states)


def _followed(plan: EdgePlan, instances: Sequence[Instance], process: subprocess.Popen[bytes]) -> EdgePlan:
    """Follow instances that were started anew on other ports; one that is gone keeps its place."""
    states = [instance.read() for instance in instances]
    rest, grpc = list(plan.rest_upstreams), list(plan.grpc_upstreams)
    for index, state in enumerate(states):
        if state is not None and state.ready and state.edge is not None:
            ((rest[index],), (grpc[index],)) = _upstreams([state])
    followed = replace(plan, rest_upstreams=tuple(rest), grpc_upstreams=tuple(grpc))
    if followed != plan:
        configure(followed)
        process.send_signal(signal.SIGHUP)
    return followed


def _wait_started(plan: EdgePlan, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while in_flight(plan) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServerError(f"nginx did not start. {_last_words(plan)}")
        time.sleep(0.05)


def _last_words(plan: EdgePlan) -> str:
    for path in (Path(plan.error_log), Path(plan.folder) / "startup.log"):
        if path.is_file() and (lines := path.read_text("utf-8", "replace").splitlines()):
            return next((line for line in reversed(lines) if "[emerg]" in line), lines[-1])
    return "It said nothing."
