"""A detector asked for a data set again and again, each time under another corruption, without losing what is done.

    clean ─► corruption × severity ─► files corrupted by chunks ─► stream (retries, journal) ─► Cell ─► results file
                                       └─ nothing else runs while they are asked: the latencies are the detector's own

An interrupted run goes on where it was: finished cells are in the results file, the answers of the cell in hand in its
journal. The same seed makes the same bytes, whoever is asked and in whatever order.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detserve.spec import load_spec

from dettools.analysis.corruptions import NO_CORRUPTION, library_version, severities_of
from dettools.analysis.corruptions_files import Corruptor
from dettools.analysis.corruptions_transport import LOSSLESS
from dettools.analysis.robustness_results import Cell, RobustnessResults, resumed_results
from dettools.analysis.robustness_subject import Subject
from dettools.coco_metrics import MetricsError, ap_interval, evaluate_coco
from dettools.comparison import compare_image
from dettools.evaluation.answers import Answer, Failure, Journal, coco_results, open_journal
from dettools.evaluation.request import DataSet, Request
from dettools.evaluation.stream import stream
from dettools.ground_truth import ImageEntry

_CHUNK = 32
"""Images that lie corrupted on disk at once."""
# What a worker says of itself that may change while a run is interrupted, and changes no answer.
_MAY_DIFFER = frozenset({"categories", "device", "device_name", "threads"})


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        corruptions: names, in the order of the run.
        severities: those asked for; 0 is the run without corruption. A corruption with fewer levels has fewer.
        seed: of the noise.
        out: the results file; journals lie beside it while they are needed.
        resamples: of AP's bootstrap; 0 for no interval.
        processes: that corrupt at once.
        fresh: drop what an earlier run left.
    """

    corruptions: tuple[str, ...]
    severities: tuple[int, ...]
    seed: int
    out: Path
    resamples: int = 200
    processes: int = 1
    fresh: bool = False

    @property
    def cells(self) -> tuple[tuple[str, int], ...]:
        """The runs, that without corruption first and once."""
        clean = [(NO_CORRUPTION, 0)] if 0 in self.severities else []
        return (
            *clean,
            *((name, one) for name in self.corruptions for one in severities_of(name) if one in self.severities),
        )


@dataclass(frozen=True)
class Watcher:
    """Who is told what happens; nobody by default.

    Attributes:
        progress: what is being done, how many images of it are done, and how many there are.
        sent: corruption, severity, image, the file that was sent and its answer.
        cell: corruption, severity, and what was measured; also of what an earlier run left.
    """

    progress: Callable[[str, int, int], None] = lambda *_: None
    sent: Callable[[str, int, ImageEntry, Path, Answer], None] | None = None
    cell: Callable[[str, int, Cell], None] = field(default=lambda *_: None)


def measure(request: Request, data: DataSet, subject: Subject, plan: Plan, watcher: Watcher) -> RobustnessResults:
    """Run every cell of the plan that the results file does not have.

    Raises:
        RobustnessError: the results file is of another run.
        DetserveError: the endpoint does not answer, or a corruption cannot be made; what is done is kept.
    """
    identity = identity_of(request, data, subject, plan)
    results = resumed_results(plan.out, subject.answerer.name, identity, fresh=plan.fresh)
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    with (
        Corruptor(plan.seed, plan.processes) as corruptor,
        _journal(plan, identity, NO_CORRUPTION, 0) as clean,
    ):
        run = _Run(request, data, subject, plan, watcher, corruptor, clean)
        for corruption, severity in plan.cells:
            cell = results.clean if severity == 0 else results.cells.get(corruption, {}).get(severity)
            if cell is None and severity == 0:
                cell = run.cell(corruption, severity, clean)
                results = results.with_cell(corruption, severity, cell)
                results.save(plan.out)
            elif cell is None:
                with _journal(plan, identity, corruption, severity) as journal:
                    cell = run.cell(corruption, severity, journal)
                results = results.with_cell(corruption, severity, cell)
                results.save(plan.out)
                journal_path(plan.out, corruption, severity).unlink()
            watcher.cell(corruption, severity, cell)
    return results


def identity_of(request: Request, data: DataSet, subject: Subject, plan: Plan) -> dict[str, Any]:
    """Return what must be equal for cells to belong together."""
    facts = {key: value for key, value in subject.answerer.facts.items() if key not in _MAY_DIFFER}
    return {
        "answerer": subject.answerer.name,
        "backend": subject.backend,
        "facts": hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "weights": _weights_digest(request),
        "categories": hashlib.sha256(json.dumps(subject.names).encode()).hexdigest()[:16],
        "images": str(request.images.resolve()),
        "annotations": data.truth.sha256,
        "limit": request.limit,
        "classes": list(request.classes),
        "score_threshold": subject.asked.score_threshold,
        "max_detections": subject.asked.max_detections,
        "iou_types": sorted(request.iou_types),
        "seed": plan.seed,
        "corruptions_by": library_version(),
    }


def journal_path(out: Path, corruption: str, severity: int) -> Path:
    """Return where the answers of a cell lie while it is not finished; those without corruption stay."""
    return out.with_name(f"{out.stem}-{corruption}-{severity}.jsonl")


def unexpected_failures(results: RobustnessResults) -> dict[str, int]:
    """Return how many images got no answer, by kind, where the corruption left a whole image."""
    counts: Counter[str] = Counter(results.clean.failed if results.clean else {})
    for corruption, cells in results.cells.items():
        for cell in cells.values():
            if corruption != "truncation":
                counts.update(cell.failed)
    return dict(counts)


def changed_by_lossless(results: RobustnessResults) -> dict[tuple[str, int], int]:
    """Return on how many images detections changed although every pixel was kept, by corruption and severity."""
    return {
        (corruption, severity): cell.images - cell.unchanged
        for corruption, cells in results.cells.items()
        for severity, cell in cells.items()
        if cell.unchanged is not None and cell.unchanged < cell.images
    }


@contextmanager
def _journal(plan: Plan, identity: Mapping[str, Any], corruption: str, severity: int) -> Iterator[Journal]:
    whose = {**identity, "corruption": corruption, "severity": severity}
    with open_journal(journal_path(plan.out, corruption, severity), whose, fresh=plan.fresh) as journal:
        yield journal


@dataclass(frozen=True)
class _Run:
    """What every cell is measured with; ``clean`` has the answers without corruption."""

    request: Request
    data: DataSet
    subject: Subject
    plan: Plan
    watcher: Watcher
    corruptor: Corruptor
    clean: Journal

    def cell(self, corruption: str, severity: int, journal: Journal) -> Cell:
        """Ask for every image under one corruption, and compute the figures."""
        what = f"{corruption} {severity}" if severity else "no corruption"
        entries = self.data.entries
        waiting = [entry for entry in entries if entry.id not in journal.resumed]
        done = len(entries) - len(waiting)
        self.watcher.progress(what, done, len(entries))

        def count(_: Answer) -> None:
            nonlocal done
            done += 1
            self.watcher.progress(what, done, len(entries))

        for start in range(0, len(waiting), _CHUNK):
            chunk = waiting[start : start + _CHUNK]
            if severity == 0:
                self._ask(corruption, severity, chunk, self.data.files, journal, count)
                continue
            with tempfile.TemporaryDirectory(prefix="corrupted-", dir=self.plan.out.parent) as folder:
                made = self.corruptor.write(chunk, self.data.files, Path(folder), corruption, severity)
                for entry in chunk:
                    if entry.id in made.failures:
                        failure = Failure("not_corrupted", made.failures[entry.id])
                        journal.add(Answer(entry.id, entry.file_name, failure=failure, attempts=0))
                        count(journal.answers[entry.id])
                sent = [entry for entry in chunk if entry.id not in made.failures]
                self._ask(corruption, severity, sent, made.files, journal, count)
        answers = [journal.answers[entry.id] for entry in entries]
        compared = corruption in LOSSLESS and len(self.clean.answers) >= len(answers)
        return self._figures(answers, self._unchanged(answers) if compared else None)

    def _ask(
        self,
        corruption: str,
        severity: int,
        entries: Sequence[ImageEntry],
        files: Mapping[int, Path],
        journal: Journal,
        count: Callable[[Answer], None],
    ) -> None:
        try:
            stream(self.subject.answerer, entries, files, journal, retry=self.request.retry, on_answer=count)
        finally:
            if self.watcher.sent is not None:
                for entry in entries:
                    if entry.id in files and entry.id in journal.answers:
                        self.watcher.sent(corruption, severity, entry, files[entry.id], journal.answers[entry.id])

    def _figures(self, answers: Sequence[Answer], unchanged: int | None) -> Cell:
        truth, kinds, plan = self.data.truth, self.request.iou_types, self.plan
        found = coco_results(answers, self.subject.mapping.category_ids)
        ids = [answer.image_id for answer in answers]
        intervals: dict[str, tuple[float, float]] = {}
        for kind in kinds if plan.resamples else ():
            try:
                one = ap_interval(truth, found, iou_type=kind, image_ids=ids, resamples=plan.resamples, seed=plan.seed)
            except MetricsError:
                continue  # nothing to be found in these images
            intervals[kind] = (one.low, one.high)
        latencies = [answer.latency_ms for answer in answers if answer.failure is None]
        return Cell(
            figures={kind: evaluate_coco(truth, found, iou_type=kind, image_ids=ids).figures for kind in kinds},
            images=len(answers),
            failed=dict(Counter(answer.failure.type for answer in answers if answer.failure is not None)),
            latency_ms={f"p{p}": round(float(np.percentile(latencies, p)), 3) for p in (50, 95) if latencies},
            intervals=intervals,
            unchanged=unchanged,
        )

    def _unchanged(self, answers: Sequence[Answer]) -> int:
        """Count the images whose detections are those without corruption, within the tolerance of other arithmetic."""
        same = 0
        for answer in answers:
            before = self.clean.answers[answer.image_id].detections
            if before is None or answer.detections is None:
                same += before is None and answer.detections is None
                continue
            same += compare_image(
                answer.file_name,
                before,
                answer.detections,
                score_threshold=self.subject.asked.score_threshold,
                max_detections=self.subject.asked.max_detections,
            ).passed
        return same


def _weights_digest(request: Request) -> str | None:
    """Return the digest of the weights in this process's reach: what eager tells of itself is only their path."""
    path = Path(request.model)
    if request.weights is not None:
        path = request.weights
    elif path.suffix in (".yaml", ".yml"):
        named = load_spec(path, allow_code=request.allow_code).weights
        path = path.parent / named if named else path
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
