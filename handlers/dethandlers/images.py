"""From the bytes of a request to pixels: size checked before decoding, EXIF orientation applied, always 8-bit RGB.

What cannot be decoded faithfully is refused with its own machine word, so that one bad image never fails its batch.
What an image may cost is bounded three times: by its pixels, by the passes over them that a JPEG asks for, and by a
clock that is looked at whenever a decoder reads on (those of WebP and TIFF take the whole file at once; their pixels
bound them).
"""

import importlib.util
import io
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from dethandlers.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "MPO")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
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
# catch_warnings swaps the process's filters: two threads in it at once would leave them changed.
_WARNINGS_LOCK = threading.Lock()


_SCANS_OF_ONE_PASS = 20
"""A progressive JPEG as encoders write it has about ten scans, and each is a pass over all of its pixels."""


def decode_image(data: bytes, *, max_pixels: int, min_side: int, max_seconds: float = 10.0) -> torch.Tensor:
    """Decode one image on the CPU.

    Args:
        data: the encoded image (JPEG, PNG, WebP, BMP, TIFF, GIF or PPM).
        max_pixels: larger images are refused before their pixels are decoded.
        min_side: images with a shorter side are refused, in pixels.
        max_seconds: decoding is given up after this time.

    Returns:
        ``(3, H, W)`` uint8 RGB, after the EXIF orientation is applied.

    Raises:
        ImageError: empty, no image, truncated, too large, too small, animated, or too slow to decode.
    """
    with _opened(data, max_seconds) as image:
        check_size(image.size, max_pixels=max_pixels, min_side=min_side)
        _check_scans(data, image, max_pixels)
        try:
            _refuse_animation(image)
            image.load()
            rgb = _to_rgb(image)
            method = _UPRIGHT_BY.get(_orientation(image))
            upright = rgb if method is None else rgb.transpose(method)
        except Image.DecompressionBombError as error:
            raise _far_too_large(error) from error
        except MemoryError:
            raise  # of a size that is allowed: this machine is at fault, not the image
        except _DAMAGE as error:
            if "out of memory" in str(error):  # how Pillow says it of its own decoders
                raise MemoryError(str(error)) from error
            raise ImageError(
                f"got a {image.format} of {len(data)} bytes that breaks off or is damaged ({error}), expected a whole "
                "image. Send the file again, complete.",
                type="truncated_image",
            ) from error
        return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()


def jpeg_for_gpu(data: bytes, *, max_pixels: int, min_side: int) -> bool:
    """Tell whether the GPU may decode these bytes as they are: a three-channel JPEG that needs no rotation.

    Raises:
        ImageError: as ``decode_image``, for what the header already tells.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    with _opened(data) as image:
        check_size(image.size, max_pixels=max_pixels, min_side=min_side)
        _check_scans(data, image, max_pixels)
        upright = _orientation(image) == 1
        return image.format == "JPEG" and image.mode == "RGB" and upright and data.rstrip(b"\0").endswith(b"\xff\xd9")


def gpu_jpeg_available() -> bool:
    """Tell whether this torchvision still brings nvJPEG: it is deprecated there since 0.29."""
    return importlib.util.find_spec("torchvision.io") is not None and hasattr(
        importlib.import_module("torchvision.io"), "decode_jpeg"
    )


def decode_jpeg_on_gpu(data: bytes, device: torch.device) -> torch.Tensor:
    """Decode a JPEG by nvJPEG to ``(3, H, W)`` uint8 RGB on the device.

    Raises:
        RuntimeError: nvJPEG does not take it.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    with _quiet():
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels: torch.Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    return pixels


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


def _check_scans(data: bytes, image: Image.Image, max_pixels: int) -> None:
    """Refuse a JPEG whose many scans cost more than the largest image that is allowed.

    A scan may be a few bytes long and still is a pass over every pixel: some kilobytes could keep a decoder busy for
    minutes. In the coded data itself a scan's marker cannot occur.
    """
    if not data.startswith(b"\xff\xd8"):
        return
    scans = data.count(b"\xff\xda")
    width, height = image.size
    if width * height * scans > max_pixels * _SCANS_OF_ONE_PASS:
        raise ImageError(
            f"got a JPEG of {width}×{height} pixels in {scans} scans, which is more work than {max_pixels:,} pixels in "
            f"{_SCANS_OF_ONE_PASS}. Save it anew with an ordinary encoder.",
            type="image_too_costly",
            code=413,
        )


class _TimedBytes(io.BytesIO):
    """Bytes that can be read for some time only."""

    def __init__(self, data: bytes, max_seconds: float) -> None:
        super().__init__(data)
        self._max_seconds = max_seconds
        self._deadline = time.monotonic() + max_seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self._deadline:
            raise ImageError(
                f"got an image that takes longer than {self._max_seconds:g} s to decode. Send it smaller or in another "
                "format, or raise serving.max_decode_s in the spec.",
                type="decode_too_slow",
                code=413,
            )
        return super().read(size)


@contextmanager
def _opened(data: bytes, max_seconds: float = 10.0) -> Iterator[Image.Image]:
    if not data:
        raise ImageError(
            "got an empty body, expected the bytes of an image. Send the file itself, for instance with curl -T FILE.",
            type="empty_body",
        )
    try:
        # Pillow's own bomb warning and error come from a limit that check_size states exactly.
        with _quiet():
            image = Image.open(_TimedBytes(data, max_seconds), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _far_too_large(error) from error
    except _DAMAGE as error:
        raise ImageError(
            f"got {len(data)} bytes that are no image ({_kind(data)}), expected {', '.join(FORMATS[:5])}. "
            "Send the encoded image file as the body.",
            type="not_an_image",
            code=415,
        ) from error
    with image:
        yield image


@contextmanager
def _quiet() -> Iterator[None]:
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _far_too_large(error: Image.DecompressionBombError) -> ImageError:
    return ImageError(
        f"got an image that is far too large ({error}). Send it smaller.", type="image_too_large", code=413
    )


def _refuse_animation(image: Image.Image) -> None:
    # How many frames there are is not said: Pillow would read through all of them to count.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ImageError(
            f"got an animated {image.format}, expected one image. Send the frames one by one.",
            type="animated_image",
            code=415,
        )


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation 1..8; 1 where it cannot be read, for broken EXIF need not cost the picture."""
    try:
        with _quiet():
            value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except _DAMAGE:
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT_BY else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB without losing its look: 16-bit grey is scaled, transparency is dropped."""
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        grey = np.asarray(image).astype(np.uint16)
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        grey = np.asarray(image)
        top = 65535.0 if grey.max(initial=0, where=np.isfinite(grey)) > 255 else 255.0
        return Image.fromarray((np.clip(np.nan_to_num(grey) / top, 0, 1) * 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P":
        # Straight to RGB, Pillow warns of a palette with transparent entries.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _kind(data: bytes) -> str:
    head = data[:16]
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return f"text that begins with {head.decode('ascii')!r}"
    return f"begins with {head[:8].hex(' ')}"
