"""Before a file is written: the worker's own detector runs it, and must find what eager finds.

On the golden image as it is, smaller, turned and cut, alone and together: another size is another padded shape, and a
batch is another path through the graph. Masks and keypoints are compared too, where the model has them.
"""

import io
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from dethandlers.artefact import Artefact, Golden
from dethandlers.detections import Detections, Rle
from dethandlers.detector import Detector, Request
from dethandlers.errors import DetectorError, RequestError
from dethandlers.golden import TOLERANCES, Tolerance, describe_drift
from dethandlers.options import Options
from dethandlers.spec import Precision, Spec
from PIL import Image, ImageOps

from detserve.eager import EagerModel
from detserve.errors import ExportError

LEAST_MASK_IOU: dict[Precision, float] = {"fp32": 0.99, "fp16": 0.9, "bf16": 0.9}
KEYPOINT_PX: dict[Precision, float] = {"fp32": 0.5, "fp16": 2.0, "bf16": 4.0}
LEAST_AGREEING = 0.9
"""Share of the masks, and of the keypoints, that must agree. A mask is pasted into whole pixels: where a corner lies
between two, rounding decides, and a small mask moves by much of itself. A keypoint is where a heat map is highest:
where two places are nearly so, rounding decides. What is wrong with an export is wrong with most of them.
"""
EXPORT_TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance("fp32", box_px=0.1, score=1e-3),
    "fp16": TOLERANCES["fp16"],
    "bf16": TOLERANCES["bf16"],
}


@dataclass(frozen=True)
class Rehearsal:
    """How the file did.

    Attributes:
        drift: the first difference beyond the tolerance, as a sentence; empty when there is none.
        images: how many images were compared.
        detections: how many of eager's detections they hold.
        sizes: their ``(width, height)``, px.
        box_px, score: the largest differences between partners.
        compared: what was: ``boxes``, and ``masks`` and ``keypoints`` where the model has them.
    """

    drift: str
    images: int
    detections: int
    sizes: tuple[tuple[int, int], ...]
    box_px: float
    score: float
    compared: tuple[str, ...]


def rehearse(content: bytes, spec: Spec, golden: Golden, eager: EagerModel) -> Rehearsal:
    """Run a file by the worker's code, each image alone and all in one batch.

    Raises:
        ExportError: the file cannot be run.
    """
    images = [golden.image, *variants(golden.image)]
    threshold, most = golden.score_threshold, golden.max_detections
    serving = replace(spec.serving, device="cpu", jpeg_decoder="cpu")
    with tempfile.TemporaryDirectory(prefix="detserve-") as folder:
        weights = Path(folder, "model.onnx")
        weights.write_bytes(content)
        try:
            detector = Detector(
                Artefact(Path(folder), replace(spec, serving=serving), weights, golden), torch.device("cpu")
            )
        except DetectorError as error:
            raise ExportError(f"the exported file cannot be run: {error}") from error
        try:
            has = detector.family.capabilities
            asked = Options(threshold, most, masks="masks" in has, keypoints="keypoints" in has)
            requests = [Request(image, asked) for image in images]
            alone = [answer for request in requests for answer in detector.detect([request])]
            together = detector.detect(requests)
        finally:
            detector.close()
    reference = [eager.detect(image, threshold, most, masks=asked.masks, keypoints=asked.keypoints) for image in images]
    tolerance = EXPORT_TOLERANCES[spec.serving.precision]
    drift, worst = "", (0.0, 0.0)
    sizes = []
    for place, answers in enumerate(zip(alone, together, strict=True)):
        for answer, way in zip(answers, ("alone", "in a batch"), strict=True):
            if isinstance(answer, RequestError):
                raise ExportError(f"the exported file fails on an image: {answer.message}")
            eagers, found = reference[place], answer.detections
            told = describe_drift(eagers, found, threshold, tolerance, spec.categories)
            partners = _partners(eagers, found, tolerance)
            told = told or _shape_drift(eagers, found, partners, spec)
            if told and not drift:
                width, height = answer.image_size
                drift = f"{told} (at {width}×{height} px, {way})"
            for one, other in partners:
                box_px = float(np.abs(eagers.boxes_xyxy[one] - found.boxes_xyxy[other]).max())
                score = abs(float(eagers.scores[one]) - float(found.scores[other]))
                worst = max(worst[0], box_px), max(worst[1], score)
        sizes.append(answers[0].image_size)  # type: ignore[union-attr] # no error came so far
    compared = ("boxes", *sorted(has))
    return Rehearsal(drift, len(images), sum(map(len, reference)), tuple(sizes), *worst, compared)


def _partners(eager: Detections, found: Detections, tolerance: Tolerance) -> list[tuple[int, int]]:
    """Pair detections of one class whose boxes and scores lie within the tolerance, the nearest first."""
    partners = []
    free = np.ones(len(found), dtype=np.bool_)
    for place in range(len(eager)):
        if not len(found):
            break
        distance = np.abs(found.boxes_xyxy - eager.boxes_xyxy[place]).max(axis=1)
        distance[~free | (found.labels != eager.labels[place])] = np.inf
        best = int(np.argmin(distance))
        if distance[best] <= tolerance.box_px:
            free[best] = False
            partners.append((place, best))
    return partners


def _shape_drift(eager: Detections, found: Detections, partners: list[tuple[int, int]], spec: Spec) -> str:
    """Compare the partners' masks and keypoints; return the first difference as a sentence."""
    precision = spec.serving.precision
    for kind in ("masks", "keypoints"):
        if (getattr(eager, kind) is None) != (getattr(found, kind) is None):
            return f"{kind} are on one side only"
    if not partners:
        return ""
    mine, theirs = (list(rows) for rows in zip(*partners, strict=True))
    if eager.masks is not None and found.masks is not None:
        pairs = [(eager.masks[one], found.masks[other]) for one, other in partners]
        share = float(np.mean([_overlap(*pair) >= LEAST_MASK_IOU[precision] for pair in pairs]))
        if share < LEAST_AGREEING:
            return f"only {100 * share:.0f} % of the masks overlap eager's by {LEAST_MASK_IOU[precision]:g} or more"
    if eager.keypoints is not None and found.keypoints is not None:
        apart = np.abs(eager.keypoints[mine][..., :2] - found.keypoints[theirs][..., :2]).max(axis=-1)
        share = float((apart <= KEYPOINT_PX[precision]).mean())
        if share < LEAST_AGREEING:
            return f"only {100 * share:.0f} % of the keypoints lie within {KEYPOINT_PX[precision]:g} px of eager's"
    return ""


def _overlap(one: Rle, other: Rle) -> float:
    """IoU of two masks; two that are equal, even empty, overlap fully."""
    from pycocotools import mask as coco_mask

    return 1.0 if one == other else float(coco_mask.iou([one], [other], [0])[0, 0])


def variants(image: bytes) -> list[bytes]:
    """Return the image smaller, turned by a quarter, and its upper left part; as PNG, so that nothing is lost."""
    with Image.open(io.BytesIO(image)) as opened:
        whole = ImageOps.exif_transpose(opened).convert("RGB")
    width, height = whole.size
    smaller = whole.resize((max(8, width * 2 // 3), max(8, height * 3 // 5)))
    part = whole.crop((0, 0, max(8, width * 3 // 4), max(8, height // 2)))
    return [_png(one) for one in (smaller, whole.transpose(Image.Transpose.ROTATE_90), part)]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, "PNG")
    return buffer.getvalue()
