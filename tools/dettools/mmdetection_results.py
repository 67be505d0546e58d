"""MMDetection's result pickles, as detections with labels; what a label stands for is not in them.

3.x (`tools/test.py --out`): a list of dicts, one per image, with ``img_id``, ``img_path``, ``ori_shape`` and
``pred_instances`` (``bboxes (N, 4)`` xyxy px of the original image, ``scores``, ``labels``, ``masks`` as RLE).
2.x: a list, one entry per image *in the order of the annotation file's images* (``CocoDataset.load_annotations`` takes
``coco.getImgIds()``, which is the order of the file, and drops none when it tests); an entry is a list with one
``(N, 5)`` array ``x1, y1, x2, y2, score`` per class, or a pair of that and the masks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from detserve.errors import DetserveError

from dettools.ground_truth import GroundTruth, base_name

# What export services round sizes by.
SIZE_TOLERANCE_PX = 2


class ResultsFormatError(DetserveError):
    """A pickle is not what MMDetection writes, or does not belong to the annotations."""


@dataclass(frozen=True)
class ImageResult:
    """The detections of one image.

    Attributes:
        boxes_xyxy: ``(N, 4)`` float64, pixels of the original image.
        scores: ``(N,)`` float64.
        labels: ``(N,)`` int64.
        masks: one COCO RLE per detection, its counts as text, or None.
        mask_scores: ``(N,)`` float64 where the model scores its masks by themselves, or None.
    """

    image_id: int
    boxes_xyxy: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    masks: tuple[dict[str, Any], ...] | None = None
    mask_scores: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True)
class MmdetectionResults:
    """A result pickle: ``version`` 2 or 3, its images, the number of classes if told, and notes."""

    version: int
    images: tuple[ImageResult, ...]
    classes: int | None
    notes: tuple[str, ...] = ()


def read_results(document: object, ground_truth: GroundTruth) -> MmdetectionResults:
    """Tell which MMDetection wrote it, and read it.

    Raises:
        ResultsFormatError: neither did, or the images are not those of the annotations.
    """
    if not isinstance(document, list):
        raise ResultsFormatError(f"got {_kind(document)}, expected MMDetection's list with one entry per image")
    if all(isinstance(entry, dict) for entry in document):
        return _version_3(document, ground_truth)
    return _version_2(document, ground_truth)


def _version_3(entries: Sequence[Mapping[str, Any]], ground_truth: GroundTruth) -> MmdetectionResults:
    identifiers, notes = _image_ids(entries, ground_truth)
    images = []
    other_shapes = 0
    shapes = {image.id: (image.height, image.width) for image in ground_truth.images}
    for place, (entry, image_id) in enumerate(zip(entries, identifiers, strict=True)):
        where = f"entry {place} (image {image_id})"
        found = entry.get("pred_instances")
        if not isinstance(found, dict) or not {"bboxes", "scores", "labels"} <= found.keys():
            raise ResultsFormatError(
                f"{where}: expected pred_instances with bboxes, scores and labels, as tools/test.py --out of "
                f"MMDetection 3.x writes them; got {_kind(found)}"
            )
        masks = found.get("masks")
        mask_scores = found.get("mask_scores")
        one = ImageResult(
            image_id,
            _table(found["bboxes"], 4, where),
            _column(found["scores"], np.float64, where),
            _column(found["labels"], np.int64, where),
            None if masks is None else tuple(_rle(mask, where) for mask in masks),
            None if mask_scores is None else _column(mask_scores, np.float64, where),
        )
        images.append(_consistent(one, where))
        other_shapes += _another_shape(entry.get("ori_shape"), shapes[image_id])
    if other_shapes:
        notes.append(f"{other_shapes} of {len(images)} images have another size in the annotations than in the results")
    return MmdetectionResults(3, tuple(images), None, tuple(notes))


def _another_shape(told: object, annotated: tuple[int, int]) -> bool:
    """Whether the sizes differ by more than a rounding: such boxes do not lie where the objects are."""
    if not isinstance(told, list | tuple) or not all(annotated):
        return False
    return any(abs(one - other) > SIZE_TOLERANCE_PX for one, other in zip(told, annotated, strict=False))


def _image_ids(entries: Sequence[Mapping[str, Any]], ground_truth: GroundTruth) -> tuple[list[int], list[str]]:
    """Return the image id of every entry: its ``img_id``, checked by the file name; or by the file name alone."""
    by_name: dict[str, list[int]] = {}
    for image in ground_truth.images:
        by_name.setdefault(base_name(image.file_name), []).append(image.id)
    names = [base_name(entry["img_path"]) if isinstance(entry.get("img_path"), str) else None for entry in entries]
    told = [_whole(entry.get("img_id")) for entry in entries]
    by_id = {image.id: base_name(image.file_name) for image in ground_truth.images}
    fits = [one in by_id and (name is None or name == by_id[one]) for one, name in zip(told, names, strict=True)]
    notes: list[str] = []
    if all(fits):
        identifiers = [one for one in told if one is not None]
    elif len(set(names)) == len(names) and all(name is not None and len(by_name.get(name, ())) == 1 for name in names):
        identifiers = [by_name[name][0] for name in names if name is not None]
        notes.append("images are found by their file names: img_id in the results is not that of the annotations")
    elif all(one in by_id for one in told) and not any(name in by_name for name in names):
        identifiers = [one for one in told if one is not None]
        notes.append("images are found by img_id: no file name of the results is in the annotations")
    else:
        place = fits.index(False)
        raise ResultsFormatError(
            f"entry {place}: got img_id {entries[place].get('img_id')!r} and img_path "
            f"{entries[place].get('img_path')!r}, but {ground_truth.path} has "
            f"{by_id.get(told[place] or 0, 'no such image')!r} for that id. "
            "Give the annotations that these predictions were made with."
        )
    if len(set(identifiers)) != len(identifiers):
        twice = next(one for one in identifiers if identifiers.count(one) > 1)
        raise ResultsFormatError(
            f"image {twice} comes more than once. Results of several processes overlap; remove one of each."
        )
    if left := len(ground_truth.images) - len(identifiers):
        notes.append(
            f"{left} of {len(ground_truth.images)} images have no entry: they count as images without detections"
        )
    return identifiers, notes


def _version_2(entries: Sequence[Any], ground_truth: GroundTruth) -> MmdetectionResults:
    if len(entries) != len(ground_truth.images):
        raise ResultsFormatError(
            f"got {len(entries)} entries, but {ground_truth.path} has {len(ground_truth.images)} images. Results of "
            "MMDetection 2.x have no image ids and are read in the order of the annotation file, so both must be of "
            "the same images."
        )
    images = []
    counts = set()
    for place, (entry, image) in enumerate(zip(entries, ground_truth.images, strict=True)):
        where = f"entry {place} (image {image.id})"
        boxes, masks = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
        scores = None
        if isinstance(masks, tuple) and len(masks) == 2:
            # Mask Scoring R-CNN: the masks, and their own scores.
            masks, scores = masks
        if not isinstance(boxes, list | np.ndarray) or (masks is not None and len(masks) != len(boxes)):
            raise ResultsFormatError(
                f"{where}: expected one (N, 5) array per class, or a pair of these and the masks, as "
                f"tools/test.py --out of MMDetection 2.x writes them; got {_kind(entry)}"
            )
        counts.add(len(boxes))
        rows = [_table(one, 5, where) for one in boxes]
        table = np.concatenate([np.empty((0, 5)), *rows])
        one = ImageResult(
            image.id,
            table[:, :4],
            table[:, 4],
            np.repeat(np.arange(len(rows)), [len(row) for row in rows]),
            None if masks is None else tuple(_rle(mask, where) for of_class in masks for mask in of_class),
            None if scores is None else np.concatenate([np.empty(0), *(np.ravel(of_class) for of_class in scores)]),
        )
        images.append(_consistent(one, where))
    if len(counts) > 1:
        raise ResultsFormatError(f"got entries with {sorted(counts)} classes, expected the same number in all")
    note = "MMDetection 2.x: images are taken in the order of the annotation file"
    return MmdetectionResults(2, tuple(images), next(iter(counts), None), (note,))


def _consistent(one: ImageResult, where: str) -> ImageResult:
    lengths = {
        "boxes": len(one.boxes_xyxy),
        "scores": len(one.scores),
        "labels": len(one.labels),
        **({} if one.masks is None else {"masks": len(one.masks)}),
        **({} if one.mask_scores is None else {"mask scores": len(one.mask_scores)}),
    }
    if len(set(lengths.values())) > 1:
        raise ResultsFormatError(f"{where}: got {', '.join(f'{count} {name}' for name, count in lengths.items())}")
    return one


def _table(value: object, columns: int, where: str) -> npt.NDArray[np.float64]:
    table = _numbers(value, np.float64)
    if table is not None and not table.size:
        return np.empty((0, columns))
    if table is None or table.ndim != 2 or table.shape[1] != columns:
        raise ResultsFormatError(f"{where}: expected an array of the shape (N, {columns}), got {_kind(value)}")
    return table


def _column(value: object, dtype: type[Any], where: str) -> npt.NDArray[Any]:
    column = _numbers(value, dtype)
    if column is None or column.ndim != 1:
        raise ResultsFormatError(f"{where}: expected an array of the shape (N,), got {_kind(value)}")
    return column


def _numbers(value: object, dtype: type[Any]) -> npt.NDArray[Any] | None:
    try:
        return np.asarray(value, dtype)
    except (TypeError, ValueError):
        return None


def _rle(mask: object, where: str) -> dict[str, Any]:
    match mask:
        case {"size": [height, width] | (height, width), "counts": bytes() | str() | list() as counts}:
            text = counts.decode("ascii", "replace") if isinstance(counts, bytes) else counts
            return {"size": [int(height), int(width)], "counts": text}
    raise ResultsFormatError(f"{where}: expected masks as COCO RLE (size, counts), got {_kind(mask)}")


def _whole(value: object) -> int | None:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    return int(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else None


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of the shape {value.shape}"
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(str, list(value)[:5]))}" if value else "an empty dict"
    return type(value).__name__ + (f" of length {len(value)}" if isinstance(value, list | tuple) else "")
