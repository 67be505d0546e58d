"""Cityscapes: the objects of a street scene as one picture of numbers.

    leftImg8bit/{split}/{city}/x_leftImg8bit.png        the photograph
    gtFine/{split}/{city}/x_gtFine_instanceIds.png      24 and more: label · 1000 + number, or the label of a group

Of the labels with instances those are taken that Cityscapes evaluates (cityscapesScripts, ``labels.py``); caravans and
trailers are not. Category ids are Cityscapes' own. A group that could not be told apart is a crowd.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dettools.datasets.dataset import Dataset, DatasetFormatError, DocumentBuilder, Progress, read_header

LABELS = {
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
IMAGES, TRUTH = "leftImg8bit", "gtFine"
_FIRST_LABEL, _LAST_NUMBER = 24, 33_999


def read_cityscapes(
    folder: Path, *, images: Path | None = None, split: str | None = None, progress: Progress | None = None
) -> Dataset:
    """Read a folder with ``leftImg8bit`` and ``gtFine``; masks become COCO RLE.

    Args:
        folder: that holds both.
        images: instead of ``folder/leftImg8bit``.
        split: train, val or test; None reads all that are there.
        progress: told of each photograph.

    Raises:
        DatasetFormatError: there is no photograph, or no such split.
    """
    photographs, truth = images or folder / IMAGES, folder / TRUTH
    files = photograph_files(photographs, split)
    builder = DocumentBuilder()
    unlabelled = 0
    for number, file in enumerate(files, start=1):
        unlabelled += not read_photograph(file, photographs, truth, builder)
        if progress:
            progress(number, len(files))
    notes = []
    if unlabelled:
        notes.append(f"{unlabelled} of {len(files)} photographs have no {TRUTH} picture: they count as empty")
    categories = [{"id": identifier, "name": name} for identifier, name in LABELS.items()]
    return builder.finish("cityscapes", folder, categories, notes)


def photograph_files(photographs: Path, split: str | None) -> list[Path]:
    """Return the photographs of a split, else all.

    Raises:
        DatasetFormatError: there is none.
    """
    within = f"{split}/" if split else ""
    files = sorted(photographs.glob(f"{within}**/*_{IMAGES}.png"))
    if not files:
        there = ", ".join(sorted(one.name for one in photographs.glob("*") if one.is_dir()))
        raise DatasetFormatError(
            f"{photographs}/{within}: got no *_{IMAGES}.png, expected Cityscapes' photographs"
            + (f"; there are {there}." if there else ".")
        )
    return files


def read_photograph(
    file: Path, photographs: Path, truth: Path, builder: DocumentBuilder, *, masks: bool = True
) -> bool:
    """Add a photograph with its objects; return whether it has a picture of numbers."""
    relative = file.relative_to(photographs)
    stem = file.name.removesuffix(f"_{IMAGES}.png")
    numbers = truth / relative.parent / f"{stem}_{TRUTH}_instanceIds.png"
    try:
        size = read_header(file).shown
    except OSError:
        size = (0, 0)
    image = builder.image(relative.as_posix(), size, file)
    if not numbers.is_file():
        return False
    _read_objects(numbers, image, builder, masks=masks)
    return True


def _read_objects(path: Path, image: int, builder: DocumentBuilder, *, masks: bool) -> None:
    from hotcoco import mask
    from scipy.ndimage import find_objects

    try:
        with Image.open(path) as picture:
            numbers = np.asarray(picture)
    except (OSError, ValueError, SyntaxError) as error:
        builder.problem("bad_label", f"{path.name}: cannot be read: {error}", image)
        return
    if numbers.ndim != 2:
        builder.problem("bad_label", f"{path.name}: got {numbers.shape[2]} channels, expected one of numbers", image)
        return
    height, width = numbers.shape
    entry = builder.images[image]
    if (entry["width"], entry["height"]) != (width, height):
        shown = f"{entry['width']} × {entry['height']}"
        builder.problem("bad_label", f"{path.name}: got {width} × {height}, the photograph has {shown}", image)
        return
    values = np.unique(numbers[numbers >= _FIRST_LABEL])
    if values.max(initial=0) > _LAST_NUMBER:
        builder.problem("bad_label", f"{path.name}: got the number {values[-1]}, expected up to {_LAST_NUMBER}", image)
        return
    places = np.zeros(_LAST_NUMBER + 1, np.int32)
    places[values] = np.arange(1, len(values) + 1)
    objects = places[numbers.clip(0)]
    for place, (value, region) in enumerate(zip(values.tolist(), find_objects(objects), strict=True), start=1):
        crowd = value < 1000
        label = value if crowd else value // 1000
        if label not in LABELS:
            continue
        rows, columns = region
        inside = objects[region] == place
        box = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        if not masks:
            builder.annotation(image, label, box, area=float(inside.sum()), iscrowd=int(crowd))
            continue
        rle = mask.frPyObjects(_runs(inside, rows, columns, (height, width)), height, width)
        segmentation = {"size": [height, width], "counts": rle["counts"].decode()}
        builder.annotation(image, label, box, area=float(inside.sum()), iscrowd=int(crowd), segmentation=segmentation)


def _runs(inside: npt.NDArray[np.bool_], rows: slice, columns: slice, size: tuple[int, int]) -> dict[str, list[int]]:
    """Return the RLE of an object from its own columns: COCO's runs go down them, the others are background."""
    height, width = size
    strip = np.zeros((height, inside.shape[1]), np.bool_)
    strip[rows] = inside
    column_major = strip.ravel(order="F")
    edges = np.flatnonzero(np.diff(column_major, prepend=False, append=False)) + height * columns.start
    counts = np.diff(edges, prepend=0).tolist()
    rest = height * width - int(edges[-1])
    return {"size": [height, width], "counts": [*counts, rest] if rest else counts}
