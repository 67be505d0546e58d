"""One JSON line per request, in one file that all workers of a server share, and the id by which a client finds it.

    X-Request-Id, or the entry `request_id`, or TorchServe's own ─► the answer's header, the error's JSON, the line

A line is written whole: the file is open for appending, and what a batch has to say goes out in one write. The worker
that finds the file too large rolls it; the others see that the path has become another file, and open that one.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import uuid
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PATH_VARIABLE = "DETSERVE_REQUEST_LOG"
"""Where the lines go; nothing is written without it."""
ID_HEADER = "X-Request-Id"
ID_ENTRY = "request_id"

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")
_LARGEST_BYTES = 20_000_000
_KEPT = 5


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What became of one request.

    Attributes:
        request_id: the client's, or TorchServe's.
        frontend_id: TorchServe's own, which it answers as ``x-request-id``.
        status: HTTP status.
        type: machine word of the error, ``ok`` without one.
        body_bytes: size of the encoded image.
        image_size: ``(width, height)`` px, None when it was not decoded.
        detections: in the answer; None for an error.
        batch_size: requests that shared the batch.
        forward_size: images that shared the forward pass, 0 without one.
        stages_ms: decode, preprocess, forward, postprocess, serialise; and handler, from the batch's arrival on.
    """

    request_id: str
    frontend_id: str
    status: int
    type: str
    batch_size: int
    body_bytes: int | None = None
    image_size: tuple[int, int] | None = None
    detections: int | None = None
    forward_size: int = 0
    stages_ms: Mapping[str, float] = field(default_factory=dict)


def take_request_id(row: MutableMapping[str, Any], headers: Mapping[str, Any], frontend_id: str | None) -> str:
    """Return the id of a request, and take it out of its fields, where it would be an unknown option.

    An id of a client is letters, digits and ``._:/+=@-``, at most 128 of them; another is as good as none.

    Args:
        row: the fields of the request; a JSON body is one of them, in the Open Inference Protocol with an ``id``.
        headers: with lower-case names.
        frontend_id: what TorchServe calls the request.
    """
    given = [headers.get(ID_HEADER.lower()), row.pop(ID_ENTRY, None)]
    body = row.get("body")
    if isinstance(body, dict):
        given += [body.pop(ID_ENTRY, None), body.get("id") if "inputs" in body else None]
    for one in given:
        text = one.decode("latin-1") if isinstance(one, bytes | bytearray) else one
        if isinstance(text, str) and _ID.fullmatch(text):
            return text
    return frontend_id or str(uuid.uuid4())


class RequestLog:
    """Appends the lines of one model's worker.

    Args:
        path: None writes nothing.
        model: name, as it is asked for.
        version: of the model.
        largest_bytes: a file of this size is rolled; ``kept`` old ones stay as ``PATH.1`` (the newest) to ``PATH.5``.
    """

    def __init__(
        self,
        path: Path | None,
        model: str,
        version: str,
        *,
        largest_bytes: int = _LARGEST_BYTES,
        kept: int = _KEPT,
    ) -> None:
        self._path = path
        self._model = model
        self._version = version
        self._largest_bytes = largest_bytes
        self._kept = kept
        self._file: int | None = None
        self._inode = 0
        self._told = False
        if path is not None:
            with contextlib.suppress(OSError):  # told when there is something to write
                self._opened(path)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def write(self, records: Iterable[RequestRecord]) -> None:
        """Write the lines of a batch. A disk that is full costs the lines, not the answers."""
        if self._path is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        lines = "".join(self._line(record, now) for record in records)
        if not lines:
            return
        try:
            os.write(self._opened(self._path), lines.encode())
            self._told = False
        except OSError as error:
            self.close()
            if not self._told:
                self._told = True
                logging.getLogger("detserve").warning("the request log cannot be written: %s", error)

    def _line(self, record: RequestRecord, now: str) -> str:
        line = {
            "time": now,
            "request_id": record.request_id,
            "frontend_id": record.frontend_id,
            "model": self._model,
            "version": self._version,
            "status": record.status,
            "type": record.type,
            "body_bytes": record.body_bytes,
            "image_size": record.image_size,
            "detections": record.detections,
            "batch_size": record.batch_size,
            "forward_size": record.forward_size,
            "stages_ms": {stage: round(value, 3) for stage, value in record.stages_ms.items()},
            "worker": os.getpid(),
        }
        return json.dumps(line) + "\n"

    def _opened(self, path: Path) -> int:
        """Return the file to write to: the one that the path names now, rolled when it is too large."""
        size = 0
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(path)  # noqa: PTH116 - every request pays for this call
            size = found.st_size
            if self._file is not None and found.st_ino == self._inode and size < self._largest_bytes:
                return self._file
        if size >= self._largest_bytes:
            self._roll(path)
        self.close()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._inode = os.fstat(self._file).st_ino
        return self._file

    def _roll(self, path: Path) -> None:
        lock = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if path.stat().st_size < self._largest_bytes:
                    return
            except FileNotFoundError:  # another worker was first, and nobody has written since
                return
            for number in range(self._kept - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    path.with_name(f"{path.name}.{number}").replace(path.with_name(f"{path.name}.{number + 1}"))
            path.replace(path.with_name(f"{path.name}.1"))
        finally:
            os.close(lock)
