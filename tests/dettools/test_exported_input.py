"""Exported files from strangers, and options that an exported file cannot heed: refused, each with what to do."""

import json
import shutil
from pathlib import Path

import onnx
import pytest
from checkout import ROOT
from dettools.cli import main

SPEC = ROOT / "model_store" / "shapes" / "shapes.yaml"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "shapes.onnx"
    assert main(["export", str(SPEC), "--out", str(out)]) == 0
    return out


def refusal(capsys, *arguments) -> str:
    assert main([str(one) for one in arguments]) == 2
    return capsys.readouterr().err


def forged(exported: Path, folder: Path, key: str, change) -> Path:
    """A copy whose metadata somebody changed."""
    model = onnx.load(str(exported))
    for one in model.metadata_props:
        if one.key == key:
            value = json.loads(one.value)
            change(value)
            one.value = json.dumps(value)
    copy = folder / "forged.onnx"
    onnx.save(model, str(copy))
    return copy


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("detserve.spec", lambda spec: spec.update(name="../../outside/pwned")),
        ("detserve.spec", lambda spec: spec["serving"].update(score_threshold="high")),
        ("detserve.spec", lambda spec: spec["serving"].update(workers=-3)),
        ("detserve.spec", lambda spec: spec["serving"].update(batch_size="8; rm")),
        ("detserve.spec", lambda spec: spec.update(runtime="torch")),
        ("detserve.spec", lambda spec: spec.update(family="nobody")),
        ("detserve.golden", lambda golden: golden.update(image="..")),
        ("detserve.golden", lambda golden: golden.update(image="golden.json")),
        ("detserve.golden", lambda golden: golden["labels"].pop()),
        ("detserve.golden", lambda golden: golden["labels"].__setitem__(0, 99)),
        ("detserve.export", lambda facts: facts.clear() or facts.update({"precision": 5})),
    ],
    ids=["name", "threshold", "workers", "batch", "runtime", "family", "up", "overwrite", "fewer", "label", "facts"],
)
def test_a_forged_description_is_refused_and_nothing_is_written(exported, tmp_path, capsys, key, change):
    file = forged(exported, tmp_path, key, change)
    store = tmp_path / "store" / "inner"
    store.mkdir(parents=True)
    said = refusal(capsys, "archive", file, "--model-store", store)
    assert "forged.onnx" in said or "precision" in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["forged.onnx", "inner", "store"]


@pytest.mark.parametrize(
    "option",
    [("--num-classes", "91"), ("--norm-eps", "0.5"), ("--builder-option", "topk_candidates=1"), ("--weights", "x.pth")],
    ids=lambda option: option[0],
)
def test_what_an_exported_file_cannot_heed_is_refused(exported, tmp_path, capsys, option):
    said = refusal(capsys, "archive", exported, *option, "--model-store", tmp_path)
    assert f"{option[0]}: got it with shapes.onnx, which is exported with its own" in said


def test_other_categories_than_the_file_s_are_refused(exported, tmp_path, capsys):
    named = tmp_path / "cars.json"
    categories = [{"id": number, "name": f"car {number}"} for number in range(1, 7)]
    named.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    said = refusal(capsys, "archive", exported, "--categories", named, "--model-store", tmp_path)
    assert "--categories: got it with shapes.onnx" in said


@pytest.mark.parametrize(
    ("line", "key"), [("preprocessing: {channel_order: bgr}", "preprocessing"), ("builder: ssd300_vgg16", "builder")]
)
def test_a_spec_that_contradicts_the_file_is_refused(exported, tmp_path, capsys, line, key):
    text = SPEC.read_text().replace(
        "builder: ssdlite320_mobilenet_v3_large", "" if key == "builder" else "builder: ssdlite320_mobilenet_v3_large"
    )
    spec = tmp_path / "wrong.yaml"
    spec.write_text(text.replace("golden_image: golden.jpg\n", "") + f"runtime: onnx\n{line}\n")
    said = refusal(capsys, "archive", spec, "--weights", exported, "--model-store", tmp_path)
    assert f"{key}: the spec says otherwise than shapes.onnx" in said
    assert f"detserve archive {exported.name}" in said


def test_a_checkpoint_in_place_of_a_spec_says_how(capsys):
    said = refusal(capsys, "export", SPEC.with_name("shapes.safetensors"))
    assert "--torchvision BUILDER --weights shapes.safetensors --categories COCO.json" in said


def test_a_spec_of_the_user_s_is_not_overwritten(tmp_path, capsys):
    weights = tmp_path / "shapes.safetensors"
    shutil.copy(SPEC.with_name("shapes.safetensors"), weights)
    categories = tmp_path / "c.json"
    rows = [{"id": place, "name": name} for place, name in enumerate("abcdef", 1)]
    categories.write_text(json.dumps({"images": [], "annotations": [], "categories": rows}))
    mine = tmp_path / "store" / "shapes" / "shapes.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for command, out in (("export", "a.onnx"), ("archive", "a.mar")):
        said = refusal(
            capsys,
            *(command, "--torchvision", "ssdlite320_mobilenet_v3_large", "--weights", weights),
            *("--categories", categories, "--out", tmp_path / out, "--model-store", tmp_path / "store"),
        )
        assert "shapes.yaml: exists already" in said
        assert mine.read_text() == "mine"


def test_the_spec_s_precision_is_the_file_s_unless_said(tmp_path, capsys):
    out = tmp_path / "half.onnx"
    assert main(["export", str(SPEC), "--serving", "precision=fp16", "--out", str(out), "--json"]) == 0
    answer = capsys.readouterr()
    document = json.loads(answer.out.splitlines()[-1])
    assert document["export"]["precision"] == "fp16"
    assert any("its cost in AP was not measured" in note for note in document["notes"])
    assert "expected fp32 or fp16" in refusal(capsys, "export", SPEC, "--serving", "precision=bf16", "--out", out)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--opset", "0"), "opset: got 0, expected 16 to 20"),
        (("--ap-budget=-5",), "--ap-budget: got -5, expected AP points from 0 to 100"),
        (("--ap-budget", "nan"), "--ap-budget: got nan"),
    ],
    ids=["opset", "negative", "nan"],
)
def test_numbers_out_of_range_are_refused_before_anything_is_done(tmp_path, capsys, option, said):
    message = refusal(capsys, "export", SPEC, "--out", tmp_path / "a.onnx", *option)
    assert said in message
    assert "reading" not in message


def test_weights_in_other_files_are_refused_with_the_way_to_one_file(exported, tmp_path, capsys):
    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(str(exported)), str(outside), save_as_external_data=True, location="weights.bin")
    said = refusal(capsys, "archive", outside, "--model-store", tmp_path)
    assert "weights in other files" in said
    assert "onnx.save(onnx.load('outside.onnx'), 'one.onnx')" in said


def test_weights_beside_a_file_that_holds_its_own_are_refused_by_verify(exported, capsys):
    assert "whose weights are inside" in refusal(capsys, "verify", exported, "--weights", "nothing.pth")
