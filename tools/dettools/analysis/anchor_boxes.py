"""The sizes of a data set's boxes as the network sees them, and how well anchors of given sizes cover them.

    GroundTruth ─► box_sizes ─► BoxSizes ─► histogram_of ─► SizeHistogram ─► anchor_search
                                   └─► coverage_of(anchors) ─► Coverage

Boxes and anchors share their centre here, as in YOLOv2 (Redmon and Farhadi 2017, section 2): what remains is how well
their sizes fit. A photograph is scaled by one factor, as a resize that keeps the ratio does; dividing each side by its
own factor, as MMDetection's optimize_anchors does, distorts every box where the input is not square.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from detserve.errors import DetserveError

from dettools.ground_truth import GroundTruth

Sizes = npt.NDArray[np.float64]
"""``(N, 2)`` widths and heights in pixels of the network's input."""

IOU_THRESHOLDS: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
# YOLOv5 assigns a box to an anchor when no side differs by more than this factor (its `anchor_t`).
LARGEST_RATIO = 4.0
# So many boxes are compared with the anchors at once: 8 bytes times the anchors each.
_AT_ONCE = 65_536


class AnchorError(DetserveError):
    """Anchors cannot be optimized: no boxes, no image sizes, or settings that cannot be met."""


@dataclass(frozen=True)
class BoxSizes:
    """The boxes that anchors are made for.

    Attributes:
        sizes: ``(N, 2)`` width and height in pixels of the network's input.
        input_size: width and height of that input.
        left_out: how many boxes were left out, by reason.
    """

    sizes: Sizes = field(repr=False)
    input_size: tuple[int, int]
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class SizeHistogram:
    """Boxes of nearly the same size as one: their mean ``sizes (M, 2)`` and their number as ``weights (M,)``."""

    sizes: Sizes = field(repr=False)
    weights: npt.NDArray[np.float64] = field(repr=False)


@dataclass(frozen=True)
class Coverage:
    """How well anchors cover the boxes; all but ``boxes`` are fractions.

    Attributes:
        boxes: how many there are.
        mean_iou: of each box with its best anchor.
        best_possible_recall: boxes with an anchor whose sides differ by less than `LARGEST_RATIO`.
        recall50: boxes whose best anchor has an IoU of at least .50.
        recall75: the same at .75.
        average_recall: the mean of the recalls at IoU .50:.95.
        per_anchor: the share of the boxes whose best anchor it is, in the anchors' order.
    """

    boxes: int
    mean_iou: float
    best_possible_recall: float
    recall50: float
    recall75: float
    average_recall: float
    per_anchor: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def box_sizes(
    ground_truth: GroundTruth, input_size: tuple[int, int], *, keep_ratio: bool = True, smallest_px: float = 0.0
) -> BoxSizes:
    """Scale every box as its photograph is scaled to the network's input.

    Args:
        ground_truth: the annotations; crowds are left out, for they are no single objects.
        input_size: width and height in pixels.
        keep_ratio: one factor for both sides, ``min(W / width, H / height)``; False for a resize that fills the input.
        smallest_px: boxes with a side below this, at the input, are left out.

    Raises:
        AnchorError: no box is left, an image has no size, or the input has none.
    """
    if min(input_size) < 1:
        raise AnchorError(f"got the input {input_size[0]} × {input_size[1]}, expected width and height in pixels")
    by_id = {image.id: image for image in ground_truth.images}
    rows = []
    left_out = {"crowd": 0, "no size": 0, "too small": 0}
    for annotation in ground_truth.annotations:
        box = annotation.get("bbox")
        if annotation["iscrowd"]:
            left_out["crowd"] += 1
        elif box is None or min(box[2:]) <= 0:
            left_out["no size"] += 1
        else:
            image = by_id[annotation["image_id"]]
            rows.append((image.width, image.height, box[2], box[3], image.id))
    table = np.array(rows, np.float64).reshape(-1, 5)
    if len(unsized := table[table[:, :2].min(axis=1) <= 0] if len(table) else table):
        raise AnchorError(
            f"{ground_truth.path}: image {int(unsized[0, 4])} has no width and height, which scaling its boxes needs. "
            "Add them to the annotation file."
        )
    factors = np.array(input_size) / table[:, :2]
    if keep_ratio:
        factors = factors.min(axis=1, keepdims=True)
    sizes = table[:, 2:4] * factors
    kept = sizes.min(axis=1) >= smallest_px if len(sizes) else np.empty(0, bool)
    left_out["too small"] = int((~kept).sum())
    if not kept.any():
        raise AnchorError(
            f"{ground_truth.path}: no box is left of {len(ground_truth.annotations)} "
            f"({', '.join(f'{reason}: {count}' for reason, count in left_out.items() if count) or 'there are none'}); "
            "expected annotations with a bbox"
        )
    return BoxSizes(sizes[kept], input_size, left_out)


def histogram_of(sizes: Sizes, cells: int) -> SizeHistogram:
    """Join boxes of nearly the same size: ``cells`` × ``cells`` cells, even in the logarithm of width and height.

    Fewer different sizes than cells are kept as they are.
    """
    if len(sizes) <= cells * cells:
        different, counts = np.unique(sizes, axis=0, return_counts=True)
        return SizeHistogram(different, counts.astype(np.float64))
    logs = np.log(np.maximum(sizes, 1e-6))
    low, high = logs.min(axis=0), logs.max(axis=0)
    place = ((logs - low) / np.maximum(high - low, 1e-12) * cells).astype(np.int64).clip(0, cells - 1)
    cell = place[:, 0] * cells + place[:, 1]
    counts = np.bincount(cell, minlength=cells * cells)
    used = counts > 0
    sums = [np.bincount(cell, weights=sizes[:, side], minlength=cells * cells)[used] for side in (0, 1)]
    weights = counts[used].astype(np.float64)
    return SizeHistogram(np.stack(sums, axis=1) / weights[:, None], weights)


def iou_of_sizes(sizes: Sizes, anchors: Sizes) -> npt.NDArray[np.float64]:
    """Return ``(N, K)`` IoU of boxes and anchors that share their centre; 0 where both have no area."""
    # Anchor by anchor in memory: the boxes are many, the anchors few.
    inside = np.minimum(sizes[None, :, 0], anchors[:, None, 0]) * np.minimum(sizes[None, :, 1], anchors[:, None, 1])
    union = (sizes[:, 0] * sizes[:, 1])[None] + (anchors[:, 0] * anchors[:, 1])[:, None] - inside
    iou = np.zeros_like(inside)
    np.divide(inside, union, out=iou, where=union > 0)
    return iou.T


def coverage_of(anchors: Sizes, sizes: Sizes) -> Coverage:
    """Measure anchors ``(K, 2)`` on all boxes ``(N, 2)``, not on their histogram."""
    best = np.empty(len(sizes))
    nearest = np.empty(len(sizes), np.int64)
    fits = 0
    for start in range(0, len(sizes), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        iou = iou_of_sizes(sizes[part], anchors)
        nearest[part] = iou.argmax(axis=1)
        best[part] = iou.max(axis=1)
        with np.errstate(divide="ignore"):
            ratio = sizes[part][:, None] / anchors[None]
            worst_side = np.maximum(ratio, 1 / ratio).max(axis=2)
        fits += int((worst_side.min(axis=1) < LARGEST_RATIO).sum())
    recalls = [float((best >= threshold).mean()) for threshold in IOU_THRESHOLDS]
    shares = np.bincount(nearest, minlength=len(anchors)) / len(sizes)
    return Coverage(
        boxes=len(sizes),
        mean_iou=float(best.mean()),
        best_possible_recall=fits / len(sizes),
        recall50=recalls[0],
        recall75=recalls[5],
        average_recall=float(np.mean(recalls)),
        per_anchor=tuple(shares.tolist()),
    )


def rounded(anchors: Sizes) -> tuple[tuple[int, int], ...]:
    """Return anchors in whole pixels, at least 1, the smallest area first."""
    whole = np.maximum(np.rint(anchors), 1).astype(np.int64)
    order = np.lexsort((whole[:, 0], whole.prod(axis=1)))
    return tuple((int(width), int(height)) for width, height in whole[order])


def as_sizes(anchors: Sequence[Sequence[float]]) -> Sizes:
    """Return anchors as an array.

    Raises:
        AnchorError: they are no pairs of positive numbers.
    """
    try:
        table = np.array(anchors, np.float64)
    except (TypeError, ValueError):
        table = np.empty(0)
    if table.ndim != 2 or table.shape[1] != 2 or not len(table) or not (table > 0).all():
        raise AnchorError(f"got the anchors {anchors!r}, expected pairs of width and height above 0, in pixels")
    return table
