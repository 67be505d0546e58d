"""Reading a server's logs."""

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from detserve.errors import ServerError
from detserve.instance import Instance
from detserve.server.worker_log import LogFollower

LOGS = {
    "model": "model_log.log",
    "server": "ts_log.log",
    "access": "access_log.log",
    "console": "console.log",
    "metrics": "model_metrics.log",
    "requests": "requests.log",
    "monitor": "monitor.log",
    "edge": "edge.log",
    "edge-errors": "edge_error.log",
}


def log_path(instance: Instance, which: str = "model") -> Path:
    """Return the file of one log, of the running or the last run."""
    if which not in LOGS:
        raise ServerError(f"Got the log {which!r}; there are {', '.join(LOGS)}.")
    path = instance.log_folder / LOGS[which]
    if not path.is_file():
        raise ServerError(
            f"Instance {instance.name!r} has no {which} log ({path}). Start it with `detserve serve start`."
        )
    return path


def logs(
    instance: Instance | None = None, which: str = "model", *, lines: int = 50, follow: bool = False
) -> Iterator[str]:
    """Yield the last lines of a log, and with ``follow`` those that come, until the server ends."""
    instance = instance or Instance.named()
    path = log_path(instance, which)
    follower = LogFollower(path)
    yield from deque(follower.lines(), maxlen=lines)
    while follow:
        running = instance.running() is not None
        yield from follower.lines()
        if not running:
            return
        time.sleep(0.2)
