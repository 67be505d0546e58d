"""Detections drawn on their image, and the two sides of a comparison next to each other.

    image ─► upright RGB, enlarged when tiny ─► masks ─► boxes ─► keypoints ─► tags, each in the nearest free place

Sizes follow the picture, so that a 40 px crop and a 6000 px photograph are equally readable. Nothing needs a display.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from dethandlers.detections import Detections, Rle
from PIL import Image, ImageDraw, ImageOps

from dettools.reports.lettering import Rect, font_for, place_tag, wrapped

if TYPE_CHECKING:
    from dettools.comparison import ImageComparison

Colour = tuple[int, int, int]

SMALLEST_LONG_SIDE = 480
PANEL_LONG_SIDE = 960
HIGHLIGHT: Colour = (235, 20, 40)
_PASS: Colour = (20, 120, 60)
_INK: Colour = (25, 25, 25)
_PAPER: Colour = (255, 255, 255)
# Far apart in hue and lightness, none near the red that highlights; by label, then again in the next shade.
_COLOURS: tuple[Colour, ...] = (
    (0, 114, 255),
    (255, 196, 0),
    (0, 200, 83),
    (213, 0, 249),
    (0, 229, 255),
    (255, 109, 0),
    (124, 77, 255),
    (174, 234, 0),
    (0, 121, 107),
    (255, 128, 171),
    (141, 110, 99),
    (40, 53, 147),
)
_SHADES = ((0, 0.0), (255, 0.5), (0, 0.45), (255, 0.25), (0, 0.25), (128, 0.5), (255, 0.7))
"""Grey level to mix in, and how much of it."""
_COCO_LIMBS = (
    *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10)),
    *((1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
)


@dataclass(frozen=True)
class _Canvas:
    """A picture and how the image's pixels lie on it.

    Attributes:
        image: RGB, drawn on in place.
        scale: canvas pixels per image pixel.
        line: line width in canvas pixels.
        font_px: text height in canvas pixels.
    """

    image: Image.Image
    scale: float
    line: int
    font_px: int


def draw_detections(
    image: Image.Image,
    detections: Detections,
    names: Sequence[str],
    *,
    highlight: Mapping[int, str] | None = None,
    long_side: int | None = None,
) -> Image.Image:
    """Draw boxes with their tags, and masks and keypoints where there are any.

    Args:
        image: any mode; its EXIF orientation is applied. It is left as it is.
        detections: in pixels of the upright image.
        names: class names by label.
        highlight: positions to draw in thick dashed red, each with a word for its tag; the others are drawn thin.
        long_side: longer side of the result in pixels; None keeps the image's own, except that tiny ones are enlarged.

    Returns:
        A new RGB image.
    """
    canvas = _canvas(upright_rgb(image), long_side)
    marks = highlight or {}
    colours = [_colour(int(label)) for label in detections.labels]
    # The best and the highlighted come last, on top.
    order = sorted(range(len(detections)), key=lambda i: (i in marks, -i))
    if detections.masks is not None:
        for i in order:
            _draw_mask(canvas, detections.masks[i], HIGHLIGHT if i in marks else colours[i])
    draw = ImageDraw.Draw(canvas.image)
    boxes = detections.boxes_xyxy.astype(np.float64) * canvas.scale
    drawn = [i for i in order if np.isfinite(boxes[i]).all()]
    for i in drawn:
        rect = _ordered(boxes[i])
        if i in marks:
            _dashed(draw, rect, HIGHLIGHT, canvas.line * 2)
        else:
            draw.rectangle(rect, outline=colours[i], width=canvas.line)
        if detections.keypoints is not None:
            _draw_keypoints(draw, detections.keypoints[i] * np.float32(canvas.scale), colours[i], canvas.line)
    texts = {i: _tag(detections, i, names, marks.get(i)) for i in drawn}
    _draw_tags(canvas, draw, [(texts[i], boxes[i], HIGHLIGHT if i in marks else colours[i]) for i in reversed(drawn)])
    return canvas.image


def side_by_side(
    image: Image.Image,
    eager: Detections | None,
    served: Detections | None,
    comparison: "ImageComparison",
    titles: tuple[str, str],
    *,
    names: Sequence[str],
) -> Image.Image:
    """Draw eager on the left and served on the right, what differs in red, and the verdict below.

    Args:
        image: any mode; its EXIF orientation is applied.
        eager: the reference, or None when it failed.
        served: the endpoint's answer, or None when the request failed.
        comparison: of these two.
        titles: over the left and the right panel.
        names: class names by label.
    """
    upright = upright_rgb(image)
    words_eager, words_served = _differences(comparison)
    panels = [
        draw_detections(upright, eager or Detections.empty(), names, highlight=words_eager, long_side=PANEL_LONG_SIDE),
        draw_detections(
            upright, served or Detections.empty(), names, highlight=words_served, long_side=PANEL_LONG_SIDE
        ),
    ]
    counts = ["failed" if side is None else f"{len(side)} detections" for side in (eager, served)]
    gap = 12
    width = max(panels[0].width * 2 + gap * 3, 760)
    text_px = 22
    heads = [
        [*wrapped(title, text_px, (width - 3 * gap) // 2, lines=2), count]
        for title, count in zip(titles, counts, strict=True)
    ]
    head_height = max(len(lines) for lines in heads) * (text_px + 6) + gap
    caption = wrapped(_caption(comparison), text_px, width - 2 * gap, lines=5)
    height = head_height + panels[0].height + gap + len(caption) * (text_px + 6) + gap
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    column = (width - 3 * gap) // 2
    for k, (panel, lines) in enumerate(zip(panels, heads, strict=True)):
        left = gap + k * (column + gap)
        _write(draw, (left, gap // 2), lines, text_px, _INK)
        sheet.paste(panel, (left + (column - panel.width) // 2, head_height))
    colour = _PASS if comparison.passed else HIGHLIGHT
    _write(draw, (gap, head_height + panels[0].height + gap), caption, text_px, colour)
    return sheet


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return a copy in RGB with its EXIF orientation applied; grey of more than 8 bits is scaled, not cut off."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        grey = np.asarray(upright, dtype=np.float64)
        top = 65535.0 if grey.max(initial=0) > 255 else 255.0
        upright = Image.fromarray((np.clip(grey / top, 0, 1) * 255).astype(np.uint8))
    return upright.convert("RGB")


def _canvas(image: Image.Image, long_side: int | None) -> _Canvas:
    longer = max(image.size)
    scale = (long_side or max(longer, SMALLEST_LONG_SIDE)) / longer
    if scale != 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
    reach = (image.width * image.height) ** 0.5
    return _Canvas(image, scale, line=max(2, round(reach / 350)), font_px=max(13, round(reach / 45)))


def _draw_mask(canvas: _Canvas, rle: Rle, colour: Colour) -> None:
    from pycocotools import mask

    with warnings.catch_warnings():
        # pycocotools 2.0 hands its buffer over in a way that NumPy 2 deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        bitmap = mask.decode(rle)
    alpha = Image.fromarray(bitmap * np.uint8(110))
    alpha = alpha.resize(canvas.image.size, Image.Resampling.BILINEAR)
    canvas.image.paste(colour, (0, 0), alpha)


def _draw_keypoints(draw: ImageDraw.ImageDraw, points: npt.NDArray[np.float32], colour: Colour, line: int) -> None:
    # Annotations write a point that is not labelled as 0, 0, 0.
    shown = np.isfinite(points[:, :2]).all(axis=1) & (points != 0).any(axis=1)
    if len(points) == 17:
        for a, b in _COCO_LIMBS:
            if shown[a] and shown[b]:
                draw.line([*points[a, :2].tolist(), *points[b, :2].tolist()], fill=colour, width=line)
    for x, y in points[shown, :2].tolist():
        draw.circle((x, y), line * 1.5, fill=_PAPER, outline=colour, width=max(1, line // 2))


def _draw_tags(
    canvas: _Canvas, draw: ImageDraw.ImageDraw, tags: Sequence[tuple[str, npt.NDArray[np.float64], Colour]]
) -> None:
    """Write the tags, the most important first; those for which there is no place left are counted in a corner."""
    boxes = np.array([_ordered(box) for _, box, _ in tags]).reshape(-1, 4)
    placed: dict[int, Rect] = {}
    pad = max(2, canvas.font_px // 6)
    for k, (text, box, _) in enumerate(tags):
        width = round(draw.textlength(text, font=font_for(text, canvas.font_px))) + 2 * pad
        size = (width, canvas.font_px + 2 * pad)
        rect = place_tag(size, _ordered(box), canvas.image.size, list(placed.values()), boxes)
        if rect is not None:
            placed[k] = rect
    # All lines first: none of them may cross out a tag.
    for k, rect in placed.items():
        _leader(draw, rect, _ordered(tags[k][1]), tags[k][2], canvas.line)
    for k, rect in placed.items():
        text, _, colour = tags[k]
        draw.rectangle(rect, fill=colour)
        place = (rect[0] + pad, (rect[1] + rect[3]) / 2)
        draw.text(place, text, font=font_for(text, canvas.font_px), fill=_ink_on(colour), anchor="lm")
    left_out = len(tags) - len(placed)
    if left_out:
        text = f"+{left_out} without tag"
        font = font_for(text, canvas.font_px)
        width = round(draw.textlength(text, font=font)) + 2 * pad
        bottom = canvas.image.height - 1
        draw.rectangle((0, bottom - canvas.font_px - 2 * pad, width, bottom), fill=_INK)
        draw.text((pad, bottom - pad - canvas.font_px / 2), text, font=font, fill=_PAPER, anchor="lm")


def _leader(draw: ImageDraw.ImageDraw, tag: Rect, box: Rect, colour: Colour, line: int) -> None:
    """Join a tag that had to move away with the nearest point of its box."""
    x = min(max((tag[0] + tag[2]) / 2, box[0]), box[2])
    y = min(max((tag[1] + tag[3]) / 2, box[1]), box[3])
    touches = (
        tag[0] - line <= box[2] and tag[2] + line >= box[0] and tag[1] - line <= box[3] and tag[3] + line >= box[1]
    )
    if not touches:
        draw.line([(tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2, x, y], fill=colour, width=max(1, line // 2))


def _dashed(draw: ImageDraw.ImageDraw, box: Rect, colour: Colour, width: int) -> None:
    draw.rectangle(box, outline=_PAPER, width=width)
    x1, y1, x2, y2 = box
    dash = width * 4
    for start in np.arange(x1, x2, dash * 1.5):
        end = min(start + dash, x2)
        draw.rectangle((start, y1, end, min(y1 + width - 1, y2)), fill=colour)
        draw.rectangle((start, max(y2 - width + 1, y1), end, y2), fill=colour)
    for start in np.arange(y1, y2, dash * 1.5):
        end = min(start + dash, y2)
        draw.rectangle((x1, start, min(x1 + width - 1, x2), end), fill=colour)
        draw.rectangle((max(x2 - width + 1, x1), start, x2, end), fill=colour)


def _differences(comparison: "ImageComparison") -> tuple[dict[int, str], dict[int, str]]:
    eager: dict[int, str] = {}
    served: dict[int, str] = {}
    for finding in comparison.findings:
        if not finding.fails:
            continue
        word = finding.reason.replace("_", " ").replace("truncated by max detections", "truncated")
        for words, position in ((eager, finding.eager), (served, finding.served)):
            if position is not None:
                words[position] = f"{words[position]}, {word}" if position in words else word
    return eager, served


def _caption(comparison: "ImageComparison") -> str:
    parts = [
        f"{'PASS' if comparison.passed else 'FAIL'}: {comparison.image}",
        f"tier {comparison.tier or 'none'}",
        f"{len(comparison.pairs)} matched",
    ]
    if comparison.pairs:
        parts.append(f"max box difference {comparison.max_box_delta_px:.3g} px")
        parts.append(f"max score difference {comparison.max_score_delta:.2g}")
    if comparison.min_mask_iou is not None:
        parts.append(f"min mask IoU {comparison.min_mask_iou:.4f}")
    if comparison.max_keypoint_delta_px is not None:
        parts.append(f"max keypoint difference {comparison.max_keypoint_delta_px:.3g} px")
    if comparison.swapped_with is not None:
        parts.append(f"answered with the detections of {comparison.swapped_with}")
    elif comparison.served is None:
        parts += [f"{finding.reason}: {finding.detail}" for finding in comparison.findings]
    else:
        parts += [reason.replace("_", " ") for reason in comparison.reasons]
    return "  |  ".join(parts)


def _tag(detections: Detections, i: int, names: Sequence[str], word: str | None) -> str:
    label = int(detections.labels[i])
    name = names[label] if 0 <= label < len(names) else f"label {label}"
    return f"{name} {detections.scores[i]:.2f}" + (f": {word}" if word else "")


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], size: int, colour: Colour) -> None:
    for k, line in enumerate(lines):
        draw.text((at[0], at[1] + k * (size + 6)), line, font=font_for(line, size), fill=colour)


def _ordered(box: npt.NDArray[np.float64]) -> Rect:
    x1, y1, x2, y2 = (float(value) for value in box)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _colour(label: int) -> Colour:
    red, green, blue = _COLOURS[label % len(_COLOURS)]
    grey, share = _SHADES[label // len(_COLOURS) % len(_SHADES)]
    return (
        round(red + (grey - red) * share),
        round(green + (grey - green) * share),
        round(blue + (grey - blue) * share),
    )


def _ink_on(colour: Colour) -> Colour:
    red, green, blue = colour
    return _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else _PAPER
