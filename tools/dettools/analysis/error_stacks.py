"""What costs precision, and how much: COCO's C75, C50, Loc, Sim, Oth, BG and FN curves for every class and size.

    Overlaps (one pass) ─┬► match at IoU .75, .5, .1                     C75  C50  Loc
                         ├► the same, similar classes do not count       Sim
                         └► the same, no other class counts              Oth ─► BG ─► FN

Each curve forgives one kind of error more than the one before, so the area between two is what that kind costs. This is
COCO's ``analyze.m`` (https://cocodataset.org/#detection-eval); it evaluates everything again, twice for each class.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from hotcoco import mask as rle_masks

from dettools.analysis.occlusion import annotation_rle
from dettools.analysis.overlaps import Bools, Floats, Ints, Overlaps, find_overlaps, pair_off
from dettools.coco_metrics import IouType, MetricsError
from dettools.ground_truth import GroundTruth

CURVES = ("C75", "C50", "Loc", "Sim", "Oth", "BG", "FN")
AREA_NAMES = ("allarea", "small", "medium", "large")
AREAS = (32.0**2, 96.0**2, 1e10)
RECALLS: Floats = np.linspace(0.0, 1.0, 101)
LOOSE_IOU = 0.1
# A small detection inside a large object has a small IoU with it, and yet lies on it.
ANY_OVERLAP = 1e-9
_ROUNDING = 1 + 1e-12


@dataclass(frozen=True)
class ErrorStacks:
    """Precision over recall, one error after the other forgiven; K classes.

    Attributes:
        precision: ``(7, 4, K, 101)`` by curve, area, class and recall 0, .01, …, 1; NaN where a class has no object.
        objects: ``(4, K)`` that are to be found.
        areas: ends of small, medium and large, px². An object of just that area is of the larger group.
        alone: names of the classes without supercategory: no other class is similar to them.
    """

    precision: Floats
    objects: Ints
    areas: tuple[float, float, float]
    alone: tuple[str, ...]

    def curves(self, area: int, label: int | None = None) -> Floats | None:
        """Return ``(7, 101)`` of one class, or the mean of all that have objects; None where there is none."""
        if label is not None:
            return self.precision[:, area, label] if self.objects[area, label] else None
        has = self.objects[area] > 0
        return self.precision[:, area, has].mean(axis=1) if has.any() else None

    def ap(self, area: int, label: int | None = None) -> dict[str, float] | None:
        """Return the area below each curve."""
        curves = self.curves(area, label)
        return None if curves is None else dict(zip(CURVES, curves.mean(axis=1).tolist(), strict=True))


def error_overlaps(
    ground_truth: GroundTruth,
    results: Sequence[Mapping[str, Any]],
    *,
    iou_type: IouType = "bbox",
    score_threshold: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Overlaps:
    """Find every overlap, however small, of the results of enough score; what `error_stacks` and TIDE start from.

    Raises:
        MetricsError: as `find_overlaps`, or a score threshold that is not 0 to 1.
    """
    if not 0 <= score_threshold <= 1:
        raise MetricsError(f"got the score threshold {score_threshold:g}, expected 0 to 1")
    # Masks may have scores of their own, by which `find_overlaps` ranks them.
    own = iou_type == "segm"
    places = [
        place
        for place, one in enumerate(results)
        if (one.get("mask_score", one["score"]) if own else one["score"]) >= score_threshold
    ]
    kept = [results[place] for place in places]
    found = find_overlaps(ground_truth, kept, iou_type=iou_type, least_iou=ANY_OVERLAP, progress=progress)
    return replace(found, result=np.array(places, np.int64)[found.result])


def size_groups(area: Floats, areas: Sequence[float]) -> Ints:
    """Return 0 for small, 1 for medium, 2 for large, 3 for larger than that."""
    groups: Ints = np.digitize(area, [*areas[:2], np.nextafter(areas[2], np.inf)])
    return groups


def error_stacks(
    ground_truth: GroundTruth,
    overlaps: Overlaps,
    *,
    areas: tuple[float, float, float] = AREAS,
    progress: Callable[[int, int], None] | None = None,
) -> ErrorStacks:
    """Compute all curves of all classes and areas.

    Args:
        ground_truth: the annotations; their categories' ``supercategory`` says which classes are similar.
        overlaps: of `error_overlaps`.
        areas: ends of small, medium and large, rising, px².
        progress: called with the steps done and all of them.

    Raises:
        MetricsError: overlaps that lack the small ones, or areas that do not rise.
    """
    if overlaps.least_iou > ANY_OVERLAP:
        raise MetricsError(f"got overlaps from IoU {overlaps.least_iou:g} on, expected those of error_overlaps")
    if not 0 < areas[0] < areas[1] < areas[2]:
        raise MetricsError(f"got the areas {' '.join(f'{one:g}' for one in areas)}, expected three rising numbers, px²")
    similar, alone = _similar_to(ground_truth)
    forgiving = _others_as_crowds(ground_truth, overlaps)
    group, twin_group = overlaps.object_class, np.arange(len(overlaps.crowd)).repeat(2)
    own = overlaps.same_class
    near = own | (similar[overlaps.label[overlaps.pair_detection]] == similar[group[overlaps.pair_object]])
    passes: list[tuple[Overlaps, float, Bools]] = [
        (overlaps, 0.75, own),
        (overlaps, 0.5, own),
        (overlaps, LOOSE_IOU, own),
        (forgiving, LOOSE_IOU, near),
        (forgiving, LOOSE_IOU, np.ones(len(own), bool)),
    ]
    object_size, size = size_groups(overlaps.object_area, areas), size_groups(overlaps.area, areas)
    classes = len(overlaps.category_ids)
    precision = np.full((len(CURVES), len(AREA_NAMES), classes, len(RECALLS)), np.nan)
    objects = np.zeros((len(AREA_NAMES), classes), np.int64)
    ranking = Ranking(overlaps)
    for area in range(len(AREA_NAMES)):
        outside = object_size == 3 if area == 0 else object_size != area - 1
        unwanted = overlaps.crowd | outside
        far = size == 3 if area == 0 else size != area - 1
        objects[area] = np.bincount(group[~unwanted], minlength=classes)
        for place, (pairs, threshold, allowed) in enumerate(passes):
            ignored = unwanted if pairs is overlaps else unwanted[twin_group] | (np.arange(len(twin_group)) % 2 == 1)
            object_of, _ = pair_off(pairs, threshold, allowed, ignored)
            true, counted = object_of >= 0, ~far
            true[true] = ~ignored[object_of[true]]
            counted[object_of >= 0] = true[object_of >= 0]
            precision[place, area] = ranking.precision(true, counted, objects[area])
            if progress:
                progress(area * len(passes) + place + 1, len(AREA_NAMES) * len(passes))
    has = ~np.isnan(precision[4])
    precision[5] = np.where(has, precision[4] > 0, np.nan)
    precision[6] = np.where(has, 1.0, np.nan)
    return ErrorStacks(precision, objects, areas, alone)


class Ranking:
    """The detections of each class by falling score, those of equal scores in the order of pycocotools."""

    def __init__(self, overlaps: Overlaps) -> None:
        self._classes = len(overlaps.category_ids)
        self._image = overlaps.image_ids[overlaps.image] if len(overlaps.image) else overlaps.image
        self._score, self._label = overlaps.score, overlaps.label
        self._order, self._ends = self._ranked(self._label, self._score)

    def precision(
        self,
        true: Bools,
        counted: Bools,
        objects: Ints,
        *,
        label: Ints | None = None,
        score: Floats | None = None,
    ) -> Floats:
        """Return ``(K, 101)``: at each recall the best precision that is reached there or beyond, as COCO has it.

        Args:
            true: ``(D,)`` the detections that found an object.
            counted: ``(D,)``.
            objects: ``(K,)`` to be found; NaN is returned where there is none.
            label, score: ``(D,)`` instead of the detections' own.
        """
        order, ends = self._order, self._ends
        if label is not None or score is not None:
            own_label, own_score = self._label if label is None else label, self._score if score is None else score
            order, ends = self._ranked(own_label, own_score)
        curves = np.full((self._classes, len(RECALLS)), np.nan)
        for one in np.flatnonzero(objects > 0).tolist():
            ranked = order[ends[one] : ends[one + 1]]
            hits = np.cumsum(true[ranked[counted[ranked]]])
            precision = hits / np.arange(1, len(hits) + 1)
            envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
            curves[one] = envelope[np.searchsorted(hits / objects[one], RECALLS, side="left")]
        return curves

    def _ranked(self, label: Ints, score: Floats) -> tuple[Ints, npt.NDArray[np.intp]]:
        order: Ints = np.lexsort((self._image, -score, label))
        return order, np.searchsorted(label[order], np.arange(self._classes + 1))


def _similar_to(ground_truth: GroundTruth) -> tuple[Ints, tuple[str, ...]]:
    """Return ``(K,)`` the number of each class's supercategory, and the names of the classes that have none."""
    groups: dict[str, int] = {}
    alone: list[str] = []
    similar: list[int] = []
    for place, category in enumerate(ground_truth.document["categories"]):
        name = category.get("supercategory")
        if isinstance(name, str) and name:
            similar.append(groups.setdefault(name, len(groups)))
        else:
            # No other class has this number.
            similar.append(-1 - place)
            alone.append(category["name"])
    return np.array(similar, np.int64), tuple(alone)


def _others_as_crowds(ground_truth: GroundTruth, overlaps: Overlaps) -> Overlaps:
    """Return the overlaps with a second self of each object, a crowd, for the detections of other classes.

    In a crowd the share of the detection counts; it comes from the IoU and the two areas.
    """
    other = ~overlaps.same_class
    detection, target, iou = overlaps.pair_detection, overlaps.pair_object, overlaps.pair_iou
    mine, its = overlaps.area[detection], _shape_areas(ground_truth, overlaps.iou_type)[target]
    # A detection without area lies on nothing.
    share = iou * (mine + its) / np.maximum((1 + iou) * mine, 1e-300) * _ROUNDING
    convert = other & ~overlaps.crowd[target]
    crowd = np.ones(2 * len(overlaps.crowd), bool)
    crowd[::2] = overlaps.crowd
    return replace(
        overlaps,
        object_ids=overlaps.object_ids.repeat(2),
        object_image=overlaps.object_image.repeat(2),
        object_class=overlaps.object_class.repeat(2),
        object_area=overlaps.object_area.repeat(2),
        crowd=crowd,
        pair_object=2 * target + other,
        pair_iou=np.where(convert, share, iou),
    )


def _shape_areas(ground_truth: GroundTruth, iou_type: IouType) -> Floats:
    """Return ``(G,)`` the areas of the boxes or masks themselves; an annotation's ``area`` may be of the other."""
    if iou_type == "bbox":
        sides = np.array([one["bbox"][2:] for one in ground_truth.annotations], np.float64).reshape(-1, 2)
        return sides[:, 0] * sides[:, 1]
    sizes = {image.id: (image.height, image.width) for image in ground_truth.images}
    shapes: list[Any] = [annotation_rle(one, *sizes[one["image_id"]]) for one in ground_truth.annotations]
    return np.asarray(rle_masks.area(shapes), np.float64).reshape(len(shapes))
