"""MMDetection 3.x, tools/analysis_tools/analyze_logs.py cal_train_time."""

COMMAND = "analyze-logs cal_train_time"
BASE = ["log.json", "other.log.json"]
FLAGS = [(["--include-outliers"], "works")]
