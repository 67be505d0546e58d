"""Writes some images in a target format: COCO as fragments of a document, VOC as XML files, YOLO as text files.

A writer is sent to other processes. What a format has no place for is counted by name, so that a report can tell what
the way back will not bring.
"""

import html
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dettools.datasets.conversion_rules import Rules, Tally, is_difficult
from dettools.datasets.dataset import is_number, read_header, size_of
from dettools.datasets.voc import ATTRIBUTES, DIGITS

Files = Literal["link", "copy", "none"]
# Fractions of a photograph's side: a millionth of a pixel of the largest.
_FRACTION = "{:.10g}"


@dataclass(frozen=True)
class Written:
    """Images and annotations of one piece of work; ``lost`` counts what the format has no place for."""

    images: int
    annotations: int
    lost: Counter[str]


@dataclass(frozen=True)
class Batch:
    """What is written at once.

    Attributes:
        images: COCO entries.
        files: of each image.
        annotations: of each image; ``category_id`` is that of `categories`.
        stems: of each image, the name of its file without suffix.
        categories: id to name.
    """

    images: Sequence[dict[str, Any]]
    files: Sequence[Path | None]
    annotations: Sequence[Sequence[dict[str, Any]]]
    stems: Sequence[str]
    categories: Mapping[int, str]


@dataclass(frozen=True)
class FolderWriter:
    """A tree of files, below ``root``; ``split`` is a folder for YOLO and a list for VOC.

    Attributes:
        rules: what is written.
        root: the output folder.
        split: of the images; empty for none.
        first_pixel: VOC: what the first pixel of a row is called.
        files: what becomes of the image files.
    """

    rules: Rules
    root: Path
    split: str
    first_pixel: int
    files: Files

    def write(self, batch: Batch, skipped: Tally) -> Written:
        """Write images."""
        lost: Counter[str] = Counter()
        images = annotations = 0
        for place, (image, file, stem) in enumerate(zip(batch.images, batch.files, batch.stems, strict=True)):
            size = size_of(image) or _size_of_file(file)
            objects = batch.annotations[place]
            if self.rules.target == "yolo" and size is None:
                skipped.add("no_image_size", f"{image.get('file_name')}, with {len(objects)} objects")
                continue
            if file is None and self.files != "none":
                skipped.add("missing_file", f"{image.get('file_name')}: its labels are written all the same")
            if size is not None and self.rules.target == "yolo":
                text = yolo_lines(objects, size, self.rules.outlines, lost)
                self._place(file, Path("images", self.split), stem)
                self._text(Path("labels", self.split, f"{stem}.txt"), text)
                annotations += text.count("\n")
            else:
                text = voc_xml(image, file, stem, size, objects, batch.categories, self.first_pixel, lost)
                self._place(file, Path("JPEGImages"), stem)
                self._text(Path("Annotations", f"{stem}.xml"), text)
                annotations += len(objects)
            lost.update(
                f"images: {key}"
                for key, value in image.items()
                if key not in ("id", "file_name", "width", "height") and value
            )
            images += 1
        return Written(images, annotations, lost)

    def _text(self, name: Path, text: str) -> None:
        (self.root / name).write_text(text, encoding="utf-8")

    def _place(self, file: Path | None, folder: Path, stem: str) -> None:
        if file is None or self.files == "none":
            return
        target = self.root / folder / (stem + file.suffix)
        if self.files == "link":
            target.symlink_to(file.resolve())
        else:
            shutil.copyfile(file, target)


@dataclass(frozen=True)
class CocoWriter:
    """The entries of a COCO document, without the brackets around them, in two files beside each other."""

    images: Path
    annotations: Path

    def write(self, batch: Batch) -> Written:
        """Write images."""
        flat = [one for objects in batch.annotations for one in objects]
        for path, entries in ((self.images, list(batch.images)), (self.annotations, flat)):
            path.write_text(json.dumps(entries, ensure_ascii=False)[1:-1], encoding="utf-8")
        return Written(len(batch.images), len(flat), Counter())


def yolo_lines(objects: Sequence[Mapping[str, Any]], size: tuple[int, int], outlines: bool, lost: Counter[str]) -> str:
    """Return the label file of an image of ``size`` width and height: classes from 0, fractions of its sides.

    Training refuses an image with a fraction beyond 0 to 1, so that boxes are cut off at the sides.
    """
    lines = []
    for one in objects:
        _count_lost(one, lost)
        lost.update(f"attributes: {key}" for key in _attributes(one))
        if one.get("iscrowd"):
            lost["annotations: iscrowd"] += 1
        outline = _outline(one.get("segmentation")) if outlines else None
        x, y, width, height = one["bbox"]
        left, right = _clipped(x, x + width, size[0])
        top, bottom = _clipped(y, y + height, size[1])
        if right <= left or bottom <= top:
            lost["objects wholly outside their image"] += 1
            continue
        if outlines:
            if outline is None:
                lost["outlines of several parts or none: the box instead"] += 1
                outline = [left, top, right, top, right, bottom, left, bottom]
            else:
                lost["annotations: segmentation"] -= 1
            values = [min(max(value / size[at % 2], 0.0), 1.0) for at, value in enumerate(outline)]
        else:
            if (left, top, right, bottom) != (x, y, x + width, y + height):
                lost["boxes cut off at the side of their image"] += 1
            values = [
                (left + right) / 2 / size[0],
                (top + bottom) / 2 / size[1],
                (right - left) / size[0],
                (bottom - top) / size[1],
            ]
        lines.append(" ".join([str(one["category_id"] - 1), *(_FRACTION.format(value) for value in values)]))
    return "".join(f"{line}\n" for line in lines)


def voc_xml(
    image: Mapping[str, Any],
    file: Path | None,
    stem: str,
    size: tuple[int, int] | None,
    objects: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    first_pixel: int,
    lost: Counter[str],
) -> str:
    """Return the XML file of an image; ``first_pixel`` is what the first pixel of a row is called, 1 in VOC's own."""
    suffix = file.suffix if file else Path(str(image.get("file_name") or "")).suffix or ".jpg"
    parts = [f"<annotation>\n  <filename>{_escape(stem + suffix)}</filename>\n"]
    if size is not None:
        parts.append(f"  <size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>\n")
    for one in objects:
        _count_lost(one, lost)
        found = _attributes(one)
        attributes = {key: found[key] for key in ATTRIBUTES if key in found}
        lost.update(f"attributes: {key}" for key in found if key not in ATTRIBUTES)
        attributes["difficult"] = int(is_difficult(one))
        if one.get("iscrowd") and not attributes["difficult"]:
            lost["annotations: iscrowd"] += 1
        x, y, width, height = one["bbox"]
        corners = (x + first_pixel, y + first_pixel, x + width, y + height)
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        box = "".join(f"<{side}>{_pixels(value)}</{side}>" for side, value in sides)
        marks = "".join(f"<{key}>{_escape(str(value))}</{key}>" for key, value in attributes.items())
        name = _escape(names[one["category_id"]])
        parts.append(f"  <object><name>{name}</name>{marks}<bndbox>{box}</bndbox></object>\n")
    return "".join([*parts, "</annotation>\n"])


def _count_lost(annotation: Mapping[str, Any], lost: Counter[str]) -> None:
    held = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "attributes"}
    lost.update(f"annotations: {key}" for key, value in annotation.items() if key not in held and value)
    width, height = annotation["bbox"][2:]
    area = annotation.get("area")
    if is_number(area) and abs(area - width * height) > 1e-6 * max(1.0, area):
        lost["annotations: area (of the mask; the box's comes back)"] += 1


def _attributes(annotation: Mapping[str, Any]) -> Mapping[str, Any]:
    found = annotation.get("attributes")
    return found if isinstance(found, Mapping) else {}


def _outline(segmentation: object) -> list[float] | None:
    """Return the one polygon of a segmentation; None if it is another."""
    if not isinstance(segmentation, list) or len(segmentation) != 1:
        return None
    polygon = segmentation[0]
    sound = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and all(map(is_number, polygon))
    return polygon if sound else None


def _size_of_file(file: Path | None) -> tuple[int, int] | None:
    try:
        return None if file is None else read_header(file).shown
    except OSError:
        return None


def _clipped(low: float, high: float, end: int) -> tuple[float, float]:
    return min(max(low, 0.0), end), min(max(high, 0.0), end)


def _pixels(value: float) -> str:
    return f"{round(float(value), DIGITS):.{DIGITS}f}".rstrip("0").rstrip(".")


def _escape(text: str) -> str:
    return html.escape(text, quote=False)
