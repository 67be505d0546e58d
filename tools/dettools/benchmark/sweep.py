"""Load levels one after another: which, for how long, and when to stop."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from detserve.errors import DetserveError

from dettools.benchmark.knee import Slo, judge_slo
from dettools.benchmark.load import Bounds
from dettools.benchmark.measurement import Arrivals, Level, Load, Sample
from dettools.benchmark.statistics import is_stable, summarise, windows_of

MOST_LEVELS = 200


class SweepError(DetserveError):
    """Levels that make no sense."""


@dataclass(frozen=True)
class Sweep:
    """The levels that were measured, in their order.

    Attributes:
        interrupted: whether levels that were asked for are missing, or the last one is short, because of Ctrl-C.
        missed_slo: whether it was stopped because a level missed the SLO.
    """

    levels: tuple[Level, ...]
    interrupted: bool = False
    missed_slo: bool = False


def closed_loads(text: str) -> tuple[Load, ...]:
    """Return the levels of ``--concurrency``: ``8``, ``1,2,4,8``, or ``start:end[:step]``, the end included, step 1.

    Raises:
        SweepError: it is no such text, or not of whole numbers from 1 on.
    """
    values = _values(text, "--concurrency", "1:16, 1:16:5 or 1,2,4,8")
    if wrong := [value for value in values if value < 1 or value != int(value)]:
        raise SweepError(f"--concurrency: got {wrong[0]:g} requests at once, expected a whole number from 1 on.")
    return tuple(Load("closed", value) for value in values)


def open_loads(text: str, arrivals: Arrivals) -> tuple[Load, ...]:
    """Return the levels of ``--rate``, written like those of ``--concurrency``, in requests per second.

    Raises:
        SweepError: it is no such text, or a rate is not positive.
    """
    values = _values(text, "--rate", "5:40:5 or 5,10,20")
    if wrong := [value for value in values if value <= 0]:
        raise SweepError(f"--rate: got {wrong[0]:g} requests per second, expected more than 0.")
    return tuple(Load("open", value, arrivals) for value in values)


def _values(text: str, option: str, example: str) -> list[float]:
    try:
        parts = [float(part) for part in text.split(":" if ":" in text else ",")]
        if not all(map(math.isfinite, parts)):
            raise ValueError  # noqa: TRY301 - said once, below
        if ":" not in text:
            return list(dict.fromkeys(parts))
        start, end, *rest = parts
        step = rest[0] if rest else 1.0
        if len(rest) > 1 or step <= 0 or end < start:
            raise ValueError  # noqa: TRY301 - said once, below
        count = int((end - start) / step + 1e-9) + 1
    except (ValueError, OverflowError):
        raise SweepError(f"{option}: got {text!r}, expected such as {example}.") from None
    if count > MOST_LEVELS:
        raise SweepError(f"{option}: got {count} levels, expected at most {MOST_LEVELS}. Give a larger step.")
    return [round(start + step * index, 9) for index in range(count)]


def seconds(text: str) -> float:
    """Read a duration: ``250ms``, ``5s``, ``2min``; the number alone is seconds.

    Raises:
        SweepError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min)?", text.strip())
    if not match:
        raise SweepError(f"got the duration {text!r}, expected such as 250ms, 5s or 2min.")
    return float(match[1]) * {"ms": 1e-3, "s": 1.0, "min": 60.0, None: 1.0}[match[2]]


def expected_seconds(levels: int, bounds: Bounds, warm_up_s: float = 0.0) -> tuple[float, float]:
    """Return the shortest and the longest that a sweep takes to send its requests."""
    return warm_up_s + levels * bounds.min_time_s, warm_up_s + levels * bounds.max_time_s


def stability_of(window_s: float) -> Callable[[Sequence[Sample], float], bool]:
    """Return the rule by which a level may end early: its last three windows agree (perf_analyzer's rule)."""
    return lambda samples, elapsed_s: is_stable(windows_of(samples, window_s, end_s=elapsed_s))


def run_sweep(
    loads: Sequence[Load],
    measure: Callable[[Load], Level],
    *,
    slo: Slo | None = None,
    stop_at_slo: bool = False,
    on_level: Callable[[Level], None] = lambda _: None,
) -> Sweep:
    """Measure the levels one after another; Ctrl-C keeps the finished ones, and what there is of the last.

    Args:
        measure: puts one load on; a level that ends ``interrupted`` ends the sweep.
        slo: judged after each level, if it is to stop the sweep.
        stop_at_slo: stop after the first level that misses it.
        on_level: told each level when it is done.
    """
    levels: list[Level] = []
    try:
        for load in loads:
            level = measure(load)
            interrupted = level.stopped == "interrupted"
            if level.samples or not interrupted:
                levels.append(level)
                on_level(level)
            if interrupted:
                return Sweep(tuple(levels), interrupted=True)
            if slo is not None and stop_at_slo and load is not loads[-1] and not _meets(level, slo):
                return Sweep(tuple(levels), missed_slo=True)
    except KeyboardInterrupt:
        return Sweep(tuple(levels), interrupted=True)
    return Sweep(tuple(levels))


def _meets(level: Level, slo: Slo) -> bool:
    return judge_slo(summarise(level, percentiles=(slo.p,), resamples=0), slo).met
