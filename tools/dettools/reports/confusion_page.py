"""A confusion matrix as an HTML page: click a cell and see the errors behind it, on the photographs if there are any.

Confusion ─► cells that are shown ─► examples of each ─► the first ones drawn, every cell in turn ─► index.html
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dettools.analysis.analysis_inputs import Inputs
from dettools.analysis.confusion import (
    Confusion,
    Example,
    Normalization,
    SweepRow,
    chosen_classes,
    merged,
    normalized,
)
from dettools.reports.analysis_page import write_analysis_page
from dettools.reports.confusion_pictures import sweep_figure
from dettools.reports.confusion_tables import BACKGROUND, MISSED, OTHERS, summary
from dettools.reports.evaluation_page import svg
from dettools.reports.gallery import Mark, error_marks, open_photograph, side_by_side

PAGE_FILE = "index.html"
PICTURE_FOLDER = "examples"
EXAMPLES = 6
MOST_CLASSES = 100
PICTURE_LONG_SIDE = 520


@dataclass(frozen=True)
class Cell:
    """A cell that counts errors, with some of them; row and column as in `Confusion.counts`."""

    row: int
    column: int
    count: int
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Examples:
    """The errors of one confusion matrix, to be told and drawn."""

    confusion: Confusion
    inputs: Inputs

    @cached_property
    def names(self) -> list[str]:
        """Of the classes, and of background."""
        return [*(one.name for one in self.inputs.ground_truth.categories), BACKGROUND]

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells that count errors: what is confused first, the most frequent first."""
        confusion, last = self.confusion, self.confusion.classes
        found = [
            (row, column, int(count))
            for (row, column), count in zip(
                zip(*confusion.counts.nonzero(), strict=True), confusion.counts[confusion.counts > 0], strict=True
            )
            if row != column
        ]
        found.sort(key=lambda one: (last in one[:2], -one[2], one[0], one[1]))
        return [
            Cell(int(row), int(column), count, tuple(confusion.examples(row, column, EXAMPLES)))
            for row, column, count in found
        ]

    def sentence(self, cell: Cell, example: Example) -> str:
        """Tell one error."""
        last = self.confusion.classes
        name = self.inputs.ground_truth.images[self._image_at[example.image_id]].file_name
        if cell.column == last:
            words = f"{self.names[cell.row]} missed"
        elif cell.row == last:
            words = f"{self.names[cell.column]} {example.score:.2f} on background"
            if example.result is not None and self._is_duplicate[example.result]:
                words = f"{self.names[cell.column]} {example.score:.2f} on an object already found"
        else:
            words = f"{self.names[cell.row]} taken for {self.names[cell.column]} {example.score:.2f}"
            words += f", IoU {example.iou:.2f}"
        return f"{words}: {name}"

    def draw(self, folder: Path, most: int) -> dict[tuple[int, int, int], Path]:
        """Draw the first errors of the cells in turn; return the files by row, column and number of the error.

        Pictures of an earlier run, which are named alike, are removed.
        """
        for path in folder.glob("*.jpg"):
            if re.fullmatch(r"\d+_\d+_\d", path.stem):
                path.unlink()
        asked = [
            (place, number, cell)
            for place, cell in enumerate(self.cells)
            for number, one in enumerate(cell.examples)
            if one.image_id in self.inputs.photographs
        ]
        asked.sort(key=lambda one: (one[1], one[0]))
        drawn = {}
        for _, number, cell in asked[:most]:
            example = cell.examples[number]
            image = self.inputs.ground_truth.images[self._image_at[example.image_id]]
            photograph = open_photograph(self.inputs.photographs[image.id], (image.width, image.height))
            left, right = self._marks(cell, example)
            sides = [("annotated", left), (f"predicted, score ≥ {self.confusion.score_threshold:g}", right)]
            sheet = side_by_side(photograph, sides, self.sentence(cell, example), long_side=PICTURE_LONG_SIDE)
            path = folder / f"{cell.row}_{cell.column}_{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path, quality=88)
            drawn[cell.row, cell.column, number] = path
        return drawn

    def _marks(self, cell: Cell, example: Example) -> tuple[list[Mark], list[Mark]]:
        """Return the error alone on its own side; beside an error without a partner stands all that the other has."""
        confusion, last = self.confusion, self.confusion.classes
        names = {one.id: one.name for one in self.inputs.ground_truth.categories}
        annotations, results = self._annotations_of[example.image_id], self._results_of.get(example.image_id, [])
        if cell.row != last:
            annotations = [one for one in annotations if self._annotation_id(one) == example.object_id]
        if cell.column != last:
            results = [one for one in results if int(confusion.overlaps.result[one]) == example.result]
        left, right = error_marks(
            [self.inputs.ground_truth.annotations[one] for one in annotations],
            [self.inputs.predictions.results[int(confusion.overlaps.result[one])] for one in results],
            names,
            found=[confusion.object_column[one] == confusion.overlaps.object_class[one] for one in annotations],
            roles=["tp" if confusion.detection_row[one] == confusion.overlaps.label[one] else "fp" for one in results],
            masks=confusion.overlaps.iou_type == "segm",
        )
        if last not in (cell.row, cell.column):
            left = [replace(one, text=self.names[cell.row]) for one in left]
        return left, right

    def _annotation_id(self, place: int) -> int:
        return int(self.confusion.overlaps.object_ids[place])

    @cached_property
    def _image_at(self) -> dict[int, int]:
        return {one.id: place for place, one in enumerate(self.inputs.ground_truth.images)}

    @cached_property
    def _is_duplicate(self) -> dict[int, bool]:
        return dict(zip(self.confusion.overlaps.result.tolist(), self.confusion.duplicate.tolist(), strict=True))

    @cached_property
    def _annotations_of(self) -> dict[int, list[int]]:
        places: dict[int, list[int]] = {one.id: [] for one in self.inputs.ground_truth.images}
        for place, one in enumerate(self.inputs.ground_truth.annotations):
            places[one["image_id"]].append(place)
        return places

    @cached_property
    def _results_of(self) -> dict[int, list[int]]:
        places: dict[int, list[int]] = {}
        overlaps = self.confusion.overlaps
        for place in (self.confusion.detection_row >= 0).nonzero()[0].tolist():
            places.setdefault(int(overlaps.image_ids[overlaps.image[place]]), []).append(place)
        return places


def write_page(
    folder: Path,
    examples: Examples,
    rows: Sequence[SweepRow],
    drawn: Mapping[tuple[int, int, int], Path],
    notes: Sequence[str],
    *,
    by: Normalization,
) -> Path:
    """Write ``index.html`` into the folder."""
    confusion, inputs = examples.confusion, examples.inputs
    chosen = chosen_classes(confusion, MOST_CLASSES)
    others = [OTHERS] if len(chosen) < confusion.classes else []
    shown = [examples.names[one] for one in chosen] + others
    place = {one: at for at, one in enumerate(chosen)} | {confusion.classes: len(shown)}
    told = {
        f"{place[cell.row]},{place[cell.column]}": [
            {
                "text": examples.sentence(cell, one),
                "picture": (drawn[key].relative_to(folder).as_posix())
                if (key := (cell.row, cell.column, number)) in drawn
                else None,
            }
            for number, one in enumerate(cell.examples)
        ]
        for cell in examples.cells
        if cell.row in place and cell.column in place
    }
    data = {
        "rows": [*shown, BACKGROUND],
        "columns": [*shown, MISSED],
        "others": [len(chosen)] if others else [],
        "counts": merged(confusion.counts, chosen).tolist(),
        "examples": told,
        "first": [int(one) for one in next(iter(told)).split(",")] if told else None,
    }
    best = max(rows, key=lambda one: one.f1)
    return write_analysis_page(
        folder / PAGE_FILE,
        "confusion.html.j2",
        name=inputs.predictions.path.name,
        annotations=inputs.ground_truth.path.name,
        images=len(inputs.ground_truth.images),
        classes=confusion.classes,
        iou_type="masks" if confusion.overlaps.iou_type == "segm" else "boxes",
        iou_threshold=f"{confusion.iou_threshold:g}",
        score_threshold=f"{confusion.score_threshold:g}",
        headline=[
            ("objects", confusion.objects),
            ("found", confusion.found),
            ("taken for another class", confusion.confused),
            ("missed", confusion.missed),
            ("on background", confusion.background),
            ("best F1", f"{best.f1:.3f} at {best.score_threshold:g}"),
        ],
        summary=summary(confusion),
        notes=[note.rstrip(".") for note in notes],
        merged=f"The {len(chosen)} classes that are confused most have rows of their own; the others are one row and "
        "one column. All are in the CSV file."
        if others
        else "",
        top=_top(examples, place),
        sweep_picture=Markup(svg(sweep_figure(rows, confusion.score_threshold))),  # noqa: S704 - our own SVG
        sweep=[_sweep_cells(one) for one in rows],
        data=data,
        by=by,
    )


def to_json(confusion: Confusion, names: Sequence[str], rows: Sequence[SweepRow]) -> dict[str, Any]:
    """Return everything that was counted, as plain JSON values; a share of nothing is null."""
    shares = normalized(confusion.counts, "rows")
    return {
        "iou_type": confusion.overlaps.iou_type,
        "iou_threshold": confusion.iou_threshold,
        "score_threshold": confusion.score_threshold,
        "objects": confusion.objects,
        "detections": confusion.detections,
        "found": confusion.found,
        "confused": confusion.confused,
        "missed": confusion.missed,
        "background": confusion.background,
        "duplicates": confusion.duplicates,
        "rows": [*names, BACKGROUND],
        "columns": [*names, MISSED],
        "counts": confusion.counts.tolist(),
        "normalized": {
            "rows": _plain(shares.tolist()),
            "columns": _plain(normalized(confusion.counts, "columns").tolist()),
            "all": _plain(normalized(confusion.counts, "all").tolist()),
        },
        "confusions": [
            {"object": names[row], "taken_for": names[column], "count": count, "share": round(shares[row, column], 6)}
            for row, column, count in confusion.top()
        ],
        "sweep": [{**vars(one), "precision": one.precision, "recall": one.recall, "f1": one.f1} for one in rows],
    }


def _top(examples: Examples, place: Mapping[int, int]) -> list[dict[str, Any]]:
    confusion = examples.confusion
    of_objects, of_detections = (normalized(confusion.counts, by) for by in ("rows", "columns"))
    return [
        {
            "true": examples.names[row],
            "predicted": examples.names[column],
            "count": count,
            "of_objects": f"{of_objects[row, column]:.1%}",
            "of_detections": f"{of_detections[row, column]:.1%}",
            "cell": f"{place[row]},{place[column]}",
        }
        for row, column, count in confusion.top(40)
        if row in place and column in place
    ]


def _sweep_cells(one: SweepRow) -> list[str]:
    shares = ("–" if value is None else f"{value:.3f}" for value in (one.precision, one.recall, one.f1))
    return [
        f"{one.score_threshold:.2f}",
        *map(str, (one.found, one.confused, one.missed, one.background)),
        *shares,
    ]


def _plain(rows: list[list[float]]) -> list[list[float | None]]:
    return [[None if value != value else round(value, 6) for value in row] for row in rows]
