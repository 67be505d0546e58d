"""Detections of one image, and the words for their classes."""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Rle = dict[str, Any]
"""A COCO run-length mask: ``{"size": [height, width], "counts": str}`` (compressed, column-major)."""


@dataclass(frozen=True)
class Category:
    """One class: its place in the list is the 0-based label of every response.

    Attributes:
        id: COCO ``category_id``, as in the annotation file.
        name: class name.
        model_label: the number that the model itself puts out for this class.
    """

    id: int
    name: str
    model_label: int


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best score first.

    Attributes:
        boxes_xyxy: ``(N, 4)`` float32, pixels of the original image after its EXIF orientation is applied.
        scores: ``(N,)`` float32 in 0..1.
        labels: ``(N,)`` int64, 0-based index into the category map.
        masks: one COCO RLE per detection, or None when masks were not asked for or the model has none.
        keypoints: ``(N, K, 3)`` float32 ``x, y, score`` in pixels of the original image, or None.
    """

    boxes_xyxy: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    masks: list[Rle] | None = None
    keypoints: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def empty(cls) -> Self:
        """Return no detections."""
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))

    def take(self, index: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> Self:
        """Return the detections at ``index`` (positions or a boolean mask), in that order."""
        positions = np.flatnonzero(index) if index.dtype == np.bool_ else index
        return replace(
            self,
            boxes_xyxy=self.boxes_xyxy[positions],
            scores=self.scores[positions],
            labels=self.labels[positions],
            masks=None if self.masks is None else [self.masks[int(i)] for i in positions],
            keypoints=None if self.keypoints is None else self.keypoints[positions],
        )

    def filtered(self, score_threshold: float, max_detections: int) -> Self:
        """Return those with ``score >= score_threshold``, best first, at most ``max_detections``.

        Ties keep their order, so the same input gives the same output.
        """
        order = np.argsort(-self.scores, kind="stable")
        order = order[self.scores[order] >= np.float32(score_threshold)]
        return self.take(order[:max_detections])
