"""Every torchvision builder exported to ONNX: the worker finds in the file what eager finds in the checkpoint."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from builder_parity import worst
from dethandlers.detections import Detections
from dethandlers.detector import Answer, Detector, Request
from dethandlers.families.torchvision_detection import builders
from dethandlers.options import Options
from dethandlers.spec import Spec
from detserve.eager import TorchvisionEager
from detserve.errors import ExportError
from detserve.export.exporters import ExportOptions
from detserve.export.model import export_model
from detserve.export.onnx_file import described_artefact
from exported_demo import detect
from PIL import Image
from random_detectors import MAX_DETECTIONS, OPTIONS

ONE_STAGE = [builder for builder in sorted(OPTIONS) if not builder.startswith(("faster", "mask", "keypoint"))]
CASES = [
    (builder, nms) for builder in sorted(OPTIONS) for nms in (("host", "graph") if builder in ONE_STAGE else ("graph",))
]
# One of each kind of post-processing; `make nightly` takes the others.
EVERY_CHANGE = {
    ("fasterrcnn_mobilenet_v3_large_320_fpn", "graph"),
    ("fcos_resnet50_fpn", "host"),
    ("maskrcnn_resnet50_fpn", "graph"),
    ("retinanet_resnet50_fpn", "graph"),
    ("ssdlite320_mobilenet_v3_large", "host"),
    ("ssdlite320_mobilenet_v3_large", "graph"),
}


def _nightly(*values, every_change: bool):
    """A case that runs with every change, or at night only."""
    return pytest.param(*values, marks=() if every_change else pytest.mark.nightly)


# The fixtures make detectors and export them: minutes on two busy cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@dataclass(frozen=True)
class Reference:
    """What eager finds in the images at the file's own threshold, and what it finds at a lower one."""

    own: list[Detections]
    lower: list[Detections]
    lower_threshold: float


@dataclass(frozen=True)
class Case:
    """One exported file, loaded as the worker loads it, and the reference."""

    builder: str
    detector: Detector
    reference: Reference
    threshold: float

    @property
    def asked(self) -> Options:
        return asked_of(self.builder, self.threshold)

    def found(self, images: list[bytes], batch_size: int, options: list[Options]) -> list[Detections]:
        requests = [Request(image, one) for image, one in zip(images, options, strict=True)]
        answers = []
        for start in range(0, len(requests), batch_size):
            answers += self.detector.detect(requests[start : start + batch_size])
        assert all(isinstance(answer, Answer) for answer in answers), answers
        return [answer.detections for answer in answers]


def asked_of(builder: str, threshold: float) -> Options:
    return Options(threshold, MAX_DETECTIONS, masks="maskrcnn" in builder, keypoints="keypointrcnn" in builder)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """More threads sum in another order, and random weights amplify that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def references(shelf):
    """Made once for a builder, whose two files come one after the other."""
    known: dict[str, Reference] = {}

    def of(builder: str, spec: Spec) -> Reference:
        if builder not in known:
            detector = shelf.detector(builder)
            eager = TorchvisionEager(spec, detector.state, source="test")
            asked = asked_of(builder, detector.score_threshold)
            own = [
                eager.detect(image, asked.score_threshold, MAX_DETECTIONS, masks=asked.masks, keypoints=asked.keypoints)
                for image in shelf.images
            ]
            more = [eager.detect(image, 0.7 * asked.score_threshold, MAX_DETECTIONS) for image in shelf.images]
            lower = gap_below(asked.score_threshold, more)
            known[builder] = Reference(own, [one.filtered(lower, MAX_DETECTIONS) for one in more], lower)
        return known[builder]

    return of


def gap_below(threshold: float, found: list[Detections]) -> float:
    """A lower threshold, in the widest gap between two scores there."""
    scores = np.sort(np.concatenate([one.scores for one in found]))
    scores = scores[scores < threshold]
    place = int(np.diff(scores).argmax())
    return float(scores[place] + scores[place + 1]) / 2


@pytest.fixture(
    scope="module", params=[_nightly(case, every_change=case in EVERY_CHANGE) for case in CASES], ids="-".join
)
def case(request, shelf, references) -> Iterator[Case]:
    builder, nms = request.param
    exported = shelf.exported(builder, nms)
    with described_artefact(exported.path) as artefact:
        serving = replace(artefact.spec.serving, threads=1)
        loaded = Detector(replace(artefact, spec=replace(artefact.spec, serving=serving)), torch.device("cpu"))
    yield Case(builder, loaded, references(builder, exported.spec), exported.spec.serving.score_threshold)
    loaded.close()


def test_every_builder_of_torchvision_is_exported():
    assert sorted({builder for builder, _ in CASES}) == builders()
    assert set(CASES) >= EVERY_CHANGE


@pytest.mark.parametrize(("batch_size", "part"), [(1, slice(3)), (3, slice(2, 8)), (8, slice(8))], ids=["1", "3", "8"])
def test_it_equals_eager_alone_and_in_batches_of_mixed_sizes(case, shelf, batch_size, part):
    images, reference = shelf.images[part], case.reference.own[part]
    assert min(len(found) for found in reference) >= 20
    assert all(len(np.unique(found.scores)) == len(found) for found in reference)

    found = case.found(images, batch_size, [case.asked] * len(images))

    differences = worst(reference, found, case.threshold)
    assert (differences.unmatched, differences.flips) == (0, 0)
    assert differences.box_px <= 0.1
    assert differences.score <= 1e-3
    assert differences.mask_iou >= 0.99
    assert differences.moved_masks <= 2
    if case.asked.masks:
        assert all(one.masks is not None and len(one.masks) == len(one) for one in found)
    if case.asked.keypoints:
        distances = np.concatenate([keypoint_distances(*pair) for pair in zip(reference, found, strict=True)])
        # A keypoint is where a heat map is highest, and the map of a random head has several points of nearly the
        # same height: rounding moves a few from one to another, however far. All others have to stay.
        assert len(distances) >= 20 * 5 * len(images)
        assert (distances <= 0.1).mean() >= 0.99, distances.max()


def keypoint_distances(reference: Detections, found: Detections) -> np.ndarray:
    """Largest coordinate difference of each keypoint; both sides are sorted by score and hold the same objects."""
    return np.abs(reference.keypoints[..., :2] - found.keypoints[..., :2]).max(axis=-1).ravel()


def test_each_request_of_a_batch_has_its_own_threshold_and_number(case, shelf):
    """Nothing at all, one, fewer and more than the file's own threshold gives, side by side in one batch."""
    lower = case.reference.lower_threshold
    own, most = case.threshold, MAX_DETECTIONS
    asked = [(own, most), (1.0, most), (lower, most), (own, 1), (own, 7), (lower, 1), (1.0, 1), (lower, most)]
    # Greedy suppression goes by score: what eager finds at a higher threshold is the better part of this.
    reference = [one.filtered(*which) for one, which in zip(case.reference.lower, asked, strict=True)]

    found = case.found(shelf.images, 8, [Options(threshold, number) for threshold, number in asked])

    counts = [len(one) for one in found]
    assert counts == [len(one) for one in reference]
    assert (counts[1], counts[3], counts[4], counts[5], counts[6]) == (0, 1, 7, 1, 0)
    assert min(counts[2], counts[7]) > 22
    differences = worst(reference, found, lower)
    assert (differences.unmatched, differences.flips) == (0, 0)
    assert differences.box_px <= 0.1
    assert differences.score <= 1e-3


def test_where_there_is_nothing_the_list_is_empty(case, shelf):
    """Alone, where no detection at all goes through the second stage's heads, and with masks and keypoints."""
    nothing = replace(case.asked, score_threshold=1.0)
    (found,) = case.found(shelf.images[:1], 1, [nothing])
    assert len(found) == 0
    assert found.boxes_xyxy.shape == (0, 4)
    assert found.masks == ([] if nothing.masks else None)
    assert (found.keypoints is not None and len(found.keypoints) == 0) or not nothing.keypoints


def picture(width: int, height: int) -> bytes:
    rng = np.random.default_rng(width * height)
    blocks = rng.integers(0, 255, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("builder", "nms"),
    [("fasterrcnn_mobilenet_v3_large_320_fpn", "graph"), _nightly("fcos_resnet50_fpn", "graph", every_change=False)],
)
def test_strips_and_tiny_images_are_no_exception(shelf, builder, nms):
    """Some feature maps are one cell high there, and some levels have fewer candidates than are kept."""
    exported = shelf.exported(builder, nms)
    threshold = exported.spec.serving.score_threshold
    eager = TorchvisionEager(exported.spec, shelf.detector(builder).state, source="test")
    images = [picture(*size) for size in ((8, 600), (600, 8), (2000, 40), (9, 9), (320, 192), (321, 193))]
    reference = [eager.detect(image, threshold, MAX_DETECTIONS) for image in images]
    found = detect(exported.path, images, Options(threshold, MAX_DETECTIONS), batch_size=len(images))
    assert [len(one) for one in found] == [len(one) for one in reference]
    assert sum(map(len, found)) > 100
    differences = worst(reference, found, threshold)
    assert (differences.unmatched, differences.flips) == (0, 0)
    assert differences.box_px <= 0.1
    assert differences.score <= 1e-3


@pytest.mark.parametrize(
    "builder",
    [
        _nightly(builder, every_change=(builder, "graph") in EVERY_CHANGE)
        for builder in sorted(OPTIONS)
        if builder not in ONE_STAGE
    ],
)
def test_a_two_stage_model_with_nms_outside_is_refused_with_the_reason(builder, shelf, tmp_path):
    spec = replace(
        shelf.exported(builder, "graph").spec, runtime="torch", weights=str(shelf.folder / f"{builder}.safetensors")
    )
    with pytest.raises(ExportError, match="second stage needs the kept proposals inside the graph"):
        export_model(spec, folder=shelf.folder, out=tmp_path / "x.onnx", options=ExportOptions(nms="host"))
    assert list(tmp_path.iterdir()) == []
