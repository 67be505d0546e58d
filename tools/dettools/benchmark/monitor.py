"""What a level costs while it runs: CPU of client and server, the machine, the container's limit, the GPUs.

    start ─► readings ─┐           every second, in a thread: the server's processes, the GPUs
                       ├─► Resources
    stop  ─► readings ─┘           in the client's event loop: how late a timer fires

The thread looks once a second and costs the client some ms of CPU a second; its cost is in ``client_cpu_s``.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from dettools.benchmark.gpu_watch import GpuWatch
from dettools.benchmark.measurement import Resources

_LAG_EVERY_S = 0.1
"""Each wake-up of the client costs about 0.2 ms of CPU where system calls are dear."""
CGROUPS = Path("/sys/fs/cgroup")

QueueMean = Callable[[], float | None]
"""Ends what was begun: the mean time in the server's queue in ms since then; None when it cannot be told."""


class Monitor:
    """Watches one level after the other.

    Args:
        server_processes: the processes of the server on this machine, their children left out; None: it runs elsewhere.
        begin_queue: reads the server's metrics at the start, and returns the function that reads them again at the end.
        interval_s: between two looks.
    """

    def __init__(
        self,
        server_processes: Callable[[], list[psutil.Process]] | None = None,
        begin_queue: Callable[[], QueueMean] | None = None,
        *,
        interval_s: float = 1.0,
    ) -> None:
        self._server_processes = server_processes
        self._begin_queue = begin_queue
        self._interval_s = interval_s
        self._server: ProcessesCpu | None = None
        self._queue: QueueMean | None = None
        self._gpu = GpuWatch()
        self._lags_s: list[float] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._begun = _Readings.now()

    def start(self) -> None:
        """Begin to watch."""
        self._queue = self._begin_queue() if self._begin_queue else None
        self._server = ProcessesCpu(self._server_processes) if self._server_processes else None
        self._lags_s = []
        self._gpu = GpuWatch()
        self._gpu.start()
        self._ended.clear()
        self._thread = threading.Thread(target=self._look, name="benchmark-monitor", daemon=True)
        self._begun = _Readings.now()
        self._thread.start()

    def stop(self) -> Resources:
        """End; return what the level cost."""
        ended = _Readings.now()
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        server_cpu_s = None
        if self._server is not None:
            self._server.look()
            server_cpu_s = self._server.used_s
        return Resources(
            wall_s=ended.at_s - self._begun.at_s,
            client_cpu_s=ended.client_cpu_s - self._begun.client_cpu_s,
            server_cpu_s=server_cpu_s,
            machine_cpu=ended.machine.busy_since(self._begun.machine),
            cgroup_throttled_s=_difference(ended.throttled_s, self._begun.throttled_s),
            steal=ended.machine.stolen_since(self._begun.machine),
            loop_lag_ms=float(np.percentile(self._lags_s, 99)) * 1e3 if self._lags_s else None,
            queue_ms=self._queue() if self._queue else None,
            gpu=self._gpu.stop(self._begun.at_s),
        )

    async def watch_loop(self) -> None:
        """Measure in the client's event loop how late its timers fire, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            self._lags_s.append(loop.time() - due)

    def _look(self) -> None:
        while not self._ended.wait(self._interval_s):
            if self._server is not None:
                self._server.look()


class ProcessesCpu:
    """CPU time of some processes and of all below them, from now on; also of those that end or begin meanwhile.

    A process that ends between two looks loses what it used since the last one.
    """

    def __init__(self, roots: Callable[[], list[psutil.Process]]) -> None:
        self._roots = roots
        self._used: dict[tuple[int, float], float] = {}
        self._at_first: dict[tuple[int, float], float] = {}
        self.look()
        self._at_first = dict(self._used)

    @property
    def used_s(self) -> float:
        """Seconds, until the last look; what began meanwhile counts from its own beginning."""
        return sum(used - self._at_first.get(key, 0.0) for key, used in self._used.items())

    def look(self) -> None:
        """Read the clocks of the processes that are there now."""
        found: dict[int, psutil.Process] = {}
        with contextlib.suppress(psutil.Error):
            for root in self._roots():
                found |= {one.pid: one for one in (root, *root.children(recursive=True))}
        for process in found.values():
            with contextlib.suppress(psutil.Error), process.oneshot():
                times = process.cpu_times()
                self._used[process.pid, process.create_time()] = times.user + times.system


class MachineTimes(NamedTuple):
    """Seconds of all cores since the machine began; ``steal`` None where it is not told."""

    busy: float
    idle: float
    steal: float | None

    @classmethod
    def now(cls) -> "MachineTimes":
        """Read them."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        steal = getattr(times, "steal", None)
        # A guest's time is in `user` already.
        busy = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
        return cls(busy, idle, steal)

    def busy_since(self, before: "MachineTimes") -> float | None:
        """Share of the cores' time that was used, 0 to 1."""
        whole = self._whole() - before._whole()
        # Both are sums of many counters: their quotient may be 1 by all but rounding.
        return min(1.0, (self.busy - before.busy) / whole) if whole > 0 else None

    def stolen_since(self, before: "MachineTimes") -> float | None:
        """Share of the cores' time that the hypervisor took, 0 to 1."""
        whole = self._whole() - before._whole()
        return (
            (self.steal - before.steal) / whole
            if whole > 0 and self.steal is not None and before.steal is not None
            else None
        )

    def _whole(self) -> float:
        return self.busy + self.idle + (self.steal or 0.0)


def cgroup_throttled_s(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return how long this container's CPU limit has held it back so far; None without cgroups.

    Version 2 counts ``throttled_usec``, version 1 ``throttled_time`` in ns. In a container the file of the own group
    often lies at the root of what is mounted.
    """
    groups = {"v2": "/", "v1": "/"}
    with contextlib.suppress(OSError):
        for line in membership.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                groups["v2"] = path
            elif "cpu" in controllers.split(","):
                groups["v1"] = path
    for folder, group, key, unit in (
        (root, groups["v2"], "throttled_usec", 1e-6),
        (root / "cpu", groups["v1"], "throttled_time", 1e-9),
        (root / "cpu,cpuacct", groups["v1"], "throttled_time", 1e-9),
    ):
        for place in (folder / group.lstrip("/"), folder):
            with contextlib.suppress(OSError, ValueError):
                lines = (place / "cpu.stat").read_text(encoding="utf-8").splitlines()
                values = dict(line.split(maxsplit=1) for line in lines)
                if key in values:
                    return int(values[key]) * unit
    return None


@dataclass(frozen=True)
class _Readings:
    at_s: float
    client_cpu_s: float
    machine: MachineTimes
    throttled_s: float | None = field(default=None)

    @classmethod
    def now(cls) -> "_Readings":
        return cls(time.monotonic(), time.process_time(), MachineTimes.now(), cgroup_throttled_s())


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before
