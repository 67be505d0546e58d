"""Whether a benchmark's figures may be quoted: each reason against it, with what was got, expected, and to be done.

INVALID  the figure is not one of the server under that load: the client was the limit, too little was answered, too few
         requests were measured, the machine's time went elsewhere.
WARN     the figure holds with the reservation that stands beside it.

A saturated server is a finding, not a fault of the measurement: ``overloaded`` is a warning, because the latency of a
queue that only grows depends on how long one looked. A run is INVALID when none of its levels is better than that, or
when a reason concerns all of it; a run with good and bad levels is a WARN that names the bad ones.
"""

from collections.abc import Callable, Iterator, Sequence

from dettools.benchmark.knee import sustains
from dettools.benchmark.measurement import Stamp, Verdict
from dettools.benchmark.percentiles import fewest_answers
from dettools.benchmark.statistics import TOLERANCE, WINDOWS, LevelSummary

Reason = tuple[Stamp, str, str]

FEWEST_BEYOND = 10.0
FEWEST_ANSWERS = 20
"""p50 with ten answers on either side; below, nothing at all can be said."""
CLIENT_CPU = (0.8, 0.95)
"""Shares of one core: the client is one thread. WARN, INVALID."""
LATE_MS, LATE_SHARE = 5.0, 0.10
ERRORS = 0.01
THROTTLED = (0.01, 0.10)
STEAL = (0.02, 0.10)
OTHERS = 0.15
"""Share of the machine taken by processes that are neither the client nor the server."""
UNSTABLE = 0.50
LONG_WARM_UP = 0.5
STALL = 10.0
"""A closed loop that waited this many times its median for one answer."""


def validate_level(level: LevelSummary, *, kind: str = "served", cores: int | None = None) -> Verdict:
    """Judge one level.

    Args:
        kind: ``served``, or ``eager`` or ``runtime``, where the client's process is what is measured.
        cores: of the machine; without it, other processes' load is not looked at.
    """
    if not level.answered:
        codes = ", ".join(f"{code} ×{count}" for code, count in level.errors.items()) or "nothing was sent"
        sentence = f"Got no answer to {level.requests} requests ({codes}); look at the server before measuring it."
        return Verdict("INVALID", (("INVALID", "no_answers", sentence),))
    checks: list[Callable[[LevelSummary], Iterator[Reason]]] = [_interrupted, _samples, _warm_up, _stability, _errors]
    checks += [_throttled, _steal, _gpu]
    if kind == "served":
        checks += [_client, _overload, _stall]
    reasons = [reason for check in checks for reason in check(level)]
    if cores:
        reasons += _other_processes(level, cores, kind)
    return Verdict(worst(stamp for stamp, _, _ in reasons), tuple(reasons))


def validate_run(
    levels: Sequence[LevelSummary],
    verdicts: Sequence[Verdict],
    *,
    distinct_images: int,
    interrupted: bool = False,
    names: Sequence[str] | None = None,
) -> Verdict:
    """Judge a run by its levels' verdicts and by what concerns all of it.

    Args:
        distinct_images: different bodies that were sent.
        interrupted: whether levels that were asked for are missing.
        names: of the levels (default: their loads').
    """
    reasons: list[Reason] = []
    if interrupted:
        reasons.append(("WARN", "interrupted", f"Interrupted after {len(levels)} levels; the others are missing."))
    if distinct_images == 1 and levels:
        sentence = (
            "Every request carried the same image: got 1, expected pictures as users send them. Its size and its "
            "number of objects are all this measures, and caches are always warm; give a folder of images."
        )
        reasons.append(("WARN", "identical_images", sentence))
    named = list(zip(names or [level.name for level in levels], verdicts, strict=True))
    bad = [name for name, verdict in named if verdict.stamp == "INVALID"]
    if not levels:
        reasons.append(("INVALID", "no_levels", "No level was measured: there is nothing to quote."))
    if bad:
        stamp: Stamp = "INVALID" if len(bad) == len(levels) else "WARN"
        which = f"{len(bad)} of {len(levels)} levels are INVALID ({', '.join(bad)})"
        reasons.append((stamp, "levels_invalid", f"{which}; quote none of their figures, see their reasons."))
    codes: dict[str, list[str]] = {}
    for name, verdict in named:
        for _, code, _ in verdict.reasons:
            codes.setdefault(code, []).append(name)
    warned = {code: names for code, names in codes.items() if any(name not in bad for name in names)}
    if warned:
        text = "; ".join(f"{code}: {', '.join(dict.fromkeys(names))}" for code, names in warned.items())
        reasons.append(("WARN", "levels_warned", f"Levels with reservations: {text}."))
    return Verdict(worst(stamp for stamp, _, _ in reasons), tuple(reasons))


def worst(stamps: Iterator[Stamp]) -> Stamp:
    """Return the gravest stamp; VALID of none."""
    order: tuple[Stamp, ...] = ("VALID", "WARN", "INVALID")
    return max(stamps, key=order.index, default="VALID")


def _interrupted(level: LevelSummary) -> Iterator[Reason]:
    if level.stopped == "interrupted":
        yield _reason(
            "WARN",
            "interrupted",
            f"Stopped by hand after {level.seconds:.1f} s; the level is shorter than asked for.",
        )


def _samples(level: LevelSummary) -> Iterator[Reason]:
    if level.answered < FEWEST_ANSWERS:
        yield _reason(
            "INVALID",
            "too_few_samples",
            f"Got {level.answered} answers after the warm-up, expected at least {FEWEST_ANSWERS}; measure longer.",
        )
        return
    rough = [one for one in level.percentiles if one.beyond < FEWEST_BEYOND and (one.ms is not None or one.p <= 99)]
    if rough:
        first = rough[0]
        names = ", ".join(one.name + (" (not shown)" if one.ms is None else "") for one in rough)
        needed = max(round(FEWEST_BEYOND / (1 - first.p / 100)), fewest_answers(first.p))
        yield _reason(
            "WARN",
            "too_few_samples",
            f"Got {level.answered} answers, {first.beyond:.1f} of them beyond {first.name}; expected at least "
            f"{FEWEST_BEYOND:g} beyond a percentile. Rough: {names}. "
            f"{first.name} needs {needed} answers: measure longer.",
        )


def _warm_up(level: LevelSummary) -> Iterator[Reason]:
    if not level.warm_up.settled:
        yield _reason(
            "WARN",
            "warm_up_not_found",
            f"The latencies still change in the middle of the level (got a warm-up of {level.warm_up.seconds:.1f} s or "
            "more, expected one that ends in the first half); measure longer, or warm the server up first.",
        )


def _stability(level: LevelSummary) -> Iterator[Reason]:
    if level.stable is None:
        yield _reason(
            "WARN",
            "too_short",
            f"Got {len(level.windows)} windows of {level.window_s:g} s, expected at least {WINDOWS} to tell whether "
            "the level is stable; measure longer or choose a shorter window.",
        )
    elif not level.stable:
        last = level.windows[-WINDOWS:]
        means = [window.latency_ms for window in last if window.latency_ms is not None]
        rates = [window.throughput_rps for window in last]
        spread = max(_spread(rates), _spread(means)) if len(means) == len(last) else float("inf")
        # How many arrive in a window is chance in a Poisson schedule, and queues follow it.
        stamp: Stamp = "INVALID" if spread > UNSTABLE and level.load.loop == "closed" else "WARN"
        yield _reason(
            stamp,
            "unstable",
            f"The last {WINDOWS} windows differ by {spread:.0%} (throughput {_spread(rates):.0%}, mean latency "
            f"{_spread(means):.0%}), expected at most {TOLERANCE:.0%}; measure longer, or quieten the machine.",
        )


def _errors(level: LevelSummary) -> Iterator[Reason]:
    if level.failed:
        codes = ", ".join(f"{code} ×{count}" for code, count in level.errors.items())
        yield _reason(
            "INVALID" if level.error_rate > ERRORS else "WARN",
            "errors",
            f"{level.failed} of {level.requests} requests failed ({level.error_rate:.2%}; {codes}), expected none; "
            f"above {ERRORS:.0%} the latencies are those of the requests that got through. Look at the server's log.",
        )


def _throttled(level: LevelSummary) -> Iterator[Reason]:
    held = level.resources.cgroup_throttled_s or 0.0
    share = held / level.resources.wall_s if level.resources.wall_s else 0.0
    if share > THROTTLED[0]:
        yield _reason(
            _graver(share, THROTTLED),
            "throttled",
            f"The container's CPU limit held processes back for {held:.1f} s of {level.resources.wall_s:.1f} s, "
            f"expected at most {THROTTLED[0]:.0%}; raise the limit, or use fewer threads.",
        )


def _steal(level: LevelSummary) -> Iterator[Reason]:
    if (share := level.resources.steal or 0.0) > STEAL[0]:
        yield _reason(
            _graver(share, STEAL),
            "stolen_cpu",
            f"The hypervisor took {share:.1%} of the CPU, expected at most {STEAL[0]:.0%}; "
            "measure on a machine of your own.",
        )


def _gpu(level: LevelSummary) -> Iterator[Reason]:
    for gpu in level.gpus:
        if gpu.throttled:
            clock = "" if gpu.sm_clock_mhz is None else f", its mean clock was {gpu.sm_clock_mhz:.0f} MHz"
            yield _reason(
                "WARN",
                "gpu_throttled",
                f"GPU {gpu.index} lowered its clock (heat or power{clock}), expected none; "
                "let it cool, or fix the clock.",
            )


def _client(level: LevelSummary) -> Iterator[Reason]:
    share = level.resources.client_cpu_s / level.resources.wall_s if level.resources.wall_s else 0.0
    if share > CLIENT_CPU[0]:
        yield _reason(
            _graver(share, CLIENT_CPU),
            "client_saturated",
            f"The client used {share:.0%} of one core, expected at most {CLIENT_CPU[0]:.0%}: it may be what is "
            "measured. Leave the stage times out, or use several clients.",
        )
    median = level.percentile(50)
    limit = max(LATE_MS, LATE_SHARE * (median.ms if median and median.ms else 0.0))
    late = max(level.late_ms, level.resources.loop_lag_ms or 0.0)
    if late > limit:
        yield _reason(
            "WARN",
            "client_late",
            f"The client was up to {late:.1f} ms late (p99 of its own delay), expected at most {limit:.1f} ms; that is "
            "in the latencies. Run the client on another machine, or leave it a core.",
        )
    if overflow := level.errors.get("client_overflow", 0):
        yield _reason(
            "WARN",
            "client_overflow",
            f"{overflow} requests were due while as many were in flight as the client allows, and were not sent; they "
            "count as failed. The server cannot keep up with this rate.",
        )


def _overload(level: LevelSummary) -> Iterator[Reason]:
    if level.load.loop == "open" and not sustains(level):
        grows = " and the latencies rise all the time" if level.warm_up.rising else ""
        yield _reason(
            "WARN",
            "overloaded",
            f"Answered {level.throughput_rps.value:.1f} of {level.offered_rps:.1f} requests per second{grows}: the "
            "queue grows as long as one measures, and the latencies with it. Quote the throughput, not the latency.",
        )


def _stall(level: LevelSummary) -> Iterator[Reason]:
    median = level.percentile(50)
    if level.load.loop != "closed" or median is None or median.ms is None or level.max_ms is None:
        return
    if level.max_ms > STALL * median.ms and level.max_ms > 500:
        yield _reason(
            "WARN",
            "stall_hidden",
            f"One answer took {level.max_ms:.0f} ms, the median {median.ms:.0f} ms: a closed loop sends nothing "
            "during a stall, so the percentiles hide it. Measure with --rate too.",
        )


def _other_processes(level: LevelSummary, cores: int, kind: str) -> Iterator[Reason]:
    used = level.resources
    if used.machine_cpu is None or not used.wall_s or (kind == "served" and used.server_cpu_s is None):
        return
    ours = (used.client_cpu_s + (used.server_cpu_s or 0.0)) / (used.wall_s * cores)
    if (others := used.machine_cpu - ours) > OTHERS:
        yield _reason(
            "WARN",
            "machine_busy",
            f"Other processes took {others:.0%} of the machine's {cores} cores, expected at most {OTHERS:.0%}; "
            "end them.",
        )


def _reason(stamp: Stamp, code: str, sentence: str) -> Reason:
    return stamp, code, sentence


def _graver(share: float, bounds: tuple[float, float]) -> Stamp:
    return "INVALID" if share > bounds[1] else "WARN"


def _spread(values: Sequence[float]) -> float:
    return max(values) / min(values) - 1 if values and min(values) > 0 else float("inf")
