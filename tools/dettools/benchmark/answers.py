"""The raw answers of a level: put aside while the clock runs, read when it no longer does.

They wait in an unnamed temporary file: a level of any length needs no memory for them, and nothing is parsed in the
timed path.
"""

import json
import tempfile
from contextlib import suppress
from typing import Self


class Answers:
    """The bodies of answers by the number of their request."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object, closed by `close`
        self._places: dict[int, tuple[int, int]] = {}
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def keep(self, number: int, body: bytes) -> None:
        """Put the answer to a request aside; to be called before any is read."""
        self._file.write(body)
        self._places[number] = (self._end, len(body))
        self._end += len(body)

    def body(self, number: int) -> bytes:
        """Return the answer to a request that was kept."""
        start, length = self._places[number]
        self._file.seek(start)
        return self._file.read(length)

    def renumber(self, places: dict[int, int]) -> None:
        """Give the answers new numbers; those that are not named are dropped."""
        self._places = {new: self._places[old] for old, new in places.items() if old in self._places}

    def close(self) -> None:
        """Give the file back."""
        self._file.close()


def stage_times(body: bytes) -> tuple[dict[str, float], int | None] | None:
    """Return the worker's stage times in ms and its batch size from an answer with timings; None from one without.

    They stand behind the detections, which may be many: only what follows ``"timings_ms"`` is parsed where that works.
    """
    start = body.rfind(b'"timings_ms"')
    if start < 0:
        return None
    for text in (b"{" + body[start:], body):
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            beside = json.loads(text)
            stages = {str(stage): float(value) for stage, value in beside["timings_ms"].items()}
            size = beside.get("batch_size")
            return stages, None if size is None else int(size)
    return None
