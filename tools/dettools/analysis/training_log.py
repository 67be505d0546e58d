"""A training run as rows of values, whatever wrote its log: the one form that curves and times are computed from.

training_log_files.read_run ─► Segment per file ─► stitched ─► TrainingLog ─► training_curves, train_time
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from detserve.errors import DetserveError


class TrainingLogError(DetserveError):
    """A log cannot be read, or does not hold what was asked for."""


@dataclass(frozen=True)
class Row:
    """What was logged at one moment.

    Attributes:
        step: iterations done since the training began.
        epoch: the epoch that the row belongs to, from 1; None where the log does not tell.
        values: by name; NaN and infinities as they were logged.
        evaluation: whether this is the outcome of an evaluation, not a row of the training itself.
        iterations: how many iterations the row speaks for: those since the row before it. 0 for an evaluation.
    """

    step: int
    epoch: int | None
    values: Mapping[str, float]
    evaluation: bool = False
    iterations: int = 0


@dataclass(frozen=True)
class Plan:
    """What a log says about its training as a whole; None where it does not.

    Attributes:
        epochs: how many it was to have.
        images_per_gpu: batch size of one GPU.
        epoch_iterations: iterations of one epoch.
    """

    epochs: int | None = None
    images_per_gpu: int | None = None
    epoch_iterations: int | None = None


@dataclass(frozen=True)
class Segment:
    """One file's rows, from one start of the training to its end or interruption."""

    path: Path
    format: str
    rows: tuple[Row, ...]
    plan: Plan = Plan()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingLog:
    """A run: its rows in the order of training, those of resumed files joined.

    Attributes:
        name: as it was given.
        format: of the last file.
        files: that were read, in order.
        rows: by step; none where the training ended before its first logged iteration.
        plan: what the log says about the training as a whole.
        resumed_at: steps at which a later file, or a later start in one file, takes over.
        superseded: rows of earlier starts that a later one ran again.
        notes: what a reader should know.
    """

    name: str
    format: str
    files: tuple[Path, ...]
    rows: tuple[Row, ...]
    plan: Plan
    resumed_at: tuple[int, ...]
    superseded: int
    notes: tuple[str, ...]

    @property
    def training(self) -> list[Row]:
        """The rows of the training itself."""
        return [row for row in self.rows if not row.evaluation]

    def metrics(self) -> tuple[list[str], list[str]]:
        """Return the names of what was logged while training, and of what evaluations found."""
        found: tuple[dict[str, None], dict[str, None]] = {}, {}
        for row in self.rows:
            found[row.evaluation].update(dict.fromkeys(row.values))
        training, evaluation = (sorted(names) for names in found)
        return training, evaluation

    def metric(self, key: str) -> tuple[str, bool]:
        """Find a metric by its name or the part of it that people know: `bbox_mAP` for `coco/bbox_mAP`.

        A name that was logged both while training and by evaluations is the training's; `val/NAME` is the evaluations'.

        Returns:
            its name in the rows, and whether evaluations logged it.

        Raises:
            TrainingLogError: there is none, or several; the message lists what there is.
        """
        training, evaluation = self.metrics()
        for word in (key, _ULTRALYTICS.get(key, key)):
            if word in training:
                return word, False
            if word in evaluation:
                return word, True
        if key.startswith("val/") and (bare := key.removeprefix("val/")) in evaluation:
            return bare, True
        known = [(name, False) for name in training] + [(name, True) for name in evaluation]
        close = [(name, late) for name, late in known if name.rpartition("/")[2] == key]
        if len(close) == 1:
            return close[0]
        if len(close) > 1:
            names = ", ".join(dict.fromkeys(name for name, _ in close))
            raise TrainingLogError(f"{self.name}: got the metric {key}, which may be any of {names}: name one of them")
        told = (
            f"of the training {', '.join(training) or 'nothing'}; of evaluations {', '.join(evaluation) or 'nothing'}"
        )
        why = ""
        if "mAP" in key and not evaluation:
            why = ' Please check if "--no-validate" is specified when you trained the model: no evaluation was logged.'
        raise TrainingLogError(f"{self.name} does not contain metric {key}. It has: {told}.{why}")


# So that one --keys names the same figure in logs of both.
_ULTRALYTICS = {
    "bbox_mAP": "metrics/mAP50-95(B)",
    "bbox_mAP_50": "metrics/mAP50(B)",
    "segm_mAP": "metrics/mAP50-95(M)",
    "segm_mAP_50": "metrics/mAP50(M)",
}


def stitched(name: str, segments: Sequence[Segment]) -> TrainingLog:
    """Join the starts of one training.

    A later start goes on from a checkpoint: what an earlier one did after that checkpoint is not part of the model any
    more, and is left out. A file in which the steps fall back holds several starts.
    """
    segments = _with_one_epoch_length(segments)
    starts = [(segment, rows) for segment in segments for rows in _starts(segment.rows)]
    kept: list[Row] = []
    resumed, superseded, notes = [], 0, [note for segment in segments for note in segment.notes]
    for segment, rows in starts:
        begin = rows[0].step - rows[0].iterations
        again = [row for row in kept if row.step > begin]
        if kept:
            resumed.append(begin)
            notes.append(_told(segment, begin, rows, again))
        kept = [*(row for row in kept if row.step <= begin), *rows]
        superseded += len(again)
    plans = [segment.plan for segment in segments]
    return TrainingLog(
        name=name,
        format=segments[-1].format,
        files=tuple(segment.path for segment in segments),
        rows=tuple(kept),
        plan=Plan(
            epochs=_last([plan.epochs for plan in plans]),
            images_per_gpu=_last([plan.images_per_gpu for plan in plans]),
            epoch_iterations=max((plan.epoch_iterations or 0 for plan in plans), default=0) or None,
        ),
        resumed_at=tuple(resumed),
        superseded=superseded,
        notes=tuple(notes),
    )


def _with_one_epoch_length(segments: Sequence[Segment]) -> list[Segment]:
    """Count the steps of 2.x files alike: the one that knows most of its epochs tells their length."""
    lengths = [segment.plan.epoch_iterations or 0 for segment in segments]
    length = max(lengths)
    found = []
    for segment, own in zip(segments, lengths, strict=True):
        if segment.format == "MMDetection 2.x" and 0 < own < length:
            rows = [
                replace(row, step=row.step + (row.epoch - (0 if row.evaluation else 1)) * (length - own))
                if row.epoch
                else row
                for row in segment.rows
            ]
            segment = replace(segment, rows=tuple(rows))
        found.append(segment)
    return found


def _starts(rows: Sequence[Row]) -> list[list[Row]]:
    found: list[list[Row]] = []
    last = math.inf
    for row in rows:
        again = (
            found
            and not row.evaluation
            and any(other.step == row.step and not other.evaluation for other in found[-1][-2:])
        )
        if row.step < last or again:
            found.append([])
        found[-1].append(row)
        last = row.step
    return found


def _told(segment: Segment, begin: int, rows: Sequence[Row], again: Sequence[Row]) -> str:
    if begin <= 0:
        left_out = f"{len(again)} rows of before are left out (name their file)"
        return f"{segment.path.name}: starts over from the beginning; {left_out}"
    text = f"{segment.path.name}: resumed after iteration {begin}"
    if again:
        text += (
            f"; {len(again)} rows of before ({again[0].step} to {again[-1].step}) were run again: the later run wins"
        )
        if again[-1].step > rows[-1].step:
            text += f", though it ends at {rows[-1].step}"
    return text


def _last(values: Sequence[int | None]) -> int | None:
    return next((value for value in reversed(values) if value is not None), None)
