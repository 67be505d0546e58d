"""Curves of a training: one metric of one run as points, smoothed; several runs as their mean and spread.

What is no number is counted, never drawn through: a loss that became NaN is the finding, not a gap.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dettools.analysis.training_log import TrainingLog, TrainingLogError

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One logged value with its place."""

    step: int
    epoch: int | None
    value: float


@dataclass(frozen=True)
class Curve:
    """One metric of one run.

    Attributes:
        log: name of the run.
        key: as it was asked for.
        metric: its name in the log.
        evaluation: whether evaluations found it.
        points: those that are finite, in order.
        lost: those that are NaN or infinite, in order.
        absent: values of -1, COCO's word for "no such objects".
        smoothed_by: weight of the past in the moving average; 0 for evaluations and learning rates, which have no noise
            to look through.
        smoothed: of the points; the values themselves without smoothing.
    """

    log: str
    key: str
    metric: str
    evaluation: bool
    points: tuple[Point, ...]
    lost: tuple[Point, ...]
    absent: int
    smoothed_by: float
    smoothed: tuple[float, ...]

    @property
    def best(self) -> Point | None:
        """The highest value, of losses and errors the lowest; the first of several."""
        if not self.points:
            return None
        sign = -1 if lower_is_better(self.metric) else 1
        return max(self.points, key=lambda point: sign * point.value)

    @property
    def lost_as(self) -> str:
        """What those that are no finite numbers are."""
        return "NaN" if all(math.isnan(point.value) for point in self.lost) else "NaN or infinite"

    @property
    def last(self) -> Point | None:
        """The last finite value."""
        return self.points[-1] if self.points else None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a JSON document; what is no finite number appears by its place only."""
        return {
            "log": self.log,
            "key": self.key,
            "metric": self.metric,
            "evaluation": self.evaluation,
            "last": self.last and vars(self.last),
            "best": self.best and vars(self.best),
            "not_finite": {"count": len(self.lost), "steps": [point.step for point in self.lost]},
            "absent": self.absent,
            "smoothed_by": self.smoothed_by,
            "points": [
                {**vars(point), "smoothed": smooth} for point, smooth in zip(self.points, self.smoothed, strict=True)
            ],
        }


@dataclass(frozen=True)
class Band:
    """Mean and spread of several runs, where all of them have values.

    Attributes:
        name: of the group.
        key: the metric.
        runs: how many.
        x: iterations or epochs.
        mean, std: at each x; the sample standard deviation.
    """

    name: str
    key: str
    runs: int
    x: Values
    mean: Values
    std: Values


def curve_of(log: TrainingLog, key: str, *, start_epoch: int = 1, smoothing: float = 0.0) -> Curve:
    """Return one metric of a run.

    Args:
        log: the run.
        key: the metric, see `TrainingLog.metric`.
        start_epoch: leave out what is before.
        smoothing: weight of the past, from 0 (none) to below 1, as TensorBoard's.

    Raises:
        TrainingLogError: the log has no such metric, or none from that epoch on.
    """
    metric, evaluation = log.metric(key)
    rows = [row for row in log.rows if row.evaluation == evaluation and metric in row.values]
    told = [Point(row.step, row.epoch, row.values[metric]) for row in rows if (row.epoch or start_epoch) >= start_epoch]
    if not told:
        raise TrainingLogError(
            f"{log.name}: got --start-epoch {start_epoch}, expected one up to {rows[-1].epoch}, the last with {metric}"
        )
    absent = [point for point in told if evaluation and point.value == -1 and ("mAP" in metric or "AR" in metric)]
    if len(absent) == len(told):
        raise TrainingLogError(
            f"{log.name}: {metric} is -1 throughout: the evaluated images have no objects of that kind. Name another "
            "metric."
        )
    weight = 0.0 if evaluation or scale_of(metric) == "learning rate" else smoothing
    finite = tuple(point for point in told if math.isfinite(point.value) and point not in absent)
    return Curve(
        log=log.name,
        key=key,
        metric=metric,
        evaluation=evaluation,
        points=finite,
        lost=tuple(point for point in told if not math.isfinite(point.value)),
        absent=len(absent),
        smoothed_by=weight,
        smoothed=tuple(smoothed([point.value for point in finite], weight)),
    )


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Return the exponential moving average, divided by the weight that its past has (as Adam and TensorBoard do)."""
    if not weight:
        return list(values)
    found: list[float] = []
    average = 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        found.append(average / (1 - weight**count))
    return found


def band_of(name: str, curves: Sequence[Curve], *, by_epoch: bool) -> Band:
    """Return mean and sample standard deviation of a metric over runs, between common ends, linearly interpolated.

    Raises:
        TrainingLogError: fewer than two runs, or they have no stretch in common.
    """
    series = [places_of(curve, by_epoch=by_epoch) for curve in curves]
    if len(series) < 2:
        raise TrainingLogError(f"got one run as {name!r}, expected two or more for a mean with its spread")
    if not all(len(x) for x, _ in series):
        raise TrainingLogError(f"{name}: a run has no finite value of {curves[0].key}, so there is no mean")
    low, high = max(x[0] for x, _ in series), min(x[-1] for x, _ in series)
    every = np.unique(np.concatenate([x for x, _ in series]))
    common = every[(every >= low) & (every <= high)]
    if not len(common):
        raise TrainingLogError(f"{name}: the runs have no stretch of {curves[0].key} in common, so there is no mean")
    table = np.stack([np.interp(common, x, y) for x, y in series])
    return Band(name, curves[0].key, len(series), common, table.mean(axis=0), table.std(axis=0, ddof=1))


def places_of(curve: Curve, *, by_epoch: bool) -> tuple[Values, Values]:
    """Return where the points of a curve are, in epochs or iterations, and their smoothed values."""
    x = [float(point.epoch or 0) if by_epoch else float(point.step) for point in curve.points]
    return np.array(x), np.array(curve.smoothed)


def lower_is_better(metric: str) -> bool:
    """Whether the best value of a metric is its lowest."""
    return any(word in metric.lower() for word in ("loss", "error", "time", "memory"))


def scale_of(metric: str) -> str:
    """Return what a metric is measured in: metrics of one scale share a panel."""
    name = metric.lower()
    for scale, words in (
        ("seconds", ("time",)),
        ("loss", ("loss",)),
        ("accuracy", ("map", "ap50", "precision", "recall", "_ar", "/ar", "f1")),
        ("learning rate", ("lr", "learning_rate")),
    ):
        if any(word in name for word in words):
            return scale
    return metric
