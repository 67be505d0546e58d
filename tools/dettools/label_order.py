"""Which category does a detector's label 3 mean? MMDetection's result files hold labels, and not what they stand for.

    labels, boxes ─► the rules that can read them ─► how often each agrees with the objects ─► the default, or an error

MMDetection numbers the classes of its config in the order of the annotation file's categories (whatever their order in
``metainfo.classes``: ``getCatIds`` filters the file's list). A file exported with a super-category in front that no
annotation uses has one category more than the model has classes, and every label is then off by one: AP is near 0 and
nothing says why. Hence the look at the ground truth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from detserve.errors import DetserveError

from dettools.ground_truth import GroundTruth

RULES = {
    "all": "label i is the i-th category of the annotation file (MMDetection, all categories trained)",
    "used": "label i is the i-th category that has annotations",
    "ids": "the label is the category_id itself",
}
# A detection speaks for a rule if it lies on an object; more than this many are not needed to tell rules apart.
MOST_DETECTIONS = 2000
OVERLAP = 0.5
# By this share of the detections, and at least so many, another rule must be right more often before the default is
# doubted: a poor classifier agrees with every rule now and then.
DOUBT = 0.1
LEAST = 10


class LabelOrderError(DetserveError):
    """The labels do not fit the categories, or fit them better in another order."""


@dataclass(frozen=True)
class LabelOrder:
    """What the labels stand for.

    Attributes:
        rule: a key of `RULES`, or ``names``.
        category_ids: label to category id.
        notes: what a reader of the figures has to know.
    """

    rule: str
    category_ids: Mapping[int, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelledBoxes:
    """The detections of a result file: ``image_ids``, ``labels``, ``scores`` ``(N,)``, ``boxes_xyxy (N, 4)`` in px."""

    image_ids: npt.NDArray[np.int64]
    boxes_xyxy: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]


def label_order(
    ground_truth: GroundTruth, boxes: LabelledBoxes, *, classes: int | None = None, given: Sequence[str] | None = None
) -> LabelOrder:
    """Return what the labels stand for.

    Args:
        ground_truth: whose categories they are.
        boxes: the detections.
        classes: how many classes the model has, if the file tells.
        given: the user's word: one of `RULES`, or category names in the order of the labels.

    Raises:
        LabelOrderError: no rule fits the labels, or the default fits and another agrees far better with the objects.
    """
    labels = sorted({int(label) for label in np.unique(boxes.labels)})
    orders = _orders(ground_truth)
    if given:
        rule, ids = _given(ground_truth, orders, given)
        if unknown := [label for label in labels if label not in ids]:
            raise LabelOrderError(
                f"got the label {unknown[0]}, but --categories {' '.join(given)} gives a category to "
                f"{_range(ids)} only. Name the category of every label."
            )
        orders = {rule: ids, **orders}
    else:
        rule, ids = "", {}
    fitting = {
        name: order
        for name, order in orders.items()
        if all(label in order for label in labels)
        and (classes is None or name in ("ids", rule) or classes == len(order))
    }
    if not fitting:
        raise LabelOrderError(
            f"got the labels {labels[0] if labels else 0} to {labels[-1] if labels else 0}"
            f"{f' of {classes} classes' if classes is not None else ''}, but {ground_truth.path} has "
            f"{len(ground_truth.categories)} categories ({len(orders['used'])} of them with annotations). Name the "
            "categories in the order of the labels with --categories NAME …, or check that the annotations belong to "
            "these predictions."
        )
    if not rule:
        rule, ids = next(iter(fitting.items()))
    readings = _different(fitting, labels, first=rule)
    if len(readings) == 1:
        return LabelOrder(rule, ids)
    agreeing = {name: _agreeing(ground_truth, boxes, orders[name]) for name in readings}
    hits = max(1, agreeing[rule][1])
    shares = {name: f"{count / hits:.0%}" for name, (count, _) in agreeing.items()}
    best = max(agreeing, key=lambda name: agreeing[name][0])
    if agreeing[best][0] - agreeing[rule][0] < max(LEAST, DOUBT * hits):
        if given:
            return LabelOrder(rule, ids)
        others = ", ".join(f"{name} {shares[name]}" for name in readings if name != rule)
        note = f"labels are read by the rule “{rule}”, which names {shares[rule]} of {hits} objects rightly ({others})"
        return LabelOrder(rule, ids, (note,))
    doubt = (
        f"read by the rule “{rule}” ({RULES.get(rule, 'as --categories says')}) the labels name {shares[rule]} of the "
        f"{hits} objects that the boxes hit rightly, by “{best}” ({RULES.get(best, 'names')}) {shares[best]}"
    )
    if given:
        return LabelOrder(rule, ids, (doubt,))
    raise LabelOrderError(f"{doubt}. Decide with --categories {rule}, --categories {best} or --categories NAME ….")


def _orders(ground_truth: GroundTruth) -> dict[str, dict[int, int]]:
    every = [category.id for category in ground_truth.categories]
    used = {one["category_id"] for one in ground_truth.annotations}
    return {
        "all": dict(enumerate(every)),
        "used": dict(enumerate(one for one in every if one in used)),
        "ids": {one: one for one in every},
    }


def _given(
    ground_truth: GroundTruth, orders: Mapping[str, dict[int, int]], given: Sequence[str]
) -> tuple[str, dict[int, int]]:
    by_name = {category.name: category.id for category in ground_truth.categories}
    if len(given) == 1 and given[0] in orders and given[0] not in by_name:
        return given[0], orders[given[0]]
    if unknown := [name for name in given if name not in by_name]:
        raise LabelOrderError(
            f"--categories: got {unknown[0]!r}, expected one of the rules {', '.join(RULES)}, or names of "
            f"{ground_truth.path}: {', '.join(by_name)}"
        )
    return "names", {label: by_name[name] for label, name in enumerate(given)}


def _different(orders: Mapping[str, dict[int, int]], labels: Sequence[int], *, first: str) -> list[str]:
    """Return the rules that read these labels differently, each reading once, ``first`` for its own."""
    readings: dict[tuple[int, ...], str] = {}
    for name in (first, *(name for name in orders if name != first)):
        readings.setdefault(tuple(orders[name][label] for label in labels), name)
    return list(readings.values())


def _agreeing(ground_truth: GroundTruth, boxes: LabelledBoxes, order: Mapping[int, int]) -> tuple[int, int]:
    """Return how many detections name the class of the object they lie on (IoU ≥ 0.5), and how many lie on one."""
    objects: dict[int, list[Mapping[str, Any]]] = {}
    for one in ground_truth.annotations:
        if not one["iscrowd"] and one.get("bbox") is not None:
            objects.setdefault(one["image_id"], []).append(one)
    hits = agreeing = 0
    best_first = np.argsort(-boxes.scores, kind="stable")[:MOST_DETECTIONS]
    for place in best_first:
        there = objects.get(int(boxes.image_ids[place]))
        if not there:
            continue
        overlaps = _iou(boxes.boxes_xyxy[place], np.array([one["bbox"] for one in there], np.float64))
        nearest = int(np.argmax(overlaps))
        if overlaps[nearest] >= OVERLAP:
            hits += 1
            agreeing += order[int(boxes.labels[place])] == there[nearest]["category_id"]
    return agreeing, hits


def _iou(box_xyxy: npt.NDArray[np.float64], boxes_xywh: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    low = np.maximum(box_xyxy[:2], boxes_xywh[:, :2])
    high = np.minimum(box_xyxy[2:], boxes_xywh[:, :2] + boxes_xywh[:, 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=1)
    union = np.prod(np.clip(box_xyxy[2:] - box_xyxy[:2], 0, None)) + np.prod(boxes_xywh[:, 2:], axis=1) - common
    iou: npt.NDArray[np.float64] = common / np.maximum(union, 1e-12)
    return iou


def _range(order: Mapping[int, int]) -> str:
    return f"the labels {min(order)} to {max(order)}" if order else "no label"
