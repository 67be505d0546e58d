"""Which detection of one list is which of the other: one-to-one, class-aware and optimal.

    (N, M) overlap of the boxes ──► weight = overlap + bonus for the same class ──► optimal assignment ──► pairs

The sum of the weights is maximised over all assignments at once, so no early pair takes a box that a later one needs. A
changed class costs the bonus and no more, so the same box with another class is one pair (a flip), not two unmatched.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from dethandlers.detections import Detections, Rle

Floats = npt.NDArray[np.float64]

LEAST_OVERLAP = 0.5
"""Boxes that overlap less are different objects."""
SAME_CLASS_BONUS = 0.3
"""Worth of the same class, in overlap: an exact box of another class beats the same class at overlap below 0.7."""
SCORE_WEIGHT = 1e-3
"""Worth of the same score: it only decides between boxes that are equal in place and class."""
REACH_PX = 0.1
"""Boxes closer than half of this on every side overlap whatever their IoU, which says nothing of boxes without area."""


@dataclass(frozen=True)
class Pair:
    """One object as both sides see it.

    Attributes:
        eager: position in the eager detections.
        served: position in the served detections.
        same_label: whether both name the same class.
        iou: box IoU; 1 for equal boxes, even without area.
        box_delta_px: largest difference of the four coordinates, in pixels.
        score_delta: absolute difference of the scores.
        side_px: longer side of the eager box, in pixels.
        mask_iou: IoU of the masks, 0 where one side has none, None where neither has.
        keypoint_delta_px: largest difference of x or y over the keypoints, infinite where they cannot be compared, None
            where neither side has any.
    """

    eager: int
    served: int
    same_label: bool
    iou: float
    box_delta_px: float
    score_delta: float
    side_px: float
    mask_iou: float | None = None
    keypoint_delta_px: float | None = None


def match(eager: Detections, served: Detections) -> tuple[Pair, ...]:
    """Pair the detections of two lists of the same image; what is in no pair is unmatched.

    Returns:
        The pairs by falling eager rank. Each position occurs at most once per side.
    """
    if not len(eager) or not len(served):
        return ()
    from scipy.optimize import linear_sum_assignment

    eager_boxes, served_boxes = _float64(eager.boxes_xyxy), _float64(served.boxes_xyxy)
    iou = box_iou(eager_boxes, served_boxes)
    with np.errstate(invalid="ignore"):
        distance = np.abs(eager_boxes[:, None, :] - served_boxes[None, :, :]).max(axis=2)
        score_distance = np.abs(_float64(eager.scores)[:, None] - _float64(served.scores)[None, :])
    iou[distance == 0] = 1.0
    overlap = np.maximum(iou, 1.0 - distance / REACH_PX)
    same = eager.labels[:, None] == served.labels[None, :]
    weight = overlap + SAME_CLASS_BONUS * same + SCORE_WEIGHT * (1.0 - np.minimum(score_distance, 1.0))
    # A coordinate or score that is not a number belongs to no pair.
    usable = np.isfinite(weight) & (overlap >= LEAST_OVERLAP)
    rows, columns = linear_sum_assignment(np.where(usable, weight, 0.0), maximize=True)
    sides = (eager_boxes[:, 2:] - eager_boxes[:, :2]).max(axis=1)
    return tuple(
        Pair(
            eager=int(i),
            served=int(j),
            same_label=bool(same[i, j]),
            iou=float(iou[i, j]),
            box_delta_px=float(distance[i, j]),
            score_delta=float(score_distance[i, j]),
            side_px=float(sides[i]),
            mask_iou=_mask_iou(eager.masks, int(i), served.masks, int(j)),
            keypoint_delta_px=_keypoint_delta(eager.keypoints, int(i), served.keypoints, int(j)),
        )
        for i, j in zip(rows, columns, strict=True)
        if usable[i, j]
    )


def box_iou(boxes_a: Floats, boxes_b: Floats) -> Floats:
    """Return the ``(N, M)`` IoU of ``(N, 4)`` and ``(M, 4)`` xyxy boxes; 0 where there is no area to share."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        top_left = np.maximum(boxes_a[:, None, :2], boxes_b[None, :, :2])
        bottom_right = np.minimum(boxes_a[:, None, 2:], boxes_b[None, :, 2:])
        shared = np.clip(bottom_right - top_left, 0, None).prod(axis=2)
        area_a = np.clip(boxes_a[:, 2:] - boxes_a[:, :2], 0, None).prod(axis=1)
        area_b = np.clip(boxes_b[:, 2:] - boxes_b[:, :2], 0, None).prod(axis=1)
        iou: Floats = shared / (area_a[:, None] + area_b[None, :] - shared)
    return np.nan_to_num(iou, nan=0.0, posinf=0.0, neginf=0.0)


def same_order(pairs: tuple[Pair, ...]) -> bool:
    """Tell whether both sides list the matched detections in the same order."""
    served = [pair.served for pair in pairs]
    return served == sorted(served)


def same_order_but_for_ties(pairs: tuple[Pair, ...], eager: Detections, served: Detections) -> bool:
    """Tell whether the order differs only between detections whose scores are exactly equal on both sides."""
    i = np.array([pair.eager for pair in pairs], dtype=np.intp)
    j = np.array([pair.served for pair in pairs], dtype=np.intp)
    turned = (i[:, None] < i[None, :]) & (j[:, None] > j[None, :])
    eager_scores, served_scores = eager.scores[i], served.scores[j]
    tied = (eager_scores[:, None] == eager_scores[None, :]) & (served_scores[:, None] == served_scores[None, :])
    return not bool((turned & ~tied).any())


def _float64(values: npt.NDArray[np.float32]) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _mask_iou(eager: list[Rle] | None, i: int, served: list[Rle] | None, j: int) -> float | None:
    if eager is None and served is None:
        return None
    if eager is None or served is None or list(eager[i]["size"]) != list(served[j]["size"]):
        return 0.0
    from pycocotools import mask

    if mask.area(eager[i]) == 0 and mask.area(served[j]) == 0:
        return 1.0
    return float(mask.iou([eager[i]], [served[j]], [0])[0][0])


def _keypoint_delta(
    eager: npt.NDArray[np.float32] | None, i: int, served: npt.NDArray[np.float32] | None, j: int
) -> float | None:
    if eager is None and served is None:
        return None
    if eager is None or served is None or eager[i].shape != served[j].shape:
        return math.inf
    delta = np.abs(_float64(eager[i])[:, :2] - _float64(served[j])[:, :2])
    return float(delta.max(initial=0.0))
