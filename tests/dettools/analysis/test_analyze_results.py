"""analyze-results: what each image is worth, beside the original's own computation; the folders it writes."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from coco_scenes import checked, scenes
from dettools import cli
from dettools.analysis.confusion import confusion_of
from dettools.analysis.image_results import COLUMNS, extremes, image_results, ranked
from dettools.analysis.overlaps import find_overlaps
from dettools.coco_metrics import evaluate_coco
from PIL import Image

BOX, NEAR, FAR = (0, 0, 20, 20), (1, 1, 20, 20), (60, 60, 20, 20)


def iou_of(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    return inside / (a[2] * a[3] + b[2] * b[3] - inside)


def original(document, results, image_id):
    """MMDetection's bbox_map_eval of one image: eval_map at ten IoU thresholds, over the classes that are annotated."""
    objects = [one for one in document["annotations"] if one["image_id"] == image_id]
    means = []
    for threshold in np.linspace(0.5, 0.95, 10):
        areas = []
        for category in sorted({one["category_id"] for one in objects}):
            boxes = [one["bbox"] for one in objects if one["category_id"] == category]
            found = [one for one in results if (one["image_id"], one["category_id"]) == (image_id, category)]
            taken, right = set(), []
            for one in sorted(found, key=lambda one: -one["score"]):
                ious = [iou_of(one["bbox"], box) for box in boxes]
                best = int(np.argmax(ious))
                right.append(ious[best] >= threshold and best not in taken)
                taken |= {best} if right[-1] else set()
            tp = np.cumsum(right)
            recalls = np.concatenate([[0.0], tp / len(boxes), [1.0]])
            precisions = np.concatenate([[0.0], tp / np.arange(1, len(right) + 1), [0.0]])
            for place in range(len(precisions) - 1, 0, -1):
                precisions[place - 1] = max(precisions[place - 1], precisions[place])
            steps = np.flatnonzero(recalls[1:] != recalls[:-1])
            areas.append(((recalls[steps + 1] - recalls[steps]) * precisions[steps + 1]).sum())
        means.append(np.mean(areas) if areas else 0.0)
    return sum(means) / len(means)


def scene(*images):
    """Images as (objects, detections): objects are (category, box), detections (category, score, box)."""
    document = {
        "images": [
            {"id": at + 1, "file_name": f"{at + 1}.jpg", "width": 100, "height": 100} for at in range(len(images))
        ],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    results = []
    for at, (objects, detections) in enumerate(images, start=1):
        for category, box in objects:
            number = len(document["annotations"]) + 1
            one = {"id": number, "image_id": at, "category_id": category, "bbox": list(box), "iscrowd": 0}
            document["annotations"].append({**one, "area": box[2] * box[3]})
        for category, score, box in detections:
            results.append({"image_id": at, "category_id": category, "score": score, "bbox": list(box)})
    return document, results


def ours(document, results, **options):
    truth = checked(document)
    return image_results(truth, find_overlaps(truth, results), **options)


def test_a_false_positive_of_an_absent_class_costs():
    """[REPRO] The original leaves the dog out, because the image has none: 1.0, as if it were not there."""
    case = scene(([(1, BOX)], [(2, 0.99, FAR), (1, 0.9, BOX)]), ([(1, BOX)], [(1, 0.9, BOX)]))
    wrong, right = ours(*case).images
    assert original(*case, 1) == original(*case, 2) == 1.0
    assert (wrong.ap, right.ap) == (0.5, 1.0)
    assert wrong.class_ap == 1.0
    assert (wrong.fp, wrong.absent_fp, wrong.top_fp) == (1, 1, 0.99)
    assert wrong.f1 == pytest.approx(2 / 3)


def test_an_image_without_objects_is_not_the_worst():
    """[REPRO] The original gives each image without objects 0, the perfect ones too; they fill its bad/."""
    case = scene(
        ([], []), ([], [(1, 0.2, BOX)]), ([], [(1, 0.9, BOX)]), ([(1, BOX)], [(1, 0.9, FAR)]), ([(1, BOX)], [])
    )
    results = ours(*case)
    assert [original(*case, image) for image in (1, 2, 3)] == [0, 0, 0]
    assert [(one.ap, one.f1) for one in results.images] == [(1, 1), (1, 1), (0, 0), (0, 0), (0, 0)]
    good, bad = extremes(results.images, "ap", 20)
    assert [one.image_id for one in good] == [2, 1]
    assert [one.image_id for one in bad] == [4, 3]
    assert results.images[0].class_ap is None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mean_over_present_classes_is_the_original_s(seed):
    """Equal where objects do not overlap: else the original's rule (VOC's) and COCO's part, as below."""
    document, results = scenes(seed, images=60)
    document["annotations"] = [one for one in document["annotations"] if not one["iscrowd"]]
    compared = 0
    for one in ours(document, results).images:
        objects = [other for other in document["annotations"] if other["image_id"] == one.image_id]
        if not objects or any(iou_of(a["bbox"], b["bbox"]) > 0 for a in objects for b in objects if a is not b):
            continue
        assert one.class_ap == pytest.approx(original(document, results, one.image_id), abs=1e-9)
        compared += 1
    assert compared > 10


def test_a_detection_whose_object_is_taken_finds_the_next_one():
    """[SRC] The original counts it as false: its best object is taken, and it looks at no other one."""
    wide = (0, 0, 24, 20)
    case = scene(([(1, BOX), (1, wide)], [(1, 0.9, BOX), (1, 0.8, BOX)]))
    assert original(*case, 1) == pytest.approx(0.5)
    assert ours(*case).images[0].class_ap == pytest.approx((7 * 1.0 + 3 * 0.5) / 10)


def test_ap_of_one_class_is_that_of_coco():
    """COCO's 101 recall points against the exact area: equal where each object is found."""
    document, results = scene(([(1, BOX), (1, FAR)], [(1, 0.9, BOX), (1, 0.8, (30, 30, 9, 9)), (1, 0.7, FAR)]))
    exact = ours(document, results).images[0].ap
    assert exact == pytest.approx((1 + 2 / 3) / 2)
    assert exact == pytest.approx(evaluate_coco(checked(document), results).per_class[0].ap, abs=0.01)


@pytest.mark.parametrize(("seed", "masks"), [(3, False), (4, True)])
def test_the_counts_are_those_of_the_confusion_matrix(seed, masks):
    document, results = scenes(seed, images=12 if masks else 50, masks=masks, ties=True)
    truth = checked(document)
    overlaps = find_overlaps(truth, results, iou_type="segm" if masks else "bbox")
    totals = image_results(truth, overlaps).totals
    confusion = confusion_of(overlaps)
    assert totals["tp"] == confusion.found
    assert totals["tp"] + totals["fn"] == totals["objects"] == truth.objects
    assert totals["fp"] == confusion.confused + confusion.background
    assert totals["fn"] == confusion.confused + confusion.missed
    assert totals["confused"] == confusion.confused


def test_crowds_are_neither_missed_nor_false():
    document, results = scene(([(1, (0, 0, 60, 60))], [(1, 0.9, (0, 0, 20, 20))]))
    document["annotations"][0]["iscrowd"] = 1
    one = ours(document, results).images[0]
    assert (one.tp, one.fp, one.fn, one.objects, one.ap, one.f1) == (0, 0, 0, 0, 1.0, 1.0)


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_sorts(column):
    images = ours(*scenes(5, images=30)).images
    values = [getattr(one, column) for one in ranked(images, column)]
    known = [value for value in values if value is not None]
    assert values == [*known, *[None] * (len(values) - len(known))]
    assert known == sorted(known, reverse=column in ("fp", "fn", "confused", "absent_fp", "top_fp"))


def test_topk_is_at_most_half_of_the_images():
    images = ours(*scenes(5, images=7)).images
    good, bad = extremes(images, "f1", 20)
    assert len(good) == len(bad) == 3
    assert not {one.image_id for one in good} & {one.image_id for one in bad}
    assert good[0].f1 >= good[-1].f1 >= bad[-1].f1 >= bad[0].f1


# The command


def files(folder, document, results):
    (folder / "val.json").write_text(json.dumps(document))
    (folder / "results.json").write_text(json.dumps(results))
    for image in document["images"]:
        path = folder / "images" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (image["width"], image["height"]), (90, 120, 150)).save(path)


def run(folder, *options):
    words = [str(folder / "results.json"), str(folder / "out"), "--annotations", str(folder / "val.json")]
    return cli.main(["analyze-results", *words, "--images", str(folder / "images"), *options])


@pytest.fixture
def four(tmp_path):
    """Four images: two right, two wrong."""
    right, wrong = ([(1, BOX)], [(1, 0.9, BOX)]), ([(1, BOX)], [(2, 0.9, FAR), (1, 0.2, FAR)])
    document, results = scene(right, wrong, right, wrong)
    files(tmp_path, document, results)
    return tmp_path


def pictures(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.jpg"))


def test_the_best_and_the_worst_as_pictures_of_both_sides(four, capsys):
    assert run(four, "--json") == 0
    out = four / "out"
    assert pictures(out) == ["bad/2_0.000.jpg", "bad/4_0.000.jpg", "good/1_1.000.jpg", "good/3_1.000.jpg"]
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer == json.loads((out / "results.json").read_text())
    assert answer["bad"] == [2, 4]
    assert answer["totals"]["fp"] == 2
    with (out / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == [f"{image}.jpg" for image in (2, 4, 1, 3)]
    assert [row["iou"] for row in rows] == ["", "", "1", "1"]
    # [SRC] draw_gt=False: the original's picture has the prediction only. Ours has the object on the left, too.
    with Image.open(out / "good" / "1_1.000.jpg") as picture:
        colours = np.asarray(picture.convert("RGB"), int)
    green = (np.abs(colours - (0, 158, 84)).sum(axis=2) < 60).sum(axis=0)
    middle = colours.shape[1] // 2
    assert green[:middle].sum() > 100
    assert green[middle:].sum() > 100


def test_images_of_one_name_in_two_folders_are_two_pictures(tmp_path):
    """[REPRO] The original names a picture by the image's stem and value: the second one overwrites the first."""
    right = ([(1, BOX)], [(1, 0.9, BOX)])
    document, results = scene(right, right, ([(1, BOX)], []), ([(1, BOX)], []))
    for image, name in zip(document["images"], ("a/0001.jpg", "b/0001.jpg", "a/2.jpg", "b/2.jpg"), strict=True):
        image["file_name"] = name
    files(tmp_path, document, results)
    theirs = {f"{Path(image['file_name']).stem}_{round(1.0, 3)}.jpg" for image in document["images"][:2]}
    assert run(tmp_path) == 0
    good = [name for name in pictures(tmp_path / "out") if name.startswith("good")]
    assert len(theirs) == 1
    assert good == ["good/a__0001_1.000.jpg", "good/b__0001_1.000.jpg"]


def test_the_page_links_pictures_whatever_their_images_are_called(tmp_path):
    """Bare, the address would end at #, and %41 would be an A."""
    document, results = scene(([(1, BOX)], [(1, 0.9, BOX)]), ([(1, BOX)], []))
    for image, name in zip(document["images"], ("a#1.jpg", "b%41.jpg"), strict=True):
        image["file_name"] = name
    files(tmp_path, document, results)
    assert run(tmp_path) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    linked = {unquote(one) for one in re.findall(r'(?:href|src)="([^"]+\.jpg)"', page)}
    assert linked == set(pictures(tmp_path / "out")) == {"good/a#1_1.000.jpg", "bad/b%41_0.000.jpg"}


def test_a_second_run_takes_its_own_old_pictures_away_and_no_others(four):
    assert run(four) == 0
    mine = four / "out" / "good" / "mine.jpg"
    mine.write_bytes(b"")
    assert run(four, "--topk", "1", "--sort", "fp") == 0
    assert pictures(four / "out") == ["bad/2_1.jpg", "good/3_0.jpg", "good/mine.jpg"]


def test_masks_without_boxes_are_compared_and_drawn(tmp_path, capsys):
    document, results = scenes(7, images=4, masks=True)
    for one in results:
        del one["bbox"]
    files(tmp_path, document, results)
    assert run(tmp_path, "--json", "--topk", "1") == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["iou_type"] == "segm"
    assert len(answer["pictures"]) == 2


def test_without_photographs_there_are_tables(four, capsys):
    words = [str(four / "results.json"), "--annotations", str(four / "val.json"), "--out", str(four / "out")]
    assert cli.main(["analyze-results", *words, "--sort", "name", "--show", "--wait-time", "1"]) == 0
    errors = capsys.readouterr().err
    assert "no pictures: give --images" in errors
    assert "--show, --wait-time: no window is opened" in errors
    assert pictures(four / "out") == []
    assert "4.jpg" in (four / "out" / "index.html").read_text()


def test_the_page_shows_and_sorts_in_a_browser(four, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no Chromium to open the page in")
    assert run(four, "--show-score-thr", "0.1") == 0
    page = four / "out" / "index.html"
    sorting = """<script>document.querySelector('[data-column="fp"]').click();
      document.title = rows.map(row => row.cells[0].textContent).join();</script></body>"""
    page.write_text(page.read_text().replace("</body>", sorting))
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [chromium, *quiet, "--virtual-time-budget=3000", "--dump-dom", f"file://{page}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    assert "<title>1.jpg,3.jpg,2.jpg,4.jpg</title>" in dom
    assert dom.count('<img src="bad/') == dom.count('<img src="good/') == 2


@pytest.mark.shared_data
def test_real_predictions_add_up_with_the_confusion_matrix(shared_data, capsys):
    package = shared_data / "preds" / "hoovichen"
    words = [str(package / "result.pkl"), "--annotations"]
    words += [str(package / "data" / "package" / "test2017" / "_annotations.coco.json"), "--json"]
    answers = []
    for command in ("analyze-results", "confusion-matrix"):
        assert cli.main([command, *words]) == 0
        answers.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    totals, matrix = answers[0]["totals"], answers[1]
    assert totals["tp"] + totals["fn"] == totals["objects"] == matrix["objects"] == 235
    assert totals["tp"] == matrix["found"] == 207
    assert totals["fp"] == matrix["confused"] + matrix["background"] == 93
