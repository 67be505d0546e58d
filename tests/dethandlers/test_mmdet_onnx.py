"""The family of MMDetection's exported files: preprocessing by hand, and small files against their plain reading."""

import io

import numpy as np
import pytest
import torch
from dethandlers.artefact import Artefact
from dethandlers.detections import Category
from dethandlers.detector import Detector, Request
from dethandlers.errors import ArtefactError
from dethandlers.families import Limits, load_family
from dethandlers.options import Options
from dethandlers.preprocess import fitted_size, prepare_mmdet
from dethandlers.spec import Decoding, Preprocessing, Spec
from detserve.eager import eager_from_source
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

CLASSES = 3
STRIDE = 8
POINTS = [[4.0, 4.0]]
ANCHORS = [[-12.0, -8.0, 12.0, 8.0], [-8.0, -12.0, 8.0, 12.0]]
DELTAS = {"means": [0.0, 0.1, 0.0, 0.0], "stds": [0.5, 0.5, 0.2, 0.2], "wh_ratio_clip": 0.016}
LEVEL = {"strides": [[STRIDE, STRIDE]], "nms": {"iou_threshold": 0.5}, "least_side": 1.0}
# kind of head: its settings, and the channels of its maps
HEADS = {
    "distance": (
        {"kind": "dense", "boxes": {"kind": "distance"}, "priors": [POINTS], "nms_pre": 60, "factors": True, **LEVEL},
        {"scores_0": CLASSES, "boxes_0": 4, "factors_0": 1},
    ),
    "delta": (
        {
            "kind": "dense",
            "scores": "softmax",
            "boxes": {"kind": "delta", "ctr_clamp": None, **DELTAS},
            "priors": [ANCHORS],
            "nms_pre": 500,
            "factors": False,
            **LEVEL,
        },
        {"scores_0": 2 * (CLASSES + 1), "boxes_0": 8},
    ),
    "clamped delta": (
        {
            "kind": "dense",
            "boxes": {"kind": "delta", "ctr_clamp": 6.0, "clip": False, **DELTAS},
            "priors": [ANCHORS],
            "nms_pre": -1,
            "factors": False,
            **LEVEL,
            "nms": {"iou_threshold": 0.5, "class_agnostic": True},
        },
        {"scores_0": 2 * CLASSES, "boxes_0": 8},
    ),
    "distribution": (
        {
            "kind": "dense",
            "boxes": {"kind": "distribution", "bins": 5},
            "priors": [[[0.0, 0.0]]],
            "nms_pre": 100,
            "factors": False,
            **LEVEL,
        },
        {"scores_0": CLASSES, "boxes_0": 20},
    ),
    "yolox": (
        {"kind": "yolox", "priors": [[[0.0, 0.0]]], **LEVEL},
        {"scores_0": CLASSES, "boxes_0": 4, "factors_0": 1},
    ),
    "yolov3": (
        {"kind": "yolov3", "priors": [ANCHORS], "nms_pre": 80, "least_objectness": 0.3, **LEVEL},
        {"maps_0": 2 * (5 + CLASSES)},
    ),
    "softmax queries": ({"kind": "queries", "scores": "softmax"}, {"scores": CLASSES + 1, "boxes": 4}),
    "sigmoid queries": ({"kind": "queries", "scores": "sigmoid"}, {"scores": CLASSES, "boxes": 4}),
}
PREPROCESSING = Preprocessing(
    resize="fit",
    shorter_side=64,
    longer_side=96,
    divisor=16,
    channel_order="rgb",
    mean=(120.0, 110.0, 100.0),
    std=(58.0, 57.0, 56.0),
    interpolation="eight_bit",
)


def png(seed, size):
    rng = np.random.default_rng(seed)
    pixels = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    pixels.save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [png(seed, size) for seed, size in enumerate([(150, 110), (90, 200), (40, 40), (300, 220)])]


def write_file(path, outputs):
    """One convolution of the stride, split into the maps; queries are its cells, their boxes within 0..1."""
    channels = sum(outputs.values())
    rng = np.random.default_rng(channels)
    weights = rng.normal(0, 1, (channels, 3, STRIDE, STRIDE))
    weights = ((weights - weights.mean(axis=(1, 2, 3), keepdims=True)) / 10).astype(np.float32)
    queries = "scores" in outputs
    nodes = [helper.make_node("Conv", ["images", "weights", "bias"], ["maps"], strides=[STRIDE, STRIDE])]
    split = list(outputs)
    source = "maps"
    if queries:
        nodes.append(helper.make_node("Reshape", ["maps", "shape"], ["flat"]))
        nodes.append(helper.make_node("Transpose", ["flat"], ["rows"], perm=[0, 2, 1]))
        split, source = ["scores", "raw"], "rows"
        nodes.append(helper.make_node("Sigmoid", ["raw"], ["boxes"]))
    cut = helper.make_node("Split", [source, "parts"], split, axis=2 if queries else 1)
    nodes.insert(3 if queries else 1, cut)
    constants = {"weights": weights, "bias": rng.normal(-0.5, 0.5, channels).astype(np.float32)}
    constants["parts"] = np.asarray(list(outputs.values()), dtype=np.int64)
    if queries:
        constants["shape"] = np.asarray([0, channels, -1], dtype=np.int64)
    axes = ["batch", None, None] if queries else ["batch", None, None, None]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())


def spec_of(head, preprocessing=PREPROCESSING, classes=range(CLASSES)):
    return Spec(
        name="tiny",
        family="mmdet_onnx",
        runtime="onnx",
        weights="model.onnx",
        categories=tuple(Category(10 + label, f"thing {label}", label) for label in classes),
        preprocessing=preprocessing,
        decoding=Decoding(strides=(), head=head),
    )


def by_label_and_place(found):
    rows = sorted(
        zip(found.labels.tolist(), np.round(found.scores, 4).tolist(), found.boxes_xyxy.tolist(), strict=True)
    )
    return [(label, score) for label, score, _ in rows], np.asarray([box for _, _, box in rows])


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("threshold", [0.1, 0.45])
def test_the_worker_finds_what_a_plain_reading_finds(tmp_path, kind, threshold):
    head, outputs = HEADS[kind]
    preprocessing = PREPROCESSING
    if "queries" in kind:
        preprocessing = Preprocessing(**{**vars(PREPROCESSING), "divisor": 1})
    spec = spec_of(head, preprocessing)
    write_file(tmp_path / "model.onnx", outputs)
    reference = eager_from_source(spec, tmp_path / "model.onnx")
    detector = Detector(Artefact(tmp_path, spec, tmp_path / "model.onnx", None), torch.device("cpu"))
    try:
        answers = detector.detect([Request(image, Options(threshold, 30)) for image in IMAGES])
    finally:
        detector.close()
    expected = [reference.detect(image, threshold, 30) for image in IMAGES]
    assert sum(map(len, expected)) >= 4
    for answer, plain in zip(answers, expected, strict=True):
        (found, found_boxes), (wanted, wanted_boxes) = map(by_label_and_place, (answer.detections, plain))
        assert [label for label, _ in found] == [label for label, _ in wanted]
        np.testing.assert_allclose([score for _, score in found], [score for _, score in wanted], atol=2e-4)
        np.testing.assert_allclose(found_boxes, wanted_boxes, atol=0.02, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((300, 1500), (267, 1333)), ((800, 1333), (800, 1333))],
)
def test_sides_are_rounded_to_the_nearest(size, expected):
    """480 × 640 by 800/480 is 800 × 1066.67; 300 × 1500 by 1333/1500 is 266.6 × 1333."""
    assert fitted_size(size, 800, 1333) == expected


def grey(height, width, value=100):
    return torch.full((3, height, width), value, dtype=torch.uint8)


def test_pixels_are_padded_before_and_after_the_normalisation():
    settings = Preprocessing(
        resize="fit",
        shorter_side=20,
        longer_side=20,
        pad_to="square",
        pad_value=50.0,
        divisor=16,
        mean=(10.0, 10.0, 10.0),
        std=(2.0, 2.0, 2.0),
    )
    made = prepare_mmdet(grey(10, 40), settings)
    assert (made.resized_size, made.sample) == ((5, 20), (20, 20))
    assert tuple(made.pixels.shape) == (3, 32, 32)
    assert made.pixels[:, :5, :20].unique().tolist() == [45.0]
    assert made.pixels[:, 5:20, :20].unique().tolist() == [20.0]
    assert made.pixels[:, 20:].unique().tolist() == made.pixels[:, :, 20:].unique().tolist() == [0.0]
    assert made.scale_xy == (2.0, 2.0)


@pytest.mark.parametrize(
    ("more", "canvas"),
    [
        ({"pad_to": "none"}, (10, 20)),
        ({"pad_to": "size", "size": (24, 18)}, (24, 20)),
        ({"resize": "stretch", "size": (7, 9)}, (7, 9)),
    ],
)
def test_what_an_image_is_padded_to(more, canvas):
    settings = Preprocessing(**{"resize": "fit", "shorter_side": 10, "longer_side": 99, "divisor": 1, **more})
    made = prepare_mmdet(grey(20, 40), settings)
    assert made.sample == canvas == tuple(made.pixels.shape[1:])


def test_channels_are_turned_where_the_network_wants_them_so():
    image = torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    for order, expected in (("bgr", [3, 2, 1]), ("rgb", [1, 2, 3])):
        settings = Preprocessing(resize="stretch", size=(4, 4), divisor=1, channel_order=order)
        assert prepare_mmdet(image, settings).pixels[:, 0, 0].tolist() == expected


def test_classes_without_a_name_are_left_out():
    head, _ = HEADS["distance"]
    family = load_family(spec_of({**head, "factors": False}, classes=[2, 0]))
    prepared = family.prepare(grey(64, 96))
    scores = torch.full((CLASSES, 8, 12), -9.0)
    scores[:, 2, 2] = torch.tensor([2.0, 5.0, 1.0])
    outputs = {"scores_0": scores, "boxes_0": torch.full((4, 8, 12), 8.0)}
    (found,) = family.decode([outputs], [prepared], Limits(0.1, 10))
    assert [family.spec.categories[label].name for label in found.labels] == ["thing 0", "thing 2"]
    (found,) = family.decode([outputs], [prepared], Limits(0.1, 1))
    assert found.scores.tolist() == pytest.approx([torch.sigmoid(torch.tensor(2.0)).item()])


def test_a_spec_that_export_did_not_write_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match=r"no decoding\.head"):
        load_family(spec_of({}))
    head, _ = HEADS["distance"]
    with pytest.raises(ArtefactError, match="runtime 'torch'"):
        load_family(Spec(**{**vars(spec_of(head)), "runtime": "torch"}))
    with pytest.raises(ArtefactError, match=r"preprocessing\.resize: got 'letterbox'"):
        load_family(spec_of(head, Preprocessing()))
    with pytest.raises(ArtefactError, match="is run from ONNX"):
        load_family(spec_of(head)).build(tmp_path / "weights.safetensors")


def test_a_spec_goes_through_its_file_unchanged():
    head, _ = HEADS["delta"]
    spec = spec_of(head)
    assert Spec.from_json(spec.to_json(), spec.categories) == spec
