"""MMDetection 3.x, tools/model_converters/detectron2pytorch.py."""

COMMAND = "detectron2pytorch"
BASE = ["R-50.pkl", "out.pth"]
FLAGS = [(["50"], "works"), (["101"], "works")]
