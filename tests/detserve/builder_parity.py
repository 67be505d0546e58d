"""What the builder tests share: a spec for a random detector, and the comparison of lists of detections."""

from dataclasses import dataclass
from pathlib import Path

from dethandlers.detections import Category, Detections
from dethandlers.spec import Serving, Spec
from dettools.comparison import compare_image
from random_detectors import MAX_DETECTIONS, RandomDetector, class_count, model_labels
from safetensors.torch import save_file


@dataclass(frozen=True)
class Worst:
    """The largest differences over some images."""

    box_px: float
    score: float
    mask_iou: float
    keypoint_px: float
    unmatched: int
    flips: int


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
    return Worst(
        box_px=max(pair.box_delta_px for pair in pairs),
        score=max(pair.score_delta for pair in pairs),
        mask_iou=min(1.0 if pair.mask_iou is None else pair.mask_iou for pair in pairs),
        keypoint_px=max(pair.keypoint_delta_px or 0.0 for pair in pairs),
        unmatched=sum(len(one.unmatched_eager) + len(one.unmatched_served) for one in comparisons),
        flips=sum(not pair.same_label for pair in pairs),
    )
