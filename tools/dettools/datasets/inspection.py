"""What is wrong with a data set: its annotations against themselves, and against the image files.

    Dataset ─► find_problems ─► Inspection ─► tables, pages, filters

Nothing is repaired. An error makes training or figures wrong; a warning is worth a look.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from PIL import Image

from dettools.datasets.dataset import (
    Box,
    Dataset,
    ImageHeader,
    Problem,
    Progress,
    box_of,
    is_id,
    is_key,
    is_number,
    read_header,
    size_of,
)

# A box may lie so far outside: rounding, and the two ways of counting the last pixel.
OUTSIDE_PX = 1.0
# COCO's areas are of masks, which reach no farther than their box but for its rounding.
_LARGER_AREA = 1.05
# A data set is suspected as a whole when nearly all of some boxes could be two corners: of ordinary ones a third could.
_CORNER_SHARE, _FEWEST_BOXES = 0.95, 8


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of problem: how bad, in a word for a tag, and what it means."""

    severity: Literal["error", "warning"]
    word: str
    meaning: str


KINDS: dict[str, Kind] = {
    "missing_file": Kind("error", "no file", "the image file, or the photograph of a label file, is not there"),
    "unreadable_image": Kind("error", "unreadable", "the image file cannot be read"),
    "size_mismatch": Kind("error", "wrong size", "the annotated width and height are not those of the file"),
    "exif_swapped": Kind("error", "turned", "width and height are swapped: the boxes are of the photograph turned"),
    "exif_turned": Kind("warning", "EXIF", "EXIF turns the photograph: its boxes fit in readers that apply it only"),
    "no_size": Kind("warning", "no size", "the annotations tell no width and height of the image"),
    "duplicate_image_id": Kind("error", "id twice", "two images have one id: their objects are mixed up"),
    "duplicate_file_name": Kind("warning", "file twice", "two images are of one file"),
    "bad_label": Kind("error", "bad label", "a label cannot be read and is left out"),
    "id_zero": Kind("error", "id 0", "pycocotools counts an annotation with the id 0 as never found"),
    "duplicate_id": Kind("error", "id twice", "two annotations have one id"),
    "strange_id": Kind("warning", "strange id", "an id is missing or no whole number"),
    "unknown_image": Kind("error", "no image", "an annotation is of an image that the file does not have"),
    "unknown_category": Kind("error", "no class", "an annotation is of a class that the file does not have"),
    "duplicate_category": Kind("error", "class twice", "two classes have one id or one name"),
    "bad_box": Kind("error", "bad box", "an annotation has no box of four finite numbers"),
    "negative_size": Kind("error", "negative", "a box has a negative width or height"),
    "zero_area": Kind("error", "zero area", "a box has no width or no height"),
    "box_outside": Kind("error", "outside", f"a box reaches more than {OUTSIDE_PX:g} px out of its image"),
    "xyxy_as_xywh": Kind("error", "xyxy?", "a box looks like two corners, written where width and height belong"),
    "duplicate_box": Kind("warning", "double", "two objects of one image have the same class and the same box"),
    "two_classes": Kind("warning", "two classes", "one box has two classes"),
    "area_mismatch": Kind("warning", "area", "the area is larger than the box: small, medium and large go wrong"),
    "bad_segmentation": Kind("error", "bad mask", "a segmentation is neither polygons nor an RLE of the image's size"),
}


@dataclass(frozen=True)
class Inspection:
    """The problems of a data set, in the order of `KINDS` and of its images.

    Attributes:
        problems: all of them.
        files_opened: how many image files were looked at.
        notes: what holds for the data set as a whole.
    """

    problems: tuple[Problem, ...] = field(repr=False)
    files_opened: int
    notes: tuple[str, ...] = ()

    @cached_property
    def of_image(self) -> dict[int, list[Problem]]:
        """Place of an image to its problems."""
        found: dict[int, list[Problem]] = {}
        for problem in self.problems:
            if problem.image is not None:
                found.setdefault(problem.image, []).append(problem)
        return found

    @cached_property
    def counts(self) -> dict[str, int]:
        """Kind to the number of problems, in the order of `KINDS`; only those that occur."""
        counts = Counter(problem.kind for problem in self.problems)
        return {kind: counts[kind] for kind in KINDS if counts[kind]}

    @property
    def errors(self) -> int:
        """How many are no mere warnings."""
        return sum(count for kind, count in self.counts.items() if KINDS[kind].severity == "error")

    def with_problems(self, more: Sequence[Problem]) -> "Inspection":
        """Return the same with what was found later."""
        return Inspection(_ordered([*self.problems, *more]), self.files_opened, self.notes)


def find_problems(
    dataset: Dataset, *, open_files: bool = True, read_pixels: bool = False, progress: Progress | None = None
) -> Inspection:
    """Look for everything in `KINDS`.

    Args:
        dataset: what was read.
        open_files: read the header of every image file.
        read_pixels: decode every image file: finds those that are cut off.
        progress: told of the image files.
    """
    problems = [*dataset.problems, *_of_images(dataset), *_of_categories(dataset), *_of_annotations(dataset)]
    corners, note = _corners_as_sizes(dataset)
    problems += corners
    opened = 0
    if dataset.files_known and open_files:
        for place in range(len(dataset.images)):
            opened += dataset.files[place] is not None
            problems += _of_file(dataset, place, read_pixels=read_pixels)
            if progress:
                progress(place + 1, len(dataset.images))
    return Inspection(_ordered(problems), opened, (note,) if note else ())


def sentence(dataset: Dataset, problem: Problem) -> str:
    """Return the image and what is wrong with it."""
    return problem.detail if problem.image is None else f"{dataset.name_of(problem.image)}: {problem.detail}"


def _ordered(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    rank = {kind: place for place, kind in enumerate(KINDS)}

    def key(problem: Problem) -> tuple[int, int, int]:
        image, annotation = (-1 if place is None else place for place in (problem.image, problem.annotation))
        return rank[problem.kind], image, annotation

    return tuple(sorted(problems, key=key))


def _of_images(dataset: Dataset) -> Iterator[Problem]:
    first_id: dict[Any, int] = {}
    first_name: dict[str, int] = {}
    for place, image in enumerate(dataset.images):
        identifier, name = image.get("id"), image.get("file_name")
        if not is_id(identifier):
            yield Problem("strange_id", f"got the image id {identifier!r}", place)
        if is_key(identifier) and (other := first_id.setdefault(identifier, place)) != place:
            yield Problem("duplicate_image_id", f"id {identifier}, as {dataset.name_of(other)}", place)
        if isinstance(name, str) and name and (other := first_name.setdefault(name, place)) != place:
            yield Problem("duplicate_file_name", f"images {other} and {place} are {name}", place)
        if size_of(image) is None:
            yield Problem("no_size", f"got width {image.get('width')!r}, height {image.get('height')!r}", place)


def _of_categories(dataset: Dataset) -> Iterator[Problem]:
    for key in ("id", "name"):
        counts = Counter(repr(one.get(key)) for one in dataset.document["categories"])
        for value, count in counts.items():
            if count > 1:
                yield Problem("duplicate_category", f"{count} classes have the {key} {value}")


def _of_annotations(dataset: Dataset) -> Iterator[Problem]:
    first_id: dict[Any, int] = {}
    boxes: dict[tuple[Any, ...], dict[Any, int]] = {}
    for place, one in enumerate(dataset.annotations):
        image = dataset.image_places.get(one["image_id"]) if is_key(one.get("image_id")) else None
        identifier, category = one.get("id"), one.get("category_id")
        if not is_id(identifier):
            yield Problem("strange_id", f"got the annotation id {identifier!r}", image, place)
        if identifier == 0:
            yield Problem("id_zero", "an annotation with the id 0", image, place)
        if is_key(identifier) and first_id.setdefault(identifier, place) != place:
            yield Problem("duplicate_id", f"annotation id {identifier}", image, place)
        if image is None:
            yield Problem("unknown_image", f"{_called(one)}: image_id {one.get('image_id')!r}", None, place)
        known = is_id(category) and category in dataset.names
        if not known:
            yield Problem("unknown_category", f"{_called(one)}: category_id {category!r}", image, place)
        box = box_of(one)
        size = None if image is None else size_of(dataset.images[image])
        for kind, detail in (*_of_box(one, box, size), *segmentation_faults(one, size)):
            yield Problem(kind, f"{_called(one)}: {detail}", image, place)
        if box is not None and image is not None and is_key(category):
            there = boxes.setdefault((image, bool(one.get("iscrowd")), *(round(value) for value in box)), {})
            if category in there:
                yield Problem(
                    "duplicate_box",
                    f"{_called(one)} equals {_called(dataset.annotations[there[category]])}",
                    image,
                    place,
                )
            elif there:
                names = [_class_name(dataset, each) for each in (next(iter(there)), category)]
                yield Problem("two_classes", f"{_called(one)}: {' and '.join(names)}", image, place)
            there.setdefault(category, place)


def _class_name(dataset: Dataset, category: object) -> str:
    return dataset.names.get(category, str(category)) if is_id(category) else str(category)


def _called(annotation: Mapping[str, Any]) -> str:
    return f"annotation {annotation.get('id')}"


def _of_box(annotation: Mapping[str, Any], box: Box | None, size: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
    if box is None:
        # A box may be left out beside an RLE; nothing else says where the object is.
        if annotation.get("bbox") is not None or not annotation.get("segmentation"):
            yield "bad_box", f"bbox {annotation.get('bbox')!r}"
        return
    x, y, width, height = box
    shown = f"bbox {_figures(box)}"
    if min(width, height) < 0:
        yield "negative_size", shown
        return
    if min(width, height) == 0:
        yield "zero_area", shown
    if size is not None:
        over = max(-x, -y, x + width - size[0], y + height - size[1])
        if over > OUTSIDE_PX:
            where = f"{over:g} px out of {size[0]} × {size[1]}"
            wholly = x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0
            yield "box_outside", f"{shown}, {'wholly outside' if wholly else where}"
    area = annotation.get("area")
    if is_number(area) and not annotation.get("iscrowd") and area > _LARGER_AREA * width * height + 1:
        yield "area_mismatch", f"{shown} of {width * height:g} px², area {area:g}"


def segmentation_faults(
    annotation: Mapping[str, Any], size: tuple[int, int] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield kind and detail if a segmentation is none; ``size`` is its image's width and height."""
    segmentation = annotation.get("segmentation")
    if segmentation is None or segmentation == []:
        return
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not _is_polygon(polygon):
                yield "bad_segmentation", f"polygon {str(polygon)[:60]}"
                return
    elif isinstance(segmentation, Mapping) and isinstance(segmentation.get("size"), list | tuple):
        if not isinstance(segmentation.get("counts"), str | bytes | list):
            yield "bad_segmentation", "an RLE without counts"
        elif isinstance(segmentation["counts"], list) and not _fills(segmentation["counts"], segmentation["size"]):
            yield "bad_segmentation", f"RLE whose counts are not those of {segmentation['size']}"
        elif size is not None and tuple(segmentation["size"]) != size[::-1]:
            yield "bad_segmentation", f"RLE of height, width {segmentation['size']}; the image has {list(size[::-1])}"
    else:
        yield "bad_segmentation", f"got {str(segmentation)[:60]}"


def _fills(counts: Sequence[object], size: Sequence[object]) -> bool:
    """Whether the runs of an RLE are as many pixels as it has."""
    numbers = [*counts, *size]
    whole = [number for number in numbers if is_id(number) and number >= 0]
    return len(whole) == len(numbers) and len(size) == 2 and sum(whole[:-2]) == whole[-2] * whole[-1]


def _is_polygon(value: object) -> bool:
    return isinstance(value, list) and len(value) >= 6 and len(value) % 2 == 0 and all(map(is_number, value))


def _corners_as_sizes(dataset: Dataset) -> tuple[list[Problem], str]:
    """Suspect boxes that are impossible as x, y, width, height and fit as two corners.

    One such box is suspected when its own area or outline says so; all are when nearly every box of the data set would
    do as corners.
    """
    boxes: list[tuple[int, int | None, Box, bool]] = []
    possible = 0
    for place, one in enumerate(dataset.annotations):
        box = box_of(one)
        image = dataset.image_places.get(one["image_id"]) if is_key(one.get("image_id")) else None
        size = None if image is None else size_of(dataset.images[image])
        if box is None or size is None:
            continue
        corners = box[0] < box[2] <= size[0] + 1 and box[1] < box[3] <= size[1] + 1
        outside = box[0] + box[2] > size[0] + OUTSIDE_PX or box[1] + box[3] > size[1] + OUTSIDE_PX
        possible += corners
        boxes.append((place, image, box, corners and outside))
    all_of_them = len(boxes) >= _FEWEST_BOXES and possible >= _CORNER_SHARE * len(boxes)
    found = [
        Problem("xyxy_as_xywh", f"{_called(dataset.annotations[place])}: bbox {_figures(box)}", image, place)
        for place, image, box, suspect in boxes
        if suspect and (all_of_them or _says_corners(dataset.annotations[place], box))
    ]
    if not found or not all_of_them:
        return found, ""
    return found, (
        f"{possible} of {len(boxes)} boxes could be x1, y1, x2, y2, and {len(found)} of them leave their image as "
        "x, y, width, height: the annotations were probably written with corners"
    )


def _says_corners(annotation: Mapping[str, Any], box: Box) -> bool:
    """Whether area or outline of an annotation are those of corners, and not of a box as it is written."""
    area = annotation.get("area")
    as_corners = (box[2] - box[0]) * (box[3] - box[1])
    if is_number(area) and abs(area - as_corners) <= 0.01 * as_corners:
        return True
    segmentation = annotation.get("segmentation")
    if not isinstance(segmentation, list) or next(segmentation_faults(annotation, None), None) or not segmentation:
        return False
    xs = [value for polygon in segmentation for value in polygon[::2]]
    ys = [value for polygon in segmentation for value in polygon[1::2]]
    return all(abs(a - b) <= 1 for a, b in zip((min(xs), min(ys), max(xs), max(ys)), box, strict=True))


def _of_file(dataset: Dataset, place: int, *, read_pixels: bool) -> Iterator[Problem]:
    path, image = dataset.files[place], dataset.images[place]
    if path is None:
        yield Problem("missing_file", "there is no such file", place)
        return
    try:
        header = read_header(path)
        if read_pixels:
            with Image.open(path) as picture:
                picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        yield Problem("unreadable_image", str(error).replace(str(path), path.name), place)
        return
    if (size := size_of(image)) is not None:
        for kind, detail in _of_size(size, header):
            yield Problem(kind, detail, place)


def _of_size(annotated: tuple[int, int], header: ImageHeader) -> Iterator[tuple[str, str]]:
    said = f"annotated {annotated[0]} × {annotated[1]}"
    stored = f"{header.stored[0]} × {header.stored[1]}"
    if annotated not in (header.stored, header.shown, header.stored[::-1]):
        yield "size_mismatch", f"{said}, the file has {header.shown[0]} × {header.shown[1]}"
    elif annotated != header.shown:
        turning = f"as stored, but EXIF orientation {header.orientation} turns it"
        because = turning if header.shown != header.stored else f"the file has {stored}"
        yield "exif_swapped", f"{said}, {because}"
    elif header.orientation != 1:
        yield "exif_turned", f"stored {stored}, EXIF orientation {header.orientation}; {said}"


def _figures(box: Box) -> str:
    return f"[{', '.join(f'{value:g}' for value in box)}]"
