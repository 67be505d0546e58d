"""Every torchvision builder behind a real TorchServe: eight images of eight sizes in one batch equal eager, and alone.

Four builders share a server, so that twelve models never load at once.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from builder_parity import spec_of, worst
from dethandlers.families.torchvision_detection import builders
from detserve.archive import build_archive
from detserve.client import Client, parse_detections
from detserve.eager import TorchvisionEager
from random_detectors import MAX_DETECTIONS, OPTIONS, random_detector, random_images

GROUPS = [sorted(OPTIONS)[start : start + 4] for start in range(0, len(OPTIONS), 4)]
# Long enough for eight requests of one burst, short enough for eight single ones.
BATCH_DELAY_MS = 400


def test_every_builder_of_torchvision_is_tested():
    assert sorted(OPTIONS) == builders()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As many threads as the workers have: more of them sum in another order, and random weights amplify that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images():
    return random_images()


@pytest.fixture(scope="module", params=GROUPS, ids=lambda group: group[0].split("_")[0])
def served(request, tmp_path_factory, images, serve):
    folder = tmp_path_factory.mktemp("builders")
    detectors = {builder: random_detector(builder, images) for builder in request.param}
    specs = {
        builder: spec_of(detector, builder, folder, batch_size=8, max_batch_delay_ms=BATCH_DELAY_MS, threads=1)
        for builder, detector in detectors.items()
    }
    archives = [
        build_archive(spec, folder=folder, out=folder / f"{builder}.mar").path for builder, spec in specs.items()
    ]
    return serve(archives, request.param[0]), detectors, specs


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("place", range(4))
def test_a_batch_of_eight_sizes_equals_eager_and_each_image_alone(served, images, place):
    instance, detectors, specs = served
    builder = list(detectors)[place]
    detector, spec = detectors[builder], specs[builder]
    masks, keypoints = "maskrcnn" in builder, "keypointrcnn" in builder
    options = {"timings": True, "masks": "rle" if masks else "none", "keypoints": keypoints}

    batch = _burst(instance, builder, images, options)
    with Client.for_instance(instance) as client:
        alone = [client.predict(builder, image, options=options) for image in images]

    assert [answer["batch_size"] for answer in batch] == [8] * 8
    assert [answer["batch_size"] for answer in alone] == [1] * 8
    assert max(answer["forward_size"] for answer in batch) > 1
    eager = TorchvisionEager(spec, detector.state, source="test")
    reference = [
        eager.detect(image, detector.score_threshold, MAX_DETECTIONS, masks=masks, keypoints=keypoints)
        for image in images
    ]
    assert min(len(found) for found in reference) >= 20
    for found in reference:
        assert len(np.unique(found.scores)) == len(found)
    together = [parse_detections(answer["detections"]) for answer in batch]
    single = [parse_detections(answer["detections"]) for answer in alone]
    if masks:
        assert all(found.masks is not None for found in together)
    if keypoints:
        assert all(found.keypoints is not None for found in together)

    against_eager = worst(reference, together, detector.score_threshold)
    assert (against_eager.unmatched, against_eager.flips) == (0, 0)
    assert against_eager.box_px <= 0.05
    assert against_eager.score <= 1e-4
    assert against_eager.mask_iou >= 0.99
    assert against_eager.keypoint_px <= 0.05

    invariance = worst(single, together, detector.score_threshold)
    assert (invariance.unmatched, invariance.flips) == (0, 0)
    assert invariance.box_px <= 0.01
    assert invariance.score <= 1e-5


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
