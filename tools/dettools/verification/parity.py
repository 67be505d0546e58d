"""What a comparison of an exported file with its checkpoint found, and what of it forbids to serve the file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dethandlers.spec import Precision

from dettools.agreement import TIERS, Tier, rank
from dettools.coco_metrics import IouType
from dettools.resampling import ApDifference

LEAST_AGREEING = 0.95
"""In half precision NMS may keep the other one of two near-equal boxes; so many detections must agree all the same."""

# fp32: the same arithmetic by another runtime. Half precision: as `compare` judges it.
PARITY_TIERS: Mapping[Precision, Tier] = {
    "fp32": Tier("numeric", 0.1, 0.0, 2.0, 1e-3, 0.99, 0.1, 0.0),
    "fp16": TIERS[rank("reduced-precision")],
    "bf16": TIERS[rank("reduced-precision")],
}


@dataclass(frozen=True)
class Row:
    """One runtime in one batch size against eager, over all images.

    Attributes:
        runtime: ``torch`` or ``onnx``.
        batch_size: images at once.
        images: how many were compared.
        detections: eager's.
        unmatched: detections of one side that the other lacks; those at the threshold are not counted.
        flips: pairs whose class differs.
        box_px, score: the largest differences over the pairs.
        mask_iou, keypoint_px: the worst over the pairs; None without masks or keypoints.
        failing: differences beyond the tier.
        first: the first of them, for people; empty when there is none.
    """

    runtime: str
    batch_size: int
    images: int
    detections: int
    unmatched: int
    flips: int
    box_px: float
    score: float
    mask_iou: float | None
    keypoint_px: float | None
    failing: int
    first: str

    @property
    def agreeing(self) -> float:
        """Share of eager's detections without a difference beyond the tier."""
        return 1.0 if not self.detections else max(0.0, 1.0 - self.failing / self.detections)


@dataclass(frozen=True)
class ApCheck:
    """What the export costs on labelled images.

    Attributes:
        iou_type: ``bbox``, or ``segm`` for a model with masks and labels with masks.
        difference: AP of the file minus AP of eager, with its interval.
        ap_torch: AP of the torch runtime.
        budget: AP that the file may lose, as a fraction.
        images: how many.
    """

    iou_type: IouType
    difference: ApDifference
    ap_torch: float
    budget: float
    images: int

    @property
    def loss(self) -> float:
        """AP that the export loses, as a fraction; negative when it wins some."""
        return -self.difference.difference

    @property
    def passed(self) -> bool:
        """Whether the loss is within the budget."""
        return self.loss <= self.budget


@dataclass(frozen=True)
class Parity:
    """What was compared and found.

    Attributes:
        precision: of the file.
        eager: what the reference is.
        tier: how far the sides may lie apart.
        score_threshold, max_detections: of both sides.
        sizes: ``(width, height)`` px of the images, each once.
        rows: the torch runtime's, then the file's.
        ap: per IoU type; empty without labels.
        notes: worth knowing, one sentence each.
    """

    precision: Precision
    eager: str
    tier: Tier
    score_threshold: float
    max_detections: int
    sizes: tuple[tuple[int, int], ...] = field(repr=False)
    rows: tuple[Row, ...]
    ap: tuple[ApCheck, ...]
    notes: tuple[str, ...] = ()

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why the file must not be served, one sentence each; empty when it may."""
        found = []
        for row in self.rows:
            if row.runtime != "onnx":
                continue
            if self.precision == "fp32" and row.failing:
                found.append(
                    f"in batches of {row.batch_size}, {row.failing} differences on {row.images} images are beyond "
                    f"{self.tier.box_px} px and {self.tier.score:g} in score; the first: {row.first}"
                )
            elif row.agreeing < LEAST_AGREEING:
                found.append(
                    f"in batches of {row.batch_size}, only {100 * row.agreeing:.1f} % of eager's detections agree "
                    f"(expected {100 * LEAST_AGREEING:g} %); the first that does not: {row.first}"
                )
        found += [
            f"it costs {100 * check.loss:.2f} AP ({check.iou_type}: {100 * check.difference.ap_other:.2f} instead of "
            f"{100 * check.difference.ap_reference:.2f}), and {100 * check.budget:g} AP is the budget"
            for check in self.ap
            if not check.passed
        ]
        return tuple(found)

    @property
    def passed(self) -> bool:
        """Whether the file may be served in place of the checkpoint."""
        return not self.refusals

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values; AP as fractions."""
        return {
            "passed": self.passed,
            "refusals": list(self.refusals),
            "precision": self.precision,
            "eager": self.eager,
            "score_threshold": self.score_threshold,
            "max_detections": self.max_detections,
            "tolerance": {
                "box_px": self.tier.box_px,
                "score": self.tier.score,
                "mask_iou": self.tier.mask_iou,
                "keypoint_px": self.tier.keypoint_px,
            },
            "image_sizes": [list(size) for size in self.sizes],
            "rows": [{**vars(row), "agreeing": row.agreeing} for row in self.rows],
            "ap": [
                {
                    "iou_type": check.iou_type,
                    "images": check.images,
                    "eager": check.difference.ap_reference,
                    "torch": check.ap_torch,
                    "onnx": check.difference.ap_other,
                    "difference": check.difference.difference,
                    "interval": [check.difference.low, check.difference.high],
                    "budget": check.budget,
                    "passed": check.passed,
                }
                for check in self.ap
            ],
            "notes": list(self.notes),
        }
