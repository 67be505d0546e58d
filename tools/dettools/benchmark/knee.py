"""Where a sweep bends, and how far the service-level objective carries: the loads that a reader wants to know.

**Knee**: the level with the largest *power*, throughput / mean latency (Kleinrock 1979, "Power and deterministic rules
of thumb for probabilistic problems in computer communications"): beyond it, more load buys more latency than answers.
**Sustained**: of a rate sweep, the highest rate of which at least 95 % is answered as fast as it arrives, with
latencies that settle.
**SLO**: the highest load that meets it, every lower one meeting it too. It is judged by the strict percentile (a failed
request takes for ever); whether the interval lies on the same side of the limit is told beside it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from detserve.errors import DetserveError

from dettools.benchmark.statistics import LevelSummary

SUSTAINED = 0.95
FEW = 2.0
"""Requests that are still on their way at the end of any level."""


@dataclass(frozen=True)
class Slo:
    """Such a share of the requests is answered within so long; ``p`` in per cent."""

    p: float
    limit_ms: float

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """Read ``p99=250ms`` or ``p95=0.2s``; the number alone is milliseconds.

        Raises:
            DetserveError: it is not such a text.
        """
        match = re.fullmatch(r"p(\d{1,2}(?:\.\d+)?)\s*=\s*(\d+(?:\.\d+)?)\s*(ms|s)?", text.strip())
        limit_ms = float(match[2]) * (1e3 if match[3] == "s" else 1) if match else 0.0
        if not match or not limit_ms or not float(match[1]):
            raise DetserveError(f"Got the SLO {text!r}; expected a percentile and its limit, such as p99=250ms.")
        return cls(float(match[1]), limit_ms)

    @property
    def name(self) -> str:
        """Such as ``p99 ≤ 250 ms``."""
        return f"p{self.p:g} ≤ {self.limit_ms:g} ms"


@dataclass(frozen=True)
class SloOutcome:
    """An SLO at one level.

    Attributes:
        level: index of the level.
        met: by the strict percentile.
        sure: whether the percentile's whole interval says the same; False too when there are too few answers for one.
        strict_ms: the percentile, a failed request taking for ever.
        high_ms: upper end of the interval over the answered requests; None when there are too few answers.
    """

    level: int
    met: bool
    sure: bool
    strict_ms: float
    high_ms: float | None


@dataclass(frozen=True)
class SloVerdict:
    """An SLO over a sweep; ``highest`` is the index of the highest load that meets it, None when none does."""

    slo: Slo
    outcomes: tuple[SloOutcome, ...]
    highest: int | None

    def sentence(self, names: Sequence[str]) -> str:
        """Say it, with the names of the levels."""
        if self.highest is None:
            return f"{self.slo.name}: no level meets it."
        best = self.outcomes[self.highest]
        how = "too few answers for an interval" if best.high_ms is None else f"interval up to {best.high_ms:.1f} ms"
        doubt = "" if best.sure else ", so it may be missed"
        return f"{self.slo.name}: met up to {names[self.highest]} ({best.strict_ms:.1f} ms, {how}{doubt})."


@dataclass(frozen=True)
class Knee:
    """The level with the most power.

    Attributes:
        level: its index.
        power: answers per second, per second of mean latency.
        bracketed: whether the sweep has levels on both sides of it; if not, the bend may lie outside.
    """

    level: int
    power: float
    bracketed: bool


def find_knee(levels: Sequence[LevelSummary]) -> Knee | None:
    """Return the knee of a sweep; None of fewer than three levels, or when nothing was answered."""
    powers = [power(level) for level in levels]
    if len(levels) < 3 or not any(powers):
        return None
    best = max(range(len(levels)), key=lambda index: powers[index])
    values = [level.load.value for level in levels]
    return Knee(best, powers[best], min(values) < values[best] < max(values))


def power(level: LevelSummary) -> float:
    """Return Kleinrock's power: throughput (1/s) / mean latency (s); 0 when nothing was answered."""
    return level.throughput_rps.value / (level.mean_ms / 1e3) if level.mean_ms else 0.0


def highest_sustained(levels: Sequence[LevelSummary]) -> int | None:
    """Return the index of the highest rate that is sustained, all lower ones being so too; None without one."""
    return _highest(levels, [level.load.loop == "open" and sustains(level) for level in levels])


def sustains(level: LevelSummary) -> bool:
    """Tell whether at least 95 % of what is offered is answered, and the latencies do not rise all the time."""
    missing = (level.offered_rps - level.throughput_rps.value) * level.seconds
    due = level.offered_rps * level.seconds
    return missing <= max((1 - SUSTAINED) * due, FEW) and not level.warm_up.rising


def judge_slo(level: LevelSummary, slo: Slo, index: int = 0) -> SloOutcome:
    """Judge one level.

    Raises:
        DetserveError: the level was summarised without that percentile.
    """
    found = level.percentile(slo.p)
    if found is None:
        known = ", ".join(one.name for one in level.percentiles)
        raise DetserveError(f"Got the SLO {slo.name}; expected one of the percentiles that are computed: {known}.")
    met = found.strict_ms <= slo.limit_ms
    if found.high_ms is None or found.low_ms is None:
        sure = False
    else:
        # What makes it infinite is failures, which the interval over the answered requests does not know.
        sure = found.high_ms <= slo.limit_ms if met else found.low_ms > slo.limit_ms or math.isinf(found.strict_ms)
    return SloOutcome(index, met, sure, found.strict_ms, found.high_ms)


def judge_sweep(levels: Sequence[LevelSummary], slo: Slo) -> SloVerdict:
    """Judge every level of a sweep."""
    outcomes = tuple(judge_slo(level, slo, index) for index, level in enumerate(levels))
    return SloVerdict(slo, outcomes, _highest(levels, [outcome.met for outcome in outcomes]))


def to_json(verdict: SloVerdict) -> dict[str, Any]:
    """Return it as plain values."""
    return asdict(verdict)


def _highest(levels: Sequence[LevelSummary], good: Sequence[bool]) -> int | None:
    """Return the last of the good levels before the first bad one, by load."""
    best = None
    for index in sorted(range(len(levels)), key=lambda index: levels[index].load.value):
        if not good[index]:
            break
        best = index
    return best
