"""What the page shows of a data set: once an index of all images, then each image when it is looked at.

    Sources ─► ViewData ─┬► index       names, and of every detection its class and score: the browser counts with it
                         ├► matches     who found whom at one IoU threshold
                         └► details     boxes and masks of one image

The browser filters `matches` by score alone: detections choose their objects best score first, so that those below a
threshold never change what those above it found. A threshold only makes the rest drop out, and their objects missed.
"""

from __future__ import annotations

import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from hotcoco import mask as rle_masks

from dettools.analysis.overlaps import find_overlaps, match

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from dettools.viewer.sources import Sources

Ints = npt.NDArray[np.int64]


class ViewData:
    """The data set, its overlaps computed once.

    Objects and detections are numbered image by image, in the order of the images; detections the best score first.

    Args:
        sources: what is to be seen.
        progress: called with the images done and all of them.

    Raises:
        MetricsError: annotations or results without boxes or masks to compare.
    """

    def __init__(self, sources: Sources, *, progress: Callable[[int, int], None] | None = None) -> None:
        self.sources = sources
        self._overlaps = find_overlaps(
            sources.ground_truth, sources.results, iou_type=sources.iou_type, progress=progress
        )
        self._objects: Ints = np.argsort(self._overlaps.object_image, kind="stable")
        self._place_of_object = np.empty_like(self._objects)
        self._place_of_object[self._objects] = np.arange(len(self._objects))
        images = np.arange(len(sources.ground_truth.images))
        self._detection_ends: Ints = np.searchsorted(self._overlaps.image, images, side="right")
        self._object_ends: Ints = np.searchsorted(self._overlaps.object_image[self._objects], images, side="right")
        self._matches: dict[float, dict[str, list[int]]] = {}
        self._lock = threading.Lock()

    @property
    def left_out(self) -> int:
        """How many results are not among the best of their image and class, and are not shown."""
        return len(self.sources.results) - len(self._overlaps.result)

    @property
    def detections(self) -> int:
        """How many are shown."""
        return len(self._overlaps.result)

    @cached_property
    def index(self) -> dict[str, Any]:
        """Columns: of the images ``names``, the ends of their detections and objects, ``missing``; of the rest below.

        ``label`` and ``score`` of the detections, ``object_class`` and ``crowd`` of the objects.
        """
        truth, overlaps = self.sources.ground_truth, self._overlaps
        return {
            "names": [image.file_name for image in truth.images],
            "missing": [place for place, image in enumerate(truth.images) if image.id not in self.sources.files],
            "categories": [category.name for category in truth.categories],
            "detection_ends": self._detection_ends.tolist(),
            "label": overlaps.label.tolist(),
            "score": overlaps.score.tolist(),
            "object_ends": self._object_ends.tolist(),
            "object_class": overlaps.object_class[self._objects].tolist(),
            "crowd": overlaps.crowd[self._objects].astype(int).tolist(),
        }

    def matches(self, iou_threshold: float) -> dict[str, list[int]]:
        """Return ``object_of`` each detection and ``detection_of`` each object, -1 for none; kept for the next time.

        A detection of a crowd is not counted; only such a one has a crowd as its object.

        Raises:
            MetricsError: a threshold below the overlaps that are kept.
        """
        with self._lock:
            if (known := self._matches.get(iou_threshold)) is not None:
                return known
            found = match(self._overlaps, iou_threshold)
            hit = found.object_of >= 0
            object_of = np.full(len(found.object_of), -1, np.int64)
            object_of[hit] = self._place_of_object[found.object_of[hit]]
            answer = {"object_of": object_of.tolist(), "detection_of": found.detection_of[self._objects].tolist()}
            self._matches[iou_threshold] = answer
            return answer

    def file(self, image: int) -> tuple[Path | None, tuple[int, int]]:
        """Return the file of an image, and width and height as annotated (0, 0 where that is not told).

        Raises:
            IndexError: no such image.
        """
        entry = self.sources.ground_truth.images[image]
        return self.sources.files.get(entry.id), (entry.width, entry.height)

    def details(self, image: int) -> dict[str, Any]:
        """Return boxes (xywh px) and masks of one image, in the order of the index, and the pairs that overlap.

        ``pairs`` are detection and object, counted within the image, and their IoU.

        Raises:
            IndexError: no such image.
        """
        overlaps = self._overlaps
        first_detection, last_detection = _span(self._detection_ends, image)
        first_object, last_object = _span(self._object_ends, image)
        first_pair, last_pair = np.searchsorted(overlaps.pair_detection, [first_detection, last_detection])
        pairs = zip(
            (overlaps.pair_detection[first_pair:last_pair] - first_detection).tolist(),
            (self._place_of_object[overlaps.pair_object[first_pair:last_pair]] - first_object).tolist(),
            overlaps.pair_iou[first_pair:last_pair].round(4).tolist(),
            strict=True,
        )
        results, annotations = self.sources.results, self.sources.ground_truth.annotations
        return {
            "detections": [_shape(results[place]) for place in overlaps.result[first_detection:last_detection]],
            "objects": [_shape(annotations[place]) for place in self._objects[first_object:last_object]],
            "pairs": [list(pair) for pair in pairs],
        }


def _span(ends: Ints, image: int) -> tuple[int, int]:
    if not 0 <= image < len(ends):
        raise IndexError(image)
    return int(ends[image - 1]) if image else 0, int(ends[image])


def _shape(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the box, and the mask as polygons or RLE with its counts as text or numbers."""
    segmentation = entry.get("segmentation") or None
    box = entry.get("bbox")
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], bytes):
            segmentation = {**segmentation, "counts": segmentation["counts"].decode()}
        if box is None:
            box = np.asarray(rle_masks.toBbox(dict(segmentation)), np.float64).ravel().tolist()
    return {"box": [round(float(value), 2) for value in box or (0, 0, 0, 0)], "mask": segmentation}
