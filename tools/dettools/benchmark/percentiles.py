"""Percentiles of a level's latency: how they are defined, when they are shown, how sure they are.

**Percentiles** are numpy's default ("linear", type 7 of Hyndman and Fan 1996), over the requests that were *answered*,
with the circular block bootstrap's interval. One is shown only when its distribution-free 95 % interval exists at all,
that is when both ends are values of the sample: ``n ≥ ln(0.025) / ln(p)`` (David and Nagaraja 2003, "Order Statistics",
7.1): 72 answers for p95, 368 for p99, 3,688 for p99.9. Between that and 10 values beyond it (the textbook condition
n (1 - p) ≥ 10) it is shown, and `validity` calls it rough.

**A failed request is no fast request.** Each percentile also has a strict value, over every request that was due, a
failed one taking for ever; an SLO is judged by that one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dettools.benchmark.bootstrap import interval, resample
from dettools.benchmark.measurement import Sample

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
CONFIDENCE = 0.95
RESAMPLES = 1000

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Percentile:
    """One percentile of the latency.

    Attributes:
        p: such as 99.9.
        ms: over the answered requests; None when there are too few to show it.
        low_ms, high_ms: its bootstrap interval; None when it is not shown.
        strict_ms: over all requests due, a failed one taking for ever (inf); computed however few they are.
        beyond: how many answered requests lie beyond it, n (1 - p).
        reason: why it is not shown; else empty.
    """

    p: float
    ms: float | None
    low_ms: float | None
    high_ms: float | None
    strict_ms: float
    beyond: float
    reason: str = ""

    @property
    def name(self) -> str:
        """Such as ``p99.9``."""
        return f"p{self.p:g}"


def latency_percentiles(
    samples: Sequence[Sample],
    percentiles: Sequence[float] = PERCENTILES,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[Percentile, ...]:
    """Return the percentiles of these requests' latencies, as the module's docstring defines them."""
    latencies = latencies_ms([sample for sample in samples if sample.ok])
    due = np.sort([sample.latency_ms if sample.ok else math.inf for sample in samples])
    n = len(latencies)
    lows = highs = values = np.zeros(len(percentiles))
    if n:
        values = np.percentile(latencies, percentiles)
    if n and resamples:
        estimates = resample(
            latencies, lambda rows: np.percentile(rows, percentiles, axis=1).T, resamples=resamples, seed=seed
        )
        lows, highs = interval(estimates, confidence)
    found = []
    for p, value, low, high in zip(percentiles, values.tolist(), lows.tolist(), highs.tolist(), strict=True):
        fewest = fewest_answers(p)
        shown = n >= fewest
        found.append(
            Percentile(
                p,
                value if shown else None,
                low if shown and resamples else None,
                high if shown and resamples else None,
                strict_percentile(due, p),
                n * (100 - p) / 100,
                "" if shown else f"{n} answers, at least {fewest} are needed",
            )
        )
    return tuple(found)


def fewest_answers(p: float) -> int:
    """Return how many values are needed for a distribution-free 95 % interval of a percentile to exist."""
    share = max(p, 100 - p) / 100
    return math.ceil(math.log(0.025) / math.log(share)) if share < 1 else 1


def strict_percentile(ordered: Values, p: float) -> float:
    """Return numpy's linear percentile of sorted values of which the last may be infinite; inf of no values."""
    if not len(ordered):
        return math.inf
    position = p / 100 * (len(ordered) - 1)
    low, part = math.floor(position), position % 1
    if not part:
        return float(ordered[low])
    return float(ordered[low] + part * (ordered[low + 1] - ordered[low])) if ordered[low] < math.inf else math.inf


def latencies_ms(samples: Sequence[Sample]) -> Values:
    """Return the latencies (N,) in ms, in the order given."""
    return np.array([sample.latency_ms for sample in samples], np.float64)
