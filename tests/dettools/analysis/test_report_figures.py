"""report beside the other commands, on random scenes: equal figures; its page whole without scripts and network."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from chromium import browser
from coco_scenes import checked, scenes
from dettools import cli
from dettools.analysis.analysis_inputs import Inputs
from dettools.analysis.detection_report import detection_report
from dettools.predictions import Predictions
from PIL import Image

COMMON = ("objects", "fp", "fn", "tp")


class Tags(HTMLParser):
    """What a browser without scripts is given."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "src", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value)

    def handle_data(self, data):
        self.text += data


def write(folder, *, seed=0, masks=False, photographs=False, **changes):
    document, results = scenes(seed, masks=masks)
    document |= changes
    (folder / "val.json").write_text(json.dumps(document))
    (folder / "results.json").write_text(json.dumps(results))
    if photographs:
        for one in document["images"]:
            Image.new("RGB", (640, 480), (90, 120, 150)).save(folder / one["file_name"])
    return [str(folder / "results.json"), "--annotations", str(folder / "val.json")]


def answer(capsys, *command):
    assert cli.main([*map(str, command), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def report_of(document, results, **options):
    inputs = Inputs(checked(document), Predictions(Path("results.json"), tuple(results), "COCO results"), {}, ())
    return detection_report(inputs, **options)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_figures_are_those_of_the_other_commands(tmp_path, capsys, iou_type):
    given = write(tmp_path, masks=iou_type == "segm")
    ours = answer(capsys, "report", *given, "--iou-type", iou_type, "--out", tmp_path / "page.html")
    metrics = answer(capsys, "eval-metric", *given, "--iou-type", iou_type, "--per-class")["metrics"][iou_type]
    assert ours["metrics"]["figures"] == metrics["figures"]
    assert [one["ap"] for one in ours["per_class"]] == [one["ap"] for one in metrics["per_class"]]
    counts = ours["counts"]
    matrix = answer(capsys, "confusion-matrix", *given, "--iou-type", iou_type)
    assert counts["tp"] == matrix["found"]
    assert [counts[one] for one in ("objects", "confused", "missed", "background")] == [
        matrix[one] for one in ("objects", "confused", "missed", "background")
    ]
    images = answer(capsys, "analyze-results", *given, "--iou-type", iou_type)["totals"]
    assert [counts[one] for one in (*COMMON, "confused")] == [images[one] for one in (*COMMON, "confused")]
    errors = answer(capsys, "coco-error-analysis", *given, "--types", iou_type)["types"][iou_type]["all"]["allarea"]
    assert {name: errors[name] for name in ours["errors"]} == ours["errors"]


def test_the_counts_add_up():
    document = report_of(*scenes(3, images=40), score_threshold=0.5).to_json()
    counts, errors = document["counts"], document["errors"]
    assert counts["tp"] + counts["fn"] == counts["objects"] == errors["found"] + errors["missed"]
    assert counts["confused"] + counts["missed"] == counts["fn"]
    assert counts["confused"] + counts["background"] == counts["fp"]
    assert errors["found"] + sum(errors["counts"].values()) - errors["counts"]["Miss"] == errors["detections"]
    for name in COMMON:
        assert sum(one[name] for one in document["per_class"]) == counts[name]
    assert sum(one["objects"] for one in document["sizes"]) == counts["objects"]
    assert sum(one["found"] for one in document["sizes"]) == counts["tp"]


@pytest.mark.parametrize("score", [0.2, 0.55, 0.9])
def test_what_a_threshold_gives_is_what_counting_at_it_gives(score):
    """All thresholds come from one match; here each is matched anew."""
    document, results = scenes(5, images=40)
    report = report_of(document, results, score_threshold=score)
    confusion = report.confusion
    found = report.thresholds.at(score)
    assert found.precision == pytest.approx(confusion.found / confusion.detections)
    assert found.recall == pytest.approx(confusion.found / confusion.objects)
    best = report.thresholds.best
    assert best.f1 >= found.f1
    again = report_of(document, results, score_threshold=best.score).confusion
    assert best.f1 == pytest.approx(2 * again.found / (again.detections + again.objects))


def test_calibration_is_that_of_the_matches():
    """The share of true positives in each tenth of the scores, beside their mean score."""
    document, results = scenes(2, images=60)
    report = report_of(document, results, score_threshold=0.0)
    matches, scores = report.images.matches, report.images.overlaps.score
    right, scores = matches.true_positive[matches.counted], scores[matches.counted]
    place = np.minimum((scores * 10).astype(int), 9)
    expected = 0.0
    for one, part in enumerate(report.calibration.bins):
        here = place == one
        assert part.count == here.sum()
        assert part.right == pytest.approx(right[here].mean())
        assert part.score == pytest.approx(scores[here].mean())
        expected += abs(right[here].mean() - scores[here].mean()) * here.mean()
    assert report.calibration.ece == pytest.approx(expected)


def test_the_pictures_and_the_threshold_in_a_browser(tmp_path, capsys):
    given = write(tmp_path, photographs=True)
    page = tmp_path / "page.html"
    document = answer(capsys, "report", *given, "--images", tmp_path, "--out", page, "--max-images", 5)
    assert document["images_shown"] == 5
    assert document["bytes"] == page.stat().st_size < 15e6
    with browser() as window:
        window.open(page.as_uri())
        window.run("document.querySelectorAll('img').forEach(one => one.loading = 'eager')")
        window.wait("[...document.images].every(one => one.complete)")
        widths = window.run("return [...document.images].map(one => one.naturalWidth)")
        assert len(widths) == 5
        assert min(widths) > 600
        window.run("const s = document.querySelector('input'); s.value = 30; s.dispatchEvent(new Event('input'))")
        counts = document["counts"]
        precision = counts["tp"] / (counts["tp"] + counts["fp"])
        assert f"precision {precision:.3f}" in window.run("return document.getElementById('figures').textContent")
        for start in ("#class-table tbody a", ".matrix a", "tr[id^=error] a", "figcaption a"):
            window.run("document.querySelector(arguments[0]).click()", start)
            assert window.run("return document.querySelector(':target') !== null")
        assert window.run("return document.documentElement.scrollWidth <= innerWidth")
        assert window.errors() == []


def test_the_page_without_scripts_has_everything(tmp_path, capsys):
    document = answer(capsys, "report", *write(tmp_path, photographs=True), "--images", tmp_path)
    page = tmp_path / "results.report.html"
    assert document["page"] == str(page)
    tags = Tags(re.sub(r"<script>.*?</script>", "", page.read_text("utf-8"), flags=re.DOTALL))
    assert len(set(tags.ids)) == len(tags.ids)
    assert {one for one in tags.addresses if not one.startswith(("#", "data:image/jpeg;base64,"))} == set()
    assert {one[1:] for one in tags.addresses if one.startswith("#")} <= set(tags.ids)
    for name in ("AP", "AP50", "APs", "AR100"):
        assert f"{document['metrics']['figures'][name]:.3f}" in tags.text
    assert f"{document['best_f1']['f1']:.3f}" in tags.text
    assert f"{document['calibration']['ece']:.3f}" in tags.text


def test_a_page_that_would_be_too_large_has_fewer_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dettools.reports.report_page.MOST_BYTES", 60_000)
    document = answer(capsys, "report", *write(tmp_path, photographs=True), "--images", tmp_path)
    assert 0 < document["images_shown"] < 11
    assert any("too large" in note for note in document["notes"])


def test_nothing_to_find(tmp_path, capsys):
    document = answer(capsys, "report", *write(tmp_path, annotations=[]), "--out", tmp_path / "page.html")
    assert (document["counts"]["objects"], document["counts"]["tp"], document["best_f1"]) == (0, 0, None)
    assert document["counts"]["fp"] == document["counts"]["background"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["results.json"], "--annotations"),
        (["results.json", "more", "--annotations", "val.json"], "--out FILE"),
        (["results.json", "--annotations", "val.json", "--out", "."], "got a folder"),
        (["results.json", "--annotations", "val.json", "--out", "val.json"], "is a file that is read"),
        (["results.json", "--annotations", "val.json", "--iou-type", "segm"], "have no segmentation"),
    ],
)
def test_what_cannot_be_done_is_told(tmp_path, capsys, monkeypatch, arguments, message):
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "val.json").read_bytes()
    assert cli.main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "val.json").read_bytes() == before
    assert list(tmp_path.glob("*.html")) == []
