"""The nginx process of an edge: found, checked, started, counted, and ended without losing a request."""

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

from detserve.edge.configuration import EdgePlan, render
from detserve.errors import ServerError

_LIBRARY_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/usr/local/nginx/sbin")
_WRITING = re.compile(r"Reading: (\d+) Writing: (\d+)")
_LOG_BYTES = 50_000_000
_LOGS_KEPT = 5
_CHECK_S = 30.0


def find_nginx() -> str:
    """Return the path of nginx: of ``DETSERVE_NGINX``, else on the PATH or where Debian puts it."""
    chosen = os.environ.get("DETSERVE_NGINX")
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_LIBRARY_FOLDERS])
    found = shutil.which(chosen or "nginx", path=path)
    if found is None:
        raise ServerError(
            f"The edge needs nginx, but {chosen or 'nginx'} is not there. Install it (Debian: `apt-get install "
            "nginx-light`), name it in DETSERVE_NGINX, or start without --edge."
        )
    return found


def configure(plan: EdgePlan) -> None:
    """Write nginx.conf, whole or not at all.

    Raises:
        ServerError: nginx does not take it; the one before stays.
    """
    folder = Path(plan.folder)
    fresh = folder / "nginx.conf.new"
    fresh.touch(mode=0o600)
    fresh.write_text(render(plan), encoding="utf-8")
    command = [*_command(folder, fresh), "-t", "-q"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_CHECK_S, cwd=folder)
    except subprocess.TimeoutExpired as error:
        raise ServerError(
            f"nginx did not check the edge's configuration within {_CHECK_S:g} s. Try again when the machine is less "
            "busy."
        ) from error
    if answer.returncode != 0:
        said = [line.partition("] ")[2] or line for line in answer.stderr.splitlines() if "[emerg]" in line]
        raise ServerError(
            f"nginx does not take the edge's configuration: {'; '.join(said) or answer.stderr.strip()}. "
            "Check --tls-cert and --tls-key, and the edge's address."
        )
    fresh.replace(folder / "nginx.conf")


def start_nginx(folder: Path) -> subprocess.Popen[bytes]:
    """Start nginx in a session of its own."""
    # An inherited NGINX variable would be taken for the sockets of an nginx before this one.
    environment = {key: value for key, value in os.environ.items() if key != "NGINX"}
    return subprocess.Popen(
        _command(folder, folder / "nginx.conf"),
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def _command(folder: Path, configuration: Path) -> list[str]:
    return [find_nginx(), "-p", f"{folder}/", "-c", str(configuration), "-e", str(folder / "startup.log")]


def in_flight(plan: EdgePlan) -> int | None:
    """Return how many requests the edge has in its hands; None when it does not answer."""
    connection = http.client.HTTPConnection("edge", timeout=5.0)
    try:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(5.0)
        connection.sock.connect(plan.status_socket)
        connection.request("GET", "/status")
        found = _WRITING.search(connection.getresponse().read().decode("ascii", "replace"))
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    # The question itself is being written.
    return None if found is None else max(0, int(found[1]) + int(found[2]) - 1)


def wait_until_idle(plan: EdgePlan, timeout_s: float) -> bool:
    """Wait until no request is in flight; return whether that came."""
    deadline = time.monotonic() + timeout_s
    quiet = 0
    while True:
        count = in_flight(plan)
        if count is None:
            return False
        # A request that is refused now counts for a moment too: so it is looked at twice.
        quiet = quiet + 1 if count == 0 else 0
        if quiet >= 2:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def end_nginx(process: subprocess.Popen[bytes], *, grace_s: float) -> None:
    """Let nginx answer what it has in hand, then end it; cut it off after ``grace_s``."""
    for number, wait_s in ((signal.SIGQUIT, grace_s), (signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(process.pid, number)
                else:
                    process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)


def nginx_processes(folder: Path) -> list[psutil.Process]:
    """Return the nginx processes of an edge; nginx overwrites its environment, so its working folder tells."""
    # The system names it without the links on the way to it.
    place = str(folder.resolve())
    found = []
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error, OSError):
            if process.info["name"] == "nginx" and process.cwd() == place:
                found.append(process)
    return found


def roll_logs(plan: EdgePlan, *, most_bytes: int = _LOG_BYTES) -> bool:
    """Put the logs that are too long aside, five of each at most; nginx writes on in the old ones until it is told.

    Returns:
        Whether it is to be told (SIGUSR1).
    """
    rolled = False
    for path in (Path(plan.access_log), Path(plan.error_log)):
        if not path.is_file() or path.stat().st_size < most_bytes:
            continue
        for number in range(_LOGS_KEPT - 1, 0, -1):
            older = path.with_suffix(f".{number}.log")
            if older.is_file():
                older.replace(path.with_suffix(f".{number + 1}.log"))
        path.replace(path.with_suffix(".1.log"))
        rolled = True
    return rolled


def leave_to_finish(plan: EdgePlan) -> None:
    """Make room for another nginx: the one that is there takes nothing more, and answers what it has in hand."""
    folder = Path(plan.folder)
    for process in nginx_processes(folder):
        with contextlib.suppress(psutil.Error):  # it has just ended
            process.send_signal(signal.SIGQUIT)
    # Until it has given up its addresses, and taken away its own files.
    time.sleep(0.2)
    for name in ("nginx.pid", plan.status_socket):
        (folder / name).unlink(missing_ok=True)
