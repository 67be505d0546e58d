"""`detserve doctor OLD.mar`: everything that is wrong with an archive of MMDetection's own script, and its repair."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from dettools.cli import main
from original_packing import CONFIG, HANDLER, pack_as_original

META = {"dataset_meta": {"classes": ("cat", "dog")}}


def checkpoint_of(folder, **parts):
    content = {"state_dict": {"weight": torch.zeros(1000)}, "meta": META, **parts}
    torch.save(content, folder / "model.pth")
    return folder / "model.pth"


def findings_of(path, capsys, expected=1):
    assert main(["doctor", str(path), "--json"]) == expected
    return json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]


def by_subject(findings):
    return {one["subject"]: one for one in findings}


def test_every_fault_is_told_and_the_repair_comes_last(tmp_path, capsys):
    path = pack_as_original(tmp_path / "old store", checkpoint_of(tmp_path), name="nano")
    findings = findings_of(path, capsys)
    found = by_subject(findings)
    faults = {one["subject"] for one in findings if one["state"] == "fail"}
    assert faults == {"worker settings", "weights", "handler", "batches", "bad images", "threshold"}
    assert "Python config config.py where TorchServe expects YAML" in found["worker settings"]["found"]
    assert "imports mmcv, mmdet.apis" in found["handler"]["found"]
    assert "got the pickle model.pth, expected safetensors" in found["weights"]["found"]
    assert "constant 0.5, expected the request's" in found["threshold"]["found"]
    warned = {one["subject"] for one in findings if one["state"] == "warn"}
    assert warned == {"device", "SHA256SUMS", "category_map.json", "golden/golden.json"}
    assert all(one["remedy"] and "got " in one["found"] for one in findings[:-1])
    assert findings[-1]["subject"] == "repair"
    repaired = path.with_name("nano-repaired.mar")
    assert findings[-1]["remedy"] == f"detserve archive '{path}' --out '{repaired}'"
    assert "6 faults, 4 more" in findings[-1]["found"]


def test_masks_that_the_handler_drops_are_a_fault_of_models_that_have_them(tmp_path, capsys):
    config = CONFIG.replace("bbox_head=", "mask_head=dict(type='FCNMaskHead'), bbox_head=")
    checkpoint = checkpoint_of(tmp_path)
    path = pack_as_original(tmp_path / "a", checkpoint, config=config)
    assert "a handler that drops them" in by_subject(findings_of(path, capsys))["masks"]["found"]
    kept = pack_as_original(
        tmp_path / "b", checkpoint, config=config, handler=HANDLER.replace("pred_instances.bboxes", "masks")
    )
    assert "masks" not in by_subject(findings_of(kept, capsys))


def test_training_state_and_missing_names_are_told(tmp_path, capsys):
    checkpoint = checkpoint_of(tmp_path, optimizer={"state": torch.zeros(1_000_000)}, meta={})
    found = findings_of(pack_as_original(tmp_path / "a", checkpoint), capsys)
    assert any("got 4 MB, of which 0 MB are the model's" in one["found"] for one in found)
    names = by_subject(found)["class names"]
    assert "a model with 2 classes" in names["found"]
    assert names["remedy"] == "The config names them: they are taken."
    nameless = CONFIG.replace(", metainfo=dict(classes=('cat', 'dog'))", "")
    found = findings_of(pack_as_original(tmp_path / "b", checkpoint, config=nameless), capsys)
    assert "--categories" in by_subject(found)["class names"]["remedy"]


class Command:
    def __reduce__(self):
        return print, ("executed",)


def test_a_checkpoint_that_runs_something_is_not_run_and_cannot_be_repaired(tmp_path, capsys):
    path = pack_as_original(tmp_path / "a", checkpoint_of(tmp_path, hook=Command()))
    assert main(["doctor", str(path), "--json"]) == 1
    *printed, document = capsys.readouterr().out.splitlines()
    assert printed == []
    repair = json.loads(document)["findings"][-1]
    assert (repair["subject"], repair["state"]) == ("repair", "fail")
    assert "must not be read" in repair["found"]


def test_a_damaged_config_is_told(tmp_path, capsys):
    path = pack_as_original(tmp_path / "a", checkpoint_of(tmp_path), config="import os\n")
    [only] = findings_of(path, capsys)
    assert only["state"] == "fail"
    assert "more than an assignment of data" in only["found"]


def test_other_archives_are_looked_at_alone_too(tmp_path, capsys):
    spec = ROOT / "model_store" / "shapes" / "shapes.yaml"
    assert main(["archive", str(spec), "--out", str(tmp_path / "shapes.mar"), "--json"]) == 0
    capsys.readouterr()
    [found] = findings_of(tmp_path / "shapes.mar", capsys, expected=0)
    assert (found["subject"], found["state"]) == ("shapes.mar", "ok")
    [found] = findings_of(tmp_path / "none.mar", capsys)
    assert (found["state"], "there is none" in found["found"]) == ("fail", True)


def test_in_a_model_store_the_old_archive_fails_and_doctor_is_named(tmp_path, capsys):
    path = pack_as_original(tmp_path / "store", checkpoint_of(tmp_path), name="nano")
    assert main(["doctor", "--model-store", str(tmp_path / "store"), "--json"]) == 1
    found = by_subject(json.loads(capsys.readouterr().out.splitlines()[-1])["findings"])["nano.mar"]
    assert found["state"] == "fail"
    assert f"`detserve doctor {path}`" in found["remedy"]


@pytest.mark.shared_data
@pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="MMDetection is not installed")
def test_what_the_original_script_itself_wrote(shared_data, tmp_path, capsys):
    folder = Path(importlib.util.find_spec("mmdet").submodule_search_locations[0])
    script = folder / ".mim" / "tools" / "deployment" / "mmdet2torchserve.py"
    model = shared_data / "models" / "mmdet_yolox_nano"
    config, checkpoint = model / "yolox_nano_8xb8-300e_coco.py", model / "yolox_nano_mmdet.pth"
    subprocess.run(
        [sys.executable, script, config, checkpoint, "--output-folder", tmp_path, "--model-name", "nano"],
        check=True,
        capture_output=True,
    )
    findings = findings_of(tmp_path / "nano.mar", capsys)
    # The stand-in that the other tests pack is told the same as the original.
    assert {one["subject"] for one in findings if one["state"] == "fail"} == {
        *("worker settings", "weights", "handler", "batches", "bad images", "threshold"),
    }
    assert "nano 1.0" in findings[-1]["found"]
