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
