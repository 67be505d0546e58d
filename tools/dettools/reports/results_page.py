"""The best and the worst images as pictures, ground truth beside prediction, and all of them as a page that sorts.

ImageResults ─► good/, bad/ (names that neither the ranks nor a second folder's images change) ─► index.html
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dettools.analysis.analysis_inputs import Inputs
from dettools.analysis.image_results import BAD_IF_HIGH, COLUMNS, ImageResult, ImageResults
from dettools.image_files import unique_stems
from dettools.reports.analysis_page import write_analysis_page
from dettools.reports.gallery import Role, error_marks, open_photograph, side_by_side
from dettools.reports.results_tables import HEADS, cell

PAGE_FILE, JSON_FILE, CSV_FILE = "index.html", "results.json", "results.csv"
PANEL_LONG_SIDE = 760


class ResultPictures:
    """Draws images with their objects and detections.

    Args:
        inputs: the annotations, predictions and photographs.
        results: of the images.
        show_from: draw detections from this score on; those below the results' threshold in grey, as not counted.
    """

    def __init__(self, inputs: Inputs, results: ImageResults, show_from: float) -> None:
        self._inputs, self._results, self._show_from = inputs, results, show_from

    def draw(self, folder: Path, images: Iterable[ImageResult], column: str) -> dict[int, Path]:
        """Draw images into a folder; return image id to file. The name holds the value of the column."""
        written = {}
        for one in images:
            if one.image_id in self._inputs.photographs:
                value = getattr(one, column)
                shown = f"{value:.3f}" if isinstance(value, float) else str(value)
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{self.stems[one.image_id]}_{shown}.jpg"
                self._draw(one, path)
                written[one.image_id] = path
        return written

    @cached_property
    def stems(self) -> dict[int, str]:
        """Image id to a name of its own: the same whichever images are drawn."""
        images = self._inputs.ground_truth.images
        times = Counter(one.file_name for one in images)
        alone = {
            one.id: Path(one.file_name if times[one.file_name] == 1 and one.file_name else f"{one.file_name}_{one.id}")
            for one in images
        }
        stems = unique_stems(list(alone.values()))
        return {identifier: stems[path] for identifier, path in alone.items()}

    def _draw(self, one: ImageResult, path: Path) -> None:
        image = self._images[one.image_id]
        overlaps, matches = self._results.overlaps, self._results.matches
        annotations = self._annotations_of.get(one.image_id, [])
        seen = [
            place for place in self._detections_of.get(one.image_id, []) if overlaps.score[place] >= self._show_from
        ]
        roles: list[Role] = [
            "ignored" if not matches.counted[place] else "tp" if matches.object_of[place] >= 0 else "fp"
            for place in seen
        ]
        left, right = error_marks(
            [self._inputs.ground_truth.annotations[place] for place in annotations],
            [self._inputs.predictions.results[int(overlaps.result[place])] for place in seen],
            {category.id: category.name for category in self._inputs.ground_truth.categories},
            found=[matches.detection_of[place] >= 0 for place in annotations],
            roles=roles,
            masks=overlaps.iou_type == "segm",
        )
        caption = (
            f"AP {one.ap:.3f} · F1 {one.f1:.3f} (score ≥ {self._results.score_threshold:g}, IoU ≥ "
            f"{self._results.iou_threshold:g}) · {one.tp} found, {one.fn} missed, {one.fp} false positives · {one.name}"
        )
        photograph = open_photograph(self._inputs.photographs[one.image_id], (image.width, image.height))
        sides = [("annotated", left), (f"predicted, score ≥ {self._show_from:g}", right)]
        side_by_side(photograph, sides, caption, long_side=PANEL_LONG_SIDE).save(path, quality=90)

    @cached_property
    def _images(self) -> dict[int, Any]:
        return {one.id: one for one in self._inputs.ground_truth.images}

    @cached_property
    def _annotations_of(self) -> dict[int, list[int]]:
        places: dict[int, list[int]] = {}
        for place, one in enumerate(self._inputs.ground_truth.annotations):
            places.setdefault(one["image_id"], []).append(place)
        return places

    @cached_property
    def _detections_of(self) -> dict[int, list[int]]:
        overlaps = self._results.overlaps
        places: dict[int, list[int]] = {}
        for place, image in enumerate(overlaps.image_ids[overlaps.image].tolist()):
            places.setdefault(image, []).append(place)
        return places


def remove_earlier_pictures(folder: Path) -> None:
    """Remove the pictures that an earlier run wrote and listed: between them, the new ones would mislead."""
    try:
        listed = json.loads((folder / JSON_FILE).read_bytes())["pictures"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if isinstance(listed, dict):
        for name in listed.values():
            path = folder / str(name)
            if path.parent.parent == folder and path.parent.name in ("good", "bad") and path.suffix == ".jpg":
                path.unlink(missing_ok=True)


def write_page(
    folder: Path,
    inputs: Inputs,
    results: ImageResults,
    order: Sequence[ImageResult],
    ends: Mapping[str, Sequence[ImageResult]],
    pictures: Mapping[int, Path],
    notes: Sequence[str],
    *,
    ends_by: str,
    ordered_by: str,
) -> Path:
    """Write ``index.html``: the pictures of both ends, and a table of all images in the order given."""
    totals = results.totals
    links = {identifier: path.relative_to(folder).as_posix() for identifier, path in pictures.items()}
    return write_analysis_page(
        folder / PAGE_FILE,
        "results.html.j2",
        name=inputs.predictions.path.name,
        annotations=inputs.ground_truth.path.name,
        iou_type="masks" if results.overlaps.iou_type == "segm" else "boxes",
        iou_threshold=f"{results.iou_threshold:g}",
        score_threshold=f"{results.score_threshold:g}",
        headline=[
            ("images", len(results.images)),
            ("objects", totals["objects"]),
            ("found", totals["tp"]),
            ("missed", totals["fn"]),
            ("false positives", totals["fp"]),
            ("of absent classes", totals["absent_fp"]),
            ("without any error", sum(not one.fp + one.fn for one in results.images)),
        ],
        notes=[note.rstrip(".") for note in notes],
        galleries=[
            (title, [(links[one.image_id], one) for one in ends[end] if one.image_id in links])
            for end, title in (("bad", f"Worst by {HEADS[ends_by]}"), ("good", f"Best by {HEADS[ends_by]}"))
        ],
        columns=[(column, HEADS[column]) for column in COLUMNS],
        ordered_by=ordered_by,
        direction="descending" if ordered_by in BAD_IF_HIGH else "ascending",
        rows=[
            (
                links.get(one.image_id),
                [(cell(one, column), _sort_value(getattr(one, column))) for column in COLUMNS],
            )
            for one in order
        ],
    )


def _sort_value(value: str | float | None) -> str:
    return "" if value is None else str(value)
