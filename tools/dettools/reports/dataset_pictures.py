"""The photographs of a data set with their objects drawn, one file each and a small one for the page.

One photograph is in memory at a time. What has a problem is drawn in red and says so; where boxes leave the photograph,
grey is put around it, so that they can be seen.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from dettools.datasets.dataset import Dataset, Problem, box_of, is_id, size_of
from dettools.datasets.inspection import KINDS, Inspection, segmentation_faults
from dettools.image_files import unique_stems
from dettools.reports.gallery import Mark, PictureError, draw_marks, object_marks, open_photograph

PICTURES, THUMBNAILS = "pictures", "thumbnails"
# Longer side; small photographs are enlarged, so that tags and lines are sharp.
SHORTEST_PX, LONGEST_PX, THUMBNAIL_PX = 900, 1400, 320
_GROUND = (120, 124, 130)
# So much of a photograph's side is put around it at most.
_WIDEST_BORDER = 0.5


@dataclass(frozen=True)
class Drawn:
    """One picture: ``picture`` and ``thumbnail`` are relative to the output folder, None if there is none."""

    image: int
    picture: str | None
    thumbnail: str | None
    problems: tuple[Problem, ...] = ()


def draw_pictures(dataset: Dataset, inspection: Inspection, places: Sequence[int], folder: Path) -> Iterator[Drawn]:
    """Draw images one by one into ``folder``; yield each, with what was found while drawing.

    Raises:
        OSError: a picture cannot be written.
    """
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    (folder / THUMBNAILS).mkdir(exist_ok=True)
    stems = _stems(dataset, places)
    for place in places:
        path = dataset.files[place]
        if path is None:
            yield Drawn(place, None, None)
            continue
        try:
            photograph = open_photograph(path, size_of(dataset.images[place]))
        except PictureError as error:
            known = any(one.kind == "unreadable_image" for one in inspection.of_image.get(place, ()))
            said = str(error).removeprefix(f"{path}: ")
            yield Drawn(place, None, None, () if known else (Problem("unreadable_image", said, place),))
            continue
        photograph, marks = _with_border(photograph, marks_of(dataset, inspection, place))
        large, small = f"{PICTURES}/{stems[place]}.jpg", f"{THUMBNAILS}/{stems[place]}.jpg"
        problems: tuple[Problem, ...] = ()
        try:
            _save(photograph, marks, folder / large, folder / small)
        except (ValueError, TypeError, LookupError, RuntimeError) as error:
            # Of all that is drawn only the counts of an RLE have not been looked at before.
            problems = (Problem("bad_segmentation", str(error), place),)
            _save(photograph, [replace(mark, segmentation=None) for mark in marks], folder / large, folder / small)
        yield Drawn(place, large, small, problems)


def _save(photograph: Image.Image, marks: Sequence[Mark], picture: Path, thumbnail: Path) -> None:
    longest = min(max(max(photograph.size), SHORTEST_PX), LONGEST_PX)
    # Without subsampling: thin coloured lines turn pale with it.
    draw_marks(photograph, marks, long_side=longest).save(picture, quality=85, subsampling=0)
    bare = [replace(mark, text="") for mark in marks]
    draw_marks(photograph, bare, long_side=THUMBNAIL_PX).save(thumbnail, quality=85, subsampling=0)


def marks_of(dataset: Dataset, inspection: Inspection, place: int) -> list[Mark]:
    """Return the objects of an image as marks; those with a problem are red and say which."""
    words: dict[int, list[str]] = {}
    for problem in inspection.of_image.get(place, ()):
        if problem.annotation is not None:
            words.setdefault(problem.annotation, []).append(KINDS[problem.kind].word)
    marks = []
    for annotation in dataset.annotations_of.get(place, ()):
        for mark in object_marks([_drawable(dataset.annotations[annotation])], dataset.names):
            if annotation in words:
                said = ", ".join(dict.fromkeys(words[annotation]))
                marks.append(Mark(mark.box_xywh, f"{mark.text}: {said}", "fp", mark.segmentation))
            else:
                marks.append(mark)
    return marks


def _drawable(annotation: Mapping[str, Any]) -> dict[str, Any]:
    """Return of an annotation what the gallery can draw, whatever stands in the file."""
    box, category = box_of(annotation), annotation.get("category_id")
    masked = not any(segmentation_faults(annotation))
    return {
        "bbox": box,
        "category_id": category if is_id(category) else -1,
        "iscrowd": annotation.get("iscrowd"),
        "segmentation": annotation.get("segmentation") if masked else None,
    }


def _with_border(photograph: Image.Image, marks: list[Mark]) -> tuple[Image.Image, list[Mark]]:
    """Put grey around a photograph so far as boxes reach out of it, half its side at most."""
    width, height = photograph.size
    corners = [(x, y, x + w, y + h) for x, y, w, h in (mark.box_xywh for mark in marks)]
    most_x, most_y = width * _WIDEST_BORDER, height * _WIDEST_BORDER
    left, top = (
        round(min(most, max((-min(one[side], one[side + 2]) for one in corners), default=0)))
        for side, most in ((0, most_x), (1, most_y))
    )
    right, bottom = (
        round(min(most, max((max(one[side], one[side + 2]) - end for one in corners), default=0)))
        for side, most, end in ((0, most_x, width), (1, most_y, height))
    )
    borders = [max(0, border) if border > 1 else 0 for border in (left, top, right, bottom)]
    if not any(borders):
        return photograph, marks
    # Room for the line of the box that reaches farthest.
    borders = [border + max(4, round(max(width, height) / 80)) if border else 0 for border in borders]
    sheet = Image.new("RGB", (width + borders[0] + borders[2], height + borders[1] + borders[3]), _GROUND)
    sheet.paste(photograph, (borders[0], borders[1]))
    return sheet, [_moved(mark, borders[0], borders[1], sheet.size) for mark in marks]


def _moved(mark: Mark, x: int, y: int, size: tuple[int, int]) -> Mark:
    left, top, width, height = mark.box_xywh
    # A box of a million pixels is drawn to the edge, not in a million pixels.
    x1, x2 = (min(max(value + x, -9.0), size[0] + 9.0) for value in (left, left + width))
    y1, y2 = (min(max(value + y, -9.0), size[1] + 9.0) for value in (top, top + height))
    # An RLE is of the photograph without its border: the box has to do.
    segmentation = None
    if isinstance(mark.segmentation, list):
        segmentation = [
            [value + (x, y)[place % 2] for place, value in enumerate(polygon)] for polygon in mark.segmentation
        ]
    return replace(mark, box_xywh=(x1, y1, x2 - x1, y2 - y1), segmentation=segmentation)


def _stems(dataset: Dataset, places: Sequence[int]) -> dict[int, str]:
    """Return the name of each picture: files of one name in two folders get two, as does a file that is used twice."""
    paths: dict[int, Path] = {}
    taken: set[Path] = set()
    for place in places:
        path = dataset.files[place]
        if path is None:
            continue
        if path in taken:
            path = path.with_name(f"{path.stem}_{place}{path.suffix}")
        taken.add(path)
        paths[place] = path
    stems = unique_stems(list(paths.values()))
    return {place: stems[path] for place, path in paths.items()}
