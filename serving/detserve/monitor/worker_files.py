"""The files in which prometheus-client keeps what the workers count, read as one and kept from growing in number.

    counter_123.db  histogram_123.db  gauge_livesum_123.db      of the worker with pid 123
    counter_0.db    histogram_0.db                              of all workers that have ended

A worker that is killed leaves its counts behind, and they must stay: a counter never falls. Its files are added to
those of pid 0, its gauges go. A journal tells what was added, so that an end in the midst of it counts nothing twice.
"""

import json
import logging
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from detserve.errors import ServerError

_ENDED_PID = 0
_JOURNAL = "journal.json"
_GOLDEN = "detserve_golden_check_passed"
_UNREADABLE = (OSError, ValueError, RuntimeError, struct.error)
ModelKey = tuple[str, str]
"""Name and version of a model."""


@dataclass(frozen=True)
class WorkerFamilies:
    """The workers' metric families at one moment, for `prometheus_client.generate_latest`."""

    families: tuple[Metric, ...]

    def collect(self) -> Iterable[Metric]:
        """Return the families."""
        return self.families

    @property
    def golden(self) -> Mapping[ModelKey, bool]:
        """Whether every worker of a model reproduces its golden image; nothing of a model that does not check."""
        return {
            (sample.labels["model_name"], sample.labels["model_version"]): sample.value == 1.0
            for family in self.families
            if family.name == _GOLDEN
            for sample in family.samples
        }


class WorkerFiles:
    """The files of one instance. Safe to use from several threads of one process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def read(self) -> WorkerFamilies:
        """Add up what all workers have counted; a file that a kill has damaged is left out."""
        with self._lock:
            files = sorted(self._folder.glob("*.db"))
            try:
                return _merged(files)
            except _UNREADABLE:
                return _merged([file for file in files if self._is_readable(file)])

    def compact(self, is_alive: Callable[[int], bool]) -> None:
        """Put the files of the workers that have ended together.

        Args:
            is_alive: whether a pid is that of a process of this server.

        Raises:
            ServerError: the files cannot be written.
        """
        with self._lock:
            try:
                self._finish()
                files = [path for path in self._folder.glob("*.db") if _pid(path) != _ENDED_PID]
                ended = [path for path in files if not is_alive(_pid(path))]
                for path in ended:
                    if path.name.startswith("gauge_live"):
                        path.unlink(missing_ok=True)
                for kind in ("counter", "histogram", "summary"):
                    self._add(kind, [path for path in ended if path.name.startswith(f"{kind}_")])
            except (OSError, ValueError) as error:
                raise ServerError(
                    f"The workers' metrics in {self._folder} cannot be put together ({error}). Is the disk full?"
                ) from error

    def _add(self, kind: str, files: list[Path]) -> None:
        if not files:
            return
        target, new = self._folder / f"{kind}_{_ENDED_PID}.db", self._folder / f"{kind}.new"
        new.unlink(missing_ok=True)
        sums: dict[str, float] = {}
        for path in [target, *files] if target.exists() else files:
            if self._is_readable(path):
                for key, value in _values(path):
                    sums[key] = sums.get(key, 0.0) + value
        # In one piece and by plain writing: a full disk is then an error, and no signal that ends the process.
        new.write_bytes(_encoded(sums))
        journal = self._folder / _JOURNAL
        unfinished = journal.with_suffix(".new")
        unfinished.write_text(
            json.dumps({"new": new.name, "target": target.name, "added": [path.name for path in files]}), "utf-8"
        )
        unfinished.replace(journal)
        self._finish()

    def _finish(self) -> None:
        """Do what the journal says is left of an addition."""
        path = self._folder / _JOURNAL
        try:
            journal = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return
        new = self._folder / journal["new"]
        if new.exists():
            new.replace(self._folder / journal["target"])
        for name in journal["added"]:
            (self._folder / name).unlink(missing_ok=True)
        path.unlink()

    def _is_readable(self, path: Path) -> bool:
        try:
            list(_values(path))
        except _UNREADABLE as error:
            if path.name not in self._told:
                self._told.add(path.name)
                logging.getLogger("detserve.monitor").warning("%s is left out: %s", path, error)
            return False
        return True


def _merged(files: list[Path]) -> WorkerFamilies:
    collector: Any = MultiProcessCollector
    return WorkerFamilies(tuple(collector.merge([str(file) for file in files], accumulate=True)))


def _values(path: Path) -> Iterable[tuple[str, float]]:
    file: Any = MmapedDict
    return ((key, value) for key, value, *_ in file.read_all_values_from_file(str(path)))


def _pid(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _encoded(values: Mapping[str, float]) -> bytes:
    """Write values in the form of prometheus-client's files (`prometheus_client.mmap_dict.MmapedDict`)."""
    parts = []
    for key, value in values.items():
        text = key.encode("utf-8")
        padded = text + b" " * (8 - (len(text) + 4) % 8)
        parts.append(struct.pack(f"i{len(padded)}sdd", len(text), padded, value, 0.0))
    body = b"".join(parts)
    return struct.pack("i4x", 8 + len(body)) + body
