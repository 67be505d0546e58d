"""Is what is served what was trained? The detections of the endpoint against those of eager inference.

    eager ──┐
            ├─ matching.match ─► pairs, unmatched ─► findings per tier ─► ImageComparison ──┐
    served ─┘                                                                               ├─► Comparison
                                            swapped replies, hints over all images  ────────┘

An image reaches a tier when no finding fails it; it passes when it reaches the required tier. Nothing here raises on
unequal lists: that they differ, and how, is the result.
"""

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from dethandlers.detections import Detections

from dettools.agreement import REASONS, TIERS, Finding, Reason, Tier, TierName, judge, rank
from dettools.hints import Hint, derive_hints
from dettools.matching import Pair, match


@dataclass(frozen=True)
class ImageComparison:
    """Eager against served on one image.

    Attributes:
        image: the image's name.
        eager: the reference, or None when eager inference failed.
        served: the answer, or None when the request failed.
        pairs: the objects that both sides see.
        unmatched_eager: positions in ``eager`` that are in no pair.
        unmatched_served: positions in ``served`` that are in no pair.
        findings: the differences, judged at the required tier.
        tier: the strictest tier reached, or None.
        swapped_with: the image whose detections this one was answered with.
    """

    image: str
    eager: Detections | None = field(repr=False)
    served: Detections | None = field(repr=False)
    pairs: tuple[Pair, ...] = ()
    unmatched_eager: tuple[int, ...] = ()
    unmatched_served: tuple[int, ...] = ()
    findings: tuple[Finding, ...] = ()
    tier: TierName | None = None
    swapped_with: str | None = None

    @property
    def passed(self) -> bool:
        """Whether no difference goes beyond the required tier."""
        return not any(finding.fails for finding in self.findings)

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """The reason codes of this image, gravest first; a swapped reply explains all others."""
        if self.swapped_with is not None:
            return ("swapped_replies",)
        found = {finding.reason for finding in self.findings}
        return tuple(reason for reason in REASONS if reason in found)

    @property
    def max_box_delta_px(self) -> float:
        """Largest coordinate difference over the pairs, in pixels."""
        return max((pair.box_delta_px for pair in self.pairs), default=0.0)

    @property
    def max_score_delta(self) -> float:
        """Largest score difference over the pairs."""
        return max((pair.score_delta for pair in self.pairs), default=0.0)

    @property
    def min_mask_iou(self) -> float | None:
        """Least mask IoU over the pairs, or None without masks."""
        return min((pair.mask_iou for pair in self.pairs if pair.mask_iou is not None), default=None)

    @property
    def max_keypoint_delta_px(self) -> float | None:
        """Largest keypoint difference over the pairs in pixels, or None without keypoints."""
        deltas = [pair.keypoint_delta_px for pair in self.pairs if pair.keypoint_delta_px is not None]
        return max(deltas, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison of this image as plain JSON values."""
        return {
            "image": self.image,
            "passed": self.passed,
            "tier": self.tier,
            "reasons": list(self.reasons),
            "eager": None if self.eager is None else len(self.eager),
            "served": None if self.served is None else len(self.served),
            "matched": len(self.pairs),
            "max_box_delta_px": _finite(self.max_box_delta_px),
            "max_score_delta": _finite(self.max_score_delta),
            "min_mask_iou": self.min_mask_iou,
            "max_keypoint_delta_px": _finite(self.max_keypoint_delta_px),
            "swapped_with": self.swapped_with,
            "findings": [
                {
                    "reason": finding.reason,
                    "fails": finding.fails,
                    "detail": finding.detail,
                    "eager": _detection_json(self.eager, finding.eager),
                    "served": _detection_json(self.served, finding.served),
                }
                for finding in self.findings
            ],
        }


@dataclass(frozen=True)
class Comparison:
    """Eager against served over all images.

    Attributes:
        images: one comparison per image, in the order given.
        required: the tier that every image must reach.
        score_threshold: asked of both sides.
        max_detections: asked of both sides.
        hints: what the pattern over the images says about the cause.
    """

    images: tuple[ImageComparison, ...]
    required: TierName
    score_threshold: float
    max_detections: int
    hints: tuple[Hint, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every image passed, and there was one."""
        return bool(self.images) and all(image.passed for image in self.images)

    @property
    def tier(self) -> TierName | None:
        """The strictest tier that all images reach, or None."""
        ranks = [rank(image.tier) for image in self.images]
        return None if not ranks or max(ranks) == len(TIERS) else TIERS[max(ranks)].name

    @property
    def reasons(self) -> dict[Reason, int]:
        """Reason code to the number of images that have it, gravest first."""
        counts = Counter(reason for image in self.images for reason in image.reasons)
        return {reason: counts[reason] for reason in REASONS if reason in counts}

    @property
    def worst(self) -> tuple[ImageComparison, ...]:
        """The images, the worst first."""
        return tuple(sorted(self.images, key=_badness, reverse=True))

    def to_json(self, *, per_image: bool = True) -> dict[str, Any]:
        """Return the verdict, the maxima and, if wanted, every image as plain JSON values."""
        masks = [image.min_mask_iou for image in self.images if image.min_mask_iou is not None]
        keypoints = [image.max_keypoint_delta_px for image in self.images if image.max_keypoint_delta_px is not None]
        document: dict[str, Any] = {
            "passed": self.passed,
            "required_tier": self.required,
            "tier": self.tier,
            "score_threshold": self.score_threshold,
            "max_detections": self.max_detections,
            "images": len(self.images),
            "images_passed": sum(image.passed for image in self.images),
            "eager": sum(len(image.eager) for image in self.images if image.eager is not None),
            "served": sum(len(image.served) for image in self.images if image.served is not None),
            "matched": sum(len(image.pairs) for image in self.images),
            "max_box_delta_px": _finite(max((image.max_box_delta_px for image in self.images), default=0.0)),
            "max_score_delta": _finite(max((image.max_score_delta for image in self.images), default=0.0)),
            "min_mask_iou": min(masks, default=None),
            "max_keypoint_delta_px": _finite(max(keypoints, default=None)),
            "reasons": dict(self.reasons),
            "hints": [{"code": hint.code, "message": hint.message, "images": hint.images} for hint in self.hints],
            "worst_images": [image.image for image in self.worst if not image.passed][:10],
        }
        if per_image:
            document["per_image"] = [image.to_json() for image in self.images]
        return document


def compare_image(
    image: str,
    eager: Detections,
    served: Detections,
    *,
    score_threshold: float,
    max_detections: int,
    required: TierName = "numeric",
    names: Sequence[str] = (),
) -> ImageComparison:
    """Compare the two lists of one image.

    Args:
        image: its name in the report.
        eager: the reference.
        served: the endpoint's answer.
        score_threshold: asked of both sides.
        max_detections: asked of both sides.
        required: the tier at which the findings are judged.
        names: class names by label, for the details.
    """
    pairs = match(eager, served)
    matched_eager, matched_served = {pair.eager for pair in pairs}, {pair.served for pair in pairs}
    result = ImageComparison(
        image,
        eager,
        served,
        pairs=pairs,
        unmatched_eager=tuple(i for i in range(len(eager)) if i not in matched_eager),
        unmatched_served=tuple(j for j in range(len(served)) if j not in matched_served),
    )
    judged = {
        tier.name: judge(
            pairs,
            result.unmatched_eager,
            result.unmatched_served,
            eager,
            served,
            tier=tier,
            score_threshold=score_threshold,
            max_detections=max_detections,
            names=names,
        )
        for tier in TIERS
    }
    reached = (name for name, findings in judged.items() if not any(finding.fails for finding in findings))
    return replace(result, findings=judged[required], tier=next(reached, None))


def failed_image(
    image: str, reason: Literal["request_failed", "eager_failed"], message: str, *, eager: Detections | None = None
) -> ImageComparison:
    """Return the comparison of an image for which one side gave an error instead of detections."""
    return ImageComparison(image, eager, None, findings=(Finding(reason, message),))


def compare_images(
    images: Sequence[ImageComparison],
    *,
    score_threshold: float,
    max_detections: int,
    required: TierName = "numeric",
) -> Comparison:
    """Gather the images, find the answers that belong to another image, and derive hints from the pattern."""
    resolved = _with_swaps(images, TIERS[rank(required)], score_threshold, max_detections)
    hints = derive_hints(resolved, score_threshold=score_threshold)
    return Comparison(resolved, required, score_threshold, max_detections, hints)


def _with_swaps(
    images: Sequence[ImageComparison], tier: Tier, score_threshold: float, max_detections: int
) -> tuple[ImageComparison, ...]:
    """Mark the failing images whose answer is, at the required tier, what eager finds in another image."""
    source: dict[int, int] = {}
    # Only a list of the same length with the same best score can be the other image's.
    references: dict[int, list[tuple[float, int]]] = {}
    for j, image in enumerate(images):
        if image.eager is not None and len(image.eager):
            references.setdefault(len(image.eager), []).append((float(image.eager.scores.max()), j))
    for candidates in references.values():
        candidates.sort()
    failing = [i for i, image in enumerate(images) if not image.passed and image.eager is not None]
    for i in failing:
        answer = images[i].served
        if answer is None or not len(answer):
            continue
        best = float(answer.scores.max())
        candidates = references.get(len(answer), [])
        first = bisect_left(candidates, (best - tier.score, -1))
        last = bisect_right(candidates, (best + tier.score, len(images)))
        for _, j in candidates[first:last]:
            reference = images[j].eager
            if j == i or reference is None:
                continue
            # Lists whose scores differ by no more than the tier allows do so in sorted order too.
            if not np.abs(np.sort(answer.scores) - np.sort(reference.scores)).max() <= tier.score:
                continue
            crossed = compare_image(
                "",
                reference,
                answer,
                score_threshold=score_threshold,
                max_detections=max_detections,
                required=tier.name,
            )
            if crossed.passed and crossed.pairs:
                source[i] = j
                break
    for i, j in list(source.items()):
        # The other half of a swap with an image in which nothing is found: empty matches empty only then.
        back, mine = images[j].served, images[i].eager
        if (
            j in failing
            and j not in source
            and back is not None
            and mine is not None
            and not len(back)
            and not len(mine)
        ):
            source[j] = i
    return tuple(
        replace(image, swapped_with=images[source[i]].image) if i in source else image for i, image in enumerate(images)
    )


def _badness(image: ImageComparison) -> tuple[bool, int, int, float, float]:
    failing = sum(finding.fails for finding in image.findings)
    return not image.passed, rank(image.tier), failing, image.max_score_delta, image.max_box_delta_px


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _detection_json(detections: Detections | None, position: int | None) -> dict[str, Any] | None:
    if detections is None or position is None:
        return None
    return {
        "index": position,
        "class_label": int(detections.labels[position]),
        "score": _finite(float(detections.scores[position])),
        "bbox": [_finite(float(value)) for value in detections.boxes_xyxy[position]],
    }
