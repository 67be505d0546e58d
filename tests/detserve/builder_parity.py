"""What the builder tests share: a spec for a random detector, and the comparison of lists of detections."""

from dataclasses import dataclass
from pathlib import Path

import torch
from dethandlers.detections import Category, Detections
from dethandlers.spec import Serving, Spec
from dettools.comparison import compare_image
from random_detectors import MAX_DETECTIONS, RandomDetector, class_count, model_labels
from safetensors.torch import save_file
from torchvision.models.detection.roi_heads import expand_boxes


@dataclass(frozen=True)
class Worst:
    """The largest differences over some images.

    ``mask_iou`` is over the masks that both sides put at the same pixels; ``moved_masks`` counts the others:
    torchvision pastes a mask into its box enlarged and cut to whole pixels, so that a box moved by a ten-thousandth of
    a pixel may move its whole mask by one. ``every_mask_iou`` is over all of them.
    """

    box_px: float
    score: float
    mask_iou: float
    keypoint_px: float
    unmatched: int
    flips: int
    moved_masks: int
    every_mask_iou: float


def spec_of(detector: RandomDetector, name: str, folder: Path, **serving: object) -> Spec:
    """Write the detector's weights and describe it."""
    weights = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in detector.state.items()}, weights)
    return Spec(
        name=name,
        family="torchvision",
        builder=detector.builder,
        builder_options=detector.options,
        num_classes=class_count(detector.builder),
        categories=tuple(
            Category(id=10 + label, name=f"class {label}", model_label=label)
            for label in model_labels(detector.builder)
        ),
        weights=weights.name,
        serving=Serving(score_threshold=detector.score_threshold, max_detections=MAX_DETECTIONS, **serving),
    )


def worst(reference: list[Detections], found: list[Detections], threshold: float) -> Worst:
    """Compare image by image, each detection with its partner."""
    comparisons = [
        compare_image("", one, other, score_threshold=threshold, max_detections=MAX_DETECTIONS)
        for one, other in zip(reference, found, strict=True)
    ]
    pairs = [pair for comparison in comparisons for pair in comparison.pairs]
    masks = [
        (pair.mask_iou, (_paste(one)[pair.eager] == _paste(other)[pair.served]).all())
        for comparison, one, other in zip(comparisons, reference, found, strict=True)
        for pair in comparison.pairs
        if pair.mask_iou is not None
    ]
    return Worst(
        box_px=max(pair.box_delta_px for pair in pairs),
        score=max(pair.score_delta for pair in pairs),
        mask_iou=min((iou for iou, in_place in masks if in_place), default=1.0),
        keypoint_px=max(pair.keypoint_delta_px or 0.0 for pair in pairs),
        unmatched=sum(len(one.unmatched_eager) + len(one.unmatched_served) for one in comparisons),
        flips=sum(not pair.same_label for pair in pairs),
        moved_masks=sum(not in_place for _, in_place in masks),
        every_mask_iou=min((iou for iou, _ in masks), default=1.0),
    )


def _paste(found: Detections) -> torch.Tensor:
    """The whole pixels ``(N, 4)`` between which torchvision pastes masks of 28×28 with a border of 1."""
    return expand_boxes(torch.from_numpy(found.boxes_xyxy), 30 / 28).to(torch.int64)
