"""The JSON lines that MMDetection 2.x and 3.x write while training, as rows with the right epoch and step.

2.x counts iterations within each epoch (`mode`, `epoch`, `iter`) or, run by iterations, throughout. 3.x counts them
throughout (`step`), and counts an evaluation in epochs: `step` 5 of an evaluation is epoch 5, not iteration 5.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dettools.analysis.training_log import Plan, Row, Segment

_COUNTERS = {"mode", "epoch", "iter", "step"}
_EPOCHS = re.compile(r"\b(?:total_epochs|max_epochs)\s*=\s*(\d+)")
_BATCH = re.compile(r"\b(?:samples_per_gpu|batch_size)\s*=\s*(\d+)")
Line = Mapping[str, Any]


def segment_2x(path: Path, lines: Sequence[Line], notes: Sequence[str] = ()) -> Segment:
    """Return the rows of a 2.x log; ``lines`` are its JSON objects."""
    logged = [line for line in lines if isinstance(line.get("epoch"), int) and isinstance(line.get("iter"), int)]
    train = [line for line in logged if not _evaluates_2x(line)]
    throughout = any(
        after["epoch"] > before["epoch"] and after["iter"] > before["iter"] for before, after in pairwise(train)
    )
    interval = _interval(train)
    length = 0 if throughout else _epoch_length(logged, train, interval)
    rows: list[Row] = []
    last = (0, 0)
    for line in logged:
        epoch, step = line["epoch"], line["iter"]
        values = numbers(line)
        if _evaluates_2x(line):
            # Its own `iter` may count the images of the validation.
            done = rows[-1].step if throughout and rows else epoch * length
            rows.append(Row(done, epoch, values, evaluation=True))
            continue
        since = last[1] if last[1] < step and (throughout or last[0] == epoch) else None
        # The first row of a file that goes on inside an epoch, or of a new epoch.
        iterations = step - since if since is not None else min(step, interval or step)
        rows.append(Row(step if throughout else (epoch - 1) * length + step, epoch, values, iterations=iterations))
        last = (epoch, step)
    text = "".join(str(line.get("config", "")) for line in lines)
    # While the first epoch runs nobody knows how long it is.
    known = length if any(line["epoch"] > 1 or _evaluates_2x(line) for line in logged) else 0
    return Segment(path, "MMDetection 2.x", tuple(rows), plan_of(text, known or None), tuple(notes))


def segment_3x(path: Path, lines: Sequence[Line], notes: Sequence[str] = (), form: str = "MMDetection 3.x") -> Segment:
    """Return the rows of a 3.x log; ``lines`` are its JSON objects."""
    train = [line for line in lines if not _evaluates_3x(line)]
    steps = Counter(int(after.get("step", 0)) - int(before.get("step", 0)) for before, after in pairwise(train))
    distances = [distance for distance, _ in steps.most_common() if distance > 0]
    rows: list[Row] = []
    for line in lines:
        step = line.get("step", line.get("iter"))
        values = numbers(line)
        if _evaluates_3x(line):
            if not values:
                continue
            trained = rows[-1] if rows else None
            # The evaluations' step counts epochs, or iterations where it is that of the training.
            if trained is None:
                rows.append(Row(int(step or 0), None, values, evaluation=True))
            else:
                by_epoch = trained.epoch is not None and step is not None and step <= trained.epoch
                epoch = int(step) if by_epoch and step is not None else trained.epoch
                rows.append(Row(trained.step, epoch, values, evaluation=True))
            continue
        if not isinstance(step, int | float):
            continue
        before = next((row.step for row in reversed(rows) if not row.evaluation), None)
        known = before is not None and before < step
        epoch = int(line["epoch"]) if "epoch" in line else None
        # A file that goes on from a checkpoint begins late; a single row of it speaks for an epoch at most.
        guess = distances[0] if distances else -(-int(step) // (epoch or 1))
        iterations = int(step) - before if known and before is not None else min(int(step), guess)
        rows.append(Row(int(step), epoch, values, iterations=iterations))
    return Segment(path, form, tuple(rows), plan_of(_config_beside(path), _length_3x(rows)), tuple(notes))


def numbers(line: Line) -> dict[str, float]:
    """Return the numbers of a row: neither its counters nor texts; of nested ones (learning rates) each."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": inner for name, inner in numbers(value).items()}
        elif key not in _COUNTERS and isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = float(value)
    return found


def plan_of(config: str, epoch_iterations: int | None) -> Plan:
    """Read the number of epochs and the batch size of the training from a config's text."""
    # 3.x sorts its config: the batch size of the test comes first.
    epochs, batch = _EPOCHS.search(config), _BATCH.search(config, max(0, config.find("train_dataloader")))
    return Plan(int(epochs[1]) if epochs else None, int(batch[1]) if batch else None, epoch_iterations)


def _evaluates_2x(line: Line) -> bool:
    return line.get("mode") != "train"


def _evaluates_3x(line: Line) -> bool:
    return ("epoch" not in line and "iter" not in line) or any("/" in key for key in line)


def _config_beside(path: Path) -> str:
    try:
        return (path.parent / "config.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _interval(train: Sequence[Line]) -> int:
    """Return the iterations between two rows: the commonest distance within an epoch; 0 if there is none."""
    steps = Counter(
        after["iter"] - before["iter"]
        for before, after in pairwise(train)
        if after["epoch"] == before["epoch"] and after["iter"] > before["iter"]
    )
    return steps.most_common(1)[0][0] if steps else 0


def _epoch_length(logged: Sequence[Line], train: Sequence[Line], interval: int) -> int:
    """Return the iterations of a 2.x epoch: an evaluation's `iter` where it fits, else the last logged one."""
    most = max((line["iter"] for line in train), default=0)
    ends = Counter(
        line["iter"] for line in logged if _evaluates_2x(line) and most <= line["iter"] < most + max(interval, 1)
    )
    return ends.most_common(1)[0][0] if ends else most


def _length_3x(rows: Sequence[Row]) -> int | None:
    """Return the iterations of an epoch: its last step by its number; None while the first one runs."""
    last: dict[int, int] = {}
    for row in rows:
        if row.epoch is not None and not row.evaluation:
            last[row.epoch] = row.step
    whole = [epoch for epoch in last if epoch + 1 in last or any(row.evaluation and row.epoch == epoch for row in rows)]
    if not whole:
        return None
    # Rows end up to an interval before their epoch: the nearest bound from the most epochs.
    return max(-(-last[epoch] // epoch) for epoch in whole)
