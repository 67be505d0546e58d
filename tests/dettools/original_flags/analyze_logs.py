"""MMDetection 3.x, tools/analysis_tools/analyze_logs.py plot_curve."""

COMMAND = "analyze-logs plot_curve"
BASE = ["log.json", "other.log.json"]
FLAGS = [
    (["--keys", "loss_cls", "loss_bbox"], "works"),
    (["--start-epoch", "2"], "works"),
    (["--eval-interval", "2"], "no effect: the log tells when it was evaluated"),
    (["--title", "losses"], "works"),
    (["--legend", "run1", "run2"], "works"),
    (["--backend", "Agg"], "no effect: pictures are drawn without a display"),
    (["--style", "dark"], "works"),
    (["--out", "losses.pdf"], "works"),
]
