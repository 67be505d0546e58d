"""What `detserve graph` finds in ONNX files that the tests make: contents, providers, differences, damage."""

import json
from pathlib import Path

import numpy as np
import pytest
from detserve.mar import manifest_json, write_mar
from dettools.cli import main
from dettools.onnx_graph.difference import compare_files
from dettools.onnx_graph.model_file import OnnxFileError, open_onnx, read_onnx
from dettools.onnx_graph.provider_operators import CUDA, TENSORRT
from dettools.onnx_graph.providers import check_providers
from dettools.onnx_graph.summary import summarise

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

FLOAT = TensorProto.FLOAT


def model(*, stride=1, scale=1.0, opset=17, extra=(), metadata=None, weight_name="w", side=8):
    """A convolution and a sigmoid; ``extra`` nodes read ``y`` and are read by nobody."""
    weights = numpy_helper.from_array(np.full((4, 3, 3, 3), scale, np.float32), weight_name)
    nodes = [
        helper.make_node("Conv", ["x", weight_name], ["c"], name="conv", strides=[stride, stride]),
        helper.make_node("Sigmoid", ["c"], ["y"], name="sigmoid"),
        *extra,
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", FLOAT, ["batch", 3, side, "width"])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [weights],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("my.domain", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, producer_name="tests", producer_version="3")
    proto.ir_version = 10
    helper.set_model_props(proto, metadata or {"names": "{'0': 'cat'}"})
    return proto


def write(path: Path, proto) -> Path:
    onnx.save(proto, path)
    return path


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "small.onnx", model())


def test_the_summary_tells_what_is_in_the_file(small):
    summary = summarise(read_onnx(small))
    assert (summary.ir_version, summary.producer) == (10, "tests 3")
    assert summary.opsets == {"ai.onnx": 17, "my.domain": 1}
    assert summary.metadata == {"names": "{'0': 'cat'}"}
    assert [(one.name, one.type, one.shape) for one in summary.inputs] == [("x", "float", ("batch", 3, 8, "width"))]
    assert [(one.name, one.nodes, one.parameters) for one in summary.operators] == [("Conv", 1, 108), ("Sigmoid", 1, 0)]
    assert (summary.parameters, summary.types) == (108, {"float": 108})
    assert summary.custom_domains == {}
    assert summary.bytes == small.stat().st_size


def test_bodies_and_foreign_domains_are_named(tmp_path):
    then = helper.make_graph(
        [helper.make_node("Relu", ["y"], ["r"])], "then", [], [helper.make_tensor_value_info("r", FLOAT, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Magic", ["y"], ["m"], domain="my.domain")],
        "other",
        [],
        [helper.make_tensor_value_info("m", FLOAT, None)],
    )
    condition = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("v", TensorProto.BOOL, [], [True]))
    choice = helper.make_node("If", ["yes"], ["z"], name="choice", then_branch=then, else_branch=other)
    summary = summarise(read_onnx(write(tmp_path / "a.onnx", model(extra=[condition, choice]))))
    assert sorted((one.holder, one.operator, one.name, one.nodes) for one in summary.subgraphs) == [
        ("choice", "If", "other", 1),
        ("choice", "If", "then", 1),
    ]
    assert summary.custom_domains == {"my.domain": 1}
    assert {one.name for one in summary.operators} == {"Conv", "Sigmoid", "Constant", "If", "Relu", "my.domain.Magic"}
    assert summary.nodes == 6


def test_providers_that_take_everything(small):
    cpu, cuda, tensorrt = check_providers(read_onnx(small))
    assert [one.provider for one in (cpu, cuda, tensorrt)] == ["CPU", "CUDA", "TensorRT"]
    assert [(one.missing, one.problem) for one in (cpu, cuda, tensorrt)] == [({}, "")] * 3
    assert "onnxruntime" in cpu.source
    assert "10.15" in tensorrt.source


def test_what_a_provider_does_not_take_is_named(tmp_path):
    unique = helper.make_node("Unique", ["y"], ["u"])
    again = helper.make_node("Unique", ["c"], ["v"])
    magic = helper.make_node("Magic", ["y"], ["m"], domain="my.domain")
    cpu, cuda, tensorrt = check_providers(read_onnx(write(tmp_path / "a.onnx", model(extra=[unique, magic, again]))))
    assert cpu.missing == {"my.domain.Magic": 1}
    assert "Magic" in cpu.problem
    assert cuda.missing == tensorrt.missing == {"Unique": 2, "my.domain.Magic": 1}


def test_the_kernel_of_the_file_s_opset_counts(tmp_path):
    """DeformConv came with opset 19; before, the name means nothing."""
    deform = helper.make_node("DeformConv", ["x", "w", "y"], ["d"])
    assert check_providers(read_onnx(write(tmp_path / "a.onnx", model(extra=[deform]))))[0].missing == {"DeformConv": 1}
    assert check_providers(read_onnx(write(tmp_path / "b.onnx", model(extra=[deform], opset=19))))[0].missing == {}


def test_an_opset_that_tensorrt_does_not_read(tmp_path):
    tensorrt = check_providers(read_onnx(write(tmp_path / "a.onnx", model(opset=8))))[2]
    assert tensorrt.problem == "opset 8 is outside of 9 to 24"


def test_the_tables_hold_operators_of_onnx():
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    # What TensorFlow and early ONNX brought; they are in the providers' pages.
    old = {"Affine", "Crop", "DynamicSlice", "ImageScaler", "ParametricSoftplus", "ScaledTanh"}
    internal = {"SimplifiedLayerNormalization"}
    assert CUDA - known - old - internal == set()
    assert TENSORRT - known - old == set()


def changes(folder, first, second):
    files = [read_onnx(write(folder / name, proto)) for name, proto in (("a.onnx", first), ("b.onnx", second))]
    return [(one.part, one.where, one.before, one.after) for one in compare_files(*files)]


def test_equal_files_do_not_differ(tmp_path):
    assert changes(tmp_path, model(), model()) == []


def test_the_same_values_stored_otherwise_do_not_differ(tmp_path):
    other = model()
    tensor = other.graph.initializer[0]
    values = numpy_helper.to_array(tensor).ravel().tolist()
    other.graph.initializer[0].CopyFrom(helper.make_tensor("w", FLOAT, tensor.dims, values))
    assert other.graph.initializer[0].float_data
    assert changes(tmp_path, model(), other) == []


def test_an_attribute_that_changed(tmp_path):
    [(part, where, before, after)] = changes(tmp_path, model(), model(stride=2))
    assert (part, where) == ("node", "conv")
    assert before == "Conv(x, w) -> c [strides=[1, 1]]"
    assert after == "Conv(x, w) -> c [strides=[2, 2]]"


def test_a_weight_that_changed(tmp_path):
    [(part, where, before, after)] = changes(tmp_path, model(), model(scale=2.0))
    assert (part, where) == ("weight", "w")
    assert before.startswith("float [4, 3, 3, 3] SHA-256 ")
    assert before != after


def test_a_weight_that_has_another_name(tmp_path):
    found = changes(tmp_path, model(), model(weight_name="kernel"))
    assert [one for one in found if one[0] == "weight"] == [("weight", "w", found[-1][2], "renamed to kernel")]


def test_operators_opsets_shapes_and_metadata_that_changed(tmp_path):
    other = model(extra=[helper.make_node("Relu", ["y"], ["r"])], opset=18, side=16, metadata={"stride": "32"})
    found = changes(tmp_path, model(), other)
    assert ("header", "opset ai.onnx", "17", "18") in found
    assert ("metadata", "names", "{'0': 'cat'}", "") in found
    assert ("metadata", "stride", "", "32") in found
    assert ("input", "x", "float [batch, 3, 8, width]", "float [batch, 3, 16, width]") in found
    assert ("operators", "Relu", "", "1") in found
    assert ("node", "r", "", "Relu(y) -> r") in found
    assert len(found) == 6


@pytest.mark.parametrize("content", [b"", b"no model at all, but text", b"\x80\x04\x95 a pickle", b"PK\3\4 a zip"])
def test_a_file_that_is_no_onnx(tmp_path, content):
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(OnnxFileError, match=rf"a\.onnx: got {len(content)} bytes .*ONNX model.*again"):
        read_onnx(path)


def test_a_file_that_was_cut_off_anywhere(tmp_path):
    """Metadata and further opsets stand last, and nobody misses those that were cut off: here there are none."""
    proto = model()
    del proto.metadata_props[:]
    del proto.opset_import[1:]
    path = write(tmp_path / "a.onnx", proto)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(OnnxFileError, match="again"):
            read_onnx(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(OnnxFileError, match=r"cannot be read .* Give the path"):
        read_onnx(tmp_path / "none.onnx")


def with_external_weights(path):
    onnx.save(model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_weights_in_another_file(tmp_path):
    file = read_onnx(with_external_weights(tmp_path / "a.onnx"))
    assert file.bytes == file.path.stat().st_size + (tmp_path / "weights.bin").stat().st_size
    assert check_providers(file)[0].problem == ""
    assert compare_files(file, read_onnx(write(tmp_path / "b.onnx", model()))) == ()


def test_weights_in_another_file_that_is_missing_or_cut_off(tmp_path):
    path = with_external_weights(tmp_path / "a.onnx")
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(OnnxFileError, match=r"weights\.bin: got 100 bytes, expected at least 432 bytes"):
        read_onnx(path)
    weights.unlink()
    with pytest.raises(OnnxFileError, match=r"weights\.bin: got no such file, expected at least 432 bytes"):
        read_onnx(path)


def test_weights_outside_of_the_folder_are_not_read(tmp_path):
    (tmp_path / "in").mkdir()
    path = with_external_weights(tmp_path / "in" / "a.onnx")
    proto = onnx.load(path, load_external_data=False)
    next(one for one in proto.graph.initializer[0].external_data if one.key == "location").value = "../secret"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(OnnxFileError, match="outside its folder"):
        read_onnx(path)


def test_the_onnx_file_in_an_archive(tmp_path, small):
    manifest = manifest_json(name="m", version="1.0", serialized_file="model.onnx", handler="h.py", config_file="")
    path = tmp_path / "m.mar"
    write_mar(path, {"MAR-INF/MANIFEST.json": manifest.encode(), "model.onnx": small.read_bytes()})
    with open_onnx(path) as file:
        assert file.subject == "m.mar: model.onnx"
        assert compare_files(file, read_onnx(small)) == ()
    write_mar(path, {"MAR-INF/MANIFEST.json": manifest.encode()})
    with pytest.raises(OnnxFileError, match=r"m\.mar: got 0 ONNX files"), open_onnx(path):
        pass


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_command_shows_and_counts(small, capsys):
    assert main(["graph", str(small), "--json"]) == 0
    document = last_line(capsys)
    assert document["macs"] is None
    assert "--shape HEIGHT WIDTH" in document["macs_unknown_because"]
    assert main(["graph", str(small), "--shape", "8", "--json"]) == 0
    assert last_line(capsys)["macs"] == 4 * 6 * 6 * 27
    assert main(["graph", str(small), "--shape", "8", "10"]) == 0
    shown = capsys.readouterr().out
    assert "MACs" in shown
    assert "metadata names" in shown
    assert "TensorRT takes every operator" in shown


def test_the_command_compares(tmp_path, small, capsys):
    other = write(tmp_path / "other.onnx", model(stride=2))
    assert main(["graph", str(small), "--diff", str(small)]) == 0
    assert capsys.readouterr().out == "EQUAL small.onnx and small.onnx\n"
    assert main(["graph", str(small), "--diff", str(other)]) == 1
    shown = capsys.readouterr().out
    assert "- conv: Conv(x, w) -> c [strides=[1, 1]]" in shown
    assert "+ conv: Conv(x, w) -> c [strides=[2, 2]]" in shown
    assert main(["graph", str(small), "--diff", str(other), "--json"]) == 1
    document = last_line(capsys)
    assert document["equal"] is False
    assert [one["where"] for one in document["changes"]] == ["conv"]


def test_the_command_names_what_is_wrong(small, capsys, monkeypatch):
    assert main(["graph", str(small.with_name("none.onnx"))]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["graph", str(small), "--diff", str(small), "--netron"]) == 2
    monkeypatch.setitem(__import__("sys").modules, "netron", None)
    assert main(["graph", str(small), "--netron"]) == 2
    assert "pip install netron" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    assert main(["graph", str(small)]) == 2
    assert "pip install 'detserve[onnx]'" in capsys.readouterr().err


@pytest.mark.shared_data
def test_real_files_are_shown(shared_data, capsys):
    path = shared_data / "models" / "yolox_nano" / "yolox_nano.onnx"
    assert main(["graph", str(path), "--json"]) == 0
    document = last_line(capsys)
    assert {one["name"]: one["nodes"] for one in document["operators"]}["Conv"] == 113
    assert document["macs"] == 522_553_408
    assert [one["problem"] for one in document["providers"]] == [""] * 3
