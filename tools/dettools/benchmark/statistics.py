"""What one level says: throughput, latency, its parts, what it cost; from the raw samples, without the warm-up.

Percentiles are defined in `percentiles`, the warm-up in `warm_up`. Errors are counted over the whole level: none is
excused as warm-up.

**Throughput** is answers per second from the end of the warm-up until the last request was due, so that the draining of
the last requests, when the load is no longer there, does not count. In a closed loop, a request that was in flight at
either end counts with the share of its time that lies between them: otherwise the count would depend on where in a
batch the ends fall. In an open loop only complete answers count: a queue that grows is not half an answer.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
from pydantic import TypeAdapter

from dettools.benchmark.bootstrap import interval, resample
from dettools.benchmark.gpu_use import GpuUse, gpu_use
from dettools.benchmark.measurement import STAGES, Accuracy, Level, Load, Resources, Sample
from dettools.benchmark.percentiles import (
    CONFIDENCE,
    PERCENTILES,
    RESAMPLES,
    Percentile,
    Values,
    latencies_ms,
    latency_percentiles,
)
from dettools.benchmark.warm_up import WarmUp, find_warm_up

TOLERANCE = 0.10
"""A level is stable when its last three windows differ by no more than this (perf_analyzer's rule)."""
WINDOWS = 3
OWN_STAGES = ("decode", "preprocess", "forward", "postprocess", "serialise")
"""The stages that the worker times itself."""


@dataclass(frozen=True)
class Figure:
    """A figure with the interval that encloses it at the summary's confidence; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Window:
    """A stretch of a level; ``latency_ms`` is the mean of the answers in it, None without any."""

    start_s: float
    throughput_rps: float
    latency_ms: float | None


@dataclass(frozen=True)
class LevelSummary:
    """One level, computed.

    Attributes:
        seconds: length of what is measured, the warm-up and the draining left out.
        requests: all that were due in the level; ``errors``: how many of them failed, by code.
        measured: requests due after the warm-up; ``answered``: how many of these were answered.
        offered_rps: requests due per second; in an open loop as drawn, not as asked for.
        throughput_rps: answers per second.
        window_s: length of ``windows``; up to half shorter than asked for, to have three of them.
        stable: whether the last three windows agree within 10 %; None when there are fewer.
        stages_ms: mean latency by its parts, in the order of ``STAGES``; empty when the worker did not tell.
        encode_ms: mean time of the client to build a request.
        late_ms: how late requests were sent after they were due, p99.
        batch_sizes: requests by the size of the batch they were in.
        images: different images sent.
        client_cpu_ms, server_cpu_ms: CPU time per request, warm-up included; None when not known.
    """

    load: Load
    stopped: str
    window_s: float
    warm_up: WarmUp
    seconds: float
    requests: int
    errors: dict[str, int]
    measured: int
    answered: int
    offered_rps: float
    throughput_rps: Figure
    confidence: float
    mean_ms: float | None
    max_ms: float | None
    percentiles: tuple[Percentile, ...]
    windows: tuple[Window, ...]
    stable: bool | None
    stages_ms: dict[str, float]
    encode_ms: float
    late_ms: float
    batch_sizes: dict[int, int]
    images: int
    client_cpu_ms: float
    server_cpu_ms: float | None
    resources: Resources
    gpus: tuple[GpuUse, ...]
    accuracy: Accuracy | None

    @property
    def name(self) -> str:
        """The load's name."""
        return self.load.name

    @property
    def failed(self) -> int:
        """Requests of the whole level that got no detections."""
        return sum(self.errors.values())

    @property
    def error_rate(self) -> float:
        """Share of the whole level's requests that failed, 0 to 1."""
        return self.failed / self.requests if self.requests else 0.0

    def percentile(self, p: float) -> Percentile | None:
        """Return one percentile, or None when it was not asked for."""
        return next((one for one in self.percentiles if math.isclose(one.p, p)), None)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values; an infinite time is the string ``inf``."""
        document: dict[str, Any] = plain(asdict(self))
        return {"name": self.name, **document}

    @classmethod
    def from_json(cls, document: object) -> Self:
        """Return the summary that `to_json` gave.

        Raises:
            ValueError: it is not one.
        """
        return TypeAdapter(cls).validate_python(document)


def summarise(
    level: Level,
    *,
    percentiles: Sequence[float] = PERCENTILES,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> LevelSummary:
    """Compute one level's figures.

    Args:
        percentiles: in per cent.
        resamples: of the bootstrap; 0 leaves the intervals out.
        confidence: of the intervals.
        seed: the same seed gives the same intervals.
    """
    warm_up = find_warm_up(level.samples)
    measured = measured_samples(level.samples, warm_up)
    answered = [sample for sample in measured if sample.ok]
    latencies = latencies_ms(answered)
    start_s, end_s = measured_span(level.samples, warm_up)
    seconds = end_s - start_s
    done = completions(level.samples, start_s, end_s)
    window_s = _window_s(level.window_s, seconds)
    windows = windows_of(level.samples, window_s, start_s=start_s, end_s=end_s)
    resources, requests = level.resources, max(1, len(level.samples))
    server_cpu = resources.server_cpu_s
    return LevelSummary(
        load=level.load,
        stopped=level.stopped,
        window_s=window_s,
        warm_up=warm_up,
        seconds=seconds,
        requests=len(level.samples),
        errors=dict(sorted(Counter(sample.error for sample in level.samples if not sample.ok).items())),
        measured=len(measured),
        answered=len(answered),
        offered_rps=_offered(measured, seconds),
        throughput_rps=_throughput(level, done, (start_s, end_s), resamples, confidence, seed),
        confidence=confidence,
        mean_ms=float(latencies.mean()) if answered else None,
        max_ms=float(latencies.max()) if answered else None,
        percentiles=latency_percentiles(measured, percentiles, resamples=resamples, confidence=confidence, seed=seed),
        windows=windows,
        stable=is_stable(windows) if len(windows) >= WINDOWS else None,
        stages_ms=stage_split(answered),
        encode_ms=_mean([sample.encode_ms for sample in measured]),
        late_ms=float(np.percentile([(one.sent_s - one.scheduled_s) * 1e3 for one in measured], 99))
        if measured
        else 0.0,
        batch_sizes=dict(sorted(Counter(one.batch_size for one in answered if one.batch_size is not None).items())),
        images=len({sample.image for sample in level.samples}),
        client_cpu_ms=resources.client_cpu_s * 1e3 / requests,
        server_cpu_ms=None if server_cpu is None else server_cpu * 1e3 / requests,
        resources=resources,
        gpus=gpu_use(resources.gpu),
        accuracy=level.accuracy,
    )


def measured_samples(samples: Sequence[Sample], warm_up: WarmUp) -> list[Sample]:
    """Return the requests that were due after the warm-up."""
    return [sample for sample in samples if sample.scheduled_s >= warm_up.seconds]


def measured_span(samples: Sequence[Sample], warm_up: WarmUp) -> tuple[float, float]:
    """Return when measuring began and ended, in seconds of the level: while the load was there, without the draining.

    A level that ends in a stall ends with the stall: then it lasts until the first of the last requests was done.
    """
    measured = measured_samples(samples, warm_up)
    if not measured:
        return 0.0, 0.0
    start_s, end_s = measured[0].scheduled_s, max(sample.scheduled_s for sample in measured)
    next_done_s = min((sample.done_s for sample in samples if sample.done_s > end_s), default=end_s)
    usual_s = float(np.median([sample.done_s - sample.scheduled_s for sample in measured]))
    if next_done_s - end_s > max(2 * usual_s, 0.05 * (end_s - start_s)):
        end_s = next_done_s
    # One request, or one batch: there is no interval between requests.
    return start_s, end_s if end_s > start_s else max(sample.done_s for sample in measured)


def completions(samples: Sequence[Sample], start_s: float, end_s: float) -> Values:
    """Return when answers were complete, (N,) seconds in order, within ``(start_s, end_s]``."""
    done = np.sort(np.array([sample.done_s for sample in samples if sample.ok], np.float64))
    return done[(done > start_s) & (done <= end_s)]


def windows_of(
    samples: Sequence[Sample], window_s: float, *, start_s: float = 0.0, end_s: float | None = None
) -> tuple[Window, ...]:
    """Cut a level, or what there is of it so far, into whole windows that end at its end.

    Args:
        samples: in any order; an answer belongs to the window in which it was complete.
        window_s: their length.
        start_s: nothing before it counts.
        end_s: nothing after it counts (default: when the last request was done).
    """
    end_s = max((sample.done_s for sample in samples), default=start_s) if end_s is None else end_s
    count = math.floor((end_s - start_s) / window_s + 1e-9)
    edges = end_s - window_s * np.arange(count, -1, -1)
    answered = [sample for sample in samples if sample.ok]
    # Half-open on the left, as `completions`: an answer at the very start belongs to what was before.
    place = np.searchsorted(edges, [sample.done_s for sample in answered], side="left") - 1
    found = []
    for index, (first, _) in enumerate(pairwise(edges.tolist())):
        latencies = [answered[i].latency_ms for i in np.flatnonzero(place == index)]
        found.append(Window(first, len(latencies) / window_s, _mean(latencies) if latencies else None))
    return tuple(found)


def is_stable(windows: Sequence[Window], tolerance: float = TOLERANCE, last: int = WINDOWS) -> bool:
    """Tell whether the last windows agree: largest / smallest ≤ 1 + tolerance, in throughput and in mean latency."""
    rates = [window.throughput_rps for window in windows[-last:]]
    means = [window.latency_ms for window in windows[-last:] if window.latency_ms is not None]
    if len(rates) < last or len(means) < last:
        return False
    return all(max(values) <= (1 + tolerance) * min(values) for values in (rates, means))


def stage_split(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the mean latency in ms by its parts, over the answers that tell them; empty when none does."""
    told = [(sample, sample.stages_ms) for sample in samples if sample.stages_ms]
    sums = dict.fromkeys(STAGES, 0.0)
    for sample, stages in told:
        own = sum(stages.get(name, 0.0) for name in OWN_STAGES)
        handler = stages.get("handler", own)
        sums["encode"] += sample.encode_ms
        sums["network_queue"] += max(0.0, sample.latency_ms - sample.encode_ms - handler)
        sums["wait"] += max(0.0, handler - own)
        for name in OWN_STAGES:
            sums[name] += stages.get(name, 0.0)
    return {name: total / len(told) for name, total in sums.items()} if told else {}


def plain(value: Any) -> Any:
    """Return JSON values: tuples as lists, keys as text, an infinite number as the string ``inf``."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _offered(measured: Sequence[Sample], seconds: float) -> float:
    """The first request opens the interval, so that it does not count in it."""
    return max(len(measured) - 1, 0) / seconds if seconds > 0 else 0.0


def _window_s(asked_s: float, seconds: float) -> float:
    """A level that ended after three stable windows has less than three without its warm-up: shorten them a little."""
    return seconds / WINDOWS if asked_s / 2 <= seconds / WINDOWS < asked_s else asked_s


def _lateness_ms(measured: Sequence[Sample]) -> float:
    late = [(sample.sent_s - sample.scheduled_s) * 1e3 for sample in measured]
    return float(np.percentile(late, 99)) if late else 0.0


def _throughput(
    level: Level, done: Values, span_s: tuple[float, float], resamples: int, confidence: float, seed: int
) -> Figure:
    start_s, end_s = span_s
    if end_s <= start_s:
        return Figure(0.0)
    answers = float(len(done)) if level.load.loop == "open" else _answers_within(level.samples, start_s, end_s)
    value = answers / (end_s - start_s)
    if len(done) < 2 or not resamples:
        return Figure(value)
    gaps = np.diff(done, prepend=start_s)
    rates = throughput_resamples(gaps, resamples, seed)
    low, high = interval(rates * gaps.mean(), confidence)
    return Figure(value, value * float(low), value * float(high))


def _answers_within(samples: Sequence[Sample], start_s: float, end_s: float) -> float:
    answered = [sample for sample in samples if sample.ok]
    sent = np.array([sample.scheduled_s for sample in answered])
    done = np.array([sample.done_s for sample in answered])
    inside = np.minimum(done, end_s) - np.maximum(sent, start_s)
    return float(np.clip(inside / np.maximum(done - sent, 1e-9), 0.0, 1.0).sum())


def throughput_resamples(gaps_s: Values, resamples: int, seed: int) -> Values:
    """Return answers per second of each resample, (resamples,), from the times between answers."""
    return resample(gaps_s, lambda rows: 1 / np.maximum(rows.mean(axis=1), 1e-9), resamples=resamples, seed=seed)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
