"""What was sent: a figure for small pictures says nothing about large ones."""

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

MOST_SIZES = 5


@dataclass(frozen=True)
class ImageFacts:
    """The images of a run.

    Attributes:
        count, distinct: how many there are, and how many of them differ in content.
        bytes_total, bytes_min, bytes_median, bytes_max: of the encoded files.
        megapixels_min, megapixels_median, megapixels_max: of the decoded pictures; None when none can be read.
        sizes: the most frequent ``WIDTHxHEIGHT`` with how many have it; the rest under ``other``.
        digest: SHA-256 over the contents, whatever their order: two runs with the same digest sent the same pictures.
    """

    count: int
    distinct: int
    bytes_total: int
    bytes_min: int
    bytes_median: int
    bytes_max: int
    megapixels_min: float | None
    megapixels_median: float | None
    megapixels_max: float | None
    sizes: dict[str, int]
    digest: str

    def sentence(self) -> str:
        """Say it in one line."""
        text = f"{self.count} images ({self.distinct} different), {self.bytes_total / 1e6:.1f} MB, " + _range(
            "{:.0f} KB", self.bytes_min / 1e3, self.bytes_median / 1e3, self.bytes_max / 1e3
        )
        if self.megapixels_min is None or self.megapixels_median is None or self.megapixels_max is None:
            return text
        pixels = _range("{:.2g} MP", self.megapixels_min, self.megapixels_median, self.megapixels_max)
        sizes = ", ".join(f"{size} ×{count}" for size, count in self.sizes.items())
        return f"{text}, {pixels} ({sizes})"


def describe_images(bodies: Sequence[bytes]) -> ImageFacts:
    """Describe encoded images; one that cannot be read counts with its bytes only."""
    lengths = [len(body) for body in bodies] or [0]
    hashes = sorted(hashlib.sha256(body).hexdigest() for body in bodies)
    pixels = [size for size in map(_size, bodies) if size is not None]
    mega = [width * height / 1e6 for width, height in pixels]
    sizes = Counter(f"{width}x{height}" for width, height in pixels).most_common()
    shown = dict(sizes[:MOST_SIZES])
    if others := sum(count for _, count in sizes[MOST_SIZES:]):
        shown["other"] = others
    return ImageFacts(
        count=len(bodies),
        distinct=len(set(hashes)),
        bytes_total=sum(lengths),
        bytes_min=min(lengths),
        bytes_median=int(np.median(lengths)),
        bytes_max=max(lengths),
        megapixels_min=min(mega, default=None),
        megapixels_median=float(np.median(mega)) if mega else None,
        megapixels_max=max(mega, default=None),
        sizes=shown,
        digest=hashlib.sha256("".join(hashes).encode()).hexdigest(),
    )


def _size(body: bytes) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(body)) as image:
            return image.size
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return None


def _range(form: str, low: float, median: float, high: float) -> str:
    unit = form.split()[-1]
    number = form.split()[0]
    if number.format(low) == number.format(high):
        return f"{number.format(median)} {unit} each"
    return f"{number.format(low)} to {number.format(high)} {unit} each, median {number.format(median)}"
