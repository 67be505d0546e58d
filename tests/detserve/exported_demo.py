"""The demo model exported, and scenes to compare on: what the tests of the export share."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from checkout import ROOT
from dethandlers.detections import Detections
from dethandlers.detector import Answer, Detector, Request
from dethandlers.options import Options
from detserve.export.exporters import ExportOptions
from detserve.export.model import ExportedFile, export_model
from detserve.export.onnx_file import described_artefact
from detserve.spec import load_spec
from dettools.comparison import compare_image
from dettools.datasets.scenes import render_scene

SPEC = ROOT / "model_store" / "shapes" / "shapes.yaml"
CHECKPOINT = SPEC.with_name("shapes.safetensors")
DEFAULTS = Options(score_threshold=0.05, max_detections=100)


def export_demo(out: Path, **options: object) -> ExportedFile:
    """Export the demo model; options are those of ``ExportOptions``."""
    return export_model(load_spec(SPEC), folder=SPEC.parent, out=out, options=ExportOptions(**options))


def scenes(count: int, seed: int = 500) -> list[bytes]:
    """JPEG scenes of different sizes with the demo model's shapes."""
    encoded = []
    for number in range(count):
        scene = render_scene(seed + number)
        buffer = io.BytesIO()
        scene.image.save(buffer, "JPEG", quality=scene.jpeg_quality)
        encoded.append(buffer.getvalue())
    return encoded


@contextmanager
def worker_of(path: Path) -> Iterator[Detector]:
    """The file as the worker loads it."""
    with described_artefact(path) as artefact:
        serving = replace(artefact.spec.serving, threads=1)
        detector = Detector(replace(artefact, spec=replace(artefact.spec, serving=serving)), torch.device("cpu"))
        yield detector
        detector.close()


def detect(path: Path, images: list[bytes], options: Options = DEFAULTS, *, batch_size: int = 1) -> list[Detections]:
    """What the worker finds in the images."""
    with worker_of(path) as detector:
        answers = []
        for start in range(0, len(images), batch_size):
            answers += detector.detect([Request(image, options) for image in images[start : start + batch_size]])
    assert all(isinstance(answer, Answer) for answer in answers), answers
    return [answer.detections for answer in answers]


def differences(reference: list[Detections], found: list[Detections], options: Options = DEFAULTS) -> tuple:
    """Unpaired detections, and the largest differences in px and score; both lists may end at the threshold's edge."""
    unpaired, box_px, score = 0, 0.0, 0.0
    for one, other in zip(reference, found, strict=True):
        compared = compare_image(
            "", one, other, score_threshold=options.score_threshold, max_detections=options.max_detections
        )
        assert all(pair.same_label for pair in compared.pairs)
        lonely = [float(one.scores[i]) for i in compared.unmatched_eager]
        lonely += [float(other.scores[i]) for i in compared.unmatched_served]
        unpaired += sum(value > options.score_threshold + 1e-3 for value in lonely)
        box_px = max([box_px, *(pair.box_delta_px for pair in compared.pairs)])
        score = max([score, *(pair.score_delta for pair in compared.pairs)])
    return unpaired, box_px, score
