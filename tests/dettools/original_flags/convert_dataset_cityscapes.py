"""MMDetection 3.3's tools/dataset_converters/cityscapes.py."""

COMMAND = "convert-dataset cityscapes"
BASE = ["cityscapes"]
FLAGS: list[tuple[list[str], str]] = [
    ([], "works"),
    (["--img-dir", "leftImg8bit"], "works"),
    (["--gt-dir", "gtFine"], "works"),
    (["-o", "out"], "works"),
    (["--out-dir", "out"], "works"),
    (["--nproc", "8"], "works"),
]
