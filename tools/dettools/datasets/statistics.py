"""A data set in figures: objects of each class, their sizes and shapes, how many an image has.

Crowds are counted apart, and boxes without width or height not at all: they are no single objects.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dettools.datasets.dataset import Dataset, box_of, is_id, is_key, is_number, size_of

SIZES = ("small", "medium", "large")
# COCO's areas: below 32² px small, below 96² medium.
SIZE_LIMITS = (32.0**2, 96.0**2)
_RATIO_EDGES = tuple(2.0 ** (exponent / 4) for exponent in range(-16, 17))
_SHARE_EDGES = tuple(share / 20 for share in range(21))
_GRID = 24
# Of objects whose class the data set does not have.
_NO_CLASS = -1


@dataclass(frozen=True)
class Distribution:
    """Values in bins: ``counts[i]`` lie from ``edges[i]`` to ``edges[i + 1]``; the outermost take what lies beyond."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    mean: float | None
    median: float | None
    p05: float | None
    p95: float | None


@dataclass(frozen=True)
class ClassFigures:
    """One class; ``objects`` without crowds, ``median_side_px`` is of the square root of the box's area."""

    id: int
    name: str
    objects: int
    images: int
    crowds: int
    small: int
    medium: int
    large: int
    median_side_px: float | None


@dataclass(frozen=True)
class DatasetStatistics:
    """The figures.

    Attributes:
        images: how many there are.
        empty_images: of them, without any annotation.
        objects: annotations with a box that are no crowds.
        crowds: annotations that are.
        classes: in the document's order.
        sizes: objects by COCO's size.
        objects_per_image: all images, empty ones included; one bin a number, the last one for more.
        aspect_ratio: width divided by height of the boxes.
        relative_side: square root of box area divided by image area.
        image_sizes: width, height and number of images, the most frequent first.
        centres: ``(24, 24)`` objects by where in the image their centre lies, rows from the top.
    """

    images: int
    empty_images: int
    objects: int
    crowds: int
    classes: tuple[ClassFigures, ...]
    sizes: dict[str, int]
    objects_per_image: Distribution
    aspect_ratio: Distribution
    relative_side: Distribution
    image_sizes: tuple[tuple[int, int, int], ...]
    centres: tuple[tuple[int, ...], ...] = field(repr=False)

    @property
    def classes_without_objects(self) -> tuple[str, ...]:
        """Names of the classes that have no object."""
        return tuple(one.name for one in self.classes if not one.objects)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "classes_without_objects": list(self.classes_without_objects)}


def size_name(area: float) -> str:
    """Return small, medium or large."""
    return SIZES[int(area >= SIZE_LIMITS[0]) + int(area >= SIZE_LIMITS[1])]


def area_of(annotation: Any) -> float:
    """Return the annotated area in square pixels, else the box's, else 0."""
    area, box = annotation.get("area"), box_of(annotation)
    if is_number(area) and area > 0:
        return float(area)
    return max(box[2], 0.0) * max(box[3], 0.0) if box else 0.0


def statistics_of(dataset: Dataset) -> DatasetStatistics:
    """Count."""
    per_image = np.zeros(len(dataset.images), np.int64)
    objects: list[tuple[int, float, float, float, float, float, float]] = []
    images_of: dict[int, set[int]] = {}
    crowds: Counter[int] = Counter()
    sizes_of_class: Counter[tuple[int, str]] = Counter()
    for one in dataset.annotations:
        image = dataset.image_places.get(one["image_id"]) if is_key(one.get("image_id")) else None
        category, box = one.get("category_id"), box_of(one)
        category = category if is_id(category) and category in dataset.names else None
        if image is not None and category is not None:
            images_of.setdefault(category, set()).add(image)
        if one.get("iscrowd"):
            crowds[_NO_CLASS if category is None else category] += 1
            continue
        if image is None or box is None or min(box[2:]) <= 0:
            continue
        per_image[image] += 1
        identifier = _NO_CLASS if category is None else category
        sizes_of_class[identifier, size_name(area_of(one))] += 1
        width, height = size_of(dataset.images[image]) or (np.nan, np.nan)
        objects.append((identifier, *box, width, height))
    table = np.array(objects, np.float64).reshape(-1, 7)
    x, y, box_width, box_height, width, height = table[:, 1:].T
    sides = np.sqrt(box_width * box_height)
    classes = tuple(
        ClassFigures(
            id=identifier,
            name=name,
            objects=int(own.sum()),
            images=len(images_of.get(identifier, ())),
            crowds=crowds[identifier],
            **{size: sizes_of_class[identifier, size] for size in SIZES},
            median_side_px=float(np.median(sides[own])) if own.any() else None,
        )
        for identifier, name in dataset.names.items()
        for own in [table[:, 0] == identifier]
    )
    sizes = Counter(size_of(image) for image in dataset.images)
    shares = np.stack([(x + box_width / 2) / width, (y + box_height / 2) / height], axis=1)
    return DatasetStatistics(
        images=len(dataset.images),
        empty_images=len(dataset.images) - len(dataset.annotations_of),
        objects=len(table),
        crowds=crowds.total(),
        classes=classes,
        sizes={size: sum(sizes_of_class[one, size] for one in (*dataset.names, _NO_CLASS)) for size in SIZES},
        objects_per_image=_distribution(per_image.astype(np.float64), _whole_edges(per_image)),
        aspect_ratio=_distribution(box_width / box_height, _RATIO_EDGES),
        relative_side=_distribution(sides / np.sqrt(width * height), _SHARE_EDGES),
        image_sizes=tuple((*size, count) for size, count in sizes.most_common() if size is not None),
        centres=_grid(shares),
    )


def _whole_edges(counts: npt.NDArray[np.int64]) -> tuple[float, ...]:
    return tuple(float(edge) for edge in range(min(int(counts.max(initial=0)), 50) + 2))


def _distribution(values: npt.NDArray[np.float64], edges: tuple[float, ...]) -> Distribution:
    values = values[np.isfinite(values)]
    # Just below the last edge: np.histogram closes the last bin only.
    counts, _ = np.histogram(values.clip(edges[0], np.nextafter(edges[-1], -np.inf)), edges)
    if not len(values):
        return Distribution(edges, tuple(counts.tolist()), None, None, None, None)
    p05, median, p95 = np.percentile(values, [5, 50, 95]).tolist()
    return Distribution(edges, tuple(counts.tolist()), float(values.mean()), median, p05, p95)


def _grid(shares: npt.NDArray[np.float64]) -> tuple[tuple[int, ...], ...]:
    """Count points ``(N, 2)`` in shares of width and height; those outside are left out."""
    inside = shares[((shares >= 0) & (shares <= 1)).all(axis=1)]
    grid, _, _ = np.histogram2d(inside[:, 1], inside[:, 0], bins=_GRID, range=[[0, 1], [0, 1]])
    return tuple(tuple(int(count) for count in row) for row in grid)
