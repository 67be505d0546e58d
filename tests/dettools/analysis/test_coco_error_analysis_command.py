"""The command: files under the original's names, numbers beside the pictures, a page that shows the errors."""

import csv
import json
import re

import pytest
from chromium import browser
from dettools import cli
from dettools.reports.error_pictures import file_names
from PIL import Image

CATEGORIES = [
    {"id": 1, "name": "tram/bus", "supercategory": "vehicle"},
    {"id": 2, "name": "car", "supercategory": "vehicle"},
    {"id": 3, "name": "dog $5", "supercategory": "animal"},
]
# Category and box of the objects, category, score and box of the detections of two images.
OBJECTS = [(1, [20, 20, 100, 100]), (2, [200, 20, 100, 100]), (2, [20, 200, 20, 20])], [(1, [50, 50, 60, 60])]
DETECTIONS = (
    [(1, 0.9, [20, 20, 100, 100]), (1, 0.8, [200, 22, 100, 100]), (2, 0.7, [280, 20, 100, 100])],
    [(1, 0.9, [50, 52, 60, 60]), (1, 0.6, [52, 50, 60, 60]), (3, 0.5, [250, 200, 40, 40])],
)


@pytest.fixture
def files(tmp_path):
    """Annotations, results, and the folder of the photographs."""
    photographs = tmp_path / "images"
    photographs.mkdir()
    images, annotations, results = [], [], []
    for number, (objects, detections) in enumerate(zip(OBJECTS, DETECTIONS, strict=True), start=1):
        Image.new("RGB", (400, 300), (90, 120, 150)).save(photographs / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 400, "height": 300})
        for category, box in objects:
            one = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": box}
            annotations.append({**one, "area": box[2] * box[3], "iscrowd": 0})
        for category, score, box in detections:
            results.append({"image_id": number, "category_id": category, "score": score, "bbox": box})
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (tmp_path / "val.json").write_text(json.dumps(document))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def command(files, *words):
    return cli.main(["coco-error-analysis", str(files / "results.json"), *map(str, words)])


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_everything_is_written_and_the_numbers_are_the_same_everywhere(files, capsys):
    out = files / "out"
    ann = ("--ann", files / "val.json")
    assert command(files, out, *ann, "--images", files / "images", "--extraplots", "--json") == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out.splitlines()[-1])
    assert document == json.loads((out / "coco_error_analysis.json").read_text())
    figures = document["types"]["bbox"]["all"]["allarea"]
    assert (figures["objects"], figures["found"], figures["missed"]) == (4, 2, 2)
    assert figures["counts"] == {"Cls": 1, "Loc": 1, "Both": 0, "Dupe": 1, "Bkg": 1, "Miss": 1}
    assert figures["stack"]["FN"] == 1.0
    assert document["types"]["bbox"]["per_class"][2]["sizes"]["allarea"]["ap"] is None
    rows = table(out / "bbox/tide.csv")
    assert len(rows) == 4 * (1 + len(CATEGORIES))
    assert [rows[0][key] for key in ("class", "found", "Cls")] == ["allclass", "2", "1"]
    stacks = table(out / "bbox/stacks.csv")
    assert float(stacks[0]["C50"]) == pytest.approx(figures["stack"]["C50"], abs=1e-6)
    assert "4 objects: 2 found, 2 missed" in printed.err
    names = {one.name for one in (out / "bbox").glob("*.png")}
    assert {
        "bbox-allclass-allarea.png",
        "bbox-tram_bus-medium.png",
        "bbox-car-allarea-ap bar plot.png",
        "number of annotations per area group.png",
        "gt annotation areas histogram plot.png",
    } <= names
    assert not [name for name in names if "dog" in name], "no object, no picture"
    assert "stacks are of a class and size without objects" in printed.err
    examples = {one.name for one in (out / "bbox/examples").iterdir()}
    assert examples == {"Cls_0.jpg", "Loc_0.jpg", "Dupe_0.jpg", "Bkg_0.jpg", "Miss_0.jpg"}


def test_the_page_shows_the_stacks_of_a_class_and_sorts(files):
    out = files / "out"
    assert command(files, out, "--ann", files / "val.json", "--images", files / "images") == 0
    with browser() as page:
        page.open((out / "index.html").as_uri())
        shown = (
            "[...document.querySelectorAll('.stacks figure')]"
            ".map(one => one.querySelector('img')?.getAttribute('src') ?? one.textContent.trim())"
        )
        assert page.run(f"return {shown}")[0] == "bbox/bbox-allclass-allarea.png"
        page.click("tr[data-class='0']")
        assert page.run(f"return {shown}") == [
            *("bbox/bbox-tram_bus-allarea.png", "small: no object"),
            *("bbox/bbox-tram_bus-medium.png", "bbox/bbox-tram_bus-large.png"),
        ]
        assert page.run("return document.querySelector('select').value") == "0"
        names = "[...document.querySelectorAll('table.classes tbody tr')].map(one => one.cells[0].textContent)"
        page.click("table.classes th:first-child")
        assert page.run(f"return {names}") == ["car", "dog $5", "tram/bus"]
        page.run("for (const one of document.images) one.loading = 'eager'")
        page.wait("[...document.images].every(one => one.complete && one.naturalWidth)")
        assert not page.errors()


def test_numbers_without_pictures_and_a_terminal_without_files(files, capsys):
    ann = ("--ann", files / "val.json")
    assert command(files, *ann) == 0
    assert "what each kind of error costs" in capsys.readouterr().out
    assert command(files, files / "out", *ann, "--no-plots") == 0
    assert {one.name for one in (files / "out/bbox").iterdir()} == {"stacks.csv", "tide.csv"}
    assert (files / "out/index.html").exists()


def test_detections_below_the_score_threshold_do_not_take_part(files, capsys):
    assert command(files, "--ann", files / "val.json", "--score-thr", "0.75", "--json") == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["types"]["bbox"]["all"]["allarea"]["detections"] == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"coco/bbox_mAP": 0.367}, r"got the figures of an evaluation \(coco/bbox_mAP\), expected its detections"),
        ({"config": "a.py", "metric": {"bbox_mAP": 0.3}}, r"the .bbox.json or .segm.json that outfile_prefix"),
    ],
)
def test_the_metrics_instead_of_the_results_are_told(files, capsys, content, words):
    (files / "results.json").write_text(json.dumps(content))
    assert command(files, "--ann", files / "val.json") == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no annotations: give --annotations"),
        (["--ann", "val.json", "--types", "segm"], "segm: 4 of 4 annotations have no segmentation"),
        (["--ann", "val.json", "--areas", "9216", "1024", "1e10"], "expected three rising numbers"),
        (["results.json", "--ann", "val.json"], "expected a folder to write to; that is a file"),
        (["--ann", "val.json", "--score-thr", "nan"], "got the score threshold nan, expected 0 to 1"),
        (["--ann", "val.json", "--examples", "-1"], "got --examples -1, expected 0 or more"),
    ],
)
def test_what_cannot_be_done_is_told(files, capsys, monkeypatch, words, told):
    monkeypatch.chdir(files)
    assert command(files, *words) == 2
    assert told in capsys.readouterr().err


def test_file_names_are_valid_and_different():
    names = file_names(["a/b", "a_b", "AllClass", "..", "dog", 'x:"y'], [1, 2, 3, 4, 5, 6])
    assert names == ["a_b (1)", "a_b (2)", "AllClass (3)", "class", "dog", "x__y"]


def test_a_class_name_longer_than_a_file_name_may_be_is_cut():
    """Cut between characters, and different still; whole, it could not be written."""
    names = file_names(["dog" * 100, "dog" * 101, "\u72d7" * 100], [1, 2, 3])
    assert names == ["dog" * 40 + " (1)", "dog" * 40 + " (2)", "\u72d7" * 40]
