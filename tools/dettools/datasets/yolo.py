"""YOLO: one text file an image, a line an object, in fractions of the photograph's width and height.

    data.yaml ─► splits ─► images/x.jpg ─► labels/x.txt: class cx cy w h
                                                         class x1 y1 x2 y2 x3 y3 …   (an outline)
                                                         class cx cy w h + keypoints (data.yaml has kpt_shape)

As Ultralytics does: the label file of an image lies where the last folder ``images`` of its path is called ``labels``,
else beside it; an image without one has no object; classes count from 0, here their category ids from 1. The fractions
are of the photograph turned by its EXIF orientation.
"""

import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dettools.datasets.dataset import (
    Box,
    Dataset,
    DatasetFormatError,
    DocumentBuilder,
    Progress,
    is_number,
    read_header,
)
from dettools.image_files import SUFFIXES

CLASSES = "classes.txt"
# A class number of a billion is a mistake, and not a billion names.
_MOST_CLASSES = 100_000
# Rounding. Ultralytics refuses the image beyond it; coordinates in pixels are the usual reason.
_LARGEST_FRACTION = 1.01
SPLITS = ("train", "val", "valid", "test")


@dataclass(frozen=True)
class Description:
    """What ``data.yaml`` says: the classes, the image folders or lists by split, and the values of a keypoint."""

    names: tuple[str, ...]
    sources: Mapping[str, Sequence[Path]]
    keypoints: bool


def read_yolo(
    path: Path, *, images: Path | None = None, split: str | None = None, progress: Progress | None = None
) -> Dataset:
    """Read a data set in YOLO's format.

    Args:
        path: ``data.yaml``, or the folder with it, or a folder with ``images`` and ``labels``.
        images: folder of the images, instead of what ``data.yaml`` names.
        split: one of those in ``data.yaml``; None reads all.
        progress: told of each image.

    Raises:
        DatasetFormatError: no image, no such split, or a damaged ``data.yaml``.
    """
    root = path if path.is_dir() else path.parent
    description = describe(path)
    if images is not None:
        description = Description(description.names, {"": [images]}, description.keypoints)
    files = list(image_files(description, split, path))
    builder = DocumentBuilder()
    used: set[Path] = set()
    highest = -1
    for number, file in enumerate(files, start=1):
        label = label_file(file)
        used.add(label)
        highest = max(highest, read_yolo_image(file, label, root, description.keypoints, builder))
        if progress:
            progress(number, len(files))
    for detail in orphaned_labels(used):
        builder.problem("missing_file", detail)
    notes = []
    names = description.names
    if not names:
        names = tuple(f"class {number}" for number in range(highest + 1))
        notes.append("there is no data.yaml with names and no classes.txt: classes are called by their numbers")
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    return builder.finish("yolo", path, categories, notes)


def label_file(image: Path) -> Path:
    """Return where the labels of an image are, or would be."""
    parts = list(image.parent.parts)
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    return Path(*parts, image.stem + ".txt")


def orphaned_labels(used: Collection[Path]) -> Iterator[str]:
    """Yield what is said of each label file without a photograph beside those in use: training never sees it."""
    for folder in sorted({label.parent for label in used if "labels" in label.parts}):
        for label in sorted(folder.glob("*.txt")):
            if label not in used and label.name != CLASSES:
                yield f"{label.relative_to(folder.parent)} has no photograph"


def data_yaml(folder: Path) -> Path | None:
    """Return the YAML file of a folder that describes a YOLO data set."""
    first = folder / "data.yaml"
    # A damaged one is told where it is read, and not passed over.
    return next(
        (
            file
            for file in (first, folder / "dataset.yaml", *sorted(folder.glob("*.y*ml")))
            if file.is_file() and (is_data_yaml(file) or file == first)
        ),
        None,
    )


def is_data_yaml(path: Path) -> bool:
    """Whether a YAML file names classes and images as YOLO's do."""
    try:
        values = _read_yaml(path)
    except DatasetFormatError:
        return False
    return isinstance(values, dict) and "names" in values


def describe(path: Path) -> Description:
    """Read ``data.yaml`` or what stands in for it.

    Raises:
        DatasetFormatError: it is damaged.
    """
    root = path if path.is_dir() else path.parent
    file = data_yaml(root) if path.is_dir() else path
    if file is None:
        listing = next((one for one in (root / CLASSES, root / "labels" / CLASSES) if one.is_file()), None)
        lines = listing.read_text("utf-8-sig", "replace").splitlines() if listing else []
        names = tuple(line.strip() for line in lines if line.strip())
        return Description(names, {"": [root]}, keypoints=False)
    values = _read_yaml(file)
    if not isinstance(values, dict) or "names" not in values:
        raise DatasetFormatError(f"{file}: expected a YAML mapping with names, and train, val or test.")
    base = file.parent / str(values.get("path") or "")
    base = base if base.is_dir() else file.parent
    sources = {split: _sources(values[split], base, file) for split in SPLITS if values.get(split)}
    return Description(_names(values["names"], file), sources or {"": [root]}, bool(values.get("kpt_shape")))


def _read_yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DatasetFormatError(f"{file}: cannot be read as YAML: {error}") from None


def _names(values: Any, file: Path) -> tuple[str, ...]:
    # Aliases can make gigabytes of a few lines, but not out of one text.
    found = values.values() if isinstance(values, dict) else values
    if not isinstance(values, dict | list) or not all(isinstance(one, str | int | float) for one in found):
        got = reprlib.repr(values)
        raise DatasetFormatError(f"{file}: got names {got}, expected a list of names, or numbers and names.")
    if isinstance(values, list):
        return tuple(map(str, values))
    if not values or not all(isinstance(key, int) and 0 <= key < _MOST_CLASSES for key in values):
        raise DatasetFormatError(f"{file}: got names {reprlib.repr(values)}, expected class numbers from 0 and names.")
    return tuple(str(values.get(number, f"class {number}")) for number in range(max(values) + 1))


def _sources(values: Any, base: Path, file: Path) -> list[Path]:
    """Return the folders and lists of a split, which Roboflow writes one folder too high (``../train/images``)."""
    found = []
    for value in values if isinstance(values, list) else [values]:
        text = str(value)
        tried = (base / text, file.parent / text, file.parent / text.removeprefix("../"))
        there = next((one for one in tried if one.exists()), None)
        if there is None:
            raise DatasetFormatError(
                f"{file}: got {text!r}, which is neither a folder nor a list of images from {base}. "
                "Correct path and the splits in it, or name the folder with --images."
            )
        found.append(there)
    return found


def image_files(description: Description, split: str | None, path: Path) -> Iterator[Path]:
    """Yield the image files of a split, else of all; each once.

    Raises:
        DatasetFormatError: no such split.
    """
    if split is not None and split not in description.sources:
        there = ", ".join(one for one in description.sources if one)
        raise DatasetFormatError(f"--split {split}: {path} has {there or 'no splits'}.")
    seen: set[Path] = set()
    for name, sources in description.sources.items():
        if split not in (None, name):
            continue
        for source in sources:
            for file in _listed(source) if source.is_file() else _inside(source):
                if file not in seen:
                    seen.add(file)
                    yield file


def _inside(folder: Path) -> Iterator[Path]:
    yield from sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def _listed(listing: Path) -> Iterator[Path]:
    for line in listing.read_text("utf-8", "replace").splitlines():
        if line.strip():
            yield listing.parent / line.strip()


def read_yolo_image(file: Path, label: Path, root: Path, keypoints: bool, builder: DocumentBuilder) -> int:
    """Add an image with its objects; return the highest class number."""
    name = file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)
    try:
        size = read_header(file).shown
    except OSError:
        size = (0, 0)
    image = builder.image(name, size, file if file.is_file() else None)
    try:
        lines = label.read_text("utf-8-sig", "replace").splitlines()
    except OSError:
        return -1
    if min(size) <= 0 and (count := sum(1 for line in lines if line.strip())):
        builder.problem(
            "bad_label", f"{label.name}: {count} lines with fractions of a photograph without a size", image
        )
        return -1
    highest = -1
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            builder.problem("bad_label", f"{label.name}, line {number}: got {line.strip()[:80]!r}", image)
        elif max(row[1][:4] if _has_box(row[1], keypoints) else row[1]) > _LARGEST_FRACTION:
            got = f"got {line.strip()[:80]!r}, expected fractions of the width and height, up to 1"
            builder.problem("bad_label", f"{label.name}, line {number}: {got}", image)
        else:
            highest = max(highest, row[0])
            _add(builder, image, row[0], row[1], size, keypoints)
    return highest


def _row(line: str) -> tuple[int, list[float]] | None:
    """Return class and fractions of a line; None if it is none."""
    try:
        first, *rest = (float(part) for part in line.split())
    except ValueError:
        return None
    if not first.is_integer() or not 0 <= first < _MOST_CLASSES or len(rest) < 4 or not all(map(is_number, rest)):
        return None
    # Four of a box; an outline has three points or more; 4 + 3k and 4 + 2k with keypoints. Five would have a score.
    return None if len(rest) == 5 else (int(first), rest)


def _has_box(values: Sequence[float], keypoints: bool) -> bool:
    """Whether they begin with a centre and sizes; else they are an outline."""
    return len(values) == 4 or keypoints or len(values) % 2 == 1


def _add(
    builder: DocumentBuilder, image: int, label: int, values: Sequence[float], size: tuple[int, int], keypoints: bool
) -> None:
    width, height = size
    if _has_box(values, keypoints):
        centre_x, centre_y, part_x, part_y = values[:4]
        box: Box = (
            (centre_x - part_x / 2) * width,
            (centre_y - part_y / 2) * height,
            part_x * width,
            part_y * height,
        )
        builder.annotation(image, label + 1, box)
        return
    outline = [value * (width, height)[place % 2] for place, value in enumerate(values)]
    xs, ys = outline[::2], outline[1::2]
    box = (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))
    builder.annotation(image, label + 1, box, area=_area(xs, ys), segmentation=[outline])


def _area(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the area of a polygon in square pixels (shoelace formula)."""
    around = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    return abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in around)) / 2
