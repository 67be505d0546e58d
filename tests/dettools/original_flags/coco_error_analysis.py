"""MMDetection 3.x, tools/analysis_tools/coco_error_analysis.py."""

COMMAND = "coco-error-analysis"
BASE = ["results.bbox.json", "results"]
FLAGS = [
    (["--ann", "instances_val2017.json"], "works"),
    (["--types", "bbox", "segm"], "works"),
    (["--types", "segm"], "works"),
    (["--extraplots"], "works"),
    (["--areas", "1024", "9216", "10000000000"], "works"),
    (["--score-thr", "0.3"], "works"),
]
