"""The cost over the images of a folder, each at the size at which it is served."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from dettools.flops.cost import Cost, FlopsError
from dettools.flops.subjects import Subject


@dataclass(frozen=True)
class Average:
    """MACs of one image, over some images; of a file with a fixed batch its share of the batch.

    Attributes:
        images: how many.
        shapes: how many different input sizes they have.
        macs: mean with no proposal and no detection.
        most_macs: mean with as many as there can be.
        smallest: cost of the cheapest size; of the whole batch, as everywhere.
        largest: cost of the dearest size, whose tables stand for all.
    """

    images: int
    shapes: int
    macs: float
    most_macs: float
    smallest: Cost
    largest: Cost


def average(subject: Subject, images: Sequence[Path], *, progress: Callable[[int, int], None]) -> Average:
    """Count every input size once and average over the images.

    Raises:
        FlopsError: an image cannot be read.
    """
    costs: dict[tuple[int, int] | None, Cost] = {}
    found = []
    for done, path in enumerate(images, start=1):
        size = subject.size_of(_size(path))
        if size not in costs:
            costs[size] = subject.count(size)
        found.append(costs[size])
        progress(done, len(images))
    by_cost = sorted(costs.values(), key=lambda cost: cost.macs)
    return Average(
        images=len(found),
        shapes=len({cost.input_size for cost in found}),
        macs=statistics.fmean(cost.macs / cost.batch for cost in found),
        most_macs=statistics.fmean(cost.most_macs / cost.batch for cost in found),
        smallest=by_cost[0],
        largest=by_cost[-1],
    )


def _size(path: Path) -> tuple[int, int]:
    """Return ``(H, W)`` px after the EXIF orientation is applied, as served."""
    try:
        with Image.open(path) as image:
            width, height = ImageOps.exif_transpose(image).size
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise FlopsError(f"image {path}: cannot be read ({error}). Remove it, or give another folder.") from error
    return height, width
