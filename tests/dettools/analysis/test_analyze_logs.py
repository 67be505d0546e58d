"""`detserve analyze-logs plot_curve`: values, pictures and messages, beside what the original made of the logs."""

import csv
import json
import math

import numpy as np
import pytest
from dettools.analysis.training_curves import band_of, curve_of, smoothed
from dettools.analysis.training_log import TrainingLogError
from dettools.cli import main
from dettools.reports.log_curves import short_names
from training_logs import log_2x, log_3x, original_rows, run_of, write_lines


def test_each_value_at_its_own_iteration(tmp_path):
    """[REPRO] of rows without the metric the original keeps the iterations: x and y of different lengths."""
    lines = log_3x(2, per_epoch=3, length=6)
    for line in lines[:2]:
        line.pop("loss")
    original = original_rows(lines)
    assert [(len(own["step"]), len(own["loss"])) for own in original.values()] == [(4, 2), (2, 2)]
    curve = curve_of(run_of(tmp_path, lines), "loss")
    assert [(point.step, point.value) for point in curve.points] == [(step, 1 / step) for step in (6, 8, 10, 12)]


def test_start_epoch(tmp_path):
    """The original takes it and does nothing with it."""
    log = run_of(tmp_path, log_2x(4))
    assert [point.epoch for point in curve_of(log, "bbox_mAP", start_epoch=3).points] == [3, 4]
    with pytest.raises(TrainingLogError, match="got --start-epoch 9, expected one up to 4, the last with bbox_mAP"):
        curve_of(log, "bbox_mAP", start_epoch=9)


def test_best_and_last(tmp_path):
    lines = log_2x(4)
    for line, value in zip([line for line in lines if line.get("mode") == "val"], (0.1, 0.3, 0.3, 0.2), strict=True):
        line["bbox_mAP"] = value
    curve = curve_of(run_of(tmp_path, lines), "bbox_mAP")
    assert ((curve.best.epoch, curve.best.value), curve.last.value) == ((2, 0.3), 0.2)
    assert curve_of(run_of(tmp_path, lines), "loss").best.epoch == 4


def test_smoothing():
    assert smoothed([4.0, 0.0], 0.5) == [4.0, pytest.approx(4 / 3)]
    assert smoothed([4.0, 0.0], 0) == [4.0, 0.0]
    assert smoothed([2.0] * 50, 0.9) == pytest.approx([2.0] * 50)


def test_learning_rate_and_evaluations_are_not_smoothed(tmp_path):
    log = run_of(tmp_path, log_2x(3))
    weights = {key: curve_of(log, key, smoothing=0.9).smoothed_by for key in ("loss", "lr", "bbox_mAP")}
    assert weights == {"loss": 0.9, "lr": 0, "bbox_mAP": 0}


def test_mean_and_spread(tmp_path):
    logs = [run_of(tmp_path, log_3x(epochs, every=1)) for epochs in (4, 6)]
    curves = [curve_of(log, "bbox_mAP") for log in logs]
    band = band_of("a", curves, by_epoch=True)
    assert band.x.tolist() == [1, 2, 3, 4]
    assert band.mean == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert band.std == pytest.approx(np.zeros(4), abs=1e-12)
    other = run_of(
        tmp_path, [{**line, "coco/bbox_mAP": 0.5} if "coco/bbox_mAP" in line else line for line in log_3x(10)]
    )
    # Every fifth epoch: between them the line is taken.
    band = band_of("a", [curves[1], curve_of(other, "bbox_mAP")], by_epoch=True)
    assert band.x.tolist() == [5, 6]
    assert band.std == pytest.approx([0.45 / math.sqrt(2), 0.44 / math.sqrt(2)])
    with pytest.raises(TrainingLogError, match="got one run as 'a', expected two or more"):
        band_of("a", curves[:1], by_epoch=True)


def test_names_are_the_part_that_differs():
    assert short_names(["w/r50/vis_data/scalars.json", "w/r101/vis_data/scalars.json"]) == ["r50", "r101"]
    assert short_names(["w/mask/20210113_153932.log.json"]) == ["mask"]
    assert short_names(["w/mask/20210113_153932.log.json", "/x/faster"]) == ["mask", "faster"]
    assert short_names(["w/mask/20210113_153932.log.json", "w/mask/20210114_153932.log.json"]) == [
        "20210113_153932.log.json",
        "20210114_153932.log.json",
    ]
    assert short_names(["a/b", "a/b"]) == ["a/b", "a/b"]


# The command.


@pytest.fixture
def logs(tmp_path, monkeypatch):
    write_lines(tmp_path / "two/a.log.json", log_2x(4))
    write_lines(tmp_path / "three/vis_data/scalars.json", log_3x(10))
    nan = log_2x(1, loss_bbox=float("nan"))[:-1]
    nan[1]["loss_bbox"] = 0.5
    write_lines(tmp_path / "nan.log.json", nan)
    write_lines(tmp_path / "empty.log.json", log_2x(1)[:1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    return tmp_path


def test_two_formats_in_one_picture(logs, capsys):
    """The original reads one or the other."""
    assert main(["analyze-logs", "plot_curve", "two", "three", "--csv", "c.csv", "--json"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out.splitlines()[-1])
    assert [(one["metric"], one["last"]["value"], one["last"]["epoch"]) for one in document["curves"]] == [
        ("bbox_mAP", 0.04, 4),
        ("coco/bbox_mAP", 0.1, 10),
    ]
    assert document["out"] == "curves_bbox_mAP.png"
    assert (logs / "curves_bbox_mAP.png").read_bytes().startswith(b"\x89PNG")
    assert "plot curve of two, metric is bbox_mAP" in printed.err
    assert "save curve to: curves_bbox_mAP.png" in printed.err
    rows = list(csv.DictReader((logs / "c.csv").read_text().splitlines()))
    assert [row["value"] for row in rows if row["log"] == "three"] == ["0.05", "0.1"]


def test_nan_is_shown_and_counted(logs, capsys):
    assert main(["analyze-logs", "plot_curve", "nan.log.json", "--keys", "loss_bbox", "--out", "p.svg", "--json"]) == 0
    curve = json.loads(capsys.readouterr().out)["curves"][0]
    assert curve["not_finite"] == {"count": 1, "steps": [100]}
    assert [point["value"] for point in curve["points"]] == [0.5]
    picture = (logs / "p.svg").read_text()
    assert "NaN in 1 of 2 rows" in picture
    assert "loss_bbox is NaN from iteration 100" in picture


def test_infinite_is_not_called_nan(tmp_path):
    lines = log_2x(2)
    lines[2]["loss"] = float("inf")
    assert curve_of(run_of(tmp_path, lines), "loss").lost_as == "NaN or infinite"
    assert len(curve_of(run_of(tmp_path, lines), "loss").points) == 3


def test_evaluations_without_such_objects_are_told(logs, capsys):
    lines = log_3x(10)
    lines[-1]["coco/bbox_mAP_s"] = 0.25
    write_lines(logs / "some/vis_data/scalars.json", lines)
    assert main(["analyze-logs", "plot_curve", "some", "--keys", "bbox_mAP_s", "--out", "p.svg", "--json"]) == 0
    printed = capsys.readouterr()
    assert [point["value"] for point in json.loads(printed.out)["curves"][0]["points"]] == [0.25]
    assert "1 evaluations of coco/bbox_mAP_s are -1, no such objects: left out" in printed.err


def test_a_band_over_groups(logs, capsys):
    words = ["plot_curve", "two", "two/a.log.json", "three", "three/vis_data", "--mean", "a", "a", "b", "b"]
    assert main(["analyze-logs", *words, "--keys", "bbox_mAP", "loss", "--out", "p.svg", "--json"]) == 0
    means = json.loads(capsys.readouterr().out)["means"]
    assert [(one["group"], one["key"], one["runs"]) for one in means] == [
        ("a", "bbox_mAP", 2),
        ("a", "loss", 2),
        ("b", "bbox_mAP", 2),
        ("b", "loss", 2),
    ]
    assert "mean ± std of 2 runs" in (logs / "p.svg").read_text()


@pytest.mark.parametrize("name", ["p.pdf", "p.jpg", "new/folder/p.png"])
def test_pictures(logs, name):
    assert (
        main(["analyze-logs", "plot_curve", "two", "--keys", "loss", "lr", "time", "--style", "dark", "--out", name])
        == 0
    )
    assert (logs / name).stat().st_size > 5000


@pytest.mark.parametrize("style", ["dark", "ggplot"])
def test_styles(logs, style):
    assert main(["analyze-logs", "plot_curve", "two", "--style", style, "--out", "p.svg"]) == 0


def test_a_log_without_iterations_is_left_out(logs, capsys):
    words = ["empty.log.json", "two", "--legend", "nothing", "second run"]
    assert main(["analyze-logs", "plot_curve", *words, "--out", "p.svg"]) == 0
    assert "note: empty.log.json: no iteration was logged; it is left out" in capsys.readouterr().err
    assert "second run" in (logs / "p.svg").read_text()
    assert main(["analyze-logs", "cal_train_time", "empty.log.json", "two"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("-----Analyze train time of") == 1


MESSAGES = [
    (
        ["plot_curve", "two", "--keys", "loss_mask"],
        "two does not contain metric loss_mask. It has: of the training data_",
    ),
    (["plot_curve", "nan.log.json"], '"--no-validate" is specified when you trained the model'),
    (["plot_curve", "three", "--keys", "bbox_mAP_s"], "coco/bbox_mAP_s is -1 throughout"),
    (["plot_curve", "empty.log.json"], "no iteration was logged, so there is nothing to draw"),
    (["cal_train_time", "empty.log.json"], "no iteration was logged, so there is no time to average"),
    (["plot_curve", "two", "three", "--legend", "a"], "--legend: got 1 names, expected 2 logs × 1 keys = 2"),
    (["plot_curve", "two", "three", "--mean", "a"], "--mean: got 1 groups for 2 logs"),
    (["plot_curve", "two", "--style", "baroque"], "--style: got 'baroque', expected dark"),
    (["plot_curve", "two", "--out", "p.foo"], "Format 'foo' is not supported"),
    (["plot_curve", "two", "--out", "two/a.log.json/p.png"], "cannot be written"),
]


@pytest.mark.parametrize(("words", "message"), MESSAGES)
def test_messages(logs, capsys, words, message):
    assert main(["analyze-logs", *words]) == 2
    assert message in capsys.readouterr().err


def test_flags_without_effect_are_told(logs, capsys):
    assert main(["analyze-logs", "plot_curve", "two", "--eval-interval", "2", "--backend", "TkAgg"]) == 0
    said = capsys.readouterr().err
    assert "note: --eval-interval 2: no effect" in said
    assert "note: --backend TkAgg: no effect" in said


def test_resumed(logs, capsys):
    write_lines(logs / "late.log.json", log_2x(2, start=4, time=0.9))
    words = ["plot_curve", "two/a.log.json", "late.log.json", "--resumed", "--keys", "time", "--out", "p.svg", "--json"]
    assert main(["analyze-logs", *words]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert (document["runs"][0]["resumed_at"], document["runs"][0]["superseded_rows"]) == ([315], 3)
    assert [point["value"] for point in document["curves"][0]["points"]] == [0.5] * 6 + [0.9] * 4
    assert "note: late.log.json: resumed after iteration 315" in printed.err
    assert "(dotted: resumed)" in (logs / "p.svg").read_text()


# Real logs.


@pytest.mark.shared_data
def test_real_ap(shared_data, tmp_path, capsys):
    folder = shared_data / "logs/mmdet2x"
    mask = str(folder / "coco_mask_r50/20210113_153932.log.json")
    faster = str(folder / "faster_rcnn_r50_fpn_1x_coco/20210112_114254.log.json")
    assert main(["analyze-logs", "plot_curve", mask, faster, "--out", str(tmp_path / "p.png"), "--json"]) == 0
    curves = json.loads(capsys.readouterr().out.splitlines()[-1])["curves"]
    assert [one["last"] for one in curves] == [
        {"step": 175908, "epoch": 12, "value": 0.372},
        {"step": 175908, "epoch": 12, "value": 0.367},
    ]
    assert (
        main(["analyze-logs", "plot_curve", mask, "--keys", "segm_mAP", "--out", str(tmp_path / "p.png"), "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["curves"][0]["last"]["value"] == 0.34


@pytest.mark.shared_data
def test_real_nan_and_env_info(shared_data, tmp_path, capsys):
    folder = shared_data / "logs/mmdet2x"
    nan = str(next((folder / "retinanet_r50_fpn_1x_swx").glob("*.json")))
    words = ["analyze-logs", "plot_curve", nan, "--keys", "loss", "--out", str(tmp_path / "p.svg"), "--json"]
    assert main(words) == 0
    curve = json.loads(capsys.readouterr().out)["curves"][0]
    assert (curve["not_finite"]["count"], curve["not_finite"]["steps"][0], len(curve["points"])) == (305, 300, 5)
    assert "NaN in 305 of 310 rows" in (tmp_path / "p.svg").read_text()
    assert main(["analyze-logs", "cal_train_time", nan]) == 0
    # Not finished, and nobody knows how long its first epoch is.
    assert "still to go" not in capsys.readouterr().out
    env = str(folder / "faster_rcnn_r50_fpn_1x_coco/20210112_073401.log.json")
    assert main(["analyze-logs", "plot_curve", env]) == 2
    assert "no iteration was logged" in capsys.readouterr().err


@pytest.mark.shared_data
def test_real_3x(shared_data, tmp_path, capsys):
    path = shared_data / "logs/mmdet3x/crazy-winds_balloon/vis_data/scalars.json"
    assert main(["analyze-logs", "plot_curve", str(path), "--out", str(tmp_path / "p.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["curves"][0]["last"]["value"] == 0.747
