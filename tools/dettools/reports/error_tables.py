"""Error stacks and TIDE errors in the terminal, as CSV and as JSON."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dettools.analysis.error_stacks import AREA_NAMES, CURVES, ErrorStacks
from dettools.analysis.tide_errors import KINDS, MEANINGS, SPECIALS, Figures, TideErrors
from dettools.reports.error_pictures import ALL_CLASSES

STACKS_CSV, TIDE_CSV = "stacks.csv", "tide.csv"
_WORST_CLASSES = 10


def print_errors(stacks: ErrorStacks, errors: TideErrors, names: Sequence[str], console: Console) -> None:
    """Print what became of the objects, what each kind of error costs, and the stacks by size."""
    for line in summary(errors):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    figures = errors.figures()
    table = _table("what each kind of error costs (TIDE)", ("kind", "what it is"), ("errors", "ΔAP"))
    for kind in (*KINDS, *SPECIALS):
        number = _count(figures, kind)
        delta = None if figures.delta_ap is None else figures.delta_ap[kind]
        table.add_row(kind, MEANINGS[kind], f"{number}", _signed(delta), end_section=kind == KINDS[-1])
    console.print(table)
    table = _table("area below the curves, errors forgiven one after the other", ("size (objects)",), CURVES)
    for area, name in enumerate(AREA_NAMES):
        ap = stacks.ap(area)
        row = f"{name} ({stacks.objects[area].sum()})"
        table.add_row(row, *(["–"] * len(CURVES) if ap is None else [f"{value:.3f}" for value in ap.values()]))
    console.print(table)
    if len(names) > 1:
        ranked = worst_classes(errors)[:_WORST_CLASSES]
        table = _table("classes that lose most", ("class",), ("objects", "found", *KINDS[:-1], "Miss", "AP50"))
        for label in ranked:
            one = errors.figures(0, label)
            cells = (one.objects, one.found, *one.counts.values())
            table.add_row(escape(names[label]), *map(str, cells), "–" if one.ap is None else f"{one.ap:.3f}")
        console.print(table)


def summary(errors: TideErrors) -> list[str]:
    """Return what became of the objects, and of the detections, as two sentences."""
    figures, iou = errors.figures(), errors.iou_threshold
    wrong = ", ".join(f"{figures.counts[kind]} {kind}" for kind in KINDS[:-1])
    return [
        (
            f"{figures.objects} objects: {figures.found} found, {figures.missed} missed (IoU ≥ {iou:g}), "
            f"{figures.counts['Miss']} of them with no Cls or Loc error on them"
        ),
        f"{figures.detections} detections: {figures.found} right, {wrong}",
    ]


def worst_classes(errors: TideErrors) -> list[int]:
    """Return the classes that have objects: first those that lack most AP, times their objects.

    By AP alone, classes of one or two objects would come first.
    """
    figures = {label: errors.figures(0, label) for label in range(len(errors.overlaps.category_ids))}
    lacking = {label: (1 - one.ap) * one.objects for label, one in figures.items() if one.ap is not None}
    return sorted(lacking, key=lambda label: -lacking[label])


def to_json(stacks: ErrorStacks, errors: TideErrors, names: Sequence[str]) -> dict[str, Any]:
    """Return all figures as plain JSON values; null where there is no object."""
    curves = {
        name: None if values is None else dict(zip(CURVES, values.round(6).tolist(), strict=True))
        for name, values in ((name, stacks.curves(area)) for area, name in enumerate(AREA_NAMES))
    }
    classes = []
    for label, shown in _labels(names):
        one: dict[str, Any] = {"class": shown}
        if label is not None:
            one["category_id"] = int(errors.overlaps.category_ids[label])
        one["sizes"] = {
            name: {**errors.figures(area, label).to_json(), "stack": stacks.ap(area, label)}
            for area, name in enumerate(AREA_NAMES)
        }
        classes.append(one)
    return {
        "iou_threshold": errors.iou_threshold,
        "background_iou": errors.background_iou,
        "areas_px2": list(stacks.areas),
        "without_supercategory": list(stacks.alone),
        "all": classes[0]["sizes"],
        "curves": curves,
        "per_class": classes[1:],
    }


def write_csv(folder: Path, stacks: ErrorStacks, errors: TideErrors, names: Sequence[str]) -> None:
    """Write one row for each class and size into two files: the stacks, and the TIDE errors."""
    with (folder / STACKS_CSV).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["class", "area", "objects", *CURVES])
        for label, shown in _labels(names):
            for area, name in enumerate(AREA_NAMES):
                ap = stacks.ap(area, label) or {}
                count = stacks.objects[area].sum() if label is None else stacks.objects[area, label]
                writer.writerow([shown, name, count, *(_cell(ap.get(curve)) for curve in CURVES)])
    with (folder / TIDE_CSV).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        kinds = (*KINDS, *SPECIALS)
        writer.writerow(
            ["class", "area", "objects", "found", "missed", "detections", *KINDS, "AP", *(f"dAP_{k}" for k in kinds)]
        )
        for label, shown in _labels(names):
            for area, name in enumerate(AREA_NAMES):
                one = errors.figures(area, label)
                delta = one.delta_ap or {}
                counts = (one.objects, one.found, one.missed, one.detections, *one.counts.values())
                writer.writerow([shown, name, *counts, _cell(one.ap), *(_cell(delta.get(kind)) for kind in kinds)])


def _labels(names: Sequence[str]) -> Iterator[tuple[int | None, str]]:
    yield None, ALL_CLASSES
    yield from enumerate(names)


def _count(figures: Figures, kind: str) -> int:
    if kind in SPECIALS:
        return figures.detections - figures.found if kind == "FP" else figures.missed
    return figures.counts[kind]


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _table(title: str, words: Sequence[str], figures: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in words:
        table.add_column(name, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table
