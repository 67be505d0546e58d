"""What a machine is good for: how many workers, how many threads each, how large a batch.

On a CPU, one worker for each core with one thread each answers the most requests: cores that work on different requests
wait for nothing, and one request is decoded while another is in its forward pass. Two threads in one forward pass gain
little for a small detector, and threads of several workers that outnumber the cores cost more than they gain. A batch
gains nothing there either, and filling it costs the first request the wait. ``benchmarks/CEILING.md`` has the figures.
On a GPU it is one worker for each GPU, and batches.
"""

import contextlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_MOST_WORKERS = 8
_WORKER_BYTES = 1_500_000_000
"""Each worker holds the framework and the model of its own, 0.75 GB for a small one, and the images in its hands."""


@dataclass(frozen=True)
class Capacity:
    """What suits this machine.

    Attributes:
        workers: for each model.
        batch_size, max_batch_delay_ms: where neither the archive nor the user says.
        gpus: that the workers are spread over.
    """

    cores: int
    workers: int
    batch_size: int
    max_batch_delay_ms: int
    gpus: int

    def threads(self, workers: int) -> int | None:
        """Return the threads of each of so many workers; None on a GPU, where the framework's choice stands."""
        return None if self.gpus else max(1, self.cores // max(1, workers))


def capacity(device: str) -> Capacity:
    """Return what suits this machine.

    Args:
        device: ``cpu``, ``gpu``, or ``auto``: GPUs where there are some.
    """
    cores, gpus = usable_cores(), 0 if device == "cpu" else gpu_count()
    if gpus:
        return Capacity(cores, workers=gpus, batch_size=8, max_batch_delay_ms=5, gpus=gpus)
    workers = max(1, min(cores, _MOST_WORKERS, available_memory() // _WORKER_BYTES))
    return Capacity(cores, workers=workers, batch_size=1, max_batch_delay_ms=1, gpus=0)


def usable_cores() -> int:
    """Return how many cores this process may use: those it is bound to, and the container's limit."""
    bound = len(os.sched_getaffinity(0))
    limit = cgroup_cpu_limit()
    return bound if limit is None else max(1, min(bound, int(limit)))


def gpu_count() -> int:
    """Return how many GPUs nvidia-smi finds, which TorchServe asks too; those hidden from CUDA do not count."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in {"", "-1"}:
        return 0
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = sum(line.startswith("GPU ") for line in answer.stdout.splitlines()) if answer.returncode == 0 else 0
    return found if visible is None else min(found, len(visible.split(",")))


def available_memory() -> int:
    """Return the bytes that may be used: the machine's free memory, within the container's limit."""
    free = int(psutil.virtual_memory().available)
    limits = [free]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((_CGROUPS / name).read_text("utf-8")))
    return min(limits)


def cgroup_cpu_limit(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the container's CPU limit in cores, or None without one; the tightest of the groups we are in.

    Version 2 writes ``cpu.max`` ("quota period" or "max period"), version 1 ``cpu.cfs_quota_us`` (-1: no limit).
    """
    limits: list[float] = []
    for folder in _own_groups(root, own):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text("utf-8").split()
            if quota != "max":
                limits.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota_us = int((folder / "cpu.cfs_quota_us").read_text("utf-8"))
            if quota_us > 0:
                limits.append(quota_us / int((folder / "cpu.cfs_period_us").read_text("utf-8")))
    return round(min(limits), 3) if limits else None


def _own_groups(root: Path, own: Path) -> list[Path]:
    """Return the folders of the groups of this process and their parents; inside a container often the root itself."""
    try:
        lines = own.read_text("utf-8").splitlines()
    except OSError:
        lines = []
    starts = {root, root / "cpu", root / "cpu,cpuacct"}
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        base = root / controllers if controllers else root
        here = base / path.lstrip("/")
        while here != base and here.is_relative_to(base):
            starts.add(here)
            here = here.parent
        starts.add(base)
    return sorted(starts)
