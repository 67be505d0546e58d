"""Starting the monitor, starting it again where somebody stays to look after it, and ending it."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable

import psutil

from detserve.instance import FOLDER_VARIABLE, Instance
from detserve.server.logs import LOGS

_MODULE = "detserve.monitor"
_AGAIN_S = 1.0


class MonitorProcess:
    """The monitor of one server. Whatever happens to it, the server runs on."""

    def __init__(self, instance: Instance, host: str, port: int) -> None:
        self._instance = instance
        self._command = [sys.executable, "-P", "-m", _MODULE, str(instance.folder), host, str(port)]
        self._pid: int | None = None
        self._started = 0.0

    def start(self) -> None:
        """Start it; a system that has no process left for it goes without."""
        self._started = time.monotonic()
        environment = os.environ | {
            FOLDER_VARIABLE: str(self._instance.folder),
            # It computes nothing.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with (
            contextlib.suppress(OSError),
            (self._instance.log_folder / LOGS["monitor"]).open("ab") as log,
        ):
            process = subprocess.Popen(
                self._command,
                cwd=self._instance.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._pid = process.pid
            # It outlives this object: there is nothing to wait for when that goes.
            process.returncode = 0

    def keep(self) -> None:
        """Start it again when it has ended."""
        if self._has_ended() and time.monotonic() - self._started > _AGAIN_S:
            self.start()

    def _has_ended(self) -> bool:
        if self._pid is not None:
            try:
                if os.waitpid(self._pid, os.WNOHANG) == (0, 0):
                    return False
            except ChildProcessError:  # somebody else has taken note of its end
                pass
            self._pid = None
        return True


def end_monitors(processes: Iterable[psutil.Process]) -> None:
    """Tell the monitors among an instance's processes to end, without waiting for them."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if _MODULE in process.cmdline():
                process.terminate()
