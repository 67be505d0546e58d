"""Waiting until a version of a model, or some of its workers, have nothing in hand, so that they can be taken away."""

import contextlib
import time

from detserve.errors import ServerError
from detserve.instance import Instance, InstanceState, is_alive
from detserve.server.management import Description, Management
from detserve.server.worker_log import busy_workers

_POLL_S = 0.05
_LULL_S = 2.0


def _thread(worker: str, name: str, version: str) -> str:
    return f"W-{worker}-{name}_{version}"


def await_lull(instance: Instance, name: str, version: str, workers: set[str]) -> None:
    """Wait for a moment in which none of these workers has a request in hand, at most two seconds."""
    threads = {_thread(worker, name, version) for worker in workers}
    deadline = time.monotonic() + _LULL_S
    while threads & busy_workers(instance.log_folder) and time.monotonic() < deadline:
        time.sleep(0.002)


def drain_version(
    management: Management, instance: Instance, state: InstanceState, described: Description, deadline: float
) -> bool:
    """Take the workers of a version away when it is quiet; return whether nothing came in between.

    Without workers TorchServe refuses what is new with a 503, so an empty queue stays empty. What slipped into the
    queue before gets its workers back. When the time is over the version has the workers that it had.
    """
    name, version = str(described["modelName"]), str(described["modelVersion"])
    while is_alive(state):
        if not _quiet(management, instance, name, version, deadline):
            return False
        try:
            management.scale(name, version, 0, 0)
            if _pending(management, name, version) == 0:
                return True
        except BaseException:
            # Not known, or no longer wanted: it is served as before.
            with contextlib.suppress(ServerError):
                management.scale(name, version, described["minWorkers"], described["maxWorkers"])
            raise
        management.scale(name, version, described["minWorkers"], described["maxWorkers"])
    return False


def _quiet(management: Management, instance: Instance, name: str, version: str, deadline: float) -> bool:
    quiet = 0
    while True:
        threads = {thread for thread in busy_workers(instance.log_folder) if thread.endswith(f"-{name}_{version}")}
        # Between the queue and the worker a request is in neither for a moment: look twice.
        quiet = quiet + 1 if not threads and _pending(management, name, version) == 0 else 0
        if quiet >= 2:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)


def _pending(management: Management, name: str, version: str) -> int:
    return int(management.describe(name, version).get("jobQueueStatus", {}).get("pendingRequests", 0))
