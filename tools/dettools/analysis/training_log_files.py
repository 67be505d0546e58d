"""Finds out what wrote a log, and reads it; a folder is one run, its files those of its starts and resumptions."""

import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dettools.analysis.tensorboard_events import masked_crc32c, segment_tensorboard
from dettools.analysis.training_log import Segment, TrainingLog, TrainingLogError, stitched
from dettools.analysis.training_log_csv import segment_csv
from dettools.analysis.training_log_mmdet import segment_2x, segment_3x

_EXPECTED = (
    "expected a log of MMDetection 2.x (….log.json) or 3.x (vis_data/scalars.json), an event file of TensorBoard, or a "
    "CSV file with a column epoch, step or iter"
)
_PATTERNS = ("*.log.json", "**/vis_data/*.json", "results.csv", "metrics.csv", "**/events.out.tfevents.*")


def read_run(path: Path) -> TrainingLog:
    """Read the log of one run: a file, or a folder with the files of all its starts.

    Raises:
        TrainingLogError: it cannot be read, or is no log.
    """
    return stitched(str(path), _segments(path))


def read_resumed_run(paths: Sequence[Path]) -> TrainingLog:
    """Read several files as one run that was resumed, in the order given.

    Raises:
        TrainingLogError: one cannot be read, or is no log.
    """
    return stitched(" + ".join(map(str, paths)), [segment for path in paths for segment in _segments(path)])


def _segments(path: Path) -> list[Segment]:
    if not path.is_dir():
        return [read_segment(path)]
    for pattern in _PATTERNS:
        # The names begin with, or lie in folders named by, the time of their start.
        found = sorted(path.glob(pattern))
        if "vis_data" in pattern:
            found = _one_of_each_folder(found, path)
        if found:
            return [read_segment(file) for file in found]
    raise TrainingLogError(f"{path}: got a folder without a log, {_EXPECTED}")


def _one_of_each_folder(files: Sequence[Path], folder: Path) -> list[Path]:
    """3.x writes the same lines into scalars.json and into a file that is named by the time."""
    if not files:
        # The folder itself may be vis_data.
        files = sorted(folder.glob("scalars.json")) or sorted(folder.glob("[0-9]*_[0-9]*.json"))
    best: dict[Path, Path] = {}
    for file in files:
        if file.parent not in best or file.name == "scalars.json":
            best[file.parent] = file
    return list(best.values())


def read_segment(path: Path) -> Segment:
    """Read one file.

    Raises:
        TrainingLogError: it cannot be read, or is no log.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrainingLogError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not data:
        raise TrainingLogError(f"{path}: got an empty file, {_EXPECTED}")
    if "tfevents" in path.name or _is_record(data):
        return segment_tensorboard(path, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise TrainingLogError(f"{path}: got a binary file, {_EXPECTED}") from None
    if text.lstrip().startswith("{"):
        return _json_lines(path, text)
    if path.suffix == ".log" or re.match(r"\d{4}[-/]\d\d[-/]\d\d \d\d:\d\d:\d\d", text):
        raise TrainingLogError(
            f"{path}: got the log for people; {_EXPECTED}. MMDetection writes its JSON beside it: *.log.json (2.x) or "
            "vis_data/scalars.json (3.x)"
        )
    if "," in text.partition("\n")[0]:
        return segment_csv(path, text)
    raise TrainingLogError(f"{path}: got a text file, {_EXPECTED}")


def _is_record(data: bytes) -> bool:
    return len(data) > 12 and struct.unpack_from("<I", data, 8)[0] == masked_crc32c(data[:8])


def _json_lines(path: Path, text: str) -> Segment:
    lines: list[dict[str, Any]] = []
    broken: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            broken.append(number)
            continue
        if isinstance(found, dict):
            lines.append(found)
        else:
            broken.append(number)
    keys = {key for line in lines for key in line}
    if "images" in keys or not (
        keys & {"env_info", "mode", "step", "epoch", "iter"} or any("/" in key for key in keys)
    ):
        raise TrainingLogError(f"{path}: got JSON with {', '.join(sorted(keys)[:6]) or 'no objects'}, {_EXPECTED}")
    notes = []
    if broken:
        where = ", ".join(map(str, broken[:5])) + (", …" if len(broken) > 5 else "")
        notes.append(f"{path.name}: {len(broken)} lines are no JSON objects (line {where}) and are left out")
    # A 2.x log always names its mode; without rows, its first line tells.
    reader = segment_2x if keys & {"mode", "env_info"} else segment_3x
    return reader(path, lines, notes)
