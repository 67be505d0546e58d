"""Pascal VOC: one XML file an image.

Read as strangers write them: coordinates with a decimal point, no <size>, no <difficult>, a <filename> from another
machine, any classes. Not read are entity declarations: a few lines of them can stand for gigabytes ("billion laughs")
or for a file of this machine.

Coordinates count pixels from 1 and include the last one (VOC devkit), so that xmin=1, xmax=W is the whole width. Many
tools write them from 0; a data set with a coordinate below 1, or with fractions, is taken as such.
"""

import os
from collections.abc import Iterator, Sequence
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
_READ_OF_IMAGE, _READ_OF_OBJECT = frozenset({"filename", "size", "object"}), frozenset({"name", "bndbox", *ATTRIBUTES})


class XmlRefusedError(DatasetFormatError):
    """An XML file declares entities."""


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
        read_voc_file(file, folder, pictures, builder)
        if progress:
            progress(number, len(files))
    first = first_pixel
    if first is None:
        first = int(all(counts_from_one(entry["bbox"]) for entry in builder.annotations))
    for entry in builder.annotations:
        count_from(first, entry)
    names = sorted({entry["category_id"] for entry in builder.annotations})
    ids = {name: place for place, name in enumerate(names, start=1)}
    for entry in builder.annotations:
        entry["category_id"] = ids[entry["category_id"]]
    notes = []
    if first_pixel is None and builder.annotations and not first:
        notes.append("coordinates count from 0 (one is below 1, or is no whole number); VOC's own count from 1")
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
        if inner.is_dir() and next(inner.glob("*.xml"), None):
            return inner
    return None


def annotation_files(root: Path, split: str | None) -> Sequence[Path]:
    """Return the XML files of a split, else all of one folder.

    Raises:
        DatasetFormatError: no such split.
    """
    folder = _own_folder(root)
    if folder is None:
        return []
    if split is None:
        return sorted(folder.glob("*.xml"))
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        there = sorted(file.stem for file in listing.parent.glob("*.txt") if "_" not in file.stem)
        raise DatasetFormatError(
            f"--split {split}: there is no {listing}. "
            + (f"There are {', '.join(there)}." if there else "Leave --split out: the folder has no splits.")
        )
    # A line of a class's own list is "000005 -1".
    stems = [line.split()[0] for line in listing.read_text("utf-8", "replace").splitlines() if line.strip()]
    return [folder / f"{stem}.xml" for stem in stems]


class Pictures:
    """Finds the photograph of an XML file; a folder is listed once."""

    def __init__(self, root: Path, images: Path | None) -> None:
        if images is not None and not images.is_dir():
            raise DatasetFormatError(f"--images: got {images}, expected the folder with the images of {root}.")
        self._images = images
        self._listed: dict[Path, dict[str, str]] = {}

    def find(self, annotation: Path, named: str) -> Path | None:
        """Return the image file of an XML file whose <filename> is ``named``."""
        for folder in self._folders(annotation):
            files = self._files(folder)
            # <filename> may be another machine's, a copy's or without suffix: training goes by the XML file's name.
            for name in (*(annotation.stem + suffix for suffix in sorted(SUFFIXES)), named, named + ".jpg"):
                if name.lower() in files:
                    return folder / files[name.lower()]
        return None

    def _folders(self, annotation: Path) -> Iterator[Path]:
        if self._images is not None:
            yield self._images
            return
        yield from (annotation.parent.parent / name for name in IMAGE_FOLDERS)
        yield annotation.parent
        yield annotation.parent.parent

    def _files(self, folder: Path) -> dict[str, str]:
        if folder not in self._listed:
            # Not as paths: a data set has a hundred thousand.
            there = sorted(os.listdir(folder)) if folder.is_dir() else []  # noqa: PTH208
            self._listed[folder] = {
                name.lower(): name
                for name in there
                if os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122
            }
        return self._listed[folder]


def counts_from_one(box: Sequence[float]) -> bool:
    """Whether a box that `read_voc_file` read can be one that counts pixels from 1."""
    return min(box[:2]) >= 1 and all(value.is_integer() for value in box)


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
