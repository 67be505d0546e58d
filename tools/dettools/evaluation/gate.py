"""What would make an AP a lie: refused before the run, with what it would cost.

COCO's AP is the area under a whole precision–recall curve over at most 100 detections an image. An endpoint that leaves
out scores below 0.5, or answers ten detections at most, cuts the curve off; one whose classes are not the data set's
counts every category that it does not have as AP 0. Such a figure can be compared with no other.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dettools.coco_metrics import evaluate_coco
from dettools.evaluation.answers import Answer, coco_results
from dettools.evaluation.category_mapping import CategoryMapping
from dettools.ground_truth import GroundTruth

HIGHEST_THRESHOLD = 0.05
"""The highest score threshold at which an AP is still called one; torchvision's own default."""
FEWEST_DETECTIONS = 100
"""COCO's ``maxDets``."""


@dataclass(frozen=True)
class Cost:
    """What a setting costs, measured on the images of a sample.

    Attributes:
        ap_without: AP as it should be; of ``categories``, that of the categories which the model has.
        ap_with: AP under the setting.
        images: how many images it was measured on.
        of: how many the data set has.
        measured_on: what gave the detections.
    """

    ap_without: float
    ap_with: float
    images: int
    of: int
    measured_on: str

    @property
    def loss(self) -> float:
        """AP lost, as a fraction."""
        return self.ap_without - self.ap_with

    def sentence(self) -> str:
        """Say it in AP points."""
        part = "all" if self.images == self.of else f"{self.images} of"
        return (
            f"it would cost {100 * self.loss:.1f} AP: {100 * self.ap_with:.1f} instead of {100 * self.ap_without:.1f} "
            f"({self.measured_on}, on {part} {self.of} images)"
        )


@dataclass(frozen=True)
class Objection:
    """A reason to refuse.

    Attributes:
        code: ``threshold``, ``max_detections`` or ``categories``.
        message: got / expected / remedy.
        cost: what it would cost; None when nothing is there to measure it with.
    """

    code: str
    message: str
    cost: Cost | None = None

    def sentence(self) -> str:
        """Say it whole."""
        if self.cost is None:
            return self.message
        cost = self.cost.sentence()
        return f"{self.message} {cost[0].upper()}{cost[1:]}."

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        cost = self.cost
        return {
            "code": self.code,
            "message": self.message,
            "cost": None
            if cost is None
            else {
                "ap_lost": cost.loss,
                "ap_without": cost.ap_without,
                "ap_with": cost.ap_with,
                "images": cost.images,
                "of": cost.of,
                "measured_on": cost.measured_on,
            },
        }


@dataclass(frozen=True)
class Limits:
    """What is asked for, and what comes of it.

    Attributes:
        score_threshold: asked for.
        max_detections: asked for.
        floor: the endpoint's own ``min_score_threshold``; None when it does not tell.
    """

    score_threshold: float
    max_detections: int
    floor: float | None

    @property
    def effective_threshold(self) -> float:
        """The threshold that the answers really have."""
        return max(self.score_threshold, self.floor or 0.0)


def limits_of(facts: Mapping[str, Any], score_threshold: float, max_detections: int) -> Limits:
    """Return the limits under which an answerer that describes itself so will answer."""
    floor = facts.get("min_score_threshold")
    return Limits(score_threshold, max_detections, None if floor is None else float(floor))


def objections(limits: Limits, mapping: CategoryMapping) -> list[Objection]:
    """Return what speaks against an evaluation, without its cost."""
    found = []
    if limits.effective_threshold > HIGHEST_THRESHOLD:
        who = (
            f"the endpoint answers no score below {limits.floor:g} (its spec's min_score_threshold)"
            if limits.floor is not None and limits.floor > HIGHEST_THRESHOLD
            else f"a score threshold of {limits.score_threshold:g} was asked for"
        )
        found.append(
            Objection(
                "threshold",
                f"threshold: {who}; expected at most {HIGHEST_THRESHOLD:g}, since AP needs the low scores too. "
                "Serve it with a lower min_score_threshold, and leave --score-threshold out.",
            )
        )
    if limits.max_detections < FEWEST_DETECTIONS:
        found.append(
            Objection(
                "max_detections",
                f"max_detections: {limits.max_detections} were asked for; expected at least {FEWEST_DETECTIONS}, as "
                "many as COCO's AP looks at.",
            )
        )
    if mapping.problem:
        found.append(
            Objection(
                "categories",
                f"categories: {mapping.problem}; expected that each class is one category of the data set and the "
                "other way round. Give the annotations that the model was trained for.",
            )
        )
    return found


def seen_objections(answers: Sequence[Answer], limits: Limits) -> list[Objection]:
    """Return what the answers of an endpoint that does not describe itself betray.

    A lowest score far above the threshold asked for, and the same greatest number of detections on several images, are
    settings that win over what is asked.
    """
    found = [answer.detections for answer in answers if answer.detections is not None]
    scores = [float(one.scores.min()) for one in found if len(one)]
    objecting = []
    if len(scores) >= 3 and min(scores) > max(HIGHEST_THRESHOLD, limits.score_threshold):
        objecting.append(
            Objection(
                "threshold",
                f"threshold: {limits.score_threshold:g} was asked for, but no score below {min(scores):.3g} came "
                f"back on {len(scores)} images with detections; the endpoint has a threshold of its own. AP needs the "
                "low scores too.",
            )
        )
    counts = Counter(len(one) for one in found)
    most = max(counts, default=0)
    if 0 < most < min(FEWEST_DETECTIONS, limits.max_detections) and counts[most] >= 3 and len(scores) >= 3:
        objecting.append(
            Objection(
                "max_detections",
                f"max_detections: {limits.max_detections} were asked for, but {counts[most]} images have exactly "
                f"{most} and none has more; the endpoint has a maximum of its own.",
            )
        )
    return objecting


def with_cost(
    objection: Objection,
    limits: Limits,
    truth: GroundTruth,
    mapping: CategoryMapping,
    sample: Callable[[], tuple[Sequence[Answer], CategoryMapping, str] | None],
) -> Objection:
    """Return the objection with what it costs, when detections under better settings can be had.

    Args:
        sample: returns detections without the limits on some images, how their labels map, and what gave them.
    """
    # Where no class is known there is nothing to measure: the AP would be 0.
    drawn = sample() if mapping.mapped_ids else None
    if drawn is None:
        return objection
    answers, drawn_mapping, source = drawn
    ids = [answer.image_id for answer in answers if answer.failure is None]
    if not ids:
        return objection

    whole = evaluate_coco(truth, coco_results(answers, drawn_mapping.category_ids), image_ids=ids)
    if objection.code == "categories":
        mapped = [one.ap for one in whole.per_class if one.category_id in mapping.mapped_ids and one.ap is not None]
        known = sum(mapped) / len(mapped) if mapped else 0.0
        return replace(objection, cost=Cost(known, whole.ap, len(ids), len(truth.images), source))
    cut = [
        replace(answer, detections=answer.detections.filtered(limits.effective_threshold, limits.max_detections))
        for answer in answers
        if answer.detections is not None
    ]
    with_it = evaluate_coco(truth, coco_results(cut, drawn_mapping.category_ids), image_ids=ids)
    return replace(objection, cost=Cost(whole.ap, with_it.ap, len(ids), len(truth.images), source))
