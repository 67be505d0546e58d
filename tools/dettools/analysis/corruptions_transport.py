"""What happens to a photograph on its way to a detector: encoders, cut-off uploads, turned cameras, deep pixels.

The benchmark corrupts pixels inside the data loader; a service gets files. These corruptions are of the file. Two of
them keep every pixel, so that detections that change under them show a defect of the service and not its limits.
"""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from detserve.eager_image import decode_rgb
from PIL import Image

TRANSPORT_LEVELS: dict[str, tuple[int | str, ...]] = {
    "jpeg_quality": (90, 75, 60, 45, 30),
    "chroma_subsampling": ("4:4:4", "4:2:2", "4:2:0"),
    "truncation": (99, 95, 90, 75, 50),
    "exif_orientation": (3, 6, 8, 5, 7),
    "png_16_bit": ("RGB",),
}
"""Corruption to its levels, severity 1 first: JPEG quality; subsampling of a JPEG of quality 95; per cent of the file
that arrives; the EXIF tag under which the turned picture is stored; sixteen bits a channel."""
LOSSLESS = ("exif_orientation", "png_16_bit")
"""These keep every pixel: detections should not change."""
_STORED_BY = {
    3: Image.Transpose.ROTATE_180,
    5: Image.Transpose.TRANSPOSE,
    # What undoes the turn that a viewer makes for the tag.
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_EXIF_ORIENTATION = 0x0112
_CHROMA_QUALITY = 95


def transported(data: bytes, corruption: str, severity: int) -> bytes:
    """Return an encoded image as it arrives.

    Raises:
        DetserveError: it cannot be decoded.
    """
    return _WAYS[corruption](data, TRANSPORT_LEVELS[corruption][severity - 1])


def level_name(corruption: str, severity: int) -> str:
    """Return what a severity of a transport corruption is, for people; empty for the other corruptions."""
    levels = TRANSPORT_LEVELS.get(corruption)
    if levels is None:
        return ""
    level = levels[severity - 1]
    words = {"jpeg_quality": "quality {}", "truncation": "{} % arrive", "exif_orientation": "tag {}"}
    return words.get(corruption, "{}").format(level)


def _jpeg_quality(data: bytes, quality: int | str) -> bytes:
    return _jpeg(data, quality=int(quality))


def _chroma(data: bytes, subsampling: int | str) -> bytes:
    return _jpeg(data, quality=_CHROMA_QUALITY, subsampling=str(subsampling))


def _jpeg(data: bytes, *, quality: int, subsampling: str = "4:2:0") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(decode_rgb(data)).save(stream, "JPEG", quality=quality, subsampling=subsampling)
    return stream.getvalue()


def _truncated(data: bytes, percent: int | str) -> bytes:
    return data[: len(data) * int(percent) // 100]


def _turned(data: bytes, tag: int | str) -> bytes:
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = int(tag)
    stream = io.BytesIO()
    stored = Image.fromarray(decode_rgb(data)).transpose(_STORED_BY[int(tag)])
    # PNG, not JPEG: turning must not add a loss that could be mistaken for the service's.
    stored.save(stream, "PNG", exif=exif, compress_level=1)
    return stream.getvalue()


def _deep(data: bytes, _: int | str) -> bytes:
    return png_16_bit(decode_rgb(data))


def png_16_bit(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode ``(H, W, 3)`` RGB with 16 bits a channel, each value times 257; Pillow writes none in colour.

    Layout: ISO/IEC 15948 (PNG), colour type 2, every row with filter 0.
    """
    height, width = pixels.shape[:2]
    deep = (pixels.astype(np.uint16) * 257).astype(">u2").reshape(height, -1).view(np.uint8)
    rows = np.hstack([np.zeros((height, 1), np.uint8), deep])
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b"")]
    encoded = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(encoded)


_WAYS: dict[str, Callable[[bytes, int | str], bytes]] = {
    "jpeg_quality": _jpeg_quality,
    "chroma_subsampling": _chroma,
    "truncation": _truncated,
    "exif_orientation": _turned,
    "png_16_bit": _deep,
}
