"""Pascal VOC: one XML file an image.

Read as strangers write them: coordinates with a decimal point, no <size>, no <difficult>, a <filename> from another
machine, any classes. Not read are entity declarations: a few lines of them can stand for gigabytes ("billion laughs")
or for a file of this machine.

Coordinates count pixels from 1 and include the last one (VOC devkit), so that xmin=1, xmax=W is the whole width. Many
tools write them from 0: `PixelCount` tells one from the other.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from dettools.datasets.dataset import (
    Dataset,
    DatasetFormatError,
    DocumentBuilder,
    Progress,
    is_number,
    read_header,
)
from dettools.ground_truth import base_name
from dettools.image_files import SUFFIXES

ANNOTATION_FOLDERS = ("Annotations", "annotations", "labels", "xml", "xmls")
IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "img")
_SIDES = ("xmin", "ymin", "xmax", "ymax")
# Kept as ``attributes`` of the annotation.
ATTRIBUTES = ("pose", "truncated", "difficult", "occluded")
_SUFFIXES = tuple(SUFFIXES)
# Of a coordinate, as they are written: a millionth of a pixel.
DIGITS = 6
# VOC2012, which counts from 1, has fractions in two of its 17,125 files.
_FEW_FRACTIONS = 0.01
FROM_0 = (
    "coordinates count from 0 (one is below 1, or more than 1 % of the boxes have fractions); VOC's own count from 1"
)
_READ_OF_IMAGE, _READ_OF_OBJECT = frozenset({"filename", "size", "object"}), frozenset({"name", "bndbox", *ATTRIBUTES})


class XmlRefusedError(DatasetFormatError):
    """An XML file declares entities."""


@dataclass
class PixelCount:
    """What boxes tell of what the first pixel of a row is called: 0 or 1.

    Attributes:
        boxes: how many there are.
        fractions: with a coordinate that is no whole number.
        below: that begin before 1.
    """

    boxes: int = 0
    fractions: int = 0
    below: int = 0

    def add(self, left: float, top: float, right: float, bottom: float) -> None:
        """Add a box with the coordinates that its file has, or would have if it counted from 1."""
        corners = [round(float(value), DIGITS) for value in (left, top, right, bottom)]
        self.boxes += 1
        self.fractions += not all(value.is_integer() for value in corners)
        self.below += min(corners[:2]) < 1

    def merge(self, other: "PixelCount") -> None:
        """Add the boxes of another."""
        self.boxes += other.boxes
        self.fractions += other.fractions
        self.below += other.below

    @property
    def first(self) -> int:
        """What the first pixel is called."""
        return int(not self.below and self.fractions <= _FEW_FRACTIONS * self.boxes)


def read_voc(
    folder: Path,
    *,
    images: Path | None = None,
    split: str | None = None,
    first_pixel: int | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Read a folder of VOC annotations, or a VOCdevkit with a folder for each year.

    Args:
        folder: with the XML files, or with a folder ``Annotations``.
        images: folder of the images; None looks for it beside the annotations.
        split: take the images that ``ImageSets/Main/{split}.txt`` lists.
        first_pixel: 1 or 0, what the first pixel of a row is called; None decides by the coordinates.
        progress: told of each XML file.

    Raises:
        DatasetFormatError: no XML file, or no such split.
        XmlRefusedError: a file declares entities.
    """
    files = [file for root in voc_roots(folder) for file in annotation_files(root, split)]
    if not files:
        raise DatasetFormatError(f"{folder}: got no XML file, expected Pascal VOC annotations, one an image.")
    builder = DocumentBuilder()
    pictures = Pictures(folder, images)
    for number, file in enumerate(files, start=1):
        read_voc_file(Path(file), folder, pictures, builder)
        if progress:
            progress(number, len(files))
    counted = PixelCount()
    for entry in builder.annotations:
        left, top, width, height = entry["bbox"]
        counted.add(left, top, left + width, top + height)
    first = counted.first if first_pixel is None else first_pixel
    for entry in builder.annotations:
        count_from(first, entry)
    names = sorted({entry["category_id"] for entry in builder.annotations})
    ids = {name: place for place, name in enumerate(names, start=1)}
    for entry in builder.annotations:
        entry["category_id"] = ids[entry["category_id"]]
    notes = [FROM_0] if first_pixel is None and not first else []
    return builder.finish("voc", folder, [{"id": place, "name": name} for name, place in ids.items()], notes)


def voc_roots(folder: Path) -> list[Path]:
    """Return the folders that each hold a set of VOC annotations: this one, else those inside it that do."""
    if _own_folder(folder) is not None:
        return [folder]
    return sorted(inner for inner in folder.iterdir() if inner.is_dir() and _own_folder(inner) is not None)


def parse_xml(content: bytes, path: Path) -> Element:
    """Parse XML that may come from anyone.

    Raises:
        XmlRefusedError: it declares entities.
        DatasetFormatError: it is no XML.
    """
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data

    def refuse(name: str, *_: Any) -> NoReturn:
        raise XmlRefusedError(
            f"{path}: got a declaration of the entity {name!r}, which VOC annotations do not need and which can expand "
            "without bounds. Remove its DOCTYPE."
        )

    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError) as error:
        raise DatasetFormatError(f"{path}: cannot be parsed as XML: {error}") from None
    return builder.close()


def _own_folder(folder: Path) -> Path | None:
    """Return where the XML files of a folder lie."""
    for inner in (folder, *(folder / name for name in ANNOTATION_FOLDERS)):
        if inner.is_dir() and next(_xml_files(inner), None):
            return inner
    return None


def _xml_files(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry.path for entry in entries if entry.name.endswith(".xml"))
    except PermissionError:
        return


def annotation_files(root: Path, split: str | None) -> list[str]:
    """Return the XML files of a split, else all of one folder; not as paths: a data set has a hundred thousand.

    Raises:
        DatasetFormatError: no such split.
    """
    folder = _own_folder(root)
    if folder is None:
        return []
    if split is None:
        return sorted(_xml_files(folder))
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        there = sorted(file.stem for file in listing.parent.glob("*.txt") if "_" not in file.stem)
        raise DatasetFormatError(
            f"--split {split}: there is no {listing}. "
            + (f"There are {', '.join(there)}." if there else "Leave --split out: the folder has no splits.")
        )
    # A line of a class's own list is "000005 -1".
    stems = [line.split()[0] for line in listing.read_text("utf-8", "replace").splitlines() if line.strip()]
    return [f"{folder}{os.sep}{stem}.xml" for stem in stems]


class Pictures:
    """Finds the photograph of an XML file; a folder is listed once."""

    def __init__(self, root: Path, images: Path | None) -> None:
        if images is not None and not images.is_dir():
            raise DatasetFormatError(f"--images: got {images}, expected the folder with the images of {root}.")
        self._images = images
        self._folders: dict[Path, tuple[Path, ...]] = {}
        self._listed: dict[Path, tuple[dict[str, str], dict[str, str]]] = {}

    def find(self, annotation: Path, named: str) -> Path | None:
        """Return the image file of an XML file whose <filename> is ``named``."""
        stem, named = annotation.stem.lower(), named.lower()
        for folder in self._searched(annotation.parent):
            by_stem, by_name = self._files(folder)
            # <filename> may be another machine's, a copy's or without suffix: training goes by the XML file's name.
            if found := by_stem.get(stem) or by_name.get(named) or by_name.get(f"{named}.jpg"):
                return folder / found
        return None

    def _searched(self, annotations: Path) -> tuple[Path, ...]:
        if self._images is not None:
            return (self._images,)
        if annotations not in self._folders:
            root = annotations.parent
            self._folders[annotations] = (*(root / name for name in IMAGE_FOLDERS), annotations, root)
        return self._folders[annotations]

    def _files(self, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
        """Return the image files of a folder by stem and by name, in small letters."""
        if folder not in self._listed:
            # Not as paths: a data set has a hundred thousand.
            there = os.listdir(folder) if folder.is_dir() else ()  # noqa: PTH208
            by_name = {name.lower(): name for name in sorted(there) if name.lower().endswith(_SUFFIXES)}
            # Of one stem the first suffix wins.
            by_stem = {name.rpartition(".")[0]: by_name[name] for name in sorted(by_name, reverse=True)}
            self._listed[folder] = by_stem, by_name
        return self._listed[folder]


def count_from(first: int, entry: dict[str, Any]) -> None:
    """Move a box that `read_voc_file` read to where it is, if the first pixel of a row is called ``first``."""
    left, top, width, height = entry["bbox"]
    entry["bbox"] = [left - first, top - first, width + first, height + first]
    entry["area"] = entry["bbox"][2] * entry["bbox"][3]


def read_voc_file(path: Path, folder: Path, pictures: Pictures, builder: DocumentBuilder) -> None:
    """Add the image of an XML file with its objects: ``category_id`` is the class's name, ``bbox`` counts from 0.

    Raises:
        XmlRefusedError: it declares entities.
    """
    try:
        root = parse_xml(path.read_bytes(), path)
    except XmlRefusedError:
        raise
    except (OSError, DatasetFormatError) as error:
        builder.problem("bad_label", str(error))
        return
    if root.tag.lower() != "annotation":
        builder.problem("bad_label", f"{path}: got <{root.tag}>, expected <annotation>")
        return
    builder.unread.update(f"<{one.tag}> of an image" for one in root if one.tag not in _READ_OF_IMAGE)
    named = base_name((root.findtext("filename") or "").strip())
    file = pictures.find(path, named)
    size = (_whole(root.findtext("size/width")), _whole(root.findtext("size/height")))
    if min(size) <= 0 and file is not None:
        try:
            size = read_header(file).shown
        except OSError:
            size = (0, 0)
    name = named or path.with_suffix(".jpg").name if file is None else _relative(file, folder)
    image = builder.image(name, size, file)
    for number, element in enumerate(root.findall("object"), start=1):
        builder.unread.update(f"<{one.tag}> of an object" for one in element if one.tag not in _READ_OF_OBJECT)
        box = element.find("bndbox")
        values = [_number(None if box is None else box.findtext(side)) for side in _SIDES]
        label = (element.findtext("name") or "").strip()
        if not label or any(value is None for value in values):
            got = ", ".join(f"{side} {None if box is None else box.findtext(side)!r}" for side in _SIDES)
            builder.problem("bad_label", f"{path.name}, object {number} ({label or 'no name'}): {got}", image)
            continue
        attributes = {key: value for key in ATTRIBUTES if (value := (element.findtext(key) or "").strip())}
        left, top, right, bottom = (value for value in values if value is not None)
        builder.annotation(image, label, (left, top, right - left, bottom - top), attributes=attributes)


def _relative(file: Path, folder: Path) -> str:
    try:
        return file.relative_to(folder).as_posix()
    except ValueError:
        return file.name


def _number(text: str | None) -> float | None:
    try:
        value = float((text or "").strip())
    except ValueError:
        return None
    return value if is_number(value) else None


def _whole(text: str | None) -> int:
    return int(_number(text) or 0)
