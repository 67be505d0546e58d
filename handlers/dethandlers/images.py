"""From the bytes of a request to pixels: size checked before decoding, EXIF orientation applied, always 8-bit RGB.

What cannot be decoded faithfully is refused with its own machine word, so that one bad image never fails its batch.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps

from dethandlers.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "MPO")
_EXIF_ORIENTATION = 0x0112
# What Pillow's decoders and its EXIF reader raise on damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
)


def decode_image(data: bytes, *, max_pixels: int, min_side: int) -> torch.Tensor:
    """Decode one image on the CPU.

    Args:
        data: the encoded image (JPEG, PNG, WebP, BMP, TIFF, GIF or PPM).
        max_pixels: larger images are refused before their pixels are decoded.
        min_side: images with a shorter side are refused, in pixels.

    Returns:
        ``(3, H, W)`` uint8 RGB, after the EXIF orientation is applied.

    Raises:
        ImageError: empty, no image, truncated, too large, too small, or animated.
    """
    with _opened(data) as image:
        check_size(image.size, max_pixels=max_pixels, min_side=min_side)
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise ImageError(
                f"got an animated {image.format} of {getattr(image, 'n_frames', 0)} frames, expected one image. "
                "Send the frames one by one.",
                type="animated_image",
                code=415,
            )
        try:
            image.load()
            rgb = _to_rgb(ImageOps.exif_transpose(image))
        except _DAMAGE as error:
            raise ImageError(
                f"got a {image.format} of {len(data)} bytes that breaks off or is damaged ({error}), expected a whole "
                "image. Send the file again, complete.",
                type="truncated_image",
            ) from error
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def jpeg_for_gpu(data: bytes, *, max_pixels: int, min_side: int) -> bool:
    """Tell whether the GPU may decode these bytes as they are: a three-channel JPEG that needs no rotation.

    Raises:
        ImageError: as ``decode_image``, for what the header already tells.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    with _opened(data) as image:
        check_size(image.size, max_pixels=max_pixels, min_side=min_side)
        try:
            upright = image.getexif().get(_EXIF_ORIENTATION, 1) == 1
        except _DAMAGE:
            return False
        return image.format == "JPEG" and image.mode == "RGB" and upright and data.rstrip(b"\0").endswith(b"\xff\xd9")


def check_size(size: tuple[int, int], *, max_pixels: int, min_side: int) -> None:
    """Refuse an image by its ``(width, height)``.

    Raises:
        ImageError: ``image_too_large`` (413) or ``image_too_small`` (400).
    """
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"got an image of {width}×{height} = {width * height:,} pixels, expected at most {max_pixels:,}. "
            "Send it smaller, or raise serving.max_image_pixels in the spec.",
            type="image_too_large",
            code=413,
        )
    if min(width, height) < min_side:
        raise ImageError(
            f"got an image of {width}×{height} pixels, expected at least {min_side} on each side. "
            "Send the image itself, not a thumbnail.",
            type="image_too_small",
        )


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    if not data:
        raise ImageError(
            "got an empty body, expected the bytes of an image. Send the file itself, for instance with curl -T FILE.",
            type="empty_body",
        )
    try:
        with warnings.catch_warnings():
            # Pillow's own bomb warning and error come from a limit that check_size states exactly.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"got an image that is far too large ({error}). Send it smaller.", type="image_too_large", code=413
        ) from error
    except _DAMAGE as error:
        raise ImageError(
            f"got {len(data)} bytes that are no image ({_kind(data)}), expected {', '.join(FORMATS[:5])}. "
            "Send the encoded image file as the body.",
            type="not_an_image",
            code=415,
        ) from error
    with image:
        yield image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB without losing its look: 16-bit grey is scaled, transparency is dropped."""
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        grey = np.asarray(image).astype(np.uint16)
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        grey = np.asarray(image)
        top = 65535.0 if grey.max(initial=0) > 255 else 255.0
        return Image.fromarray((np.clip(grey / top, 0, 1) * 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _kind(data: bytes) -> str:
    head = data[:16]
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return f"text that begins with {head.decode('ascii')!r}"
    return f"begins with {head[:8].hex(' ')}"
