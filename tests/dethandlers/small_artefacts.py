"""Artefacts of random detectors for the tests here, and the pairing of two lists of detections."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from dethandlers.artefact import Artefact, Golden
from dethandlers.detections import Category, Detections
from dethandlers.golden import box_iou
from dethandlers.options import Options
from dethandlers.spec import Serving, Spec
from random_detectors import (
    MAX_DETECTIONS,
    RandomDetector,
    class_count,
    model_labels,
    random_detector,
    random_images,
)
from safetensors.torch import save_file

FASTER_RCNN = "fasterrcnn_mobilenet_v3_large_320_fpn"
SSDLITE = "ssdlite320_mobilenet_v3_large"
# Four sizes; two of them have the same padded shape in a Faster R-CNN.
IMAGES = random_images()[:4]


@cache
def detector_of(builder: str) -> RandomDetector:
    """Make a builder's random detector, once for all tests of the session."""
    return random_detector(builder, IMAGES)


def categories_of(model_labels: list[int]) -> tuple[Category, ...]:
    return tuple(Category(id=10 + label, name=f"class {label}", model_label=label) for label in model_labels)


def artefact_of(
    detector: RandomDetector,
    folder: Path,
    *,
    categories: tuple[Category, ...] | None = None,
    golden: Golden | None = None,
    **serving: object,
) -> Artefact:
    """Describe a random detector as an unpacked archive; its weights are written into the folder."""
    weights = folder / f"{detector.builder}.safetensors"
    if not weights.exists():
        save_file({name: tensor.contiguous() for name, tensor in detector.state.items()}, weights)
    defaults = {"score_threshold": detector.score_threshold, "max_detections": MAX_DETECTIONS}
    spec = Spec(
        name=detector.builder,
        family="torchvision",
        builder=detector.builder,
        builder_options=detector.options,
        num_classes=class_count(detector.builder),
        categories=categories or categories_of(model_labels(detector.builder)),
        weights=weights.name,
        serving=Serving(**(defaults | serving)),
    )
    return Artefact(folder, spec, weights, golden)


def options_of(detector: RandomDetector, **changes: object) -> Options:
    return Options(**({"score_threshold": detector.score_threshold, "max_detections": MAX_DETECTIONS} | changes))


@dataclass(frozen=True)
class Pairing:
    """Two lists of detections, one-to-one.

    Attributes:
        box_px: per pair, the largest difference of a coordinate.
        score: per pair, the absolute difference.
        unmatched: scores of those that found no partner of their class with an IoU of at least a half.
    """

    box_px: np.ndarray
    score: np.ndarray
    unmatched: np.ndarray


def pair(reference: Detections, found: Detections) -> Pairing:
    free = np.ones(len(found), bool)
    boxes, scores, unmatched = [], [], []
    for label, box, score in zip(reference.labels, reference.boxes_xyxy, reference.scores, strict=True):
        distances = np.abs(found.boxes_xyxy - box).max(axis=1) if len(found) else np.zeros(0)
        possible = free & (found.labels == label) & (box_iou(box, found.boxes_xyxy) >= 0.5)
        if not possible.any():
            unmatched.append(score)
            continue
        best = int(np.where(possible, distances, np.inf).argmin())
        free[best] = False
        boxes.append(distances[best])
        scores.append(abs(float(found.scores[best]) - float(score)))
    return Pairing(np.array(boxes), np.array(scores), np.concatenate([np.array(unmatched), found.scores[free]]))


def assert_same_bits(one: Detections, other: Detections) -> None:
    assert np.array_equal(one.labels, other.labels)
    assert np.array_equal(one.scores.view(np.uint32), other.scores.view(np.uint32))
    assert np.array_equal(one.boxes_xyxy.view(np.uint32), other.boxes_xyxy.view(np.uint32))


def assert_close(one: Detections, other: Detections, *, box_px: float = 0.01, score: float = 1e-5) -> None:
    """Assert DESIGN's batch invariance, or wider bounds."""
    pairing = pair(one, other)
    largest = pairing.box_px.max(initial=0), pairing.score.max(initial=0)
    report = f"{len(one)} and {len(other)}; unmatched scores {pairing.unmatched}; at most {largest[0]} px, {largest[1]}"
    assert len(pairing.unmatched) == 0, report
    assert largest[0] <= box_px, report
    assert largest[1] <= score, report
