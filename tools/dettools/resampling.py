"""COCO AP of resampled images, fast enough for a thousand resamples: matching is done once, averaging again and again.

    hotcoco's matches, image by image ─► MatchTable ─► average_precision(image weights) ─► bootstrap

Whether a detection is matched depends on its image alone, so a bootstrap over images only weighs the images anew: an
image that is drawn twice has every detection and every object twice. AP is then the mean interpolated precision at 101
recalls (Lin et al. 2014, `COCOeval.accumulate`), of which only the true positives are needed: precision is highest, and
recall rises, at them alone. `hotcoco.compare` resamples images too, but keeps only the interval; two one-sided tests
need the differences themselves.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from detserve.errors import DetserveError

RECALLS = np.linspace(0.0, 1.00, 101)
_RECALLS_THEN_NONE = np.append(RECALLS, np.inf)


class ResamplingError(DetserveError):
    """A bootstrap cannot be made as asked."""


Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ApInterval:
    """AP and the percentile interval of a bootstrap over images."""

    ap: float
    low: float
    high: float
    confidence: float
    resamples: int


@dataclass(frozen=True)
class ApDifference:
    """AP of two sets of results on the same images, and what chance could make of their difference.

    Attributes:
        ap_reference, ap_other: COCO AP of each.
        low, high: percentile interval of the difference, other - reference, at ``confidence``.
        differences: ``(resamples,)`` the difference in every resample of the images.
        seed: of the resampling.
    """

    ap_reference: float
    ap_other: float
    low: float
    high: float
    confidence: float
    differences: npt.NDArray[np.float64] = field(repr=False)
    seed: int

    @property
    def difference(self) -> float:
        """AP of the other less AP of the reference."""
        return self.ap_other - self.ap_reference

    def p_values(self, margin: float) -> tuple[float, float]:
        """Return p of "the other is worse by ``margin`` or more" and of "it is better by ``margin`` or more".

        The share of resamples on that side, with one added to both counts so that none is 0 (Davison and Hinkley 1997,
        4.2). ``margin`` is a fraction: 0.001 is 0.1 AP.
        """
        count = len(self.differences) + 1
        worse = (1 + int(np.sum(self.differences <= -margin))) / count
        better = (1 + int(np.sum(self.differences >= margin))) / count
        return worse, better

    def equivalent(self, margin: float, *, alpha: float = 0.05) -> bool:
        """Whether both one-sided tests reject (TOST, Schuirmann 1987): equal within ``margin`` at ``1 - alpha``."""
        return max(self.p_values(margin)) < alpha

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values, without the single resamples."""
        return {
            "ap_reference": self.ap_reference,
            "ap_other": self.ap_other,
            "difference": self.difference,
            "low": self.low,
            "high": self.high,
            "confidence": self.confidence,
            "resamples": len(self.differences),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class MatchTable:
    """All detections of all classes, class by class and best score first, and which of them are true positives.

    A *segment* is one class at one IoU threshold; there are ``S = classes x thresholds``.

    Attributes:
        objects: ``(images, classes)`` objects to be found.
        thresholds: number of IoU thresholds.
        detection_image: ``(D,)`` position of the detection's image.
        class_start: ``(classes,)`` where the class begins in the detections.
        hit_detection: ``(H,)`` the true positives as positions in the detections, segment by segment.
        hit_segment: ``(H,)`` their segments.
        ignored_detection: ``(I,)`` the detections that count neither way (on a crowd), segment by segment.
        ignored_before: ``(H,)`` position in these that is the first behind the true positive.
        ignored_start: ``(S,)`` where the segment begins in these.
    """

    objects: Positions
    thresholds: int
    detection_image: Positions
    class_start: Positions
    hit_detection: Positions
    hit_segment: Positions
    ignored_detection: Positions
    ignored_before: Positions
    ignored_start: Positions

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.objects)

    def average_precision(self, image_weights: Positions | None = None) -> float:
        """Return COCO AP (IoU .50:.95, all areas) with every image counted so many times, or NaN without objects.

        Equal scores stand in the order of the images, the copies of an image next to each other.
        """
        weights = np.ones(self.images, np.int64) if image_weights is None else image_weights
        objects = weights @ self.objects
        present = objects > 0
        if not present.any():
            return float("nan")
        weight = weights[self.detection_image]
        seen = _running(weight)
        classes = self.hit_segment // self.thresholds
        hits = _running(weight[self.hit_detection])
        first = np.searchsorted(self.hit_segment, np.arange(len(objects) * self.thresholds))
        true = hits[1:] - hits[first][self.hit_segment]
        counted = seen[self.hit_detection + 1] - seen[self.class_start[classes]]
        if len(self.ignored_detection):
            ignored = _running(weight[self.ignored_detection])
            counted = counted - (ignored[self.ignored_before] - ignored[self.ignored_start[self.hit_segment]])
        precision = true / (counted + np.spacing(1))
        recall = true / np.maximum(objects[classes], 1)
        reached = _recalls_reached(recall)
        before = np.concatenate([[0], reached[:-1]])
        before[first[first < len(before)]] = 0
        # From the right, the highest so far; a segment's own step keeps the next segment out of it.
        step = 2.0 * self.hit_segment
        envelope = np.maximum.accumulate((precision - step)[::-1])[::-1] + step
        total = float(np.sum(envelope * np.maximum(reached - before, 0)))
        return total / (len(RECALLS) * self.thresholds * int(present.sum()))


def match_table(
    entries: Iterator[Mapping[str, Any]], image_ids: Sequence[int], category_ids: Sequence[int], thresholds: int
) -> MatchTable:
    """Build the table from per-image matches as `COCOeval.evalImgs` holds them (one area range, all areas).

    Args:
        entries: with ``image_id``, ``category_id``, ``dtScores (D,)``, ``dtMatched`` and ``dtIgnore (T, D)``,
            ``gtIgnore (G,)``.
        image_ids: in the order in which equal scores stand.
        category_ids: the classes.
        thresholds: T.
    """
    image_at = {one: place for place, one in enumerate(image_ids)}
    class_at = {one: place for place, one in enumerate(category_ids)}
    objects = np.zeros((len(image_ids), len(category_ids)), np.int64)
    parts: list[list[tuple[int, Mapping[str, Any]]]] = [[] for _ in category_ids]
    for entry in entries:
        image, category = image_at[entry["image_id"]], class_at[entry["category_id"]]
        objects[image, category] = len(entry["gtIgnore"]) - sum(map(bool, entry["gtIgnore"]))
        if len(entry["dtScores"]):
            small = {
                "scores": np.asarray(entry["dtScores"], np.float64),
                "matched": np.asarray(entry["dtMatched"], bool).reshape(thresholds, -1),
                "ignored": np.asarray(entry["dtIgnore"], bool).reshape(thresholds, -1),
            }
            parts[category].append((image, small))
    images: list[Positions] = []
    hit: list[tuple[Positions, Positions]] = []
    ignored: list[tuple[Positions, Positions]] = []
    starts = []
    start = 0
    for category, found in enumerate(parts):
        starts.append(start)
        if not found:
            continue
        found.sort(key=lambda one: one[0])
        scores = np.concatenate([one["scores"] for _, one in found])
        order = np.argsort(-scores, kind="stable")
        images.append(np.repeat([image for image, _ in found], [len(one["scores"]) for _, one in found])[order])
        is_ignored = np.concatenate([one["ignored"] for _, one in found], axis=1)[:, order]
        is_hit = np.concatenate([one["matched"] for _, one in found], axis=1)[:, order] & ~is_ignored
        for collected, chosen in ((hit, is_hit), (ignored, is_ignored)):
            threshold, place = np.nonzero(chosen)
            collected.append((threshold + category * thresholds, place + start))
        start += len(scores)
    hit_segment, hit_detection = _joined(hit)
    ignored_segment, ignored_detection = _joined(ignored)
    # Both lists are sorted by segment, then by position: one number orders them alike.
    span = start + 1
    return MatchTable(
        objects=objects,
        thresholds=thresholds,
        detection_image=np.concatenate([np.empty(0, np.int64), *images]),
        class_start=np.array(starts, np.int64),
        hit_detection=hit_detection,
        hit_segment=hit_segment,
        ignored_detection=ignored_detection,
        ignored_before=np.searchsorted(
            ignored_segment * span + ignored_detection, hit_segment * span + hit_detection, side="right"
        ),
        ignored_start=np.searchsorted(ignored_segment, np.arange(len(category_ids) * thresholds)),
    )


def resampled(tables: Sequence[MatchTable], *, resamples: int, seed: int) -> npt.NDArray[np.float64]:
    """Draw as many images as there are, with replacement, again and again; the same draw for every table.

    Returns:
        ``(resamples, len(tables))`` AP. A draw without any object is drawn again.

    Raises:
        ResamplingError: no resamples, or no object in any table.
    """
    if resamples < 1 or not all(table.objects.any() for table in tables):
        raise ResamplingError(f"got {resamples} resamples of images with objects, expected at least one of both")
    random = np.random.default_rng(seed)
    images = tables[0].images
    values = np.empty((resamples, len(tables)))
    for row in range(resamples):
        while True:
            weights = np.bincount(random.integers(0, images, images), minlength=images)
            values[row] = [table.average_precision(weights) for table in tables]
            if not np.isnan(values[row]).any():
                break
    return values


def percentiles(values: npt.NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """Return the two bounds between which the middle ``confidence`` of the values lies.

    Raises:
        ResamplingError: a confidence that is no fraction.
    """
    if not 0 < confidence < 1:
        raise ResamplingError(f"got the confidence {confidence}, expected a fraction such as 0.95")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _running(values: Positions) -> Positions:
    """Return the sums of the first 0, 1, 2, … values."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(values)])


def _recalls_reached(recall: npt.NDArray[np.float64]) -> Positions:
    """Return how many of `RECALLS` are at most ``recall``; as ``searchsorted`` does, to the last bit, but faster."""
    place = (recall * 100).astype(np.int64)
    place += _RECALLS_THEN_NONE[place + 1] <= recall
    place -= _RECALLS_THEN_NONE[place] > recall
    return place + 1


def _joined(parts: Sequence[tuple[Positions, Positions]]) -> tuple[Positions, Positions]:
    empty = np.empty(0, np.int64)
    return np.concatenate([empty, *(one for one, _ in parts)]), np.concatenate([empty, *(one for _, one in parts)])
