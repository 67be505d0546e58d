"""How good each image came out: AP, found, false and missed, so that the worst and the best can be looked at.

    Overlaps ─┬► match at IoU .50:.95 ─► AP of each image
              └► match at one IoU and score ─► TP, FP, FN, F1, confused, FP of absent classes

AP here ranks all detections of an image together, whatever their class, and is the area below their interpolated
precision over recall: a false positive costs by its score, also one of a class that the image does not have.
hotcoco's `image_diagnostics` pools likewise, but at 101 recall points, with all scores in F1, and says nothing of an
image that has neither objects nor detections; hence our own. `class_ap` is the mean AP of the classes that are present,
which MMDetection's analyze_results calls mAP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from dettools.analysis.confusion import confused
from dettools.analysis.overlaps import Floats, Ints, Matches, Overlaps, match
from dettools.coco_metrics import IOU_THRESHOLDS
from dettools.ground_truth import GroundTruth

# Which end of a column is the bad one; the other columns do not tell good from bad.
BAD_IF_LOW = ("ap", "class_ap", "f1", "precision", "recall", "tp", "iou")
BAD_IF_HIGH = ("fp", "fn", "confused", "absent_fp", "top_fp")


@dataclass(frozen=True)
class ImageResult:
    """One image; counts are of detections from the score threshold on, crowds do not count.

    Attributes:
        image_id: of the annotation file.
        name: its ``file_name``.
        ap: over IoU .50:.95, of all its detections; without objects 1 if no detection reaches the threshold, else 0.
        class_ap: mean over the classes that have objects here; None without objects.
        f1: 2 TP / (2 TP + FP + FN); 1 where there is nothing to find and nothing was found.
        precision: TP / (TP + FP); None without detections.
        recall: TP / (TP + FN); None without objects.
        tp, fp, fn: found, false and missed.
        confused: objects taken for another class; each is one of ``fn``, its detection one of ``fp``.
        absent_fp: false positives of classes that the image does not have.
        iou: mean overlap of what was found with its object; None where nothing was.
        top_fp: the highest score of a false positive; None without one.
        objects: to be found.
    """

    image_id: int
    name: str
    ap: float
    class_ap: float | None
    f1: float
    precision: float | None
    recall: float | None
    tp: int
    fp: int
    fn: int
    confused: int
    absent_fp: int
    iou: float | None
    top_fp: float | None
    objects: int


COLUMNS = tuple(one.name for one in fields(ImageResult) if one.name != "image_id")


@dataclass(frozen=True)
class ImageResults:
    """All images, in the order of the annotation file, and the matches that they were counted by."""

    images: tuple[ImageResult, ...]
    matches: Matches
    overlaps: Overlaps
    iou_threshold: float
    score_threshold: float

    @property
    def totals(self) -> dict[str, int]:
        """The counts over all images."""
        names = ("objects", "tp", "fp", "fn", "confused", "absent_fp")
        return {name: sum(getattr(one, name) for one in self.images) for name in names}


def image_results(
    ground_truth: GroundTruth, overlaps: Overlaps, *, iou_threshold: float = 0.5, score_threshold: float = 0.3
) -> ImageResults:
    """Compute the results of every image.

    Args:
        ground_truth: whose images they are.
        overlaps: of it.
        iou_threshold: to find an object; of AP it is .50:.95.
        score_threshold: of the detections that are counted; AP looks at all.

    Raises:
        MetricsError: a threshold below the overlaps that were kept.
    """
    images, classes = len(overlaps.image_ids), len(overlaps.category_ids)
    wanted = ~overlaps.crowd
    matches = match(overlaps, iou_threshold, score_threshold=score_threshold)
    found, false = matches.true_positive, matches.false_positive
    detection_cell = overlaps.image * classes + overlaps.label
    object_cell = overlaps.object_image * classes + overlaps.object_class
    absent = false & ~np.isin(detection_cell, object_cell)
    mistaken = confused(overlaps, matches, iou_threshold)[0] >= 0

    def count(places: Ints) -> list[int]:
        counts: list[int] = np.bincount(places, minlength=images).tolist()
        return counts

    objects, tp, fp = (
        count(one) for one in (overlaps.object_image[wanted], overlaps.image[found], overlaps.image[false])
    )
    ap, class_ap = _average_precisions(overlaps, detection_cell, object_cell)
    overlap_sum = np.bincount(overlaps.image[found], weights=_found_iou(overlaps, matches), minlength=images)
    top = np.full(images, -np.inf)
    np.maximum.at(top, overlaps.image[false], overlaps.score[false])
    rows = []
    for place, (image, mixed, absents) in enumerate(
        zip(ground_truth.images, count(overlaps.image[mistaken]), count(overlaps.image[absent]), strict=True)
    ):
        here, right, wrong = objects[place], tp[place], fp[place]
        errors = wrong + here - right
        rows.append(
            ImageResult(
                image_id=image.id,
                name=image.file_name,
                ap=float(ap[place]) if here else float(not wrong),
                class_ap=float(class_ap[place]) if here else None,
                f1=2 * right / (2 * right + errors) if right + errors else 1.0,
                precision=right / (right + wrong) if right + wrong else None,
                recall=right / here if here else None,
                tp=right,
                fp=wrong,
                fn=here - right,
                confused=mixed,
                absent_fp=absents,
                iou=float(overlap_sum[place] / right) if right else None,
                top_fp=float(top[place]) if wrong else None,
                objects=here,
            )
        )
    return ImageResults(tuple(rows), matches, overlaps, iou_threshold, score_threshold)


def ranked(images: Sequence[ImageResult], column: str) -> list[ImageResult]:
    """Return the images from bad to good by a column, or by rising value where that is neither.

    What has no value comes last. Of equal ones, the one with more errors is worse, and of those without errors the one
    with more found objects is better; then the order is kept.
    """

    def key(one: ImageResult) -> tuple[bool, float | str, float, int]:
        value = getattr(one, column)
        if value is None:
            return True, 0.0, 0.0, 0
        if column in BAD_IF_HIGH:
            value = -value
        elif column not in BAD_IF_LOW:
            return False, value, 0.0, 0
        return False, value, one.ap, one.tp - one.fp - one.fn

    return sorted(images, key=key)


def extremes(images: Sequence[ImageResult], column: str, most: int) -> tuple[list[ImageResult], list[ImageResult]]:
    """Return the best and the worst images, each from its extreme on, at most half of all so that none is in both.

    A column that does not tell good from bad gives those by AP; an image without a value is in neither.
    """
    by = column if column in (*BAD_IF_LOW, *BAD_IF_HIGH) else "ap"
    order = ranked([one for one in images if getattr(one, by) is not None], by)
    most = min(most, len(order) // 2)
    return order[len(order) - most :][::-1], order[:most]


def _average_precisions(overlaps: Overlaps, detection_cell: Ints, object_cell: Ints) -> tuple[Floats, Floats]:
    """Return AP ``(I,)`` with all classes of an image ranked together, and the mean AP of the classes it has."""
    images, classes = len(overlaps.image_ids), len(overlaps.category_ids)
    wanted = ~overlaps.crowd
    # The detections stand image by image already; within a class of an image the best first.
    by_class = np.argsort(detection_cell, kind="stable")
    cells, counts = np.unique(object_cell[wanted], return_counts=True)
    objects = np.bincount(overlaps.object_image[wanted], minlength=images)
    pooled, of_classes = np.zeros(images), np.zeros(len(cells))
    place = np.searchsorted(cells, detection_cell[by_class])
    present = np.isin(detection_cell[by_class], cells)
    by_class, place = by_class[present], place[present]
    for threshold in IOU_THRESHOLDS:
        matches = match(overlaps, threshold)
        pooled += _areas(overlaps.image, matches, objects)
        inside = Matches(matches.object_of[by_class], matches.detection_of, matches.counted[by_class])
        of_classes += _areas(place, inside, counts)
    image_of = cells // max(classes, 1)
    present_classes = np.bincount(image_of, minlength=images)
    mean = np.bincount(image_of, weights=of_classes, minlength=images) / np.maximum(present_classes, 1)
    return pooled / len(IOU_THRESHOLDS), mean / len(IOU_THRESHOLDS)


def _areas(group: Ints, matches: Matches, objects: Ints) -> Floats:
    """Return the area below the interpolated precision over recall, of each group.

    Args:
        group: ``(N,)`` of each detection, rising; within a group the best score first.
        matches: of these detections.
        objects: ``(groups,)`` how many are to be found.
    """
    counted = matches.counted
    group, right = group[counted], matches.true_positive[counted]
    begins = np.searchsorted(group, group)
    total = np.concatenate([[0], np.cumsum(right)])
    found = total[1:] - total[begins]
    precision = found / (np.arange(len(group)) - begins + 1)
    # The best precision from here to the end of the group: from behind, each group lies above those that were passed.
    behind = np.maximum.accumulate((precision - 2.0 * group)[::-1])[::-1] + 2.0 * group
    area = np.bincount(group[right], weights=behind[right], minlength=len(objects))
    areas: Floats = area / np.maximum(objects, 1)
    return areas


def _found_iou(overlaps: Overlaps, matches: Matches) -> Floats:
    """Return the overlap of each true positive with its object, in the order of the detections."""
    pairs = matches.object_of[overlaps.pair_detection] == overlaps.pair_object
    iou: Floats = overlaps.pair_iou[pairs & matches.true_positive[overlaps.pair_detection]]
    return iou
