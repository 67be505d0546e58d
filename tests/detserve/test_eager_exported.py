"""The reference for an exported file reads it plainly, and finds what torchvision finds in the checkpoint."""

import numpy as np
import onnx
import pytest
import torch
from builder_parity import worst
from detserve.eager import TorchvisionEager, eager_from_file, load_eager
from detserve.errors import CheckpointError, DetserveError, SpecError
from detserve.export.onnx_file import require_described
from exported_demo import CHECKPOINT, SPEC, differences, export_demo, scenes
from random_detectors import MAX_DETECTIONS

SSDLITE = "ssdlite320_mobilenet_v3_large"
FASTER_RCNN = "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("builder", "nms"),
    [
        (SSDLITE, "host"),
        (SSDLITE, "graph"),
        (FASTER_RCNN, "graph"),
        pytest.param("fcos_resnet50_fpn", "host", marks=pytest.mark.slow),
        pytest.param("fcos_resnet50_fpn", "graph", marks=pytest.mark.nightly),
        pytest.param("maskrcnn_resnet50_fpn", "graph", marks=pytest.mark.slow),
        pytest.param("keypointrcnn_resnet50_fpn", "graph", marks=pytest.mark.nightly),
    ],
)
def test_it_finds_what_torchvision_finds(shelf, builder, nms):
    exported = shelf.exported(builder, nms)
    detector = shelf.detector(builder)
    masks, keypoints = "maskrcnn" in builder, "keypointrcnn" in builder
    asked = {"masks": masks, "keypoints": keypoints}
    images = shelf.images[:4]
    eager = TorchvisionEager(exported.spec, detector.state, source="test")
    plain = eager_from_file(exported.path)

    expected = [eager.detect(image, detector.score_threshold, MAX_DETECTIONS, **asked) for image in images]
    found = [plain.detect(image, detector.score_threshold, MAX_DETECTIONS, **asked) for image in images]

    assert min(map(len, expected)) >= 20
    differs = worst(expected, found, detector.score_threshold)
    assert (differs.unmatched, differs.flips) == (0, 0)
    assert differs.box_px <= 0.1
    assert differs.score <= 1e-3
    assert differs.mask_iou >= 0.99
    for one, other in zip(expected, found, strict=True):
        assert (other.masks is None, other.keypoints is None) == (not masks, not keypoints)
        assert other.scores.tolist() == sorted(other.scores.tolist(), reverse=True)
        if keypoints:
            # As in test_exported_builders: a few points lie on a map with two equal heights.
            apart = np.abs(one.keypoints[..., :2] - other.keypoints[..., :2]).max(axis=-1)
            assert (apart <= 0.1).mean() >= 0.95
    for nothing in (plain.detect(images[0], 1.0, 10, **asked),):
        assert len(nothing) == 0
    (best,) = plain.detect(images[0], detector.score_threshold, 1, **asked).scores
    assert best == found[0].scores[0]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A file with a fixed batch of two: the reference gives it one image at a time."""
    return export_demo(tmp_path_factory.mktemp("demo") / "shapes.onnx", batch=2).path


def test_a_file_with_a_fixed_batch_is_fed_one_image(demo):
    images = scenes(3)
    eager = load_eager(SPEC, model_store=SPEC.parent, weights=CHECKPOINT)
    plain = load_eager(demo, model_store=SPEC.parent)
    unpaired, box_px, score = differences(*([one.detect(i, 0.05, 100) for i in images] for one in (eager, plain)))
    assert unpaired == 0
    assert box_px <= 0.1
    assert score <= 1e-3


def test_it_says_what_it_is(demo):
    plain = eager_from_file(demo)
    assert plain.provider == "CPUExecutionProvider"
    assert "torchvision's transform" in plain.source
    assert "shapes.onnx itself (its source checkpoint is not inside)" in plain.source
    assert plain.categories == require_described(demo).spec.categories


def test_what_is_no_image_is_refused(demo):
    with pytest.raises(DetserveError):
        eager_from_file(demo).detect(b"no image", 0.05, 100)


def rewritten(demo, path, change):
    model = onnx.load(str(demo))
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def test_a_file_that_onnxruntime_cannot_load_is_refused_by_name(demo, tmp_path):
    def spoil(model):
        model.graph.node[0].op_type = "NoSuchOperator"

    with pytest.raises(CheckpointError, match=r"weights spoilt\.onnx: onnxruntime cannot load it"):
        eager_from_file(rewritten(demo, tmp_path / "spoilt.onnx", spoil))


def test_a_file_and_a_description_that_disagree_about_the_size_are_refused(demo, tmp_path):
    def describe_otherwise(model):
        (spec,) = (one for one in model.metadata_props if one.key == "detserve.spec")
        assert '"size": [320, 320]' in spec.value
        spec.value = spec.value.replace('"size": [320, 320]', '"size": [300, 300]')

    plain = eager_from_file(rewritten(demo, tmp_path / "other.onnx", describe_otherwise))
    with pytest.raises(SpecError, match="Export it again"):
        plain.detect(scenes(1)[0], 0.05, 100)
