"""MMDetection 3.x, tools/model_converters/upgrade_model_version.py."""

COMMAND = "upgrade-checkpoint"
BASE = ["in.pth", "out.pth"]
FLAGS = [([], "works"), (["--num-classes", "81"], "works")]
