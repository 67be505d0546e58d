"""MMDetection 3.x, tools/misc/download_dataset.py."""

COMMAND = "download-dataset"
BASE: list[str] = []
FLAGS: list[tuple[list[str], str]] = [
    ([], "works"),
    (["--dataset-name", "coco2017"], "works"),
    (["--dataset-name", "coco2014"], "works"),
    (["--dataset-name", "lvis"], "works"),
    (["--dataset-name", "voc2007"], "works"),
    (["--dataset-name", "voc2012"], "works"),
    (["--dataset-name", "balloon"], "works"),
    (["--dataset-name", "objects365v2"], "works"),
    (["--dataset-name", "ade20k_2016"], "works"),
    (["--dataset-name", "refcoco"], "works"),
    (["--save-dir", "data/coco"], "works"),
    (["--unzip"], "works"),
    (["--delete"], "works"),
    (["--threads", "4"], "works"),
]
