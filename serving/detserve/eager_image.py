"""The pixels of the eager references: decoded and resized apart from the worker's code, so that its faults show."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from detserve.errors import DetserveError


def decode_rgb(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode an image to ``(H, W, 3)`` uint8 RGB with its EXIF orientation applied, as training scripts do: by Pillow.

    Raises:
        DetserveError: Pillow cannot.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return np.array(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DetserveError(f"got {len(data)} bytes that eager cannot decode ({error}), expected an image.") from error


def bilinear(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.float64]:
    """Resize ``(H, W, 3)`` by sampling between the four nearest pixel centres, without antialiasing."""
    source = image.astype(np.float64)

    def neighbours(old: int, new: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(np.intp)
        return low, np.minimum(low + 1, old - 1), at - low

    top, bottom, down = neighbours(image.shape[0], height)
    left, right, across = neighbours(image.shape[1], width)
    rows = source[top] * (1 - down)[:, None, None] + source[bottom] * down[:, None, None]
    return np.asarray(rows[:, left] * (1 - across)[None, :, None] + rows[:, right] * across[None, :, None])


def bilinear_eight_bit(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.float64]:
    """Resize ``(H, W, 3)`` as OpenCV's INTER_LINEAR does 8-bit images: weights in 2048ths, sums cut to integers."""
    old_height, old_width = image.shape[:2]
    if (old_height, old_width) == (2 * height, 2 * width):
        blocks = image.reshape(height, 2, width, 2, 3).astype(np.int64)
        return np.asarray((blocks.sum(axis=(1, 3)) + 2) // 4, dtype=np.float64)
    if (old_height, old_width) == (height, width):
        return image.astype(np.float64)

    def weights(old: int, new: int, *, ends: bool) -> tuple[npt.NDArray[np.int64], ...]:
        at = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
        low = np.floor(at).astype(np.int64)
        share = at - low.astype(np.float32)
        share[ends & ((low < 0) | (low >= old - 1))] = 0
        near, far = np.rint((1 - share) * 2048).astype(np.int64), np.rint(share * 2048).astype(np.int64)
        return low.clip(0, old - 1), (low + 1).clip(0, old - 1), near, far

    left, right, near, far = weights(old_width, width, ends=True)
    whole = image.astype(np.int64)
    rows = whole[:, left] * near[None, :, None] + whole[:, right] * far[None, :, None]
    top, bottom, near, far = weights(old_height, height, ends=False)
    above = rows[top] // 16 * near[:, None, None] // 65536
    below = rows[bottom] // 16 * far[:, None, None] // 65536
    return ((above + below + 2) // 4).astype(np.float64)
