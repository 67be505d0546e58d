"""A detection report as one HTML page that needs nothing beside it: pictures and plots are inside.

DetectionReport ─► Topics: errors, confusions, classes with example images ─► those images drawn, of each topic the most
telling first ─► report.html

Every image is drawn once; all that speaks of it links to it, and it links back: the page is as small as its pictures.
"""

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from dettools.analysis.analysis_inputs import Inputs
from dettools.analysis.confusion import chosen_classes, merged
from dettools.analysis.detection_report import DetectionReport, Threshold
from dettools.analysis.image_results import ImageResult, extremes, ranked
from dettools.analysis.overlaps import Floats
from dettools.analysis.tide_errors import KINDS, MEANINGS, Kind
from dettools.ground_truth import base_name
from dettools.reports import report_plots
from dettools.reports.analysis_page import write_analysis_page
from dettools.reports.confusion_tables import BACKGROUND, MISSED, OTHERS
from dettools.reports.gallery import PictureError, Role, error_marks, open_photograph, side_by_side

MOST_BYTES = 11_000_000
MATRIX_CLASSES = 15
EXAMPLES = 6
EXTREMES = 12
PANEL_PX = 480
_STEPS = 20
_RIGHT, _ERROR, _MIXED = "0,158,84", "222,32,48", "125,130,138"
_NAME_LENGTH = 22


@dataclass(frozen=True)
class Page:
    """What was written: how many images are drawn in it, and what a reader has to know."""

    path: Path
    pictures: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Topic:
    """What images are examples of: its anchor on the page, its words, and the images, the most telling first."""

    anchor: str
    words: str
    images: Sequence[int]


def write_page(
    path: Path,
    report: DetectionReport,
    inputs: Inputs,
    *,
    title: str,
    max_images: int,
    progress: Callable[[int, int], None] | None = None,
) -> Page:
    """Write the page.

    Args:
        path: of the file.
        report: what it shows.
        inputs: of the report; the photographs are drawn.
        title: of the page.
        max_images: that are drawn at most.
        progress: called with the pictures drawn and all of them.
    """
    names = [one.name for one in inputs.ground_truth.categories]
    chosen = chosen_classes(report.confusion, MATRIX_CLASSES)
    cells = _cells(report, chosen)
    best, worst = extremes(report.images.images, "f1", EXTREMES)
    topics = _topics(report, names, cells, best, worst)
    pictures, notes = _draw(report, inputs, _in_turn([one.images for one in topics]), max_images, progress)
    images_of = {one.anchor: one.images for one in topics}
    content = {
        "title_text": title,
        "inputs": inputs,
        "report": report,
        "notes": [note.rstrip(".") for note in (*inputs.notes, *notes)],
        "pictures": pictures,
        "with_images": bool(inputs.photographs),
        "headline": [(name, _figure(report.metrics.figures[name])) for name in ("AP", "AP50", "AP75")],
        "figures": _figures(report),
        "counts": _counts(report),
        "classes": _class_rows(report, names, images_of),
        "matrix": _matrix(report, names, chosen),
        "cells": [
            {
                "id": (anchor := _cell_anchor(row, column)),
                "object": [*names, BACKGROUND][row],
                "detection": [*names, MISSED][column],
                "count": count,
                "images": images_of[anchor],
            }
            for row, column, count in cells
        ],
        "errors": _error_rows(report, images_of),
        "sizes": report.sizes,
        "thresholds": [_threshold_cells(report, step / _STEPS) for step in range(1, _STEPS)],
        "chooser": [_chooser(report.thresholds.at(step / 100)) for step in range(101)],
        "best": [_image_row(one) for one in best],
        "worst": [_image_row(one) for one in worst],
        "shown_images": _shown(report, pictures, topics),
        "file_names": {image.id: image.file_name for image in inputs.ground_truth.images},
        "short_names": {image.id: _short(image.file_name) for image in inputs.ground_truth.images},
        "plots": {
            "curves": report_plots.precision_recall(report),
            "thresholds": report_plots.threshold_plot(report),
            "sizes": report_plots.size_plot(report),
            "reliability": None if report.calibration is None else report_plots.reliability(report.calibration),
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_analysis_page(path, "report.html.j2", figure=_figure, **content)
    return Page(path, len(pictures), tuple(notes))


def _topics(
    report: DetectionReport,
    names: Sequence[str],
    cells: Sequence[tuple[int, int, int]],
    best: Sequence[ImageResult],
    worst: Sequence[ImageResult],
) -> list[_Topic]:
    """Return all that has example images; the earlier, the sooner it gets one where there can be only so many."""
    rows, columns = [*names, BACKGROUND], [*names, MISSED]
    return [
        _Topic("worst", "worst", [one.image_id for one in worst]),
        _Topic("best", "best", [one.image_id for one in best[: EXTREMES // 2]]),
        *(_Topic(f"error-{kind}", kind, _of_kind(report, kind)) for kind in KINDS),
        *(
            _Topic(
                _cell_anchor(row, column),
                f"{rows[row]} → {columns[column]}",
                _distinct(one.image_id for one in report.confusion.examples(row, column, EXAMPLES)),
            )
            for row, column, _ in cells
        ),
        *(_Topic(f"class-{label}", name, _of_class(report, label)) for label, name in enumerate(names)),
    ]


def _of_kind(report: DetectionReport, kind: Kind) -> list[int]:
    errors, overlaps = report.errors, report.errors.overlaps
    image = overlaps.object_image if kind == "Miss" else overlaps.image
    return [int(overlaps.image_ids[image[one]]) for one in errors.worst(kind, EXAMPLES)]


def _of_class(report: DetectionReport, label: int) -> list[int]:
    """Return images with the surest false positives of a class and its largest missed objects, in turn."""
    overlaps, matches = report.confusion.overlaps, report.images.matches
    false = np.flatnonzero(matches.false_positive & (overlaps.label == label))
    false = overlaps.image[false[np.argsort(-overlaps.score[false], kind="stable")][:EXAMPLES]]
    missed = np.flatnonzero((matches.detection_of < 0) & ~overlaps.crowd & (overlaps.object_class == label))
    missed = overlaps.object_image[missed[np.argsort(-overlaps.object_area[missed], kind="stable")][:EXAMPLES]]
    ids = (overlaps.image_ids[one].tolist() for one in (false, missed))
    return _in_turn(ids)[:EXAMPLES]


def _shown(report: DetectionReport, pictures: Mapping[int, str], topics: Sequence[_Topic]) -> list[dict[str, Any]]:
    """Return the images that are drawn, the worst first, with the errors that they are examples of."""
    about: dict[int, list[_Topic]] = {}
    for topic in topics:
        if not topic.anchor.startswith("class-"):
            for image_id in topic.images:
                about.setdefault(image_id, []).append(topic)
    drawn = ranked([one for one in report.images.images if one.image_id in pictures], "f1")
    return [{**_image_row(one), "about": about.get(one.image_id, [])} for one in drawn]


def _draw(
    report: DetectionReport,
    inputs: Inputs,
    wanted: list[int],
    most: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[int, str], list[str]]:
    """Draw images until there are enough; return JPEG data addresses by image id, and notes."""
    asked = [one for one in wanted if one in inputs.photographs][:most]
    images = {one.id: one for one in inputs.ground_truth.images}
    pictures: dict[int, str] = {}
    notes: list[str] = []
    size = 0
    for done, image_id in enumerate(asked, start=1):
        image = images[image_id]
        try:
            photograph = open_photograph(inputs.photographs[image_id], (image.width, image.height))
        except PictureError as error:
            notes.append(str(error))
            continue
        left, right = _marks(report, inputs, image_id)
        sides = [("ground truth", left), (f"prediction, score ≥ {report.score_threshold:g}", right)]
        stream = io.BytesIO()
        side_by_side(photograph, sides, "", long_side=PANEL_PX).save(stream, "JPEG", quality=80, optimize=True)
        packed = base64.b64encode(stream.getvalue()).decode()
        if size + len(packed) > MOST_BYTES:
            notes.append(f"{len(pictures)} of {len(asked)} images are drawn: more would make the page too large")
            break
        size += len(packed)
        pictures[image_id] = f"data:image/jpeg;base64,{packed}"
        if progress:
            progress(done, len(asked))
    return pictures, notes


def _marks(report: DetectionReport, inputs: Inputs, image_id: int) -> tuple[Any, Any]:
    overlaps, matches = report.images.overlaps, report.images.matches
    place = int(np.flatnonzero(overlaps.image_ids == image_id)[0])
    objects = np.flatnonzero(overlaps.object_image == place).tolist()
    shown = np.flatnonzero((overlaps.image == place) & (overlaps.score >= report.score_threshold)).tolist()

    def role(one: int) -> Role:
        if not matches.counted[one]:
            return "ignored"
        return "tp" if matches.object_of[one] >= 0 else "fp"

    return error_marks(
        [inputs.ground_truth.annotations[one] for one in objects],
        [inputs.predictions.results[int(overlaps.result[one])] for one in shown],
        {one.id: one.name for one in inputs.ground_truth.categories},
        found=[bool(matches.detection_of[one] >= 0) for one in objects],
        roles=[role(one) for one in shown],
        masks=overlaps.iou_type == "segm",
    )


def _figures(report: DetectionReport) -> list[tuple[str, str, str | None]]:
    published = report.published
    return [
        (name, _figure(value), None if published is None else _figure(published[name]))
        for name, value in report.metrics.figures.items()
    ]


def _counts(report: DetectionReport) -> list[tuple[str, int, list[tuple[str, int, str]]]]:
    """Return what became of the objects, and of the detections: words, number and colour of each part."""
    one = report.confusion
    confused = ("of another class", one.confused, "confused")
    return [
        (
            "objects",
            one.objects,
            [
                ("found", one.found, "found"),
                ("taken for another class", one.confused, "confused"),
                ("missed", one.missed, "missed"),
            ],
        ),
        (
            "detections",
            one.detections,
            [("right", one.found, "found"), confused, ("on background", one.background, "background")],
        ),
    ]


def _class_rows(
    report: DetectionReport, names: Sequence[str], images_of: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    confusion, rows = report.confusion, []
    for label, (metrics, row) in enumerate(zip(report.metrics.per_class, report.classes, strict=True)):
        taken = [(column, int(confusion.counts[label, column])) for column in range(confusion.classes)]
        taken = sorted((one for one in taken if one[0] != label and one[1]), key=lambda one: -one[1])[:5]
        rows.append(
            {
                "label": label,
                "metrics": metrics,
                "row": row,
                "taken": [(names[column], count, _cell_anchor(label, column)) for column, count in taken],
                "images": images_of[f"class-{label}"],
                "curves": [_polyline(curve) for curve in report.curves.by_class[:, label]] if metrics.objects else [],
            }
        )
    return sorted(rows, key=lambda one: (one["metrics"].ap is None, -(one["metrics"].ap or 0), one["metrics"].name))


def _cells(report: DetectionReport, chosen: list[int]) -> list[tuple[int, int, int]]:
    """Return the cells that count errors and that something links to, the most frequent confusion first."""
    confusion, last = report.confusion, report.confusion.classes
    shown, most = {*chosen, last}, _taken_most(report)
    linked = [
        (int(row), int(column), int(confusion.counts[row, column]))
        for row, column in zip(*confusion.counts.nonzero(), strict=True)
        if row != column and (({row, column} <= shown) or (int(row), int(column)) in most)
    ]
    return sorted(linked, key=lambda one: (last in one[:2], -one[2], one[0], one[1]))


def _taken_most(report: DetectionReport) -> set[tuple[int, int]]:
    between = report.confusion.counts[:-1, :-1].copy()
    np.fill_diagonal(between, 0)
    most = np.argsort(-between, axis=1, kind="stable")[:, :5]
    return {(row, int(one)) for row, columns in enumerate(most) for one in columns if between[row, one]}


def _matrix(report: DetectionReport, names: list[str], chosen: list[int]) -> dict[str, Any]:
    confusion, last = report.confusion, report.confusion.classes
    counts = merged(confusion.counts, chosen)
    others = [OTHERS] if len(chosen) < last else []
    places: list[int | None] = [*chosen, *(None for _ in others), last]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows = []
    for at, row in enumerate(places):
        cells = []
        for to, column in enumerate(places):
            link = None
            if row is not None and column is not None and row != column and counts[at, to]:
                link = _cell_anchor(row, column)
            cells.append(
                {
                    "count": int(counts[at, to]),
                    "share": float(shares[at, to]),
                    # Among the classes that are merged, right and wrong cannot be told apart.
                    "colour": _ERROR if at != to else _RIGHT if row is not None else _MIXED,
                    "link": link,
                }
            )
        rows.append((([*names, BACKGROUND][row] if row is not None else OTHERS), cells))
    columns = [[*names, MISSED][one] if one is not None else OTHERS for one in places]
    return {"rows": rows, "columns": columns, "merged": bool(others), "classes": len(chosen)}


def _error_rows(report: DetectionReport, images_of: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    figures = report.errors.figures()
    delta = figures.delta_ap or {}
    largest = max([delta.get(kind, 0.0) for kind in KINDS] + [1e-9])
    return [
        {
            "kind": kind,
            "meaning": MEANINGS[kind],
            "count": figures.counts[kind],
            "delta": _figure(delta.get(kind)),
            "width": f"{8 * max(delta.get(kind, 0.0), 0) / largest:.2f}",
            "images": images_of[f"error-{kind}"],
        }
        for kind in KINDS
    ]


def _threshold_cells(report: DetectionReport, score: float) -> list[str]:
    found = report.thresholds.at(score)
    if found is None:
        return [f"{score:.2f}", "–", "–", "–"]
    return [f"{score:.2f}", *(_figure(one) for one in (found.precision, found.recall, found.f1))]


def _chooser(found: Threshold | None) -> list[float] | None:
    return None if found is None else [round(one, 4) for one in (found.precision, found.recall, found.f1)]


def _image_row(one: ImageResult) -> dict[str, Any]:
    return {**vars(one), "ap": _figure(one.ap), "f1": _figure(one.f1)}


def _short(file_name: str) -> str:
    """Return the end of a file's name, where the names of a data set differ."""
    name = base_name(file_name)
    return name if len(name) <= _NAME_LENGTH else f"…{name[1 - _NAME_LENGTH :]}"


def _cell_anchor(row: int, column: int) -> str:
    return f"cell-{row}-{column}"


def _polyline(curve: Floats) -> str:
    """Return precision at the recalls 0, .02, …, 1 as points of a drawing 100 wide and 60 high."""
    return " ".join(f"{2 * place},{60 - 60 * value:.1f}" for place, value in enumerate(curve[::2]))


def _in_turn(lists: Iterable[Sequence[int]]) -> list[int]:
    """Return the first of each list, then the second of each, and so on, everything once."""
    return _distinct(one for one in chain.from_iterable(zip_longest(*lists)) if one is not None)


def _distinct(ids: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(ids))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
