"""Objects and detections of a photograph as marked boxes, ground truth beside prediction.

    annotations, results, who found whom ─► error_marks ─► (left, right) ─► side_by_side ─► one picture
    annotations ─► object_marks ─► draw_marks ─► one picture

One colour a role, everywhere: green is right, red is a detection of nothing, orange was missed, grey does not count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from detserve.errors import DetserveError
from PIL import ExifTags, Image, ImageDraw, ImageOps, UnidentifiedImageError

from dettools.reports.lettering import Rect, font_for, place_tag, wrapped
from dettools.reports.pictures import PANEL_LONG_SIDE, SMALLEST_LONG_SIDE, upright_rgb

Colour = tuple[int, int, int]
Role = Literal["tp", "fp", "fn", "ignored", "object"]

COLOURS: dict[Role, Colour] = {
    "tp": (0, 158, 84),
    "fp": (222, 32, 48),
    "fn": (255, 140, 0),
    "ignored": (125, 130, 138),
    "object": (0, 114, 255),
}
WORDS: dict[Role, str] = {
    "tp": "found",
    "fp": "false positive",
    "fn": "missed",
    "ignored": "not counted",
    "object": "object",
}
# What matters most is drawn last, on top, and tagged first.
_ORDER: tuple[Role, ...] = ("ignored", "object", "tp", "fn", "fp")
# Of several classes in one picture, where no role tells them apart.
CLASS_COLOURS: tuple[Colour, ...] = (
    *((0, 114, 255), (213, 0, 249), (0, 158, 84), (255, 109, 0), (124, 77, 255), (0, 121, 107)),
    *((222, 32, 48), (141, 110, 99), (40, 53, 147), (255, 64, 129), (175, 160, 0), (0, 145, 190)),
)
_INK: Colour = (25, 25, 25)
_PAPER: Colour = (255, 255, 255)
_MASK_ALPHA = 95


class PictureError(DetserveError):
    """A photograph cannot be read."""


@dataclass(frozen=True)
class Mark:
    """One box to draw.

    Attributes:
        box_xywh: left, top, width and height in pixels of the photograph as it is shown.
        text: of its tag; none if empty.
        role: what it is, which gives the colour.
        segmentation: COCO polygons or RLE, drawn as a veil; None for none.
        colour: instead of the role's.
    """

    box_xywh: tuple[float, float, float, float]
    text: str
    role: Role
    segmentation: Any = None
    colour: Colour | None = None

    @property
    def shade(self) -> Colour:
        """The colour it is drawn in."""
        return self.colour or COLOURS[self.role]


def open_photograph(path: Path, annotated_size: tuple[int, int] | None = None) -> Image.Image:
    """Read a photograph in RGB, turned as its annotations lie on it.

    Args:
        path: the file.
        annotated_size: width and height of the annotations. Where they are those of the pixels as stored, and not of
            the photograph turned by its EXIF orientation, it is not turned: the boxes would lie elsewhere.

    Raises:
        PictureError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image).size
            if annotated_size == image.size != turned:
                image.getexif()[ExifTags.Base.Orientation] = 1
            return upright_rgb(image)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path}: cannot be read as an image: {error}") from None


def object_marks(annotations: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> list[Mark]:
    """Return the objects of one image, each class in a colour of its own, crowds in grey."""
    places = {identifier: place for place, identifier in enumerate(sorted(names))}
    marks = []
    for one in annotations:
        if (box := _box(one)) is None:
            continue
        category = one.get("category_id", -1)
        crowd = bool(one.get("iscrowd"))
        colour = CLASS_COLOURS[places.get(category, 0) % len(CLASS_COLOURS)]
        name = names.get(category, f"category {category}")
        marks.append(
            Mark(
                box,
                f"{name} (crowd)" if crowd else name,
                "ignored" if crowd else "object",
                one.get("segmentation"),
                None if crowd else colour,
            )
        )
    return marks


def error_marks(
    annotations: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    *,
    found: Sequence[bool],
    roles: Sequence[Role],
    masks: bool = False,
) -> tuple[list[Mark], list[Mark]]:
    """Return the marks of both sides of one image: the objects, and the detections.

    Args:
        annotations: of the image, COCO's; a crowd is neither found nor missed.
        results: of the image, COCO's; those that are to be seen.
        names: category id to name.
        found: of each annotation, whether a detection found it.
        roles: of each result: ``tp``, ``fp`` or ``ignored``.
        masks: draw segmentations too.
    """
    left, right = [], []
    for one, hit in zip(annotations, found, strict=True):
        if (box := _box(one)) is None:
            continue
        role: Role = "ignored" if one.get("iscrowd") else "tp" if hit else "fn"
        word = {"ignored": " (crowd)", "tp": "", "fn": ": missed"}[role]
        text = f"{names.get(one['category_id'], one['category_id'])}{word}"
        left.append(Mark(box, text, role, one.get("segmentation") if masks else None))
    for one, role in zip(results, roles, strict=True):
        if (box := _box(one)) is None:
            continue
        text = f"{names.get(one['category_id'], one['category_id'])} {one['score']:.2f}"
        right.append(Mark(box, text, role, one.get("segmentation") if masks else None))
    return left, right


def draw_marks(image: Image.Image, marks: Sequence[Mark], *, long_side: int | None = None) -> Image.Image:
    """Draw veils, boxes and tags.

    Args:
        image: RGB and upright; it is left as it is.
        marks: in pixels of it.
        long_side: longer side of the result in pixels; None keeps the image's, tiny ones are enlarged.
    """
    longer = max(image.size)
    scale = (long_side or max(longer, SMALLEST_LONG_SIDE)) / longer
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = image.resize(size, Image.Resampling.LANCZOS) if size != image.size else image.copy()
    reach = (canvas.width * canvas.height) ** 0.5
    line, font_px = max(2, round(reach / 300)), max(13, round(reach / 42))
    order = sorted(marks, key=lambda mark: _ORDER.index(mark.role))
    for mark in order:
        if mark.segmentation:
            _veil(canvas, image.size, mark)
    draw = ImageDraw.Draw(canvas)
    rects = [_rect(mark, scale) for mark in order]
    for mark, rect in zip(order, rects, strict=True):
        # A thin light line around keeps the colour visible on ground of the same colour.
        outer = (rect[0] - 1, rect[1] - 1, rect[2] + 1, rect[3] + 1)
        draw.rectangle(outer, outline=_PAPER, width=line + 2)
        draw.rectangle(rect, outline=mark.shade, width=line)
    _tags(canvas, draw, list(zip(order, rects, strict=True))[::-1], font_px, line)
    return canvas


def side_by_side(
    image: Image.Image,
    sides: Sequence[tuple[str, Sequence[Mark]]],
    caption: str,
    *,
    long_side: int = PANEL_LONG_SIDE,
) -> Image.Image:
    """Draw one panel a side with its title and what its colours mean, and a caption below.

    Args:
        image: RGB and upright.
        sides: title and marks, from left to right.
        caption: one paragraph.
        long_side: of each panel, in pixels.
    """
    panels = [draw_marks(image, marks, long_side=long_side) for _, marks in sides]
    gap, text_px = 12, 22
    row = text_px + 8
    column = max(panels[0].width, 380)
    width = len(panels) * (column + gap) + gap
    lines = wrapped(caption, text_px, width - 2 * gap, lines=4)
    head = 2 * row + gap
    sheet = Image.new("RGB", (width, head + panels[0].height + gap + len(lines) * row + gap), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (panel, (title, marks)) in enumerate(zip(panels, sides, strict=True)):
        left = gap + place * (column + gap)
        title_line = wrapped(title, text_px, column, lines=1)
        draw.text((left, gap // 2), "".join(title_line), font=font_for(title, text_px), fill=_INK)
        _legend(draw, (left, gap // 2 + row), marks, text_px - 3)
        sheet.paste(panel, (left + (column - panel.width) // 2, head))
    for place, text in enumerate(lines):
        at = (gap, head + panels[0].height + gap + place * row)
        draw.text(at, text, font=font_for(text, text_px), fill=_INK)
    return sheet


def _legend(draw: ImageDraw.ImageDraw, at: tuple[float, float], marks: Sequence[Mark], size: int) -> None:
    x, y = at
    font = font_for("", size)
    for role in reversed(_ORDER):
        count = sum(mark.role == role for mark in marks)
        if not count or role == "object":
            continue
        draw.rectangle((x, y + 3, x + size - 4, y + size - 1), fill=COLOURS[role])
        text = f"{count} {WORDS[role]}"
        draw.text((x + size + 2, y), text, font=font, fill=_INK)
        x += size + 20 + draw.textlength(text, font=font)


def _tags(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    marks: Sequence[tuple[Mark, Rect]],
    font_px: int,
    line: int,
) -> None:
    """Write the tags, the most important first; those without a free place are counted in a corner."""
    boxes = np.array([rect for _, rect in marks], dtype=np.float64).reshape(-1, 4)
    pad = max(2, font_px // 6)
    placed: list[Rect] = []
    left_out = 0
    for mark, rect in marks:
        if not mark.text:
            continue
        font = font_for(mark.text, font_px)
        size = (round(draw.textlength(mark.text, font=font)) + 2 * pad, font_px + 2 * pad)
        tag = place_tag(size, rect, canvas.size, placed, boxes)
        if tag is None:
            left_out += 1
            continue
        placed.append(tag)
        x = min(max((tag[0] + tag[2]) / 2, rect[0]), rect[2])
        y = min(max((tag[1] + tag[3]) / 2, rect[1]), rect[3])
        if not (tag[0] - line <= x <= tag[2] + line and tag[1] - line <= y <= tag[3] + line):
            draw.line([(tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2, x, y], fill=mark.shade, width=max(1, line // 2))
        draw.rectangle(tag, fill=mark.shade)
        draw.text((tag[0] + pad, (tag[1] + tag[3]) / 2), mark.text, font=font, fill=_ink_on(mark.shade), anchor="lm")
    if left_out:
        text = f"+{left_out} without tag"
        font = font_for(text, font_px)
        top = canvas.height - 1 - font_px - 2 * pad
        draw.rectangle((0, top, draw.textlength(text, font=font) + 2 * pad, canvas.height - 1), fill=_INK)
        draw.text((pad, top + pad + font_px / 2), text, font=font, fill=_PAPER, anchor="lm")


def _veil(canvas: Image.Image, size: tuple[int, int], mark: Mark) -> None:
    """Lay a mask over the canvas; ``size`` is the photograph's."""
    segmentation = mark.segmentation
    if isinstance(segmentation, list):
        alpha = Image.new("L", canvas.size)
        draw = ImageDraw.Draw(alpha)
        factor = np.tile([canvas.width / size[0], canvas.height / size[1]], 1)
        for polygon in segmentation:
            if isinstance(polygon, list) and len(polygon) >= 6:
                points = np.asarray(polygon[: len(polygon) // 2 * 2], dtype=np.float64).reshape(-1, 2) * factor
                draw.polygon([(float(x), float(y)) for x, y in points], fill=_MASK_ALPHA)
    else:
        alpha = Image.fromarray(decoded(segmentation) * np.uint8(_MASK_ALPHA)).resize(canvas.size)
    if (reach := alpha.getbbox()) is not None:
        canvas.paste(mark.shade, reach, alpha.crop(reach))


def decoded(rle: Mapping[str, Any]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Return the ``(H, W)`` bitmap of a COCO RLE, whether its counts are a list, a text or bytes."""
    from hotcoco import mask

    height, width = rle["size"]
    packed = mask.frPyObjects(dict(rle), height, width) if isinstance(rle["counts"], list) else dict(rle)
    if isinstance(packed["counts"], str):
        packed["counts"] = packed["counts"].encode()
    bitmap: np.ndarray[tuple[int, int], np.dtype[np.uint8]] = np.asarray(mask.decode(packed), dtype=np.uint8)
    return bitmap


def _box(entry: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """Return the box of an annotation or result; that of its mask where it has none."""
    box = entry.get("bbox")
    if box is None and isinstance(entry.get("segmentation"), Mapping):
        from hotcoco import mask

        box = np.asarray(mask.toBbox(dict(entry["segmentation"]))).ravel().tolist()
    if not isinstance(box, Sequence) or len(box) != 4 or not np.isfinite(np.asarray(box, dtype=np.float64)).all():
        return None
    x, y, width, height = (float(value) for value in box)
    return x, y, width, height


def _rect(mark: Mark, scale: float) -> Rect:
    x, y, width, height = (value * scale for value in mark.box_xywh)
    return min(x, x + width), min(y, y + height), max(x, x + width), max(y, y + height)


def _ink_on(colour: Colour) -> Colour:
    red, green, blue = colour
    return _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else _PAPER
