"""`detserve evaluate` of an exported file: run in this process, against its checkpoint or, plainly said, itself."""

import json

import pytest
import torch
from checkout import ROOT
from dettools.cli import main
from dettools.datasets.scenes import write_dataset
from small_networks import witness

SPEC = ROOT / "model_store" / "shapes" / "shapes.yaml"
CHECKPOINT = SPEC.with_name("shapes.safetensors")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "shapes.onnx"
    assert main(["export", str(SPEC), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, count=4, seed=900)
    return ["--images", folder / "images", "--annotations", folder / "annotations.json"]


def evaluate(capsys, *arguments):
    code = main(["evaluate", *map(str, arguments), "--json"])
    told = capsys.readouterr()
    return code, json.loads(told.out.splitlines()[-1]) if code < 2 else told.err


def test_it_has_the_ap_of_its_checkpoint_and_is_certified_against_it(exported, scenes, tmp_path, capsys):
    of_spec, spec = evaluate(capsys, SPEC, *scenes, "--out", tmp_path / "spec")
    against = ["--against", "eager", "--spec", SPEC, "--weights", CHECKPOINT]
    code, told = evaluate(capsys, exported, *scenes, *against, "--out", tmp_path / "onnx")
    assert (of_spec, code) == (0, 0)
    assert "runtime onnx" in told["model"]
    assert told["metrics"]["bbox"]["figures"]["AP"] == pytest.approx(spec["metrics"]["bbox"]["figures"]["AP"], abs=1e-3)
    reference = told["certificate"]["reference"]
    assert "torchvision" in reference
    assert "shapes.safetensors" in reference


def test_without_a_spec_the_reference_says_that_it_is_the_file_itself(exported, scenes, tmp_path, capsys):
    code, told = evaluate(capsys, exported, *scenes, "--against", "eager", "--out", tmp_path)
    assert code == 0
    assert "shapes.onnx itself (its source checkpoint is not inside)" in told["certificate"]["reference"]


def test_a_checkpoint_for_a_file_with_its_weights_inside_is_refused(exported, scenes, tmp_path, capsys):
    for more in ([], ["--spec", SPEC], ["--against", "eager"]):
        code, told = evaluate(capsys, exported, *scenes, "--weights", CHECKPOINT, *more, "--out", tmp_path)
        assert code == 2
        assert "whose weights are inside" in told


def test_a_file_that_is_not_described_and_one_that_is_not_there_are_refused(scenes, tmp_path, capsys):
    foreign = witness(tmp_path / "foreign.onnx")
    for path, words in ((foreign, "foreign.onnx"), (tmp_path / "none.onnx", "none.onnx: is no file")):
        code, told = evaluate(capsys, path, *scenes, "--out", tmp_path)
        assert code == 2
        assert words in told
