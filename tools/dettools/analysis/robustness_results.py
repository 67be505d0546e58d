"""What a robustness run measured, on disk: ``{corruption: {severity: metrics}}`` and whose figures they are.

    results.json   {"robustness": 1, "model": …, "identity": {…}, "results": {"fog": {"0": {…}, "1": {…}}}}

A cell is one corruption at one severity: ``{"bbox": {"AP": 0.33, …}, "images": 50, "failed": {}, "latency_ms": {…}}``.
Severity 0 is the run without corruption, and stands in every corruption as in MMDetection's files. Those of its
``test_robustness.py`` are read too, whichever release wrote them; a cell that is not there is never a zero.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from detserve.errors import DetserveError

from dettools.analysis.corruptions import NO_CORRUPTION
from dettools.restricted_pickle import load_restricted

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
IOU_TYPES = ("bbox", "segm", "keypoints")
_FORMAT = 1
_PICKLES = (".pkl", ".pickle")
_KEY = re.compile(rf"(?:.*/)?(?:({'|'.join(IOU_TYPES)})_)?(m?A[PR].*)")
_AREA = re.compile(r"(AP|AR)_?([sml])(?:@\d+)?")
_NUMBER = re.compile(r"(AP|AR)[_@]?(\d+)")


class RobustnessError(DetserveError):
    """A file of robustness results cannot be read, or belongs to another run."""


@dataclass(frozen=True)
class Cell:
    """One corruption at one severity.

    Attributes:
        figures: IoU type to COCO's figures by name; None where there is nothing to measure. A failed image counts as
            one in which nothing was found.
        images: how many were asked for; 0 where the file does not tell.
        failed: why images have no answer, and how many.
        latency_ms: ``p50`` and ``p95`` of the answered requests, by the one who asks; empty where not told.
        intervals: IoU type to the two bounds of AP's bootstrap interval.
        unchanged: of a corruption that keeps every pixel, on how many images the detections stayed what they were.
    """

    figures: Mapping[str, Mapping[str, float | None]]
    images: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    unchanged: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the cell of the file."""
        return {
            **{kind: dict(figures) for kind, figures in self.figures.items()},
            "images": self.images,
            "failed": dict(self.failed),
            "latency_ms": dict(self.latency_ms),
            "ap_interval": {kind: list(bounds) for kind, bounds in self.intervals.items()},
            "unchanged": self.unchanged,
        }

    @classmethod
    def read(cls, raw: object) -> Self:
        """Read a cell of our files, or of MMDetection's: nested (2.x), flat with prefixes (3.x), or VOC's list."""
        if isinstance(raw, list | tuple):
            found = [one["ap"] for one in raw if isinstance(one, Mapping)]
            return cls({"bbox": {"AP50": float(np.mean(found))}} if found else {})
        if not isinstance(raw, Mapping):
            raise RobustnessError(f"a cell is {type(raw).__name__}, expected figures by name")
        figures: dict[str, dict[str, float | None]] = {}
        for key, value in raw.items():
            if key in IOU_TYPES and isinstance(value, Mapping):
                found_here = {str(name): _figure(one) for name, one in value.items()}
                figures.setdefault(key, {}).update(found_here)
            elif (match := _KEY.fullmatch(str(key))) and (name := canonical_metric(match[2])) is not None:
                # VOCMetric writes no IoU type, and its mean over IoU thresholds beside AP50.
                figures.setdefault(match[1] or "bbox", {})[name] = _figure(value)
        told = {key: raw[key] for key in ("images", "failed", "latency_ms", "unchanged") if key in raw}
        intervals = {kind: (low, high) for kind, (low, high) in raw.get("ap_interval", {}).items()}
        return cls(figures, **told, intervals=intervals)


@dataclass(frozen=True)
class RobustnessResults:
    """All cells that there are.

    Attributes:
        model: what was asked, for people.
        identity: what must be equal for cells to belong together; empty in MMDetection's files.
        clean: without corruption; None where that was not measured.
        cells: corruption to severity to cell, in the order of the file; none at severity 0.
    """

    model: str
    identity: Mapping[str, Any] = field(repr=False)
    clean: Cell | None
    cells: Mapping[str, Mapping[int, Cell]]

    def with_cell(self, corruption: str, severity: int, cell: Cell) -> "RobustnessResults":
        """Return the same with one cell more; severity 0 is the run without corruption."""
        if severity == 0:
            return RobustnessResults(self.model, self.identity, cell, self.cells)
        cells = {**self.cells, corruption: {**self.cells.get(corruption, {}), severity: cell}}
        return RobustnessResults(self.model, self.identity, self.clean, cells)

    def to_json(self) -> dict[str, Any]:
        """Return the file."""
        results: dict[str, dict[str, Any]] = {}
        clean = {} if self.clean is None else {"0": self.clean.to_json()}
        for corruption, cells in (self.cells or {NO_CORRUPTION: {}}).items():
            results[corruption] = {**clean, **{str(one): cells[one].to_json() for one in sorted(cells)}}
        return {"robustness": _FORMAT, "model": self.model, "identity": dict(self.identity), "results": results}

    def save(self, path: Path) -> None:
        """Write the file whole or not at all: a run that is ended while writing loses nothing.

        Raises:
            RobustnessError: it cannot be written there.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as stream:
                json.dump(self.to_json(), stream, indent=1)
            Path(stream.name).replace(path)
        except OSError as error:
            raise RobustnessError(
                f"{path}: cannot be written: {error.strerror or error}. Name another --out."
            ) from None


def read_results(path: Path) -> RobustnessResults:
    """Read a file of `RobustnessResults.save`, or of MMDetection's test_robustness.py (a pickle, or the same as JSON).

    Raises:
        DetserveError: it cannot be read, or holds something else.
    """
    document = load_restricted(path) if path.suffix in _PICKLES else _json(path)
    ours = isinstance(document, Mapping) and "robustness" in document
    if ours and document["robustness"] != _FORMAT:
        raise RobustnessError(
            f"{path}: format {document['robustness']!r}, expected {_FORMAT}: another version wrote it."
        )
    table = document.get("results") if ours else document
    try:
        clean, cells = _cells(table)
    except (RobustnessError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise RobustnessError(
            f"{path}: expected {{corruption: {{severity: metrics}}}}, as `detserve robustness --out` or MMDetection's "
            f"test_robustness.py writes ({error}). Name its results file."
        ) from None
    model = str(document["model"]) if ours else path.name
    return RobustnessResults(model, document["identity"] if ours else {}, clean, cells)


def resumed_results(path: Path, model: str, identity: Mapping[str, Any], *, fresh: bool) -> RobustnessResults:
    """Return what an earlier run left in the file, or nothing yet.

    Raises:
        RobustnessError: the file is of another model, data set or seed.
    """
    if fresh or not path.exists():
        return RobustnessResults(model, identity, None, {})
    there = read_results(path)
    plain = json.loads(json.dumps(identity))
    keys = sorted(plain.keys() | there.identity.keys())
    if differing := [key for key in keys if plain.get(key) != there.identity.get(key)]:
        what = "; ".join(f"{key}: {there.identity.get(key)!r} there, {plain.get(key)!r} now" for key in differing)
        raise RobustnessError(
            f"{path} holds the results of another run ({what}). Name another --out, or drop what is there with --fresh."
        )
    return there


def canonical_metric(name: str) -> str | None:
    """Return COCO's short name of a figure: ``AP50`` of ``AP50``, ``mAP_50`` and ``AP_50``; None for no figure."""
    plain = name.removeprefix("m")
    if plain in METRICS:
        return plain
    if match := _AREA.fullmatch(plain) or _NUMBER.fullmatch(plain):
        joined = f"{match[1]}{match[2]}"
        return joined if joined in METRICS else None
    return None


def _cells(table: object) -> tuple[Cell | None, dict[str, dict[int, Cell]]]:
    if not isinstance(table, Mapping) or not table:
        raise RobustnessError("it is no table of corruptions")
    clean: Cell | None = None
    cells: dict[str, dict[int, Cell]] = {}
    for corruption, row in table.items():
        for severity, raw in row.items():
            if int(severity) == 0:
                clean = clean or Cell.read(raw)
            elif not 1 <= int(severity) <= 5:
                raise RobustnessError(f"{corruption} has the severity {severity}, expected 0 to 5")
            else:
                cells.setdefault(str(corruption), {})[int(severity)] = Cell.read(raw)
    return clean, cells


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RobustnessError(f"{path}: cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise RobustnessError(f"{path}: expected JSON: {error}.") from None


def _figure(value: object) -> float | None:
    """Return a figure; -1 is pycocotools' word for nothing to measure."""
    if value is None:
        return None
    number = float(value)  # type: ignore[arg-type]
    return None if number < 0 or not np.isfinite(number) else number
