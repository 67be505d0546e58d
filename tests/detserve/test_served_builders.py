"""Every torchvision builder behind a real TorchServe: eight images of eight sizes in one batch equal eager, and alone.

As safetensors by the torch runtime, and as the exported ONNX file. Few builders share a server: each takes two workers,
of one to two gigabytes.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from builder_parity import spec_of, worst
from dethandlers.detections import Detections
from dethandlers.detector import Detector, Request
from dethandlers.families.torchvision_detection import builders
from dethandlers.options import Options
from detserve.archive import build_archive
from detserve.client import Client
from detserve.detecting_client import parse_detections
from detserve.eager import TorchvisionEager
from detserve.export.onnx_file import described_artefact, require_described
from random_detectors import MAX_DETECTIONS, OPTIONS

EVERY_CHANGE = ("fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn", "ssdlite320_mobilenet_v3_large")
_OTHERS = [builder for builder in sorted(OPTIONS) if builder not in EVERY_CHANGE]
NIGHTLY = [tuple(_OTHERS[start : start + 3]) for start in range(0, len(_OTHERS), 3)]
# Long enough for eight requests of one burst, short enough for eight single ones.
BATCH_DELAY_MS = 400


each_builder = pytest.mark.parametrize(
    ("served", "builder"),
    [
        pytest.param(group, builder, id=builder, marks=() if group == EVERY_CHANGE else pytest.mark.nightly)
        for group in (EVERY_CHANGE, *NIGHTLY)
        for builder in group
    ],
    indirect=["served"],
    scope="module",
)


def test_every_builder_of_torchvision_is_tested():
    assert sorted(OPTIONS) == builders()
    assert sorted((*EVERY_CHANGE, *(builder for group in NIGHTLY for builder in group))) == builders()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As many threads as the workers have: more of them sum in another order, and random weights amplify that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SERVING = {"batch_size": 8, "max_batch_delay_ms": BATCH_DELAY_MS, "threads": 1}


@dataclass(frozen=True)
class Served:
    """A server with some builders, each as a torch archive and, as NAME_onnx, as an archive of the exported file."""

    instance: str


@pytest.fixture(scope="module")
def images(shelf):
    return shelf.images


@pytest.fixture(scope="module")
def served(request, tmp_path_factory, shelf, serve):
    folder = tmp_path_factory.mktemp("builders")
    archives = []
    for builder in request.param:
        spec = spec_of(shelf.detector(builder), builder, folder, **SERVING)
        archives.append(build_archive(spec, folder=folder, out=folder / f"{builder}.mar").path)
        # Of the file alone: what the archive needs is inside.
        file = exported(shelf, builder).path
        described = require_described(file)
        spec = replace(described.spec, name=f"{builder}_onnx", serving=replace(described.spec.serving, **SERVING))
        out = folder / f"{builder}_onnx.mar"
        archives.append(build_archive(spec, folder=folder, out=out, weights=file, golden=described.golden).path)
    return Served(serve(archives, request.param[0]))


def exported(shelf, builder):
    """One-stage models as they are exported when nothing is said: with suppression in the detector."""
    two_stage = builder.startswith(("faster", "mask", "keypoint"))
    return shelf.exported(builder, "graph" if two_stage else "host")


@pytest.fixture(scope="module")
def reference(shelf, images):
    """Eager's detections of the images, for one builder after the other."""
    known: dict[str, list[Detections]] = {}

    def of(builder: str) -> list[Detections]:
        if builder not in known:
            detector = shelf.detector(builder)
            eager = TorchvisionEager(exported(shelf, builder).spec, detector.state, source="test")
            known[builder] = [
                eager.detect(image, detector.score_threshold, MAX_DETECTIONS, **wanted(builder)) for image in images
            ]
        return known[builder]

    return of


def wanted(builder: str) -> dict[str, bool]:
    return {"masks": "maskrcnn" in builder, "keypoints": "keypointrcnn" in builder}


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.timeout(1500)  # the fixture makes three detectors, exports them and starts six workers
@each_builder
def test_a_batch_of_eight_sizes_equals_eager_and_each_image_alone(served, shelf, images, reference, builder):
    threshold = exported(shelf, builder).spec.serving.score_threshold
    together, single = _together_and_alone(served.instance, builder, builder, images)
    assert min(len(found) for found in reference(builder)) >= 20
    for found in reference(builder):
        assert len(np.unique(found.scores)) == len(found)

    against_eager = worst(reference(builder), together, threshold)
    assert (against_eager.unmatched, against_eager.flips) == (0, 0)
    assert against_eager.box_px <= 0.05
    assert against_eager.score <= 1e-4
    assert against_eager.every_mask_iou >= 0.99
    assert against_eager.keypoint_px <= 0.05

    invariance = worst(single, together, threshold)
    assert (invariance.unmatched, invariance.flips) == (0, 0)
    assert invariance.box_px <= 0.01
    assert invariance.score <= 1e-5


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.timeout(1500)  # the fixture makes three detectors, exports them and starts six workers
@each_builder
def test_exported_it_equals_itself_in_process_and_eager(served, shelf, images, reference, builder):
    threshold = exported(shelf, builder).spec.serving.score_threshold
    together, single = _together_and_alone(served.instance, builder, f"{builder}_onnx", images)

    in_process = worst(_in_process(exported(shelf, builder).path, builder, images, threshold), together, threshold)
    assert (in_process.unmatched, in_process.flips) == (0, 0)
    assert in_process.box_px <= 0.01
    assert in_process.score <= 1e-5
    assert in_process.mask_iou >= 0.99
    assert in_process.moved_masks <= 2

    invariance = worst(single, together, threshold)
    assert (invariance.unmatched, invariance.flips) == (0, 0)
    assert invariance.box_px <= 0.01
    assert invariance.score <= 1e-5

    against_eager = worst(reference(builder), together, threshold)
    assert (against_eager.unmatched, against_eager.flips) == (0, 0)
    assert against_eager.box_px <= 0.1
    assert against_eager.score <= 1e-3
    assert against_eager.mask_iou >= 0.99
    assert against_eager.moved_masks <= 2


def _in_process(file, builder, images, threshold):
    """What the worker's code finds in the exported file, all images in one batch."""
    with described_artefact(file) as artefact:
        serving = replace(artefact.spec.serving, **SERVING)
        detector = Detector(replace(artefact, spec=replace(artefact.spec, serving=serving)), torch.device("cpu"))
    options = Options(threshold, MAX_DETECTIONS, **wanted(builder))
    answers = detector.detect([Request(image, options) for image in images])
    detector.close()
    return [answer.detections for answer in answers]


def _together_and_alone(instance, builder, model, images):
    """The images' detections when all were sent at once, and when each was sent by itself."""
    asked = wanted(builder)
    options = {"timings": True, "masks": "rle" if asked["masks"] else "none", "keypoints": asked["keypoints"]}
    batch = _burst(instance, model, images, options)
    with Client.for_instance(instance) as client:
        alone = [client.predict(model, image, options=options) for image in images]
    assert [answer["batch_size"] for answer in batch] == [8] * 8
    assert [answer["batch_size"] for answer in alone] == [1] * 8
    assert max(answer["forward_size"] for answer in batch) > 1
    together, single = ([parse_detections(answer["detections"]) for answer in one] for one in (batch, alone))
    if asked["masks"]:
        assert all(found.masks is not None for found in together)
    if asked["keypoints"]:
        assert all(found.keypoints is not None for found in together)
    return together, single


def _burst(instance: str, model: str, images: list[bytes], options: dict[str, object]) -> list[dict[str, object]]:
    """Send all at once; again when the first requests left in a batch of their own."""

    def ask(image: bytes) -> dict[str, object]:
        with Client.for_instance(instance) as client:
            return client.predict(model, image, options=options)

    for _ in range(3):
        with ThreadPoolExecutor(len(images)) as pool:
            answers = list(pool.map(ask, images))
        if all(answer["batch_size"] == len(images) for answer in answers):
            break
    return answers
