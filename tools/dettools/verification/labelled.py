"""A model held to its declared AP on labelled images: the check that sees a wrong description.

The golden image cannot see one. The served path and eager read the same spec; given BGR for RGB both are blind in the
same way, and agree. Only labels that the spec did not make can tell.

    images ─► the worker's detector, threshold 0.001, 100 detections ─► AP ─► declared AP - tolerance? ─► what would fit
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from dethandlers.detector import Detector
from dethandlers.onnx_family import OnnxFamily
from dethandlers.options import Options
from dethandlers.spec import Accuracy
from detserve.errors import DetserveError

from dettools.coco_metrics import Metrics, evaluate_coco
from dettools.evaluation.answers import Answer, coco_results
from dettools.evaluation.category_mapping import map_categories
from dettools.evaluation.gate import HIGHEST_THRESHOLD
from dettools.ground_truth import load_ground_truth
from dettools.verification.search import Progress, Search, detect_all, search_description

SCORE_THRESHOLD = 0.001
MAX_DETECTIONS = 100
TOLERANCE = 0.005
# Below this share of what is declared, it is the description; above, it may as well be the images.
_FAR_BELOW = 0.5


class VerificationError(DetserveError):
    """The check cannot be made as asked."""


@dataclass(frozen=True)
class LabelledCheck:
    """What was measured, against what is declared.

    Attributes:
        metrics: over the images that were looked at; one that failed counts as empty.
        declared: what the model is held to; None when nothing is declared.
        tolerance: AP that it may be below that, as a fraction.
        failed: the images that got an error.
        to_check: keys of the spec that a low AP may come from.
        search: the other descriptions that were tried; None when the AP is as declared, or nothing is.
        notes: worth knowing, one sentence each.
    """

    metrics: Metrics
    declared: Accuracy | None
    tolerance: float
    failed: tuple[Answer, ...] = field(repr=False)
    to_check: str
    search: Search | None = None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether AP is as declared, and not every image failed."""
        if len(self.failed) == self.metrics.images:
            return False
        return self.declared is None or self.metrics.ap >= self.declared.ap - self.tolerance

    def sentence(self) -> str:
        """Say the result, and what to do about it."""
        ap, images = self.metrics.ap, self.metrics.images
        if len(self.failed) == images:
            failure = self.failed[0].failure
            return f"none of {images} images could be answered: {failure.message if failure else 'no answer'}"
        if self.declared is None:
            return (
                f"AP is {ap:.3f} on {images} images. Nothing is declared that it could be held to: declare accuracy.ap "
                "in the spec, or give --expect-ap."
            )
        data = f" ({self.declared.data})" if self.declared.data else ""
        declared = f"{self.declared.ap:.3f} is declared{data}"
        if self.passed:
            return f"AP is {ap:.3f} on {images} images, where {declared}."
        if ap < _FAR_BELOW * self.declared.ap:
            verdict = f"the description does not fit the file; check {self.to_check}."
        else:
            verdict = (
                f"below it by more than {self.tolerance:g}. On other images than it was declared on AP is another: "
                f"give theirs by --expect-ap. Else check {self.to_check}."
            )
        return " ".join([f"AP is {ap:.3f} where {declared}: {verdict}", *self._found()])

    def _found(self) -> list[str]:
        if self.search is None or not self.search.tried:
            return []
        better, images = self.search.better, f"the first {self.search.images} images with objects"
        if better is None:
            return [f"None of {self.search.tried} other descriptions brings it back on {images}."]
        return [f"With {better.words()} → AP {better.ap:.3f} on {images} (as described: {better.ap_described:.3f})."]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values; AP as a fraction."""
        better = self.search.better if self.search else None
        return {
            "passed": self.passed,
            "message": self.sentence(),
            "declared_ap": self.declared.ap if self.declared else None,
            "declared_on": self.declared.data if self.declared else None,
            "tolerance": self.tolerance,
            "metrics": self.metrics.to_json(per_class=False),
            "failed": len(self.failed),
            "descriptions_tried": self.search.tried if self.search else 0,
            "better_description": None
            if better is None
            else {
                "changes": dict(better.changes),
                "categories": better.categories or None,
                "ap": better.ap,
                "ap_described": better.ap_described,
                "images": self.search.images if self.search else 0,
            },
            "notes": list(self.notes),
        }


def check_labelled(
    detector: Detector,
    *,
    images: Path,
    annotations: Path,
    device: torch.device,
    expect_ap: float | None = None,
    tolerance: float = TOLERANCE,
    on_progress: Progress = lambda *_: None,
) -> LabelledCheck:
    """Measure AP on labelled images and hold it to what is declared.

    Args:
        detector: the worker's, loaded.
        images: folder of the images.
        annotations: COCO annotation file.
        device: where other descriptions are tried.
        expect_ap: in 0..1, instead of the spec's ``accuracy.ap``.
        tolerance: AP that it may be below.
        on_progress: told what is done.

    Raises:
        DetserveError: no annotations, no image of them in the folder, or no category in common.
    """
    _require_fraction("--expect-ap", expect_ap)
    _require_fraction("--ap-tolerance", tolerance)
    spec = detector.spec
    truth = load_ground_truth(annotations)
    files, missing = truth.image_files(images)
    if not files:
        raise VerificationError(
            f"--images: got {images}, which has none of the {len(truth.images)} images of {annotations}. Give the "
            "folder that the annotations are of."
        )
    notes = list(truth.notes)
    if missing:
        notes.append(f"{len(missing)} of {len(truth.images)} images are not in {images}; they were left out")
    mapping = map_categories(spec.categories, truth.categories)
    if not mapping.mapped_ids:
        mapping = map_categories(spec.categories, truth.categories, "id")
    if not mapping.mapped_ids:
        raise VerificationError(f"categories: {mapping.problem}. Correct the category map, or the annotations.")
    notes += [one for one in (mapping.problem, mapping.note) if one]
    threshold = max(SCORE_THRESHOLD, spec.serving.min_score_threshold)
    if threshold > HIGHEST_THRESHOLD:
        notes.append(f"serving.min_score_threshold is {threshold:g}: what lies below it is missing from this AP")
    asked = Options(score_threshold=threshold, max_detections=MAX_DETECTIONS)
    entries = [entry for entry in truth.images if entry.id in files]
    answers = detect_all(
        detector, entries, files, asked, on_answer=lambda done: on_progress("labelled images", done, len(entries))
    )
    metrics = evaluate_coco(truth, coco_results(answers, mapping.category_ids), image_ids=files.keys())
    failed = tuple(answer for answer in answers if answer.failure is not None)
    if len(failed) < len(answers) and failed and failed[0].failure is not None:
        notes.append(
            f"{len(failed)} of {len(answers)} images got an error and count as empty; the first is "
            f"{failed[0].file_name}: {failed[0].failure.message}"
        )
    declared = spec.accuracy if expect_ap is None else Accuracy(expect_ap, "--expect-ap")
    check = LabelledCheck(metrics, declared, tolerance, failed, _to_check(detector), None, tuple(notes))
    if check.passed or declared is None or len(failed) == len(answers):
        return check
    searched = search_description(
        detector,
        device,
        truth,
        answers,
        files,
        mapping.category_ids,
        asked=asked,
        wanted_gain=max(tolerance, (declared.ap - metrics.ap) / 2),
        on_progress=on_progress,
    )
    return replace(check, search=searched)


def _to_check(detector: Detector) -> str:
    if isinstance(detector.family, OnnxFamily):
        return "preprocessing.channel_order, scale, mean, std and resize, decoding, and the category map"
    if detector.spec.runtime == "onnx":
        return "that the file is the one that was exported, and export it again"
    return "the category map, builder, builder_options and norm_eps"


def _require_fraction(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise VerificationError(f"{name}: got {value:g}, expected a fraction from 0 to 1, such as 0.326.")
