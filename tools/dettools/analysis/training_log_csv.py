"""CSV files of training: ultralytics' results.csv, Lightning's metrics.csv, and others with a row per epoch or step.

A column `time` that only grows is the time since the start (ultralytics); else it is seconds per iteration.
"""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from dettools.analysis.training_log import Row, Segment, TrainingLogError

_STEPS = ("step", "iter", "iteration", "global_step")
_FEWEST_TO_GROW = 3
_EVALUATION = re.compile(r"(^|[/_])(val|valid|validation|eval|test|metrics?)([/_]|$)|mAP|\bAP|\bAR", re.ASCII)


def segment_csv(path: Path, text: str) -> Segment:
    """Return the rows of a CSV file.

    Raises:
        TrainingLogError: it has no column that counts epochs or steps, or no numbers.
    """
    reader = csv.reader(text.splitlines(), skipinitialspace=True)
    header = [name.strip() for name in next(reader, [])]
    # ultralytics appends to the file of a run that is started again, with its header.
    table = [cells for cells in reader if any(cell.strip() for cell in cells) and cells[0].strip() != header[0]]
    counter = next((name for name in _STEPS if name in header), None)
    if counter is None and "epoch" not in header:
        raise TrainingLogError(
            f"{path}: got the columns {', '.join(header) or '(none)'}, expected one named epoch, step or iter"
        )
    notes: list[str] = []
    records = [_record(header, cells) for cells in table]
    if short := sum(len(cells) < len(header) for cells in table):
        notes.append(f"{path.name}: {short} rows with missing columns")
    epochs = [record["epoch"] for record in records if "epoch" in record]
    shift = 1 if epochs and min(epochs) == 0 else 0
    if shift:
        notes.append(f"{path.name}: counts epochs from 0; shown from 1")
    elapsed = _grows([record["time"] for record in records if "time" in record])
    rows: list[Row] = []
    before = 0
    clock = 0.0
    for record in records:
        epoch = math.ceil(record["epoch"]) + shift if "epoch" in record else None
        step = int(record[counter]) if counter and counter in record else epoch
        if step is None:
            continue
        if step < before:
            before = step - 1
        values = {name: value for name, value in record.items() if name not in ("epoch", *_STEPS)}
        if elapsed and "time" in values:
            values["elapsed"] = values.pop("time")
            # A run that is started again counts its time anew.
            clock = clock if values["elapsed"] >= clock else 0.0
            values["epoch_time" if counter is None else "interval_time"] = values["elapsed"] - clock
            clock = values["elapsed"]
        trained = {name: value for name, value in values.items() if not is_evaluation(name)}
        evaluated = {name: value for name, value in values.items() if name not in trained}
        if trained:
            if step == before and any(
                _same(row, step, evaluation=False) and trained.keys() & row.values for row in rows[-2:]
            ):
                before = step - 1
            _add(rows, Row(step, epoch, trained, iterations=step - before))
            before = step
        if evaluated:
            _add(rows, Row(step, epoch, evaluated, evaluation=True))
    form = "ultralytics results.csv" if any(name.startswith("metrics/") for name in header) else "CSV"
    return Segment(path, form, tuple(rows), notes=tuple(notes))


def _add(rows: list[Row], row: Row) -> None:
    """Append a row, or join it to the one of its step: Lightning writes what belongs together into several."""
    for place in range(len(rows) - 1, max(-1, len(rows) - 3), -1):
        other = rows[place]
        if _same(other, row.step, evaluation=row.evaluation) and not row.values.keys() & other.values:
            rows[place] = replace(other, values={**other.values, **row.values})
            return
    rows.append(row)


def _same(row: Row, step: int, *, evaluation: bool) -> bool:
    return row.step == step and row.evaluation == evaluation


def is_evaluation(name: str) -> bool:
    """Whether a metric of that name comes from an evaluation."""
    return not name.startswith(("train/", "train_")) and bool(_EVALUATION.search(name))


def _record(header: Sequence[str], cells: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, cell in zip(header, cells, strict=False):
        try:
            found[name] = float(cell)
        except ValueError:
            continue
    # An epoch or step that is no number says nothing.
    return {name: value for name, value in found.items() if name not in ("epoch", *_STEPS) or math.isfinite(value)}


def _grows(times: Sequence[float]) -> bool:
    rising = sum(after > before for before, after in pairwise(times))
    # Once less where the run was started again.
    return len(times) >= _FEWEST_TO_GROW and rising >= len(times) - 2
