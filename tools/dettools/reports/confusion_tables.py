"""A confusion matrix in the terminal and as CSV: what is confused most, and how the score threshold moves it."""

import csv
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dettools.analysis.confusion import Confusion, SweepRow, normalized

BACKGROUND, MISSED, OTHERS = "background", "missed", "other classes"


def print_confusion(confusion: Confusion, names: Sequence[str], rows: Sequence[SweepRow], console: Console) -> None:
    """Print the sums, the most frequent confusions and the sweep."""
    for line in summary(confusion):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if top := confusion.top(10):
        shares = normalized(confusion.counts, "rows")
        table = _table("most frequent confusions", ("object", "taken for"), ("times", "of its objects"))
        for row, column, count in top:
            table.add_row(escape(names[row]), escape(names[column]), str(count), f"{shares[row, column]:.0%}")
        console.print(table)
    table = _table("by score threshold", (), ("score ≥", "found", "confused", "missed", "background", "F1"))
    best = max(rows, key=lambda one: one.f1)
    for one in rows:
        if one is best or round(one.score_threshold * 100) % 10 == 0:
            cells = (f"{one.score_threshold:.2f}", *map(str, (one.found, one.confused, one.missed, one.background)))
            table.add_row(*cells, f"{one.f1:.3f}", style="bold" if one is best else None)
    console.print(table)


def summary(confusion: Confusion) -> list[str]:
    """Return what became of the objects, and of the detections, as two sentences."""
    duplicates = f", {confusion.duplicates} of them on an object already found" if confusion.duplicates else ""
    objects = (
        f"{confusion.objects} objects: {confusion.found} found, {confusion.confused} taken for another class, "
        f"{confusion.missed} missed (IoU ≥ {confusion.iou_threshold:g})"
    )
    detections = (
        f"{confusion.detections} detections (score ≥ {confusion.score_threshold:g}): {confusion.found} right, "
        f"{confusion.confused} of the wrong class, {confusion.background} on background{duplicates}"
    )
    return [objects, detections]


def write_matrix(path: Path, confusion: Confusion, names: Sequence[str]) -> None:
    """Write the counts as CSV: a row for each class of objects, a column for each of detections."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["object \\ detection", *names, MISSED])
        for name, row in zip([*names, BACKGROUND], confusion.counts.tolist(), strict=True):
            writer.writerow([name, *row])


def write_sweep(path: Path, rows: Sequence[SweepRow]) -> None:
    """Write the counts of each score threshold as CSV."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["score_threshold", "found", "confused", "missed", "background", "precision", "recall", "f1"])
        for one in rows:
            shares = ("" if value is None else f"{value:.4f}" for value in (one.precision, one.recall, one.f1))
            counts = (one.found, one.confused, one.missed, one.background)
            writer.writerow([f"{one.score_threshold:g}", *counts, *shares])


def _table(title: str, words: Sequence[str], figures: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in words:
        table.add_column(name, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table
