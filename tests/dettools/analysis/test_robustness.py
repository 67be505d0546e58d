"""`detserve robustness` on the demo detector: the same bytes for all who are asked; interrupted and gone on with."""

import csv
import io
import json
from collections import Counter
from pathlib import Path

import pytest
from checkout import ROOT
from detserve.archive import build_archive
from detserve.spec import load_spec
from dettools.cli import main
from dettools.datasets.scenes import write_dataset
from dettools.evaluation.local_answerers import EagerAnswerer
from PIL import Image, ImageChops

pytest.importorskip("imagecorruptions", reason="pip install 'detserve[robustness]'")

SHAPES = ROOT / "model_store" / "shapes" / "shapes.yaml"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, count=4, seed=78)
    return folder


def robustness(capsys, scenes, model, work_dir, *arguments) -> tuple[int, dict, str]:
    data = ["--images", scenes / "images", "--annotations", scenes / "annotations.json"]
    words = ["robustness", model, *data, "--work-dir", work_dir, "--processes", 1, "--resamples", 20, *arguments]
    code = main([*map(str, words), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]) if captured.out else {}, captured.err


def bodies(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_latency(results: dict) -> dict:
    return {name: {one: {**cell, "latency_ms": None} for one, cell in cells.items()} for name, cells in results.items()}


@pytest.mark.server
@pytest.mark.slow
def test_eager_runtime_and_endpoint_get_the_same_bytes_and_have_the_same_ap(scenes, serve, tmp_path, capsys):
    archive = tmp_path / "store" / "shapes.mar"
    archive.parent.mkdir()
    build_archive(load_spec(SHAPES), folder=SHAPES.parent, out=archive)
    instance = serve([archive], "robust")
    ways = {
        "eager": [SHAPES, "--backend", "eager"],
        "runtime": [archive],
        "endpoint": ["shapes", "--instance", instance],
    }
    words = ["--corruptions", "gaussian_noise", "exif_orientation", "png_16_bit", "truncation", "--severities", 0, 1, 2]
    told, sent = {}, {}
    for name, (model, *more) in ways.items():
        kept = tmp_path / "kept" / name
        code, told[name], err = robustness(
            capsys, scenes, model, tmp_path / name, *more, *words, "--save-corrupted", kept
        )
        assert code == 0, err
        assert told[name]["identity"]["backend"] == name
        sent[name] = bodies(kept)
    assert len(sent["eager"]) == 4 * (1 + 2 + 2 + 1 + 2)
    assert sent["eager"] == sent["runtime"] == sent["endpoint"]

    cells = {name: document["results"] for name, document in told.items()}
    for name, found in cells.items():
        assert found["gaussian_noise"]["0"]["bbox"]["AP"] > 0.6
        assert found["gaussian_noise"]["1"]["bbox"]["AP"] == pytest.approx(
            cells["eager"]["gaussian_noise"]["1"]["bbox"]["AP"], abs=1e-4
        )
        assert found["gaussian_noise"]["2"]["latency_ms"]["p95"] > 0
        assert [found["exif_orientation"][one]["unchanged"] for one in "12"] == [4, 4]
        assert found["png_16_bit"]["1"]["unchanged"] == 4
        refused = found["truncation"]["2"]
        # An answer that is no answer counts as empty and is told; AP of an empty answer is measured, not filled in.
        assert refused["failed"] == {"eager_failed" if name == "eager" else "truncated_image": 4}
        assert refused["bbox"]["AP"] == 0.0
    mean = told["endpoint"]["aggregates"]["bbox"]
    assert (mean["partial"], mean["cells"], len(mean["missing"])) == (True, 2, 73)


def test_interrupted_in_the_middle_of_a_cell_it_goes_on_and_ends_the_same(scenes, tmp_path, capsys, monkeypatch):
    asked: Counter[int] = Counter()
    ask = EagerAnswerer.ask

    def counted(self, images):
        asked.update(hash(image) for image in images)
        if sum(asked.values()) == 7:
            raise KeyboardInterrupt
        return ask(self, images)

    words = ["--backend", "eager", "--corruptions", "fog", "--severities", 0, 1]
    _, whole, _ = robustness(capsys, scenes, SHAPES, tmp_path / "whole", *words)
    monkeypatch.setattr(EagerAnswerer, "ask", counted)
    code, _, err = robustness(capsys, scenes, SHAPES, tmp_path / "cut", *words)
    assert code == 130
    assert "the same command goes on from there" in err
    left = json.loads((tmp_path / "cut" / "results.json").read_text())["results"]
    assert left == {"None": {"0": left["None"]["0"]}}
    assert not list((tmp_path / "cut").glob("corrupted-*"))

    before = sum(asked.values())
    code, resumed, _ = robustness(capsys, scenes, SHAPES, tmp_path / "cut", *words)
    assert code == 0
    assert without_latency(resumed["results"]) == without_latency(whole["results"])
    # Two images of the cell were answered before; the contact sheet asks twice.
    assert sum(asked.values()) - before == 2 + 2
    assert not list((tmp_path / "cut").glob("*fog*"))

    # More severities join what is there; another seed does not.
    _, more, _ = robustness(capsys, scenes, SHAPES, tmp_path / "cut", *words, 3)
    assert more["results"]["fog"]["1"] == resumed["results"]["fog"]["1"]
    assert set(more["results"]["fog"]) == {"0", "1", "3"}
    assert robustness(capsys, scenes, SHAPES, tmp_path / "cut", *words, "--seed", 1)[0] == 2


def test_everything_that_a_run_leaves(scenes, tmp_path, capsys):
    words = ["--corruptions", "brightness", "jpeg_quality", "--severities", 0, 5, "--show-dir", tmp_path / "shown"]
    words += ["--summaries", "True", "--out", tmp_path / "run.pkl", "--final-prints", "P", "rPC", "--limit", 2]
    code, told, err = robustness(capsys, scenes, SHAPES, tmp_path, *words)
    assert code == 0
    assert "the results are written as JSON" in err
    assert "jpeg_quality 5 (quality 30): bbox AP" in err
    assert "Relative Performance under Corruption [rPC] (bbox)  PARTIAL" in err
    assert told["file"] == str(tmp_path / "run_results.json")
    shown = sorted(path.relative_to(tmp_path / "shown").parent.as_posix() for path in tmp_path.glob("shown/*/*/*.jpg"))
    assert shown == ["None/0"] * 2 + ["brightness/5"] * 2 + ["jpeg_quality/5"] * 2
    for name in ("robustness.png", "contact-sheet.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 700
            assert ImageChops.difference(picture.convert("L"), Image.new("L", picture.size, 255)).getbbox()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "robustness.csv").read_text())))
    assert [(row["corruption"], row["severity"]) for row in rows] == [
        ("None", "0"), ("brightness", "5"), ("jpeg_quality", "5"),
    ]  # fmt: skip
    assert float(rows[1]["bbox_AP_low"]) <= float(rows[1]["bbox_AP_high"])


def test_what_cannot_work_is_said_before_the_first_image(scenes, tmp_path, capsys):
    for model, words, said in (
        (SHAPES, ["--corruptions", "rain"], "got 'rain'"),
        (SHAPES, ["--backend", "endpoint"], "expected the name of a served model"),
        ("config.py", [], "expected MODEL, or CONFIG.py CHECKPOINT.pth"),
        ("config.py", ["--backend", "runtime", "--cfg-options", "a=b"], "expected MODEL, or CONFIG.py"),
        (SHAPES, ["--processes", "0"], "--processes: got 0"),
        (SHAPES, ["--score-threshold", "0.5"], "threshold"),
    ):
        code, _, err = robustness(capsys, scenes, model, tmp_path, *words)
        assert code == (1 if said == "threshold" else 2)
        assert said in err
    assert main(["robustness", str(SHAPES)]) == 2
    assert "got no --images and no --annotations" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("flag", ["--seed", "--resamples"])
def test_a_negative_number_is_refused_before_anything_is_measured(capsys, flag):
    """numpy would refuse the seed only after the first cell had been measured."""
    assert main(["robustness", "model.yaml", flag, "-1"]) == 2
    assert f"{flag}: got -1, expected 0 or more" in capsys.readouterr().err


def test_a_severity_that_does_not_exist_does_not_enter_the_mean(tmp_path, capsys):
    """It has no column in the table, but its figure was counted in mPC."""
    file = tmp_path / "r.json"
    file.write_text('{"snow": {"0": {"bbox": {"AP": 0.4}}, "9": {"bbox": {"AP": 0.3}}}}')
    assert main(["robustness-eval", str(file)]) == 2
    assert "snow has the severity 9, expected 0 to 5" in capsys.readouterr().err
