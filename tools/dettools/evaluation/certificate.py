"""Is what is served as accurate as what was trained? A certificate, or the images that speak against it.

    reference answers ─┐ same images  ┌─► paired bootstrap of ΔAP ─► two one-sided tests ─► verdict
    served answers ────┴──────────────┴─► comparison image by image ─► reason codes of the counterexamples

Two one-sided tests (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657): equivalence is shown when ΔAP is shown to be
above −margin and shown to be below +margin, each at level α; that is, when the (1 − 2α) interval lies inside it.
A failure to find a difference is no proof of equality; this is. The sampling distribution of ΔAP comes from
resampling images, the same ones for both sides (Efron & Tibshirani 1993, ch. 8).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dettools.agreement import TierName
from dettools.coco_metrics import IouType, compare_coco, evaluate_coco
from dettools.comparison import Comparison, compare_image, compare_images, failed_image
from dettools.evaluation.answers import Answer, coco_results
from dettools.evaluation.category_mapping import CategoryMapping
from dettools.ground_truth import GroundTruth

Outcome = Literal["equivalent", "different", "undecided", "incomplete"]

MARGIN = 0.001
"""0.1 AP, as a fraction: what COCO papers round to."""
_MOST_COUNTEREXAMPLES = 20


@dataclass(frozen=True)
class Counterexample:
    """An image on which the two sides disagree.

    Attributes:
        image: file name.
        reasons: `compare`'s codes, gravest first.
        ap_effect: how much ΔAP changes when the image is left out; negative when it costs the served side.
    """

    image: str
    reasons: tuple[str, ...]
    detail: str
    ap_effect: float


@dataclass(frozen=True)
class Certificate:
    """Served against the reference on the same images.

    Attributes:
        outcome: ``equivalent``; ``different`` (the interval lies outside the margin); ``undecided`` (too few images for
            the difference there is); ``incomplete`` (images without an answer).
        reference, served: what the two sides are.
        ap_reference, ap_served, difference: AP as fractions; difference is served − reference.
        low, high: the (1 − 2α) interval of the difference.
        p_lower, p_upper: of the two one-sided tests, against −margin and +margin.
        margin: as a fraction of AP.
        confidence: 1 − α.
        comparison: the two sides image by image.
    """

    outcome: Outcome
    reference: str
    served: str
    iou_type: IouType
    ap_reference: float
    ap_served: float
    difference: float
    low: float
    high: float
    p_lower: float
    p_upper: float
    margin: float
    confidence: float
    images: int
    resamples: int
    failed: int
    comparison: Comparison = field(repr=False)
    counterexamples: tuple[Counterexample, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether equivalence is shown."""
        return self.outcome == "equivalent"

    def sentence(self) -> str:
        """Say it in AP points."""
        got = (
            f"ΔAP {_points(self.difference)} "
            f"(served {100 * self.ap_served:.2f}, reference {100 * self.ap_reference:.2f}), "
            f"{100 * (2 * self.confidence - 1):g} % interval {_points(self.low)} to {_points(self.high)}"
        )
        bound = f"±{100 * self.margin:g} AP at {100 * self.confidence:g} %"
        return {
            "equivalent": f"{self.iou_type}: served = reference within {bound}: {got}",
            "different": f"{self.iou_type}: served ≠ reference: beyond {bound}: {got}",
            "undecided": f"{self.iou_type}: not shown to be within {bound}: {got}. More images decide it",
            "incomplete": f"no certificate: {self.failed} images have no answer; {got}",
        }[self.outcome]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values; AP as fractions."""
        return {
            "outcome": self.outcome,
            "passed": self.passed,
            "sentence": self.sentence(),
            "reference": self.reference,
            "served": self.served,
            "iou_type": self.iou_type,
            "ap_reference": self.ap_reference,
            "ap_served": self.ap_served,
            "difference": self.difference,
            "interval": [self.low, self.high],
            "interval_confidence": 2 * self.confidence - 1,
            "p_lower": self.p_lower,
            "p_upper": self.p_upper,
            "margin": self.margin,
            "confidence": self.confidence,
            "images": self.images,
            "resamples": self.resamples,
            "failed_images": self.failed,
            "method": "paired bootstrap over images, two one-sided tests",
            "counterexamples": [
                {"image": one.image, "reasons": list(one.reasons), "detail": one.detail, "ap_effect": one.ap_effect}
                for one in self.counterexamples
            ],
            "comparison": self.comparison.to_json(per_image=False),
        }


@dataclass(frozen=True)
class Side:
    """One side: who answered, what, and which category each label is."""

    name: str
    answers: Mapping[int, Answer]
    mapping: CategoryMapping


def certify(
    truth: GroundTruth,
    reference: Side,
    served: Side,
    image_ids: Sequence[int],
    *,
    score_threshold: float,
    max_detections: int,
    tier: TierName = "numeric",
    iou_type: IouType = "bbox",
    margin: float = MARGIN,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Certificate:
    """Compare two sides on the same images.

    Args:
        score_threshold, max_detections: under which both answered.
        tier: what `compare` asks of each image.
        margin: how much AP, as a fraction, is no difference.
        confidence: of each one-sided test.
    """
    alpha = 1 - confidence
    mine = coco_results([served.answers[one] for one in image_ids], served.mapping.category_ids)
    theirs = coco_results([reference.answers[one] for one in image_ids], reference.mapping.category_ids)
    difference = compare_coco(
        truth, theirs, mine, iou_type=iou_type, image_ids=image_ids, resamples=resamples, seed=seed,
        confidence=1 - 2 * alpha,
    )  # fmt: skip
    p_lower, p_upper = difference.p_values(margin)
    failed = sum(
        served.answers[one].failure is not None or reference.answers[one].failure is not None for one in image_ids
    )
    comparison = _comparison(reference, served, image_ids, score_threshold, max_detections, tier)
    return Certificate(
        _outcome(difference.low, difference.high, p_lower, p_upper, margin, alpha, failed),
        reference.name,
        served.name,
        iou_type,
        difference.ap_reference,
        difference.ap_other,
        difference.difference,
        difference.low,
        difference.high,
        p_lower,
        p_upper,
        margin,
        confidence,
        len(image_ids),
        resamples,
        failed,
        comparison,
        _counterexamples(comparison, truth, mine, theirs, image_ids, iou_type),
    )


def _outcome(
    low: float, high: float, p_lower: float, p_upper: float, margin: float, alpha: float, failed: int
) -> Outcome:
    if failed:
        return "incomplete"
    if p_lower < alpha and p_upper < alpha and -margin < low and high < margin:
        return "equivalent"
    return "different" if low > margin or high < -margin else "undecided"


def _comparison(
    reference: Side,
    served: Side,
    image_ids: Sequence[int],
    score_threshold: float,
    max_detections: int,
    tier: TierName,
) -> Comparison:
    images = []
    for one in image_ids:
        theirs, mine = reference.answers[one], served.answers[one]
        if theirs.detections is None:
            images.append(
                failed_image(mine.file_name, "eager_failed", theirs.failure.message if theirs.failure else "")
            )
        elif mine.detections is None:
            message = mine.failure.message if mine.failure else ""
            images.append(failed_image(mine.file_name, "request_failed", message, eager=theirs.detections))
        else:
            images.append(
                compare_image(
                    mine.file_name,
                    theirs.detections,
                    mine.detections,
                    score_threshold=score_threshold,
                    max_detections=max_detections,
                    required=tier,
                )
            )
    return compare_images(images, score_threshold=score_threshold, max_detections=max_detections, required=tier)


def _counterexamples(
    comparison: Comparison,
    truth: GroundTruth,
    mine: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    image_ids: Sequence[int],
    iou_type: IouType,
) -> tuple[Counterexample, ...]:
    """The failing images, those that move ΔAP most first; how far, by leaving each one out."""
    id_of = {truth_image.file_name: truth_image.id for truth_image in truth.images}
    failing = [image for image in comparison.worst if not image.passed][:_MOST_COUNTEREXAMPLES]
    if not failing:
        return ()

    def delta(ids: Sequence[int]) -> float:
        kept = set(ids)
        sides = ([one for one in side if one["image_id"] in kept] for side in (mine, theirs))
        served, reference = (evaluate_coco(truth, side, iou_type=iou_type, image_ids=ids).ap for side in sides)
        return served - reference

    whole = delta(image_ids)
    found = []
    for image in failing:
        without = [one for one in image_ids if one != id_of[image.image]]
        finding = next((finding for finding in image.findings if finding.fails), None)
        effect = whole - delta(without) if without else whole
        found.append(Counterexample(image.image, image.reasons, finding.detail if finding else "", effect))
    return tuple(sorted(found, key=lambda one: -abs(one.ap_effect)))


def _points(fraction: float) -> str:
    value = 100 * fraction
    return f"{0.0 if abs(value) < 5e-5 else value:+.4g}" if value else "0"
