"""How far the two sides may lie apart, and what it is called when they do not agree.

Two literal tables: the reason codes and the tolerance tiers. `judge` reads one image's pairs and unmatched detections
against a tier.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dethandlers.detections import Detections

from dettools.matching import Pair, same_order, same_order_but_for_ties

TierName = Literal["bit", "numeric", "reduced-precision", "detection"]
Reason = Literal[
    "request_failed",
    "eager_failed",
    "swapped_replies",
    "label_flip",
    "missing",
    "extra",
    "box_drift",
    "score_drift",
    "mask_drift",
    "keypoint_drift",
    "threshold_edge",
    "truncated_by_max_detections",
    "order_only",
]

REASONS: dict[Reason, str] = {
    "request_failed": "the endpoint answered with an error or not at all",
    "eager_failed": "eager inference gave no detections to compare with",
    "swapped_replies": "the answer belongs to another image of this comparison",
    "label_flip": "the same box has another class",
    "missing": "eager finds it, the endpoint does not",
    "extra": "the endpoint finds it, eager does not",
    "box_drift": "a coordinate differs by more than the tier allows",
    "score_drift": "the score differs by more than the tier allows",
    "mask_drift": "the masks overlap less than the tier allows",
    "keypoint_drift": "a keypoint is farther away than the tier allows",
    "threshold_edge": "on one side only, its score within the tier's tolerance of the threshold: tolerated",
    "truncated_by_max_detections": "on one side only, its score at the other side's cut-off: tolerated",
    "order_only": "the same detections in another order: tolerated",
}
"""Every reason code and its meaning, the gravest first."""


@dataclass(frozen=True)
class Tier:
    """How far the two sides may lie apart.

    Attributes:
        name: as on the command line.
        box_px: a box agrees when no coordinate differs by more pixels than this,
        box_share: … or than this share of the box's longer side,
        box_iou: … or when the boxes overlap at least this much (2: never).
        score: largest difference of the scores; also the width of the threshold's edge and of the cut-off.
        mask_iou: least IoU of the masks.
        keypoint_px: a keypoint agrees when x and y differ by no more pixels than this,
        keypoint_share: … or than this share of the box's longer side.
    """

    name: TierName
    box_px: float
    box_share: float
    box_iou: float
    score: float
    mask_iou: float
    keypoint_px: float
    keypoint_share: float


TIERS: tuple[Tier, ...] = (
    # Identical float32 values, in the same order but for exact ties.
    Tier("bit", 0.0, 0.0, 2.0, 0.0, 1.0, 0.0, 0.0),
    # The same arithmetic in another order: other kernels, batch sizes, threads, or float32 on another machine.
    Tier("numeric", 0.05, 0.0, 2.0, 1e-4, 0.99, 0.05, 0.0),
    # fp16. Measured with YOLOX-nano on 39 photographs at threshold 0.05, against fp32: half of the boxes within 0.1 px,
    # 95 % within 1.1 px and 0.9 % of their side, 99 % of the scores within 0.017. Beyond are the boxes for which
    # rounding makes NMS keep another of two near-equal candidates; no bound covers those. bf16 is 8 times coarser (on
    # ten of the photographs 95 % of the boxes within 12 px, of the scores within 0.05) and may reach no tier at all.
    # 2 px is also the grid of fp16 coordinates above 2048; moving a 40 px mask by 2 px takes 10 % of its IoU.
    Tier("reduced-precision", 2.0, 0.01, 2.0, 0.02, 0.90, 2.0, 0.02),
    # The same objects, as an evaluation at high IoU would count them; each tier contains the stricter one.
    Tier("detection", 2.0, 0.01, 0.9, 0.05, 0.80, 2.0, 0.05),
)
TIER_NAMES: tuple[TierName, ...] = tuple(tier.name for tier in TIERS)
"""The tiers, strictest first."""


@dataclass(frozen=True)
class Finding:
    """One difference and the detections concerned.

    Attributes:
        reason: a key of ``REASONS``.
        detail: what differs and by how much, for people.
        eager: position in the eager detections, or None.
        served: position in the served detections, or None.
        fails: whether it keeps the image from the tier it was judged at.
    """

    reason: Reason
    detail: str
    eager: int | None = None
    served: int | None = None
    fails: bool = True


def rank(name: TierName | None) -> int:
    """Return the place of a tier, 0 for the strictest; None, no tier at all, comes last."""
    return len(TIERS) if name is None else TIER_NAMES.index(name)


def judge(
    pairs: tuple[Pair, ...],
    unmatched_eager: tuple[int, ...],
    unmatched_served: tuple[int, ...],
    eager: Detections,
    served: Detections,
    *,
    tier: Tier,
    score_threshold: float,
    max_detections: int,
    names: Sequence[str] = (),
) -> tuple[Finding, ...]:
    """Return the differences of one image at a tier; it is reached when none of them fails."""
    found: list[Finding] = []
    for pair in pairs:
        i, j = pair.eager, pair.served
        if not pair.same_label:
            before, after = int(eager.labels[i]), int(served.labels[j])
            found.append(Finding("label_flip", f"{_name(names, before)} became {_name(names, after)}", i, j))
        found += [Finding(reason, detail, i, j) for reason, detail in _drifts(pair, tier)]
    found += _unmatched("missing", unmatched_eager, eager, served, tier, score_threshold, max_detections)
    found += _unmatched("extra", unmatched_served, served, eager, tier, score_threshold, max_detections)
    if not any(finding.fails for finding in found) and not same_order(pairs):
        tied = same_order_but_for_ties(pairs, eager, served)
        detail = "only between equal scores" if tied else "beyond equal scores"
        found.append(Finding("order_only", detail, fails=tier.name == "bit" and not tied))
    return tuple(found)


def _drifts(pair: Pair, tier: Tier) -> list[tuple[Reason, str]]:
    # Each test is "not within", so that a difference that is not a number fails.
    drifts: list[tuple[Reason, str]] = []
    if not (pair.box_delta_px <= max(tier.box_px, tier.box_share * pair.side_px) or pair.iou >= tier.box_iou):
        drifts.append(("box_drift", f"by {pair.box_delta_px:.3g} px, IoU {pair.iou:.4f}"))
    if not pair.score_delta <= tier.score:
        drifts.append(("score_drift", f"by {pair.score_delta:.3g}"))
    if pair.mask_iou is not None and not pair.mask_iou >= tier.mask_iou:
        drifts.append(("mask_drift", f"mask IoU {pair.mask_iou:.4f}"))
    keypoint_reach = max(tier.keypoint_px, tier.keypoint_share * pair.side_px)
    if pair.keypoint_delta_px is not None and not pair.keypoint_delta_px <= keypoint_reach:
        drifts.append(("keypoint_drift", f"by {pair.keypoint_delta_px:.3g} px"))
    return drifts


def _unmatched(
    reason: Literal["missing", "extra"],
    positions: tuple[int, ...],
    own: Detections,
    other: Detections,
    tier: Tier,
    score_threshold: float,
    max_detections: int,
) -> list[Finding]:
    """Judge the detections of one side that the other lacks.

    Near the threshold, and near the lowest score of a list that is full, rounding decides what is kept: such a
    detection is tolerated. When more than half of a full list would be excused so, the scores say nothing, and none is.
    """
    cut_off = float(other.scores.min()) if len(other) >= max_detections else -math.inf
    at_cut_off = [i for i in positions if own.scores[i] <= cut_off + tier.score]
    cut_excused = len(own) <= max_detections and len(at_cut_off) <= max(1, max_detections // 2)
    found: list[Finding] = []
    for i in positions:
        score = float(own.scores[i])
        code: Reason = reason
        fails, detail = True, f"score {score:.4f}"
        if tier.score > 0 and abs(score - score_threshold) <= tier.score:
            code, fails, detail = "threshold_edge", False, f"{reason}: score {score:.6f}, threshold {score_threshold:g}"
        elif i in at_cut_off:
            code, fails = "truncated_by_max_detections", tier.score == 0 or not cut_excused
            detail = f"{reason}: score {score:.6f}, the other side ends at {cut_off:.6f} after {len(other)} detections"
        elif score < score_threshold:
            detail += f", below the threshold {score_threshold:g}"
        at_eager, at_served = (i, None) if reason == "missing" else (None, i)
        found.append(Finding(code, detail, at_eager, at_served, fails))
    return found


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if 0 <= label < len(names) else f"label {label}"
