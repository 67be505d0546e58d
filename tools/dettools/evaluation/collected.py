"""What an evaluation has collected, before any figure: by one process, or by the shards of several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dettools.agreement import TierName
from dettools.coco_metrics import IouType
from dettools.evaluation.answers import Answer, Event
from dettools.evaluation.category_mapping import CategoryMapping
from dettools.evaluation.certificate import Certificate, Side, certify
from dettools.evaluation.evaluation import Evaluation, summarise
from dettools.evaluation.gate import Limits, Objection
from dettools.ground_truth import GroundTruth


@dataclass(frozen=True)
class Collected:
    """The answers, and what must be known of who gave them.

    Attributes:
        name, facts: who answered, and what it says of itself.
        accepted: objections that were overridden.
        answers: one for each image, in the data set's order.
        reference: the other side of the certificate; None where none was asked for.
        reference_file: name of the journal with the other side's answers.
        resumed: answers that an earlier run had left.
    """

    name: str
    facts: Mapping[str, Any]
    limits: Limits
    mapping: CategoryMapping
    accepted: tuple[Objection, ...]
    answers: tuple[Answer, ...] = field(repr=False)
    reference: Side | None = None
    reference_file: str | None = None
    events: tuple[Event, ...] = ()
    resumed: int = 0
    seconds: float = 0.0


def conclude(
    collected: Collected,
    truth: GroundTruth,
    *,
    iou_types: Sequence[IouType],
    tier: TierName,
    margin: float,
    confidence: float,
) -> Evaluation:
    """Compute the figures, and the certificate where there is another side.

    Args:
        tier, margin, confidence: of the certificate; margin as a fraction of AP.
    """
    certificate: Certificate | None = None
    if collected.reference is not None:
        certificate = certify(
            truth,
            collected.reference,
            Side(collected.name, {answer.image_id: answer for answer in collected.answers}, collected.mapping),
            [answer.image_id for answer in collected.answers],
            score_threshold=collected.limits.effective_threshold,
            max_detections=collected.limits.max_detections,
            tier=tier,
            iou_type=iou_types[0],
            margin=margin,
            confidence=confidence,
        )
    return summarise(
        collected.name,
        collected.facts,
        truth,
        collected.answers,
        limits=collected.limits,
        mapping=collected.mapping,
        iou_types=iou_types,
        accepted=collected.accepted,
        resumed=collected.resumed,
        events=collected.events,
        seconds=collected.seconds,
        certificate=certificate,
    )
