"""What an image may cost: the passes that a JPEG asks for, and the time that its decoding takes."""

import io

import numpy as np
import pytest
from dethandlers.errors import ImageError
from dethandlers.images import decode_image, jpeg_for_gpu
from PIL import Image

ALLOWED = {"max_pixels": 100_000, "min_side": 8}


def progressive(size: tuple[int, int], scans: int) -> bytes:
    """A progressive JPEG with the last of its scans, a few bytes of no change, so often again."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (90, 120, 30)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    own = data.count(b"\xff\xda")
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - own) + b"\xff\xd9"


def noise(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def test_an_ordinary_progressive_jpeg_of_the_largest_size_is_decoded():
    data = progressive((400, 250), 10)
    assert data.count(b"\xff\xda") == 10
    assert decode_image(data, **ALLOWED).shape == (3, 250, 400)
    assert jpeg_for_gpu(data, **ALLOWED)


@pytest.mark.parametrize(("size", "scans", "refused"), [((400, 250), 20, False), ((400, 250), 21, True)])
def test_scans_cost_as_much_as_pixels(size, scans, refused):
    data = progressive(size, scans)
    assert data.count(b"\xff\xda") == scans
    if not refused:
        assert decode_image(data, **ALLOWED).shape[0] == 3
        return
    for ask in (decode_image, jpeg_for_gpu):
        with pytest.raises(ImageError, match=r"400×250 pixels in 21 scans.*ordinary encoder") as error:
            ask(data, **ALLOWED)
        assert (error.value.code, error.value.type) == (413, "image_too_costly")


def test_a_small_image_may_have_many_scans():
    assert decode_image(progressive((64, 64), 300), **ALLOWED).shape == (3, 64, 64)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "PPM"])
def test_decoding_is_given_up_when_its_time_is_over(kind):
    data = noise(kind)
    assert decode_image(data, **ALLOWED).shape == (3, 300, 300)
    with pytest.raises(ImageError, match=r"longer than 1e-09 s.*serving.max_decode_s") as error:
        decode_image(data, **ALLOWED, max_seconds=1e-9)
    assert (error.value.code, error.value.type) == (413, "decode_too_slow")
