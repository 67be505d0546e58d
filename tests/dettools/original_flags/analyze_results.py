"""MMDetection 3.x, tools/analysis_tools/analyze_results.py."""

COMMAND = "analyze-results"
BASE = ["config.py", "result.pkl", "show_dir"]
FLAGS = [
    (["--show"], "no window is opened: open DIR/index.html"),
    (["--wait-time", "2"], "no effect: no window is opened"),
    (["--topk", "20"], "works"),
    (["--show-score-thr", "0.3"], "works"),
    (["--cfg-options", "model.test_cfg.score_thr=0.3"], "no effect: give --annotations and --images"),
]
