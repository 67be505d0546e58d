"""What becomes of an object in a conversion: the policies for difficult ones and crowds, and the count of losses.

Two kinds of loss are told apart: an object or image that is *skipped*, and a property that the target format *has no
place for*.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dettools.datasets.dataset import DatasetFormatError, box_of, is_number
from dettools.datasets.inspection import KINDS

Target = Literal["coco", "voc", "yolo"]
TARGETS: tuple[Target, ...] = ("coco", "voc", "yolo")
DIFFICULT, CROWD = ("crowd", "keep", "drop"), ("keep", "drop", "difficult")
# So many of a kind are named in the report.
MOST_EXAMPLES = 5
REASONS = {
    "difficult": "marked difficult, and --difficult drop",
    "crowd": "a crowd, and --crowd drop",
    "no_truth": "the photograph has no picture of numbers and counts as empty",
    "no_image_size": "neither the annotations nor an image file tell the width and height",
    "no_objects": "the split has no object",
    **{kind: one.meaning for kind, one in KINDS.items()},
}


@dataclass
class Tally:
    """What was skipped: reason to count, and a few examples of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, detail: str) -> None:
        """Count one."""
        self.counts[reason] += 1
        there = self.examples.setdefault(reason, [])
        if len(there) < MOST_EXAMPLES:
            there.append(detail)

    def merge(self, other: "Tally") -> None:
        """Add those of another."""
        self.counts.update(other.counts)
        for reason, details in other.examples.items():
            there = self.examples.setdefault(reason, [])
            there.extend(details[: MOST_EXAMPLES - len(there)])

    def to_json(self) -> dict[str, Any]:
        """Return reason to count, meaning and examples."""
        return {
            reason: {"count": count, "meaning": REASONS.get(reason, reason), "examples": self.examples[reason]}
            for reason, count in sorted(self.counts.items())
        }


@dataclass(frozen=True)
class Rules:
    """What is written.

    Attributes:
        target: the format.
        difficult: a VOC object marked difficult becomes a crowd, which COCO's metrics ignore, as in MMDetection's
            converter; is kept as any other; or is dropped.
        crowd: a crowd is kept (as an ordinary object where the format has no crowds), dropped, or marked difficult.
        boxes_only: leave masks out.
        outlines: YOLO lines are outlines and not boxes.
        contiguous: COCO category ids are numbered from 1.
    """

    target: Target
    difficult: str
    crowd: str
    boxes_only: bool = False
    outlines: bool = False
    contiguous: bool = False

    def takes(self, annotation: dict[str, Any], from_voc: bool, skipped: Tally, where: str) -> bool:
        """Apply the policies to an annotation, in place; return whether it stays."""
        detail = f"{where}: annotation {annotation.get('id')} bbox {annotation.get('bbox')!r}"[:200]
        if self.boxes_only:
            annotation.pop("segmentation", None)
        box = box_of(annotation)
        if box is None and (self.target != "coco" or annotation.get("bbox") or not annotation.get("segmentation")):
            skipped.add("bad_box", detail)
            return False
        # A VOC box that counts from 1 gets a pixel more yet.
        if box is not None and (kind := _degenerate(box, -1.0 if from_voc else 0.0)):
            skipped.add(kind, detail)
            return False
        if box is not None and not is_number(annotation.get("area")):
            annotation["area"] = box[2] * box[3]
        if is_difficult(annotation):
            if self.difficult == "drop":
                skipped.add("difficult", detail)
                return False
            annotation["iscrowd"] = int(self.difficult == "crowd")
        elif annotation.get("iscrowd"):
            if self.crowd == "drop":
                skipped.add("crowd", detail)
                return False
            if self.crowd == "difficult":
                annotation["attributes"] = {**_attributes(annotation), "difficult": "1"}
        else:
            annotation["iscrowd"] = 0
        return True


def rules_for(target: Target, difficult: str | None, crowd: str | None, **more: bool) -> Rules:
    """Return the rules with the defaults of a target.

    Raises:
        DatasetFormatError: the target cannot hold what is asked for.
    """
    if target == "yolo" and difficult == "crowd":
        raise DatasetFormatError("--difficult crowd: YOLO has no crowds. Choose keep or drop.")
    if target != "voc" and crowd == "difficult":
        raise DatasetFormatError(
            f"--crowd difficult: only VOC has difficult objects, not {target}. Choose keep or drop."
        )
    # Ultralytics' own conversion of VOC leaves difficult objects out.
    difficult = difficult or {"coco": "crowd", "voc": "crowd", "yolo": "drop"}[target]
    crowd = crowd or {"coco": "keep", "voc": "difficult", "yolo": "drop"}[target]
    return Rules(target, difficult, crowd, **more)


def degenerate(annotation: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the size of a box, a key of `KINDS`; None for a sound one or none."""
    box = box_of(annotation)
    return None if box is None else _degenerate(box, 0.0)


def _degenerate(box: tuple[float, float, float, float], least: float) -> str | None:
    if min(box[2:]) < least:
        return "negative_size"
    return "zero_area" if min(box[2:]) <= least else None


def is_difficult(annotation: Mapping[str, Any]) -> bool:
    """Whether VOC's mark is on it."""
    return str(_attributes(annotation).get("difficult", "0")).strip().lower() in ("1", "true", "yes")


def _attributes(annotation: Mapping[str, Any]) -> Mapping[str, Any]:
    attributes = annotation.get("attributes")
    return attributes if isinstance(attributes, Mapping) else {}
