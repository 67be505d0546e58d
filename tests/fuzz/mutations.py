"""Requests that a public endpoint gets: images that are whole, odd, damaged or lying, in right and wrong wrappings.

Everything follows from a seed, so a finding is a number: ``list(requests_of(seed, count))[place]``.
"""

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, PngImagePlugin

SEEDS = tuple(range(4_100, 4_120))
"""Twenty seeds of a thousand requests each."""

MODEL = "squares"
MODES = ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16", "YCbCr")


@dataclass(frozen=True)
class Sent:
    """One request.

    Attributes:
        kind: which mutations made it.
        whole: whether its image was left whole.
    """

    kind: str
    body: bytes
    path: str = f"/predictions/{MODEL}"
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/octet-stream"})
    method: str = "POST"
    whole: bool = False


def requests_of(seed: int, count: int) -> Iterator[Sent]:
    """Return the requests of a seed; about six in ten hold an image that can be decoded."""
    rng = random.Random(seed)
    for _ in range(count):
        choice = rng.random()
        if choice < 0.55:
            yield wrapped(rng, *whole_image(rng), whole=True)
        elif choice < 0.85:
            yield wrapped(rng, *damaged_image(rng), whole=False)
        else:
            yield malformed(rng)


def whole_image(rng: random.Random) -> tuple[str, bytes]:
    """An image as cameras, programs and people make them: any mode, size, format, with and without metadata."""
    width, height = rng.choice([(96, 64), (64, 96), (rng.randint(8, 400), rng.randint(8, 400)), (8, 900), (1200, 8)])
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
    kind = rng.choice(["JPEG"] * 5 + ["PNG"] * 4 + ["WEBP", "BMP", "TIFF", "GIF", "PPM"])
    options: dict[str, object] = {}
    mode = rng.choice(MODES) if rng.random() < 0.5 else "RGB"
    if kind == "JPEG":
        mode = mode if mode in {"L", "CMYK", "YCbCr"} else "RGB"
        options = {"quality": rng.randint(1, 95), "progressive": rng.random() < 0.3, "subsampling": rng.randint(0, 2)}
        if rng.random() < 0.3:
            options["restart_marker_blocks"] = rng.randint(1, 5)
        if rng.random() < 0.2:
            options["dpi"] = (rng.randint(1, 600), 72)
        if rng.random() < 0.2:
            options["comment"] = bytes(rng.getrandbits(8) for _ in range(40))
    elif kind == "PNG":
        mode = "RGB" if mode in {"CMYK", "YCbCr"} else mode
        options = {"compress_level": rng.randint(0, 9)}
        if mode == "P" and rng.random() < 0.5:
            options["transparency"] = bytes(rng.getrandbits(8) for _ in range(rng.randint(1, 200)))
        if rng.random() < 0.2:
            info = PngImagePlugin.PngInfo()
            info.add_text("comment", "ü" * rng.randint(1, 2000), zip=rng.random() < 0.5)
            options["pnginfo"] = info
    elif kind == "WEBP":
        mode, options = rng.choice(["RGB", "RGBA"]), {"lossless": rng.random() < 0.3, "quality": rng.randint(1, 95)}
    elif kind == "TIFF":
        mode = "RGB" if mode == "P" else mode
        squeezed = "tiff_lzw" if mode != "YCbCr" else None
        options = {"compression": rng.choice([None, squeezed, "tiff_adobe_deflate", "packbits"])}
        if mode == "YCbCr":
            options = {}
    elif kind == "GIF":
        mode = "P"
    elif kind == "PPM":
        mode = mode if mode in {"L", "1"} else "RGB"
    else:
        mode = mode if mode in {"L", "P", "1", "RGBA"} else "RGB"
    if rng.random() < 0.4 and kind in {"JPEG", "PNG", "WEBP"}:
        options["exif"] = lying_exif(rng)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind, **options)
    except OSError:  # Pillow's buffer does not hold every combination of metadata with a tiny picture
        buffer = io.BytesIO()
        image.save(buffer, kind)
    return f"{kind} {mode}", buffer.getvalue()


def lying_exif(rng: random.Random) -> bytes:
    """Metadata with any orientation, sizes that are not the image's, or no structure at all."""
    if rng.random() < 0.25:
        return b"Exif\0\0" + bytes(rng.getrandbits(8) for _ in range(rng.randint(0, 80)))
    exif = Image.Exif()
    exif[0x0112] = rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 65535])
    exif[0x0100], exif[0x0101] = rng.choice([0, 1, 2**31]), 7
    text = exif.tobytes()
    if rng.random() < 0.3:
        text = flipped(rng, text, start=8)
    return text


def damaged_image(rng: random.Random) -> tuple[str, bytes]:
    """An image with something wrong: cut, bits turned, a header that lies, a bomb, an animation, none at all."""
    kind, data = whole_image(rng)
    damage = rng.choice(DAMAGES)
    name, broken = damage(rng, data)
    return f"{kind}, {name}", broken


def flipped(rng: random.Random, data: bytes, *, start: int = 0, most: int = 20) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        if len(changed) > start:
            changed[rng.randrange(start, len(changed))] = rng.getrandbits(8)
    return bytes(changed)


def _cut(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    return "cut", data[: rng.randrange(len(data))]


def _flip_late(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    return "bytes turned in the pixels", flipped(rng, data, start=len(data) // 2)


def _flip_head(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    return "bytes turned in the header", flipped(rng, data[:64], start=2, most=4) + data[64:]


def _flip_any(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    return "bytes turned", flipped(rng, data)


def _doubled(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    at, to = sorted(rng.randrange(len(data)) for _ in range(2))
    return "a piece twice", data[:to] + data[at:to] * rng.randint(1, 4) + data[to:]


def _left_out(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    at = rng.randrange(len(data))
    return "a piece left out", data[:at] + data[at + rng.randint(1, 200) :]


def _huge(rng: random.Random, _data: bytes) -> tuple[str, bytes]:
    """A PNG, GIF or BMP whose header promises up to 2³¹ pixels a side."""
    width, height = (rng.choice([1, 7, 8000, 8001, 30_000, 65_535, 2**24, 2**31 - 1]) for _ in range(2))
    which = rng.choice(["png", "bmp", "gif"])
    if which == "gif":
        head = b"GIF89a" + struct.pack("<HHBBB", width % 65_536, height % 65_536, 0xF0, 0, 0) + bytes(6) + b","
        return "huge GIF", head + struct.pack("<HHHHB", 0, 0, width % 65_536, height % 65_536, 0) + b"\2\2\x44\1\0;"
    if which == "bmp":
        head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, rng.choice([1, 8, 24, 32]), 0, 0, 0, 0, 0, 0)
        return "huge BMP", b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head + bytes(100)
    header = struct.pack(">IIBBBBB", width, height, rng.choice([1, 8, 16]), rng.choice([0, 2, 3, 6]), 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(5_000))), (b"IEND", b""))
    return "huge PNG", b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def _scans(rng: random.Random, _data: bytes) -> tuple[str, bytes]:
    side = rng.choice([64, 400, 3000])
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (9, 200, 90)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    return "many scans", data[:-2] + data[data.rfind(b"\xff\xda") : -2] * rng.choice([5, 50, 800]) + data[-2:]


def _animated(rng: random.Random, _data: bytes) -> tuple[str, bytes]:
    frames = [Image.new("RGB", (40, 30), (rng.getrandbits(8), value * 50, 0)) for value in range(rng.randint(2, 5))]
    kind = rng.choice(["GIF", "PNG", "WEBP", "TIFF"])
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return f"animated {kind}", buffer.getvalue()


def _nothing(rng: random.Random, _data: bytes) -> tuple[str, bytes]:
    return "noise", bytes(rng.getrandbits(8) for _ in range(rng.choice([0, 1, 2, 10, 3000])))


DAMAGES = (_cut, _flip_late, _flip_late, _flip_head, _flip_any, _doubled, _left_out, _huge, _scans, _animated, _nothing)

OPTIONS = ("score_threshold", "max_detections", "classes", "format", "masks", "keypoints", "category_id", "timings")
GOOD = {
    "score_threshold": ("0", "0.5", "1", "1e-3"),
    "max_detections": ("1", "100", "1000"),
    "classes": ("ruby", "ruby,emerald"),
    "format": ("list", "coco", "columns"),
    "category_id": ("true", "0"),
    "timings": ("true", "no"),
}
ODD_TEXTS = (
    "",
    "abc",
    "-1",
    "NaN",
    "inf",
    "1e999",
    "9" * 5000,
    "٣",
    "tr\u00fce",
    "\0",
    "😀" * 300,
    "[]",
    "null",
    "a\r\nb",
)
ODD_VALUES: tuple[object, ...] = (
    *ODD_TEXTS,
    None,
    True,
    -1,
    10**400,
    1.5,
    float("nan"),
    [],
    {},
    [[[[1]]]],
    {"a": {"b": []}},
    "\ud800",
    "\ud800\udc00\udfff",
    "\u2028",
)


def _quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="", errors="surrogatepass")


def wrapped(rng: random.Random, kind: str, image: bytes, *, whole: bool) -> Sent:
    """The image as a client sends it: as the body, in a form, in JSON, over the v2 protocol, with options."""
    options = {name: rng.choice(GOOD[name]) for name in GOOD if rng.random() < 0.1}
    way = rng.random()
    if way < 0.55:
        path = f"/predictions/{MODEL}"
        headers = {"Content-Type": rng.choice(["application/octet-stream", "image/jpeg", "image/png"])}
        if options and rng.random() < 0.7:
            path = f"/{MODEL}/predict?" + "&".join(f"{name}={_quoted(value)}" for name, value in options.items())
        elif options:
            headers["X-Detserve-Options"] = "&".join(f"{name}={_quoted(value)}" for name, value in options.items())
        return Sent(f"{kind}, body", image, path, headers, rng.choice(["POST", "POST", "PUT"]), whole)
    if way < 0.75:
        body = json.dumps({"data": base64.b64encode(image).decode(), **options}).encode()
        return Sent(f"{kind}, JSON", body, headers={"Content-Type": "application/json"}, whole=whole)
    if way < 0.9:
        name = rng.choice(["data", "body", "image"])
        return _form(
            rng, f"{kind}, form", {name: image, **{key: text.encode() for key, text in options.items()}}, whole
        )
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(image).decode()]}
    body = json.dumps({"inputs": [tensor], "parameters": options, "id": rng.choice(["", "7", "\ud800", "é"])}).encode()
    return Sent(f"{kind}, v2", body, f"/v2/models/{MODEL}/infer", {"Content-Type": "application/json"}, whole=whole)


def _form(rng: random.Random, kind: str, fields: dict[str, bytes], whole: bool, head: str = "") -> Sent:
    edge = f"{rng.getrandbits(64):016x}"
    parts = [
        f'--{edge}\r\nContent-Disposition: form-data; name="{name}"'.encode()
        + (b'; filename="a.jpg"' if name in {"data", "body", "image"} else b"")
        + f"{head}\r\n\r\n".encode()
        + value
        + b"\r\n"
        for name, value in fields.items()
    ]
    return Sent(
        kind,
        b"".join(parts) + f"--{edge}--\r\n".encode(),
        headers={"Content-Type": f"multipart/form-data; boundary={edge}"},
        whole=whole,
    )


def malformed(rng: random.Random) -> Sent:
    """A request that is wrong around its image."""
    return rng.choice(MALFORMED)(rng)


def _odd_option(rng: random.Random) -> Sent:
    name = rng.choice([*OPTIONS, "score_treshold", "", "é", "model_name", "data"])
    _, image = whole_image(rng)
    query = f"{_quoted(name)}={_quoted(rng.choice(ODD_TEXTS))}"
    if rng.random() < 0.3:
        query += f"&{query}"
    return Sent("odd option", image, f"/{MODEL}/predict?{query}")


def _odd_json(rng: random.Random) -> Sent:
    _, image = whole_image(rng)
    document: object = {
        "data": rng.choice([base64.b64encode(image).decode(), "data:image/png;base64,", *ODD_VALUES]),
        rng.choice([*OPTIONS, "", "\ud800", "x" * 5000]): rng.choice(ODD_VALUES),
    }
    if rng.random() < 0.2:
        document = [document]
    body = json.dumps(document).encode()
    if rng.random() < 0.3:
        body = flipped(rng, body, most=3)
    return Sent("odd JSON", body, headers={"Content-Type": "application/json"})


def _deep_json(rng: random.Random) -> Sent:
    depth = rng.choice([10, 500, 990, 5_000, 200_000])
    name = rng.choice(["data", "score_threshold", "classes", "inputs"])
    body = b'{"%s":' % name.encode() + b"[" * depth + b"]" * depth + b"}"
    return Sent("deep JSON", body, headers={"Content-Type": "application/json"})


def _odd_v2(rng: random.Random) -> Sent:
    _, image = whole_image(rng)
    tensor: dict[str, object] = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [1],
        "data": [base64.b64encode(image).decode()],
    }
    tensor[rng.choice(list(tensor))] = rng.choice([*ODD_VALUES, [2**62] * 12, ["%"], [1, 2]])
    document: dict[str, object] = {"inputs": [tensor], "id": rng.choice(["", "\udfff", "x" * 3000])}
    document[rng.choice(["inputs", "parameters", "outputs", "id", "x"])] = rng.choice(ODD_VALUES)
    path = rng.choice([f"/v2/models/{MODEL}/infer", f"/predictions/{MODEL}"])
    return Sent("odd v2", json.dumps(document).encode(), path, {"Content-Type": "application/json"})


def _odd_form(rng: random.Random) -> Sent:
    _, image = whole_image(rng)
    fields = {rng.choice(["data", "é", "describe", "X-Detserve-Options", "x" * 300]): image}
    fields[rng.choice([*OPTIONS, "body", "describe"])] = rng.choice(ODD_TEXTS).encode()
    head = rng.choice(["", "\r\nContent-Type: application/json", "\r\nContent-Type: text/plain; charset=x", "\r\nX: y"])
    made = _form(rng, "odd form", fields, False, head)
    if rng.random() < 0.4:
        return Sent(made.kind, flipped(rng, made.body, most=6), headers=made.headers)
    if rng.random() < 0.2:
        return Sent(made.kind, made.body[: rng.randrange(len(made.body))], headers=made.headers)
    return made


def _odd_headers(rng: random.Random) -> Sent:
    _, image = whole_image(rng)
    name = rng.choice(["X-Detserve-Options", "X-Request-Id", "Accept", "describe", "Content-Encoding", "Expect"])
    value = rng.choice(["&&=&", "a=b=c", "x" * 5000, "\xff\xfe", "%ff%00=%", "score_threshold=\xe9", "True", "gzip"])
    return Sent("odd header", image, headers={"Content-Type": "application/octet-stream", name: value})


def _odd_type(rng: random.Random) -> Sent:
    _, image = whole_image(rng)
    kind = rng.choice(["application/json", "text/plain", "text/html; charset=utf-16", "x", "a/b;c=\xe9", "image/é", ""])
    return Sent("odd content type", image, headers={"Content-Type": kind})


def _odd_path(rng: random.Random) -> Sent:
    _, image = whole_image(rng)
    model = rng.choice([MODEL, "x", "%2e%2e", "é", "%00", "x" * 2000, f"{MODEL}/9.9", f"{MODEL}/1.0/x", f"/{MODEL}"])
    path = rng.choice(["/predictions/{}", "/{}/predict", "/v2/models/{}/infer", "/{}"]).format(model)
    return Sent("odd path", image, path.encode("ascii", "replace").decode())


MALFORMED: tuple[Callable[[random.Random], Sent], ...] = (
    _odd_option,
    _odd_json,
    _deep_json,
    _odd_v2,
    _odd_form,
    _odd_headers,
    _odd_type,
    _odd_path,
)
