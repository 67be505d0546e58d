"""Photographs spoiled before they are sent, so that whoever is asked (eager, runtime, endpoint) gets the same bytes.

    encoded image ─► decoded, upright ─► corrupted by name, severity and the image's own seed ─► PNG, without loss

The 15 corruptions of the benchmark and the 4 held out are those of Hendrycks and Dietterich 2019 (arXiv:1903.12261) as
Michaelis et al. 2019 (arXiv:1907.07484) made them for detection. They are not written again here: ``imagecorruptions``
of the imaug project carries the original functions on, with the same severities and frost textures, so that figures can
stand beside published ones. Its random numbers come from global generators; every image gets a seed of its own, which
depends on neither the order nor the process.
"""

import hashlib
import io
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from detserve.eager_image import decode_rgb
from detserve.errors import DetserveError
from PIL import Image

from dettools.analysis.corruptions_transport import TRANSPORT_LEVELS, transported

Pixels = npt.NDArray[np.uint8]

GROUPS: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "holdout": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
    "transport": tuple(TRANSPORT_LEVELS),
}
BENCHMARK: tuple[str, ...] = tuple(name for group in ("noise", "blur", "weather", "digital") for name in GROUPS[group])
"""The 15 corruptions whose mean is mPC."""
PICTORIAL: tuple[str, ...] = BENCHMARK + GROUPS["holdout"]
"""All 19 that change the picture itself."""
NO_CORRUPTION = "None"
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 32
"""In pixels; the corruptions are not defined below."""
# They draw from generators of their own, which take a seed.
_TAKE_A_SEED = ("glass_blur", "impulse_noise")
# NumPy's global generator, which the others draw from, is one for all threads.
_LOCK = threading.Lock()


class CorruptionError(DetserveError):
    """An image cannot be corrupted, or there is no such corruption."""


def severities_of(corruption: str) -> tuple[int, ...]:
    """Return the severities that a corruption has, from the mildest on."""
    levels = TRANSPORT_LEVELS.get(corruption)
    return SEVERITIES if levels is None else tuple(range(1, len(levels) + 1))


def chosen_corruptions(words: Sequence[str]) -> tuple[str, ...]:
    """Return the corruptions that names and groups stand for, each once, in the benchmark's order.

    Args:
        words: names, groups, ``benchmark``, ``all`` (the 19 of the picture) or ``None``.

    Raises:
        CorruptionError: a word that is none of these.
    """
    known = (*PICTORIAL, *GROUPS["transport"])
    wide = {"benchmark": BENCHMARK, "all": PICTORIAL, NO_CORRUPTION: (), **GROUPS}
    if unknown := [word for word in words if word not in wide and word not in known]:
        raise CorruptionError(
            f"--corruptions: got {unknown[0]!r}, expected {', '.join(wide)} or names of {', '.join(known)}."
        )
    wanted = {name for word in words for name in wide.get(word, (word,))}
    return tuple(name for name in known if name in wanted)


def image_seed(seed: int, image_id: int, corruption: str, severity: int) -> int:
    """Return 32 bits that an image's noise comes from: other images, corruptions and severities get others."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{image_id}/{corruption}/{severity}".encode()).digest()[:4])


def corrupted(data: bytes, corruption: str, severity: int, *, image_id: int, seed: int) -> bytes:
    """Return an encoded image as it is sent under a corruption.

    Args:
        data: the encoded image, as it is sent without corruption.
        corruption: a name of ``GROUPS``.
        severity: one of `severities_of`.
        image_id: of the annotation file.
        seed: of the run.

    Raises:
        CorruptionError: it cannot be decoded, or is too small.
    """
    if corruption in TRANSPORT_LEVELS:
        try:
            return transported(data, corruption, severity)
        except DetserveError as error:
            raise CorruptionError(str(error)) from error
    number = image_seed(seed, image_id, corruption, severity)
    return png(corrupted_pixels(_decoded(data), corruption, severity, seed=number))


def corrupted_pixels(pixels: Pixels, corruption: str, severity: int, *, seed: int) -> Pixels:
    """Apply one of the 19 corruptions to ``(H, W, 3)`` uint8 RGB; the same seed gives the same pixels.

    Raises:
        CorruptionError: the package is not installed, or the image is smaller than 32 pixels.
    """
    corrupt = require_library()
    height, width = pixels.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise CorruptionError(
            f"got an image of {width}×{height} pixels, expected at least {SMALLEST_SIDE} on each side: {corruption} is "
            "not defined below. Leave such images out."
        )
    own = {"seed": seed} if corruption in _TAKE_A_SEED else {}
    with _LOCK:
        before = np.random.get_state()  # noqa: NPY002 - the library draws from the global generator
        np.random.seed(seed)  # noqa: NPY002
        try:
            spoiled: Pixels = corrupt(pixels.copy(), severity=severity, corruption_name=corruption, **own)
        finally:
            np.random.set_state(before)  # noqa: NPY002
    return spoiled


def library_version() -> str:
    """Return the name and version of what corrupts: other versions may make other noise."""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("imagecorruptions-imaug", "imagecorruptions"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "none"


def png(pixels: Pixels) -> bytes:
    """Encode ``(H, W, 3)`` RGB without loss: a JPEG would add a corruption of its own."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _decoded(data: bytes) -> Pixels:
    try:
        return decode_rgb(data)
    except DetserveError as error:
        raise CorruptionError(str(error)) from error


def require_library() -> Any:
    """Return the function that makes the 19 corruptions.

    Raises:
        CorruptionError: the package is not installed.
    """
    try:
        from imagecorruptions import corrupt
    except ImportError as error:
        raise CorruptionError(
            f"the corruptions of the picture need a package that is not installed ({error}). Install it with "
            "pip install 'detserve[robustness]'; --corruptions transport works without."
        ) from error
    return corrupt
