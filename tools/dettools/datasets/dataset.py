"""A data set of any format in memory: one COCO document, and the file of each image.

    COCO · VOC · YOLO · Cityscapes · MMDetection config ─► load_dataset ─► Dataset ─► find_problems, statistics_of
                                                                              └─► ground_truth_of(dataset.document)

The document says what the files say, mistakes included: they are to be shown, and a checked and repaired GroundTruth
has none left. A reader reports what the document cannot hold (a line that is no label) as a `Problem`.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from detserve.errors import DetserveError
from PIL import Image

Progress = Callable[[int, int], None]
"""Is told how many are done, and of how many."""
Box = tuple[float, float, float, float]
"""Left, top, width, height in pixels."""
_ORIENTATION = 0x0112
# Beyond it a float does not hold every whole number.
_LARGEST = 2**53


class DatasetFormatError(DetserveError):
    """A data set cannot be read, or is none of the known formats."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a data set.

    Attributes:
        kind: a key of `dettools.datasets.inspection.KINDS`.
        detail: got what, where.
        image: place in ``Dataset.images``; None when it is of no image.
        annotation: place in ``Dataset.annotations``; None when it is of no annotation.
    """

    kind: str
    detail: str
    image: int | None = None
    annotation: int | None = None


@dataclass(frozen=True)
class Dataset:
    """What was read.

    Attributes:
        format: a key of `dettools.datasets.formats.READERS`.
        path: what was read: a file or a folder.
        document: COCO annotations, not checked; ``images``, ``annotations`` and ``categories`` are lists of dicts.
        files: of each image in the document's order; None where there is no such file.
        files_known: the image files were looked for; else every entry of ``files`` is None.
        problems: what the reader could not put into the document.
        notes: what a person should know, one sentence each.
    """

    format: str
    path: Path
    document: Mapping[str, Any] = field(repr=False)
    files: tuple[Path | None, ...] = field(repr=False)
    files_known: bool = True
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> Sequence[Mapping[str, Any]]:
        """The document's images."""
        images: Sequence[Mapping[str, Any]] = self.document["images"]
        return images

    @property
    def annotations(self) -> Sequence[Mapping[str, Any]]:
        """The document's annotations."""
        annotations: Sequence[Mapping[str, Any]] = self.document["annotations"]
        return annotations

    @cached_property
    def names(self) -> dict[int, str]:
        """Category id to name, in the document's order; of two with one id, the first."""
        names: dict[int, str] = {}
        for one in self.document["categories"]:
            if is_id(one.get("id")):
                names.setdefault(one["id"], str(one.get("name", one["id"])))
        return names

    @cached_property
    def image_places(self) -> dict[Any, int]:
        """Image id to its place in ``images``; of two with one id, the first."""
        places: dict[Any, int] = {}
        for place, image in enumerate(self.images):
            if is_key(image.get("id")):
                places.setdefault(image["id"], place)
        return places

    @cached_property
    def annotations_of(self) -> dict[int, list[int]]:
        """Place of an image to the places of its annotations; images without any are left out."""
        found: dict[int, list[int]] = {}
        for place, one in enumerate(self.annotations):
            image = self.image_places.get(one["image_id"]) if is_key(one.get("image_id")) else None
            if image is not None:
                found.setdefault(image, []).append(place)
        return found

    def name_of(self, image: int) -> str:
        """Return the file name of an image, or how else to call it."""
        entry = self.images[image]
        return str(entry.get("file_name") or f"image {entry.get('id', f'at {image}')}")


@dataclass(frozen=True)
class ImageHeader:
    """What an image file says about itself: ``stored`` width and height in pixels, EXIF orientation 1 to 8."""

    stored: tuple[int, int]
    orientation: int

    @property
    def shown(self) -> tuple[int, int]:
        """Width and height once the EXIF orientation is applied."""
        return (self.stored[1], self.stored[0]) if self.orientation >= 5 else self.stored


def read_header(path: Path) -> ImageHeader:
    """Read size and orientation without decoding the pixels.

    Raises:
        OSError: no such file, or no image.
    """
    try:
        # A large photograph and a damaged EXIF block are warned of; neither matters to the size.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            # Pillow decodes a whole PNG to look for EXIF behind the pixels.
            exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
            orientation = exif.get(_ORIENTATION, 1)
            return ImageHeader(image.size, orientation if orientation in range(1, 9) else 1)
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from error


class DocumentBuilder:
    """Puts a COCO document together; ids of images and annotations count from 1.

    An id 0 would make pycocotools count its object as never found, as MMDetection's converters do with the first one.
    """

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.files: list[Path | None] = []
        self.annotations: list[dict[str, Any]] = []
        self.problems: list[Problem] = []
        self.unread: Counter[str] = Counter()
        """What the files have besides, and the document does not."""

    def image(self, file_name: str, size: tuple[int, int], file: Path | None) -> int:
        """Add an image of ``size`` width and height, 0 where unknown; return its place."""
        width, height = size
        self.images.append({"id": len(self.images) + 1, "file_name": file_name, "width": width, "height": height})
        self.files.append(file)
        return len(self.images) - 1

    def annotation(self, image: int, category_id: int | str, box: Box, **more: Any) -> None:
        """Add an annotation of the image at a place; ``area`` is the box's and ``iscrowd`` 0 unless given."""
        entry = {
            "id": len(self.annotations) + 1,
            "image_id": image + 1,
            "category_id": category_id,
            "bbox": [float(value) for value in box],
            "area": float(box[2] * box[3]),
            "iscrowd": 0,
        }
        self.annotations.append({**entry, **more})

    def problem(self, kind: str, detail: str, image: int | None = None) -> None:
        """Add what the document cannot hold."""
        self.problems.append(Problem(kind, detail, image))

    def finish(self, kind: str, path: Path, categories: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> Dataset:
        """Return the data set.

        Raises:
            DatasetFormatError: there is no image.
        """
        if not self.images:
            raise DatasetFormatError(f"{path}: got no image, expected at least one. Check the path and --split.")
        document = {"images": self.images, "annotations": self.annotations, "categories": list(categories)}
        return Dataset(kind, path, document, tuple(self.files), problems=tuple(self.problems), notes=tuple(notes))


def box_of(annotation: Mapping[str, Any]) -> Box | None:
    """Return the ``bbox`` of an annotation; None if it has none or it is not four finite numbers."""
    box = annotation.get("bbox")
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(is_number(value) for value in box):
        return None
    return float(box[0]), float(box[1]), float(box[2]), float(box[3])


def size_of(image: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the annotated width and height of an image; None unless both are positive."""
    width, height = image.get("width"), image.get("height")
    if not is_number(width) or not is_number(height) or min(width, height) <= 0:
        return None
    return int(width), int(height)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number that a float can hold."""
    # By type: a bool is none, and it is asked of every coordinate, so that isinstance would show in the time.
    return is_id(value) or (type(value) is float and math.isfinite(value))


def is_id(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, as COCO's ids are."""
    return type(value) is int and -_LARGEST <= value <= _LARGEST


def is_key(value: object) -> bool:
    """Whether it can be looked up: COCO's ids are whole numbers, some files have texts."""
    return isinstance(value, int | str)
