"""From the rounds' figures to the table: medians with their spread, and the ratio of ours to each peer's.

Throughput is the median over the rounds, its ratio the median of the ratios within each round, so that what slows a
whole round down cancels. Latency percentiles are over the answers of all rounds together: one round has too few for
its tail.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from dettools.benchmark.percentiles import fewest_answers


@dataclass(frozen=True)
class Figure:
    """One server, one round, one concurrency.

    Attributes:
        latencies_ms: of the answers after the warm-up.
        errors: failed requests by machine word.
        client_cpu_ms, server_cpu_ms: CPU time per request.
        others_share: of the machine's cores, what neither client nor server took, 0 to 1; None when not known.
    """

    server: str
    round: int
    concurrency: int
    throughput_rps: float
    latencies_ms: tuple[float, ...] = field(repr=False)
    requests: int
    errors: dict[str, int]
    client_cpu_ms: float
    server_cpu_ms: float | None
    others_share: float | None = None

    def sentence(self) -> str:
        """Return it in one line."""
        p50 = f"{np.median(self.latencies_ms):.1f} ms" if self.latencies_ms else "–"
        failed = sum(self.errors.values())
        return f"c={self.concurrency}: {self.throughput_rps:.1f} req/s, p50 {p50}, {failed} of {self.requests} failed"


@dataclass(frozen=True)
class Spread:
    """A median with the least and the greatest of the rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return that of these values, of which there is at least one."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str) -> str:
        """Return it as ``median (least–greatest)``."""
        if self.least == self.greatest:
            return format(self.median, form)
        return f"{self.median:{form}} ({self.least:{form}}–{self.greatest:{form}})"


@dataclass(frozen=True)
class Standing:
    """One server at one concurrency, over all rounds.

    Attributes:
        p50_ms, p99_ms: over the answers of all rounds; None without any.
        p99_rough: fewer answers than a percentile's interval needs.
        throughput_ratio, p99_ratio: ours divided by theirs; above 1 we answer more, below 1 our tail is shorter. None
            for ourselves, and without figures of both.
        others_share: the most that other processes took of the cores in any round.
    """

    server: str
    concurrency: int
    rounds: int
    throughput_rps: Spread
    answers: int
    p50_ms: float | None
    p99_ms: float | None
    p99_rough: bool
    requests: int
    errors: dict[str, int]
    client_cpu_ms: float
    server_cpu_ms: float | None
    throughput_ratio: Spread | None
    p99_ratio: float | None
    others_share: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)


def standings(figures: Sequence[Figure], ours: str) -> list[Standing]:
    """Return a standing per server and concurrency, in the order in which they come in the figures."""
    keys = list(dict.fromkeys((figure.concurrency, figure.server) for figure in figures))
    return [
        _standing(figures, server, concurrency, ours) for concurrency, server in sorted(keys, key=lambda key: key[0])
    ]


def _standing(figures: Sequence[Figure], server: str, concurrency: int, ours: str) -> Standing:
    own = [one for one in figures if (one.server, one.concurrency) == (server, concurrency)]
    reference = {one.round: one for one in figures if (one.server, one.concurrency) == (ours, concurrency)}
    latencies = _pooled(own)
    errors: Counter[str] = Counter()
    for one in own:
        errors.update(one.errors)
    ratios = [
        reference[one.round].throughput_rps / one.throughput_rps
        for one in own
        if one.round in reference and one.throughput_rps > 0
    ]
    p99, our_p99 = _percentile(latencies, 99), _percentile(_pooled(list(reference.values())), 99)
    server_cpu = [one.server_cpu_ms for one in own if one.server_cpu_ms is not None]
    itself = server == ours
    return Standing(
        server=server,
        concurrency=concurrency,
        rounds=len(own),
        throughput_rps=Spread.of([one.throughput_rps for one in own]),
        answers=len(latencies),
        p50_ms=_percentile(latencies, 50),
        p99_ms=p99,
        p99_rough=len(latencies) < fewest_answers(99),
        requests=sum(one.requests for one in own),
        errors=dict(sorted(errors.items())),
        client_cpu_ms=statistics.median(one.client_cpu_ms for one in own),
        server_cpu_ms=statistics.median(server_cpu) if server_cpu else None,
        throughput_ratio=Spread.of(ratios) if ratios and not itself else None,
        others_share=max((one.others_share for one in own if one.others_share is not None), default=None),
        p99_ratio=our_p99 / p99 if p99 and our_p99 is not None and not itself else None,
    )


def _pooled(figures: Sequence[Figure]) -> list[float]:
    return [latency for figure in figures for latency in figure.latencies_ms]


def _percentile(latencies_ms: Sequence[float], p: float) -> float | None:
    return float(np.percentile(latencies_ms, p)) if latencies_ms else None
