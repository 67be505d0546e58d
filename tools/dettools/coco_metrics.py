"""COCO metrics, computed by hotcoco on checked annotations, and how far chance moves them.

    GroundTruth, results ─► evaluate_coco ─► Metrics        AP, AR, per class
                         ├► ap_interval   ─► ApInterval     AP ± by a bootstrap over images
        reference, other ┴► compare_coco  ─► ApDifference   a paired bootstrap: is their AP the same?

All figures are fractions, and None where pycocotools says -1 (nothing to measure). They equal pycocotools' to 1e-12
(tests), but for two of its traps: an annotation with the id 0 is found like any other (`ground_truth` renumbers), and
AP is that of the largest of ``max_detections`` even where it is not 100, where pycocotools answers -1.
"""

import gc
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from detserve.errors import DetserveError
from hotcoco import COCO, COCOeval

from dettools.ground_truth import GroundTruth
from dettools.resampling import ApDifference, ApInterval, MatchTable, match_table, percentiles, resampled

IouType = Literal["bbox", "segm", "keypoints"]
IOU_THRESHOLDS: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
_GEOMETRY = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
# Matches of so many images are held as Python lists at once.
_IMAGES_AT_ONCE = 200


class MetricsError(DetserveError):
    """The results or the annotations do not have what the metric measures."""


@dataclass(frozen=True)
class ClassMetrics:
    """One class: ``ap`` (IoU .50:.95), ``ap50``, ``ar`` at most detections; None without objects.

    ``objects`` counts its annotations without crowds, ``detections`` its results.
    """

    category_id: int
    name: str
    ap: float | None
    ap50: float | None
    ar: float | None
    objects: int
    detections: int


@dataclass(frozen=True)
class Metrics:
    """COCO metrics of one set of results.

    Attributes:
        iou_type: what overlaps: boxes, masks or keypoints (OKS).
        max_detections: per image and class, ascending; AP is at the last.
        iou_thresholds: over which AP and AR are averaged.
        figures: by name, in COCO's order; of boxes and masks AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl (the
            numbers as in ``max_detections``), of keypoints AP AP50 AP75 APm APl AR AR50 AR75 ARm ARl.
        per_class: in the order of the annotations' categories.
        images, objects, detections: how many were evaluated; crowds are no objects.
    """

    iou_type: IouType
    max_detections: tuple[int, ...]
    iou_thresholds: tuple[float, ...]
    figures: Mapping[str, float | None]
    per_class: tuple[ClassMetrics, ...] = field(repr=False)
    images: int
    objects: int
    detections: int

    @property
    def ap(self) -> float:
        """AP over IoU .50:.95; 0 where there is nothing to find."""
        return self.figures["AP"] or 0.0

    @property
    def ap50(self) -> float:
        """AP at IoU .50; 0 where there is nothing to find."""
        return self.figures["AP50"] or 0.0

    @property
    def is_standard(self) -> bool:
        """Whether the parameters are COCO's own, so that the figures can stand beside published ones."""
        return self.iou_thresholds == IOU_THRESHOLDS and self.max_detections == default_detections(self.iou_type)

    def to_json(self, *, per_class: bool = True) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        document: dict[str, Any] = {
            "iou_type": self.iou_type,
            "max_detections": list(self.max_detections),
            "iou_thresholds": list(self.iou_thresholds),
            "images": self.images,
            "objects": self.objects,
            "detections": self.detections,
            "figures": dict(self.figures),
        }
        if per_class:
            document["per_class"] = [vars(one) for one in self.per_class]
        return document


def evaluate_coco(
    ground_truth: GroundTruth,
    results: Sequence[Mapping[str, Any]],
    *,
    iou_type: IouType = "bbox",
    max_detections: Sequence[int] | None = None,
    iou_thresholds: Sequence[float] | None = None,
    image_ids: Collection[int] | None = None,
) -> Metrics:
    """Compute the COCO metrics.

    Args:
        ground_truth: the annotations.
        results: COCO results; none at all has an AP of 0. Of masks and keypoints, a ``bbox`` beside them is not used:
            the area is that of the mask, as MMDetection does it.
        iou_type: what overlaps.
        max_detections: per image and class; by default 1, 10 and 100, for keypoints 20.
        iou_thresholds: by default .50:.05:.95.
        image_ids: these images only.

    Raises:
        MetricsError: the annotations or the results lack boxes, masks or keypoints, or a result is of an unknown image.
    """
    most = tuple(sorted(max_detections or default_detections(iou_type)))
    thresholds = IOU_THRESHOLDS if iou_thresholds is None else tuple(iou_thresholds)
    if most[0] < 1:
        raise MetricsError(f"got at most {most[0]} detections per image, expected 1 or more")
    if not thresholds or not all(0 < one <= 1 for one in thresholds):
        raise MetricsError(f"got the IoU thresholds {list(thresholds)}, expected numbers above 0, at most 1")
    images = _chosen(ground_truth, image_ids)
    evaluator = coco_evaluator(ground_truth, results, iou_type)
    evaluator.params.max_dets = list(most)
    evaluator.params.iou_thrs = list(thresholds)
    evaluator.params.img_ids = sorted(images)
    evaluator.evaluate()
    evaluator.accumulate()
    curves: Any = evaluator.eval
    # (thresholds, recalls, classes, areas, max_detections) and the same without recalls; classes by ascending id.
    precision, recall = curves["precision"], curves["recall"]
    places = {one: place for place, one in enumerate(sorted(ground_truth.category_ids))}
    found = Counter(one["category_id"] for one in results if one["image_id"] in images)
    expected = Counter(
        one["category_id"] for one in ground_truth.annotations if not one["iscrowd"] and one["image_id"] in images
    )
    per_class = tuple(
        ClassMetrics(
            category.id,
            category.name,
            _mean(precision[:, :, places[category.id], 0, -1]),
            _mean(_at(precision, thresholds, 0.5)[:, :, places[category.id], 0, -1]),
            _mean(recall[:, places[category.id], 0, -1]),
            expected[category.id],
            found[category.id],
        )
        for category in ground_truth.categories
    )
    return Metrics(
        iou_type=iou_type,
        max_detections=most,
        iou_thresholds=thresholds,
        figures=_figures(precision, recall, iou_type, most, thresholds),
        per_class=per_class,
        images=len(images),
        objects=expected.total(),
        detections=found.total(),
    )


def ap_interval(
    ground_truth: GroundTruth,
    results: Sequence[Mapping[str, Any]],
    *,
    iou_type: IouType = "bbox",
    max_detections: int | None = None,
    image_ids: Collection[int] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> ApInterval:
    """Return AP with the percentile interval of a bootstrap over images: how far other such images would move it.

    Raises:
        MetricsError: as `evaluate_coco`, or there is nothing to find.
    """
    table = _matches(ground_truth, results, iou_type, _chosen(ground_truth, image_ids), max_detections)
    values = resampled([table], resamples=resamples, seed=seed)[:, 0]
    low, high = percentiles(values, confidence)
    return ApInterval(table.average_precision(), low, high, confidence, resamples)


def compare_coco(
    ground_truth: GroundTruth,
    reference: Sequence[Mapping[str, Any]],
    other: Sequence[Mapping[str, Any]],
    *,
    iou_type: IouType = "bbox",
    max_detections: int | None = None,
    image_ids: Collection[int] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.90,
) -> ApDifference:
    """Compare the AP of two sets of results by a paired bootstrap: every resample draws the same images for both.

    The default interval of 90 % is the one that two one-sided tests at 5 % look at.

    Raises:
        MetricsError: as `evaluate_coco`, or there is nothing to find.
    """
    images = _chosen(ground_truth, image_ids)
    tables = [_matches(ground_truth, one, iou_type, images, max_detections) for one in (reference, other)]
    values = resampled(tables, resamples=resamples, seed=seed)
    differences = values[:, 1] - values[:, 0]
    low, high = percentiles(differences, confidence)
    ap_reference, ap_other = (table.average_precision() for table in tables)
    return ApDifference(ap_reference, ap_other, low, high, confidence, differences, seed)


def default_detections(iou_type: IouType) -> tuple[int, ...]:
    """Return COCO's numbers of detections per image and class."""
    return (20,) if iou_type == "keypoints" else (1, 10, 100)


def prepared_results(results: Sequence[Mapping[str, Any]], iou_type: IouType) -> list[dict[str, Any]]:
    """Return the results with the one geometry that is evaluated; a mask's own score comes before its box's.

    With a ``bbox`` left beside it, pycocotools takes the box's area for that of the mask or of the keypoints.
    """
    key = _GEOMETRY[iou_type]
    return [
        {
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            key: one[key],
            "score": one.get("mask_score", one["score"]) if iou_type == "segm" else one["score"],
        }
        for one in results
    ]


def _chosen(ground_truth: GroundTruth, image_ids: Collection[int] | None) -> frozenset[int]:
    if image_ids is None:
        return ground_truth.image_ids
    if unknown := set(image_ids) - ground_truth.image_ids:
        raise MetricsError(f"got the image id {min(unknown)}, which {ground_truth.path} does not have")
    return frozenset(image_ids)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Do not look for cycles among millions of small lists that have none: it costs more than all the rest."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@collector_paused()
def coco_evaluator(ground_truth: GroundTruth, results: Sequence[Mapping[str, Any]], iou_type: IouType) -> COCOeval:
    """Return hotcoco's evaluator of results that fit the annotations, before it has evaluated.

    Raises:
        MetricsError: as `evaluate_coco`.
    """
    key = _GEOMETRY[iou_type]
    if lacking := [one["id"] for one in ground_truth.annotations if not one.get(key)]:
        raise MetricsError(
            f"{iou_type}: {len(lacking)} of {len(ground_truth.annotations)} annotations of {ground_truth.path} have no "
            f"{key} (id {lacking[0]}). Choose another IoU type, or annotations that have it."
        )
    if lacking := [place for place, one in enumerate(results) if not one.get(key)]:
        raise MetricsError(
            f"{iou_type}: {len(lacking)} of {len(results)} results have no {key} (the first is result {lacking[0]}). "
            "Choose another IoU type, or predict with it."
        )
    if unknown := {one["image_id"] for one in results} - ground_truth.image_ids:
        raise MetricsError(f"got a result of the image {min(unknown)}, which {ground_truth.path} does not have")
    truth = COCO(_measured(ground_truth))
    return COCOeval(truth, truth.load_res(prepared_results(results, iou_type)), iou_type)


def _measured(ground_truth: GroundTruth) -> dict[str, Any]:
    """Return the part of annotations that metrics are computed from: hotcoco refuses an odd licence or date."""
    return {
        "images": [asdict(image) for image in ground_truth.images],
        "annotations": ground_truth.annotations,
        "categories": [asdict(category) for category in ground_truth.categories],
    }


@collector_paused()
def _matches(
    ground_truth: GroundTruth,
    results: Sequence[Mapping[str, Any]],
    iou_type: IouType,
    images: frozenset[int],
    max_detections: int | None,
) -> MatchTable:
    evaluator = coco_evaluator(ground_truth, results, iou_type)
    evaluator.params.area_rng = [[0, 1e10]]
    evaluator.params.area_rng_lbl = ["all"]
    evaluator.params.max_dets = [max_detections or default_detections(iou_type)[-1]]
    ordered = sorted(images)

    def entries() -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(ordered), _IMAGES_AT_ONCE):
            evaluator.params.img_ids = ordered[start : start + _IMAGES_AT_ONCE]
            evaluator.evaluate()
            yield from (entry for entry in evaluator.eval_imgs if entry is not None)

    table = match_table(entries(), ordered, sorted(ground_truth.category_ids), len(IOU_THRESHOLDS))
    if not table.objects.any():
        raise MetricsError(f"the {len(ordered)} images have no object to be found, so there is no AP. Choose others.")
    return table


def _figures(
    precision: npt.NDArray[np.float64],
    recall: npt.NDArray[np.float64],
    iou_type: IouType,
    most: Sequence[int],
    thresholds: Sequence[float],
) -> dict[str, float | None]:
    """Return the figures in the order of `COCOeval.summarize`."""
    areas = {"m": 1, "l": 2} if iou_type == "keypoints" else {"s": 1, "m": 2, "l": 3}
    figures = {"AP": _mean(precision[:, :, :, 0, -1])}
    for name, threshold in (("50", 0.5), ("75", 0.75)):
        figures[f"AP{name}"] = _mean(_at(precision, thresholds, threshold)[:, :, :, 0, -1])
    figures |= {f"AP{name}": _mean(precision[:, :, :, area, -1]) for name, area in areas.items()}
    if iou_type == "keypoints":
        figures["AR"] = _mean(recall[:, :, 0, -1])
        for name, threshold in (("50", 0.5), ("75", 0.75)):
            figures[f"AR{name}"] = _mean(_at(recall, thresholds, threshold)[:, :, 0, -1])
    else:
        figures |= {f"AR{count}": _mean(recall[:, :, 0, place]) for place, count in enumerate(most)}
    return figures | {f"AR{name}": _mean(recall[:, :, area, -1]) for name, area in areas.items()}


def _at(values: npt.NDArray[np.float64], thresholds: Sequence[float], threshold: float) -> npt.NDArray[np.float64]:
    """Return the part at one IoU threshold; empty where it is not evaluated."""
    return values[np.isclose(thresholds, threshold)]


def _mean(values: npt.NDArray[np.float64]) -> float | None:
    measured = values[values > -1]
    return float(np.mean(measured)) if measured.size else None
