"""The yolox family: raw heads decoded as by a definition cell by cell, and ONNX files run in their batch size."""

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from dethandlers.artefact import Artefact
from dethandlers.detections import Category
from dethandlers.detector import Detector, Request
from dethandlers.errors import ArtefactError, RequestError
from dethandlers.families import Limits
from dethandlers.families.yolox import YoloxFamily
from dethandlers.options import Options
from dethandlers.preprocess import Prepared
from dethandlers.spec import Decoding, Preprocessing, Serving, Spec
from onnx import TensorProto, helper, numpy_helper
from small_artefacts import IMAGES

HEIGHT, WIDTH = 64, 96
STRIDES = (8, 16, 32)
CELLS = sum((HEIGHT // stride) * (WIDTH // stride) for stride in STRIDES)
CPU = torch.device("cpu")


def categories_of(*model_labels):
    return tuple(Category(id=label + 1, name=f"class {label}", model_label=label) for label in model_labels)


def spec_of(categories=categories_of(0, 1, 2), **changes):  # noqa: B008 - frozen
    defaults = {
        "preprocessing": Preprocessing(size=(HEIGHT, WIDTH)),
        "decoding": Decoding(strides=STRIDES, nms_iou=0.5),
        "runtime": "onnx",
        "weights": "model.onnx",
    }
    return Spec(name="tiny", family="yolox", categories=categories, **(defaults | changes))


def random_raw(seed, images=1, classes=3):
    rng = np.random.default_rng(seed)
    raw = np.empty((images, CELLS, 5 + classes), np.float32)
    raw[..., :2] = rng.normal(0.5, 1.0, (images, CELLS, 2))
    raw[..., 2:4] = rng.normal(0.3, 0.6, (images, CELLS, 2))
    raw[..., 4:] = rng.random((images, CELLS, 1 + classes))
    return torch.from_numpy(raw)


def outputs_of(raw):
    """What the runtime gives for a batch."""
    return [{"raw": one} for one in raw]


def iou(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return width * height / (areas - width * height)


def by_definition(raw, threshold, nms_iou, prepared, label_of):
    """Decode one image, cell by cell, in double precision."""
    rows, position = [], 0
    for stride in STRIDES:
        for row in range(HEIGHT // stride):
            for column in range(WIDTH // stride):
                x, y, w, h, objectness, *classes = (float(value) for value in raw[position])
                position += 1
                best = max(range(len(classes)), key=classes.__getitem__)
                score = objectness * classes[best]
                if score < threshold or best not in label_of:
                    continue
                x, y = (x + column) * stride, (y + row) * stride
                w, h = math.exp(w) * stride, math.exp(h) * stride
                rows.append((score, label_of[best], [x - w / 2, y - h / 2, x + w / 2, y + h / 2]))
    kept = []
    for row in sorted(rows, key=lambda row: -row[0]):
        if all(row[1] != other[1] or iou(row[2], other[2]) <= nms_iou for other in kept):
            kept.append(row)
    (height, width), (new_height, new_width) = prepared.original_size, prepared.resized_size
    scale = [width / new_width, height / new_height] * 2
    limits = [width, height] * 2
    return [
        (
            score,
            label,
            [min(max(value * factor, 0), limit) for value, factor, limit in zip(box, scale, limits, strict=True)],
        )
        for score, label, box in kept
    ]


def prepared_of(original=(150, 200), resized=(64, 85)):
    return Prepared(torch.zeros(3, HEIGHT, WIDTH), original, resized)


@pytest.mark.parametrize("threshold", [0.05, 0.4, 0.7])
def test_raw_output_is_decoded_as_defined(threshold):
    family = YoloxFamily(spec_of())
    raw = random_raw(seed=int(threshold * 100), images=3)
    sources = [prepared_of(), prepared_of((64, 96), (64, 96)), prepared_of((40, 33), (64, 53))]
    found = family.decode(outputs_of(raw), sources, Limits(threshold, 1000))
    for one, detections, source in zip(raw, found, sources, strict=True):
        expected = by_definition(one, threshold, 0.5, source, {0: 0, 1: 1, 2: 2})
        assert len(expected) >= 5
        assert detections.labels.tolist() == [label for _, label, _ in expected]
        assert np.allclose(detections.scores, [score for score, _, _ in expected], rtol=0, atol=1e-6)
        assert np.abs(detections.boxes_xyxy - np.array([box for _, _, box in expected])).max() < 1e-3
        assert (detections.boxes_xyxy.dtype, detections.scores.dtype) == (np.float32, np.float32)


def test_the_best_are_kept_up_to_the_maximum():
    family = YoloxFamily(spec_of())
    raw = random_raw(seed=1)
    (everything,) = family.decode(outputs_of(raw), [prepared_of()], Limits(0.05, 1000))
    (few,) = family.decode(outputs_of(raw), [prepared_of()], Limits(0.05, 4))
    assert np.array_equal(few.scores, everything.scores[:4])


@pytest.mark.parametrize("model_labels", [(0, 2), (2, 0), (0, 1), (1,)], ids=str)
def test_classes_that_the_map_does_not_know_are_dropped_not_renamed(model_labels):
    family = YoloxFamily(spec_of(categories_of(*model_labels)))
    raw = random_raw(seed=2)
    label_of = {model_label: label for label, model_label in enumerate(model_labels)}
    expected = by_definition(raw[0], 0.2, 0.5, prepared_of(), label_of)
    (found,) = family.decode(outputs_of(raw), [prepared_of()], Limits(0.2, 1000))
    assert found.labels.tolist() == [label for _, label, _ in expected]
    assert np.allclose(found.scores, [score for score, _, _ in expected], rtol=0, atol=1e-6)


def test_an_absurd_raw_size_does_not_become_infinite():
    raw = random_raw(seed=3)
    raw[0, :, 2:4] = 500.0
    (found,) = YoloxFamily(spec_of()).decode(outputs_of(raw), [prepared_of()], Limits(0.05, 1000))
    assert len(found) > 0
    assert np.isfinite(found.boxes_xyxy).all()


@pytest.mark.parametrize("shape", [(CELLS - 1, 8), (CELLS, 7), (CELLS,), (8, CELLS)], ids=str)
def test_an_output_of_another_shape_is_refused_with_what_the_spec_describes(shape):
    with pytest.raises(ArtefactError) as caught:
        YoloxFamily(spec_of()).decode(outputs_of(torch.zeros(1, *shape)), [prepared_of()], Limits(0.05, 10))
    got = ", ".join(map(str, shape))
    assert f"network output: got (batch, {got}), expected (batch, {CELLS}, 8 or more)" in caught.value.message


@pytest.mark.parametrize(("size", "bad"), [((64, 90), 8), ((68, 96), 8), ((64, 48), 32)])
def test_strides_that_do_not_divide_the_input_are_refused(size, bad):
    with pytest.raises(ArtefactError, match=f"decoding.strides: got {bad}, expected divisors of the input"):
        YoloxFamily(spec_of(preprocessing=Preprocessing(size=size)))


def test_outputs_are_decoded_where_they_are():
    """On a GPU they do not leave it before they are few; the meta device refuses the CPU's tensors as a GPU does."""
    found = YoloxFamily(spec_of()).candidates({"raw": torch.zeros(CELLS, 8, device="meta")})
    assert {one.device.type for one in (found.boxes_xyxy, found.scores, found.model_labels)} == {"meta"}


def test_the_torch_runtime_is_refused():
    with pytest.raises(ArtefactError, match="runtime: got 'torch' with family 'yolox', expected 'onnx'"):
        YoloxFamily(spec_of(runtime="torch"))


# ONNX files


def write_network(path, *, batch=1, height=HEIGHT, width=WIDTH, classes=2, seed=0):
    """A network of one convolution, stride 8, whose output has YOLOX's form."""
    rng = np.random.default_rng(seed)
    outputs = 5 + classes
    weights = rng.normal(0, 1, (outputs, 3, 8, 8)).astype(np.float32)
    weights -= weights.mean(axis=(1, 2, 3), keepdims=True)
    weights *= (np.array([1, 1, 0.3, 0.3] + [1.0] * (1 + classes)) / 400)[:, None, None, None].astype(np.float32)
    cells = (height // 8) * (width // 8)
    constants = {
        "weights": weights,
        "shape": np.array([0, outputs, cells], np.int64),
        "splits": np.array([4, 1 + classes], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["images", "weights"], ["maps"], strides=[8, 8]),
        helper.make_node("Reshape", ["maps", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("Split", ["rows", "splits"], ["boxes", "logits"], axis=2),
        helper.make_node("Sigmoid", ["logits"], ["scores"]),
        helper.make_node("Concat", ["boxes", "scores"], ["raw"], axis=2),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, height, width])],
        [helper.make_tensor_value_info("raw", TensorProto.FLOAT, [batch, cells, outputs])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def onnx_spec(**changes):
    serving = Serving(score_threshold=0.25, max_detections=100, **changes.pop("serving", {}))
    changes = {"decoding": Decoding(strides=(8,), nms_iou=0.5)} | changes
    return spec_of(categories_of(0, 1), serving=serving, **changes)


@pytest.fixture
def load(tmp_path):
    """Load a tiny network as a detector."""
    opened = []

    def load(spec=None, **network):
        weights = write_network(tmp_path / "model.onnx", **network)
        opened.append(Detector(Artefact(tmp_path, spec or onnx_spec(), weights, None), CPU))
        return opened[-1]

    yield load
    for detector in opened:
        detector.close()


@pytest.fixture(scope="module")
def images():
    return IMAGES[:3]


def answers(detector, images, **options):
    wanted = Options(**({"score_threshold": 0.25, "max_detections": 100} | options))
    return detector.detect([Request(image, wanted) for image in images])


@pytest.mark.parametrize("batch", [1, 2, "batch", 0], ids=["fixed one", "fixed two", "dynamic", "nameless"])
def test_a_batch_is_answered_as_its_images_one_by_one(load, images, batch):
    detector = load(batch=None if batch == 0 else batch)
    together = answers(detector, images[:3])
    assert [answer.forward_size for answer in together] == [3, 3, 3]
    for image, answer in zip(images, together, strict=False):
        (alone,) = answers(detector, [image])
        assert len(alone.detections) >= 5
        assert np.array_equal(alone.detections.labels, answer.detections.labels)
        assert np.abs(alone.detections.boxes_xyxy - answer.detections.boxes_xyxy).max() <= 0.01
        assert np.abs(alone.detections.scores - answer.detections.scores).max() <= 1e-5


def test_a_fixed_and_a_dynamic_batch_agree(load, images):
    fixed = answers(load(batch=1), images)
    dynamic = answers(load(batch="batch"), images)
    for one, other in zip(fixed, dynamic, strict=True):
        assert np.array_equal(one.detections.labels, other.detections.labels)
        assert np.abs(one.detections.boxes_xyxy - other.detections.boxes_xyxy).max() <= 0.01


def test_a_network_of_another_input_size_answers_each_request_with_what_to_correct(load, images):
    results = answers(load(height=96), images[:2])
    assert all(isinstance(result, RequestError) for result in results)
    for result in results:
        assert result.code == 500
        assert "the network takes images [1, 3, 96, 96], got (1, 3, 64, 96)" in result.message
        assert "Correct preprocessing.size in the spec" in result.message


def test_a_network_of_another_output_answers_each_request_with_what_to_correct(load, images):
    results = answers(load(onnx_spec(decoding=Decoding(strides=(16,)))), images[:2])
    assert all("network output: got (batch, 96, 7), expected (batch, 24, 7 or more)" in one.message for one in results)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_refused_for_it_is_the_file_s_own(load, precision):
    with pytest.raises(ArtefactError, match=f"precision: got '{precision}' with runtime 'onnx'"):
        load(onnx_spec(serving={"precision": precision}))


def test_a_file_that_is_no_onnx_is_refused(tmp_path):
    weights = tmp_path / "model.onnx"
    weights.write_bytes(b"this is no protobuf")
    with pytest.raises(ArtefactError, match=r"model.onnx cannot be loaded by onnxruntime: "):
        Detector(Artefact(tmp_path, onnx_spec(), weights, None), CPU)


def test_a_gpu_that_onnxruntime_does_not_have_is_refused(tmp_path):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    weights = write_network(tmp_path / "model.onnx")
    with pytest.raises(ArtefactError, match=r"device: got cuda:0, but onnxruntime .* has only"):
        Detector(Artefact(tmp_path, onnx_spec(), weights, None), torch.device("cuda:0"))


def test_what_runs_is_described(load):
    described = load().describe()
    assert described["runtime"] == "onnx"
    assert described["provider"] == "CPUExecutionProvider"
    assert (described["device"], described["precision"]) == ("cpu", "fp32")
    assert described["jpeg_decoder"] == "cpu"
    assert [category["name"] for category in described["categories"]] == ["class 0", "class 1"]


def test_a_class_beyond_the_map_is_not_answered_as_its_last(load, images):
    full = load(onnx_spec(), classes=2)
    (everything,) = answers(full, images[:1])
    partial = load(replace(onnx_spec(), categories=categories_of(0)), classes=2)
    (some,) = answers(partial, images[:1])
    first = everything.detections.labels == 0
    assert 0 < first.sum() < len(first)
    assert np.array_equal(some.detections.scores, everything.detections.scores[first])
