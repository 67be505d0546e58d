"""`detserve export` as it is called, and what follows: inspect, verify, archive, serve, compare, evaluate."""

import contextlib
import hashlib
import io
import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from checkout import ROOT
from detserve.export.onnx_file import require_described
from detserve.export.torchvision_graphs import ClassCandidates
from detserve.spec import load_spec
from dettools.cli import main
from dettools.datasets.scenes import write_dataset
from onnx import numpy_helper
from PIL import Image

SPEC = ROOT / "model_store" / "shapes" / "shapes.yaml"
CHECKPOINT = SPEC.with_name("shapes.safetensors")
BUILDER = "ssdlite320_mobilenet_v3_large"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, count=6, seed=900)
    return folder


def of(scenes: Path) -> list[object]:
    return ["--verify", scenes / "images", "--annotations", scenes / "annotations.json"]


def call(*arguments: object) -> tuple[int, str]:
    """Run the command line; return its exit code and its stdout."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        code = main([str(argument) for argument in arguments])
    return code, told.getvalue()


def last(told: str) -> dict:
    return json.loads(told.splitlines()[-1])


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def proven(tmp_path_factory, scenes) -> tuple[Path, str]:
    """The demo model exported with its proof, and what was told."""
    out = tmp_path_factory.mktemp("proven") / "shapes.onnx"
    code, told = call("export", SPEC, "--out", out, *of(scenes), "--json")
    assert code == 0, told
    return out, told


@pytest.fixture
def copy(proven, tmp_path) -> Path:
    """The proven file with its certificate, in a folder of its own."""
    for path in proven[0].parent.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path / "shapes.onnx"


def test_it_tells_what_was_exported_and_json_is_the_last_line(proven):
    out, told = proven
    document = last(told)
    content = out.read_bytes()
    assert (document["file"], document["refused"]) == (str(out), None)
    assert (document["sha256"], document["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
    assert document["source"] == {
        "file": "shapes.safetensors",
        "sha256": hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest(),
    }
    assert document["export"]["opset"] == 17
    assert document["notes"] == []
    assert f"{out}: shapes 1.0, {BUILDER}, 6 classes, fp32, opset 17, NMS in the detector, dynamic: batch" in told
    assert "AP (bbox, 6 images): eager" in told


def test_the_certificate_holds_every_batch_size_the_ap_and_the_machine(proven):
    out, told = proven
    assert names_in(out.parent) == {"shapes.onnx", "shapes.certificate.json"}
    certificate = json.loads(out.with_name("shapes.certificate.json").read_text())
    assert certificate["passed"]
    assert certificate["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert certificate["source"]["sha256"] == hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()
    assert certificate["environment"]
    parity = certificate["parity"]
    assert parity == last(told)["parity"]
    assert [(row["runtime"], row["batch_size"]) for row in parity["rows"]] == [
        ("torch", 3),
        ("onnx", 1),
        ("onnx", 3),
        ("onnx", 8),
    ]
    for row in parity["rows"]:
        # Six scenes, each as it is and smaller.
        assert (row["images"], row["unmatched"], row["flips"], row["failing"]) == (12, 0, 0, 0)
        assert row["detections"] > 60
        assert row["box_px"] <= 0.1
        assert row["score"] <= 1e-3
    assert len(parity["image_sizes"]) >= 4
    (ap,) = parity["ap"]
    assert (ap["iou_type"], ap["images"], ap["passed"]) == ("bbox", 6, True)
    assert abs(ap["onnx"] - ap["eager"]) <= 1e-3
    assert ap["eager"] > 0.5


def test_inspect_shows_what_the_file_says(proven):
    out, _ = proven
    code, told = call("inspect", out, "--json")
    document = last(told)
    assert code == 0
    assert document["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert (document["spec"]["name"], document["spec"]["runtime"]) == ("shapes", "onnx")
    assert [row["name"] for row in document["categories"]][:2] == ["circle", "square"]
    assert len(document["golden"]["scores"]) == last(proven[1])["golden_detections"]
    assert [(one["name"], one["shape"]) for one in document["inputs"]] == [("images", ["batch", 3, 320, 320])]
    assert [one["name"] for one in document["outputs"]] == ["boxes", "scores", "labels"]
    code, told = call("inspect", out)
    assert code == 0
    assert "shapes.safetensors" in told


def test_verify_reproduces_the_golden_detections_and_knows_the_certificate(proven):
    code, told = call("verify", proven[0], "--json")
    assert code == 0
    assert (last(told)["verified"], last(told)["certified"], last(told)["drift"]) == (True, True, "")
    assert "the file that its certificate is about" in told


def rewrite(path: Path, change) -> None:
    model = onnx.load(str(path))
    change(model)
    path.write_bytes(model.SerializeToString())


def rename(model) -> None:
    model.graph.name = "another"


def scale_a_weight(model) -> None:
    """Of the last layer, by a tenth."""
    weight = next(one for one in model.graph.initializer if "classification_head" in one.name and len(one.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.1, weight.name))


def test_a_tampered_file_is_not_the_certified_one(copy):
    rewrite(copy, rename)
    code, told = call("verify", copy, "--json")
    assert code == 1
    assert (last(told)["verified"], last(told)["certified"], last(told)["drift"]) == (False, False, "")
    assert "NOT the file that its certificate is about" in told


def test_tampered_weights_are_found_without_a_certificate(copy):
    copy.with_name("shapes.certificate.json").unlink()
    rewrite(copy, scale_a_weight)
    code, told = call("verify", copy, "--json")
    assert code == 1
    assert (last(told)["verified"], last(told)["certified"]) == (False, None)
    assert "golden check FAILED" in told


def test_a_certificate_that_cannot_be_read_is_an_input_error(copy, capsys):
    copy.with_name("shapes.certificate.json").write_text("{")
    assert main(["verify", str(copy)]) == 2
    assert "shapes.certificate.json: cannot be read" in capsys.readouterr().err


def test_a_budget_that_is_not_met_refuses_and_leaves_the_file_before_as_it_was(
    copy, scenes, tmp_path_factory, monkeypatch
):
    """Classes in another order, which a golden image without objects cannot show: only one's own images can."""
    blank = tmp_path_factory.mktemp("golden") / "blank.png"
    Image.new("RGB", (64, 64), "gray").save(blank)
    honest = ClassCandidates.forward

    def shifted(self, images):
        boxes, scores, labels = honest(self, images)
        return boxes, scores, labels % self.classes + 1

    monkeypatch.setattr(ClassCandidates, "forward", shifted)
    before = copy.read_bytes()
    code, told = call("export", SPEC, "--out", copy, "--force", "--golden-image", blank, *of(scenes), "--json")
    document = last(told)
    assert code == 1
    assert (document["file"], document["parity"]["passed"]) == (None, False)
    assert "and 0.1 AP is the budget" in document["refused"]
    assert "label_flip" in document["refused"]
    assert copy.read_bytes() == before
    refusal = json.loads(copy.with_name("shapes.refused.json").read_text())
    assert (refusal["passed"], refusal["parity"]["ap"][0]["passed"]) == (False, False)
    assert "not written" in told
    # What lies there is still what was certified before.
    assert names_in(copy.parent) == {"shapes.onnx", "shapes.certificate.json", "shapes.refused.json"}
    assert call("verify", copy)[0] == 0


def test_a_proof_that_is_passed_takes_the_refusal_away(tmp_path, scenes):
    out = tmp_path / "shapes.onnx"
    (tmp_path / "shapes.refused.json").write_text("{}")
    code, _ = call("export", SPEC, "--out", out, "--verify", scenes / "images" / "000001.jpg")
    assert code == 0
    assert names_in(tmp_path) == {"shapes.onnx", "shapes.certificate.json"}


def test_an_export_without_a_proof_does_not_stand_behind_the_certificate_of_another(copy):
    code, _ = call("export", SPEC, "--out", copy, "--force", "--nms", "graph", "--dynamic", "none")
    assert code == 0
    assert names_in(copy.parent) == {"shapes.onnx"}
    assert call("verify", copy)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "or --torchvision BUILDER"),
        ([SPEC, "--torchvision", BUILDER], "give either"),
        (["--torchvision", BUILDER], "--torchvision also needs --weights and --categories"),
        (["--torchvision", "yolo", "--weights", CHECKPOINT, "--categories", "ANNOTATIONS"], "got 'yolo', expected one"),
        (["none.yaml"], "none.yaml"),
        ([SPEC, "--weights", "none.pth"], "none.pth"),
        ([SPEC, "--annotations", "ANNOTATIONS"], "--annotations: expected --verify with the one folder"),
        ([SPEC, "--verify", "none"], "none"),
        ([SPEC, "--opset", "13"], "got 13, expected 16 to 20"),
        ([SPEC, "--dynamic", "size"], "resizes every image to 320×320"),
        ([SPEC, "--dynamic", "width"], "got 'width', expected batch, size, both with a comma, or none"),
        ([SPEC, "--batch", "0"], "got 0, expected 1 or more"),
        ([SPEC, "--serving", "colour=red"], "colour"),
    ],
)
def test_a_usage_error_is_exit_code_2_and_nothing_is_written(tmp_path, scenes, capsys, arguments, said):
    given = [scenes / "annotations.json" if argument == "ANNOTATIONS" else argument for argument in arguments]
    # The spec of the demo model lies in the default store, and is not to be overwritten.
    store = ["--model-store", str(tmp_path / "store")]
    code = main(["export", *map(str, given), "--out", str(tmp_path / "x.onnx"), *store])
    told = capsys.readouterr()
    assert (code, told.out) == (2, "")
    assert told.err.startswith("detserve export: ") or "\ndetserve export: " in told.err
    assert said in told.err
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("choice", [["--precision", "int4"], ["--nms", "nowhere"], ["--batch", "two"]])
def test_an_unknown_choice_is_exit_code_2(choice, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["export", str(SPEC), *choice])
    assert caught.value.code == 2
    assert choice[0] in capsys.readouterr().err


def test_what_is_there_or_exported_already_is_refused(proven, capsys):
    out, _ = proven
    assert main(["export", str(SPEC), "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["export", str(out), "--out", str(out.with_name("again.onnx"))]) == 2
    assert "which is exported already" in capsys.readouterr().err


def test_a_checkpoint_without_a_spec_is_exported_and_its_spec_is_written(tmp_path, scenes):
    categories = scenes / "annotations.json"
    given = ["--torchvision", BUILDER, "--weights", CHECKPOINT, "--categories", categories, "--name", "mine"]
    code, told = call("export", *given, "--model-store", tmp_path, "--serving", "score_threshold=0.2", "--json")
    assert code == 0
    out = tmp_path / "mine.onnx"
    assert last(told)["file"] == str(out)
    spec = load_spec(tmp_path / "mine" / "mine.yaml")
    assert (spec.name, spec.family, spec.runtime, spec.builder) == ("mine", "torchvision", "torch", BUILDER)
    assert Path(spec.weights) == CHECKPOINT
    assert spec.serving.score_threshold == 0.2
    described = require_described(out).spec
    assert (described.name, described.serving.score_threshold) == ("mine", 0.2)
    assert [one.name for one in described.categories] == ["circle", "square", "triangle", "star", "ring", "cross"]


def test_a_published_release_is_exported_as_the_checkpoint_is(proven, tmp_path):
    assert call("publish", CHECKPOINT, tmp_path / "shapes.safetensors")[0] == 0
    (release,) = tmp_path.glob("shapes-*.safetensors")
    out = tmp_path / "shapes.onnx"
    assert call("export", SPEC, "--weights", release, "--out", out)[0] == 0
    source = require_described(out).spec.source
    assert (source.file, source.sha256) == (release.name, hashlib.sha256(release.read_bytes()).hexdigest())
    mine, theirs = (onnx.load(str(path)).graph for path in (out, proven[0]))
    assert mine.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)


# Served.


@pytest.fixture(scope="module")
def instance(serve, proven, tmp_path_factory) -> str:
    """A server with the archive that was made of the exported file, alone in a folder."""
    folder = tmp_path_factory.mktemp("alone")
    file = shutil.copy(proven[0], folder / "shapes.onnx")
    code, told = call("archive", file, "--name", "shapes_onnx", "--out", folder / "shapes_onnx.mar", "--json")
    assert code == 0
    assert last(told)["source_sha256"] == hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()
    assert call("verify", folder / "shapes_onnx.mar")[0] == 0
    return serve([folder / "shapes_onnx.mar"], "exported")


@pytest.mark.server
@pytest.mark.parametrize("against", [["--spec", SPEC], []], ids=["the checkpoint", "the archive itself"])
def test_served_it_is_what_eager_finds(instance, proven, scenes, tmp_path, against):
    """Against the archive itself, onnxruntime reads the exported file plainly."""
    store = tmp_path / "store"
    store.mkdir()
    if not against:
        assert call("archive", proven[0], "--name", "shapes_onnx", "--out", store / "shapes_onnx.mar")[0] == 0
    code, told = call(
        *("compare", "shapes_onnx", scenes / "images", "--instance", instance, "--model-store", store),
        *(*against, "--json"),
    )
    report = last(told)
    assert code == 0, report
    assert (report["passed"], report["images"]) == (True, 6)
    assert report["matched"] > 30


@pytest.mark.server
@pytest.mark.slow
def test_its_ap_through_the_endpoint_is_eager_s_on_the_checkpoint(instance, tmp_path):
    write_dataset(tmp_path / "scenes", count=64, seed=4_000)
    code, told = call(
        *("evaluate", "shapes_onnx", "--images", tmp_path / "scenes" / "images"),
        *("--annotations", tmp_path / "scenes" / "annotations.json", "--instance", instance),
        *("--against", "eager", "--spec", SPEC, "--out", tmp_path / "out", "--json"),
    )
    document = last(told)
    certificate = document["certificate"]
    assert code == 0, document
    assert (document["answered"], document["failed"]) == (64, 0)
    assert abs(certificate["ap_served"] - certificate["ap_reference"]) <= 1e-3
    assert 0.7 < certificate["ap_reference"] < 0.95
