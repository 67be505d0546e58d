"""What a worker said before it died, and which workers are busy: read from TorchServe's own logs.

    model_log.log   every line that a worker prints, under its thread's name (W-9000-shapes_1.0-stdout)
    ts_log.log      what the frontend does with its workers

TorchServe answers for a dead worker with "Worker died." and starts it again for five minutes. The reason is in the
first log only: a line ``DETSERVE_STARTUP_ERROR {json}`` of our handler, or the traceback of anybody else's.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STARTUP_ERROR = "DETSERVE_STARTUP_ERROR "

_LINE = re.compile(r"^\S+ \[\w+ *\] (?P<thread>.+?) (?P<logger>MODEL_LOG|[\w.]+\.[\w.]+) - (?P<text>.*)$")
_THREAD = re.compile(r"^W-(?P<port>\d+)-(?P<model>.+)_(?P<version>[^_]+)-std(?:out|err)$")
_BUSY = "Looping backend response at"
_DONE = "Backend response time"
_GONE = re.compile(r"(\d+) Worker disconnected")
"""A worker that is taken away while it is busy never says that it is done."""
_CHAIN = ("During handling of the above exception", "The above exception was the direct cause")
_AFTER_TRACEBACK = (
    "Backend worker process died",
    "Failed to load model",
    "Load model ",
    "Backend worker did not receive",
)
_LOADER = ("RuntimeError: 500 - Unknown exception", "RuntimeError: 507 - System out of memory")
"""TorchServe raises these itself after it has printed the handler's own error."""
_TIMED_OUT = ("Backend worker did not respond in given time", "Backend worker startup time out")
_ENDED = "Stopped Scanner - "
_TAIL_BYTES = 1 << 20


@dataclass(frozen=True)
class WorkerFailure:
    """A worker that died while it loaded its model.

    Attributes:
        type: the exception's name, or the machine word of our handler's error; empty when it died without one.
        message: what it said.
    """

    worker: str
    model: str
    version: str
    type: str
    message: str


class LogFollower:
    """Reads the lines that are added to a log file."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self.path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0
        self._rest = b""

    def lines(self) -> list[str]:
        """Return the whole lines that were added since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(0, 2)
                if file.tell() < self._offset:  # rolled: the file begins anew
                    self._offset, self._rest = 0, b""
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole]


def parsed(lines: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield thread, logger and text of each log line; a line without them belongs to the one before."""
    thread = logger = ""
    for line in lines:
        match = _LINE.match(line)
        if match:
            thread, logger = match["thread"], match["logger"]
            yield thread, logger, match["text"]
        elif thread:
            yield thread, logger, line


class StartupWatch:
    """Watches the logs of a start for the first worker that dies, and for an archive that cannot be registered."""

    def __init__(self, log_folder: Path) -> None:
        self._frontend = LogFollower(log_folder / "ts_log.log")
        self._model_log = log_folder / "model_log.log"
        self._too_slow, self._ended = set[str](), set[str]()
        self.registration_error: str | None = None

    def failure(self) -> WorkerFailure | None:
        """Return the worker that has died since the last call, if any did.

        Both of its streams have ended then: a traceback on the one may be logged after the other's end.
        """
        ended = None
        for thread, logger, text in parsed(self._frontend.lines()):
            if any(sign in text for sign in _TIMED_OUT):
                self._too_slow.add(f"{thread}-stdout")
            elif logger.endswith("WorkerLifeCycle") and text.startswith(_ENDED):
                self._ended.add(text.removeprefix(_ENDED))
                worker = text.removeprefix(_ENDED).rpartition("-")[0]
                if {f"{worker}-stdout", f"{worker}-stderr"} <= self._ended:
                    self._ended -= {f"{worker}-stdout", f"{worker}-stderr"}
                    ended = ended or f"{worker}-stdout"
            elif "Error while registering model. Details:" in text or "Error while retrieving snapshot" in text:
                self.registration_error = text.partition("Details:")[2].strip() or text
        return None if ended is None else read_failure(self._model_log, ended, timed_out=ended in self._too_slow)


def read_failure(model_log: Path, thread: str, *, timed_out: bool = False) -> WorkerFailure:
    """Return why the worker whose standard output was logged under ``thread`` died, or was ended for being slow."""
    match = _THREAD.match(thread)
    worker, model, version = (match["port"], match["model"], match["version"]) if match else (thread, "?", "?")
    threads = {thread, thread.removesuffix("stdout") + "stderr"}
    said = [text for name, _, text in parsed(_tail(model_log)) if name in threads]
    kind, message = worker_error(said)
    if timed_out:
        last = next((text for text in reversed(said) if text.strip()), "nothing")
        kind, message = "", f"loading took longer than its startup timeout; the last that it printed: {last}"
    return WorkerFailure(worker, model, version, kind, message)


def worker_error(said: list[str]) -> tuple[str, str]:
    """Return type and message of the error that made a worker end, from the lines that it printed."""
    for text in reversed(said):
        if text.startswith(STARTUP_ERROR):
            try:
                error = json.loads(text.removeprefix(STARTUP_ERROR))
                return str(error.get("type", "")), str(error.get("message", ""))
            except (ValueError, AttributeError):
                return "", text.removeprefix(STARTUP_ERROR)
    errors = [text for text in _exceptions(said) if text not in _LOADER]
    # The loader tries a handler that does not import as one of TorchServe's own: the first error is the real one.
    real = [text for text in errors if not text.startswith("ModuleNotFoundError: No module named 'ts.torch_handler.")]
    if real or errors:
        kind, colon, message = (real or errors)[-1].partition(": ")
        return (kind, message) if colon else ("", kind)
    spoken = [text for text in said if text.strip()][-5:]
    last = " / ".join(spoken) or "nothing"
    return "", f"the process ended without a Python error (killed, or out of memory?); the last that it printed: {last}"


def _exceptions(said: list[str]) -> Iterator[str]:
    """Yield the message of every traceback: from its first line that is not indented to its end."""
    inside, message = False, list[str]()
    for text in [*said, "Traceback (end)"]:
        begins = text.startswith("Traceback (")
        if inside and message and (begins or text.startswith(_CHAIN) or text.startswith(_AFTER_TRACEBACK)):
            yield "\n".join(message).strip()
            inside, message = False, []
        if begins:
            inside, message = True, []
        elif inside and (message or not text.startswith(" ")):
            message.append(text)


def busy_workers(log_folder: Path) -> set[str]:
    """Return the threads of the workers that have a request in hand right now."""
    busy = set[str]()
    for thread, logger, text in parsed(_tail(log_folder / "ts_log.log")):
        if logger.endswith("WorkerThread"):
            if text.startswith(_BUSY):
                busy.add(thread)
            elif text.startswith((_DONE, "Auto recovery", "Retry worker")):
                busy.discard(thread)
            elif gone := _GONE.match(text):  # said by another thread
                busy = {one for one in busy if not one.startswith(f"W-{gone[1]}-")}
    return busy


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []
