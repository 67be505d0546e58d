"""Classes of the model that the category map lacks take no detection's place: the best of the known ones are found.

The definition they are held to: everything that torchvision finds, without what the map lacks, cut at the number asked.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from builder_parity import spec_of
from dethandlers.artefact import Artefact
from dethandlers.detections import Category, Detections
from dethandlers.detector import Answer, Detector, Request
from dethandlers.families.torchvision_detection import TorchvisionFamily
from dethandlers.options import Options
from dethandlers.spec import Spec
from detserve.eager import TorchvisionEager, eager_from_file
from detserve.eager_exported import ExportedEager
from detserve.export.onnx_file import described_artefact
from random_detectors import MAX_DETECTIONS, class_count, model_labels

SSDLITE = "ssdlite320_mobilenet_v3_large"
FASTER_RCNN = "fasterrcnn_mobilenet_v3_large_320_fpn"
FCOS, MASK_RCNN = "fcos_resnet50_fpn", "maskrcnn_resnet50_fpn"
CASES = [
    (SSDLITE, "torch"),
    (SSDLITE, "host"),
    (SSDLITE, "graph"),
    (FASTER_RCNN, "torch"),
    (FASTER_RCNN, "graph"),
    *(
        pytest.param(builder, runtime, marks=mark)
        for builder, runtime, mark in (
            (FCOS, "torch", pytest.mark.slow),
            (FCOS, "host", pytest.mark.slow),
            (FCOS, "graph", pytest.mark.nightly),
            (MASK_RCNN, "torch", pytest.mark.slow),
            (MASK_RCNN, "graph", pytest.mark.slow),
        )
    ),
]
WANTED = (1, 3, 7)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Defined:
    """What eager finds with the whole map, and the map without the class of its best detection."""

    every: Detections
    model_labels: np.ndarray
    known: tuple[Category, ...]

    def best(self, most):
        """The ``most`` best of known classes, and their labels as the model counts them."""
        places = np.flatnonzero(self.model_labels != self.model_labels[0])[:most]
        assert len(places) == most
        return self.every.take(places), self.model_labels[places]


@pytest.fixture(scope="module")
def defined(shelf):
    """The definition for a builder, on the first image."""

    @cache
    def of(builder):
        detector = shelf.detector(builder)
        spec = spec_of(detector, builder, shelf.folder)
        every = TorchvisionEager(spec, detector.state, source="test").detect(
            shelf.images[0], detector.score_threshold, MAX_DETECTIONS, masks=builder == MASK_RCNN
        )
        assert len(every) < MAX_DETECTIONS
        labels = np.array([spec.categories[label].model_label for label in every.labels])
        return Defined(every, labels, tuple(one for one in spec.categories if one.model_label != labels[0]))

    return of


def assert_as_defined(found, categories, expected, *, box_px=0.1, score=1e-3):
    detections, labels = expected
    assert [categories[label].model_label for label in found.labels] == labels.tolist()
    assert np.abs(found.scores - detections.scores).max() <= score
    assert np.abs(found.boxes_xyxy - detections.boxes_xyxy).max() <= box_px
    assert (found.masks is None) == (detections.masks is None)
    if found.masks is not None:
        assert [mask["size"] for mask in found.masks] == [mask["size"] for mask in detections.masks]


@contextmanager
def detector_of(shelf, builder, runtime, known):
    """A worker's detector whose category map lacks classes of the model."""
    if runtime == "torch":
        spec = spec_of(shelf.detector(builder), builder, shelf.folder)
        spec = replace(spec, categories=known)
        detector = Detector(Artefact(shelf.folder, spec, shelf.folder / spec.weights, None), torch.device("cpu"))
        yield detector
        detector.close()
        return
    with described_artefact(shelf.exported(builder, runtime).path) as artefact:
        spec = replace(artefact.spec, categories=known)
        detector = Detector(replace(artefact, spec=spec, golden=None), torch.device("cpu"))
        yield detector
        detector.close()


@pytest.mark.parametrize(("builder", "runtime"), CASES)
def test_the_best_of_the_known_are_found_alone_and_beside_a_request_for_more(shelf, defined, builder, runtime):
    image, threshold = shelf.images[0], shelf.detector(builder).score_threshold
    masks = builder == MASK_RCNN
    loose = Request(image, Options(score_threshold=threshold, max_detections=200, masks=masks))
    with detector_of(shelf, builder, runtime, defined(builder).known) as detector:
        for most in WANTED:
            one = Request(image, Options(score_threshold=threshold, max_detections=most, masks=masks))
            (alone,) = detector.detect([one])
            beside, _ = detector.detect([one, loose])
            assert isinstance(alone, Answer)
            expected = defined(builder).best(most)
            for answer in (alone, beside):
                assert_as_defined(answer.detections, detector.spec.categories, expected)


@pytest.mark.parametrize("builder", [SSDLITE, FASTER_RCNN, pytest.param(MASK_RCNN, marks=pytest.mark.slow)])
def test_eager_finds_the_best_of_the_known(shelf, defined, builder):
    detector = shelf.detector(builder)
    spec = spec_of(detector, builder, shelf.folder)
    spec = replace(spec, categories=defined(builder).known)
    eager = TorchvisionEager(spec, detector.state, source="test")
    for most in WANTED:
        expected = defined(builder).best(most)
        found = eager.detect(shelf.images[0], detector.score_threshold, most, masks=builder == MASK_RCNN)
        assert_as_defined(found, spec.categories, expected, box_px=0.0, score=0.0)
        if found.masks is not None:
            assert found.masks == expected[0].masks


@pytest.mark.parametrize(("builder", "nms"), [(SSDLITE, "host"), (SSDLITE, "graph"), (FASTER_RCNN, "graph")])
def test_the_file_read_plainly_finds_the_best_of_the_known(shelf, defined, builder, nms):
    exported = shelf.exported(builder, nms)
    spec = replace(exported.spec, categories=defined(builder).known)
    plain = ExportedEager(spec, exported.path, source="test")
    threshold = shelf.detector(builder).score_threshold
    for most in WANTED:
        expected = defined(builder).best(most)
        found = plain.detect(shelf.images[0], threshold, most)
        assert_as_defined(found, spec.categories, expected)
    assert len(eager_from_file(exported.path).detect(shelf.images[0], threshold, 7)) == 7


@pytest.mark.parametrize("builder", [SSDLITE, FASTER_RCNN, FCOS, "retinanet_resnet50_fpn", MASK_RCNN])
def test_a_family_knows_whether_its_map_lacks_a_class(builder):
    """Of those with a background, 0 is none that the map could lack."""
    categories = tuple(Category(label, f"class {label}", label) for label in model_labels(builder))
    spec = Spec("x", "torchvision", categories, builder=builder, num_classes=class_count(builder))
    assert not TorchvisionFamily(spec).drops_classes
    assert TorchvisionFamily(replace(spec, categories=categories[1:])).drops_classes
    assert TorchvisionFamily(replace(spec, categories=categories[:-1])).drops_classes
