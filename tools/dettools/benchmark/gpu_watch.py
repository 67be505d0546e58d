"""Looks at the GPUs once a second, by one nvidia-smi that runs as long as the level; nothing where there is none."""

import contextlib
import shutil
import subprocess
import threading
import time
from dataclasses import replace

from dettools.benchmark.measurement import GpuSample

_FIELDS = "index,utilization.gpu,memory.used,clocks.sm,power.draw,temperature.gpu"
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""What throttles: its new and its old name; a driver that does not know the one refuses the whole question."""
_FORMAT = ("--format=csv,noheader,nounits", "--loop-ms=1000")
_HARMLESS_REASONS = 0x1 | 0x2
"""Bits of the throttle reasons that say no more than idle (1) and clocks as they were set by an application (2)."""


class GpuWatch:
    """One level's looks at the GPUs.

    Args:
        command: the program; found on PATH, or nothing is watched.
    """

    def __init__(self, command: str = "nvidia-smi") -> None:
        self._command = shutil.which(command)
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._ended = False
        self._looks: list[GpuSample] = []

    def start(self) -> None:
        """Begin to look, about once a second."""
        if self._command is not None:
            self._thread = threading.Thread(target=self._look, name="gpu-watch", daemon=True)
            self._thread.start()

    def stop(self, start_s: float) -> tuple[GpuSample, ...]:
        """End; return the looks, their times counted from ``start_s`` of `time.monotonic`."""
        with self._lock:
            self._ended = True
            if self._process is not None:
                self._process.kill()  # it only reads
        if self._thread is not None:
            self._thread.join()
        return tuple(replace(look, at_s=look.at_s - start_s) for look in self._looks)

    def _look(self) -> None:
        for reason in _REASONS:
            with self._lock:
                if self._ended or self._looks:
                    return
                try:
                    self._process = subprocess.Popen(
                        [str(self._command), f"--query-gpu={_FIELDS},{reason}", *_FORMAT],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        text=True,
                    )
                except OSError:
                    return
            with self._process as process:
                for line in process.stdout or ():
                    if look := parse_look(line, time.monotonic()):
                        self._looks.append(look)


def parse_look(line: str, at_s: float) -> GpuSample | None:
    """Return one line of nvidia-smi as a look; None when it is no such line.

    Units: per cent, MiB, MHz, W, °C; the throttle reasons are a bit mask in hexadecimal.
    """
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(_FIELDS.split(",")) + 1 or not cells[0].isdigit():
        return None
    utilisation, memory, clock, power, temperature = (_number(cell) for cell in cells[1:6])
    throttled = None
    with contextlib.suppress(ValueError):
        throttled = bool(int(cells[6], 16) & ~_HARMLESS_REASONS)
    return GpuSample(int(cells[0]), at_s, utilisation, memory, clock, power, temperature, throttled)


def _number(cell: str) -> float | None:
    """A number, or None for ``[N/A]`` and ``[Not Supported]``."""
    try:
        return float(cell)
    except ValueError:
        return None
