"""confusion-matrix: one object, one count; beside the original's algorithm, and beside hotcoco's class-agnostic one."""

import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from coco_scenes import checked, scenes
from dettools import cli
from dettools.analysis.confusion import (
    chosen_classes,
    confusion_of,
    merged,
    normalized,
    suppressed,
    sweep,
)
from dettools.analysis.overlaps import find_overlaps, match
from dettools.coco_metrics import MetricsError
from hotcoco import COCO, COCOeval
from PIL import Image

CAT, DOG, BACKGROUND, MISSED = 0, 1, 2, 2


def iou_of(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    return inside / (a[2] * a[3] + b[2] * b[3] - inside)


def original(document, results, score_thr=0.3, tp_iou_thr=0.5):
    """MMDetection's calculate_confusion_matrix: every object that a detection overlaps is counted; crowds too."""
    place = {one["id"]: at for at, one in enumerate(document["categories"])}
    counts = np.zeros((len(place) + 1, len(place) + 1), int)
    for image in document["images"]:
        objects = [one for one in document["annotations"] if one["image_id"] == image["id"]]
        found = [one for one in results if one["image_id"] == image["id"]]
        true_positives = [0] * len(objects)
        for label in sorted({place[one["category_id"]] for one in found}):
            for one in (one for one in found if place[one["category_id"]] == label and one["score"] >= score_thr):
                matched = 0
                for at, target in enumerate(objects):
                    if iou_of(one["bbox"], target["bbox"]) >= tp_iou_thr:
                        matched += 1
                        true_positives[at] += place[target["category_id"]] == label
                        counts[place[target["category_id"]], label] += 1
                if not matched:
                    counts[-1, label] += 1
        for count, target in zip(true_positives, objects, strict=True):
            if not count:
                counts[place[target["category_id"]], -1] += 1
    return counts


def original_percentages(counts):
    """What plot_confusion_matrix writes into the cells: NaN becomes -1."""
    with np.errstate(invalid="ignore"):
        shares = counts.astype(np.float32) / counts.sum(axis=1)[:, None] * 100
    return np.array([[int(value) if not np.isnan(value) else -1 for value in row] for row in shares])


def scene(objects, detections):
    """Objects as (category, box, crowd), detections as (category, score, box), all in one image."""
    document = {
        "images": [{"id": 5, "file_name": "a.jpg", "width": 100, "height": 100}],
        "annotations": [
            {
                "id": at + 1,
                "image_id": 5,
                "category_id": category,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": crowd,
            }
            for at, (category, box, crowd) in enumerate(objects)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    results = [
        {"image_id": 5, "category_id": category, "bbox": list(box), "score": score}
        for category, score, box in detections
    ]
    return document, results


def ours(document, results, **options):
    return confusion_of(find_overlaps(checked(document), results), **options)


BOX, NEAR, FAR = (0, 0, 20, 20), (1, 1, 20, 20), (60, 60, 20, 20)


def test_a_confused_object_is_counted_once():
    """[REPRO] The original counts it as confused and as missed: two cells for one object."""
    case = scene([(1, BOX, 0)], [(2, 0.9, NEAR)])
    theirs, mine = original(*case), ours(*case)
    assert theirs[CAT].tolist() == [0, 1, 1]
    assert theirs[CAT].sum() == 2
    assert mine.counts[CAT].tolist() == [0, 1, 0]
    assert mine.counts[CAT].sum() == 1


def test_duplicates_are_not_found_again():
    """[REPRO] Three detections of one object: the original counts three true positives, there is one."""
    case = scene([(1, BOX, 0)], [(1, 0.9, BOX), (1, 0.8, NEAR), (1, 0.7, NEAR)])
    mine = ours(*case)
    assert original(*case)[CAT, CAT] == 3
    assert mine.counts[CAT, CAT] == 1
    assert mine.counts[BACKGROUND, CAT] == 2
    assert mine.duplicates == 2


def test_a_crowd_is_neither_found_nor_missed():
    """[REPRO] The original counts the crowd as an object, and what lies in it as found."""
    case = scene([(1, (0, 0, 50, 50), 1)], [(1, 0.9, (0, 0, 40, 40)), (1, 0.8, (5, 5, 10, 10))])
    theirs, mine = original(*case), ours(*case)
    assert theirs[CAT].sum() == 1
    assert theirs[BACKGROUND].sum() == 1
    assert mine.counts.sum() == 0


def test_a_class_without_objects_is_no_percentage(tmp_path):
    """[REPRO] The original writes -1 % into each cell of such a row; here nothing was measured."""
    case = scene([(1, BOX, 0)], [(1, 0.9, BOX)])
    assert original_percentages(original(*case))[DOG].tolist() == [-1, -1, -1]
    shares = normalized(ours(*case).counts, "rows")
    assert np.isnan(shares[DOG]).all()
    assert shares[CAT].tolist() == [1, 0, 0]


def test_nms_leaves_the_best_of_each_class(tmp_path, capsys):
    """[REPRO] The original ends with an IndexError: its scores are those from before the suppression."""
    boxes, scores = np.array([BOX, NEAR, FAR], float), np.array([0.9, 0.8, 0.7])
    kept = boxes[[0, 2]]
    ious = np.array([[iou_of(one, BOX)] for one in kept])
    with pytest.raises(IndexError):
        [ious[place, 0] for place, score in enumerate(scores) if score >= 0.3]
    document, results = scene([(1, BOX, 0)], [(1, 0.9, BOX), (1, 0.8, NEAR), (1, 0.7, FAR), (2, 0.6, NEAR)])
    assert [one["score"] for one in suppressed(results, 0.5)] == [0.9, 0.7, 0.6]
    assert suppressed([], 0.5) == []
    files(tmp_path, document, results)
    assert run(tmp_path, "--nms-iou-thr", "0.5", "--json") == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["counts"] == [[1, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert "1 detections suppressed by --nms-iou-thr" in answer["notes"]


def test_suppression_needs_boxes():
    with pytest.raises(MetricsError, match="1 of 1 results have no bbox"):
        suppressed([{"image_id": 1, "category_id": 1, "score": 0.5}], 0.5)


@pytest.mark.parametrize(("seed", "masks"), [(0, False), (1, False), (2, True)])
def test_rows_sum_to_objects_and_columns_to_detections(seed, masks):
    document, results = scenes(seed, images=10 if masks else 40, masks=masks, ties=True)
    truth = checked(document)
    overlaps = find_overlaps(truth, results, iou_type="segm" if masks else "bbox")
    confusion = confusion_of(overlaps, score_threshold=0.3)
    matches = match(overlaps, 0.5, score_threshold=0.3)
    assert confusion.counts[:-1].sum(axis=1).tolist() == list(truth.objects_per_category.values())
    labels = overlaps.label[matches.counted]
    assert confusion.counts[:, :-1].sum(axis=0).tolist() == np.bincount(labels, minlength=4).tolist()
    # The same true positives as everywhere, in total and by class.
    found = overlaps.label[matches.true_positive]
    assert np.diag(confusion.counts)[:-1].tolist() == np.bincount(found, minlength=4).tolist()
    assert confusion.counts[-1, -1] == 0
    assert confusion.found + confusion.confused + confusion.missed == truth.objects == confusion.objects
    assert confusion.found + confusion.confused + confusion.background == confusion.detections


def hotcoco_matrix(document, results):
    truth = COCO(document)
    evaluator = COCOeval(truth, truth.load_res(results), "bbox")
    return evaluator.confusion_matrix(iou_thr=0.5, min_score=0.3)["matrix"].astype(int)


def test_hotcoco_agrees_where_boxes_of_two_classes_do_not_compete():
    case = scene(
        [(1, BOX, 0), (2, FAR, 0), (1, (30, 0, 20, 20), 0)],
        [(1, 0.9, NEAR), (1, 0.8, FAR), (2, 0.7, (0, 60, 9, 9)), (2, 0.2, FAR)],
    )
    assert ours(*case).counts.tolist() == hotcoco_matrix(*case).tolist() == [[1, 0, 1], [1, 0, 0], [0, 1, 0]]


def test_hotcoco_matches_whatever_the_class_and_we_those_of_one_class_first():
    """A dog's detection lies nearest to a cat that has its own: hotcoco lets it take the cat, COCO counts a TP."""
    case = scene([(1, BOX, 0)], [(2, 0.95, BOX), (1, 0.9, NEAR)])
    assert hotcoco_matrix(*case).tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert ours(*case).counts.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("seed", [3, 4])
def test_the_sweep_is_the_matrix_at_each_threshold(seed):
    document, results = scenes(seed, images=40, ties=True)
    overlaps = find_overlaps(checked(document), results)
    for row in sweep(overlaps):
        at = confusion_of(overlaps, score_threshold=row.score_threshold)
        assert (row.found, row.confused, row.missed, row.background) == (
            at.found,
            at.confused,
            at.missed,
            at.background,
        )
        right, wrong = at.found, at.detections - at.found + at.objects - at.found
        assert row.f1 == pytest.approx(2 * right / (2 * right + wrong))


def test_normalized_by_rows_columns_and_all():
    counts = np.array([[3, 1, 0], [0, 2, 2], [1, 1, 0]])
    assert normalized(counts, "rows").sum(axis=1).tolist() == [1, 1, 1]
    assert normalized(counts, "columns")[:, 0].tolist() == [0.75, 0, 0.25]
    assert normalized(counts, "all").sum() == pytest.approx(1)
    assert normalized(counts, "none").tolist() == counts.tolist()


def test_of_many_classes_the_confused_ones_stay_and_the_others_are_one_row():
    document, results = scenes(5, images=40, classes=30)
    confusion = ours(document, results)
    chosen = chosen_classes(confusion, 6)
    small = merged(confusion.counts, chosen)
    assert len(chosen) == 6
    assert small.shape == (8, 8)
    assert small.sum() == confusion.counts.sum()
    assert small[:6].sum(axis=1).tolist() == confusion.counts[chosen].sum(axis=1).tolist()
    assert {row for row, _, _ in confusion.top(1)} <= set(chosen)
    assert merged(confusion.counts, range(30)) is confusion.counts


def test_examples_are_the_surest_errors_of_a_cell():
    mine = ours(*scene([(1, BOX, 0), (1, FAR, 0)], [(2, 0.5, NEAR), (2, 0.9, FAR)]))
    first, second = mine.examples(CAT, DOG, 5)
    assert (first.score, first.object_id, first.iou) == (0.9, 2, 1.0)
    assert (second.result, second.object_id) == (0, 1)
    assert second.iou == pytest.approx(iou_of(BOX, NEAR))
    assert mine.examples(CAT, MISSED, 5) == []


def test_nothing_predicted_and_nothing_annotated():
    assert ours(*scene([(1, BOX, 0)], [])).counts[CAT].tolist() == [0, 0, 1]
    empty = ours(*scene([], [(1, 0.9, BOX)]))
    assert empty.counts[BACKGROUND].tolist() == [1, 0, 0]
    assert sweep(empty.overlaps)[0].recall is None


# The command


def files(folder, document, results, *, photographs=True):
    (folder / "val.json").write_text(json.dumps(document))
    (folder / "results.json").write_text(json.dumps(results))
    for image in document["images"] if photographs else ():
        path = folder / "images" / image["file_name"]
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (image["width"], image["height"]), (90, 120, 150)).save(path)


def run(folder, *options):
    paths = [str(folder / "results.json"), "--annotations", str(folder / "val.json")]
    return cli.main(["confusion-matrix", *paths, *options])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("confusion")
    document, results = scenes(6, images=20)
    files(folder, document, results)
    assert run(folder, "--images", str(folder / "images"), "--out", str(folder / "out"), "--pictures", "5") == 0
    return folder / "out"


def test_the_command_writes_picture_tables_and_page(written):
    document = json.loads((written / "confusion_matrix.json").read_text())
    with (written / "confusion_matrix.csv").open() as stream:
        rows = list(csv.reader(stream))
    assert [[int(one) for one in row[1:]] for row in rows[1:]] == document["counts"]
    assert rows[0][-1] == "missed"
    assert rows[-1][0] == "background"
    assert document["found"] + document["confused"] + document["missed"] == document["objects"]
    assert None in document["normalized"]["rows"][3]
    with (written / "threshold_sweep.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == len(document["sweep"]) == 19
    for name in ("confusion_matrix.png", "threshold_sweep.png"):
        with Image.open(written / name) as picture:
            assert min(picture.size) > 500
    assert 0 < len(list((written / "examples").glob("*.jpg"))) <= 5
    page = (written / "index.html").read_text()
    assert set(re.findall(r"examples/[\w]+\.jpg", page)) == {
        f"examples/{path.name}" for path in (written / "examples").glob("*.jpg")
    }
    assert not re.search(r'(src|href)="https?:', page)


def test_a_config_without_its_photographs_still_counts(tmp_path, capsys):
    files(tmp_path, *scene([(1, BOX, 0)], [(2, 0.9, NEAR)]), photographs=False)
    (tmp_path / "config.py").write_text(
        f"test_dataloader = dict(dataset=dict(type='CocoDataset', data_root={str(tmp_path)!r}, ann_file='val.json', "
        "data_prefix=dict(img='elsewhere/'), metainfo=dict(classes=('cat', 'dog'))))\n"
    )
    words = [str(tmp_path / "config.py"), str(tmp_path / "results.json"), "--json"]
    assert cli.main(["confusion-matrix", *words]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["confusions"] == [
        {"object": "cat", "taken_for": "dog", "count": 1, "share": 1.0}
    ]
    assert "give --images DIR to see them" in err


def test_a_second_run_replaces_the_pictures(tmp_path):
    files(tmp_path, *scene([(1, BOX, 0), (1, FAR, 0)], [(2, 0.9, NEAR)]))
    options = ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    for most, left in (("9", ["0_1_0.jpg", "0_2_0.jpg"]), ("1", ["0_1_0.jpg"])):
        assert run(tmp_path, *options, "--pictures", most) == 0
        assert sorted(path.name for path in (tmp_path / "out" / "examples").iterdir()) == left


def dump_dom(page, hash_, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no Chromium to open the page in")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    address = f"file://{page}{hash_}"
    command = [chromium, *quiet, "--virtual-time-budget=3000", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def test_a_cell_leads_to_its_errors_in_a_browser(written, tmp_path):
    document = json.loads((written / "confusion_matrix.json").read_text())
    missed = next(row for row, counts in enumerate(document["counts"]) if counts[-1] and row < 4)
    dom = dump_dom(written / "index.html", f"#cell={missed},4", tmp_path)
    name, count, total = document["rows"][missed], document["counts"][missed][-1], sum(document["counts"][missed])
    assert f"<h3>{name}: {count} of {total} objects missed</h3>" in dom
    assert 'class="edge chosen"' in dom
    cells = sum(count > 0 for row in document["counts"] for count in row)
    assert len(re.findall(r'data-cell="\d', dom)) == cells


def test_the_original_s_positionals_and_a_second_folder(tmp_path, capsys):
    document, results = scene([(1, BOX, 0)], [(1, 0.9, BOX)])
    files(tmp_path, document, results)
    (tmp_path / "config.py").write_text(
        f"data_root = {str(tmp_path)!r}\n"
        "test_dataloader = dict(dataset=dict(type='CocoDataset', ann_file='val.json', data_root=data_root, "
        "data_prefix=dict(img='images/')))\n"
    )
    words = [str(tmp_path / "config.py"), str(tmp_path / "results.json"), str(tmp_path / "out")]
    assert cli.main(["confusion-matrix", *words, "--color-theme", "viridis", "--show"]) == 0
    assert (tmp_path / "out" / "confusion_matrix.png").is_file()
    assert cli.main(["confusion-matrix", *words, "--out", str(tmp_path / "other")]) == 2
    assert "got two folders to write to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no annotations: give --annotations"),
        (["--annotations", "val.json", "--out", "out", "--color-theme", "rainbows"], "expected a colour map"),
        (["--annotations", "val.json", "--tp-iou-thr", "0.05"], "expected 0.1 or more"),
        (["--annotations", "val.json", "--iou-type", "segm"], "1 of 1 annotations have no segmentation"),
    ],
)
def test_what_cannot_be_done_is_told(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    files(tmp_path, *scene([(1, BOX, 0)], [(1, 0.9, BOX)]), photographs=False)
    assert cli.main(["confusion-matrix", "results.json", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("annotations", "predictions", "sums"),
    [
        # (objects, found, confused, missed, background)
        (
            "preds/hoovichen/data/package/test2017/_annotations.coco.json",
            "preds/hoovichen/result.pkl",
            (235, 207, 8, 20, 85),
        ),
        (
            "eval/instances_val2014_100.json",
            "eval/cocoapi/results/instances_val2014_fakesegm100_results.json",
            (830, 400, 52, 378, 65),
        ),
    ],
)
def test_real_predictions(shared_data, capsys, annotations, predictions, sums):
    words = [str(shared_data / predictions), "--annotations", str(shared_data / annotations), "--json"]
    assert cli.main(["confusion-matrix", *words]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert tuple(answer[key] for key in ("objects", "found", "confused", "missed", "background")) == sums
