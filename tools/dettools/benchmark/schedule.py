"""When requests are due and which image each carries, fixed by a seed before the first is sent."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from detserve.errors import DetserveError

from dettools.benchmark.measurement import Arrivals


def arrival_times(rate: float, arrivals: Arrivals, duration_s: float, seed: int = 0) -> npt.NDArray[np.float64]:
    """Return when the requests of an open loop are due, in seconds from its start, ascending, all below the duration.

    ``constant``: every ``1 / rate`` seconds, the first at 0. ``poisson``: independent users, so gaps that are
    exponentially distributed with mean ``1 / rate``.

    Raises:
        DetserveError: the rate is not positive.
    """
    if not rate > 0:
        raise DetserveError(f"Got a rate of {rate:g} requests per second; expected more than 0.")
    if arrivals == "constant":
        times = np.arange(int(np.ceil(duration_s * rate)) + 1) / rate
    else:
        # Enough draws that they outlast the duration with near certainty; what is over is cut.
        expected = duration_s * rate
        draws = int(expected + 10 * np.sqrt(expected) + 20)
        gaps: npt.NDArray[np.float64] = np.random.default_rng(seed).exponential(1 / rate, draws)
        times = np.cumsum(gaps)
    return times[times < duration_s]


def image_order(count: int, seed: int = 0) -> Iterator[int]:
    """Yield positions of images without end: each pass has every image once, in an order of its own."""
    random = np.random.default_rng(seed)
    while True:
        yield from random.permutation(count).tolist()
