"""The references of foreign ONNX files: a cell by hand, and the worker's families against them."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from dethandlers.artefact import Artefact
from dethandlers.detections import Category
from dethandlers.detector import Detector, Request
from dethandlers.families import FAMILIES
from dethandlers.options import Options
from dethandlers.spec import Decoding, Preprocessing, Spec
from detserve.eager import eager_from_source
from detserve.eager_onnx import ONNX_REFERENCES, suppressed
from detserve.errors import CheckpointError, DetserveError, SpecError
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

HEIGHT, WIDTH = 64, 96
CLASSES = 3


def png(seed, size=(150, 110)):
    rng = np.random.default_rng(seed)
    pixels = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    pixels.save(buffer, "PNG")
    return buffer.getvalue()


def write_network(path, nodes, outputs, constants):
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, HEIGHT, WIDTH])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def convolution(outputs, stride, spread):
    """Weights that turn pixels into numbers of a moderate size, every output its own."""
    rng = np.random.default_rng(outputs)
    weights = rng.normal(0, 1, (outputs, 3, stride, stride))
    weights -= weights.mean(axis=(1, 2, 3), keepdims=True)
    return (weights * np.asarray(spread)[:, None, None, None] / (30 * stride)).astype(np.float32)


def fastestdet(path):
    """A map of stride 16: one convolution, sigmoid on objectness and classes."""
    nodes = [
        helper.make_node("Conv", ["images", "weights"], ["maps"], strides=[16, 16]),
        helper.make_node("Split", ["maps", "splits"], ["objectness", "boxes", "classes"], axis=1),
        helper.make_node("Sigmoid", ["objectness"], ["o"]),
        helper.make_node("Sigmoid", ["classes"], ["c"]),
        helper.make_node("Concat", ["o", "boxes", "c"], ["758"], axis=1),
    ]
    constants = {"weights": convolution(5 + CLASSES, 16, [1.0] * (5 + CLASSES)), "splits": np.array([1, 4, CLASSES])}
    write_network(path, nodes, {"758": ["batch", 5 + CLASSES, HEIGHT // 16, WIDTH // 16]}, constants)
    return spec_of("fastestdet", resize="stretch", strides=(16,))


def ultraface(path, names=("scores", "boxes")):
    """Cells of 16 px: a box of random corners in each, softmax over the background and the classes."""
    cells = (HEIGHT // 16) * (WIDTH // 16)
    nodes = [
        helper.make_node("Conv", ["images", "weights"], ["maps"], strides=[16, 16]),
        helper.make_node("Reshape", ["maps", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("Split", ["rows", "splits"], ["b", "wh", "logits"], axis=2),
        helper.make_node("Softmax", ["logits"], [names[0]], axis=2),
        helper.make_node("Sigmoid", ["b"], ["low"]),
        helper.make_node("Sigmoid", ["wh"], ["size"]),
        helper.make_node("Add", ["low", "size"], ["high"]),
        helper.make_node("Concat", ["low", "high"], [names[1]], axis=2),
    ]
    channels = 4 + 1 + CLASSES
    constants = {
        "weights": convolution(channels, 16, [1.0] * channels),
        "shape": np.array([0, channels, cells]),
        "splits": np.array([2, 2, 1 + CLASSES]),
    }
    outputs = {names[0]: ["batch", cells, 1 + CLASSES], names[1]: ["batch", cells, 4]}
    write_network(path, nodes, outputs, constants)
    return spec_of("ultraface", resize="stretch", background=True, channel_order="rgb", mean=(127.0,) * 3)


def yolox(path):
    """Cells of 8 px, sigmoid on objectness and classes."""
    cells = (HEIGHT // 8) * (WIDTH // 8)
    nodes = [
        helper.make_node("Conv", ["images", "weights"], ["maps"], strides=[8, 8]),
        helper.make_node("Reshape", ["maps", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("Split", ["rows", "splits"], ["boxes", "logits"], axis=2),
        helper.make_node("Sigmoid", ["logits"], ["scores"]),
        helper.make_node("Concat", ["boxes", "scores"], ["raw"], axis=2),
    ]
    constants = {
        "weights": convolution(5 + CLASSES, 8, [1, 1, 0.3, 0.3] + [1.0] * (1 + CLASSES)),
        "shape": np.array([0, 5 + CLASSES, cells]),
        "splits": np.array([4, 1 + CLASSES]),
    }
    write_network(path, nodes, {"raw": ["batch", cells, 5 + CLASSES]}, constants)
    return spec_of("yolox", strides=(8,))


def spec_of(family, *, strides=(8, 16, 32), background=False, **preprocessing):
    categories = tuple(
        Category(id=place + 1, name=f"class {place}", model_label=place + background) for place in range(CLASSES)
    )
    return Spec(
        name="tiny",
        family=family,
        categories=categories,
        runtime="onnx",
        num_classes=CLASSES + background,
        preprocessing=Preprocessing(**({"size": (HEIGHT, WIDTH)} | preprocessing)),
        decoding=Decoding(strides=strides, nms_iou=0.5),
    )


NETWORKS = {"fastestdet": fastestdet, "ultraface": ultraface, "yolox": yolox}


def test_every_family_of_foreign_files_has_its_reference():
    assert set(ONNX_REFERENCES) == set(NETWORKS)
    assert set(ONNX_REFERENCES) <= set(FAMILIES)


@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize("threshold", [0.05, 0.35])
def test_the_worker_finds_what_the_reference_finds(tmp_path, family, threshold):
    spec = NETWORKS[family](tmp_path / "model.onnx")
    eager = eager_from_source(spec, tmp_path / "model.onnx")
    detector = Detector(Artefact(tmp_path, spec, tmp_path / "model.onnx", None), torch.device("cpu"))
    found = 0
    for seed, size in enumerate([(150, 110), (96, 64), (40, 200)]):
        image = png(seed, size)
        (answer,) = detector.detect([Request(image, Options(threshold, 50))])
        expected = eager.detect(image, threshold, 50)
        assert answer.detections.labels.tolist() == expected.labels.tolist()
        assert np.allclose(answer.detections.scores, expected.scores, rtol=0, atol=1e-4)
        assert np.allclose(answer.detections.boxes_xyxy, expected.boxes_xyxy, rtol=0, atol=0.05)
        found += len(expected)
    detector.close()
    assert found >= 10


def test_scores_as_wide_as_boxes_are_told_from_them_by_their_names_alone(tmp_path):
    spec = ultraface(tmp_path / "named.onnx")
    assert len(eager_from_source(spec, tmp_path / "named.onnx").detect(png(0), 0.3, 50)) > 0
    # The background and three classes.
    ultraface(tmp_path / "numbered.onnx", names=("450", "451"))
    with pytest.raises(SpecError, match="network output: got 450"):
        eager_from_source(spec, tmp_path / "numbered.onnx").detect(png(0), 0.3, 50)


def test_a_fastestdet_s_cell_by_hand(tmp_path):
    """A network that says the same whatever it sees: one certain cell."""
    raw = np.zeros((1, 5 + CLASSES, 4, 6), np.float32)
    raw[0, :, 1, 2] = [0.81, 0.0, 0.0, 0.0, 0.0, 0.1, 0.64, 0.2]
    nodes = [
        helper.make_node("ReduceSum", ["images", "axes"], ["sum"], keepdims=1),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "raw"], ["out"]),
    ]
    constants = {"axes": np.array([1, 2, 3]), "zero": np.zeros(1, np.float32), "raw": raw}
    write_network(tmp_path / "model.onnx", nodes, {"out": ["batch", 5 + CLASSES, 4, 6]}, constants)
    spec = spec_of("fastestdet", resize="stretch", strides=(16,))
    found = eager_from_source(spec, tmp_path / "model.onnx").detect(png(0, (192, 128)), 0.3, 10)
    # x 32 ± 24, y 16 ± 16 px of the input, twice as large in the image.
    assert found.boxes_xyxy.tolist() == [[16, 0, 112, 64]]
    assert found.labels.tolist() == [1]
    assert found.scores[0] == pytest.approx(0.81**0.6 * 0.64**0.4)


def test_a_worse_box_of_the_same_class_goes_and_one_of_another_stays():
    best = (np.array([0, 0, 10, 10.0]), 0.9, 0)
    same = (np.array([0, 0, 10, 9.0]), 0.8, 0)
    other = (np.array([0, 0, 10, 9.0]), 0.7, 1)
    # 5 of 15: an overlap of a third.
    beside = (np.array([5, 0, 15, 10.0]), 0.6, 0)
    assert [row[1] for row in suppressed([best, same, other, beside], 0.5)] == [0.9, 0.7, 0.6]
    assert [row[1] for row in suppressed([best, same, other, beside], 0.3)] == [0.9, 0.7]


@pytest.mark.parametrize("family", NETWORKS)
def test_a_file_of_another_layout_is_refused_with_what_was_expected(tmp_path, family):
    other = "ultraface" if family != "ultraface" else "fastestdet"
    NETWORKS[other](tmp_path / "model.onnx")
    spec = NETWORKS[family](tmp_path / "unused.onnx")
    with pytest.raises(SpecError, match=r"network output: got .*, expected an? .* Correct the spec"):
        eager_from_source(spec, tmp_path / "model.onnx").detect(png(0), 0.3, 10)


def test_an_input_of_another_size_is_refused_with_the_key(tmp_path):
    spec = fastestdet(tmp_path / "model.onnx")
    smaller = spec_of("fastestdet", resize="stretch", strides=(16,), size=(32, 32))
    assert spec.preprocessing.size != smaller.preprocessing.size
    with pytest.raises(SpecError, match=r"(?s)the network takes images .* Correct preprocessing\.size"):
        eager_from_source(smaller, tmp_path / "model.onnx").detect(png(0), 0.3, 10)


def test_what_is_no_onnx_file_is_refused(tmp_path):
    Path(tmp_path / "model.onnx").write_bytes(b"this is no protobuf")
    with pytest.raises(CheckpointError, match=r"onnxruntime cannot load it .* Expected a FastestDet in ONNX format"):
        eager_from_source(spec_of("fastestdet", strides=(16,)), tmp_path / "model.onnx")


def test_what_is_no_image_is_refused(tmp_path):
    spec = fastestdet(tmp_path / "model.onnx")
    with pytest.raises(DetserveError, match="cannot decode"):
        eager_from_source(spec, tmp_path / "model.onnx").detect(b"no image", 0.3, 10)
