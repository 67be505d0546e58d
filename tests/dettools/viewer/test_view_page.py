"""The page in a real Chromium, by keyboard and mouse, over 1,000 images."""

import json

import numpy as np
import pytest
from chromium import browser
from dettools.analysis.overlaps import find_overlaps, match
from dettools.ground_truth import load_ground_truth
from dettools.reports.gallery import COLOURS, decoded
from PIL import Image
from viewing import WORDS, data_set, viewing
from viewing_page import Page

IMAGES = 1000


@pytest.fixture(scope="module")
def window():
    with browser(1400, 900) as opened:
        yield opened


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """The running page, and its annotations and results."""
    folder = tmp_path_factory.mktemp("thousand")
    annotations, results = data_set(folder, IMAGES)
    with viewing(results, "--annotations", annotations) as viewed:
        yield viewed, load_ground_truth(annotations), json.loads(results.read_text())


@pytest.fixture
def page(window, thousand):
    opened = Page(window)
    opened.open(thousand[0].url)
    yield opened
    assert opened.errors() == []


def counted(thousand, *, score: float = 0.3, iou: float = 0.5, classes=WORDS) -> dict[str, int]:
    """Count as every other analysis does: with the threshold given to `match`."""
    _, truth, results = thousand
    overlaps = find_overlaps(truth, results)
    found = match(overlaps, iou, score_threshold=score)
    places = [place for place, one in enumerate(truth.categories) if one.name in classes]
    seen, wanted = np.isin(overlaps.label, places), np.isin(overlaps.object_class, places)
    return {
        "tp": int((found.true_positive & seen).sum()),
        "fp": int((found.false_positive & seen).sum()),
        "fn": int((wanted & ~overlaps.crowd & (found.detection_of < 0)).sum()),
    }


def test_the_totals_are_those_of_match_at_every_setting(page, thousand):
    assert page.totals() == counted(thousand)
    page.press("]")
    page.press("]")
    assert page.output("score") == "0.40"
    assert page.totals() == counted(thousand, score=0.4)
    page.press("{")
    assert page.totals() == counted(thousand, score=0.39)
    page.press(".")
    page.settled()
    assert page.output("iou") == "0.55"
    assert page.totals() == counted(thousand, score=0.39, iou=0.55)
    page.press(",,")
    page.settled()
    assert page.totals() == counted(thousand, score=0.39, iou=0.45)


def test_the_slider_moves_with_the_mouse_and_leaves_the_arrows_to_the_images(page, thousand):
    page.drag("#score", (40, 0))
    page.settled()
    score = float(page.output("score"))
    assert 0.6 < score < 0.9
    assert page.totals() == counted(thousand, score=score)
    page.press("→")
    assert page.place() == 2
    assert float(page.output("score")) == score


def test_the_slider_moves_with_the_keys_when_it_has_the_focus(page):
    page.focus("#score")
    page.press("→")
    assert page.output("score") == "0.31"
    assert page.place() == 1


def test_keys_go_through_the_images(page):
    for key, place in (("→", 2), ("j", 3), ("k", 2), ("←", 1), ("←", 1), ("⇟", 11), ("⇞", 1)):
        page.press(key)
        assert page.place() == place
    page.press("⤓")
    assert page.place() == IMAGES
    page.press("→")
    assert page.place() == IMAGES
    assert page.run("return document.getElementById('name').textContent") == "00999.png"
    page.press("⤒")
    assert page.place() == 1


def test_errors_first_and_back(page, thousand):
    page.press("e")
    worst = page.rows()[0]
    errors = [int(number) for number in worst["chips"]]
    _, truth, results = thousand
    overlaps = find_overlaps(truth, results)
    found = match(overlaps, 0.5, score_threshold=0.3)
    wrong = np.bincount(overlaps.image[found.false_positive], minlength=IMAGES)
    wrong += np.bincount(overlaps.object_image[~overlaps.crowd & (found.detection_of < 0)], minlength=IMAGES)
    assert errors[1] + errors[2] == wrong.max()
    assert worst["name"] == f"{int(wrong.argmax()):05}.png"
    assert page.place() == 1
    assert page.run("return document.getElementById('name').textContent") == worst["name"]
    # Back in the order of the file it stays with the same image.
    page.press("e")
    assert page.place() == int(wrong.argmax()) + 1


def test_classes_by_key_and_by_mouse(page, thousand):
    page.press("c")
    page.press("bird")
    page.press("⏎")
    assert page.run("return document.getElementById('classes-button').textContent") == "Class: bird"
    assert page.totals() == counted(thousand, classes=["bird"])
    assert {mark["class"] for mark in page.panel()} <= {"bird"}

    page.click("#classes-button")
    page.click("#class-list li:nth-child(2) input")
    assert page.totals() == counted(thousand, classes=["bird", "dog"])
    page.click("#class-all")
    page.click("#stage")
    assert page.run("return document.getElementById('classes').hidden")
    assert page.totals() == counted(thousand)


def test_a_click_on_the_list_shows_that_image(page):
    page.click(".row:nth-child(4)")
    page.settled()
    assert page.place() == 4


def test_find_a_file(page):
    page.press("/")
    page.press("0077")
    page.press("⏎")
    assert [row["name"] for row in page.rows()] == ["00077.png", *(f"0077{last}.png" for last in range(10))]
    assert page.run("return document.getElementById('name').textContent") == "00077.png"


def test_boxes_lie_on_the_photograph_in_the_colour_of_their_role(page, thousand):
    _, truth, results = thousand
    overlaps = find_overlaps(truth, results)
    found = match(overlaps, 0.5, score_threshold=0.3)
    for image in range(6):
        frame = page.run("const r = photograph.getBoundingClientRect(); return [r.x, r.y, r.width / 160]")
        drawn = {(mark["side"], mark["role"], *(round(value) for value in mark["box"])) for mark in page.marks(frame)}
        expected = set()
        for place in np.flatnonzero((overlaps.image == image) & (overlaps.score >= 0.3)):
            role = "tp" if found.true_positive[place] else "fp" if found.false_positive[place] else "ignored"
            expected.add(("prediction", role, *(round(v) for v in results[overlaps.result[place]]["bbox"])))
        for place in np.flatnonzero(overlaps.object_image == image):
            role = "ignored" if overlaps.crowd[place] else "tp" if found.detection_of[place] >= 0 else "fn"
            expected.add(("truth", role, *(round(v) for v in truth.annotations[place]["bbox"])))
        assert drawn == expected
        page.press("→")


def test_colours_are_those_of_the_pictures_in_reports(page):
    page.press("e")
    strokes = page.run(
        "return Object.fromEntries([...document.querySelectorAll('.mark[data-role]')].map((one) =>"
        " [one.dataset.role, getComputedStyle(one.querySelector('.line')).stroke]))"
    )
    assert {"fp", "fn"} <= set(strokes)
    for role, stroke in strokes.items():
        assert stroke == f"rgb{COLOURS[role]}"


def test_ground_truth_and_predictions_are_hidden_by_key(page):
    page.press("e")
    assert {mark["side"] for mark in page.marks()} == {"truth", "prediction"}
    page.press("g")
    assert {mark["side"] for mark in page.marks()} == {"prediction"}
    page.press("gp")
    assert {mark["side"] for mark in page.marks()} == {"truth"}
    page.press("t")
    assert page.run("return document.querySelectorAll('.tag').length") == 0
    assert "hidden: predictions, tags" in page.run("return document.getElementById('legend').textContent")


def test_help_opens_and_closes(page):
    page.press("?")
    assert page.run("return document.getElementById('help').open")
    page.press("→")
    assert page.place() == 1
    page.press("⎋")
    assert not page.run("return document.getElementById('help').open")


def test_wheel_and_drag_go_nearer(page):
    before = page.run("return frame.getBoundingClientRect().toJSON()")
    page.press("+")
    nearer = page.run("return frame.getBoundingClientRect().toJSON()")
    assert nearer["width"] == pytest.approx(before["width"] * 1.5)
    # What is in the middle stays there.
    assert nearer["x"] + nearer["width"] / 2 == pytest.approx(before["x"] + before["width"] / 2, abs=1)
    page.drag("#stage", (30, 20))
    moved = page.run("return frame.getBoundingClientRect().toJSON()")
    assert (moved["x"] - nearer["x"], moved["y"] - nearer["y"]) == pytest.approx((30, 20), abs=1)
    page.press("0")
    assert page.run("return frame.getBoundingClientRect().toJSON()") == before


def test_the_mouse_on_a_mark_sets_it_apart(page):
    """In the panel and on the photograph; what was found brings its ground truth along."""
    page.press("e")
    page.hover("#marks li.mark")
    assert page.run("return document.querySelectorAll('#boxes .mark.under').length") == 1
    page.hover("#legend")
    assert page.run("return document.querySelectorAll('.under').length") == 0

    page.press("e")
    page.run(
        "const {tp, detections, objects} = state.counts;"
        "go(tp.findIndex((one, image) => one === 1 && detections[image] === 1 && objects[image] === 1))"
    )
    page.settled()
    x, y, width, height = next(one["box"] for one in page.marks() if one["role"] == "tp")
    page.point(x + width / 2, y + height / 2)
    sides = page.run("return [...document.querySelectorAll('#boxes .mark.under')].map((one) => one.dataset.side)")
    assert sorted(sides) == ["prediction", "truth"]
    assert page.run("return document.querySelectorAll('#marks li.under').length") == 1


def test_a_reload_comes_back_to_the_same_image(page):
    page.press("⇟")
    page.press("]")
    page.settled()
    address = page.run("return location.href")
    page.open(address)
    assert page.place() == 11
    assert page.output("score") == "0.35"


def test_a_thousand_images_cost_little(page, thousand):
    """Only rows in sight are in the page; a held key loads what it rests on, not a queue of all it passed."""
    page.run("performance.setResourceTimingBufferSize(20000); performance.clearResourceTimings()")
    nodes = page.run("return document.querySelectorAll('*').length")
    # As a held key does: 300 presses in one go.
    page.run(
        "for (let i = 0; i < 300; i += 1) document.body.dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))"
    )
    page.settled()
    assert page.place() == 301
    held = page.requests()
    assert sum("/view" in one for one in held) <= 8
    assert sum("/api/image/" in one for one in held) <= 8

    # From end to end with the wheel, as fast as it goes.
    page.run("performance.clearResourceTimings()")
    assert page.run("return list.scrollHeight") > 50_000
    most = page.run(
        """let most = 0;
        for (let top = 0; top < list.scrollHeight; top += 6000) {
          list.scrollTop = top; list.dispatchEvent(new Event('scroll'));
          most = Math.max(most, document.querySelectorAll('.row').length);
        }
        return most;"""
    )
    page.settled()
    assert most <= 40
    assert page.run("return document.querySelectorAll('.row').length") <= 40
    assert page.run("return document.querySelectorAll('*').length") < nodes + 300
    # Everything was read once.
    page.run("performance.clearResourceTimings()")
    page.press("⤒")
    page.press("→→→←←")
    page.press("[[]]")
    again = page.requests()
    assert not [one for one in again if "/api/index" in one]
    assert not [one for one in again if "/api/matches" in one]
    details = [one for one in again if "/api/image/" in one]
    assert len(details) == len(set(details))


def test_masks_are_painted_where_they_are(window, tmp_path):
    """The packed RLE is read in the browser: every pixel against the decoding of the reports."""
    annotations, _ = data_set(tmp_path, 5, seed=3, masks=True)
    objects = json.loads(annotations.read_text())["annotations"]
    page = Page(window)
    with viewing("--annotations", annotations) as viewed:
        page.open(viewed.url)
        for image in range(1, 6):
            mine = [one["segmentation"] for one in objects if one["image_id"] == image]
            assert int(page.run("return masks.dataset.masks")) == len(mine)
            if mine:
                pixels = page.run("return [...masks.getContext('2d').getImageData(0, 0, 160, 120).data]")
                painted = np.array(pixels).reshape(120, 160, 4)[:, :, 3] > 40
                expected = np.any([decoded(one) for one in mine], axis=0)
                assert (painted != expected).mean() < 0.002
            page.press("→")
        page.press("m")
        assert page.run("return masks.dataset.masks") == "0"
        assert page.errors() == []


def test_predictions_alone_are_not_judged(window, tmp_path):
    _, results = data_set(tmp_path, 3)
    for path in (tmp_path / "images").iterdir():
        path.rename(path.with_stem(str(int(path.stem) + 1)))
    page = Page(window)
    with viewing(results, "--images", tmp_path / "images", "--score-thr", "0") as viewed:
        page.open(viewed.url)
        assert page.run("return document.getElementById('iou-control').hidden")
        page.press("e")
        marks = page.marks()
        assert {mark["role"] for mark in marks} <= {"object"}
        wanted = [one for one in json.loads(results.read_text()) if one["image_id"] == 1]
        assert len(marks) == len(wanted)
        assert page.errors() == []


def test_a_server_that_was_ended_is_told(window, tmp_path):
    annotations, results = data_set(tmp_path, 30)
    page = Page(window)
    with viewing(results, "--annotations", annotations) as viewed:
        page.open(viewed.url)
    page.press("⤓")
    assert "does not answer" in page.run("return problem.textContent")
    assert page.place() == 30
    page.press("⤒")
    assert page.run("return problem.hidden")
    assert all("ERR_CONNECTION_REFUSED" in one for one in page.errors())


def test_photographs_alone_and_a_name_that_is_html(window, tmp_path):
    """Names come from files of strangers: they are text."""
    name = "<img src=x onerror=document.title='gone'>.png"
    Image.new("RGB", (64, 48)).save(tmp_path / name)
    page = Page(window)
    with viewing("--images", tmp_path) as viewed:
        page.open(viewed.url)
        assert page.run("return document.getElementById('name').textContent") == name
        assert page.run("return document.title") == f"{tmp_path.name} – detserve view"
        assert page.errors() == []
