"""`detserve eval-metric` as people type it: by our options and by those of MMDetection's eval_metric.py."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from coco_scenes import checked, scenes
from dettools import cli
from dettools.coco_metrics import evaluate_coco

DETSERVE = Path(sys.executable).with_name("detserve")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """val.json, results.json with masks, result.pkl of MMDetection 3.x and a config."""
    document, results = scenes(21, masks=True)
    (tmp_path / "val.json").write_text(json.dumps(document))
    (tmp_path / "results.json").write_text(json.dumps(results))
    entries = []
    for image in document["images"]:
        mine = [one for one in results if one["image_id"] == image["id"]]
        boxes = np.array([one["bbox"] for one in mine]).reshape(-1, 4)
        found = {
            "bboxes": np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]),
            "scores": np.array([one["score"] for one in mine]),
            "labels": np.array([one["category_id"] // 2 - 1 for one in mine], np.int64),
        }
        entries.append({"img_id": image["id"], "img_path": image["file_name"], "pred_instances": found})
    (tmp_path / "result.pkl").write_bytes(pickle.dumps(entries))
    (tmp_path / "config.py").write_text("raise SystemExit('a config is a program; nobody runs it here')")
    monkeypatch.chdir(tmp_path)
    return document, results


def run(capsys, *arguments: str, code: int = 0) -> tuple[str, str]:
    assert cli.main(["eval-metric", *arguments]) == code
    said = capsys.readouterr()
    return said.out, said.err


def message_of(capsys, *arguments: str) -> str:
    out, err = run(capsys, *arguments, code=2)
    assert out == ""
    message = err.splitlines()[-1]
    assert message.startswith("detserve eval-metric: ")
    return message


def test_the_twelve_lines(files, capsys):
    document, results = files
    out, err = run(capsys, "results.json", "--annotations", "val.json")
    metrics = evaluate_coco(checked(document), results)
    lines = [line for line in out.splitlines() if "@[" in line]
    assert len(lines) == 12
    assert lines[0] == f" Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = {metrics.ap:0.3f}"
    assert f"bbox_mAP_copypaste: {metrics.ap:.3f} {metrics.ap50:.3f}" in out
    assert err == ""


def test_json_is_the_last_line_and_out_has_the_same(files, capsys):
    document, results = files
    out, err = run(
        capsys,
        "results.json",
        "--annotations=val.json",
        "--iou-type",
        "bbox",
        "segm",
        "--out",
        "m/metrics.json",
        "--json",
    )
    answer = json.loads(out)
    assert answer == json.loads(Path("m/metrics.json").read_text())
    for iou_type in ("bbox", "segm"):
        metrics = evaluate_coco(checked(document), results, iou_type=iou_type)
        assert answer["metrics"][iou_type] == json.loads(json.dumps(metrics.to_json()))
    assert "Average Precision" in err
    assert answer["source"] == "COCO results"


def test_the_classes_and_the_interval(files, capsys):
    arguments = ("results.json", "--annotations", "val.json", "--per-class", "--confidence", "0.9", "--resamples", "50")
    out, _ = run(capsys, *arguments, "--max-dets", "5", "--json")
    answer = json.loads(out)["metrics"]["bbox"]
    interval = answer["interval"]
    assert answer["max_detections"] == [5]
    assert interval["low"] < interval["ap"] < interval["high"]
    assert interval["ap"] == pytest.approx(answer["figures"]["AP"], abs=1e-12)
    assert (interval["confidence"], interval["resamples"], interval["seed"]) == (0.9, 50, 0)
    out, _ = run(capsys, *arguments)
    assert "90% interval" in out
    heading, *rows = [line.split() for line in out.splitlines() if line.strip().startswith("class ")]
    assert heading == ["class", "AP", "AP50", "AR100", "objects", "detections"]
    assert [row[1] for row in rows] == ["0", "1", "2", "3"]
    # The class without objects.
    assert rows[-1][2:6] == ["–", "–", "–", "0"]


# The original's forms.


def test_the_forms_of_the_original(files, capsys):
    expected, _ = run(capsys, "results.json", "--annotations", "val.json", "--iou-type", "bbox", "--per-class")
    for options in (
        ["--cfg-options", "test_evaluator.ann_file=val.json", "--eval-options", "classwise=True"],
        ["--cfg-options", "test_dataloader.dataset.ann_file=val.json", "--per-class"],
        ["--cfg-options", "data.test.ann_file=val.json", "model.x=3", "--per-class"],
    ):
        out, err = run(capsys, "config.py", "result.pkl", "--eval", "bbox", *options)
        assert out == expected
        assert "config.py is not read" in err
    assert "--cfg-options model.x: no effect" in err


def test_a_data_root_stands_before_the_annotation_file(files, capsys):
    Path("root").mkdir()
    Path("val.json").rename("root/val.json")
    options = ["test_dataloader.dataset.ann_file=val.json", "test_dataloader.dataset.data_root=root/"]
    assert "Average Precision" in run(capsys, "config.py", "result.pkl", "--cfg-options", *options)[0]


def test_the_eval_options_of_the_original(files, capsys):
    options = ["proposal_nums=(2,5,10)", "iou_thrs=[0.5,0.75]", "metric_items=['mAP']"]
    out, err = run(capsys, "results.json", "--annotations=val.json", "--json", "--eval-options", *options)
    answer = json.loads(out)["metrics"]["bbox"]
    assert answer["max_detections"] == [2, 5, 10]
    assert answer["iou_thresholds"] == [0.5, 0.75]
    assert "metric_items: all figures are shown" in err
    base = ("results.json", "--annotations", "val.json")
    assert "expected classwise, proposal_nums" in message_of(capsys, *base, "--eval-options", "nonsense=1")
    assert "expected numbers such as 100" in message_of(capsys, *base, "--eval-options", "proposal_nums=many")
    assert "expected KEY=VALUE" in message_of(capsys, *base, "--eval-options", "classwise")
    assert "--iou-type bbox, whose AR" in message_of(capsys, *base, "--eval", "proposal")
    assert "Pascal VOC metric" in message_of(capsys, *base, "--eval", "mAP")
    assert "give one of them" in message_of(capsys, *base, "--eval", "segm", "--iou-type", "bbox")


def test_format_only_writes_coco_results(files, capsys):
    _, results = files
    out, err = run(capsys, "config.py", "result.pkl", "--format-only", "--annotations", "val.json")
    assert out == ""
    assert f"{len(results)} results written to result.results.json" in err
    written = json.loads(Path("result.results.json").read_text())
    assert len(written) == len(results)
    expected, _ = run(capsys, "result.pkl", "--annotations", "val.json")
    assert run(capsys, "result.results.json", "--annotations", "val.json")[0] == expected
    out, _ = run(capsys, "result.pkl", "--format-only", "--annotations", "val.json", "--out", "x.json", "--json")
    assert json.loads(out)["results"] == "x.json"
    message = message_of(capsys, "x.json", "--format-only", "--annotations", "val.json", "--out", "x.json")
    assert "is the file that is read" in message


def test_what_is_missing_is_named(files, capsys):
    assert "no annotations: give --annotations val.json" in message_of(capsys, "config.py", "result.pkl")
    assert "expected one results file" in message_of(capsys, "config.py")
    assert "expected one results file" in message_of(capsys, "a.json", "b.json")
    assert "none.json: cannot be read" in message_of(capsys, "none.json", "--annotations", "val.json")
    assert "none.json: cannot be read" in message_of(capsys, "results.json", "--annotations", "none.json")
    message = message_of(capsys, "result.pkl", "--annotations", "val.json", "--iou-type", "segm")
    assert "results have no segmentation" in message
    _, err = run(capsys, "results.json", "--annotations", "val.json", "--out", "val.json/x.json", code=2)
    assert "val.json/x.json: cannot be written" in err


def test_a_detector_that_finds_nothing_has_an_ap_of_0(files, capsys):
    Path("results.json").write_text("[]")
    out, _ = run(capsys, "results.json", "--annotations", "val.json", "--json", "--confidence", "--resamples", "5")
    answer = json.loads(out)["metrics"]["bbox"]
    assert (answer["figures"]["AP"], answer["detections"], answer["interval"]["high"]) == (0, 0, 0)


# Real predictions, by the real command.


@pytest.mark.shared_data
def test_the_published_figures_of_a_real_model_and_the_right_ones(shared_data):
    """.673 .892 .780 is what MMDetection shows: its annotation with the id 0 is lost. Ours finds it."""
    folder = shared_data / "preds" / "hoovichen"
    annotations = folder / "data" / "package" / "test2017" / "_annotations.coco.json"
    command = [str(DETSERVE), "eval-metric", "config.py", str(folder / "result.pkl"), "--eval", "bbox"]
    command += ["--cfg-options", f"test_evaluator.ann_file={annotations}", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    metrics = json.loads(answer.stdout)["metrics"]["bbox"]
    assert [round(metrics["pycocotools"][name], 3) for name in ("AP", "AP50", "AP75")] == [0.673, 0.892, 0.780]
    assert [round(metrics["figures"][name], 3) for name in ("AP", "AP50", "AP75")] == [0.681, 0.902, 0.790]
    assert "bbox_mAP_copypaste: 0.681 0.902 0.790" in answer.stderr
    assert (
        "lose the annotation with the id 0 and show on this file:\nbbox_mAP_copypaste: 0.673 0.892 0.780"
        in answer.stderr
    )
