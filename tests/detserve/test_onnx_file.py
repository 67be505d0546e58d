"""What an ONNX file says of itself: written and read back, and files that say nothing or something damaged."""

import base64
import json

import numpy as np
import onnx
import pytest
import torch
from dethandlers.artefact import Golden
from dethandlers.detections import Category, Detections
from dethandlers.spec import Decoding, Preprocessing, Serving, Source, Spec
from detserve.errors import ArchiveError, ExportError
from detserve.export.onnx_file import (
    ExportFacts,
    described_artefact,
    read_described,
    read_properties,
    read_signature,
    require_described,
    write_described,
)
from onnx import TensorProto, helper

SPEC = Spec(
    name="tiny",
    family="torchvision",
    categories=(Category(7, "größer", 1), Category(9, "a, 'b' \\ {c}", 2)),
    version="2.1",
    runtime="onnx",
    builder="ssdlite320_mobilenet_v3_large",
    num_classes=3,
    weights="model.onnx",
    preprocessing=Preprocessing(size=(8, 12), resize="stretch"),
    decoding=Decoding(strides=(), nms_iou=0.55),
    serving=Serving(score_threshold=0.2, max_detections=5),
    description="one line",
    source=Source("epoch_12.pth", "ab" * 32),
)
FACTS = ExportFacts.of("fp32", 17, ("batch",), {"batch": (1, None), "height": (8, 8), "width": (12, 12)}, SPEC)
GOLDEN = Golden(
    b"\xff\xd8 not really a JPEG",
    0.2,
    5,
    Detections(np.array([[1, 2, 3.5, 4]], np.float32), np.array([0.75], np.float32), np.array([1])),
)


def network(*, optional: bool = False) -> bytes:
    """An ONNX file that adds its optional input, or one, to its images."""
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 12])]
    constants = []
    if optional:
        inputs.append(helper.make_tensor_value_info("score_threshold", TensorProto.FLOAT, []))
    else:
        constants.append(onnx.numpy_helper.from_array(np.float32(1), "score_threshold"))
    out = [helper.make_tensor_value_info("raw", TensorProto.FLOAT, ["batch", 3, 8, 12])]
    add = helper.make_node("Add", ["images", "score_threshold"], ["raw"])
    graph = helper.make_graph([add], "g", inputs, out, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


@pytest.fixture
def described(tmp_path):
    path = tmp_path / "tiny.onnx"
    path.write_bytes(write_described(network(), SPEC, FACTS, ("golden.jpg", GOLDEN), {}))
    return path


def changed(path, key, value):
    """Write another value, or none, into the file's metadata."""
    model = onnx.load(str(path))
    kept = {one.key: one.value for one in model.metadata_props} | {key: value}
    del model.metadata_props[:]
    helper.set_model_props(model, {name: text for name, text in kept.items() if text is not None})
    path.write_bytes(model.SerializeToString())


def test_what_is_written_is_read_back(described):
    found = read_described(described)
    assert found.spec == SPEC
    name, golden = found.golden
    assert (name, golden.image, golden.score_threshold, golden.max_detections) == ("golden.jpg", GOLDEN.image, 0.2, 5)
    assert golden.detections.boxes_xyxy.tolist() == [[1, 2, 3.5, 4]]
    assert (golden.detections.scores.tolist(), golden.detections.labels.tolist()) == ([0.75], [1])
    assert found.facts == json.loads(json.dumps(FACTS.to_json()))
    with described_artefact(described) as artefact:
        assert (artefact.spec, artefact.weights) == (SPEC, described)
        assert artefact.golden.image == GOLDEN.image


def test_a_golden_image_without_detections_is_kept(tmp_path):
    nothing = Golden(b"x", 0.2, 5, Detections.empty())
    path = tmp_path / "tiny.onnx"
    path.write_bytes(write_described(network(), SPEC, FACTS, ("golden.png", nothing), {}))
    assert read_described(path).golden[1].detections.boxes_xyxy.shape == (0, 4)


def test_the_same_arguments_give_the_same_bytes():
    one, other = (write_described(network(), SPEC, FACTS, ("g.jpg", GOLDEN), {}) for _ in range(2))
    assert one == other


def test_the_signature_shows_free_axes_and_what_optional_inputs_are_when_left_out(tmp_path):
    path = tmp_path / "tiny.onnx"
    default = {"score_threshold": torch.tensor(0.25)}
    path.write_bytes(write_described(network(optional=True), SPEC, FACTS, ("g.jpg", GOLDEN), default))
    signature = read_signature(path)
    assert [(one.name, one.type, one.shape, one.default) for one in signature.inputs] == [
        ("images", "float32", ("batch", 3, 8, 12), None),
        ("score_threshold", "float32", (), 0.25),
    ]
    assert [(one.name, one.shape, one.default) for one in signature.outputs] == [("raw", ("batch", 3, 8, 12), None)]


def test_a_graph_that_is_no_valid_onnx_is_not_described():
    broken = onnx.load_from_string(network())
    broken.graph.node[0].input[1] = "nowhere"
    with pytest.raises(ExportError, match="not valid ONNX"):
        write_described(broken.SerializeToString(), SPEC, FACTS, ("g.jpg", GOLDEN), {})


def test_a_foreign_file_says_nothing_and_what_to_do_is_said(tmp_path):
    path = tmp_path / "foreign.onnx"
    path.write_bytes(network())
    assert read_described(path) is None
    assert read_properties(path) == {}
    with pytest.raises(ArchiveError) as caught:
        require_described(path)
    assert "got an ONNX file without a description, expected one that `detserve export` wrote" in str(caught.value)
    assert "by a spec (runtime: onnx) and give the file with --weights foreign.onnx" in str(caught.value)


def test_a_file_without_golden_image_or_facts_is_read(described):
    changed(described, "detserve.golden", None)
    changed(described, "detserve.export", None)
    found = read_described(described)
    assert (found.golden, found.facts, found.spec) == (None, {}, SPEC)


GOLDEN_JSON = {"image": "g.jpg", "image_base64": base64.b64encode(b"x").decode(), "boxes_xyxy": [], "scores": []}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("detserve.spec", "{"),
        ("detserve.spec", "[]"),
        ("detserve.spec", '{"name": "tiny"}'),
        ("detserve.spec", "7"),
        ("detserve.category_map", "{}"),
        ("detserve.category_map", '[{"label": 0}]'),
        ("detserve.golden", "null"),
        ("detserve.golden", json.dumps(GOLDEN_JSON)),
        ("detserve.golden", json.dumps({**GOLDEN_JSON, "labels": [], "image_base64": "%%%"})),
        ("detserve.export", "{,}"),
    ],
)
def test_a_damaged_description_is_refused_with_the_file_s_name(described, key, value):
    changed(described, key, value)
    with pytest.raises(ArchiveError, match=r"tiny\.onnx: its description is damaged or of another version"):
        read_described(described)


def test_a_description_with_a_key_of_a_later_version_is_refused(described):
    spec = json.loads(read_properties(described)["detserve.spec"])
    changed(described, "detserve.spec", json.dumps({**spec, "colour": "red"}))
    with pytest.raises(ArchiveError, match="colour"):
        read_described(described)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"<html>not found</html>" * 20])
def test_what_is_no_onnx_file_is_refused(tmp_path, content):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    for read in (read_described, read_signature, read_properties, require_described):
        with pytest.raises(ArchiveError, match="not an ONNX file"):
            read(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused(described, share):
    content = described.read_bytes()
    described.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ArchiveError, match=r"tiny\.onnx: (not an ONNX file|its description|got an ONNX file without)"):
        require_described(described)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArchiveError, match=r"none\.onnx: is no file"):
        require_described(tmp_path / "none.onnx")
