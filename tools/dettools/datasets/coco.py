"""COCO annotation files as they are, and where their images lie."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dettools.datasets.dataset import Dataset, DatasetFormatError
from dettools.ground_truth import GroundTruth, ImageEntry, base_name

# So many names are tried in a folder to tell whether the images lie there.
_TRIED = 20
_UNWRITABLE = re.compile("[\x00-\x1f\ud800-\udfff]")


def read_coco(path: Path, *, images: Path | None = None, kind: str = "coco") -> Dataset:
    """Read a COCO annotation file without checking more than its outline.

    Args:
        path: the JSON file.
        images: the folder that ``file_name`` begins in; None looks for it beside the file.
        kind: the format that the data set is said to have.

    Raises:
        DatasetFormatError: no JSON, or no COCO annotations.
        GroundTruthError: there is no such folder of images, or two files in it have the name of one image.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise DatasetFormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DatasetFormatError(f"{path}: expected a COCO annotation file in JSON: {error}") from None
    notes = list(_outline(document, path))
    document = {**document, "annotations": document.get("annotations", [])}
    names = [str(image.get("file_name") or image.get("coco_url") or "") for image in document["images"]]
    folder = images or next(_folders(path, names), None)
    if folder is None:
        notes.append(
            f"the image files are not beside {path.name}: nothing is drawn and no file is checked. "
            "Name their folder with --images"
        )
        return Dataset(kind, path, document, (None,) * len(names), files_known=False, notes=tuple(notes))
    return Dataset(kind, path, document, _files(path, names, folder), notes=tuple(notes))


def _outline(document: Any, path: Path) -> Iterator[str]:
    """Check that the lists are there; yield notes."""
    if isinstance(document, list):
        raise DatasetFormatError(
            f"{path}: got a list, as COCO results are; expected COCO annotations, an object with images, annotations "
            "and categories."
        )
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise DatasetFormatError(f"{path}: expected COCO annotations, but there is no list images.")
    if "annotations" not in document:
        yield f"{path.name} has no annotations: it lists images only"
    for key in ("images", "annotations", "categories"):
        entries = document.get(key, [] if key == "annotations" else None)
        if not isinstance(entries, list):
            raise DatasetFormatError(f"{path}: expected COCO annotations, but {key} is no list.")
        wrong = next((place for place, one in enumerate(entries) if not isinstance(one, dict)), None)
        if wrong is not None:
            raise DatasetFormatError(f"{path}: {key}[{wrong}] is no object.")
    if not document["images"]:
        raise DatasetFormatError(f"{path}: got no image, expected at least one.")
    for key, name in (("images", "file_name"), ("categories", "name")):
        for place, one in enumerate(document[key]):
            if isinstance(text := one.get(name), str) and not _can_be_written(text):
                raise DatasetFormatError(
                    f"{path}: {key}[{place}]: got the {name} {text[:80]!r}, expected a text that can be a file's name. "
                    "Correct it."
                )


def _can_be_written(text: str) -> bool:
    """Whether a text can stand in XML and be a path; Linux takes 255 bytes a name."""
    if _UNWRITABLE.search(text):
        return False
    return len(text) < 60 or (len(text.encode()) < 4096 and all(len(part.encode()) < 256 for part in text.split("/")))


def _folders(path: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield the folders near an annotation file in which some of its images lie."""
    # instances_val2017.json lies beside val2017/, or in annotations/ beside it.
    part = path.stem.rpartition("_")[2]
    here = path.resolve().parent
    tried = names[:: max(1, len(names) // _TRIED)][:_TRIED]
    for folder in (here, here.parent):
        for inner in ("", part, "images", f"images/{part}", path.stem, "JPEGImages", "data", "train", "val", "test"):
            candidate = folder / inner
            if candidate.is_dir() and any(_is_in(candidate, name) for name in tried):
                yield candidate


def _is_in(folder: Path, name: str) -> bool:
    return bool(name) and ((folder / name).is_file() or (folder / base_name(name)).is_file())


def _files(path: Path, names: Sequence[str], folder: Path) -> tuple[Path | None, ...]:
    """Find each image in a folder as `GroundTruth.image_files` does, whatever its id."""
    entries = tuple(ImageEntry(place, name, 0, 0) for place, name in enumerate(names))
    nothing: Mapping[str, Any] = {}
    found, _ = GroundTruth(path, "", nothing, entries, (), has_masks=False, has_keypoints=False).image_files(folder)
    return tuple(found.get(place) for place in range(len(names)))
