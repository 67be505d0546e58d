"""Photographs as a browser can show them, lying as their annotations do.

    file ─┬► thumbnail   JPEG of 160 px, kept in memory
          ├► view        the file itself if a browser shows it right and soon; else a JPEG of 2048 px
          └► full        the same in full size

A photograph whose EXIF orientation matters is turned here, not left to the browser, which cannot know the annotations.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

Size = tuple[int, int]
"""Width and height in pixels; (0, 0) where it is not known."""
UprightRgb = Callable[[Image.Image], Image.Image]
"""Turns an image by its EXIF orientation and makes it RGB: `dettools.reports.pictures.upright_rgb`."""
Variant = Literal["thumbnail", "view", "full"]

THUMBNAIL_PX = 160
VIEW_PX = 2048
_VIEW_BYTES = 4_000_000
_KEPT_BYTES = 32_000_000
_ORIENTATION = 0x0112
_SHOWN_BY_BROWSERS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


@dataclass(frozen=True)
class Picture:
    """What is sent: the content of a file, or bytes."""

    content: bytes | Path
    media_type: str


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        size: as stored.
        turned: once its EXIF orientation is applied.
        plain: a browser shows it as we would.
        media_type: empty for what browsers do not show.
    """

    size: Size
    turned: Size
    plain: bool
    media_type: str

    def shown(self, annotated: Size) -> Size:
        """Return the size as it is shown: turned, unless the annotations are of the pixels as stored."""
        return self.size if annotated == self.size != self.turned else self.turned


def read_header(path: Path) -> Header:
    """Read size and orientation, no pixels.

    Raises:
        OSError: it is no image.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            # Pillow decodes a whole PNG to look for EXIF behind the pixels.
            exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
            orientation = exif.get(_ORIENTATION, 1)
            size: Size = image.size
            turned = (size[1], size[0]) if orientation in range(5, 9) else size
            transparent = image.mode not in ("L", "RGB") and not (
                image.mode == "P" and "transparency" not in image.info
            )
            plain = orientation not in range(2, 9) and not transparent
            return Header(size, turned, plain, _SHOWN_BY_BROWSERS.get(image.format or "", ""))
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: {error}") from error


class Photographs:
    """Makes the pictures; two at a time, so that many requests do not fill the memory.

    Args:
        upright_rgb: turns a photograph and makes it RGB.
    """

    def __init__(self, upright_rgb: UprightRgb) -> None:
        self._upright_rgb = upright_rgb
        self._making = threading.BoundedSemaphore(2)
        self._lock = threading.Lock()
        self._thumbnails: OrderedDict[tuple[Path, Size], bytes] = OrderedDict()
        self._kept_bytes = 0

    def picture(self, path: Path, annotated: Size, variant: Variant) -> Picture:
        """Return a photograph in the size that is asked for.

        Raises:
            OSError: it cannot be read.
        """
        if variant == "thumbnail":
            return Picture(self._thumbnail(path, annotated), "image/jpeg")
        header = read_header(path)
        if header.plain and header.media_type and (variant == "full" or self._quick(path, header)):
            return Picture(path, header.media_type)
        longest = max(header.size) if variant == "full" else VIEW_PX
        return Picture(self._jpeg(path, annotated, longest), "image/jpeg")

    def size(self, path: Path, annotated: Size) -> tuple[Size, bool]:
        """Return the size as shown, and whether ``view`` is smaller than that.

        Raises:
            OSError: it is no image.
        """
        header = read_header(path)
        quick = header.plain and header.media_type and self._quick(path, header)
        return header.shown(annotated), not quick and max(header.size) > VIEW_PX

    @staticmethod
    def _quick(path: Path, header: Header) -> bool:
        return max(header.size) <= VIEW_PX and path.stat().st_size <= _VIEW_BYTES

    def _thumbnail(self, path: Path, annotated: Size) -> bytes:
        key = (path, annotated)
        with self._lock:
            if key in self._thumbnails:
                self._thumbnails.move_to_end(key)
                return self._thumbnails[key]
        made = self._jpeg(path, annotated, THUMBNAIL_PX)
        with self._lock:
            if key not in self._thumbnails:
                self._thumbnails[key] = made
                self._kept_bytes += len(made)
            while self._kept_bytes > _KEPT_BYTES:
                self._kept_bytes -= len(self._thumbnails.popitem(last=False)[1])
        return made

    def _jpeg(self, path: Path, annotated: Size, longest: int) -> bytes:
        header = read_header(path)
        as_stored = header.shown(annotated) != header.turned
        buffer = io.BytesIO()
        try:
            with self._making, warnings.catch_warnings(action="ignore"), Image.open(path) as image:
                # A JPEG can be decoded in an eighth of its size, which is much sooner done.
                image.draft(None, (longest, longest))
                if as_stored:
                    image.getexif().clear()
                made = self._upright_rgb(image)
                made.thumbnail((longest, longest), Image.Resampling.LANCZOS, reducing_gap=2.0)
                made.save(buffer, "JPEG", quality=80 if longest <= THUMBNAIL_PX else 90)
        except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise OSError(f"{path}: {error}") from error
        return buffer.getvalue()
