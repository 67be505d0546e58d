"""The golden check: the worker finds on the golden image what eager inference found when the archive was built."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dethandlers.detections import Category, Detections
from dethandlers.spec import Precision

_MIN_IOU = 0.5


@dataclass(frozen=True)
class Tolerance:
    """How far a detection may move: ``box_px`` per coordinate, ``score`` absolute; ``name`` for people."""

    name: str
    box_px: float
    score: float


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance("fp32", box_px=0.5, score=5e-3),
    "fp16": Tolerance("fp16", box_px=4.0, score=5e-2),
    "bf16": Tolerance("bf16", box_px=8.0, score=1e-1),
}


def describe_drift(
    golden: Detections,
    found: Detections,
    score_threshold: float,
    tolerance: Tolerance,
    categories: tuple[Category, ...],
) -> str:
    """Compare what was found on the golden image with what eager found there.

    Detections within the score tolerance of the threshold may come and go.

    Args:
        golden: eager's detections.
        found: the worker's, at the same threshold and maximum.
        score_threshold: of both.
        tolerance: how far a detection may move.
        categories: for the names in the message.

    Returns:
        One sentence on the first drift, or an empty string when there is none.
    """
    free = np.ones(len(found), dtype=np.bool_)
    for position in range(len(golden)):
        name = categories[int(golden.labels[position])].name
        score = float(golden.scores[position])
        overlaps = box_iou(golden.boxes_xyxy[position], found.boxes_xyxy)
        # Boxes without area overlap nothing, not even themselves.
        overlaps[np.abs(found.boxes_xyxy - golden.boxes_xyxy[position]).max(axis=1) <= tolerance.box_px] += 1.0
        overlaps[~free | (found.labels != golden.labels[position])] = 0.0
        best = int(np.argmax(overlaps)) if len(found) else -1
        if best < 0 or overlaps[best] < _MIN_IOU:
            if score < score_threshold + tolerance.score:
                continue
            return f"eager found {name} {score:.3f} on the golden image, this worker does not find it"
        free[best] = False
        shift = float(np.abs(found.boxes_xyxy[best] - golden.boxes_xyxy[position]).max())
        change = abs(float(found.scores[best]) - score)
        if shift > tolerance.box_px or change > tolerance.score:
            return (
                f"{name} {score:.3f} on the golden image moved by {shift:.2f} px and {change:.4f} in score; allowed in "
                f"{tolerance.name} are {tolerance.box_px} px and {tolerance.score}"
            )
    extra = np.flatnonzero(free & (found.scores >= score_threshold + tolerance.score))
    if len(extra):
        name = categories[int(found.labels[extra[0]])].name
        return f"this worker finds {name} {float(found.scores[extra[0]]):.3f} on the golden image, eager did not"
    return ""


def box_iou(box: npt.NDArray[np.float32], boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the IoU of one xyxy box with ``(N, 4)`` others, as ``(N,)``."""
    one, many = box.astype(np.float64), boxes.astype(np.float64)
    overlap = np.clip(np.minimum(one[2:], many[:, 2:]) - np.maximum(one[:2], many[:, :2]), 0, None).prod(axis=1)
    areas = np.clip(many[:, 2:] - many[:, :2], 0, None).prod(axis=1) + np.clip(one[2:] - one[:2], 0, None).prod()
    return np.asarray(overlap / np.maximum(areas - overlap, 1e-9))
