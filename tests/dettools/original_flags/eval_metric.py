"""MMDetection 2.x and 3.x, tools/analysis_tools/eval_metric.py."""

COMMAND = "eval-metric"
BASE = ["config.py", "result.pkl"]
FLAGS = [
    (["--eval", "bbox", "segm"], "works"),
    (["--format-only"], "works"),
    (["--eval-options", "classwise=True"], "works"),
    (["--cfg-options", "test_evaluator.ann_file=a.json"], "works"),
]
