"""Two benchmarks side by side: which figures differ by more than chance, and what else differs between the runs.

    samples of a ─► resamples ─┐
                               ├─► log ratio b / a ─► interval, p ─► Holm over all figures ─► faster, slower, not shown
    samples of b ─► resamples ─┘

Every figure is resampled in blocks, as in `bootstrap`; a figure's p is that of its log ratio over the resamples'
standard deviation, two-sided normal. A sweep has dozens of figures, and one in twenty differs "at 95 %" by chance: the
p are corrected by Holm (1979), so that 95 % holds for the whole table. The intervals printed are each at 95 %, not
corrected.

**What this cannot know**: the intervals come from inside two single runs. What changes from run to run on the same
machine (neighbours, temperature, memory layout) is in neither. A difference below ``tolerance`` is therefore called
negligible, however sure; for smaller ones, measure both sides several times and in turns.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from detserve.errors import DetserveError

from dettools.benchmark.bootstrap import interval, resample
from dettools.benchmark.percentiles import CONFIDENCE, Values, latencies_ms
from dettools.benchmark.run import Run, StoredRun
from dettools.benchmark.statistics import (
    LevelSummary,
    completions,
    measured_samples,
    measured_span,
    plain,
    throughput_resamples,
)

if TYPE_CHECKING:
    from dettools.benchmark.measurement import Sample

Word = Literal[
    "faster", "slower", "negligible", "no difference shown", "more errors", "fewer errors", "AP lost", "AP won"
]
WORSE: tuple[Word, ...] = ("slower", "more errors", "AP lost")

TOLERANCE = 0.05
AP_TOLERANCE = 0.005
RESAMPLES = 1000
# Of every run, or of no consequence for speed.
IGNORED = {"environment.date", "settings.title", "settings.out", "settings.json"}


class DifferenceError(DetserveError):
    """Two runs cannot be compared."""


@dataclass(frozen=True)
class FigureDifference:
    """One figure of one level in both runs.

    Attributes:
        level: name of the level.
        figure: ``throughput``, ``mean``, ``p50`` …, ``error rate`` or ``AP``.
        a, b: requests/s, ms, or a share.
        ratio: b / a; None of error rates and AP, and ``low``, ``high`` its interval at 95 %.
        p: after Holm's correction; None where there is no test.
        word: the verdict on b.
    """

    level: str
    figure: str
    a: float
    b: float
    ratio: float | None
    low: float | None
    high: float | None
    p: float | None
    word: Word

    @property
    def worse(self) -> bool:
        """Whether b is worse than a."""
        return self.word in WORSE


@dataclass(frozen=True)
class Mismatch:
    """Something that is not the same in both runs, such as ``environment.packages.torch``; None where it is missing."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Difference:
    """Two runs compared.

    Attributes:
        figures: level by level.
        mismatches: what else differs, and so may be the cause.
        only_a, only_b: levels that the other run does not have.
        notes: what a reader must know to believe the verdicts.
    """

    title_a: str
    title_b: str
    figures: tuple[FigureDifference, ...]
    mismatches: tuple[Mismatch, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def regressions(self) -> tuple[FigureDifference, ...]:
        """The figures in which b is worse."""
        return tuple(figure for figure in self.figures if figure.worse)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        document: dict[str, Any] = plain(asdict(self))
        return {**document, "regressions": len(self.regressions)}


def compare_runs(
    a: StoredRun,
    b: StoredRun,
    *,
    tolerance: float = TOLERANCE,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
    allow_different_images: bool = False,
) -> Difference:
    """Compare two runs, b against a.

    Args:
        tolerance: differences of throughput or latency up to this share are negligible.
        confidence: of the whole table's verdicts, and of each interval.
        allow_different_images: compare runs that did not send the same pictures.

    Raises:
        DifferenceError: they did not send the same images, have no level in common, or lack their raw samples.
    """
    _refuse(a, b, allow_different_images=allow_different_images)
    pairs = _pairs(a.run, b.run)
    if not pairs:
        raise DifferenceError(
            f"No level in common: got {', '.join(a.run.labels)} and {', '.join(b.run.labels)}. "
            "Measure both with the same --concurrency, --rate or --batch-sizes."
        )
    found: list[FigureDifference] = []
    for i, j in pairs:
        one, two = (_Side(stored, k, 2 * seed + n) for n, (stored, k) in enumerate(((a, i), (b, j))))
        found += _speed(a.run.labels[i], one, two, confidence, resamples)
        found += _errors(a.run.labels[i], one.level, two.level)
    corrected = holm([figure.p for figure in found])
    figures = [
        replace(figure, p=p, word=_word(figure, p, 1 - confidence, tolerance))
        for figure, p in zip(found, corrected, strict=True)
    ]
    for i, j in pairs:
        figures += _accuracy(a.run.labels[i], a.run.levels[i], b.run.levels[j])
    matched_a, matched_b = {i for i, _ in pairs}, {j for _, j in pairs}
    return Difference(
        a.run.title,
        b.run.title,
        tuple(sorted(figures, key=lambda figure: [a.run.labels[i] for i, _ in pairs].index(figure.level))),
        tuple(mismatches(a.run, b.run)),
        tuple(name for index, name in enumerate(a.run.labels) if index not in matched_a),
        tuple(name for index, name in enumerate(b.run.labels) if index not in matched_b),
        tuple(_notes(a.run, b.run, sum(p is not None for p in corrected), confidence, tolerance)),
    )


def mismatches(a: Run, b: Run) -> Iterator[Mismatch]:
    """Yield what differs between two runs besides their figures."""
    sides = [
        _flat(
            {
                "kind": run.kind,
                "model": run.model,
                "target": run.target,
                "settings": run.settings,
                "environment": run.environment,
                "images": asdict(run.images),
                "verdict": run.verdict.stamp,
            }
        )
        for run in (a, b)
    ]
    for name in sorted({*sides[0], *sides[1]} - IGNORED):
        left, right = sides[0].get(name), sides[1].get(name)
        if left != right:
            yield Mismatch(name, left, right)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p values corrected for their number (Holm 1979); None stays None."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        corrected[index] = largest
    return corrected


class _Side:
    """One run's level with its resamples."""

    def __init__(self, stored: StoredRun, index: int, seed: int) -> None:
        self.level = stored.run.levels[index]
        self._samples: Sequence[Sample] = stored.samples[index]
        self._seed = seed
        measured = measured_samples(self._samples, self.level.warm_up)
        self._latencies = latencies_ms([sample for sample in measured if sample.ok])

    def latency_figures(self, percentiles: Sequence[float], resamples: int) -> Values:
        """Return (resamples, 1 + P): the mean and the percentiles."""

        def figures(rows: Values) -> Values:
            return np.column_stack((rows.mean(axis=1), np.percentile(rows, percentiles, axis=1).T))

        return resample(self._latencies, figures, resamples=resamples, seed=self._seed)

    def rates(self, resamples: int) -> Values:
        """Return (resamples,) answers per second."""
        start_s, end_s = measured_span(self._samples, self.level.warm_up)
        gaps = np.diff(completions(self._samples, start_s, end_s), prepend=start_s)
        return throughput_resamples(gaps, resamples, self._seed)


def _speed(name: str, a: _Side, b: _Side, confidence: float, resamples: int) -> list[FigureDifference]:
    if a.level.answered < 2 or b.level.answered < 2:
        return []
    both = [(one, b.level.percentile(one.p)) for one in a.level.percentiles]
    latencies = [(one.p, one.ms, two.ms) for one, two in both if two and one.ms is not None and two.ms is not None]
    shown = [p for p, _, _ in latencies]
    names = ["throughput", "mean", *(f"p{p:g}" for p in shown)]
    values = [(a.level.throughput_rps.value, b.level.throughput_rps.value), (a.level.mean_ms, b.level.mean_ms)]
    values += [(left, right) for _, left, right in latencies]
    estimates = [np.column_stack((side.rates(resamples), side.latency_figures(shown, resamples))) for side in (a, b)]
    logs = np.log(np.maximum(estimates[1], 1e-12)) - np.log(np.maximum(estimates[0], 1e-12))
    found = []
    for k, (figure, (left, right)) in enumerate(zip(names, values, strict=True)):
        if not left or not right:
            continue
        ratio = right / left
        # The resamples' spread around their own middle, laid around the ratio that was measured.
        centred = logs[:, k] - logs[:, k].mean()
        low, high = interval(centred[:, None], confidence)
        p = _two_sided(math.log(ratio), float(centred.std()))
        ends = (ratio * math.exp(float(low[0])), ratio * math.exp(float(high[0])))
        found.append(FigureDifference(name, figure, left, right, ratio, *ends, p, "no difference shown"))
    return found


def _errors(name: str, a: LevelSummary, b: LevelSummary) -> list[FigureDifference]:
    if not a.failed and not b.failed:
        return []
    from scipy.stats import fisher_exact

    p = float(fisher_exact([[a.failed, a.requests - a.failed], [b.failed, b.requests - b.failed]])[1])
    found = FigureDifference(name, "error rate", a.error_rate, b.error_rate, None, None, None, p, "no difference shown")
    return [found]


def _accuracy(name: str, a: LevelSummary, b: LevelSummary) -> list[FigureDifference]:
    """No test: the same images through the same model give the same AP, so that any drop has a cause."""
    if a.accuracy is None or b.accuracy is None:
        return []
    left, right = a.accuracy.ap_delivered, b.accuracy.ap_delivered
    if abs(right - left) <= AP_TOLERANCE:
        word: Word = "no difference shown" if left == right else "negligible"
    else:
        word = "AP lost" if right < left else "AP won"
    return [FigureDifference(name, "AP", left, right, None, None, None, None, word)]


def _word(figure: FigureDifference, p: float | None, alpha: float, tolerance: float) -> Word:
    if p is None or p >= alpha:
        return "no difference shown"
    if figure.ratio is None:
        return "more errors" if figure.b > figure.a else "fewer errors"
    if 1 / (1 + tolerance) <= figure.ratio <= 1 + tolerance:
        return "negligible"
    return "faster" if (figure.ratio > 1) == (figure.figure == "throughput") else "slower"


def _two_sided(difference: float, deviation: float) -> float:
    if deviation <= 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(abs(difference) / deviation / math.sqrt(2))


def _pairs(a: Run, b: Run) -> list[tuple[int, int]]:
    """Levels of the same name, in a's order; the second of a name with the second of that name."""
    free = list(enumerate(b.labels))
    pairs = []
    for i, name in enumerate(a.labels):
        match = next((entry for entry in free if entry[1] == name), None)
        if match:
            free.remove(match)
            pairs.append((i, match[0]))
    return pairs


def _refuse(a: StoredRun, b: StoredRun, *, allow_different_images: bool) -> None:
    if a.run.images.digest != b.run.images.digest and not allow_different_images:
        raise DifferenceError(
            f"The runs did not send the same images: got {a.run.images.sentence()} and {b.run.images.sentence()}, "
            "expected the same contents. Measure both with the same images, or allow it (--allow-different-images)."
        )
    for stored in (a, b):
        if not any(stored.samples):
            raise DifferenceError(
                f"The raw samples of {stored.source} are missing; expected samples.jsonl beside it. "
                "Intervals of a difference are computed from them: keep the two together."
            )


def _notes(a: Run, b: Run, tests: int, confidence: float, tolerance: float) -> Iterator[str]:
    yield (
        f"{tests} figures tested, verdicts at {confidence:.0%} over all of them (Holm); differences up to "
        f"{tolerance:.0%} are called negligible, because what changes from run to run is in no interval "
        "of two single runs."
    )
    for name, run in (("a", a), ("b", b)):
        if run.verdict.stamp == "INVALID":
            yield f"Run {name} ({run.title}) is INVALID: see its reasons before believing a difference."
    if a.kind != b.kind:
        yield f"Run a measures {a.kind}, run b {b.kind}: the difference is what lies between the two."


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + str(name)] = value
    return found
