"""mPC and rPC beside what MMDetection's robustness_eval.py computes: its three defects, with both figures."""

import json
import pickle

import numpy as np
import pytest
from dettools.analysis.corruptions import BENCHMARK, GROUPS, PICTORIAL
from dettools.analysis.robustness_figures import aggregate, groups_of, missing_text
from dettools.analysis.robustness_results import (
    Cell,
    RobustnessError,
    RobustnessResults,
    canonical_metric,
    read_results,
    resumed_results,
)
from dettools.cli import main

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def original(eval_output, metric="AP", task="bbox", first=15):
    """robustness_eval.get_coco_style_results: an array of zeros, filled in the order of the file."""
    results = np.zeros((len(eval_output), 6))
    for place, cells in enumerate(eval_output.values()):
        for severity, figures in cells.items():
            results[place, severity] = figures[task][metric]
    return results[0, 0], results[:first, 1:].mean()


def table(corruptions, severities=(0, 1, 2, 3, 4, 5), value=lambda name, severity: 0.5 - 0.05 * severity):
    return {name: {one: {"bbox": dict.fromkeys(NAMES, value(name, one))} for one in severities} for name in corruptions}


def pickled(tmp_path, content):
    path = tmp_path / "run_results.pkl"
    path.write_bytes(pickle.dumps(content))
    return path


def test_a_whole_benchmark_is_what_the_original_computes(tmp_path):
    content = table(BENCHMARK, value=lambda name, severity: 0.6 - 0.01 * len(name) - 0.04 * severity)
    found = aggregate(read_results(pickled(tmp_path, content)), "benchmark")
    p, mpc = original(content)
    assert (found.p, found.mpc) == pytest.approx((p, mpc))
    assert found.rpc == pytest.approx(mpc / p)
    assert not found.partial


def test_a_partial_run_is_marked_and_not_filled_with_zeros(tmp_path, capsys):
    content = table(BENCHMARK[:3], severities=(0, 1, 2))
    path = pickled(tmp_path, content)
    assert original(content)[1] == pytest.approx(0.17)
    found = aggregate(read_results(path), "benchmark")
    assert found.mpc == pytest.approx(0.425)
    assert found.partial
    assert (found.cells, len(found.missing)) == (6, 69)
    assert main(["robustness-eval", str(path), "--prints", "P", "mPC", "rPC"]) == 0
    out = capsys.readouterr().out
    assert "Mean Performance under Corruption [mPC] (bbox)  PARTIAL" in out
    assert "maxDets=100 ] = 0.425" in out
    assert "mean over 6 of its 75 cells; missing: gaussian_noise 3, 4, 5; shot_noise 3, 4, 5" in out


def test_every_name_of_a_metric_is_taken_where_the_original_always_asserts(tmp_path, capsys):
    allowed_by_parser = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    asserted = ["mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l"]
    assert not set(allowed_by_parser) & set(asserted)  # release 3.3.0: no word passes both
    path = pickled(tmp_path, table(BENCHMARK))
    for words in (allowed_by_parser, asserted):
        assert main(["robustness-eval", str(path), "--metric", *words, "--prints", "mPC", "rPC"]) == 0
        out = capsys.readouterr().out
        assert "AP50  =  0.350" in out
        assert "APs   => 70.0 %" in out
    assert main(["robustness-eval", str(path), "--metric", "AP42"]) == 2
    assert "--metric: got 'AP42', expected AP, AP50" in capsys.readouterr().err


def test_the_benchmark_is_found_by_its_names_and_not_by_its_order(tmp_path):
    shuffled = (*GROUPS["holdout"], *BENCHMARK)
    content = table(shuffled, value=lambda name, severity: 0.9 if name in GROUPS["holdout"] else 0.3)
    assert original(content)[1] == pytest.approx((4 * 0.9 + 11 * 0.3) / 15)
    results = read_results(pickled(tmp_path, content))
    assert aggregate(results, "benchmark").mpc == pytest.approx(0.3)
    assert aggregate(results, "holdout").mpc == pytest.approx(0.9)
    assert aggregate(results, "all").mpc == pytest.approx((4 * 0.9 + 15 * 0.3) / 19)
    assert set(groups_of(results)) == {"noise", "blur", "weather", "digital", "holdout"}


def test_the_block_is_the_originals_to_the_letter(tmp_path, capsys):
    assert main(["robustness-eval", str(pickled(tmp_path, table(PICTORIAL))), "--prints", "P", "mPC", "rPC"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("model: run_results.pkl")
    assert lines[start + 1 : start + 4] == [
        "Performance on Clean Data [P] (bbox)",
        " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.500",
        " Average Precision  (AP) @[ IoU=0.50      | area=   all | maxDets=100 ] = 0.500",
    ]
    assert lines[start + 5] == " Average Precision  (AP) @[ IoU=0.50:0.95 | area= small | maxDets=100 ] = 0.500"
    assert lines[start + 8] == "Mean Performance under Corruption [mPC] (bbox)"
    assert lines[start + 15] == "Relative Performance under Corruption [rPC] (bbox)"
    assert lines[start + 16].endswith("= 0.700")


def test_files_of_every_release_are_read(tmp_path):
    flat = {"coco/bbox_mAP": 0.4, "coco/bbox_mAP_50": 0.6, "coco/bbox_mAP_s": -1.0, "coco/bbox_mAP_copypaste": "0.4 …"}
    cell = Cell.read(flat)
    assert cell.figures["bbox"] == {"AP": 0.4, "AP50": 0.6, "APs": None}
    assert Cell.read({"pascal_voc/mAP": 0.7, "pascal_voc/AP50": 0.8}).figures["bbox"]["AP50"] == 0.8
    three_classes = [{"ap": 0.2}, {"ap": 0.4}, {"ap": 0.6}]
    assert Cell.read(three_classes).figures["bbox"]["AP50"] == pytest.approx(0.4)
    names = ("mAP_l", "AR@100", "AR_s@1000", "AR1000", "loss", "AP")
    assert [canonical_metric(name) for name in names] == ["APl", "AR100", "ARs", None, None, "AP"]


def test_voc_needs_no_twenty_classes(tmp_path, capsys):
    content = {
        name: {s: [{"ap": 0.6}, {"ap": 0.4}] if s == 0 else [{"ap": 0.25}] * 2 for s in range(6)} for name in BENCHMARK
    }
    path = pickled(tmp_path, content)
    assert main(["robustness-eval", str(path), "--dataset", "voc", "--prints", "P", "mPC", "rPC", "--json"]) == 0
    captured = capsys.readouterr()
    assert "Mean Performance under Corruption [mPC] in AP50 = 0.250" in captured.err
    assert "Relative Performance under Corruption [rPC] in % = 50.0" in captured.err
    assert json.loads(captured.out)["aggregates"]["bbox"][0]["P"] == pytest.approx(0.5)


def test_what_is_no_results_file_is_told(tmp_path, capsys):
    wrong = tmp_path / "results.json"
    for content, words in (
        ("[]", "expected {corruption: {severity: metrics}}"),
        ("{", "expected JSON"),
        ('{"fog": {"x": {}}}', "expected {corruption"),
        ('{"robustness": 9, "results": {}}', "another version"),
    ):
        wrong.write_text(content)
        assert main(["robustness-eval", str(wrong)]) == 2
        assert words in capsys.readouterr().err
    wrong.write_text(json.dumps(table(BENCHMARK)))
    assert main(["robustness-eval", str(wrong), "--task", "segm"]) == 2
    assert "no cell has segm AP; it has bbox." in capsys.readouterr().err
    assert main(["robustness-eval", str(tmp_path / "none.pkl")]) == 2
    evil = tmp_path / "evil.pkl"
    evil.write_bytes(pickle.dumps({"fog": {0: print}}))
    assert main(["robustness-eval", str(evil)]) == 2
    assert "nothing of it was run" in capsys.readouterr().err


def test_a_file_is_written_whole_read_again_and_of_one_run_only(tmp_path):
    path = tmp_path / "results.json"
    cell = Cell(
        {"bbox": {"AP": 0.25, "APs": None}}, 8, {"timeout": 1}, {"p50": 3.0, "p95": 4.0}, {"bbox": (0.2, 0.3)}, 7
    )
    results = RobustnessResults("shapes", {"seed": 0}, None, {}).with_cell("None", 0, cell).with_cell("fog", 2, cell)
    results.save(path)
    assert list(tmp_path.iterdir()) == [path]
    again = resumed_results(path, "shapes", {"seed": 0}, fresh=False)
    assert again.clean == again.cells["fog"][2] == cell
    assert json.loads(path.read_text())["results"]["fog"]["0"]["bbox"]["AP"] == 0.25
    with pytest.raises(RobustnessError, match="another run \\(seed: 0 there, 1 now\\)"):
        resumed_results(path, "shapes", {"seed": 1}, fresh=False)
    assert resumed_results(path, "shapes", {"seed": 1}, fresh=True).cells == {}


def test_missing_cells_in_words():
    missing = [("fog", one) for one in range(1, 6)] + [("snow", 2), ("snow", 4), ("png_16_bit", 1)]
    assert missing_text(missing) == "fog; snow 2, 4; png_16_bit"
    assert missing_text([(name, 1) for name in BENCHMARK], most=2).endswith("and 13 more corruptions")
