"""MMDetection 3.x, tools/model_converters/regnet2mmdet.py."""

COMMAND = "regnet2mmdet"
BASE = ["regnet.pyth", "out.pth"]
FLAGS = [([], "works")]
