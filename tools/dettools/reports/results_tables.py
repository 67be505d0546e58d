"""The results of each image in the terminal and as CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dettools.analysis.image_results import COLUMNS, ImageResult, ImageResults

HEADS = {
    "name": "image",
    "ap": "AP",
    "class_ap": "class AP",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "tp": "TP",
    "fp": "FP",
    "fn": "FN",
    "confused": "confused",
    "absent_fp": "absent FP",
    "iou": "IoU",
    "top_fp": "top FP",
    "objects": "objects",
}
_PRINTED = ("ap", "f1", "tp", "fp", "fn", "absent_fp")
_LONGEST_NAME = 36


def print_results(
    results: ImageResults, good: Sequence[ImageResult], bad: Sequence[ImageResult], sort: str, console: Console
) -> None:
    """Print the sums, and the first images of both ends."""
    totals = results.totals
    console.print(
        f"{len(results.images)} images, {totals['objects']} objects: {totals['tp']} found, {totals['fn']} missed "
        f"({totals['confused']} of them taken for another class); {totals['fp']} false positives, "
        f"{totals['absent_fp']} of classes that their image does not have",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for title, images in (("worst", bad), ("best", good)):
        if not images:
            continue
        table = Table(
            title=f"{title} by {HEADS[sort]}",
            title_justify="left",
            header_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        shown = [*_PRINTED, *([] if sort in _PRINTED else [sort])]
        table.add_column("image", no_wrap=True)
        for column in shown:
            table.add_column(HEADS[column], justify="right", no_wrap=True)
        for one in images[:10]:
            table.add_row(escape(_short(one.name)), *(cell(one, column) for column in shown))
        console.print(table)


def cell(one: ImageResult, column: str) -> str:
    """Return one value as text; a dash where there is nothing to measure."""
    value = getattr(one, column)
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _short(name: str) -> str:
    """Leave out the middle: paths differ at their ends."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def write_csv(path: Path, images: Sequence[ImageResult]) -> None:
    """Write one row per image, with its id; nothing where there is nothing to measure."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image_id", *COLUMNS])
        for one in images:
            values = (getattr(one, column) for column in COLUMNS)
            writer.writerow(
                [one.image_id, *("" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values)]
            )
