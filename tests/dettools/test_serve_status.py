"""What a served ONNX file runs on, in `serve status` and in a benchmark of the endpoint."""

import json

import numpy as np
import pytest
from checkout import ROOT
from dethandlers.detections import Category
from dethandlers.spec import Decoding, Preprocessing, Serving, Spec
from detserve.archive import build_archive
from dettools import cli
from onnx import TensorProto, helper, numpy_helper
from small_networks import write_graph
from throwaway import build

pytestmark = pytest.mark.server
GOLDEN = ROOT / "model_store" / "shapes" / "golden.jpg"
CLASSES = 2


@pytest.fixture(scope="module")
def instance(tmp_path_factory, serve):
    """A server with a random network of one convolution, in YOLOX's form."""
    folder = tmp_path_factory.mktemp("onnx")
    kernel = np.random.default_rng(0).normal(0, 0.02, (5 + CLASSES, 3, 8, 8)).astype(np.float32)
    constants = {"kernel": kernel, "flat": np.array([0, 5 + CLASSES, 64], np.int64)}
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["maps"], strides=[8, 8]),
        helper.make_node("Reshape", ["maps", "flat"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("Sigmoid", ["rows"], ["raw"]),
    ]
    write_graph(
        folder / "model.onnx",
        nodes,
        [("images", TensorProto.FLOAT, ["batch", 3, 64, 64])],
        [("raw", TensorProto.FLOAT, ["batch", 64, 5 + CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    spec = Spec(
        name="small",
        family="yolox",
        categories=tuple(Category(label + 1, f"class {label}", label) for label in range(CLASSES)),
        runtime="onnx",
        weights="model.onnx",
        preprocessing=Preprocessing(size=(64, 64), scale=1 / 255),
        decoding=Decoding(strides=(8,)),
        serving=Serving(score_threshold=0.2),
    )
    built = build_archive(spec, folder=folder, out=folder / "small.mar", golden_image=GOLDEN)
    return serve([built.path], "onnx")


def run_json(capsys, *arguments):
    code = cli.main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_status_tells_the_provider_in_text_and_in_json(instance, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["serve", "status", "--instance", instance]) == 0
    assert "runtime onnx, provider CPUExecutionProvider, device cpu, precision fp32" in capsys.readouterr().out
    code, document = run_json(capsys, "serve", "status", "--instance", instance)
    assert code == 0
    (model,) = document["models"]
    assert (model["reported"]["runtime"], model["reported"]["provider"]) == ("onnx", "CPUExecutionProvider")
    # Building the archive ran the same graph.
    assert model["reported"]["optimisation"] == "cached"


def test_a_benchmark_of_the_endpoint_tells_the_provider(instance, capsys, tmp_path):
    quick = ("--concurrency", 1, "--window", "200ms", "--max-time", "0.6s", "--warm-up", "0s")
    out = ("--out", tmp_path / "run")
    code = cli.main(
        [*map(str, ("benchmark", "served", "small", "--instance", instance, "--images", GOLDEN, *quick, *out))]
    )
    assert code == 0
    assert "What ran: onnx " in (text := " ".join(capsys.readouterr().out.split()))
    assert "CPUExecutionProvider, cpu, fp32." in text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["target"]["provider"] == "CPUExecutionProvider"
    assert "CPUExecutionProvider" in (tmp_path / "run" / "report.html").read_text()


def test_how_long_a_token_holds_is_not_asked_of_an_edge(capsys, tmp_path):
    """Its tokens do not run out: an option that would do nothing is refused."""
    assert cli.main(["serve", "start", "--models", str(build(tmp_path)), "--edge", "--token-minutes", "5"]) == 2
    assert "--edge-tokens FILE" in capsys.readouterr().err
