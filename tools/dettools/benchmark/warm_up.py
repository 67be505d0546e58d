"""Where a level's warm-up ends: found in the latencies themselves, not guessed by a number of requests.

    latencies in order of time ─► means of 5 ─► MSER: cut where the rest is known best ─► was the cut part different?

**MSER-5** (White 1997, "An effective truncation heuristic for bias reduction in simulation output", Simulation 69(6);
in batches of 5: White, Cobb and Spratt 2000): with batch means ``m[0] … m[k-1]``, cut the ``d`` first that minimise
``sum((m[i] - mean)², i ≥ d) / (k - d)²``, the squared standard error of the mean of what is kept. At most half is cut:
a minimum at that bound says that the level never settled.

**A stall is no warm-up.** MSER alone also cuts everything before a single slow stretch in the first half, and so would
remove the very tail that a benchmark is there to show. A cut is kept only as far as it is a transient *from the start*:
at least half of the batch means cut must lie outside the central 90 % of those kept, by more than 1 % of their median.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dettools.benchmark.measurement import Sample

BATCH = 5
FEWEST_BATCHES = 8
"""Below this nothing is cut: a minimum over so few means is chance."""
NOTHING = 0.01


@dataclass(frozen=True)
class WarmUp:
    """The part of a level that is not counted.

    Attributes:
        requests: how many of the level's requests were due in it.
        seconds: when it ended, since the start of the level.
        settled: whether it ended; False when the level was still changing in the middle of its time.
        rising: whether it did not settle because the latencies rise: what was cut is faster than what is kept.
    """

    requests: int
    seconds: float
    settled: bool
    rising: bool = False


def find_warm_up(samples: Sequence[Sample]) -> WarmUp:
    """Return the warm-up of a level; requests that failed do not count for finding it.

    Args:
        samples: every request of the level, in the order they were due.
    """
    answered = [sample for sample in samples if sample.ok]
    latencies = np.array([sample.latency_ms for sample in answered], np.float64)
    cut, settled = truncation(latencies)
    if not cut:
        return WarmUp(0, 0.0, settled)
    start_s = answered[cut].scheduled_s
    before = [sample for sample in samples if sample.scheduled_s < start_s]
    rising = not settled and bool(np.median(latencies[:cut]) < np.median(latencies[cut:]))
    return WarmUp(len(before), start_s, settled, rising)


def truncation(series: npt.NDArray[np.float64]) -> tuple[int, bool]:
    """Return how many values at the start are transient, a multiple of 5, and whether the series settles.

    Args:
        series: (N,) values in order of time.
    """
    batches = len(series) // BATCH
    if batches < FEWEST_BATCHES:
        return 0, True
    means = series[: batches * BATCH].reshape(batches, BATCH).mean(axis=1)
    best = int(np.argmin(mser(means)[: batches // 2 + 1]))
    low, high = np.quantile(means[best:], (0.05, 0.95))
    slack = NOTHING * float(np.median(means[best:]))
    outside = np.cumsum((means[:best] < low - slack) | (means[:best] > high + slack))
    transient = np.flatnonzero(outside * 2 >= np.arange(1, best + 1))
    cut = int(transient[-1]) + 1 if len(transient) else 0
    return cut * BATCH, cut < batches // 2


def mser(means: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the statistic (k,) to be minimised: the squared standard error when the first 0 … k-1 are cut."""
    centred = means - means.mean()
    kept = np.arange(len(means), 0, -1, dtype=np.float64)
    sums = np.cumsum(centred[::-1])[::-1]
    squares = np.cumsum(centred[::-1] ** 2)[::-1]
    return np.maximum(squares - sums**2 / kept, 0.0) / kept**2
