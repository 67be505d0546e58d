"""An error analysis as one HTML page: what each error costs, the stacks of every class, and errors on photographs.

TideErrors ─► the surest errors of each kind ─► drawn ─┐
ErrorStacks ─► pictures of `error_pictures` ───────────┴─► index.html
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dettools.analysis.error_stacks import AREA_NAMES, CURVES, ErrorStacks
from dettools.analysis.tide_errors import KINDS, MEANINGS, SPECIALS, Kind, TideErrors
from dettools.ground_truth import GroundTruth
from dettools.reports.analysis_page import write_analysis_page
from dettools.reports.error_pictures import COLOURS, CURVE_WORDS, KIND_COLOURS, SavedStacks, tide_figure
from dettools.reports.error_tables import summary, worst_classes
from dettools.reports.evaluation_page import svg
from dettools.reports.gallery import Mark, error_marks, open_photograph, side_by_side

PAGE_FILE = "index.html"
PICTURE_FOLDER = "examples"
PICTURE_LONG_SIDE = 460
# Beside an error without a partner, fainter detections would only hide it.
_SHOWN_SCORE = 0.3


@dataclass(frozen=True)
class Example:
    """One error that is drawn."""

    kind: Kind
    text: str
    picture: Path


@dataclass(frozen=True)
class Part:
    """What is known of one IoU type; ``names`` are those of the classes."""

    stacks: ErrorStacks
    errors: TideErrors
    saved: SavedStacks
    examples: Sequence[Example]


def draw_examples(
    folder: Path,
    errors: TideErrors,
    ground_truth: GroundTruth,
    results: Sequence[Mapping[str, Any]],
    photographs: Mapping[int, Path],
    most: int,
) -> list[Example]:
    """Draw the surest errors of each kind, of missed objects the largest, each on another photograph."""
    overlaps = errors.overlaps
    names = {one.id: one.name for one in ground_truth.categories}
    examples = []
    for kind in KINDS:
        for number, place in enumerate(errors.worst(kind, most, photographs.keys())):
            at = int((overlaps.object_image if kind == "Miss" else overlaps.image)[place])
            image = ground_truth.images[at]
            photograph = open_photograph(photographs[image.id], (image.width, image.height))
            objects, found = _concerned(errors, kind, place, at)
            left, right = error_marks(
                [ground_truth.annotations[one] for one in objects],
                [results[int(overlaps.result[one])] for one in found],
                names,
                found=[bool(errors.found[one]) for one in objects],
                roles=[
                    "tp" if errors.kind[one] == -1 else "ignored" if errors.kind[one] == -2 else "fp" for one in found
                ],
                masks=overlaps.iou_type == "segm",
            )
            text = _sentence(errors, kind, place, names)
            sides: list[tuple[str, Sequence[Mark]]] = [("annotated", left), ("predicted", right)]
            sheet = side_by_side(photograph, sides, f"{kind}: {text}. {image.file_name}", long_side=PICTURE_LONG_SIDE)
            path = folder / f"{kind}_{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path, quality=88)
            examples.append(Example(kind, f"{text} ({image.file_name})", path))
    return examples


def write_page(
    folder: Path, ground_truth: GroundTruth, predictions: Path, parts: Sequence[Part], notes: Sequence[str]
) -> Path:
    """Write ``index.html`` into the folder; what it shows lies beside it."""
    names = [one.name for one in ground_truth.categories]
    return write_analysis_page(
        folder / PAGE_FILE,
        "errors.html.j2",
        name=predictions.name,
        annotations=ground_truth.path.name,
        images=len(ground_truth.images),
        classes=len(names),
        notes=[note.rstrip(".") for note in notes],
        kinds=[(kind, MEANINGS[kind], KIND_COLOURS[kind]) for kind in KINDS],
        specials=[(kind, MEANINGS[kind]) for kind in SPECIALS],
        curves=[(name, CURVE_WORDS[name], COLOURS[name]) for name in CURVES],
        areas=list(AREA_NAMES),
        parts=[_part(folder, part, names) for part in parts],
    )


def _part(folder: Path, part: Part, names: Sequence[str]) -> dict[str, Any]:
    stacks, errors = part.stacks, part.errors
    figures = errors.figures()
    ranked = worst_classes(errors)
    rest = [label for label in range(len(names)) if label not in set(ranked)]
    pictures = {
        "all" if label is None else str(label): [
            path.relative_to(folder).as_posix() if (path := part.saved.files.get((label, area))) else None
            for area in range(len(AREA_NAMES))
        ]
        for label in (None, *range(len(names)))
    }
    return {
        "type": errors.overlaps.iou_type,
        "title": "masks" if errors.overlaps.iou_type == "segm" else "boxes",
        "headline": [
            ("AP50", "–" if figures.ap is None else f"{figures.ap:.3f}"),
            ("objects", f"{figures.objects:,}"),
            ("found", f"{figures.found:,}"),
            ("missed", f"{figures.missed:,}"),
            ("detections", f"{figures.detections:,}"),
            ("false positives", f"{figures.detections - figures.found:,}"),
        ],
        "summary": summary(errors),
        "tide": Markup(svg(tide_figure(errors))),  # noqa: S704 - our own SVG
        "sizes": [
            _row(errors, f"{name}{_range(stacks, area)}", area, None, name) for area, name in enumerate(AREA_NAMES)
        ],
        "stack_rows": [(name, _stack_cells(stacks, area)) for area, name in enumerate(AREA_NAMES)],
        "classes": [_row(errors, names[label], 0, label, str(label)) for label in (*ranked, *rest)],
        "pictures": pictures,
        "examples": [
            {
                "kind": kind,
                "meaning": MEANINGS[kind],
                "count": figures.counts[kind],
                "pictures": [
                    (one.picture.relative_to(folder).as_posix(), one.text) for one in part.examples if one.kind == kind
                ],
            }
            for kind in KINDS
        ],
    }


def _row(errors: TideErrors, name: str, area: int, label: int | None, key: str) -> dict[str, Any]:
    one = errors.figures(area, label)
    delta = one.delta_ap
    return {
        "key": key,
        "name": name,
        "counts": [one.objects, one.found, one.missed],
        "ap": "–" if one.ap is None else f"{one.ap:.3f}",
        "errors": [
            {
                "count": one.counts[kind],
                "delta": "" if delta is None else _points(delta[kind]),
                "shade": 0 if delta is None else round(min(max(delta[kind], 0) / 0.2, 1) * 70),
            }
            for kind in KINDS
        ],
        "specials": ["–" if delta is None else _points(delta[kind]) for kind in SPECIALS],
    }


def _points(delta: float) -> str:
    """Return a difference of AP in points; nothing that rounds to nothing looks like something."""
    return f"{100 * delta:+.1f}" if abs(delta) >= 0.0005 else "0"


def _range(stacks: ErrorStacks, area: int) -> str:
    ends = [0.0, *stacks.areas]
    if area == 0:
        return ""
    start, end = ends[area - 1] ** 0.5, ends[area] ** 0.5
    return f", √area {start:g} to {end:g} px" if area < len(AREA_NAMES) - 1 else f", √area from {start:g} px"


def _stack_cells(stacks: ErrorStacks, area: int) -> list[str]:
    ap = stacks.ap(area)
    return ["–"] * len(CURVES) if ap is None else [f"{value:.3f}" for value in ap.values()]


def _concerned(errors: TideErrors, kind: Kind, place: int, image: int) -> tuple[list[int], list[int]]:
    """Return the objects and detections that an error is about; where one side has none, all of that side."""
    overlaps = errors.overlaps
    if kind == "Miss":
        sure = (overlaps.image == image) & (overlaps.score >= _SHOWN_SCORE) & (errors.kind != -2)
        return [place], sure.nonzero()[0].tolist()
    if kind == "Bkg":
        return (overlaps.object_image == image).nonzero()[0].tolist(), [place]
    target = int(errors.target[place])
    found = [place]
    if kind == "Dupe":
        found += ((errors.target == target) & (errors.kind == -1)).nonzero()[0].tolist()
    return [target], found


def _sentence(errors: TideErrors, kind: Kind, place: int, names: Mapping[int, str]) -> str:
    overlaps = errors.overlaps
    if kind == "Miss":
        return f"{names[int(overlaps.category_ids[overlaps.object_class[place]])]} missed"
    words = f"{names[int(overlaps.category_ids[overlaps.label[place]])]} {overlaps.score[place]:.2f}"
    if kind == "Bkg":
        return f"{words} on no object"
    target = int(errors.target[place])
    pairs = (overlaps.pair_detection == place) & (overlaps.pair_object == target)
    iou = f"IoU {overlaps.pair_iou[pairs][0]:.2f}"
    its = names[int(overlaps.category_ids[overlaps.object_class[target]])]
    return {
        "Cls": f"{words} is {its}, {iou}",
        "Loc": f"{words} lies badly, {iou}",
        "Both": f"{words} lies badly on {its}, {iou}",
        "Dupe": f"{words} on a {its} that is found already, {iou}",
    }[kind]
