"""Ending a server: drain, SIGTERM, wait for every process, kill what is left, remove the run's files.

TorchServe resets the requests in flight when it is told to end, so the drain comes first: it waits until the queues
are empty and no worker has a request in hand.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from detserve.edge.process import drain_edge, end_edge
from detserve.errors import ServerError
from detserve.instance import Instance, InstanceState, is_alive
from detserve.server.management import Management
from detserve.server.monitor_process import end_monitors
from detserve.server.processes import end_all, reap, tree
from detserve.server.worker_log import busy_workers

_GRACE_S = 15.0
_EDGE_GRACE_S = 8.0
"""The keeper gives nginx 5 s and 2 s."""


@dataclass(frozen=True)
class StopReport:
    """What a stop did.

    Attributes:
        was_running: False when there was nothing to stop; files of a crashed server are removed all the same.
        drained: whether no request was in flight when the server was told to end.
        killed: pids that did not end by themselves.
    """

    instance: str
    was_running: bool
    drained: bool
    killed: tuple[int, ...]
    seconds: float


def stop(
    instance: Instance | None = None,
    *,
    drain_timeout_s: float = 30.0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> StopReport:
    """End the server of an instance; safe when none runs."""
    instance = instance or Instance.named()
    began = time.monotonic()
    if not instance.folder.is_dir():
        return StopReport(instance.name, was_running=False, drained=True, killed=(), seconds=0.0)
    with instance.lock():
        state = instance.read()
        was_running = state is not None and is_alive(state)
        drained, killed = True, list[int]()
        if state is not None and was_running:
            if state.ready:
                # From now on the monitor says no to /ready, and the edge to whoever asks for more.
                instance.draining_path.touch(mode=0o600)
                on_progress("waiting for the requests in flight")
                drained = drain_edge(instance, drain_timeout_s)
                drained &= drain(instance, state, max(0.0, drain_timeout_s - (time.monotonic() - began)))
            on_progress("ending the server")
            end_all(end_edge(instance, instance.processes()), grace_s=_EDGE_GRACE_S)
            killed += end_server(state.pid)
        killed += end_strays(instance)
        instance.clean()
    return StopReport(instance.name, was_running, drained, tuple(killed), round(time.monotonic() - began, 2))


def drain(instance: Instance, state: InstanceState, timeout_s: float) -> bool:
    """Wait until no request is queued or in a worker's hands, at most ``timeout_s``; return whether that came."""
    deadline = time.monotonic() + timeout_s
    quiet = 0
    with Management(instance, state) as management:
        while is_alive(state):
            try:
                pending = sum(
                    described.get("jobQueueStatus", {}).get("pendingRequests", 0)
                    for model in management.models()
                    for described in management.versions(model)
                )
            except ServerError:
                return False
            # Between the queue and the worker a request is in neither for a moment: look twice.
            quiet = quiet + 1 if pending == 0 and not busy_workers(instance.log_folder) else 0
            if quiet >= 2:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    return False


def end_server(pid: int, *, grace_s: float = _GRACE_S) -> list[int]:
    """Tell the frontend to end, and wait for it and its workers; return the pids that had to be killed."""
    processes = tree(pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).terminate()
    killed = end_all(processes, grace_s=grace_s)
    reap(pid)
    return killed


def kill_server(pid: int) -> None:
    """End a server that never served: nothing is in flight, so nothing is waited for."""
    processes = tree(pid)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    end_all(processes, grace_s=5.0)
    reap(pid)


def end_strays(instance: Instance) -> list[int]:
    """End processes of the instance that outlived their frontend: a worker ends with it only when it is idle."""
    strays = instance.processes()
    strays += [one for one in end_edge(instance, strays) if one not in strays]
    end_monitors(strays)
    return end_all(strays, grace_s=2.0) if strays else []
