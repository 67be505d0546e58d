"""An image of `container_image`, run as an engine would: read-only, without rights, with its own loopback alone."""

import ctypes
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
from container_image import Stage, inside, mounts

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000


@dataclass
class Container:
    """A container that runs."""

    pid: int
    process: "subprocess.Popen[bytes]"
    log: Path

    def inside(self, ask: Callable[[], T]) -> T:
        """Call a function in a thread within the container's network; threads that it starts are within it too."""
        answers: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                _join_network(self.pid)
                answers.append(ask())
            except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return answers[0]

    def terminate(self) -> None:
        """Send what an engine sends to stop a container."""
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout_s: float) -> int:
        """Wait for its end; return the exit code."""
        return self.process.wait(timeout_s)

    def output(self) -> str:
        """Return what it has printed."""
        return self.log.read_text(errors="replace")

    def wait_for(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Wait until a question asked inside is answered with yes."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the container has ended ({self.process.returncode})\n{self.output()}"
            if self.inside(ready):
                return
            time.sleep(0.2)
        raise AssertionError(f"not within {timeout_s:g} s\n{self.output()}")

    def processes(self) -> list[psutil.Process]:
        """Return its processes, the first one first."""
        first = psutil.Process(self.pid)
        return [first, *first.children(recursive=True)]


def _join_network(pid: int) -> None:
    """Put the calling thread into a process's network."""
    with Path(f"/proc/{pid}/ns/net").open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def running(
    image: Stage,
    log: Path,
    *,
    arguments: Sequence[str] | None = None,
    entry_point: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
    volumes: Mapping[str, Path] | None = None,
    writable: Mapping[str, Path] | None = None,
    scratch: Sequence[str] = ("/run/detserve", "/tmp"),
) -> Iterator[Container]:
    """Run the image as an engine would, with a read-only root, its own user, and no capability.

    Args:
        volumes, writable: where in the container which folder is mounted; the first ones read-only.
        scratch: where it may write, in memory.
    """
    root = image.root
    lines = mounts(root)
    for target, folder in {**(volumes or {}), **(writable or {})}.items():
        place = inside(root, target)
        place.mkdir(parents=True, exist_ok=True)
        lines.append(f"mount --bind {folder} {place}")
        lines += [] if target in (writable or {}) else [f"mount -o remount,ro,bind {place}"]
    user, _, group = image.user.partition(":")
    for target in scratch:
        place = inside(root, target)
        place.mkdir(parents=True, exist_ok=True)
        lines.append(f"mount -t tmpfs -o mode=0777,uid={user},gid={group},size=2g tmpfs {place}")
    lines += [f"mount -o remount,ro,bind {root}", "ip link set lo up"]
    pairs = [f"{key}={value}" for key, value in (image.environment | dict(environment or {})).items()]
    command = [*(entry_point or image.entry_point), *(image.command if arguments is None else arguments)]
    rights = [
        "--reuid",
        user,
        "--regid",
        group,
        "--groups",
        group,
        "--no-new-privs",
        "--bounding-set=-all",
        "--inh-caps=-all",
    ]
    lines.append(
        shlex.join(
            ["exec", "chroot", str(root), "setpriv", *rights, "env", "-i", f"--chdir={image.folder}", *pairs, *command]
        )
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "/bin/sh", "-euc", "\n".join(lines)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    first: psutil.Process | None = None
    try:
        deadline = time.monotonic() + 10
        while first is None and process.poll() is None and time.monotonic() < deadline:
            first = next(iter(psutil.Process(process.pid).children()), None)
        if first is None:
            raise RuntimeError(f"the container did not start\n{log.read_text()}")
        yield Container(first.pid, process, log)
    finally:
        # The first process of a process namespace takes all others with it.
        if first is not None and first.is_running():
            first.kill()
        process.wait(30)


def run_once(image: Stage, log: Path, *, timeout_s: float = 120, **how: object) -> tuple[int, str]:
    """Run a container to its end; return the exit code and what it printed."""
    with running(image, log, **how) as container:  # type: ignore[arg-type]
        code = container.wait(timeout_s)
    return code, log.read_text(errors="replace")
