"""The formats of data sets: which one a path has, and who reads it.

A new format is one file with a reader, one line in `READERS` and one in `format_of`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from detserve.mmdet_dataset import Split, read_dataset

from dettools.datasets.cityscapes import IMAGES, TRUTH, read_cityscapes
from dettools.datasets.coco import read_coco
from dettools.datasets.dataset import Dataset, DatasetFormatError, Progress
from dettools.datasets.voc import read_voc, voc_roots
from dettools.datasets.yolo import data_yaml, is_data_yaml, read_yolo


@dataclass(frozen=True)
class Source:
    """What to read.

    Attributes:
        path: file or folder.
        images: folder of the images, where it cannot be told from the path.
        annotations: of a config's data set, instead of those it names.
        split: which part; None for all of it, of a config the training data.
        number: of the data sets that a config joins, from 1.
        allow_code: a config that is more than assignments is run.
        progress: told of the files that are read.
    """

    path: Path
    images: Path | None = None
    annotations: Path | None = None
    split: str | None = None
    number: int | None = None
    allow_code: bool = False
    progress: Progress | None = None


def load_dataset(source: Source, kind: str | None = None) -> Dataset:
    """Read a data set of the format ``kind``, else of the one that its path has.

    Raises:
        DatasetFormatError: no such path, or none of the formats.
        DetserveError: as the format's reader.
    """
    if not source.path.exists():
        raise DatasetFormatError(f"got {source.path}, expected a data set: {EXPECTED}. There is no such path.")
    kind = kind or format_of(source.path)
    if kind != "mmdet" and (source.annotations is not None or source.number is not None):
        raise DatasetFormatError(
            f"--annotations and --dataset are of an MMDetection config; {source.path} is read as {kind}. Leave them out"
        )
    return READERS[kind](source)


def format_of(path: Path) -> str:
    """Return the key in `READERS` of what a path holds.

    Raises:
        DatasetFormatError: none that is known.
    """
    if path.is_file():
        if path.suffix == ".json":
            return "coco"
        if path.suffix in (".yaml", ".yml"):
            return "yolo" if is_data_yaml(path) else "mmdet"
        if path.suffix == ".py":
            return "mmdet"
    elif (path / IMAGES).is_dir() and (path / TRUTH).is_dir():
        return "cityscapes"
    elif data_yaml(path) is not None or ((path / "labels").is_dir() and any((path / "labels").rglob("*.txt"))):
        return "yolo"
    elif voc_roots(path):
        return "voc"
    elif _annotation_files(path):
        return "coco"
    raise DatasetFormatError(f"got {path}, expected a data set: {EXPECTED}. Name the format with --format.")


def _annotation_files(folder: Path) -> list[Path]:
    for inner in (folder, folder / "annotations"):
        # What convert-dataset writes beside them is none.
        if files := sorted(file for file in inner.glob("*.json") if not file.name.endswith(".report.json")):
            return files
    return []


def _coco(source: Source) -> Dataset:
    path = source.path
    if path.is_dir():
        files = _annotation_files(path)
        named = [file for file in files if source.split is None or source.split in file.stem]
        if len(named) != 1:
            there = ", ".join(file.name for file in files) or "none"
            raise DatasetFormatError(f"{path}: expected one COCO annotation file, there are: {there}. Name the file.")
        path = named[0]
    elif source.split:
        raise DatasetFormatError(f"--split {source.split}: {path.name} is one COCO file, without splits. Leave it out.")
    return read_coco(path, images=source.images)


def _voc(source: Source) -> Dataset:
    return read_voc(_folder(source), images=source.images, split=source.split, progress=source.progress)


def _yolo(source: Source) -> Dataset:
    return read_yolo(source.path, images=source.images, split=source.split, progress=source.progress)


def _cityscapes(source: Source) -> Dataset:
    return read_cityscapes(_folder(source), images=source.images, split=source.split, progress=source.progress)


def _mmdet(source: Source) -> Dataset:
    splits: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}
    split = source.split or "train"
    if split not in splits:
        raise DatasetFormatError(f"--split {split}: a config has train, val and test.")
    try:
        named = read_dataset(
            source.path,
            split=splits[split],
            number=source.number,
            annotations=source.annotations,
            images=source.images,
            allow_code=source.allow_code,
        )
    except yaml.YAMLError as error:
        raise DatasetFormatError(f"{source.path}: cannot be read as YAML: {error}") from None
    dataset = read_coco(named.annotations, images=named.images, kind="mmdet")
    notes = (f"{named.annotations} with the images of {named.images}", *named.notes, *dataset.notes)
    return replace(_with_classes(dataset, named.class_names), notes=notes)


def _with_classes(dataset: Dataset, names: tuple[str, ...]) -> Dataset:
    """Leave out the objects of other classes, as training does; what is of no class at all stays to be shown."""
    others = {identifier for identifier, name in dataset.names.items() if names and name not in names}
    if not others:
        return dataset
    document = {
        **dataset.document,
        "annotations": [one for one in dataset.annotations if one.get("category_id") not in others],
        "categories": [one for one in dataset.document["categories"] if one.get("id") not in others],
    }
    return replace(dataset, document=document)


def _folder(source: Source) -> Path:
    if not source.path.is_dir():
        raise DatasetFormatError(f"got {source.path}, expected a folder.")
    return source.path


READERS: dict[str, Callable[[Source], Dataset]] = {
    "coco": _coco,
    "voc": _voc,
    "yolo": _yolo,
    "cityscapes": _cityscapes,
    "mmdet": _mmdet,
}
EXPECTED = (
    "a COCO annotation file (.json), a folder of Pascal VOC XML files, YOLO's data.yaml or a folder with images and "
    "labels, a Cityscapes folder with leftImg8bit and gtFine, or an MMDetection config (.py)"
)
