"""How long iterations took: weighted by the iterations that each logged value speaks for, by epoch and over the run.

The original averages the logged values of an epoch, then the epochs, each counted alike, and drops the first value of
every epoch, also where it is the only one: a mean of nothing, NaN.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dettools.analysis.training_log import Row, TrainingLog, TrainingLogError
from dettools.benchmark.bootstrap import block_length, interval, resample

_RESAMPLES, _CONFIDENCE = 2000, 0.95
# Fewer values give no interval worth printing.
_FEWEST = 8
_MOVING_AVERAGE = (
    "MMDetection 3.x logs a moving average of the time: single iterations spread more than median and p95 show, and a "
    "slow start counts in several values"
)
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class EpochTime:
    """Mean seconds per iteration of one epoch; ``epoch`` is None where the log counts none."""

    epoch: int | None
    iterations: int
    mean_s: float


@dataclass(frozen=True)
class TrainTime:
    """The times of one run, in seconds per iteration unless said otherwise.

    Attributes:
        log: name of the run.
        epochs: in order.
        iterations: that the values below speak for.
        left_out: values that were left out as the first of their epoch.
        mean_s, low_s, high_s: weighted mean, and its 95 % interval by a block bootstrap over the values.
        median_s, p95_s: weighted, of the logged values, each itself a mean over some iterations.
        std_over_epochs_s: of the epochs' means.
        data_time_share: of the time spent waiting for data, None if not logged.
        total_s: of all logged iterations, those left out above too.
        images_per_s: with a batch size.
        memory_mb: the largest that was logged.
        remaining_s: to the end of the planned epochs, 0 when it is reached; None where that is not known.
        notes: what a reader should know.
    """

    log: str
    epochs: tuple[EpochTime, ...]
    iterations: int
    left_out: int
    mean_s: float
    low_s: float | None
    high_s: float | None
    median_s: float
    p95_s: float
    std_over_epochs_s: float
    data_time_share: float | None
    total_s: float
    images_per_s: float | None
    memory_mb: float | None
    remaining_s: float | None
    notes: tuple[str, ...]
    resamples: Values = field(repr=False)

    @property
    def slowest(self) -> EpochTime:
        """The epoch with the largest mean."""
        return max(self.epochs, key=lambda one: one.mean_s)

    @property
    def fastest(self) -> EpochTime:
        """The epoch with the smallest mean."""
        return min(self.epochs, key=lambda one: one.mean_s)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a JSON document."""
        plain = {key: value for key, value in vars(self).items() if key not in ("resamples", "epochs", "notes")}
        return {
            **plain,
            "slowest_epoch": asdict(self.slowest),
            "fastest_epoch": asdict(self.fastest),
            "epochs": [asdict(one) for one in self.epochs],
            "notes": list(self.notes),
        }


def train_time(
    log: TrainingLog,
    *,
    include_outliers: bool = False,
    batch_size: int | None = None,
    max_epochs: int | None = None,
    epoch_iterations: int | None = None,
) -> TrainTime:
    """Return the times of a run.

    Args:
        log: the run.
        include_outliers: keep the first value of every epoch, in which workers start.
        batch_size: images of one iteration, on all GPUs together.
        max_epochs: of the training (default: what the log says).
        epoch_iterations: of one epoch (default: what the log says).

    Raises:
        TrainingLogError: no time per iteration was logged.
    """
    logged, notes = _timed(log, epoch_iterations)
    kept = [one for one, keep in zip(logged, _keeps(logged, include_outliers=include_outliers), strict=True) if keep]
    weights = np.array([one.iterations for one in kept], np.float64)
    times = np.array([one.seconds for one in kept])
    resamples = _resampled(times, weights)
    low, high = _ends(resamples)
    mean = float(np.average(times, weights=weights))
    epochs = _epochs(kept, times, weights)
    return TrainTime(
        log=log.name,
        epochs=epochs,
        iterations=int(weights.sum()),
        left_out=len(logged) - len(kept),
        mean_s=mean,
        low_s=low,
        high_s=high,
        median_s=weighted_quantile(times, weights, 0.5),
        p95_s=weighted_quantile(times, weights, 0.95),
        std_over_epochs_s=float(np.std([one.mean_s for one in epochs])),
        data_time_share=_data_share(kept),
        total_s=sum(one.seconds * one.iterations for one in logged),
        images_per_s=batch_size / mean if batch_size and mean else None,
        memory_mb=max((row.values["memory"] for row in log.training if "memory" in row.values), default=None),
        remaining_s=_remaining(log, mean, max_epochs, epoch_iterations),
        notes=notes,
        resamples=resamples,
    )


def speed_ratio(reference: TrainTime, other: TrainTime) -> tuple[float, float | None, float | None]:
    """Return how many times faster ``other`` runs its iterations than ``reference``, with the 95 % interval."""
    ratio = reference.mean_s / other.mean_s if other.mean_s else math.inf
    if not len(reference.resamples) or not len(other.resamples):
        return ratio, None, None
    low, high = _ends(reference.resamples / other.resamples[::-1])
    return ratio, low, high


def weighted_quantile(values: Values, weights: Values, share: float) -> float:
    """Return the least value that ``share`` of the weight does not exceed."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    place = int(np.searchsorted(reached, share * reached[-1] * (1 - 1e-12)))
    return float(values[order][min(place, len(values) - 1)])


class _Timed(NamedTuple):
    """A logged time: mean seconds of an iteration, and the part of them spent waiting for data."""

    epoch: int | None
    iterations: int
    seconds: float
    waiting: float


def _timed(log: TrainingLog, epoch_iterations: int | None) -> tuple[list[_Timed], tuple[str, ...]]:
    """Return the times of a log, and what to say about them."""
    training = log.training
    if not training:
        raise TrainingLogError(
            f"{log.name}: no iteration was logged, so there is no time to average: the training ended before its first "
            "logged iteration, or the log holds evaluations only"
        )
    for prefix in ("", "train/"):
        # A row of no known length counts one iteration.
        found = [
            _Timed(row.epoch, max(row.iterations, 1), row.values[f"{prefix}time"], _value(row, f"{prefix}data_time"))
            for row in training
            if math.isfinite(_value(row, f"{prefix}time"))
        ]
        if found:
            return found, (_MOVING_AVERAGE,) if "3.x" in log.format else ()
    by_epoch = [row for row in training if math.isfinite(_value(row, "epoch_time"))]
    if by_epoch and epoch_iterations:
        found = []
        for row in by_epoch:
            iterations = epoch_iterations * max(row.iterations, 1)
            found.append(_Timed(row.epoch, iterations, row.values["epoch_time"] / iterations, math.nan))
        return found, ("the evaluations are part of an epoch's time",)
    if by_epoch:
        mean = sum(row.values["epoch_time"] for row in by_epoch) / sum(max(row.iterations, 1) for row in by_epoch)
        raise TrainingLogError(
            f"{log.name}: the log times epochs, not iterations ({mean:.1f} s per epoch): give --epoch-iters N, the "
            "iterations of one epoch"
        )
    raise TrainingLogError(
        f"{log.name}: got no metric `time`, expected seconds per iteration. It has: {', '.join(log.metrics()[0])}"
    )


def _value(row: Row, name: str) -> float:
    return row.values.get(name, math.nan)


def _keeps(logged: Sequence[_Timed], *, include_outliers: bool) -> list[bool]:
    """Drop the first value of every epoch, unless it is the only one."""
    first = [place == 0 or logged[place - 1].epoch != one.epoch for place, one in enumerate(logged)]
    alone = [start and after for start, after in zip(first, [*first[1:], True], strict=True)]
    return [include_outliers or not start or only for start, only in zip(first, alone, strict=True)]


def _epochs(rows: Sequence[_Timed], times: Values, weights: Values) -> tuple[EpochTime, ...]:
    numbers = [row.epoch for row in rows]
    found = []
    for number in dict.fromkeys(numbers):
        own = np.array([other == number for other in numbers])
        found.append(EpochTime(number, int(weights[own].sum()), float(np.average(times[own], weights=weights[own]))))
    return tuple(found)


def _data_share(logged: Sequence[_Timed]) -> float | None:
    known = [one for one in logged if math.isfinite(one.waiting)]
    spent = sum(one.seconds * one.iterations for one in known)
    return sum(one.waiting * one.iterations for one in known) / spent if spent else None


def _remaining(log: TrainingLog, mean_s: float, max_epochs: int | None, epoch_iterations: int | None) -> float | None:
    epochs, length = max_epochs or log.plan.epochs, epoch_iterations or log.plan.epoch_iterations
    if not epochs or not length:
        return None
    # CSV logs count epochs, not iterations.
    last = log.rows[-1]
    done = max(row.step for row in log.rows) if last.epoch is None or last.step != last.epoch else last.epoch * length
    left = epochs * length - done
    # Up to one logging interval is not logged at the end.
    return mean_s * left if left > max(row.iterations for row in log.training) else 0.0


def _resampled(times: Values, weights: Values) -> Values:
    if len(times) < _FEWEST:
        return np.zeros(0)

    # Places are drawn, so that a time keeps its weight; the blocks' length is the times' own.
    def mean_of(places: Values) -> Values:
        picked = places.astype(np.intp)
        return np.average(times[picked], axis=1, weights=weights[picked])[:, None]

    places = np.arange(len(times), dtype=np.float64)
    return resample(places, mean_of, resamples=_RESAMPLES, seed=0, block=block_length(times))[:, 0]


def _ends(resamples: Values) -> tuple[float | None, float | None]:
    if not len(resamples):
        return None, None
    low, high = interval(resamples, _CONFIDENCE)
    return float(low), float(high)
