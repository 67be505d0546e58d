"""MMDetection 3.x, tools/analysis_tools/test_robustness.py."""

COMMAND = "robustness"
BASE = ["config.py", "checkpoint.pth"]
FLAGS = [
    (["--out", "results.pkl"], "works"),
    (["--corruptions", "benchmark"], "works"),
    (["--corruptions", "all"], "works"),
    (["--corruptions", "noise", "blur", "weather", "digital", "holdout"], "works"),
    (["--corruptions", "None"], "works"),
    (["--corruptions", "gaussian_noise", "fog"], "works"),
    (["--severities", "0", "1", "2", "3", "4", "5"], "works"),
    (["--summaries", "True"], "works"),
    (["--work-dir", "work"], "works"),
    (["--show"], "no effect: no window is opened; see --show-dir"),
    (["--show-dir", "shown"], "works"),
    (["--show-score-thr", "0.3"], "works"),
    (["--wait-time", "2"], "no effect: no window is opened"),
    (["--seed", "1"], "works"),
    (["--launcher", "pytorch"], "no effect: one process asks; see --processes"),
    (["--local_rank", "0"], "no effect: one process asks"),
    (["--local-rank", "0"], "no effect: one process asks"),
    (["--final-prints", "P", "mPC", "rPC"], "works"),
    (["--final-prints-aggregate", "all"], "works"),
    (["--cfg-options", "a.b=1"], "no effect: name other data by --images and --annotations"),
]
