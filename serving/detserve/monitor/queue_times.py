"""How long requests waited in TorchServe's queue, as a histogram.

TorchServe 0.12 has the sum of the times and the number of requests, from which comes a mean and no percentile; its
histograms cannot be used (milliseconds in buckets that end at 10). So its counters are read once a second, and each
second's mean stands for the requests of that second: a percentile is one of seconds weighted by their requests. What
an alert or an autoscaler asks about, a queue that lasts, is seen exactly; a single slow request among fast ones is not.
"""

import itertools
from collections.abc import Iterable, Mapping

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric

BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
ModelKey = tuple[str, str]
"""Name and version; TorchServe calls the version ``default`` where the request named none."""


class QueueTimes:
    """Fills the histogram from readings of TorchServe's counters."""

    def __init__(self) -> None:
        self._last: dict[ModelKey, tuple[float, float]] = {}
        self._counts: dict[ModelKey, list[float]] = {}
        self._sums: dict[ModelKey, float] = {}

    def take(self, reading: Mapping[ModelKey, tuple[float, float]]) -> None:
        """Take a reading: seconds waited and requests of each model, both since the server began."""
        for key, (waited_s, requests) in reading.items():
            waited_before_s, before = self._last.get(key, (0.0, 0.0))
            self._last[key] = (waited_s, requests)
            counts = self._counts.setdefault(key, [0.0] * (len(BUCKETS_S) + 1))
            self._sums.setdefault(key, 0.0)
            new, new_s = requests - before, waited_s - waited_before_s
            if new <= 0 or new_s < 0:  # the two counters do not move at the same moment
                self._last[key] = (waited_before_s, before) if new == 0 else (waited_s, requests)
                continue
            mean_s = new_s / new
            counts[next((at for at, bound in enumerate(BUCKETS_S) if mean_s <= bound), len(BUCKETS_S))] += new
            self._sums[key] += new_s

    def collect(self) -> Iterable[Metric]:
        """Return the metric family."""
        family = HistogramMetricFamily(
            "detserve_queue_seconds",
            "Time in the server's queue, of each second's requests their mean.",
            labels=("model_name", "model_version"),
        )
        bounds = [*(str(bound) for bound in BUCKETS_S), "+Inf"]
        for key, counts in self._counts.items():
            buckets = list(zip(bounds, itertools.accumulate(counts), strict=True))
            family.add_metric(list(key), buckets, self._sums[key])
        return [family]
