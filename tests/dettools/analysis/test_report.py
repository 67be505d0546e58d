"""``detserve report``: its figures are those of the other tools, and its page works in a real browser."""

import json
import re

import pytest
from chromium import browser
from dettools.analysis.analysis_inputs import Inputs
from dettools.analysis.detection_report import detection_report
from dettools.cli import main
from dettools.coco_metrics import evaluate_coco
from dettools.ground_truth import load_ground_truth
from dettools.predictions import load_predictions
from PIL import Image

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "<b>odd</b>"}]


def annotation(number, image, category, box, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]} | more


def result(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


@pytest.fixture
def files(tmp_path):
    """Two images: one right, one taken for a dog, one missed, one on background, one in a crowd."""
    (tmp_path / "images").mkdir()
    images = [{"id": one, "file_name": f"{one}.jpg", "width": 200, "height": 150} for one in (1, 2)]
    for one in images:
        Image.new("RGB", (200, 150), "gray").save(tmp_path / "images" / one["file_name"])
    annotations = [
        annotation(1, 1, 1, [10, 10, 50, 50], iscrowd=0),
        annotation(2, 1, 1, [100, 10, 50, 50], iscrowd=0),
        annotation(3, 2, 2, [10, 10, 20, 20], iscrowd=0),
        annotation(4, 2, 2, [100, 50, 90, 90], iscrowd=1),
    ]
    results = [
        result(1, 1, [10, 10, 50, 50], 0.9),
        result(1, 2, [100, 10, 50, 50], 0.8),
        result(2, 1, [60, 100, 30, 30], 0.7),
        result(2, 2, [110, 60, 30, 30], 0.6),
    ]
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def inputs(folder):
    truth = load_ground_truth(folder / "annotations.json")
    return Inputs(truth, load_predictions(folder / "results.json", truth), {}, ())


def run(folder, capsys, *more):
    code = main(["report", str(folder / "results.json"), "--ann", str(folder / "annotations.json"), "--json", *more])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_counts_add_up_and_crowds_are_left_out(files):
    report = detection_report(inputs(files))
    counts = report.to_json()["counts"]
    expected = {"objects": 3, "tp": 1, "fn": 2, "fp": 2, "confused": 1, "missed": 1, "background": 1}
    assert counts == expected
    assert report.images.totals == {"objects": 3, "tp": 1, "fp": 2, "fn": 2, "confused": 1, "absent_fp": 2}
    assert sum(one.objects for one in report.sizes) == sum(one.tp + one.fn for one in report.classes) == 3


def test_the_metrics_are_those_of_eval_metric(files):
    given = inputs(files)
    assert detection_report(given).metrics == evaluate_coco(given.ground_truth, given.predictions.results)


def test_the_best_threshold_is_that_of_the_highest_f1(files):
    """At 0.9 one of one is right and two of three objects are left: F1 = 2 · 1 / (1 + 3)."""
    best = detection_report(inputs(files)).thresholds.best
    assert (best.score, best.precision, best.recall, best.f1) == (0.9, 1, pytest.approx(1 / 3), 0.5)


def test_no_predictions_give_a_page_too(files, capsys):
    (files / "results.json").write_text("[]")
    code, answer = run(files, capsys)
    assert (code, answer["calibration"], answer["best_f1"]) == (0, None, None)
    assert answer["counts"]["missed"] == 3


def test_without_photographs_the_page_says_so(files, capsys):
    _, answer = run(files, capsys)
    text = (files / "results.report.html").read_text()
    assert answer["page"] == str(files / "results.report.html")
    assert "No photographs were given" in text
    assert "<b>odd</b>" not in text


def test_the_page_never_overwrites_what_is_read(files, capsys):
    arguments = ["report", str(files / "results.json"), "--ann", str(files / "annotations.json")]
    assert main([*arguments, "--out", str(files / "results.json")]) == 2
    assert "is a file that is read" in capsys.readouterr().err


def test_the_page_in_a_browser(files, capsys):
    _, answer = run(files, capsys, "--images", str(files / "images"))
    assert answer["images_shown"] == 2
    text = (files / "results.report.html").read_text()
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    with browser() as page:
        page.open((files / "results.report.html").as_uri())
        lost = "return [...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.hash.slice(1))"
        assert page.run(f"{lost}.filter(id => !document.getElementById(id))") == []
        assert page.run("return performance.getEntriesByType('resource').filter(r => !/^data:/.test(r.name))") == []
        names = "return [...document.querySelectorAll('#class-table tbody tr')].map(r => r.cells[0].innerText)"
        page.click("#class-table th:nth-child(5) button")
        assert page.run(names)[0] == "cat"
        page.click("#class-table th:nth-child(5) button")
        assert page.run(names)[0] == "<b>odd</b>"
        page.click('a[href="#cell-0-1"]')
        assert page.run("return document.querySelector(':target').innerText").startswith("1 × cat → dog")
        assert page.errors() == []


@pytest.mark.shared_data
def test_a_real_model_has_the_right_figures_and_the_published_ones(shared_data, tmp_path, capsys):
    folder = shared_data / "preds" / "hoovichen"
    truth = folder / "data" / "package" / "test2017" / "_annotations.coco.json"
    out = tmp_path / "page.html"
    assert main(["report", str(folder / "result.pkl"), "--ann", str(truth), "--out", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [round(answer["metrics"]["figures"][one], 3) for one in ("AP", "AP50", "AP75")] == [0.681, 0.902, 0.790]
    assert answer["counts"]["tp"] + answer["counts"]["fn"] == answer["counts"]["objects"] == 235
    text = out.read_text()
    assert "pycocotools shows 0.673 / 0.892 / 0.780" in text
    assert "<b>0.681</b>AP" in text
