"""MMDetection 3.x, tools/analysis_tools/coco_occluded_separated_recall.py."""

COMMAND = "occluded-recall"
BASE = ["result.pkl"]
FLAGS = [
    (["--out", "occluded.json"], "works"),
    (["--score-thr", "0.3"], "works"),
    (["--iou-thr", "0.75"], "works"),
    (["--ann", "instances_val2017.json"], "works"),
]
