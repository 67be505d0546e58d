"""Was anything lost on the way? An exported file against the checkpoint that it was made from, on real images.

    images, and each of them smaller ─► eager ──────────────────────────┐
                                     ├► torch runtime, batches of 3 ────┤─► detection by detection ─► worst differences
                                     └► onnx, batches of 1, 3 and 8 ────┘
    labelled images ─► eager, torch runtime, onnx ─► AP ─► what the export costs, against a budget

The torch runtime stands between the two: where it agrees with eager and the file does not, the export is at fault;
where both differ alike, the preparation is.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dethandlers.detections import Detections
from dethandlers.detector import Detector, Request
from dethandlers.errors import RequestError
from dethandlers.options import Options
from detserve.eager import EagerModel
from detserve.errors import DetserveError
from PIL import Image, ImageOps
from torchvision.models.detection.roi_heads import expand_boxes

from dettools.agreement import Finding, Tier, judge
from dettools.coco_metrics import IouType, compare_coco, evaluate_coco
from dettools.evaluation.answers import Answer, coco_results
from dettools.evaluation.category_mapping import map_categories
from dettools.evaluation.local_answerers import EagerAnswerer
from dettools.ground_truth import GroundTruth
from dettools.matching import match
from dettools.verification.parity import PARITY_TIERS, ApCheck, Parity, Row
from dettools.verification.search import detect_all

BATCH_SIZES = (1, 3, 8)
AP_BUDGET = 0.002
"""0.2 AP, as a fraction: what half precision may cost."""
AP_EXACT = 0.001
"""0.1 AP: in fp32 an export costs nothing but rounding."""
MOST_KEYPOINTS_OFF = 0.1
"""Share of the detections with a keypoint elsewhere: the highest place of a flat heat map is chosen by rounding."""
_MOST_IMAGES = 32
_SMALLER = 0.6

Progress = Callable[[str, int, int], None]


class ParityError(DetserveError):
    """The comparison cannot be made."""


@dataclass(frozen=True)
class Sides:
    """The three that must agree: eager on the checkpoint, the worker's detector on it, and on the exported file."""

    eager: EagerModel
    torch: Detector
    onnx: Detector


def check_parity(
    sides: Sides,
    images: Sequence[Path],
    *,
    truth: GroundTruth | None = None,
    folder: Path | None = None,
    ap_budget: float | None = None,
    on_progress: Progress = lambda *_: None,
) -> Parity:
    """Compare an exported file with its checkpoint.

    Args:
        sides: eager, torch runtime, exported file.
        images: files; of more than 32, as many evenly chosen are compared detection by detection.
        truth: labels, for AP.
        folder: of the labelled images.
        ap_budget: AP that the file may lose, as a fraction; None takes what is usual in its precision.
        on_progress: told what is done.

    Raises:
        ParityError: no image can be read.
    """
    serving = sides.onnx.spec.serving
    precision = serving.precision
    tier = PARITY_TIERS[precision]
    capabilities = sides.onnx.family.capabilities
    asked = Options(
        score_threshold=serving.score_threshold,
        max_detections=serving.max_detections,
        masks="masks" in capabilities,
        keypoints="keypoints" in capabilities,
    )
    notes: list[str] = []
    encoded, sizes = _at_several_sizes(_evenly(images), notes)
    total = len(encoded) * (2 + len(BATCH_SIZES))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress("images compared", done, total)

    reference = []
    for image in encoded:
        reference.append(
            sides.eager.detect(
                image,
                asked.score_threshold,
                asked.max_detections,
                masks=asked.masks,
                keypoints=asked.keypoints,
            )
        )
        advance(1)
    rows = [
        _row(detector, runtime, size, encoded, reference, asked, tier, advance)
        for runtime, detector, batches in (("torch", sides.torch, BATCH_SIZES[1:2]), ("onnx", sides.onnx, BATCH_SIZES))
        for size in batches
    ]
    if not sum(len(one) for one in reference):
        notes.append("eager finds nothing on any of these images, so the comparison proves little; give others")
    budget = ap_budget if ap_budget is not None else (AP_EXACT if precision == "fp32" else AP_BUDGET)
    ap: tuple[ApCheck, ...] = ()
    if truth is not None and folder is not None:
        ap = _ap(sides, truth, folder, budget, notes, on_progress)
    elif precision != "fp32":
        notes.append(f"without labels ({precision}) the AP budget was not checked: give --annotations")
    return Parity(
        precision,
        sides.eager.source,
        tier,
        asked.score_threshold,
        asked.max_detections,
        tuple(sorted(set(sizes))),
        tuple(rows),
        ap,
        tuple(notes),
    )


def _evenly(images: Sequence[Path]) -> list[Path]:
    if len(images) <= _MOST_IMAGES:
        return list(images)
    return [images[round(place)] for place in np.linspace(0, len(images) - 1, _MOST_IMAGES)]


def _at_several_sizes(images: Sequence[Path], notes: list[str]) -> tuple[list[bytes], list[tuple[int, int]]]:
    """Return each image as it is and smaller, the one after the other, so that batches are of mixed sizes."""
    encoded, sizes = [], []
    for path in images:
        content = path.read_bytes()
        try:
            with Image.open(io.BytesIO(content)) as opened:
                whole = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            notes.append(f"{path.name} was left out: {error}")
            continue
        smaller = whole.resize((max(16, round(whole.width * _SMALLER)), max(16, round(whole.height * _SMALLER))))
        buffer = io.BytesIO()
        smaller.save(buffer, "PNG")
        encoded += [content, buffer.getvalue()]
        sizes += [whole.size, smaller.size]
    if not encoded:
        raise ParityError("--verify: got no image that can be read. Give a folder with photographs.")
    return encoded, sizes


def _row(
    detector: Detector,
    runtime: str,
    batch_size: int,
    encoded: Sequence[bytes],
    reference: Sequence[Detections],
    asked: Options,
    tier: Tier,
    advance: Callable[[int], None],
) -> Row:
    unmatched = flips = failing = off = 0
    first, box_px, score = "", 0.0, 0.0
    mask_ious: list[float] = []
    keypoints: list[float] = []
    names = [category.name for category in detector.spec.categories]
    for start in range(0, len(encoded), batch_size):
        part = encoded[start : start + batch_size]
        answers = detector.detect([Request(image, asked) for image in part])
        for place, answer in enumerate(answers, start):
            eager = reference[place]
            if isinstance(answer, RequestError):
                failing += max(1, len(eager))
                unmatched += len(eager)
                first = first or f"image {place // 2 + 1} failed: {answer.message}"
                continue
            found = answer.detections
            pairs = match(eager, found)
            mine, theirs = {pair.eager for pair in pairs}, {pair.served for pair in pairs}
            findings = judge(
                pairs,
                tuple(i for i in range(len(eager)) if i not in mine),
                tuple(j for j in range(len(found)) if j not in theirs),
                eager,
                found,
                tier=tier,
                score_threshold=asked.score_threshold,
                max_detections=asked.max_detections,
                names=names,
            )
            failures = [finding for finding in findings if finding.fails and not _by_rounding(finding, eager, found)]
            points = [finding for finding in failures if finding.reason == "keypoint_drift"]
            off += len(points)
            failures = [finding for finding in failures if finding not in points]
            failing += len(failures)
            unmatched += sum(finding.reason in ("missing", "extra") for finding in failures)
            flips += sum(finding.reason == "label_flip" for finding in failures)
            if failures and not first:
                width, height = answer.image_size
                first = f"{failures[0].reason} {failures[0].detail} at {width}×{height} px"
            box_px = max([box_px, *(pair.box_delta_px for pair in pairs)])
            score = max([score, *(pair.score_delta for pair in pairs)])
            mask_ious += [pair.mask_iou for pair in pairs if pair.mask_iou is not None]
            keypoints += [pair.keypoint_delta_px for pair in pairs if pair.keypoint_delta_px is not None]
        advance(len(part))
    if off > MOST_KEYPOINTS_OFF * max(1, len(keypoints)):
        failing += off
        first = first or f"keypoint_drift in {off} of {len(keypoints)} detections"
    return Row(
        runtime,
        batch_size,
        len(encoded),
        sum(len(one) for one in reference),
        unmatched,
        flips,
        box_px,
        score,
        min(mask_ious, default=None),
        max(keypoints, default=None),
        failing,
        first,
    )


def _by_rounding(finding: Finding, eager: Detections, found: Detections) -> bool:
    """Whether two masks differ since their nearly equal boxes are cut to different whole pixels for pasting."""
    if finding.reason != "mask_drift" or finding.eager is None or finding.served is None:
        return False
    boxes = np.stack([eager.boxes_xyxy[finding.eager], found.boxes_xyxy[finding.served]])
    # As torchvision's paste_masks_in_image does with masks of 28×28 cells and a border of one.
    one, other = expand_boxes(torch.from_numpy(boxes), 30 / 28).to(torch.int64)
    return not torch.equal(one, other)


def _ap(
    sides: Sides, truth: GroundTruth, folder: Path, budget: float, notes: list[str], on_progress: Progress
) -> tuple[ApCheck, ...]:
    files, missing = truth.image_files(folder)
    if not files:
        raise ParityError(
            f"--annotations: got {truth.path}, none of whose {len(truth.images)} images is in {folder}. Give the "
            "annotations of the images of --verify."
        )
    if missing:
        notes.append(f"{len(missing)} of {len(truth.images)} labelled images are not in {folder}; they were left out")
    mapping = map_categories(sides.onnx.spec.categories, truth.categories)
    if not mapping.mapped_ids:
        mapping = map_categories(sides.onnx.spec.categories, truth.categories, "id")
    if not mapping.mapped_ids:
        raise ParityError(f"categories: {mapping.problem}. Correct the category map, or the annotations.")
    masks = "masks" in sides.onnx.family.capabilities and truth.has_masks
    asked = Options(
        score_threshold=max(0.001, sides.onnx.spec.serving.min_score_threshold),
        max_detections=100,
        masks=masks,
    )
    entries = [entry for entry in truth.images if entry.id in files]
    eager = EagerAnswerer(sides.eager, asked=asked)
    results: dict[str, list[dict[str, Any]]] = {}
    answers: list[Answer] = []
    for number, entry in enumerate(entries, 1):
        (reply,) = eager.ask([files[entry.id].read_bytes()])
        if not isinstance(reply, Detections):
            raise ParityError(f"eager fails on {entry.file_name}: {reply}")
        answers.append(Answer(entry.id, entry.file_name, detections=reply))
        on_progress("AP of eager", number, len(entries))
    results["eager"] = coco_results(answers, mapping.category_ids)
    for name, detector in (("torch", sides.torch), ("onnx", sides.onnx)):

        def told(count: int, name: str = name) -> None:
            on_progress(f"AP of {name}", count, len(entries))

        found = detect_all(detector, entries, files, asked, on_answer=told)
        results[name] = coco_results(found, mapping.category_ids)
    ids = [entry.id for entry in entries]
    kinds: tuple[IouType, ...] = ("bbox", "segm") if masks else ("bbox",)
    return tuple(
        ApCheck(
            kind,
            compare_coco(truth, results["eager"], results["onnx"], iou_type=kind, image_ids=ids),
            evaluate_coco(truth, results["torch"], iou_type=kind, image_ids=ids).ap,
            budget,
            len(ids),
        )
        for kind in kinds
    )
