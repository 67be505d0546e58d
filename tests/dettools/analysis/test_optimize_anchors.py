"""Anchors against hand-computed values, the original algorithm's two defects, and the command as people call it."""

import json

import numpy as np
import pytest
from dettools.analysis.anchor_boxes import (
    AnchorError,
    as_sizes,
    box_sizes,
    coverage_of,
    histogram_of,
    iou_of_sizes,
    rounded,
)
from dettools.analysis.anchor_config import config_text, grouped, layout_of, read_layout
from dettools.analysis.anchor_search import cluster_anchors, evolve_anchors, mean_iou_of, polished
from dettools.cli import main
from dettools.ground_truth import ground_truth_of

CONFIG = """
train_dataloader = dict(dataset=dict(type='CocoDataset', data_root='', ann_file='boxes.json', data_prefix=dict(img='')))
model = dict(bbox_head=dict(anchor_generator=dict(
    type='YOLOAnchorGenerator',
    base_sizes=[[(116, 90), (156, 198), (373, 326)], [(30, 61), (62, 45), (59, 119)], [(10, 13), (16, 30), (33, 23)]],
    strides=[32, 16, 8])))
"""


def annotations(sizes, image=(608, 608), crowd=()):
    boxes = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": [0, 0, *map(float, size)], "iscrowd": 0, "area": 1.0}
        for number, size in enumerate(sizes, start=1)
    ]
    for place in crowd:
        boxes[place]["iscrowd"] = 1
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "width": image[0], "height": image[1]}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": boxes,
    }


def ground_truth(tmp_path, *args, **options):
    return ground_truth_of(annotations(*args, **options), path=tmp_path / "boxes.json")


def groups(seed=0, each=60):
    """Boxes around nine sizes that lie far apart."""
    random = np.random.default_rng(seed)
    centres = np.array([(10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326)])
    return (centres[:, None] * np.exp(random.normal(0, 0.04, (9, each, 2)))).reshape(-1, 2), centres


def original_k_means(sizes, count, seed, iterations=1000):
    """What the original does: any boxes as seeds, one twice at worst, and the mean of nobody is 0."""
    random = np.random.default_rng(seed)
    centres = sizes[random.integers(0, len(sizes), count)]
    nearest = None
    for _ in range(iterations):
        now = iou_of_sizes(sizes, centres).argmax(axis=1)
        if nearest is not None and np.array_equal(now, nearest):
            break
        nearest = now
        centres = np.stack([sizes[now == one].sum(axis=0) / max((now == one).sum(), 1) for one in range(count)])
    return centres


def test_iou_by_hand():
    found = iou_of_sizes(np.array([[10.0, 20.0], [0.0, 0.0]]), np.array([[20.0, 10.0], [10.0, 20.0], [0.0, 0.0]]))
    assert found.tolist() == [[100 / 300, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_coverage_by_hand():
    found = coverage_of(np.array([[10.0, 10.0], [50.0, 10.0]]), np.array([[10.0, 10.0], [10.0, 20.0], [10.0, 60.0]]))
    assert found.mean_iou == pytest.approx((1 + 1 / 2 + 1 / 6) / 3)
    # The third box is six times as high as the best anchor.
    assert found.best_possible_recall == pytest.approx(2 / 3)
    assert (found.recall50, found.recall75) == pytest.approx((2 / 3, 1 / 3))
    assert found.average_recall == pytest.approx((2 / 3 + 9 * 1 / 3) / 10)
    assert found.per_anchor == (1.0, 0.0)


def test_a_square_stays_square_where_the_input_is_not(tmp_path):
    """[REPRO] the original divides each side by its own ratio: 100 × 100 of a 1280 × 720 photograph becomes 50 × 25."""
    truth = ground_truth(tmp_path, [(100, 100)], image=(1280, 720))
    original = np.array([100, 100]) / (np.array([1280, 1280]) / np.array([640, 320]))
    ours = box_sizes(truth, (640, 320)).sizes[0]
    assert original.tolist() == [50.0, 25.0]
    assert ours.tolist() == pytest.approx([100 * 320 / 720] * 2)
    assert box_sizes(truth, (640, 320), keep_ratio=False).sizes[0].tolist() == pytest.approx([50, 100 * 320 / 720])


def test_no_anchor_is_empty():
    """[REPRO] the original makes 0 × 0 anchors of clusters that lost their boxes: here none of 200 seeds does."""
    sizes = np.random.default_rng(5).uniform(5, 300, (200, 2))
    histogram = histogram_of(sizes, 100)
    original = sum((original_k_means(sizes, 9, seed) == 0).any() for seed in range(200))
    ours = sum((cluster_anchors(histogram, 9, restarts=1, seed=seed).anchors < 1).any() for seed in range(200))
    assert original > 10
    assert ours == 0


def test_a_dead_cluster_is_repaired():
    # Seven boxes of five sizes for five anchors: wherever it starts, every size gets its own.
    histogram = histogram_of(
        np.array([(10, 10), (10, 10), (20, 10), (10, 20), (100, 100), (100, 100), (5, 90)], float), 9
    )
    assert cluster_anchors(histogram, 5, restarts=1).mean_iou == pytest.approx(1.0)
    with pytest.raises(AnchorError, match="got 6 anchors for 5 different box sizes"):
        cluster_anchors(histogram, 6)


@pytest.mark.parametrize("algorithm", ["k-means", "evolution"])
def test_groups_of_boxes_are_found(algorithm):
    sizes, centres = groups()
    if algorithm == "evolution":
        sizes, centres = sizes[4 * 60 :: 2], centres[4:]
    histogram = histogram_of(sizes, 100)
    if algorithm == "k-means":
        found = cluster_anchors(histogram, 9)
        assert found.mean_iou == max(found.spread)
    else:
        found = evolve_anchors(histogram, 5, (400, 400), steps=300, seed=1)
    found = polished(found, histogram, (400, 400))
    assert found.mean_iou > 0.92
    assert np.abs(found.anchors / centres - 1).max() < 0.1


def test_polishing_never_loses_and_a_seed_repeats():
    sizes = np.random.default_rng(1).uniform(5, 300, (300, 2))
    histogram = histogram_of(sizes, 100)
    found = cluster_anchors(histogram, 4, seed=3)
    assert (found.anchors == cluster_anchors(histogram, 4, seed=3).anchors).all()
    better = polished(found, histogram, (300, 300))
    assert better.mean_iou >= found.mean_iou
    assert better.mean_iou == pytest.approx(mean_iou_of(better.anchors, histogram))
    once, again = (evolve_anchors(histogram, 2, (300, 300), steps=20, seed=7).anchors for _ in range(2))
    assert (once == again).all()


def test_anchors_of_no_box_are_revived():
    """Evolution can end with anchors that are nobody's best; no climb moves them."""
    sizes, _ = groups()
    histogram = histogram_of(sizes, 100)
    found = evolve_anchors(histogram, 9, (608, 608), steps=3)
    assert (np.array(coverage_of(found.anchors, sizes).per_anchor) == 0).any()
    climbed = polished(found, histogram, (608, 608))
    assert (np.array(coverage_of(climbed.anchors, sizes).per_anchor) > 0).all()
    assert climbed.mean_iou > found.mean_iou + 0.1


def test_better_than_the_original_algorithm():
    sizes = np.exp(np.random.default_rng(2).normal(4, 0.8, (3000, 2))).clip(2, 600)
    histogram = histogram_of(sizes, 100)
    original = max(coverage_of(original_k_means(sizes, 6, seed), sizes).mean_iou for seed in range(3))
    ours = polished(cluster_anchors(histogram, 6), histogram, (608, 608))
    assert coverage_of(ours.anchors, sizes).mean_iou > original


def test_a_histogram_keeps_the_boxes():
    sizes = np.random.default_rng(4).uniform(1, 500, (20_000, 2))
    histogram = histogram_of(sizes, 40)
    assert len(histogram.sizes) <= 1600
    assert histogram.weights.sum() == 20_000
    assert np.average(histogram.sizes, axis=0, weights=histogram.weights) == pytest.approx(sizes.mean(axis=0))
    anchors = np.array([[40.0, 60.0], [200.0, 150.0]])
    assert mean_iou_of(anchors, histogram) == pytest.approx(coverage_of(anchors, sizes).mean_iou, abs=0.005)


def test_what_is_left_out(tmp_path):
    found = box_sizes(
        ground_truth(tmp_path, [(10, 10), (0, 5), (300, 300), (2, 40)], crowd=[2]), (608, 608), smallest_px=3
    )
    assert found.sizes.tolist() == [[10.0, 10.0]]
    assert found.left_out == {"crowd": 1, "no size": 1, "too small": 1}
    with pytest.raises(AnchorError, match="no box is left of 1"):
        box_sizes(ground_truth(tmp_path, [(300, 300)], crowd=[0]), (608, 608))
    with pytest.raises(AnchorError, match="image 1 has no width and height"):
        box_sizes(ground_truth(tmp_path, [(300, 300)], image=(0, 0)), (608, 608))


def test_the_smallest_anchors_go_to_the_finest_level(tmp_path):
    """The original prints a flat list, smallest first; the first level of YOLOv3's config has the stride 32."""
    (tmp_path / "yolo.py").write_text(CONFIG, encoding="utf-8")
    layout = read_layout(tmp_path / "yolo.py")
    assert (layout.count, layout.strides, layout.current) == (9, (32, 16, 8), True)
    anchors = rounded(np.array(layout.anchors) + 0.3)
    levels = grouped(anchors, layout)
    assert levels == tuple(tuple((int(w), int(h)) for w, h in level) for level in layout.base_sizes)
    text = config_text(levels, layout)
    values = {}
    exec(text, {"dict": dict}, values)
    assert values["anchor_generator"]["base_sizes"] == [list(level) for level in levels]
    assert values["anchor_generator"]["strides"] == [32, 16, 8]


def test_other_generators_are_refused(tmp_path):
    config = tmp_path / "rpn.py"
    config.write_text("model = dict(rpn_head=dict(anchor_generator=dict(type='AnchorGenerator', scales=[8])))")
    with pytest.raises(AnchorError, match="got AnchorGenerator, expected a YOLOAnchorGenerator"):
        read_layout(config)
    with pytest.raises(AnchorError, match="got 2 anchors in use, expected 6"):
        layout_of([8, 16], 3, [(1, 1), (2, 2)])
    with pytest.raises(AnchorError, match="pairs of width and height above 0"):
        as_sizes([(0, 5)])


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A config with its data, in the current folder."""
    sizes, _ = groups(each=20)
    (tmp_path / "boxes.json").write_text(json.dumps(annotations(sizes * 1.3)), encoding="utf-8")
    (tmp_path / "yolo.py").write_text(CONFIG, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command(project, capsys):
    assert main(["optimize-anchors", "yolo.py", "--algorithm", "k-means", "--output-dir", "out", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["better"]
    assert document["coverage"]["mean_iou"] > document["present_coverage"]["mean_iou"]
    result = json.loads((project / "out/anchor_optimize_result.json").read_bytes())
    assert result == document["anchors"] == sorted(result, key=lambda anchor: anchor[0] * anchor[1])
    assert document["base_sizes"] == [result[6:], result[3:6], result[:3]]
    assert json.loads((project / "out/anchor_report.json").read_bytes()) == document
    assert (project / "out/anchors.png").read_bytes().startswith(b"\x89PNG")


def test_anchors_that_are_no_better_are_refused(project, capsys):
    boxes = [(116, 90), (156, 198), (373, 326), (30, 61), (62, 45), (59, 119), (10, 13), (16, 30), (33, 23)]
    (project / "boxes.json").write_text(json.dumps(annotations(boxes)), encoding="utf-8")
    assert main(["optimize-anchors", "yolo.py", "--algorithm", "k-means", "--output-dir", "out"]) == 1
    assert "a mean IoU of 1.0000, the present ones 1.0000: keep the present ones" in capsys.readouterr().err
    assert not (project / "out").exists()


ORIGINAL = [
    (
        ["yolo.py", "--algorithm", "k-means", "--input-shape", "608", "608", "--iters", "50"],
        0,
        "Anchor cluster finish.",
    ),
    (["yolo.py", "--iters", "1", "--no-polish"], 1, "keep the present ones"),
    (["yolo.py", "--iters", "3", "--no-polish"], 0, "recall at IoU .50 falls from 1.000 to"),
    (["yolo.py", "--algorithm", "k-means", "--device", "cuda:0"], 0, "--device cuda:0: no effect"),
    (
        ["yolo.py", "--algorithm", "k-means", "--output-dir", "out"],
        0,
        "Result saved in out/anchor_optimize_result.json",
    ),
    (
        ["yolo.py", "--algorithm", "k-means", "--cfg-options", "train_dataloader.dataset.ann_file=boxes.json"],
        0,
        "Anchor optimize result:[[",
    ),
    (["yolo.py", "--algorithm", "k-means", "--cfg-options", "work_dir=x"], 0, "--cfg-options work_dir: no effect here"),
    (["boxes.json", "--algorithm", "k-means"], 0, "for the config:"),
    (["boxes.json", "--annotations", "boxes.json"], 2, "got the annotations twice"),
    (["yolo.py", "--strides", "8"], 2, "describe a detector without a config"),
    (["yolo.py", "--annotations", "none.json"], 2, "none.json: cannot be read"),
    (["boxes.json", "--anchors", "10"], 2, "expected width,height such as 10,13"),
    (["boxes.json", "--anchors", "nan,10"], 2, "got 'nan,10', expected width,height"),
    (["boxes.json", "--anchors", "0,10"], 2, "got '0,10', expected width,height"),
    (["boxes.json", "--seed", "-1"], 2, "--seed: got -1, expected 0 or more"),
    (["boxes.json", "--input-shape", "0", "608"], 2, "got the input 0 × 608"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), ORIGINAL)
def test_arguments_of_the_original(project, capsys, arguments, code, text):
    assert main(["optimize-anchors", *arguments]) == code
    printed = capsys.readouterr()
    assert text in printed.out + printed.err


@pytest.mark.shared_data
def test_real_annotations(shared_data, capsys):
    """YOLOv3's own anchors on 50 photographs of COCO."""
    file = shared_data / "coco/liz50/instances_val2017.json"
    present = ["10,13", "16,30", "33,23", "30,61", "62,45", "59,119", "116,90", "156,198", "373,326"]
    assert main(["optimize-anchors", str(file), "--algorithm", "k-means", "--anchors", *present, "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["coverage"]["boxes"], document["left_out"]["crowd"]) == (377, 5)
    assert document["coverage"]["mean_iou"] > 0.64 > document["present_coverage"]["mean_iou"] > 0.62
