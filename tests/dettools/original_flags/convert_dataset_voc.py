"""MMDetection 3.3's tools/dataset_converters/pascal_voc.py."""

COMMAND = "convert-dataset voc"
BASE = ["VOCdevkit"]
FLAGS: list[tuple[list[str], str]] = [
    ([], "works"),
    (["-o", "out"], "works"),
    (["--out-dir", "out"], "works"),
    (["--out-format", "coco"], "works"),
    (["--out-format", "pkl"], "pkl is refused, MMDetection 3 cannot read it"),
]
