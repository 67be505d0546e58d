"""MMDetection 3.x, tools/misc/print_config.py; ``--options`` is what the document still shows."""

COMMAND = "print-config"
BASE = ["config.py"]
FLAGS: list[tuple[list[str], str]] = [
    ([], "works"),
    (["--save-path", "flat.py"], "works"),
    (["--save-path", "flat.json"], "works"),
    (["--save-path", "flat.yml"], "works"),
    (["--cfg-options", "model.backbone.depth=101", "optim_wrapper.optimizer.lr=0.1"], "works"),
    (["--options", "model.backbone.depth=101"], "works"),
]
