"""COCO figures of something that answers, and everything a reader must know to trust them.

answers ─► COCO results ─► metrics over all images, a failed one counting as empty ─┐
                      └─► metrics over the answered ones, when some failed          ├─► Evaluation
                      └─► metrics as called without options                        ─┘
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dettools.coco_metrics import IouType, Metrics, evaluate_coco
from dettools.evaluation.answers import Answer, Event, category_of, coco_results
from dettools.evaluation.category_mapping import CategoryMapping
from dettools.evaluation.certificate import Certificate
from dettools.evaluation.gate import Limits, Objection
from dettools.ground_truth import GroundTruth


@dataclass(frozen=True)
class AsCalled:
    """What a client gets that sends no options: the spec's own threshold and maximum."""

    score_threshold: float
    max_detections: int
    ap: float
    ap50: float


@dataclass(frozen=True)
class Evaluation:
    """The result.

    Attributes:
        name: what was evaluated, for people.
        facts: what runs there, as it says itself.
        truth: the data set.
        limits: under which the answers came.
        mapping: which category each class is.
        answers: one for each image, in the data set's order.
        metrics: IoU type to figures over all images; a failed one counts as one in which nothing was found.
        metrics_answered: the same over the answered images; empty when none failed.
        as_called: what a client gets that sends no options; None where the defaults are not known.
        accepted: objections that were overridden: the figures are not COCO AP of this model.
        resumed: answers that an earlier run had left.
        events: what was got over.
        seconds: of this run.
    """

    name: str
    facts: Mapping[str, Any]
    truth: GroundTruth = field(repr=False)
    limits: Limits
    mapping: CategoryMapping
    answers: tuple[Answer, ...] = field(repr=False)
    metrics: Mapping[IouType, Metrics]
    metrics_answered: Mapping[IouType, Metrics]
    as_called: AsCalled | None
    accepted: tuple[Objection, ...]
    resumed: int
    events: tuple[Event, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    certificate: Certificate | None = None

    @property
    def failed(self) -> tuple[Answer, ...]:
        """The images without an answer."""
        return tuple(answer for answer in self.answers if answer.failure is not None)

    @property
    def passed(self) -> bool:
        """Whether every image was answered, and the certificate, if one was asked for, is given."""
        return not self.failed and (self.certificate is None or self.certificate.passed)

    def events_by_kind(self) -> list[tuple[str, int, float, float]]:
        """What was got over: ``(error, requests sent again, first s, last s)``, the most frequent first."""
        kinds = Counter(_kind(event) for event in self.events)
        times = {kind: [event.at_s for event in self.events if _kind(event) == kind] for kind in kinds}
        return [(kind, count, min(times[kind]), max(times[kind])) for kind, count in kinds.most_common()]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values; figures as fractions."""
        return {
            "model": self.name,
            "facts": {key: value for key, value in self.facts.items() if key != "categories"},
            "annotations": str(self.truth.path),
            "annotations_sha256": self.truth.sha256,
            "images": len(self.answers),
            "answered": len(self.answers) - len(self.failed),
            "failed": len(self.failed),
            "failed_images": [
                {
                    "image": answer.file_name,
                    "type": answer.failure.type,
                    "status": answer.failure.status,
                    "message": answer.failure.message,
                }
                for answer in self.failed
                if answer.failure
            ],
            "score_threshold": self.limits.effective_threshold,
            "max_detections": self.limits.max_detections,
            "categories_by": self.mapping.by,
            "comparable": not self.accepted,
            "accepted_objections": [objection.to_json() for objection in self.accepted],
            "metrics": {kind: metrics.to_json() for kind, metrics in self.metrics.items()},
            "metrics_answered_only": {kind: metrics.to_json() for kind, metrics in self.metrics_answered.items()},
            "as_called": None
            if self.as_called is None
            else {
                "score_threshold": self.as_called.score_threshold,
                "max_detections": self.as_called.max_detections,
                "AP": self.as_called.ap,
                "AP50": self.as_called.ap50,
            },
            "from_an_earlier_run": self.resumed,
            "sent_again": [
                {"error": kind, "requests": count, "first_s": first, "last_s": last}
                for kind, count, first, last in self.events_by_kind()
            ],
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
            "certificate": None if self.certificate is None else self.certificate.to_json(),
        }


def summarise(
    name: str,
    facts: Mapping[str, Any],
    truth: GroundTruth,
    answers: Sequence[Answer],
    *,
    limits: Limits,
    mapping: CategoryMapping,
    iou_types: Sequence[IouType] = ("bbox",),
    accepted: Sequence[Objection] = (),
    resumed: int = 0,
    events: Sequence[Event] = (),
    seconds: float = 0.0,
    certificate: Certificate | None = None,
) -> Evaluation:
    """Compute the figures of a finished run."""
    ids = [answer.image_id for answer in answers]
    answered = [answer.image_id for answer in answers if answer.failure is None]
    results = coco_results(answers, mapping.category_ids)
    metrics = {kind: evaluate_coco(truth, results, iou_type=kind, image_ids=ids) for kind in iou_types}
    partly = 0 < len(answered) < len(ids)
    of_answered = (
        {kind: evaluate_coco(truth, results, iou_type=kind, image_ids=answered) for kind in iou_types} if partly else {}
    )
    dropped = sum(
        category_of(label, mapping.category_ids) is None
        for answer in answers
        if answer.detections is not None
        for label in answer.detections.labels.tolist()
    )
    notes = [*truth.notes, *([mapping.note] if mapping.note else [])]
    if dropped:
        notes.append(f"{dropped} detections are of classes that the data set does not have; they were left out")
    if len(ids) < len(truth.images):
        notes.append(f"only {len(ids)} of the data set's {len(truth.images)} images were evaluated")
    return Evaluation(
        name,
        facts,
        truth,
        limits,
        mapping,
        tuple(answers),
        metrics,
        of_answered,
        _as_called(facts, truth, answers, limits, mapping, ids, iou_types[0]),
        tuple(accepted),
        resumed,
        tuple(events),
        seconds,
        tuple(notes),
        certificate,
    )


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write ``results.json`` (COCO results), ``metrics.json`` and, when there is one, ``certificate.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "certificate.json").unlink(missing_ok=True)  # of an earlier run
    results = coco_results(evaluation.answers, evaluation.mapping.category_ids)
    (folder / "results.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(evaluation.to_json(), indent=2) + "\n", encoding="utf-8")
    if evaluation.certificate is not None:
        text = json.dumps(evaluation.certificate.to_json(), indent=2)
        (folder / "certificate.json").write_text(text + "\n", encoding="utf-8")


def _as_called(
    facts: Mapping[str, Any],
    truth: GroundTruth,
    answers: Sequence[Answer],
    limits: Limits,
    mapping: CategoryMapping,
    ids: Sequence[int],
    iou_type: IouType,
) -> AsCalled | None:
    threshold, most = facts.get("score_threshold"), facts.get("max_detections")
    if threshold is None or most is None or threshold < limits.effective_threshold or most > limits.max_detections:
        return None
    cut = [
        replace(answer, detections=answer.detections.filtered(threshold, most))
        for answer in answers
        if answer.detections is not None
    ]
    metrics = evaluate_coco(truth, coco_results(cut, mapping.category_ids), iou_type=iou_type, image_ids=ids)
    return AsCalled(threshold, most, metrics.ap, metrics.ap50)


def _kind(event: Event) -> str:
    return f"{event.status} {event.type}" if event.status else event.type
