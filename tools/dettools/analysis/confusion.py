"""Which class is taken for which: a confusion matrix whose rows sum to the objects of each class.

    Overlaps ─► match, same class, as COCO ─► found (the diagonal: the true positives of every other tool)
                  └─► what is left: pair_off, any class ─► confused
                        └─► what is left: objects are missed, detections lie on background

One detection explains one object, and one object is counted once, in the cell where it ended. Crowds are not to be
found, and what lies in one is not counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from dettools.analysis.overlaps import Bools, Floats, Ints, Matches, Overlaps, match, pair_off
from dettools.coco_metrics import MetricsError

Normalization = Literal["rows", "columns", "all", "none"]
SWEEP: tuple[float, ...] = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True)
class Example:
    """One error of a cell.

    Attributes:
        image_id: where it is.
        object_id: the annotation; None for a detection on background.
        result: position in the results; None for a missed object.
        score: of the detection.
        iou: of the two.
    """

    image_id: int
    object_id: int | None
    result: int | None
    score: float | None
    iou: float | None


@dataclass(frozen=True)
class Confusion:
    """Counts of objects and detections by class; K classes, as in the annotation file.

    Attributes:
        counts: ``(K + 1, K + 1)``; row: the object's class, the last: background. Column: the detection's class, the
            last: missed. A row sums to the objects of its class, a column to the detections of its class.
        detection_row: ``(D,)`` row in which a detection is counted; -1: below the threshold, or in a crowd.
        object_column: ``(G,)`` column in which an object is counted; -1 for a crowd.
        object_of: ``(D,)`` the object that a detection found or is confused with; -1 for none.
        duplicates: detections on background that lie on an object of their class that another one found.
        iou_threshold, score_threshold: of the matches.
        overlaps: what was matched.
    """

    counts: Ints
    detection_row: Ints
    object_column: Ints
    object_of: Ints
    duplicates: int
    iou_threshold: float
    score_threshold: float
    overlaps: Overlaps = field(repr=False)

    @property
    def classes(self) -> int:
        """K."""
        return len(self.counts) - 1

    @property
    def found(self) -> int:
        """Objects found as what they are: the true positives."""
        return int(np.trace(self.counts[:-1, :-1]))

    @property
    def confused(self) -> int:
        """Objects taken for another class."""
        return int(self.counts[:-1, :-1].sum()) - self.found

    @property
    def missed(self) -> int:
        """Objects that no detection lies on."""
        return int(self.counts[:-1, -1].sum())

    @property
    def background(self) -> int:
        """Detections that lie on no object that is left."""
        return int(self.counts[-1, :-1].sum())

    @property
    def objects(self) -> int:
        """Found, confused and missed."""
        return int(self.counts[:-1].sum())

    @property
    def detections(self) -> int:
        """Found, confused and on background."""
        return int(self.counts[:, :-1].sum())

    def top(self, most: int | None = None) -> list[tuple[int, int, int]]:
        """Return row, column and count of the classes that are confused, the most frequent first."""
        between = self.counts[:-1, :-1].copy()
        np.fill_diagonal(between, 0)
        rows, columns = np.nonzero(between)
        order = np.lexsort((columns, rows, -between[rows, columns]))[:most]
        return [(int(rows[one]), int(columns[one]), int(between[rows[one], columns[one]])) for one in order]

    def examples(self, row: int, column: int, most: int) -> list[Example]:
        """Return errors of one cell: the surest detections first, of missed objects the largest."""
        overlaps = self.overlaps
        if column == self.classes:
            missed = np.flatnonzero((self.object_column == column) & (overlaps.object_class == row))
            missed = missed[np.argsort(-overlaps.object_area[missed], kind="stable")][:most]
            return [
                Example(
                    int(overlaps.image_ids[overlaps.object_image[one]]),
                    int(overlaps.object_ids[one]),
                    None,
                    None,
                    None,
                )
                for one in missed
            ]
        places = np.flatnonzero((self.detection_row == row) & (overlaps.label == column))
        return [self._example(int(one)) for one in places[np.argsort(-overlaps.score[places], kind="stable")][:most]]

    def _example(self, place: int) -> Example:
        overlaps, target = self.overlaps, int(self.object_of[place])
        start, end = np.searchsorted(overlaps.pair_detection, [place, place + 1])
        pair = start + np.flatnonzero(overlaps.pair_object[start:end] == target)
        return Example(
            int(overlaps.image_ids[overlaps.image[place]]),
            int(overlaps.object_ids[target]) if target >= 0 else None,
            int(overlaps.result[place]),
            float(overlaps.score[place]),
            float(overlaps.pair_iou[pair[0]]) if len(pair) else None,
        )

    @cached_property
    def duplicate(self) -> Bools:
        """``(D,)`` the detections that `duplicates` counts."""
        return _duplicates(self.overlaps, self.detection_row == self.classes, self.iou_threshold)


@dataclass(frozen=True)
class SweepRow:
    """The counts at one score threshold, as `Confusion` has them."""

    score_threshold: float
    found: int
    confused: int
    missed: int
    background: int

    @property
    def precision(self) -> float | None:
        """Found among the detections."""
        detections = self.found + self.confused + self.background
        return self.found / detections if detections else None

    @property
    def recall(self) -> float | None:
        """Found among the objects."""
        objects = self.found + self.confused + self.missed
        return self.found / objects if objects else None

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN), a confused pair being one of each; 1 where there is nothing to find nor found."""
        wrong = 2 * self.confused + self.missed + self.background
        return 2 * self.found / (2 * self.found + wrong) if self.found + wrong else 1.0


def confusion_of(overlaps: Overlaps, *, iou_threshold: float = 0.5, score_threshold: float = 0.3) -> Confusion:
    """Count who is taken for whom.

    Args:
        overlaps: of one data set.
        iou_threshold: to find an object, or to be confused with it.
        score_threshold: detections below it do not take part.

    Raises:
        MetricsError: a threshold below the overlaps that were kept.
    """
    classes = len(overlaps.category_ids)
    matches = match(overlaps, iou_threshold, score_threshold=score_threshold)
    confused_object, confused_by = confused(overlaps, matches, iou_threshold)
    object_of = np.where(matches.counted, np.maximum(matches.object_of, confused_object), -1)
    # Without any object there is none to look up.
    class_of = np.append(overlaps.object_class, classes)
    row = np.where(matches.counted, class_of[object_of], -1)
    found_by = np.maximum(matches.detection_of, confused_by)
    column = np.where(overlaps.crowd, -1, np.append(overlaps.label, classes)[found_by])
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    np.add.at(counts, (row[matches.counted], overlaps.label[matches.counted]), 1)
    missed = column == classes
    np.add.at(counts, (overlaps.object_class[missed], classes), 1)
    return Confusion(
        counts=counts,
        detection_row=row,
        object_column=column,
        object_of=object_of,
        duplicates=int(_duplicates(overlaps, row == classes, iou_threshold).sum()),
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
        overlaps=overlaps,
    )


def confused(overlaps: Overlaps, matches: Matches, iou_threshold: float) -> tuple[Ints, Ints]:
    """Pair the detections that found nothing with the objects that nobody found, whatever their class.

    Returns:
        ``(D,)`` the object of another class that a detection lies on, and ``(G,)`` the detection; -1 for none.
    """
    free_objects = (matches.detection_of < 0) & ~overlaps.crowd
    free = matches.false_positive[overlaps.pair_detection] & free_objects[overlaps.pair_object]
    return pair_off(overlaps, iou_threshold, free)


def sweep(overlaps: Overlaps, *, iou_threshold: float = 0.5, scores: Sequence[float] = SWEEP) -> list[SweepRow]:
    """Count at many score thresholds.

    The best score chooses first, so who finds what does not depend on the detections below: it is matched once. Who is
    confused with an object that is found only by a lower score does, so that is done for each threshold.
    """
    matches = match(overlaps, iou_threshold)
    by = np.append(overlaps.score, -np.inf)[matches.detection_of]
    rows = []
    for threshold in scores:
        found_by = np.where(by >= threshold, matches.detection_of, -1)
        counted = matches.counted & (overlaps.score >= threshold)
        then = Matches(matches.object_of, found_by, counted)
        pairs = int((confused(overlaps, then, iou_threshold)[0] >= 0).sum())
        found = int((found_by >= 0).sum())
        background = int(counted.sum()) - found - pairs
        rows.append(SweepRow(threshold, found, pairs, overlaps.objects - found - pairs, background))
    return rows


def normalized(counts: Ints, by: Normalization) -> Floats:
    """Return the counts as shares of their row (recall), of their column (precision) or of all; none leaves counts.

    A row or column without any count is NaN: nothing was measured.
    """
    if by == "none":
        return counts.astype(np.float64)
    total = counts.sum(axis={"rows": 1, "columns": 0, "all": None}[by], keepdims=True)
    shares: Floats = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
    return shares


def chosen_classes(confusion: Confusion, most: int) -> list[int]:
    """Return at most so many classes, those that are confused most often, in the order of the annotation file."""
    if confusion.classes <= most:
        return list(range(confusion.classes))
    between = confusion.counts[:-1, :-1].copy()
    np.fill_diagonal(between, 0)
    involved = between.sum(axis=0) + between.sum(axis=1)
    objects = confusion.counts[:-1].sum(axis=1)
    order = np.lexsort((-objects, -involved))[:most]
    return sorted(order.tolist())


def merged(counts: Ints, chosen: Sequence[int]) -> Ints:
    """Return the counts of these classes, with one row and column for all other classes before the last.

    Rows and columns keep their sums. Without other classes, the counts as they are.
    """
    classes = len(counts) - 1
    if len(chosen) == classes:
        return counts
    place = np.full(classes + 1, len(chosen))
    place[list(chosen)] = np.arange(len(chosen))
    place[-1] = len(chosen) + 1
    small = np.zeros((len(chosen) + 2, len(chosen) + 2), np.int64)
    np.add.at(small, (place[:, None], place[None, :]), counts)
    return small


def suppressed(results: Sequence[Mapping[str, Any]], iou_threshold: float) -> list[dict[str, Any]]:
    """Return the results that stay after non-maximum suppression of the boxes of each image and class.

    Raises:
        MetricsError: results without boxes, or no threshold between 0 and 1.
    """
    import torch
    from torchvision.ops import batched_nms

    if not 0 <= iou_threshold <= 1:
        raise MetricsError(f"got the IoU threshold {iou_threshold:g} for suppression, expected 0 to 1")
    if lacking := sum(one.get("bbox") is None for one in results):
        raise MetricsError(f"{lacking} of {len(results)} results have no bbox, by which they would be suppressed")
    by_image: dict[int, list[int]] = {}
    for place, one in enumerate(results):
        by_image.setdefault(one["image_id"], []).append(place)
    kept: list[int] = []
    for places in by_image.values():
        boxes = torch.tensor([results[one]["bbox"] for one in places], dtype=torch.float64)
        boxes[:, 2:] += boxes[:, :2]
        scores = torch.tensor([results[one]["score"] for one in places], dtype=torch.float64)
        labels = torch.tensor([results[one]["category_id"] for one in places])
        kept += [places[one] for one in batched_nms(boxes, scores, labels, iou_threshold).tolist()]
    return [dict(results[one]) for one in sorted(kept)]


def _duplicates(overlaps: Overlaps, candidates: Bools, iou_threshold: float) -> Bools:
    """Return which of the detections overlap an object of their class enough: it must be another's already."""
    on = overlaps.same_class & (overlaps.pair_iou >= iou_threshold) & ~overlaps.crowd[overlaps.pair_object]
    lying = np.zeros(len(overlaps.score), bool)
    lying[overlaps.pair_detection[on]] = True
    return lying & candidates
