"""How sure a figure of one level is: resampling that respects that neighbouring requests resemble each other.

Latencies are correlated in time: a slow stretch makes many of them slow. Resampling single requests would take each for
a witness of its own and give intervals that are far too narrow. The **circular block bootstrap** (Politis and Romano
1992) draws whole stretches instead. Their length is chosen from the series' own autocorrelation (Politis and White
2004, "Automatic block-length selection for the dependent bootstrap", with the correction of Patton, Politis and White
2009).
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Series = npt.NDArray[np.float64]

_CELLS = 2_000_000
"""Resampled values held at once (16 MB)."""


def block_length(series: Series) -> int:
    """Return the length of the stretches to draw, between 1 and ``min(3 √N, N / 3)``.

    Autocorrelation counts up to twice the lag after which it stays within chance (``2 √(log10(N) / N)``), under a
    flat-top window; the length is ``(2 g² / (4/3 s²) · N)^(1/3)`` with the window's sums g of ``|k| R(k)`` and s of
    ``R(k)``.
    """
    n = len(series)
    longest = max(1, math.ceil(min(3 * math.sqrt(n), n / 3)))
    centred = series - series.mean() if n else series
    power = float(centred @ centred)
    if n < 8 or power <= 0:
        return 1
    in_a_row = max(5, round(math.log10(n)))
    lags = min(n - 1, math.ceil(math.sqrt(n)) + in_a_row)
    covariance = np.array([float(centred[lag:] @ centred[: n - lag]) / n for lag in range(lags + 1)])
    chance = np.abs(covariance) * n / power < 2 * math.sqrt(math.log10(n) / n)
    quiet = (lag for lag in range(1, lags - in_a_row + 2) if chance[lag : lag + in_a_row].all())
    bandwidth = min(2 * max(next(quiet, lags) - 1, 1), lags)
    lag = np.arange(1, bandwidth + 1)
    window = np.minimum(1.0, 2 * (1 - lag / bandwidth))
    g = 2 * float((window * lag * covariance[1 : bandwidth + 1]).sum())
    s = float(covariance[0] + 2 * (window * covariance[1 : bandwidth + 1]).sum())
    if s <= 0:
        return longest
    best: float = (2 * g**2 / (4 / 3 * s**2) * n) ** (1 / 3)
    return min(longest, max(1, math.ceil(best)))


def resample(
    series: Series, statistic: Callable[[Series], Series], *, resamples: int, seed: int, block: int | None = None
) -> Series:
    """Return the statistic of each resample, (resamples, F).

    Args:
        series: (N,) values in order of time.
        statistic: maps (R, N), one resample per row, to (R, F).
        resamples: how many.
        seed: the same seed gives the same figures.
        block: length of the stretches (default: `block_length`).
    """
    n = len(series)
    block = block or block_length(series)
    rng = np.random.default_rng(seed)
    stretches = math.ceil(n / block)
    rows = max(1, _CELLS // max(1, n))
    found = []
    for first in range(0, resamples, rows):
        starts = rng.integers(0, n, (min(rows, resamples - first), stretches, 1))
        picks = ((starts + np.arange(block)) % n).reshape(len(starts), -1)[:, :n]
        found.append(statistic(series[picks]))
    return np.concatenate(found)


def interval(estimates: Series, confidence: float) -> tuple[Series, Series]:
    """Return the lower and upper ends (F,) that enclose the share ``confidence`` of the resamples' figures."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(estimates, (tail, 1 - tail), axis=0)
    return low, high
