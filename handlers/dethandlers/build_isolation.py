"""While a model is built from a config, nothing is fetched, unpickled, started or written.

A constructor may take an address, a checkpoint or another config from the config that it is built from. Which classes
are built is decided elsewhere (`mmdet_types`); this is the wall behind that decision, for what it has missed. It uses
Python's audit events: a hook stays for the process's life, and does nothing outside of `isolated`.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NEVER = {
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "pickle.find_class",
    # MMEngine copies a config into a folder of its own before it runs it.
    "tempfile.mkdtemp",
    "tempfile.mkstemp",
}
_SYSTEM = ("/proc", "/sys", "/dev")


class IsolationError(PermissionError):
    """Something that is built reaches for more than its own settings."""


class _State(threading.local):
    active = False


_STATE = _State()
_LOCK = threading.Lock()
_INSTALLED: list[bool] = []


@contextmanager
def isolated() -> Iterator[None]:
    """Refuse to this thread files other than those of installed packages, connections, processes and pickles.

    Raises:
        IsolationError: out of the call that reaches for one.
    """
    with _LOCK:
        if not _INSTALLED:
            sys.addaudithook(_audit)
            _INSTALLED.append(True)
    before, _STATE.active = _STATE.active, True
    try:
        yield
    finally:
        _STATE.active = before


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _STATE.active:
        return
    if event in _NEVER:
        raise IsolationError(f"got {event} while a model is built, expected a model that needs its config alone.")
    if event == "open" and not _belongs_to_a_package(arguments[0]):
        raise IsolationError(
            f"got {arguments[0]!r} opened while a model is built, expected a model that needs its config alone."
        )


def _belongs_to_a_package(path: Any) -> bool:
    """Modules are imported when they are first needed, so their folders stay open."""
    if not isinstance(path, str | bytes | os.PathLike):
        return True  # the number of an open file
    # Not resolved: an installed package may be a link.
    at = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
    folders = (sys.prefix, sys.base_prefix, *_SYSTEM, *(os.path.abspath(one) for one in sys.path if one))  # noqa: PTH100
    return any(at.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders if folder != os.sep)
