"""MMDetection's detectors behind a real TorchServe: eight mixed images in one batch equal eager, and each one alone.

From CONFIG.py and CHECKPOINT.pth, as a training leaves them. Some models share a server.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from builder_parity import worst
from dethandlers.detections import Detections
from detserve.archive import build_archive
from detserve.client import Client
from detserve.detecting_client import parse_detections
from detserve.eager_mmdet import load_mmdet
from detserve.mmdet_source import mmdet_spec_categories
from detserve.spec import parse_spec
from mmdet_models import IMAGES, MAX_DETECTIONS, RandomModel, mmdet_warnings, needs_mmdet, random_model

MASKS = ("mask_rcnn", "rtmdet_ins")
EVERY_CHANGE = [("yolox", "rtmdet_ins", "mask_rcnn"), ("fcos", "detr")]
NIGHTLY = [("faster_rcnn", "cascade_rcnn", "retinanet", "atss"), ("yolov3", "rtmdet", "ssd", "deformable_detr", "dino")]
# Long enough for eight requests of one burst, short enough for eight single ones.
SERVING = {"batch_size": 8, "max_batch_delay_ms": 400, "threads": 1, "response_timeout_s": 300}

pytestmark = [needs_mmdet, *mmdet_warnings, pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As many threads as the workers have: more of them sum in another order, and random weights amplify that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Served:
    """A server with some models, and what each was made of."""

    instance: str
    models: dict[str, RandomModel]


@pytest.fixture(
    scope="module",
    params=EVERY_CHANGE + [pytest.param(group, marks=pytest.mark.nightly) for group in NIGHTLY],
    ids=lambda group: "-".join(group),
)
def served(request, tmp_path_factory, serve):
    folder = tmp_path_factory.mktemp("mmdet")
    models, archives = {}, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in request.param:
            model = models[name] = random_model(name, folder)
            categories = [vars(one) for one in mmdet_spec_categories(model.config, model.checkpoint)]
            limits = {"score_threshold": model.score_threshold, "max_detections": MAX_DETECTIONS}
            described = {"name": name, "family": "mmdet", "config": model.config.name, "categories": categories}
            spec = parse_spec(described | {"serving": SERVING | limits}, where="test", folder=folder)
            out = folder / f"{name}.mar"
            archives.append(build_archive(spec, folder=folder, out=out, weights=model.checkpoint).path)
    return Served(serve(archives, request.param[0].replace("_", "-")), models)


def test_a_batch_of_mixed_images_equals_eager_and_each_image_alone(served):
    """One test for the models of a server, so that only one of them is in memory here at a time."""
    wrong = {}
    for name, model in served.models.items():
        faults = _differences(served.instance, name, model)
        if faults:
            wrong[name] = faults
    assert wrong == {}


def _differences(instance: str, name: str, model: RandomModel) -> list[str]:
    eager = load_mmdet(model.config, model.checkpoint)
    reference = [eager.detect(one, model.score_threshold, MAX_DETECTIONS, masks=True) for one in IMAGES]
    assert min(len(found) for found in reference) >= 20
    for found in reference:
        assert len(np.unique(found.scores)) == len(found)
        assert (found.masks is not None) == (name in MASKS)
    together, single = _together_and_alone(instance, name)

    against_eager = worst(reference, together, model.score_threshold)
    invariance = worst(single, together, model.score_threshold)
    held = {
        "as many detections as eager": [len(one) for one in together] == [len(one) for one in reference],
        "each has its partner in eager": (against_eager.unmatched, against_eager.flips) == (0, 0),
        "boxes": against_eager.box_px <= 0.1,
        "scores": against_eager.score <= 1e-3,
        "masks": against_eager.every_mask_iou >= 0.99,
        "each has its partner alone": (invariance.unmatched, invariance.flips) == (0, 0),
        "boxes alone": invariance.box_px <= 0.01,
        "scores alone": invariance.score <= 1e-5,
        "masks alone": invariance.every_mask_iou >= 0.99,
    }
    wrong = [what for what, holds in held.items() if not holds]
    return [*wrong, str(against_eager), str(invariance)] if wrong else []


def _together_and_alone(instance: str, name: str) -> tuple[list[Detections], list[Detections]]:
    """The images' detections when all were sent at once, and when each was sent by itself."""
    options = {"timings": True, "masks": "rle" if name in MASKS else "none"}

    def ask(image: bytes) -> dict:
        with Client.for_instance(instance) as client:
            return client.predict(name, image, options=options)

    for _ in range(3):  # again when the first requests left in a batch of their own
        with ThreadPoolExecutor(len(IMAGES)) as pool:
            batch = list(pool.map(ask, IMAGES))
        if all(answer["batch_size"] == len(IMAGES) for answer in batch):
            break
    alone = [ask(image) for image in IMAGES]
    assert [answer["batch_size"] for answer in batch] == [len(IMAGES)] * len(IMAGES)
    assert [answer["batch_size"] for answer in alone] == [1] * len(IMAGES)
    assert max(answer["forward_size"] for answer in batch) > 1
    assert max(answer["forward_size"] for answer in alone) == 1
    together, single = ([parse_detections(answer["detections"]) for answer in one] for one in (batch, alone))
    return together, single
