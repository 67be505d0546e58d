"""Which detection overlaps which object, found once; whatever counts errors asks these pairs.

    GroundTruth, results ─► find_overlaps ─► Overlaps ─┬► match ─► Matches     who found whom, as in COCO's evaluation
                            every pair above one IoU   └► pair_off             the same for those that are left

`match` at one IoU threshold gives each analysis the same true positives, so that their counts add up: objects are found
or missed, and a missed one may have been taken for another class (`pair_off` of what `match` left).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
from hotcoco import mask as rle_masks

from dettools.analysis.occlusion import annotation_rle, require_one_size
from dettools.coco_metrics import IouType, MetricsError, collector_paused
from dettools.ground_truth import GroundTruth

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

LEAST_IOU = 0.1
MAX_DETECTIONS = 100
_PAIRS_AT_ONCE = 500_000


@dataclass(frozen=True)
class Overlaps:
    """Objects and detections of a data set as arrays, and the pairs that overlap.

    Detections stand image by image, the best score first, equal scores in the order of the results. Images and classes
    are positions in ``image_ids`` and ``category_ids``.

    Attributes:
        iou_type: ``bbox`` or ``segm``.
        image_ids: ``(I,)`` in the order of the annotation file.
        category_ids: ``(K,)`` likewise.
        object_ids: ``(G,)`` annotation ids.
        object_image, object_class: ``(G,)``.
        object_area: ``(G,)`` the annotation's, px².
        crowd: ``(G,)``; a crowd is not to be found, and what lies in it is not counted.
        result: ``(D,)`` position in the results that were given.
        image, label: ``(D,)`` of the detections.
        score: ``(D,)``.
        area: ``(D,)`` of the box or mask, px².
        pair_detection, pair_object: ``(P,)`` positions of the two, by rising detection.
        pair_iou: ``(P,)``; in a crowd, the share of the detection that lies in it.
        least_iou: pairs below it are left out.
    """

    iou_type: IouType
    image_ids: Ints
    category_ids: Ints
    object_ids: Ints
    object_image: Ints
    object_class: Ints
    object_area: Floats
    crowd: Bools
    result: Ints
    image: Ints
    label: Ints
    score: Floats
    area: Floats
    pair_detection: Ints
    pair_object: Ints
    pair_iou: Floats
    least_iou: float

    @property
    def objects(self) -> int:
        """How many are to be found: all but the crowds."""
        return int((~self.crowd).sum())

    @cached_property
    def same_class(self) -> Bools:
        """``(P,)`` whether both of a pair have one class."""
        same: Bools = self.label[self.pair_detection] == self.object_class[self.pair_object]
        return same


@dataclass(frozen=True)
class Matches:
    """Who found whom.

    Attributes:
        object_of: ``(D,)`` position of the object that a detection found, or that it lies on uncounted; -1 for none.
        detection_of: ``(G,)`` position of the detection that found an object; -1 for none.
        counted: ``(D,)`` false where a detection is not to be counted: below the threshold, or on an ignored object.
    """

    object_of: Ints
    detection_of: Ints
    counted: Bools

    @property
    def true_positive(self) -> Bools:
        """``(D,)``."""
        return self.counted & (self.object_of >= 0)

    @property
    def false_positive(self) -> Bools:
        """``(D,)``."""
        return self.counted & (self.object_of < 0)


@collector_paused()
def find_overlaps(
    ground_truth: GroundTruth,
    results: Sequence[Mapping[str, Any]],
    *,
    iou_type: IouType = "bbox",
    max_detections: int = MAX_DETECTIONS,
    least_iou: float = LEAST_IOU,
    progress: Callable[[int, int], None] | None = None,
) -> Overlaps:
    """Compute all overlaps of an image's detections with its objects, whatever their class.

    Args:
        ground_truth: the annotations.
        results: COCO results with a ``bbox``, for ``segm`` with a ``segmentation`` as RLE.
        iou_type: what overlaps.
        max_detections: the best so many of each image and class, as COCO has it.
        least_iou: of the pairs that are kept.
        progress: called with the images done and all of them.

    Raises:
        MetricsError: annotations or results lack boxes or masks, or keypoints were asked for.
        OcclusionError: a mask cannot be read, or is not of the size of the image's others.
    """
    if iou_type == "keypoints":
        raise MetricsError("got keypoints, expected bbox or segm: errors are told apart by overlap")
    key = "bbox" if iou_type == "bbox" else "segmentation"
    for what, entries in (("annotations", ground_truth.annotations), ("results", results)):
        if lacking := sum([not one.get(key) for one in entries]):
            raise MetricsError(
                f"{iou_type}: {lacking} of {len(entries)} {what} have no {key}. Choose another IoU type, or {what} "
                "that have it."
            )
    objects, found = ground_truth.annotations, results
    image_at = {image.id: place for place, image in enumerate(ground_truth.images)}
    class_at = {category.id: place for place, category in enumerate(ground_truth.categories)}
    image, object_image = (_places(image_at, "image_id", one) for one in (found, objects))
    label, object_class = (_places(class_at, "category_id", one) for one in (found, objects))
    own_score = iou_type == "segm"
    score = np.array([one.get("mask_score", one["score"]) if own_score else one["score"] for one in found], np.float64)
    order = _best(image, label, score, max_detections)
    crowd = np.array([bool(one["iscrowd"]) for one in objects], bool)
    by_image = np.argsort(object_image, kind="stable")
    images = _Images(
        detections=np.searchsorted(image[order], np.arange(len(image_at) + 1)),
        objects=np.searchsorted(object_image[by_image], np.arange(len(image_at) + 1)),
        object_at=by_image,
    )
    if iou_type == "bbox":
        area, pairs = _box_pairs(ground_truth, found, order, images, crowd, least_iou, progress)
    else:
        area, pairs = _mask_pairs(ground_truth, found, order, images, crowd, least_iou, progress)
    detections, partners, overlap = ([part[one] for part in pairs] for one in range(3))
    return Overlaps(
        iou_type=iou_type,
        image_ids=np.array([one.id for one in ground_truth.images], np.int64),
        category_ids=np.array([one.id for one in ground_truth.categories], np.int64),
        object_ids=np.array([one["id"] for one in objects], np.int64),
        object_image=object_image,
        object_class=object_class,
        object_area=np.array([one["area"] for one in objects], np.float64),
        crowd=crowd,
        result=order,
        image=image[order],
        label=label[order],
        score=score[order],
        area=area,
        pair_detection=np.concatenate([np.empty(0, np.int64), *detections]),
        pair_object=np.concatenate([np.empty(0, np.int64), *partners]),
        pair_iou=np.concatenate([np.empty(0), *overlap]),
        least_iou=least_iou,
    )


def match(
    overlaps: Overlaps,
    iou_threshold: float,
    *,
    score_threshold: float = 0.0,
    ignored: Bools | None = None,
    same_class: bool = True,
) -> Matches:
    """Let the detections of each image choose their objects, the best score first, as COCO's evaluation does.

    A detection takes the object of its class that it overlaps most and that nobody has, one to one; only where there is
    none, an ignored one, which several may share. This is pycocotools' ``evaluateImg``, but for its area ranges.

    Args:
        overlaps: of one data set.
        iou_threshold: to find an object; not below ``overlaps.least_iou``.
        score_threshold: detections below it do not take part.
        ignored: ``(G,)`` objects that are not to be found; by default the crowds. Crowds always are ignored.
        same_class: False lets a detection find an object of any class.

    Raises:
        MetricsError: a threshold below the overlaps that were kept.
    """
    unwanted = overlaps.crowd if ignored is None else overlaps.crowd | ignored
    allowed = overlaps.same_class if same_class else np.ones(len(overlaps.pair_iou), bool)
    taking_part = overlaps.score >= score_threshold
    object_of, detection_of = pair_off(
        overlaps, iou_threshold, allowed & taking_part[overlaps.pair_detection], unwanted
    )
    on_unwanted = (object_of >= 0) & unwanted[object_of] if len(unwanted) else np.zeros(len(object_of), bool)
    return Matches(object_of, detection_of, taking_part & ~on_unwanted)


def pair_off(
    overlaps: Overlaps, iou_threshold: float, allowed: Bools, ignored: Bools | None = None
) -> tuple[Ints, Ints]:
    """Choose as `match` does, among the pairs that are allowed.

    Args:
        overlaps: of one data set.
        iou_threshold: to choose an object; not below ``overlaps.least_iou``.
        allowed: ``(P,)`` the pairs to choose from.
        ignored: ``(G,)`` objects to choose only where there is no other; by default the crowds.

    Returns:
        ``(D,)`` the object that each detection chose, and ``(G,)`` the detection that found each object; -1 for none.
        An ignored object is found by nobody.

    Raises:
        MetricsError: a threshold below the overlaps that were kept.
    """
    if iou_threshold < overlaps.least_iou:
        raise MetricsError(
            f"got the IoU threshold {iou_threshold:g}, expected {overlaps.least_iou:g} or more: less is not kept"
        )
    unwanted = overlaps.crowd if ignored is None else ignored
    # Within a detection the wanted objects first, then by falling overlap; of equal ones pycocotools takes the last.
    used = np.flatnonzero(allowed & (overlaps.pair_iou >= min(iou_threshold, 1 - 1e-10)))
    aside = unwanted[overlaps.pair_object[used]]
    used = used[
        np.lexsort((-overlaps.pair_object[used], -overlaps.pair_iou[used], aside, overlaps.pair_detection[used]))
    ]
    object_of = np.full(len(overlaps.score), -1, np.int64)
    detection_of = np.full(len(overlaps.crowd), -1, np.int64)
    chosen: dict[int, int] = {}
    taken: set[int] = set()
    shared, crowds = set(np.flatnonzero(unwanted).tolist()), set(np.flatnonzero(overlaps.crowd).tolist())
    for detection, target in zip(
        overlaps.pair_detection[used].tolist(), overlaps.pair_object[used].tolist(), strict=True
    ):
        if detection in chosen or target in taken:
            continue
        chosen[detection] = target
        if target not in crowds:
            taken.add(target)
        if target not in shared:
            detection_of[target] = detection
    if chosen:
        object_of[list(chosen)] = list(chosen.values())
    return object_of, detection_of


@dataclass(frozen=True)
class _Images:
    """Where each image begins, and the last one ends, among detections and among objects; ``object_at``: theirs."""

    detections: Ints
    objects: Ints
    object_at: Ints


_Pairs = list[tuple[Ints, Ints, Floats]]
_Progress = Callable[[int, int], None] | None


def _box_pairs(
    ground_truth: GroundTruth,
    results: Sequence[Mapping[str, Any]],
    order: Ints,
    images: _Images,
    crowd: Bools,
    least_iou: float,
    progress: _Progress,
) -> tuple[Floats, _Pairs]:
    """Return the detections' areas and all pairs, many images at once: a call for each image costs more than its boxes.

    The IoU is pycocotools' ``bbIou``.
    """
    objects, boxes = _boxes(ground_truth.annotations), _boxes(results)[order]
    area, object_area = boxes[:, 2] * boxes[:, 3], objects[:, 2] * objects[:, 3]
    end, object_end = boxes[:, :2] + boxes[:, 2:], objects[:, :2] + objects[:, 2:]
    per_image = np.diff(images.objects)
    # How many pairs there are before each image.
    before = np.concatenate([[0], np.cumsum(np.diff(images.detections) * per_image)])
    pairs: _Pairs = []
    start = 0
    while start < len(per_image):
        stop = max(start + 1, int(np.searchsorted(before, before[start] + _PAIRS_AT_ONCE, side="right")) - 1)
        here = np.repeat(np.arange(start, stop), np.diff(images.detections[start : stop + 1]))
        count = per_image[here]
        row = np.repeat(np.arange(images.detections[start], images.detections[stop]), count)
        within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        column = images.object_at[np.repeat(images.objects[here], count) + within]
        inside = np.ones(len(row))
        for axis in (0, 1):
            side = np.minimum(end[row, axis], object_end[column, axis]) - np.maximum(
                boxes[row, axis], objects[column, axis]
            )
            inside *= np.maximum(side, 0)
        union = np.where(crowd[column], area[row], area[row] + object_area[column] - inside)
        iou = np.divide(inside, union, out=np.zeros(len(row)), where=inside > 0)
        kept = iou >= least_iou
        pairs.append((row[kept], column[kept], iou[kept]))
        start = stop
        if progress:
            progress(start, len(per_image))
    return area, pairs


def _mask_pairs(
    ground_truth: GroundTruth,
    results: Sequence[Mapping[str, Any]],
    order: Ints,
    images: _Images,
    crowd: Bools,
    least_iou: float,
    progress: _Progress,
) -> tuple[Floats, _Pairs]:
    """Return the detections' areas and all pairs; an image's masks are made when they are needed."""
    sizes = {image.id: (image.height, image.width) for image in ground_truth.images}

    def rles(entries: Sequence[Mapping[str, Any]], what: str) -> list[Any]:
        return [annotation_rle(one, *sizes[one["image_id"]], what=what) for one in entries]

    area = np.zeros(len(order))
    pairs: _Pairs = []
    for place in range(len(sizes)):
        start, end = int(images.detections[place]), int(images.detections[place + 1])
        here = images.object_at[images.objects[place] : images.objects[place + 1]]
        if start < end:
            drawn = rles([{**results[one], "id": one} for one in order[start:end].tolist()], "result")
            area[start:end] = np.asarray(rle_masks.area(drawn), np.float64)
            if len(here):
                wanted = rles([ground_truth.annotations[one] for one in here.tolist()], "annotation")
                require_one_size(ground_truth.images[place].id, drawn, wanted)
                iou = np.asarray(rle_masks.iou(drawn, wanted, crowd[here].astype(np.uint8).tolist()), np.float64)
                rows, columns = np.nonzero(iou.reshape(end - start, len(here)) >= least_iou)
                pairs.append((rows + start, here[columns], iou.reshape(end - start, len(here))[rows, columns]))
        if progress:
            progress(place + 1, len(sizes))
    return area, pairs


def _places(place_of: Mapping[int, int], key: str, entries: Sequence[Mapping[str, Any]]) -> Ints:
    return np.fromiter(map(place_of.__getitem__, map(itemgetter(key), entries)), np.int64, len(entries))


def _boxes(entries: Sequence[Mapping[str, Any]]) -> Floats:
    values = chain.from_iterable(map(itemgetter("bbox"), entries))
    return np.fromiter(values, np.float64, 4 * len(entries)).reshape(-1, 4)


def _best(image: Ints, label: Ints, score: Floats, most: int) -> Ints:
    """Return the results image by image, the best score first; of each class the best so many."""
    by_class = np.lexsort((-score, label, image))
    group = image[by_class] * (int(label.max(initial=0)) + 1) + label[by_class]
    begins = np.flatnonzero(np.diff(group, prepend=-1))
    rank = np.arange(len(group)) - np.repeat(begins, np.diff(np.append(begins, len(group))))
    kept = np.sort(by_class[rank < most])
    order: Ints = kept[np.lexsort((-score[kept], image[kept]))]
    return order
