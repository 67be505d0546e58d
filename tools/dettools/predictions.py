"""Predictions that lie on disk, whoever wrote them, as COCO results of one annotation file.

    results.json ───────────────────────────────────────────┐
    DIR (of `detserve evaluate --out`) ─► DIR/results.json ─┼─► checked ─► Predictions ─► metrics
    result.pkl ─► restricted_pickle ─► mmdetection_results ─► label_order ─┘

A result of an image or a category that the annotations do not have is an error, never left out: leaving out false
positives raises AP.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from detserve.errors import DetserveError

from dettools.ground_truth import GroundTruth
from dettools.label_order import LabelledBoxes, label_order
from dettools.mmdetection_results import MmdetectionResults, read_results
from dettools.restricted_pickle import load_restricted

RESULTS_FILE = "results.json"
METRICS_FILE = "metrics.json"
Source = Literal["COCO results", "detserve evaluate", "MMDetection 2.x", "MMDetection 3.x"]


class PredictionsError(DetserveError):
    """Predictions cannot be read, or do not belong to the annotations."""


@dataclass(frozen=True)
class Predictions:
    """COCO results: ``image_id``, ``category_id``, ``score`` and ``bbox`` (xywh px), ``segmentation`` or ``keypoints``.

    Attributes:
        path: the file that was read.
        results: the detections; ``mask_score`` stands beside ``score`` where masks have scores of their own.
        source: who wrote them.
        label_rule: how labels became categories (`label_order.RULES` or ``names``); None where the file has categories.
        notes: what a reader of the figures has to know, one sentence each.
    """

    path: Path
    results: tuple[dict[str, Any], ...] = field(repr=False)
    source: Source
    label_rule: str | None = None
    notes: tuple[str, ...] = ()


def load_predictions(path: Path, ground_truth: GroundTruth, *, categories: Sequence[str] | None = None) -> Predictions:
    """Read COCO results JSON, an MMDetection 2.x or 3.x result pickle, or the folder of an evaluation.

    Args:
        path: the file or folder.
        ground_truth: the annotations that the predictions are of.
        categories: of a pickle: what its labels stand for, one of `label_order.RULES` or names in the labels' order.
            By default the order of the annotation file, unless another order agrees far better with the objects.

    Raises:
        PredictionsError: unreadable, or a result that is not of these annotations, or no number.
        RestrictedPickleError: a pickle that holds more than arrays, tensors and plain values.
        ResultsFormatError: a pickle that is not MMDetection's.
        LabelOrderError: labels that do not fit the categories.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        with file.open("rb") as stream:
            start = stream.read(256).lstrip()[:1]
    except OSError as error:
        hint = f" (a folder of detserve evaluate has a {RESULTS_FILE})" if path.is_dir() else ""
        raise PredictionsError(f"{file}: cannot be read: {error.strerror or error}{hint}") from None
    if start in (b"[", b"{") or file.suffix.lower() == ".json":
        if categories:
            raise PredictionsError(f"{file}: COCO results name their categories: --categories is for pickles")
        source: Source = "detserve evaluate" if path.is_dir() else "COCO results"
        return _checked(file, _read_json(file), source, None, _failures(path), ground_truth)
    found = read_results(load_restricted(file), ground_truth)
    rule, results, notes = _with_categories(found, ground_truth, categories)
    written_by: Source = "MMDetection 3.x" if found.version == 3 else "MMDetection 2.x"
    return _checked(file, results, written_by, rule, (*found.notes, *notes), ground_truth)


def _read_json(file: Path) -> list[Any]:
    try:
        document = json.loads(file.read_bytes())
    except ValueError as error:
        raise PredictionsError(f"{file}: expected COCO results in JSON: {error}") from None
    if isinstance(document, dict):
        kind = "COCO annotations" if "annotations" in document else "a JSON object"
        if figures := [key for key in document if "mAP" in key or key == "metric"]:
            # MMDetection's document calls these "results" as well.
            raise PredictionsError(
                f"{file}: got the figures of an evaluation ({figures[0]}), expected its detections: the .bbox.json or "
                ".segm.json that outfile_prefix names in MMDetection's config, or the .pkl of tools/test.py --out."
            )
        raise PredictionsError(f"{file}: got {kind}, expected COCO results: a list of detections")
    if not isinstance(document, list):
        raise PredictionsError(f"{file}: got {type(document).__name__}, expected COCO results: a list of detections")
    return document


def _failures(folder: Path) -> tuple[str, ...]:
    """Return a note if an evaluation's own report, which lies beside its results, counts failed images."""
    try:
        report = json.loads((folder / METRICS_FILE).read_bytes())
    except (OSError, ValueError):
        return ()
    failed = report.get("failed") if isinstance(report, dict) else None
    return (
        (f"{failed} images failed in this evaluation: here they count as images without detections",) if failed else ()
    )


def _with_categories(
    found: MmdetectionResults, ground_truth: GroundTruth, categories: Sequence[str] | None
) -> tuple[str, list[dict[str, Any]], tuple[str, ...]]:
    images = found.images
    boxes = LabelledBoxes(
        image_ids=np.repeat([image.image_id for image in images], [len(image.scores) for image in images]),
        boxes_xyxy=np.concatenate([np.empty((0, 4)), *(image.boxes_xyxy for image in images)]),
        labels=np.concatenate([np.empty(0, np.int64), *(image.labels for image in images)]),
        scores=np.concatenate([np.empty(0), *(image.scores for image in images)]),
    )
    order = label_order(ground_truth, boxes, classes=found.classes, given=categories)
    results = []
    for image in images:
        rows = zip(image.boxes_xyxy.tolist(), image.scores.tolist(), image.labels.tolist(), strict=True)
        for place, ((x1, y1, x2, y2), score, label) in enumerate(rows):
            result = {
                "image_id": image.image_id,
                "category_id": order.category_ids[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            if image.masks is not None:
                result["segmentation"] = image.masks[place]
            if image.mask_scores is not None:
                result["mask_score"] = float(image.mask_scores[place])
            results.append(result)
    return order.rule, results, order.notes


def _checked(
    file: Path,
    entries: Sequence[Any],
    source: Source,
    rule: str | None,
    notes: tuple[str, ...],
    ground_truth: GroundTruth,
) -> Predictions:
    """Check every result; a negative size becomes 0, which keeps the detection a false positive."""
    results: list[dict[str, Any]] = []
    turned = beyond = 0
    unknown: dict[str, list[Any]] = {"image_id": [], "category_id": []}
    known: dict[str, frozenset[int]] = {
        "image_id": ground_truth.image_ids,
        "category_id": ground_truth.category_ids,
    }
    for place, entry in enumerate(entries):
        where = f"{file}: result {place}"
        if not isinstance(entry, dict):
            raise PredictionsError(f"{where}: got {type(entry).__name__}, expected an object with image_id, score, …")
        result = dict(entry)
        for key, ids in known.items():
            value = entry.get(key)
            if isinstance(value, float) and value.is_integer():
                result[key] = int(value)
            if not isinstance(result.get(key), int) or isinstance(value, bool) or result[key] not in ids:
                unknown[key].append(value)
        if not _is_number(entry.get("score")):
            raise PredictionsError(
                f"{where}: got the score {entry.get('score')!r}, expected a number. Detections are ranked by it."
            )
        beyond += not 0 <= entry["score"] <= 1
        if not any(key in entry for key in ("bbox", "segmentation", "keypoints")):
            raise PredictionsError(f"{where}: has no bbox, no segmentation and no keypoints")
        if entry.get("bbox") is not None:
            result["bbox"], negative = _box(where, entry["bbox"])
            turned += negative
        results.append(result)
    _refuse_unknown(file, unknown, len(results), ground_truth)
    found = list(notes)
    if turned:
        found.append(f"{turned} boxes have a negative width or height; they count as false positives without area")
    if beyond:
        found.append(f"{beyond} scores are not between 0 and 1: COCO ranks by them all the same")
    return Predictions(file, tuple(results), source, rule, tuple(found))


def _refuse_unknown(file: Path, unknown: Mapping[str, Sequence[Any]], results: int, ground_truth: GroundTruth) -> None:
    remedies = {
        "image_id": "Give the annotations that these predictions were made with, or remove the other results.",
        "category_id": "COCO results hold category_id as in the annotation file, not the label of the model.",
    }
    for key, values in unknown.items():
        if values:
            article = "an" if key == "image_id" else "a"
            different = list(dict.fromkeys(map(repr, values)))
            raise PredictionsError(
                f"{file}: {len(values)} of {results} results have {article} {key} that {ground_truth.path} does not "
                f"have: {', '.join(different[:5])}{' …' if len(different) > 5 else ''}. {remedies[key]}"
            )


def _box(where: str, box: object) -> tuple[list[float], bool]:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise PredictionsError(f"{where}: got the bbox {box!r}, expected [x, y, width, height] in pixels")
    x, y, width, height = box
    return [x, y, max(width, 0), max(height, 0)], width < 0 or height < 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
