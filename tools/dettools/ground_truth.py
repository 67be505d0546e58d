"""What is true about a set of images: a COCO annotation file, read once, checked, repaired where that is safe.

    val.json ─► load_ground_truth ─► GroundTruth ─► metrics, evaluate, eval-metric
                     └─ notes: what had to be repaired, for every report to show

What would change a figure silently is repaired or refused here. The best known case is an annotation whose id is 0:
pycocotools writes the id of the matched annotation into an array of zeros, so that this object counts as never found.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from detserve.errors import DetserveError

# As many as a message shows of what is wrong in the same way.
SHOWN = 5


class GroundTruthError(DetserveError):
    """An annotation file cannot be read, or contradicts itself."""


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One image of the annotation file; ``width`` and ``height`` in pixels, 0 where the file does not tell."""

    id: int
    file_name: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class CategoryEntry:
    """One class of the annotation file."""

    id: int
    name: str


@dataclass(frozen=True)
class GroundTruth:
    """A checked COCO annotation file.

    Attributes:
        path: where it was read from.
        sha256: of the file's bytes.
        document: the file's content after repair, as pycocotools takes it; not to be changed.
        images: in the file's order.
        categories: in the file's order, which is the order of MMDetection's labels.
        has_masks: some annotation has a segmentation.
        has_keypoints: some annotation has keypoints.
        notes: what was repaired or is strange, one sentence each.
        zero_id: the new id of the annotation that has the id 0 in the file, if one has.
    """

    path: Path
    sha256: str
    document: Mapping[str, Any] = field(repr=False)
    images: tuple[ImageEntry, ...] = field(repr=False)
    categories: tuple[CategoryEntry, ...]
    has_masks: bool
    has_keypoints: bool
    notes: tuple[str, ...] = ()
    zero_id: int | None = None

    @property
    def annotations(self) -> Sequence[Mapping[str, Any]]:
        """The annotations, each with ``id``, ``area`` and ``iscrowd``."""
        annotations: Sequence[Mapping[str, Any]] = self.document["annotations"]
        return annotations

    @cached_property
    def image_ids(self) -> frozenset[int]:
        """The ids of all images."""
        return frozenset(image.id for image in self.images)

    @cached_property
    def category_ids(self) -> frozenset[int]:
        """The ids of all categories."""
        return frozenset(category.id for category in self.categories)

    @cached_property
    def objects_per_category(self) -> dict[int, int]:
        """Category id to its number of annotations; crowds are not objects."""
        counts = Counter(one["category_id"] for one in self.annotations if not one["iscrowd"])
        return {category.id: counts[category.id] for category in self.categories}

    @property
    def objects(self) -> int:
        """The number of annotations that a detector is to find: all but the crowds."""
        return sum(self.objects_per_category.values())

    def image_files(self, folder: Path) -> tuple[dict[int, Path], tuple[ImageEntry, ...]]:
        """Find the images in a folder: by their ``file_name``, else by its last part, there or anywhere below.

        Returns:
            Image id to file, in the order of the annotations; and the images that have no file.

        Raises:
            GroundTruthError: there is no such folder, or two files below it have the name of one image.
        """
        if not folder.is_dir():
            raise GroundTruthError(f"got {folder}, expected the folder with the images of {self.path}. Check the path.")
        by_name: dict[str, list[Path]] | None = None
        found: dict[int, Path] = {}
        missing: list[ImageEntry] = []
        for image in self.images:
            name = base_name(image.file_name)
            near = [folder / name] if _leads_out(image.file_name) else [folder / image.file_name, folder / name]
            file = next((one for one in near if name and one.is_file()), None)
            if file is None:
                if by_name is None:
                    by_name = {}
                    for one in sorted(folder.rglob("*")):
                        by_name.setdefault(one.name, []).append(one)
                others = [one for one in by_name.get(name, []) if one.is_file()]
                if len(others) > 1:
                    raise GroundTruthError(
                        f"image {image.id} ({image.file_name}) could be {others[0]} or {others[1]}. "
                        "Name the folder that file_name begins in."
                    )
                file = next(iter(others), None)
            if file is None:
                missing.append(image)
            else:
                found[image.id] = file
        return found, tuple(missing)

    def restricted_to(self, image_ids: Collection[int]) -> "GroundTruth":
        """Return the same with these images only; all categories stay.

        Raises:
            GroundTruthError: an id that is not there.
        """
        wanted = set(image_ids)
        if unknown := sorted(wanted - self.image_ids):
            raise GroundTruthError(f"{self.path} has no image with the id {_some(unknown)}")
        document = {
            **self.document,
            "images": [image for image in self.document["images"] if image["id"] in wanted],
            "annotations": [one for one in self.annotations if one["image_id"] in wanted],
        }
        images = tuple(image for image in self.images if image.id in wanted)
        return replace(self, document=document, images=images)

    def with_categories(self, names: Collection[str]) -> "GroundTruth":
        """Return the same with the categories of these names only; all images stay.

        Raises:
            GroundTruthError: there is none of these names.
        """
        kept = tuple(category for category in self.categories if category.name in names)
        if not kept:
            raise GroundTruthError(f"{self.path} has no category of the names {_some(sorted(names))}")
        ids = {category.id for category in kept}
        document = {
            **self.document,
            "categories": [category for category in self.document["categories"] if category["id"] in ids],
            "annotations": [one for one in self.annotations if one["category_id"] in ids],
        }
        return replace(self, document=document, categories=kept)


def load_ground_truth(path: Path) -> GroundTruth:
    """Read, check and repair a COCO annotation file.

    Annotations without ``id``, ``area`` or ``iscrowd`` get them; if an id is 0 or missing, all are numbered again.
    Every repair is told in ``notes``.

    Raises:
        GroundTruthError: not JSON, not COCO, or an annotation that points at what is not there.
    """
    try:
        content = path.read_bytes()
        document = json.loads(content)
    except OSError as error:
        raise GroundTruthError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise GroundTruthError(f"{path}: expected a COCO annotation file in JSON: {error}") from None
    return ground_truth_of(document, path=path, sha256=hashlib.sha256(content).hexdigest())


def ground_truth_of(document: object, *, path: Path, sha256: str = "") -> GroundTruth:
    """Check and repair annotations that are in memory; ``path`` names them in messages.

    Raises:
        GroundTruthError: as `load_ground_truth`.
    """
    if not isinstance(document, dict):
        kind = "a list, as COCO results are" if isinstance(document, list) else type(document).__name__
        raise GroundTruthError(f"{path}: got {kind}, expected COCO annotations: an object with images, categories")
    if absent := [key for key in ("images", "annotations", "categories") if not isinstance(document.get(key), list)]:
        raise GroundTruthError(
            f"{path}: expected COCO annotations, but there is no list {' and no list '.join(absent)}. Images without "
            'any object still need "annotations": [].'
        )
    for key in ("images", "annotations", "categories"):
        if wrong := [place for place, one in enumerate(document[key]) if not isinstance(one, dict)]:
            raise GroundTruthError(f"{path}: {key}[{wrong[0]}] is no object")
    images = tuple(_image(path, place, one) for place, one in enumerate(document["images"]))
    categories = tuple(_category(path, place, one) for place, one in enumerate(document["categories"]))
    if not images:
        raise GroundTruthError(f"{path}: got no image, expected at least one")
    _unique(path, "image", [image.id for image in images])
    _unique(path, "category", [category.id for category in categories])
    notes: list[str] = []
    names = Counter(category.name for category in categories)
    if twice := [name for name, count in names.items() if count > 1]:
        notes.append(f"more than one category has the name {_some(twice)}")
    annotations = _annotations(path, document["annotations"], images, categories, notes)
    zero_id = next(
        (new["id"] for old, new in zip(document["annotations"], annotations, strict=True) if old.get("id") == 0), None
    )
    return GroundTruth(
        path=path,
        sha256=sha256,
        document={**document, "annotations": annotations},
        images=images,
        categories=categories,
        has_masks=any(one.get("segmentation") for one in annotations),
        has_keypoints=any(one.get("keypoints") for one in annotations),
        notes=tuple(notes),
        zero_id=zero_id,
    )


def base_name(file_name: str) -> str:
    """Return the last part of a path written on any system."""
    return PureWindowsPath(PurePosixPath(file_name).name).name


def _image(path: Path, place: int, entry: Mapping[str, Any]) -> ImageEntry:
    identifier = _identifier(path, f"images[{place}]", entry, "id")
    name = entry.get("file_name", "")
    width, height = entry.get("width", 0), entry.get("height", 0)
    if not isinstance(name, str) or not all(_is_number(one) and one >= 0 for one in (width, height)):
        raise GroundTruthError(
            f"{path}: image {identifier}: expected file_name as text, width and height in pixels; "
            f"got {name!r}, {width!r} and {height!r}"
        )
    return ImageEntry(identifier, name, int(width), int(height))


def _category(path: Path, place: int, entry: Mapping[str, Any]) -> CategoryEntry:
    identifier = _identifier(path, f"categories[{place}]", entry, "id")
    if not isinstance(entry.get("name"), str):
        raise GroundTruthError(f"{path}: category {identifier}: got no name, expected a text")
    return CategoryEntry(identifier, entry["name"])


def _annotations(
    path: Path,
    entries: Sequence[Mapping[str, Any]],
    images: Iterable[ImageEntry],
    categories: Iterable[CategoryEntry],
    notes: list[str],
) -> list[dict[str, Any]]:
    known = {"image_id": {image.id for image in images}, "category_id": {category.id for category in categories}}
    annotations = [dict(entry) for entry in entries]
    for key, ids in known.items():
        what = key.removesuffix("_id")
        wrong = [entry for entry in annotations if not _is_id(entry.get(key)) or entry[key] not in ids]
        if wrong:
            raise GroundTruthError(
                f"{path}: {len(wrong)} of {len(annotations)} annotations are of no {what} that the file has "
                f"({key} {_some([entry.get(key) for entry in wrong])}). Remove them, or add the {what}."
            )
    repaired: Counter[str] = Counter()
    for place, entry in enumerate(annotations):
        box = entry.get("bbox")
        if box is not None and not (
            isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0
        ):
            raise GroundTruthError(
                f"{path}: annotations[{place}] (id {entry.get('id')}): got the bbox {box!r}, expected "
                "[x, y, width, height] in pixels, the sizes not negative"
            )
        if entry.get("iscrowd") is None:
            entry["iscrowd"] = 0
            repaired["iscrowd"] += 1
        if not _is_number(entry.get("area")):
            if box is None:
                raise GroundTruthError(
                    f"{path}: annotations[{place}] has neither an area nor a bbox to compute it from"
                )
            # The box's: the mask's own would need its decoding, and MMDetection's converters write this too.
            entry["area"] = box[2] * box[3]
            repaired["area"] += 1
    if repaired["iscrowd"]:
        notes.append(f"{repaired['iscrowd']} annotations without iscrowd count as single objects")
    if repaired["area"]:
        notes.append(f"{repaired['area']} annotations without area got that of their box")
    _number(path, annotations, notes)
    return annotations


def _number(path: Path, annotations: list[dict[str, Any]], notes: list[str]) -> None:
    """Give every annotation an id of its own, none of them 0."""
    ids = [one.get("id") for one in annotations]
    absent = sum(one is None for one in ids)
    if strange := [one for one in ids if one is not None and not _is_id(one)]:
        raise GroundTruthError(f"{path}: got the annotation id {_some(strange)}, expected whole numbers")
    _unique(path, "annotation", [one for one in ids if one is not None])
    if not absent and 0 not in ids:
        return
    for number, one in enumerate(annotations, start=1):
        one["id"] = number
    if absent:
        notes.append(f"{absent} annotations without id: all are numbered from 1")
    if 0 in ids:
        notes.append(
            "an annotation has the id 0, which pycocotools and MMDetection count as never found: all get new ids"
        )


def _identifier(path: Path, where: str, entry: Mapping[str, Any], key: str) -> int:
    value = entry.get(key)
    if not _is_id(value):
        raise GroundTruthError(f"{path}: {where}: got the {key} {value!r}, expected a whole number")
    return int(value)  # type: ignore[arg-type]


def _unique(path: Path, what: str, ids: Sequence[int]) -> None:
    if twice := [one for one, count in Counter(ids).items() if count > 1]:
        raise GroundTruthError(
            f"{path}: the {what} id {_some(twice)} comes more than once. Every {what} needs an id of its own."
        )


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _leads_out(file_name: str) -> bool:
    """Whether a ``file_name`` points out of the folder that it is looked up in."""
    return Path(file_name).is_absolute() or ".." in Path(file_name).parts


def _some(values: Sequence[object]) -> str:
    """Return the first few different values as text."""
    different = list(dict.fromkeys(map(repr, values)))
    return ", ".join(different[:SHOWN]) + (f" and {len(different) - SHOWN} more" if len(different) > SHOWN else "")
