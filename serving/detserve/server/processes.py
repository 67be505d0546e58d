"""Processes and ports of a server: who holds a port, starting Java, ending everything."""

import contextlib
import errno
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from detserve.errors import ServerError
from detserve.instance import FOLDER_VARIABLE, Instance, Ports
from detserve.server.java import Java


def require_free(host: str, ports: Ports) -> None:
    """Refuse when a port is taken, and say by whom."""
    for name, port in ports.named().items():
        if not _is_free(host if name in {"inference", "metrics", "grpc_inference", "monitor"} else "127.0.0.1", port):
            option = f"--{name.replace('_', '-')}-port".replace("--inference-port", "--port")
            raise ServerError(
                f"Port {port} ({name.replace('_', ' ')}) is busy: {holder(port)} listens on it. "
                f"End that process, choose another with {option}, or take free ports with --port free."
            )


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise ServerError(
                f"Cannot listen on {host}:{port}: {error.strerror}. Choose another host or port."
            ) from error
        return True


def holder(port: int) -> str:
    """Return the process that listens on a port, as one can name it."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,) and connection.pid:
                with contextlib.suppress(psutil.Error, OSError):
                    process = psutil.Process(connection.pid)
                    if folder := process.environ().get(FOLDER_VARIABLE):
                        return f"the detserve instance {Path(folder).name!r} (process {connection.pid})"
                    command = " ".join(process.cmdline()) or process.name()
                    return f"process {connection.pid} ({command if len(command) < 100 else command[:97] + '…'})"
                return f"process {connection.pid}"
    return "a process of another user"


def torchserve_home() -> Path:
    """Return the folder that holds the ``ts`` package."""
    spec = importlib.util.find_spec("ts")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders or not (Path(folders[0]) / "frontend" / "model-server.jar").is_file():
        raise ServerError(
            f"TorchServe is not installed for {sys.executable}: install it with `pip install torchserve==0.12.0`."
        )
    return Path(folders[0]).parent


def spawn(instance: Instance, java: Java, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start TorchServe's Java frontend in a session of its own, its output in logs/console.log.

    Java is started directly, not through the ``torchserve`` launcher: the launcher leaves a pid file under TMPDIR,
    prints a warning for every JVM flag that it is given, and is one more process between us and the one that counts.
    """
    home = torchserve_home()
    command = [
        str(java.path),
        *java.flags(),
        f"-Dmodel_server_home={home}",
        f"-Djava.io.tmpdir={environment['TMPDIR']}",
        f"-Dlog4j.configurationFile={(instance.folder / 'log4j2.xml').as_uri()}",
        "-cp",
        str(home / "ts" / "frontend" / "*"),
        "org.pytorch.serve.ModelServer",
        "--python",
        sys.executable,
        "-f",
        str(instance.folder / "config.properties"),
        "-s",
        str(instance.model_store),
        "-ncs",
    ]
    with (instance.log_folder / "console.log").open("ab") as console:
        return subprocess.Popen(
            command,
            cwd=instance.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all below it."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end_all(processes: Iterable[psutil.Process], *, grace_s: float) -> list[int]:
    """Wait until the processes are gone, kill what is left after ``grace_s``; return the pids that had to be killed."""
    _, left = psutil.wait_procs(list(processes), timeout=grace_s)
    killed = []
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            killed.append(process.pid)
    _, still = psutil.wait_procs(left, timeout=10)
    if still:
        pids = ", ".join(str(process.pid) for process in still)
        raise ServerError(f"The processes {pids} do not end, even when killed. Look for a hanging device or disk.")
    return killed


def reap(pid: int) -> None:
    """Collect the exit status when the process is a child of ours, so that it does not stay as a zombie."""
    deadline = time.monotonic() + 2.0
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
