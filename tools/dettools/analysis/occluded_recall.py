"""The recall of occluded and separated objects, image by image, in any loop.

    recall = OccludedRecall(ground_truth, subsets)
    for image …:  recall.update(image_id, category_ids=…, scores=…, masks=…, boxes_xyxy=…)
    recall.result()  ─► per subset and IoU type: found of total, its interval, by size

One detection finds one object: detections are matched in the order of their scores, each with the object of its class
that it overlaps most and that none has found before, as COCO does. In the original one detection finds every object
that it overlaps enough. The IoU of masks is computed on their run lengths, never on bitmaps.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from hotcoco import mask as rle_masks

from dettools.analysis.occlusion import (
    SUBSETS,
    OcclusionError,
    OcclusionSubsets,
    Rle,
    annotation_rle,
    require_one_size,
)
from dettools.ground_truth import GroundTruth

RecallType = Literal["segm", "bbox"]
RECALL_TYPES: tuple[RecallType, ...] = ("segm", "bbox")
# COCO's, in square pixels.
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, math.inf)}
REST = "others"


@dataclass(frozen=True)
class Share:
    """``found`` of ``total`` objects, with Wilson's interval of the fraction; None where there is no object."""

    found: int
    total: int
    recall: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SubsetRecall:
    """One subset at one IoU type; ``by_size`` has COCO's small, medium and large."""

    subset: str
    iou_type: RecallType
    all: Share
    by_size: Mapping[str, Share]


@dataclass(frozen=True)
class OccludedRecallResult:
    """What was found.

    Attributes:
        score_threshold: detections below do not count.
        iou_threshold: from which on a detection finds an object.
        confidence: level of the intervals.
        subsets: occluded, separated and all other objects, for each IoU type.
        images: how many were given.
        images_left: how many of the annotations' images were not; their objects count nowhere.
        found: annotation ids that were found, by IoU type.
    """

    score_threshold: float
    iou_threshold: float
    confidence: float
    subsets: tuple[SubsetRecall, ...]
    images: int
    images_left: int
    found: Mapping[RecallType, frozenset[int]] = field(repr=False)

    def of(self, subset: str, iou_type: RecallType = "segm") -> SubsetRecall:
        """Return one subset's.

        Raises:
            OcclusionError: it was not measured.
        """
        for one in self.subsets:
            if (one.subset, one.iou_type) == (subset, iou_type):
                return one
        raise OcclusionError(f"got {subset!r} at {iou_type!r}, expected one of what was measured")

    def to_json(self) -> dict[str, Any]:
        """Return plain values; ``occluded_recall`` and ``separated_recall`` are the original's, in percent."""
        first = self.subsets[0].iou_type
        return {
            **{f"{kind}_recall": _percent(self.of(kind, first).all.recall) for kind in SUBSETS},
            "iou_type": first,
            "score_threshold": self.score_threshold,
            "iou_threshold": self.iou_threshold,
            "confidence": self.confidence,
            "images": self.images,
            "images_left": self.images_left,
            "subsets": [asdict(one) for one in self.subsets],
        }


class OccludedRecall:
    """Counts found objects while images come in; holds numbers only, no detections.

    Args:
        ground_truth: the annotations.
        subsets: made from them.
        score_threshold: detections below it do not count; 0.3 in the paper.
        iou_threshold: 0.75 in the paper.
        iou_types: what overlaps; ``segm`` needs detections with masks.
        confidence: level of the intervals.

    Raises:
        OcclusionError: a threshold that is no fraction, or no IoU type.
    """

    def __init__(
        self,
        ground_truth: GroundTruth,
        subsets: OcclusionSubsets,
        *,
        score_threshold: float = 0.3,
        iou_threshold: float = 0.75,
        iou_types: Sequence[RecallType] = RECALL_TYPES,
        confidence: float = 0.95,
    ) -> None:
        if not 0 <= score_threshold <= 1:
            raise OcclusionError(f"got the score threshold {score_threshold:g}, expected 0 to 1")
        if not 0 < iou_threshold <= 1 or not 0 < confidence < 1 or not iou_types:
            raise OcclusionError(
                f"got an IoU threshold of {iou_threshold}, a confidence of {confidence} and the IoU types "
                f"{list(iou_types)}; expected fractions above 0, and segm or bbox"
            )
        self._iou_types = tuple(dict.fromkeys(iou_types))
        self._score_threshold, self._iou_threshold, self._confidence = score_threshold, iou_threshold, confidence
        self._sizes = {image.id: (image.height, image.width) for image in ground_truth.images}
        self._by_name = {category.name: category.id for category in ground_truth.categories}
        self._category_ids = ground_truth.category_ids
        self._kind_of = subsets.kind_of
        self._objects: dict[int, list[Mapping[str, Any]]] = {image.id: [] for image in ground_truth.images}
        for one in ground_truth.annotations:
            if not one["iscrowd"] and (one.get("segmentation") or "segm" not in self._iou_types):
                self._objects[one["image_id"]].append(one)
        self._found: dict[RecallType, set[int]] = {one: set() for one in self._iou_types}
        self._seen: set[int] = set()

    def update(
        self,
        image_id: int,
        *,
        category_ids: Sequence[int] | npt.NDArray[np.integer[Any]],
        scores: Sequence[float] | npt.NDArray[np.floating[Any]],
        boxes_xyxy: npt.ArrayLike | None = None,
        masks: Sequence[Rle] | None = None,
    ) -> None:
        """Take the detections of one image.

        Args:
            image_id: as in the annotations; every image once.
            category_ids: ``(N,)`` as in the annotations.
            scores: ``(N,)``.
            boxes_xyxy: ``(N, 4)`` pixels; needed for ``bbox``.
            masks: N RLEs of the image's size; needed for ``segm``.

        Raises:
            OcclusionError: an image that is unknown or came before, or detections without what is compared, or with
                masks that cannot be read or are of another size.
        """
        if image_id not in self._sizes or image_id in self._seen:
            known = "came before" if image_id in self._seen else "is not in the annotations"
            raise OcclusionError(f"image {image_id} {known}; expected every image of the annotations once")
        scores, categories = np.asarray(scores, np.float64), np.asarray(category_ids, np.int64)
        boxes = None if boxes_xyxy is None else np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
        lengths = {len(one) for one in (scores, categories, boxes, masks) if one is not None}
        if len(lengths) != 1:
            raise OcclusionError(f"image {image_id}: got lists of {sorted(lengths)} detections, expected equally many")
        if len(scores):
            for kind, given in (("segm", masks), ("bbox", boxes)):
                if kind in self._iou_types and given is None:
                    wanted, other = ("masks", "bbox") if kind == "segm" else ("boxes", "segm")
                    raise OcclusionError(
                        f"image {image_id}: got detections without {wanted}, which {kind} compares. Ask the model for "
                        f"them, or measure {other} only."
                    )
        found: dict[RecallType, set[int]] = {one: set() for one in self._iou_types}
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] >= self._score_threshold]
        objects = self._objects[image_id]
        for category in {one["category_id"] for one in objects} & set(categories[order].tolist()):
            chosen = order[categories[order] == category]
            targets = [one for one in objects if one["category_id"] == category]
            for iou_type in self._iou_types:
                if iou_type == "segm" and masks is not None:
                    iou = self._mask_iou({place: masks[place] for place in chosen.tolist()}, targets, image_id)
                elif iou_type == "bbox" and boxes is not None:
                    iou = _box_iou(boxes[chosen], targets)
                else:
                    continue
                for place in _one_to_one(iou, self._iou_threshold):
                    found[iou_type].add(int(targets[place]["id"]))
        # Nothing of an image that is refused counts: it may come again.
        self._seen.add(image_id)
        for iou_type, ids in found.items():
            self._found[iou_type] |= ids

    def update_served(self, image_id: int, answer: Sequence[Mapping[str, Any]]) -> None:
        """Take an endpoint's answer (its list of detections, with ``masks=true`` for ``segm``).

        Classes are told by ``category_id`` where it is there, else by ``class_name``; detections of classes that the
        annotations do not have find nothing.

        Raises:
            OcclusionError: as `update`.
        """
        known = []
        for one in answer:
            category = one.get("category_id")
            category = category if category in self._category_ids else self._by_name.get(str(one.get("class_name")))
            if category is not None:
                known.append((category, one))
        with_masks = bool(known) and all(one.get("segmentation") is not None for _, one in known)
        self.update(
            image_id,
            category_ids=[category for category, _ in known],
            scores=[float(one["score"]) for _, one in known],
            boxes_xyxy=np.array([one["bbox"] for _, one in known], np.float64).reshape(-1, 4),
            masks=[one["segmentation"] for _, one in known] if with_masks else None,
        )

    def update_results(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Take COCO results of all images at once; an image without results has found nothing.

        Raises:
            OcclusionError: as `update`.
        """
        by_image: dict[int, list[Mapping[str, Any]]] = {image_id: [] for image_id in self._sizes}
        for one in results:
            by_image[one["image_id"]].append(one)
        for image_id, found in by_image.items():
            masks = [one["segmentation"] for one in found if one.get("segmentation") is not None]
            boxes = [one["bbox"] for one in found if one.get("bbox") is not None]
            corners = np.array(boxes, np.float64).reshape(-1, 4)
            corners[:, 2:] += corners[:, :2]
            self.update(
                image_id,
                category_ids=[one["category_id"] for one in found],
                scores=[one["score"] for one in found],
                boxes_xyxy=corners if len(boxes) == len(found) else None,
                masks=masks if len(masks) == len(found) else None,
            )

    def result(self) -> OccludedRecallResult:
        """Return the recalls so far."""
        objects = [one for image_id in self._seen for one in self._objects[image_id]]
        subsets = []
        for iou_type in self._iou_types:
            found = self._found[iou_type]
            for subset in (*SUBSETS, REST):
                here = [one for one in objects if self._kind_of.get(one["id"], REST) == subset]
                sizes = {
                    name: self._share([one for one in here if low <= one["area"] < high], found)
                    for name, (low, high) in SIZES.items()
                }
                subsets.append(SubsetRecall(subset, iou_type, self._share(here, found), sizes))
        return OccludedRecallResult(
            score_threshold=self._score_threshold,
            iou_threshold=self._iou_threshold,
            confidence=self._confidence,
            subsets=tuple(subsets),
            images=len(self._seen),
            images_left=len(self._sizes) - len(self._seen),
            found={iou_type: frozenset(ids) for iou_type, ids in self._found.items()},
        )

    def _share(self, objects: Sequence[Mapping[str, Any]], found: set[int]) -> Share:
        count = sum(one["id"] in found for one in objects)
        if not objects:
            return Share(0, 0, None, None, None)
        return Share(count, len(objects), count / len(objects), *wilson_interval(count, len(objects), self._confidence))

    def _mask_iou(
        self, masks: Mapping[int, Rle], targets: Sequence[Mapping[str, Any]], image_id: int
    ) -> npt.NDArray[np.float64]:
        height, width = self._sizes[image_id]
        wanted = [annotation_rle(one, height, width) for one in targets]
        named = [{"id": place, "image_id": image_id, "segmentation": one} for place, one in masks.items()]
        found = [annotation_rle(one, height, width, what=f"image {image_id}: detection") for one in named]
        require_one_size(image_id, found, wanted)
        return np.asarray(
            rle_masks.iou([dict(one) for one in found], [dict(one) for one in wanted], [0] * len(wanted)), np.float64
        )


def wilson_interval(found: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a fraction (Wilson 1927); it never leaves 0..1, even at 0 of n and n of n."""
    from scipy.special import ndtri

    z = float(ndtri((1 + confidence) / 2))
    fraction = found / total
    centre = fraction + z * z / (2 * total)
    half = z * math.sqrt(fraction * (1 - fraction) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _one_to_one(iou: npt.NDArray[np.float64], threshold: float) -> list[int]:
    """Return the columns that are found; rows come best score first, each takes the best column that is left."""
    free = np.ones(iou.shape[1], bool)
    found = []
    for row in np.flatnonzero((iou >= threshold).any(axis=1)):
        candidates = np.where(free, iou[row], -1.0)
        best = int(candidates.argmax())
        if candidates[best] >= threshold:
            free[best] = False
            found.append(best)
    return found


def _box_iou(boxes_xyxy: npt.NDArray[np.float64], targets: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float64]:
    sizes = boxes_xyxy.copy()
    sizes[:, 2:] -= sizes[:, :2]
    wanted = np.array([one.get("bbox") or [0, 0, 0, 0] for one in targets], np.float64)
    return np.asarray(rle_masks.bbox_iou(sizes, wanted, [0] * len(targets)), np.float64)


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else fraction * 100
