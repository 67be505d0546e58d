"""MMDetection 3.x, tools/analysis_tools/robustness_eval.py."""

COMMAND = "robustness-eval"
BASE = ["results.pkl"]
FLAGS = [
    *((["--dataset", name], "works") for name in ("coco", "voc", "cityscapes")),
    (["--task", "bbox", "segm"], "works"),
    (["--metric", "AP", "AP50", "AP75", "APs", "APm", "APl"], "works"),
    (["--metric", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"], "works"),
    (["--metric", "mAP", "mAP_50"], "works"),
    (["--prints", "P", "mPC", "rPC"], "works"),
    (["--aggregate", "all"], "works"),
    (["--aggregate", "benchmark"], "works"),
]
