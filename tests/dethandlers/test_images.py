"""From bytes to pixels: every image is decoded faithfully or refused with its own word, and nothing else happens."""

import io
import random
import struct
import threading
import time
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from dethandlers.errors import ImageError
from dethandlers.images import decode_image, jpeg_for_gpu
from PIL import Image
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as torchvision_decode

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")

LIMITS = {"max_pixels": 64_000_000, "min_side": 8}
SEED = 20


def picture(width=97, height=61):
    """A smooth picture with edges, so that a shift or a swap is seen."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 / width, y * 255 / height, (np.sin(x / 7) + np.cos(y / 5) + 2) * 60], axis=-1)
    rgb[height // 4 : height // 2, width // 5 : width // 2] = (230, 20, 60)
    return Image.fromarray(rgb.astype(np.uint8))


def encoded(image, form, **settings):
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def decoded(data, **limits):
    pixels = decode_image(data, **(LIMITS | limits))
    assert pixels.dtype == torch.uint8
    assert pixels.ndim == 3
    assert pixels.shape[0] == 3
    assert pixels.is_contiguous()
    return pixels.permute(1, 2, 0).numpy()


def refused(data, **limits):
    with pytest.raises(ImageError) as caught:
        decode_image(data, **(LIMITS | limits))
    return caught.value


PICTURE = picture()
RGB = np.asarray(PICTURE)
JPEG = encoded(PICTURE, "JPEG", quality=90)
PNG = encoded(PICTURE, "PNG")


# what is no image


def test_an_empty_body_is_refused():
    error = refused(b"")
    assert (error.code, error.type) == (400, "empty_body")
    assert "curl -T" in error.message


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"hello world, this is text", "text that begins with 'hello world, thi'"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "text that begins with '<!DOCTYPE html><'"),
        (b"\x00\x01\x02\x03" * 50, "begins with 00 01 02 03"),
        (b"\xff\xd8", "begins with ff d8"),
        (b"%PDF-1.7\n%\xe2\xe3", "begins with 25 50 44 46"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 'begins with "<svg'),
    ],
    ids=["text", "html", "binary", "two bytes of a JPEG", "pdf", "svg"],
)
def test_what_is_no_image_is_refused_with_how_it_begins(data, word):
    error = refused(data)
    assert (error.code, error.type) == (415, "not_an_image")
    assert word in error.message
    assert f"got {len(data)} bytes" in error.message


def test_formats_that_run_programs_or_are_no_photographs_are_no_images():
    assert refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n").type == "not_an_image"
    assert refused(encoded(PICTURE, "ICO")).type == "not_an_image"


# damage


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9, 0.97])
def test_a_truncated_jpeg_is_refused(share):
    data = encoded(picture(200, 150), "JPEG", quality=90)
    error = refused(data[: int(len(data) * share)])
    assert (error.code, error.type) == (400, "truncated_image")
    assert "breaks off or is damaged" in error.message


@pytest.mark.parametrize("cut", [4, 20, 100, 400])
def test_a_jpeg_cut_in_its_header_is_refused(cut):
    error = refused(JPEG[:cut])
    assert error.type in ("not_an_image", "truncated_image")
    assert error.code in (400, 415)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_any_other_truncated_image_is_refused(form, share):
    data = encoded(PICTURE, form)
    error = refused(data[: int(len(data) * share)])
    assert error.type in ("not_an_image", "truncated_image")


@pytest.mark.parametrize("kept", [len(PNG) // 2, len(PNG) - 60])
def test_a_truncated_png_is_refused(kept):
    assert refused(PNG[:kept]).type == "truncated_image"


# size


def test_a_one_pixel_image_is_refused():
    for form in ("PNG", "JPEG", "GIF"):
        error = refused(encoded(Image.new("RGB", (1, 1)), form))
        assert (error.code, error.type) == (400, "image_too_small")
        assert "1×1" in error.message


def test_the_limits_are_exact():
    assert decoded(PNG, max_pixels=97 * 61, min_side=61).shape == (61, 97, 3)
    assert (refused(PNG, max_pixels=97 * 61 - 1).code, refused(PNG, min_side=62).code) == (413, 400)


def png_of(width, height, depth=8, colour=2):
    """A PNG whose header promises a size, with data for a few rows only."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "size", [(30_000, 30_000), (10_000, 10_000), (8001, 8000), (2**31 - 1, 8), (2**31 - 1, 2**31 - 1)]
)
def test_a_bomb_is_refused_at_once_and_without_its_memory(size):
    data = png_of(*size)
    tracemalloc.start()
    begun = time.perf_counter()
    try:
        error = refused(data)
        taken = time.perf_counter() - begun
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (error.code, error.type) == (413, "image_too_large")
    assert taken < 0.5
    assert peak < 5_000_000


@pytest.mark.parametrize("size", [(30_000, 30_000), (10_000, 10_000)])
def test_a_jpeg_that_promises_too_much_is_refused_too(size):
    width, height = size
    at = JPEG.index(b"\xff\xc0")
    data = JPEG[: at + 5] + struct.pack(">HH", height, width) + JPEG[at + 9 :]
    assert refused(data).type == "image_too_large"
    with pytest.raises(ImageError, match="pixels"):
        jpeg_for_gpu(data, **LIMITS)


# several frames


def frames(count=3):
    return [picture(97 + 0 * step, 61).rotate(20 * step) for step in range(count)]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_refused(form):
    first, *others = frames()
    error = refused(encoded(first, form, save_all=True, append_images=others))
    assert (error.code, error.type) == (415, "animated_image")
    assert f"got an animated {form}" in error.message
    assert "one by one" in error.message


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_a_single_frame_is_accepted(form):
    settings = {"lossless": True} if form == "WEBP" else {}
    got = decoded(encoded(PICTURE, form, save_all=True, **settings))
    if form == "GIF":  # a palette of 256 colours
        expected = np.asarray(PICTURE.convert("P", palette=Image.Palette.ADAPTIVE).convert("RGB"))
        assert np.abs(got.astype(int) - expected).mean() < 6
    else:
        assert np.array_equal(got, RGB)


def test_a_long_animation_is_refused_as_fast_as_a_short_one():
    frame = encoded(Image.new("P", (16, 16)), "GIF")
    body = frame[frame.index(b",") : -1] if b"!" not in frame else frame[frame.index(b"!") : -1]
    data = frame[:-1] + body * 40_000 + b";"
    begun = time.perf_counter()
    assert refused(data).type == "animated_image"
    assert time.perf_counter() - begun < 0.5


def test_a_second_frame_of_absurd_size_is_refused_like_any_image():
    header = b"GIF89a" + struct.pack("<HHBBB", 16, 16, 0x80, 0, 0) + bytes(6)
    control = b"!\xf9\x04" + bytes([2 << 2]) + bytes(3) + b"\0"  # "restore to background", which Pillow allocates
    small = control + b"," + struct.pack("<HHHHB", 0, 0, 16, 16, 0) + b"\x02\x02\x44\x01\x00"
    huge = control + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\x00"
    error = refused(header + small + huge + b";")
    assert error.type in ("animated_image", "image_too_large", "truncated_image")


def test_a_camera_s_multi_picture_file_is_its_first_picture():
    data = encoded(PICTURE, "MPO", save_all=True, append_images=[picture(40, 30)], quality=90)
    assert np.array_equal(decoded(data), decoded(JPEG))
    assert jpeg_for_gpu(data, **LIMITS) is False


# modes


@pytest.mark.parametrize(
    ("image", "form", "expected"),
    [
        (PICTURE, "PNG", RGB),
        (PICTURE, "BMP", RGB),
        (PICTURE, "PPM", RGB),
        (PICTURE.convert("L"), "PNG", np.asarray(PICTURE.convert("L").convert("RGB"))),
        (PICTURE.convert("1"), "PNG", np.asarray(PICTURE.convert("1").convert("RGB"))),
        (PICTURE.convert("RGBA"), "PNG", RGB),
        (PICTURE.convert("LA"), "PNG", np.asarray(PICTURE.convert("L").convert("RGB"))),
        (PICTURE.quantize(64), "PNG", np.asarray(PICTURE.quantize(64).convert("RGB"))),
        (PICTURE.convert("CMYK"), "TIFF", np.asarray(PICTURE.convert("CMYK").convert("RGB"))),
    ],
    ids=["RGB", "BMP", "PPM", "L", "1-bit", "RGBA", "LA", "palette", "CMYK TIFF"],
)
def test_every_mode_becomes_rgb(image, form, expected):
    assert np.array_equal(decoded(encoded(image, form)), expected)


def test_transparency_is_dropped_and_the_colours_below_it_stay():
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 97).astype(np.uint8), (61, 1)))
    image = PICTURE.copy()
    image.putalpha(alpha)
    assert np.array_equal(decoded(encoded(image, "PNG")), RGB)


def test_a_palette_with_transparent_entries_keeps_its_colours():
    image = PICTURE.quantize(64)
    data = encoded(image, "PNG", transparency=bytes(range(64)))
    assert np.array_equal(decoded(data), np.asarray(image.convert("RGB")))


def test_a_grey_jpeg_has_three_equal_channels():
    data = encoded(PICTURE.convert("L"), "JPEG", quality=90)
    got = decoded(data)
    assert np.array_equal(got[..., 0], np.asarray(Image.open(io.BytesIO(data))))
    assert np.array_equal(got[..., 0], got[..., 1])
    assert np.array_equal(got[..., 0], got[..., 2])
    assert jpeg_for_gpu(data, **LIMITS) is False


def test_a_cmyk_jpeg_looks_like_its_original():
    data = encoded(PICTURE.convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    # By 4:4:4 and quality 95 the mean error stays near 1; an inverted reading is off by about 100.
    assert np.abs(decoded(data).astype(int) - RGB).mean() < 4
    assert jpeg_for_gpu(data, **LIMITS) is False


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_to_eight(form):
    grey = np.asarray(PICTURE.convert("L"))
    low = np.random.default_rng(0).integers(0, 256, grey.shape, dtype=np.uint16)
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + low)
    assert deep.mode == "I;16"
    assert np.array_equal(decoded(encoded(deep, form))[..., 0], grey)


def test_big_endian_sixteen_bit_grey_is_scaled_to_eight():
    grey = np.asarray(PICTURE.convert("L"))
    deep = Image.frombytes("I;16B", PICTURE.size, (grey.astype(">u2") * 257).tobytes())
    assert np.array_equal(decoded(encoded(deep, "TIFF"))[..., 0], grey)


def test_sixteen_bit_rgb_is_scaled_to_eight():
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in RGB)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", *PICTURE.size, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(decoded(data), RGB)


def test_a_float_tiff_with_holes_is_decoded():
    grey = np.asarray(PICTURE.convert("L")).astype(np.float32)
    holes = grey.copy()
    holes[3:6, 3:6] = (np.nan, np.inf, -np.inf)
    got = decoded(encoded(Image.fromarray(holes), "TIFF"))[..., 0]
    assert np.array_equal(got[10:], grey[10:].astype(np.uint8))
    assert np.array_equal(got[3, 3:6], [0, 255, 0])


# JPEG and EXIF


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_is_bit_equal_to_torchvision_s_decoding(subsampling, progressive):
    for quality in (35, 75, 96):
        data = encoded(PICTURE, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
        reference = torchvision_decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        assert np.array_equal(decoded(data), reference.permute(1, 2, 0).numpy())


# EXIF orientation -> what a camera that wrote it did to the upright picture
STORED = {
    1: lambda rgb: rgb,
    2: lambda rgb: rgb[:, ::-1],
    3: lambda rgb: rgb[::-1, ::-1],
    4: lambda rgb: rgb[::-1],
    5: lambda rgb: rgb.transpose(1, 0, 2),
    6: lambda rgb: np.rot90(rgb, 1),
    7: lambda rgb: rgb.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda rgb: np.rot90(rgb, -1),
}


def with_orientation(orientation, form="PNG", **settings):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"
    stored = np.ascontiguousarray(STORED[orientation](RGB))
    return encoded(Image.fromarray(stored), form, exif=exif.tobytes(), **settings)


@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_becomes_upright(orientation):
    assert np.array_equal(decoded(with_orientation(orientation)), RGB)
    assert np.array_equal(decoded(with_orientation(orientation, "WEBP", lossless=True)), RGB)


@pytest.mark.parametrize("orientation", STORED)
def test_a_rotated_jpeg_is_upright_as_torchvision_says(orientation):
    data = with_orientation(orientation, "JPEG", quality=90)
    reference = torchvision_decode(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB, apply_exif_orientation=True
    )
    got = decoded(data)
    assert np.array_equal(got, reference.permute(1, 2, 0).numpy())
    assert np.abs(got.astype(int) - RGB).mean() < 4
    assert jpeg_for_gpu(data, **LIMITS) is (orientation == 1)


def with_exif(content):
    return encoded(PICTURE, "JPEG", quality=90, exif=content)


HEADER = b"Exif\0\0"
BROKEN_EXIF = {
    "no TIFF in it": HEADER + b"nonsense that is no TIFF",
    "header only": HEADER,
    "cut in its directory": HEADER + b"II*\0\x08\0\0\0\x05\0\x12\x01",
    "offset outside": HEADER + b"II*\0\xff\xff\xff\x7f",
    "orientation as text": HEADER + b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
    "orientation nine": HEADER + b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0",
    "orientation twice": HEADER + b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x02\0\0\0\x01\0\x01\0\0\0\0\0",
    "directory in a circle": HEADER + b"II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0",
    "value outside": HEADER + b"II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\xff\xff\0\0\xff\xff\0\0\0\0\0\0",
    # Upside down, and a second tag of a type that Pillow cannot write back.
    "type unknown": HEADER
    + b"II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x03\0\0\0\x0f\x01\x63\0\x01\0\0\0\x08\0\0\0\0\0\0\0",
}


@pytest.mark.parametrize("name", BROKEN_EXIF)
def test_broken_exif_does_not_cost_the_picture(name):
    data = with_exif(BROKEN_EXIF[name])
    expected = decoded(JPEG)
    if name == "type unknown":
        expected = expected[::-1, ::-1]
    assert np.array_equal(decoded(data), expected)
    assert jpeg_for_gpu(data, **LIMITS) in (True, False)


def test_a_plain_jpeg_may_go_to_the_gpu_and_nothing_else():
    assert jpeg_for_gpu(JPEG, **LIMITS) is True
    assert jpeg_for_gpu(JPEG + bytes(20), **LIMITS) is True
    assert jpeg_for_gpu(JPEG[:-10], **LIMITS) is False
    assert jpeg_for_gpu(PNG, **LIMITS) is False
    assert jpeg_for_gpu(b"", **LIMITS) is False
    with pytest.raises(ImageError, match="at least 100"):
        jpeg_for_gpu(JPEG, max_pixels=10**9, min_side=100)


# anything at all


def mutations():
    """Valid files with bytes changed, cut out, doubled, moved and cut off."""
    rng = random.Random(SEED)
    small = picture(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    sources = [
        encoded(small, "JPEG", exif=exif.tobytes()),
        encoded(small, "JPEG", progressive=True),
        encoded(small, "PNG", exif=exif.tobytes()),
        encoded(small.quantize(16), "PNG", transparency=bytes(range(16))),
        encoded(small, "PNG", save_all=True, append_images=[small.rotate(9)]),
        encoded(small, "WEBP", exif=exif.tobytes()),
        encoded(small, "WEBP", save_all=True, append_images=[small.rotate(9)]),
        encoded(small, "GIF"),
        encoded(small, "GIF", save_all=True, append_images=[small.rotate(9)], disposal=2),
        encoded(small, "TIFF"),
        encoded(small, "TIFF", compression="tiff_lzw"),
        encoded(small, "TIFF", save_all=True, append_images=[small]),
        encoded(small, "BMP"),
        encoded(small, "PPM"),
        encoded(small, "MPO", save_all=True, append_images=[small]),
    ]
    for source in sources:
        for _ in range(40):
            data = bytearray(source)
            for _ in range(rng.choice([1, 1, 2, 5, 20])):
                kind = rng.randrange(5)
                # Half of the changes go into the header, where they do most.
                at = rng.randrange(min(len(data), 80) if rng.random() < 0.5 else len(data))
                if kind == 0:
                    data[at] = rng.randrange(256)
                elif kind == 1:
                    data[at] ^= 1 << rng.randrange(8)
                elif kind == 2:
                    data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
                elif kind == 3:
                    del data[at : at + rng.randrange(1, 12)]
                else:
                    data[at:at] = data[at : at + rng.randrange(1, 12)]
                data = data or bytearray(b"\0")
            yield bytes(data)
    for size in (1, 2, 12, 200):
        for _ in range(10):
            yield rng.randbytes(size)


def test_mutated_files_are_decoded_or_refused_and_nothing_else():
    decoded_count = refused_count = 0
    codes = set()
    for number, data in enumerate(mutations()):
        try:
            pixels = decode_image(data, max_pixels=1_000_000, min_side=8)
        except ImageError as error:
            codes.add(error.code)
            refused_count += 1
        else:
            assert pixels.dtype == torch.uint8, number
            assert pixels.ndim == 3, number
            assert pixels.shape[0] == 3, number
            decoded_count += 1
    # Both happen often, or the test tests little.
    assert decoded_count > 100
    assert refused_count > 100
    assert codes == {400, 413, 415}


def test_decoding_in_threads_leaves_the_process_s_warnings_as_they_were():
    before = list(warnings.filters)
    bomb = png_of(10_000, 10_000)  # large enough for Pillow's warning, too small for its error
    faults = []

    def work():
        for _ in range(60):
            try:
                decode_image(bomb, **LIMITS)
            except ImageError as error:
                if error.type != "image_too_large":
                    faults.append(error)
            except Exception as error:  # noqa: BLE001 - whatever else comes out is the fault looked for
                faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert list(warnings.filters) == before
