"""MMDetection 3.x, tools/analysis_tools/optimize_anchors.py."""

COMMAND = "optimize-anchors"
BASE = ["config.py"]
FLAGS = [
    (["--algorithm", "k-means"], "works"),
    (["--algorithm", "differential_evolution"], "works"),
    (["--input-shape", "608", "608"], "works"),
    (["--iters", "1000"], "works"),
    (["--output-dir", "out"], "works"),
    (["--device", "cuda:0"], "no effect: the boxes' histogram needs no GPU"),
    (["--cfg-options", "train_dataloader.dataset.ann_file=a.json"], "works"),
]
