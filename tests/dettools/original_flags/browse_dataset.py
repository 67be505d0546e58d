"""MMDetection 3.3's tools/analysis_tools/browse_dataset.py."""

COMMAND = "browse-dataset"
BASE = ["config.py"]
FLAGS: list[tuple[list[str], str]] = [
    ([], "works"),
    (["--output-dir", "out"], "works"),
    (["--not-show"], "no effect: no window is opened"),
    (["--show-interval", "2"], "no effect: page with the arrow keys"),
    # Of 2.x.
    (["--skip-type", "DefaultFormatBundle", "Normalize", "Collect"], "no effect: no step of the pipeline is run"),
    (
        ["--cfg-options", "train_dataloader.dataset.ann_file=a.json", "train_dataloader.batch_size=1"],
        "name the data; others have no effect",
    ),
]
