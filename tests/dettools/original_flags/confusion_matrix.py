"""MMDetection 3.x, tools/analysis_tools/confusion_matrix.py."""

COMMAND = "confusion-matrix"
BASE = ["config.py", "result.pkl", "save_dir"]
FLAGS = [
    (["--show"], "no window is opened: the files in DIR are written"),
    (["--color-theme", "viridis"], "works"),
    (["--score-thr", "0.3"], "works"),
    (["--tp-iou-thr", "0.5"], "works"),
    (["--nms-iou-thr", "0.5"], "works"),
    (["--cfg-options", "test_dataloader.dataset.ann_file=a.json"], "no effect: give --annotations and --images"),
]
