"""`detserve browse-dataset` as people call it: pictures, tables, exit codes, and the page in a real browser."""

import csv
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from chromium import browser
from dataset_trees import annotation, coco_document, coco_tree, voc_object, voc_tree, voc_xml, yolo_tree
from dettools import cli
from dettools.commands.browse_dataset import FORMATS
from dettools.datasets.formats import READERS, Source, load_dataset
from dettools.datasets.inspection import find_problems
from dettools.reports.dataset_pictures import draw_pictures, marks_of
from PIL import Image


def run(capsys, *words):
    code = cli.main(["browse-dataset", *map(str, words)])
    return code, capsys.readouterr()


def answer(capsys, *words):
    code, said = run(capsys, *words, "--json")
    assert code == 0
    return json.loads(said.out.splitlines()[-1])


def two_folders(root: Path) -> Path:
    """Two photographs of one name, as every camera's folders have."""
    document = coco_document([annotation(1, 1, (1, 1, 30, 30)), annotation(2, 2, (1, 1, 30, 30), category=2)], images=2)
    for image, folder in zip(document["images"], ("monday", "tuesday"), strict=True):
        image["file_name"] = f"{folder}/0001.jpg"
    return coco_tree(root, document)


def test_photographs_of_one_name_do_not_overwrite_each_other(tmp_path, capsys):
    """[defect] the original saves each as output_dir/basename: of two photographs one picture is left."""
    path = two_folders(tmp_path)
    dataset = load_dataset(Source(path))
    original = {Path(image["file_name"]).name for image in dataset.images}
    found = answer(capsys, path, "--output-dir", tmp_path / "out")
    ours = {one["picture"] for one in found["pictures"]}
    assert (len(original), len(ours)) == (1, 2)
    assert all((tmp_path / "out" / picture).is_file() for picture in ours)


def test_a_file_of_two_entries_is_drawn_twice(tmp_path, capsys):
    document = coco_document([annotation(1, 1, (1, 1, 30, 30))], images=2)
    document["images"][1]["file_name"] = "1.jpg"
    found = answer(capsys, coco_tree(tmp_path, document), "--output-dir", tmp_path / "out")
    assert len({one["picture"] for one in found["pictures"]}) == 2


def test_only_one_photograph_is_read_at_a_time(tmp_path):
    """Of a large data set the second file need not be there while the first is drawn."""
    path = two_folders(tmp_path)
    dataset = load_dataset(Source(path))
    later = tmp_path / "val" / "tuesday" / "0001.jpg"
    kept = later.read_bytes()
    later.unlink()
    drawn = draw_pictures(dataset, find_problems(dataset, open_files=False), [0, 1], tmp_path / "out")
    assert next(drawn).picture
    later.write_bytes(kept)
    assert next(drawn).picture


def test_a_box_outside_is_seen_on_a_border(tmp_path):
    dataset = load_dataset(Source(coco_tree(tmp_path, coco_document([annotation(1, 1, (54, 10, 30, 20))]))))
    inspection = find_problems(dataset)
    (mark,) = marks_of(dataset, inspection, 0)
    assert (mark.text, mark.role) == ("cat: outside", "fp")
    (drawn,) = draw_pictures(dataset, inspection, [0], tmp_path)
    with Image.open(tmp_path / drawn.picture) as picture:
        # 20 px of a photograph 64 px wide, and room for the line.
        assert picture.width / picture.height == pytest.approx((64 + 24) / 48, abs=0.02)
        red = np.asarray(picture)[:, -240:].reshape(-1, 3).astype(int)
    assert ((red - (222, 32, 48)) ** 2).sum(axis=1).min() < 600


STRANGE = [
    {"bbox": [1, 2, None, 4]},
    {"bbox": [10, 10, -5, -5]},
    {"bbox": [10**400, 10, 5, 5]},
    {"bbox": [float("nan"), 10, 5, 5]},
    {"category_id": 10**400},
    {"bbox": [0, 0, 1e12, 1e12]},
    {"bbox": [-1e9, -1e9, 5, 5]},
    {"category_id": [1]},
    {"segmentation": [["x"] * 6]},
    {"segmentation": {"size": [48, 64], "counts": [1, 2, 3]}},
    {"bbox": None, "segmentation": {"size": [48, 64], "counts": 5}},
]


def test_whatever_stands_in_an_annotation_the_rest_is_drawn(tmp_path):
    document = coco_document(
        [annotation(n, n, (1, 1, 5, 5)) | entry for n, entry in enumerate(STRANGE, start=1)]
        + [annotation(n + 20, n, (20, 20, 9, 9)) for n in range(1, len(STRANGE) + 1)],
        images=len(STRANGE),
    )
    dataset = load_dataset(Source(coco_tree(tmp_path, document)))
    inspection = find_problems(dataset)
    assert set(inspection.of_image) == set(range(len(STRANGE)))
    drawn = list(draw_pictures(dataset, inspection, range(len(STRANGE)), tmp_path))
    assert all((tmp_path / one.picture).is_file() for one in drawn)
    assert all("cat" in [mark.text for mark in marks_of(dataset, inspection, one.image)] for one in drawn)


def test_an_object_with_a_mask_alone_is_drawn_where_it_is(tmp_path):
    rle = {"size": [48, 64], "counts": [48 * 10 + 5, 20, 48 * 54 - 25]}
    only_a_mask = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": rle, "iscrowd": 0}
    dataset = load_dataset(Source(coco_tree(tmp_path, coco_document([only_a_mask]))))
    (mark,) = marks_of(dataset, find_problems(dataset), 0)
    assert (mark.box_xywh, mark.text, mark.role) == ((10, 5, 1, 20), "cat", "object")


def test_what_cannot_be_drawn_is_told(tmp_path, capsys):
    path = coco_tree(tmp_path, coco_document(images=3))
    (tmp_path / "val" / "1.jpg").unlink()
    content = (tmp_path / "val" / "2.jpg").read_bytes()
    (tmp_path / "val" / "2.jpg").write_bytes(content[: len(content) // 2])
    found = answer(capsys, path, "--output-dir", tmp_path / "out")
    assert [one["picture"] is not None for one in found["pictures"]] == [False, False, True]
    assert {kind: one["count"] for kind, one in found["problems"].items()} == {"missing_file": 1, "unreadable_image": 1}


def test_the_files_beside_the_page(tmp_path, capsys):
    path = coco_tree(tmp_path, coco_document([annotation(0, 1, (1, 1, 5, 5)), annotation(1, 1, (1, 1, 0, 5))]))
    found = answer(capsys, path, "--output-dir", tmp_path / "out")
    with (tmp_path / "out" / "problems.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["kind"], row["severity"], row["image"], row["annotation"]) for row in rows] == [
        ("id_zero", "error", "1.jpg", "0"),
        ("zero_area", "error", "1.jpg", "1"),
    ]
    assert json.loads((tmp_path / "out" / "statistics.json").read_text()) == found["statistics"]


def test_without_an_output_folder_figures_and_problems_are_printed(tmp_path, capsys):
    path = coco_tree(tmp_path, coco_document([annotation(0, 1, (1, 1, 5, 5))]))
    code, said = run(capsys, path)
    assert code == 0
    assert "id_zero" in said.out
    assert "objects           1" in said.out
    assert [one.name for one in tmp_path.iterdir() if one.name not in ("val", path.name)] == []
    assert run(capsys, path, "--check")[0] == 1
    sound = coco_tree(tmp_path / "sound", coco_document([annotation(1, 1, (1, 1, 5, 5))]))
    code, said = run(capsys, sound, "--check", "--classes", "cat")
    assert (code, "no problems" in said.out) == (0, True)
    assert "images that pass the filters: 1; --output-dir DIR draws them" in said.err


def test_a_filter_chooses_what_is_drawn(tmp_path, capsys):
    path = coco_tree(tmp_path, coco_document([annotation(1, 2, (1, 1, 5, 5))], images=4))
    found = answer(capsys, path, "--classes", "cat", "--output-dir", tmp_path / "out")
    assert [one["image"] for one in found["pictures"]] == ["2.jpg"]
    assert found["statistics"]["images"] == 4
    found = answer(capsys, path, "--range", "1:", "--random", "2", "--output-dir", tmp_path / "out")
    assert len(found["pictures"]) == 2


def test_of_many_images_those_with_problems_are_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dettools.commands.browse_dataset.MOST_PICTURES", 2)
    path = coco_tree(tmp_path, coco_document([annotation(0, 3, (1, 1, 5, 5))], images=5))
    code, said = run(capsys, path, "--output-dir", tmp_path / "out", "--json")
    pictures = [one["image"] for one in json.loads(said.out.splitlines()[-1])["pictures"]]
    assert code == 0
    assert len(pictures) == 2
    assert "3.jpg" in pictures
    assert "2 of 5 images are drawn" in said.err
    assert len(answer(capsys, path, "--output-dir", tmp_path / "out", "--all")["pictures"]) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--range", "5"], "expected A:B, such as 100:200"),
        (["--random", "0"], "expected how many images"),
        (["--classes", "horse"], "expected one of cat, dog"),
        (["--images", "nowhere"], "expected the folder with the images"),
        (["--split", "val"], "one COCO file, without splits"),
        (["--cfg-options", "x"], "expected KEY=VALUE"),
        (["--annotations", "a.json"], "are of an MMDetection config"),
        (["--output-dir", "/proc/nowhere"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, capsys, words, message):
    code, said = run(capsys, coco_tree(tmp_path, coco_document()), *words)
    assert code == 2
    assert message in said.err


def test_a_config_and_its_options(tmp_path, capsys):
    path = coco_tree(tmp_path, coco_document([annotation(1, 1, (1, 1, 5, 5))]))
    config = tmp_path / "config.py"
    config.write_text("train_dataloader = dict(dataset=dict(type='CocoDataset', ann_file='not/here.json'))")
    assert run(capsys, config)[0] == 2
    options = [f"train_dataloader.dataset.{key}" for key in (f"ann_file={path}", f"data_prefix.img={tmp_path / 'val'}")]
    words = (
        config,
        "--not-show",
        "--show-interval",
        "2",
        "--json",
        "--cfg-options",
        *options,
        "train_cfg.max_epochs=1",
    )
    code, said = run(capsys, *words)
    assert (code, json.loads(said.out)["statistics"]["objects"]) == (0, 1)
    assert "--cfg-options train_cfg.max_epochs: no effect here" in said.err
    assert "--show-interval: no effect" in said.err


def test_the_formats_of_the_command_are_those_that_are_read():
    assert set(FORMATS) == set(READERS)


def test_voc_and_yolo_from_the_command_line(tmp_path, capsys):
    voc = voc_tree(tmp_path / "voc", a=voc_xml(voc_object("cat", 1, 1, 9, 9)))
    yolo = yolo_tree(tmp_path / "yolo", {"train/a": "0 .5 .5 .5 .5", "val/a": "1 .5 .5 .5 .5"})
    assert answer(capsys, voc)["format"] == "voc"
    found = answer(capsys, yolo, "--output-dir", tmp_path / "out")
    assert (found["format"], len({one["picture"] for one in found["pictures"]})) == ("yolo", 2)


# The page.


class _Page(HTMLParser):
    """Keeps every address of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of eight images in a folder whose name needs escaping; three of them with problems."""
    root = tmp_path_factory.mktemp("pages")
    document = coco_document(
        [
            *(annotation(n, n, (5, 5, 20 + n, 20), category=1 + n % 2) for n in range(1, 7)),
            annotation(20, 2, (40, 10, 60, 20)),
            annotation(21, 3, (10, 10, 0, 20)),
            annotation(22, 4, (2, 2, 60, 40), iscrowd=1),
        ],
        images=8,
    )
    document["categories"][1]["name"] = '<b>dog & "bone"</b>'
    document["images"][6]["file_name"] = "odd #1? %20.jpg"
    path = coco_tree(root, document)
    (root / "val" / "8.jpg").unlink()
    folder = root / "out put"
    assert cli.main(["browse-dataset", str(path), "--output-dir", str(folder)]) == 0
    # Where it was made is not needed any more.
    shutil.rmtree(root / "val")
    return folder / "index.html"


def test_the_page_needs_nothing_from_elsewhere(page):
    assert _Page(page.read_text()).addresses == []
    assert "<b>dog" not in page.read_text()


def test_the_page_in_a_browser(page):
    tiles = "document.querySelectorAll('.tile')"
    names = f"return [...{tiles}].map(tile => tile.title)"
    choose = (
        "const select = document.getElementById(arguments[0]); select.value = arguments[1];"
        "select.dispatchEvent(new Event('change'))"
    )
    with browser() as window:
        window.open(page.as_uri())
        window.wait(f"{tiles}.length === 8")
        # Every picture is there, whatever its file is called.
        window.wait("[...document.images].length === 7 && [...document.images].every(one => one.naturalWidth > 0)")
        assert window.run("return document.getElementById('shown').textContent") == "8 of 8 images"

        # The keyboard: problems only, leafing through them, back, the tabs.
        window.press("p")
        assert window.run(names) == ["2.jpg", "3.jpg", "8.jpg"]
        window.press("Right")
        window.press("Right")
        window.press("Enter")
        window.wait("document.querySelector('dialog').open")
        assert "3.jpg" in window.run("return document.querySelector('dialog aside').textContent")
        assert "zero area" in window.run("return document.querySelector('dialog aside').textContent")
        window.press("Left")
        window.wait("document.querySelector('dialog img').naturalWidth > 0")
        assert window.run("return document.querySelector('dialog img').alt") == "2.jpg"
        window.press("Left")
        assert "1 of 3" in window.run("return document.querySelector('dialog aside').textContent")
        window.press("Escape")
        window.wait("!document.querySelector('dialog').open")
        window.wait("document.activeElement.title === '2.jpg'")
        window.press("2")
        assert window.run("return document.getElementById('pictures').hidden")
        assert window.run("return document.querySelectorAll('#statistics svg').length") == 6

        # The mouse: a class in the statistics, a kind in the problems.
        window.click("[data-class^='<b>']")
        assert window.run(names) == ["1.jpg", "3.jpg", "5.jpg"]
        window.click("nav [data-tab=problems]")
        window.click("[data-problem=box_outside]")
        assert window.run(names) == ["2.jpg"]
        window.click("#clear")
        window.press("/")
        window.press("7")
        assert window.run(names) == []
        window.click("#clear")
        for select, value, expected in (("kind", "crowd", 1), ("kind", "empty", 2), ("size", "medium", 1)):
            window.run(choose, select, value)
            assert len(window.run(names)) == expected, (select, value)
            window.click("#clear")
        window.run(
            "const s = document.getElementById('sort'); s.value = 'objects'; s.dispatchEvent(new Event('change'))"
        )
        assert window.run(names)[:3] == ["2.jpg", "3.jpg", "4.jpg"]
        assert window.errors() == []


def test_a_page_of_many_images_draws_its_tiles_as_they_are_needed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dettools.reports.dataset_pictures.SHORTEST_PX", 64)
    path = coco_tree(tmp_path, coco_document(images=70, size=(64, 48)))
    assert run(capsys, path, "--output-dir", tmp_path / "out")[0] == 0
    with browser(900, 600) as window:
        window.open((tmp_path / "out" / "index.html").as_uri())
        window.wait("document.querySelectorAll('.tile').length === 60")
        window.run("window.scrollTo(0, document.body.scrollHeight)")
        window.wait("document.querySelectorAll('.tile').length === 70")
        assert window.errors() == []
