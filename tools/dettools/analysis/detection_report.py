"""All that one set of predictions tells, computed once from the same matches, so that the parts of a report add up.

Inputs ─┬► evaluate_coco ─► Metrics (and what pycocotools shows, where that differs)
        ├► hotcoco ─► precision over recall, calibration
        └► Overlaps ─┬► tide_errors    ─► kinds of errors, by class and size
                     ├► confusion_of   ─► found, confused, missed, on background
                     ├► image_results  ─► the worst and the best images
                     └► match          ─► precision, recall and F1 over the score threshold, recall by size
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dettools.analysis.analysis_inputs import Inputs
from dettools.analysis.confusion import Confusion, confusion_of
from dettools.analysis.error_stacks import AREA_NAMES, size_groups
from dettools.analysis.image_results import ImageResults, image_results
from dettools.analysis.overlaps import Bools, Floats, Matches, Overlaps, find_overlaps, match
from dettools.analysis.tide_errors import TideErrors, tide_errors
from dettools.coco_metrics import IOU_THRESHOLDS, IouType, Metrics, coco_evaluator, evaluate_coco
from dettools.published_figures import published_figures

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision at 101 recalls from 0 to 1; NaN where there is nothing to find.

    Attributes:
        recall: ``(101,)``.
        by_iou: ``(10, 101)`` mean of the classes, by IoU threshold .50:.05:.95.
        by_class: ``(2, K, 101)`` at IoU .50 and .75, in the order of the annotation file.
    """

    recall: Floats
    by_iou: Floats
    by_class: Floats


@dataclass(frozen=True)
class Threshold:
    """What one score threshold would give, at IoU .50."""

    score: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class ThresholdCurve:
    """Precision, recall and F1 over the score threshold, all classes pooled: one point a distinct score, falling.

    Attributes:
        score, precision, recall, f1: ``(S,)``.
        best: the threshold of the highest F1; None without a detection or an object.
    """

    score: Floats
    precision: Floats
    recall: Floats
    f1: Floats
    best: Threshold | None

    def at(self, score: float) -> Threshold | None:
        """Return the figures of the detections from a score on; None where there are none."""
        place = int(np.searchsorted(-self.score, -score, side="right")) - 1
        if place < 0:
            return None
        return Threshold(score, *(float(one[place]) for one in (self.precision, self.recall, self.f1)))


@dataclass(frozen=True)
class CalibrationBin:
    """Detections of one range of scores: their mean score, and the share that is right."""

    low: float
    high: float
    score: float
    right: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """How far scores are probabilities: hotcoco's expected and maximum calibration error at IoU .50."""

    ece: float
    mce: float
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True)
class SizeRow:
    """The objects of one size; ``found`` is at the score threshold, ``ap`` over IoU .50:.95 at all scores."""

    name: str
    objects: int
    found: int
    ap: float | None

    @property
    def recall(self) -> float | None:
        """Found among the objects."""
        return self.found / self.objects if self.objects else None


@dataclass(frozen=True)
class ClassRow:
    """One class at the score threshold; ``tp`` + ``fn`` are its objects, ``fp`` its wrong detections."""

    tp: int
    fp: int
    fn: int
    best: Threshold | None


@dataclass(frozen=True)
class DetectionReport:
    """One set of predictions; counts are at IoU .50 and the score threshold, but for `errors`, which take all scores.

    Attributes:
        published: pycocotools' figures where they differ (an annotation with the id 0).
        classes: in the order of the annotation file, as `metrics.per_class`.
        calibration: None without a detection.
        object_side: ``(G,)`` square root of each object's area, px, crowds left out.
        object_found: ``(G,)`` likewise.
    """

    metrics: Metrics
    published: Mapping[str, float | None] | None
    curves: PrecisionRecall = field(repr=False)
    thresholds: ThresholdCurve = field(repr=False)
    calibration: Calibration | None
    confusion: Confusion
    errors: TideErrors = field(repr=False)
    images: ImageResults = field(repr=False)
    classes: tuple[ClassRow, ...]
    sizes: tuple[SizeRow, ...]
    object_side: Floats = field(repr=False)
    object_found: Bools = field(repr=False)

    @property
    def score_threshold(self) -> float:
        """Of the counts."""
        return self.confusion.score_threshold

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        confusion, calibration = self.confusion, self.calibration
        rows = zip(self.metrics.per_class, self.classes, strict=True)
        return {
            "metrics": self.metrics.to_json(per_class=False),
            "pycocotools": None if self.published is None else dict(self.published),
            "score_threshold": self.score_threshold,
            "counts": {
                "objects": confusion.objects,
                "tp": confusion.found,
                "fn": confusion.objects - confusion.found,
                "fp": confusion.detections - confusion.found,
                "confused": confusion.confused,
                "missed": confusion.missed,
                "background": confusion.background,
            },
            "best_f1": None if self.thresholds.best is None else vars(self.thresholds.best),
            "calibration": None if calibration is None else {"ece": calibration.ece, "mce": calibration.mce},
            "errors": self.errors.figures().to_json(),
            "sizes": [{**vars(one), "recall": one.recall} for one in self.sizes],
            "per_class": [
                {
                    **vars(metrics),
                    "tp": row.tp,
                    "fp": row.fp,
                    "fn": row.fn,
                    "best_f1": None if row.best is None else vars(row.best),
                }
                for metrics, row in rows
            ],
        }


def detection_report(
    inputs: Inputs,
    *,
    iou_type: IouType = "bbox",
    score_threshold: float = 0.3,
    progress: Callable[[int, int], None] | None = None,
) -> DetectionReport:
    """Compute everything.

    Args:
        inputs: predictions and annotations.
        iou_type: boxes or masks.
        score_threshold: of what is counted.
        progress: called with the images compared and all of them.

    Raises:
        MetricsError: the annotations or the results lack boxes or masks.
    """
    truth, results = inputs.ground_truth, inputs.predictions.results
    metrics = evaluate_coco(truth, results, iou_type=iou_type)
    overlaps = find_overlaps(truth, results, iou_type=iou_type, progress=progress)
    confusion = confusion_of(overlaps, score_threshold=score_threshold)
    curves, calibration = _by_hotcoco(inputs, iou_type)
    every = match(overlaps, 0.5)
    images = image_results(truth, overlaps, score_threshold=score_threshold)
    wanted = ~overlaps.crowd
    found = images.matches.detection_of >= 0
    size = size_groups(overlaps.object_area, (32.0**2, 96.0**2, 1e10))
    return DetectionReport(
        metrics=metrics,
        published=published_figures(truth, results, metrics),
        curves=curves,
        thresholds=threshold_curve(overlaps, every),
        calibration=calibration,
        confusion=confusion,
        errors=tide_errors(overlaps),
        images=images,
        classes=_classes(overlaps, every, images.matches),
        sizes=tuple(
            SizeRow(
                name,
                int((wanted & (size == place)).sum()),
                int((found & (size == place)).sum()),
                metrics.figures[f"AP{name[0]}"],
            )
            for place, name in enumerate(AREA_NAMES[1:])
        ),
        object_side=np.sqrt(overlaps.object_area[wanted]),
        object_found=found[wanted],
    )


def threshold_curve(overlaps: Overlaps, matches: Matches, label: int | None = None) -> ThresholdCurve:
    """Return precision, recall and F1 at every distinct score, of one class or of all pooled.

    The best score chooses first, so what a detection finds does not change with the threshold: one match serves all.

    Args:
        overlaps: of one data set.
        matches: of it, without a score threshold.
        label: of the class; all by default.
    """
    counted = matches.counted if label is None else matches.counted & (overlaps.label == label)
    wanted = ~overlaps.crowd if label is None else ~overlaps.crowd & (overlaps.object_class == label)
    objects = int(wanted.sum())
    score = overlaps.score[counted]
    order = np.argsort(-score, kind="stable")
    score = score[order]
    found = np.cumsum(matches.true_positive[counted][order])
    last = np.flatnonzero(np.append(np.diff(score) != 0, True)) if len(score) else np.empty(0, np.int64)
    detections, found, score = last + 1.0, found[last].astype(np.float64), score[last]
    precision = found / detections
    recall = found / objects if objects else np.zeros(len(found))
    f1 = 2 * found / (detections + objects)
    best = None
    if len(score) and objects:
        at = int(np.argmax(f1))
        best = Threshold(*(float(one[at]) for one in (score, precision, recall, f1)))
    return ThresholdCurve(score, precision, recall, f1, best)


def _classes(overlaps: Overlaps, every: Matches, matches: Matches) -> tuple[ClassRow, ...]:
    classes = len(overlaps.category_ids)

    def count(labels: Any) -> Sequence[int]:
        counts: list[int] = np.bincount(labels, minlength=classes).tolist()
        return counts

    found = matches.detection_of >= 0
    tp = count(overlaps.object_class[found])
    fn = count(overlaps.object_class[~found & ~overlaps.crowd])
    fp = count(overlaps.label[matches.false_positive])
    return tuple(
        ClassRow(tp[one], fp[one], fn[one], threshold_curve(overlaps, every, one).best) for one in range(classes)
    )


def _by_hotcoco(inputs: Inputs, iou_type: IouType) -> tuple[PrecisionRecall, Calibration | None]:
    truth = inputs.ground_truth
    evaluator = coco_evaluator(truth, inputs.predictions.results, iou_type)
    evaluator.params.iou_thrs = list(IOU_THRESHOLDS)
    evaluator.evaluate()
    evaluator.accumulate()
    curves: Any = evaluator.eval
    # (IoU thresholds, recalls, classes by rising id); the whole area, most detections.
    precision = np.where(curves["precision"] < 0, np.nan, curves["precision"])[:, :, :, 0, -1]
    has = ~np.isnan(precision[0, 0])
    by_iou = precision[:, :, has].mean(axis=2) if has.any() else np.full(precision.shape[:2], np.nan)
    rank = {one: place for place, one in enumerate(sorted(truth.category_ids))}
    # IoU .50 and .75.
    by_class = precision[[0, 5]][:, :, [rank[one.id] for one in truth.categories]].transpose(0, 2, 1)
    pr = PrecisionRecall(np.linspace(0, 1, precision.shape[1]), by_iou, by_class)
    if not inputs.predictions.results:
        return pr, None
    found: Any = evaluator.calibration(n_bins=CALIBRATION_BINS, iou_threshold=0.5)
    bins = tuple(
        CalibrationBin(
            one["bin_lower"], one["bin_upper"], one["avg_confidence"], one["avg_accuracy"], int(one["count"])
        )
        for one in found["bins"]
    )
    return pr, Calibration(float(found["ece"]), float(found["mce"]), bins)
