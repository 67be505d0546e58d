"""What is converted: the parts of a data set, and a reader that takes any few images of a part.

    cityscapes_parts · voc_parts · yolo_parts · loaded_parts ─► reader, [Part, …]

A reader is sent to other processes; what one of its calls reads does not depend on the other calls. Cityscapes' is
imported where it is used: the processes that read other formats need not wait for NumPy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dettools.datasets.dataset import Dataset, DatasetFormatError, DocumentBuilder, is_key
from dettools.datasets.voc import Pictures, annotation_files, read_voc_file, voc_roots
from dettools.datasets.yolo import Description, describe, image_files, label_file, orphaned_labels, read_yolo_image

VOC_SPLITS = ("train", "val", "trainval", "test")
_VOC_YEARS = {"VOC2007": "voc07", "VOC2012": "voc12"}


@dataclass(frozen=True)
class Part:
    """A split: ``name`` (empty for a data set without splits) and what a reader takes, one an image."""

    name: str
    items: Sequence[Any] = field(repr=False)


class Reader(Protocol):
    """Reads images."""

    @property
    def kind(self) -> str:
        """The format."""

    @property
    def at_once(self) -> int:
        """So many images are one piece of work."""

    @property
    def categories(self) -> Mapping[Any, tuple[int, str]] | None:
        """Key of a class, as ``category_id`` has it, to id and name; None where the images tell."""

    def read(self, items: Sequence[Any], builder: DocumentBuilder) -> None:
        """Add the images of a part with their objects."""

    def left_out(self, parts: Sequence[Part], /) -> Sequence[tuple[str, str]]:
        """Return what no call of `read` meets: reasons and details."""


@dataclass(frozen=True)
class CityscapesReader:
    """Photographs and their pictures of numbers."""

    photographs: Path
    truth: Path
    masks: bool = True
    kind: str = "cityscapes"
    at_once: int = 8

    @property
    def categories(self) -> Mapping[Any, tuple[int, str]]:
        """Cityscapes' own ids."""
        from dettools.datasets.cityscapes import LABELS

        return {identifier: (identifier, name) for identifier, name in LABELS.items()}

    def read(self, items: Sequence[Path], builder: DocumentBuilder) -> None:
        """Add photographs."""
        from dettools.datasets.cityscapes import read_photograph

        for file in items:
            if not read_photograph(file, self.photographs, self.truth, builder, masks=self.masks):
                builder.problem("no_truth", f"{file.name}: counts as empty", len(builder.images) - 1)

    def left_out(self, _parts: Sequence[Part], /) -> Sequence[tuple[str, str]]:
        """Nothing."""
        return ()


@dataclass(frozen=True)
class VocReader:
    """XML files; a class's key is its name."""

    folder: Path
    pictures: Pictures
    classes: tuple[str, ...] = ()
    kind: str = "voc"
    at_once: int = 256

    @property
    def categories(self) -> Mapping[Any, tuple[int, str]] | None:
        """Those that were named, else those that occur."""
        named = {name: (number, name) for number, name in enumerate(self.classes, start=1)}
        return named or None

    def read(self, items: Sequence[str], builder: DocumentBuilder) -> None:
        """Add XML files; boxes count from 0 (`dettools.datasets.voc.count_from`)."""
        for file in items:
            read_voc_file(Path(file), self.folder, self.pictures, builder)

    def left_out(self, _parts: Sequence[Part], /) -> Sequence[tuple[str, str]]:
        """Nothing."""
        return ()


@dataclass(frozen=True)
class YoloReader:
    """Photographs and their label files; a class's key is its number and 1."""

    root: Path
    description: Description
    kind: str = "yolo"
    at_once: int = 256

    @property
    def categories(self) -> Mapping[Any, tuple[int, str]] | None:
        """Of ``data.yaml`` or ``classes.txt``."""
        names = self.description.names
        return {number: (number, name) for number, name in enumerate(names, start=1)} if names else None

    def read(self, items: Sequence[Path], builder: DocumentBuilder) -> None:
        """Add photographs."""
        for file in items:
            read_yolo_image(file, label_file(file), self.root, self.description.keypoints, builder)

    def left_out(self, parts: Sequence[Part], /) -> Sequence[tuple[str, str]]:
        """Labels without a photograph."""
        files = {label_file(file) for part in parts for file in part.items}
        return [("missing_file", detail) for detail in orphaned_labels(files)]


@dataclass(frozen=True)
class LoadedReader:
    """A data set in memory, as a COCO file has to be; its items are places of images."""

    dataset: Dataset
    kind: str = "coco"
    at_once: int = 256

    @property
    def categories(self) -> Mapping[Any, tuple[int, str]]:
        """Of the document."""
        return {identifier: (identifier, name) for identifier, name in self.dataset.names.items()}

    def read(self, items: Sequence[int], builder: DocumentBuilder) -> None:
        """Add images with the ids that they have."""
        for place in items:
            builder.images.append(dict(self.dataset.images[place]))
            builder.files.append(self.dataset.files[place])
            for one in self.dataset.annotations_of.get(place, []):
                builder.annotations.append({**self.dataset.annotations[one], "image_id": len(builder.images)})

    def left_out(self, _parts: Sequence[Part], /) -> Sequence[tuple[str, str]]:
        """Objects of no image."""
        places = self.dataset.image_places
        return [
            ("unknown_image", f"annotation {one.get('id')}: image_id {one.get('image_id')!r}")
            for one in self.dataset.annotations
            if not is_key(one.get("image_id")) or one["image_id"] not in places
        ]


def cityscapes_parts(
    folder: Path, images: Path, truth: Path, *, split: str | None, masks: bool
) -> tuple[CityscapesReader, list[Part]]:
    """Return the splits that are there, or the one of a name.

    Raises:
        DatasetFormatError: there is no photograph.
    """
    from dettools.datasets.cityscapes import IMAGES, photograph_files

    photographs = folder / images
    names = [split] if split else sorted(one.name for one in photographs.glob("*") if one.is_dir())
    if not names:
        raise DatasetFormatError(
            f"{photographs}: expected folders such as train and val with *_{IMAGES}.png. Name the folder: --img-dir"
        )
    reader = CityscapesReader(photographs, folder / truth, masks)
    return reader, [Part(name, photograph_files(photographs, name)) for name in names]


def voc_parts(
    folder: Path, images: Path | None, *, split: str | None, overlapping: bool, classes: Sequence[str] = ()
) -> tuple[VocReader, list[Part]]:
    """Return the splits of ``ImageSets/Main``, of each year and of both joined; without splits, all of a folder.

    Args:
        folder: a VOCdevkit, a year's folder, or one with XML files.
        images: folder of the images; None looks for it.
        split: this one only.
        overlapping: also ``trainval``, and the two years joined; else each image comes once.
        classes: these only, in this order.

    Raises:
        DatasetFormatError: no XML file, or no such split.
    """
    roots = voc_roots(folder)
    if not roots:
        raise DatasetFormatError(f"{folder}: got no XML file, expected Pascal VOC annotations, one an image.")
    found: dict[str, list[str]] = {}
    for root in roots:
        there = [one for one in VOC_SPLITS if (root / "ImageSets" / "Main" / f"{one}.txt").is_file()]
        if not overlapping and {"train", "val"} <= set(there):
            there = [one for one in there if one != "trainval"]
        names: list[str | None] = [split] if split else [*there] or [None]
        for name in names:
            year = _VOC_YEARS.get(root.name, root.name) if len(roots) > 1 or root.name in _VOC_YEARS else ""
            full = "_".join(part for part in (year, name) if part) if overlapping else name or ""
            found.setdefault(full, []).extend(annotation_files(root, name))
    if overlapping:
        for name in VOC_SPLITS[:3]:
            years = [found.get(f"{year}_{name}") for year in _VOC_YEARS.values()]
            if all(years):
                found[f"voc0712_{name}"] = [file for files in years for file in files or ()]
    reader = VocReader(folder, Pictures(folder, images), tuple(classes))
    return reader, [Part(name, files) for name, files in found.items() if files]


def yolo_parts(path: Path, images: Path | None, *, split: str | None) -> tuple[YoloReader, list[Part]]:
    """Return the splits of ``data.yaml``, or the one of a name.

    Raises:
        DatasetFormatError: no image, no such split, or a damaged ``data.yaml``.
    """
    description = describe(path)
    if images is not None:
        description = Description(description.names, {"": [images]}, description.keypoints)
    names = [split] if split else list(description.sources)
    seen: set[Path] = set()
    parts = []
    for name in names:
        files = [file for file in image_files(description, name, path) if file not in seen]
        seen.update(files)
        if files:
            parts.append(Part(name, files))
    return YoloReader(path if path.is_dir() else path.parent, description), parts


def loaded_parts(dataset: Dataset) -> tuple[LoadedReader, list[Part]]:
    """Return a data set in memory as one part."""
    return LoadedReader(dataset), [Part("", range(len(dataset.images)))]
