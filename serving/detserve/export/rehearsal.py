"""Before a file is written: the worker's own detector runs it, and must find what eager finds.

On the golden image as it is, smaller, turned and cut, alone and together: another size is another padded shape, and a
batch is another path through the graph.
"""

import io
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from dethandlers.artefact import Artefact, Golden
from dethandlers.detector import Detector, Request
from dethandlers.errors import DetectorError, RequestError
from dethandlers.golden import TOLERANCES, Tolerance, describe_drift
from dethandlers.options import Options
from dethandlers.spec import Precision, Spec
from PIL import Image, ImageOps

from detserve.eager import EagerModel
from detserve.errors import ExportError

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
    """

    drift: str
    images: int
    detections: int
    sizes: tuple[tuple[int, int], ...]


def rehearse(content: bytes, spec: Spec, golden: Golden, eager: EagerModel) -> Rehearsal:
    """Run a file by the worker's code, each image alone and all in one batch.

    Raises:
        ExportError: the file cannot be run.
    """
    images = [golden.image, *variants(golden.image)]
    threshold, most = golden.score_threshold, golden.max_detections
    reference = [eager.detect(image, threshold, most) for image in images]
    requests = [Request(image, Options(score_threshold=threshold, max_detections=most)) for image in images]
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
            alone = [answer for request in requests for answer in detector.detect([request])]
            together = detector.detect(requests)
        finally:
            detector.close()
    tolerance = EXPORT_TOLERANCES[spec.serving.precision]
    sizes = []
    drift = ""
    for place, (one, other) in enumerate(zip(alone, together, strict=True)):
        for answer, way in ((one, "alone"), (other, "in a batch")):
            if isinstance(answer, RequestError):
                raise ExportError(f"the exported file fails on an image: {answer.message}")
            found = describe_drift(reference[place], answer.detections, threshold, tolerance, spec.categories)
            if found and not drift:
                width, height = answer.image_size
                drift = f"{found} (at {width}×{height} px, {way})"
            if way == "alone":
                sizes.append(answer.image_size)
    return Rehearsal(drift, len(images), sum(len(one) for one in reference), tuple(sizes))


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
