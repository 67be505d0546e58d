"""What a figure was measured on: without this block a speed is only a number.

It names the machine's kind, never the machine: no host name, no user, no path, so that a report may be passed on.
Nothing here fails, and nothing heavy is imported: what cannot be found out is None.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from detserve.server.capacity import cgroup_cpu_limit

PACKAGES = (
    *("detserve", "torch", "torchvision", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu"),
    *("torchserve", "hotcoco"),
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
GPU_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory_mb": "memory.total",
    "sm_clock_mhz": "clocks.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "power_limit_w": "power.limit",
}
_GPU_TEXTS = {"name", "driver"}


def describe_environment() -> dict[str, Any]:
    """Return the environment as plain JSON values.

    ``cpu.cgroup_limit`` is in cores, ``memory_gb`` in GiB; ``threads.torch`` is that of this process, and None when
    torch has not been imported (a load generator has no use for it).
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": {
            "model": cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": _usable_cores(),
            "cgroup_limit": cgroup_cpu_limit(),
        },
        "memory_gb": _memory_gb(),
        "os": _os_name(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": _packages(),
        "onnxruntime_providers": _onnxruntime_providers(),
        "java": _java(),
        "threads": {"torch": _torch_threads(), **{name: os.environ.get(name) for name in THREAD_VARIABLES}},
        "gpus": _gpus(),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Return the processor's name as the kernel tells it."""
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text("utf-8", "replace"), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine() or None


def parse_gpus(answer: str) -> list[dict[str, Any]]:
    """Read nvidia-smi's CSV without header and units: one GPU a line, in the order of ``GPU_FIELDS``."""
    gpus = []
    for line in answer.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(GPU_FIELDS):
            gpus.append(
                {
                    name: value if name in _GPU_TEXTS else _number(value)
                    for name, value in zip(GPU_FIELDS, values, strict=True)
                }
            )
    return gpus


def _gpus() -> list[dict[str, Any]]:
    query = f"--query-gpu={','.join(GPU_FIELDS.values())}"
    try:
        answer = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_gpus(answer.stdout) if answer.returncode == 0 else []


def _number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return float(text)
    return None  # "[N/A]"


def _usable_cores() -> int | None:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count()


def _memory_gb() -> float | None:
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        import psutil

        return round(psutil.virtual_memory().total / 2**30, 1)
    return None


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _packages() -> dict[str, str]:
    """Return the versions of what is installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _onnxruntime_providers() -> list[str] | None:
    try:
        import onnxruntime
    except Exception:  # noqa: BLE001 - a broken installation must not end a benchmark that does not use it
        return None
    return list(onnxruntime.get_available_providers())


def _java() -> dict[str, Any] | None:
    """Return version and source of the Java that a server would get."""
    from detserve.errors import DetserveError
    from detserve.server import find_java

    try:
        java = find_java()
    except DetserveError:
        return None
    return {"version": java.version, "source": java.source}


def _torch_threads() -> int | None:
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())
