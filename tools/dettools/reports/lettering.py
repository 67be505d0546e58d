"""Text on pictures: the font, lines that fit, and a place for the tag of a box.

A tag goes beside its box if there is room. Otherwise it takes, of the places near, the one that hides least of the
boxes; it never covers another tag.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import ImageFont

Rect = tuple[float, float, float, float]
"""Left, top, right, bottom in canvas pixels."""
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_REACH = 9
"""How many tag heights away from its box a tag may go."""
_FARTHER = 0.02
"""What each next-best place costs, in shares of a hidden box,"""
_APART = 0.15
"""… and what it costs when the tag no longer touches its box."""
_TOUCHING = 9
"""The first so many candidates touch the box."""
_FALLBACK_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "msyh.ttc")


def font_for(text: str, size: int) -> Font:
    """Return Pillow's own font, or a system font for text that it cannot show, ``size`` pixels high."""
    return _plain_font(size) if text.isascii() else _wide_font(size)


@cache
def _plain_font(size: int) -> Font:
    return ImageFont.load_default(size)


@cache
def _wide_font(size: int) -> Font:
    for name in _FALLBACK_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return _plain_font(size)


def wrapped(text: str, size: int, width: int, *, lines: int) -> list[str]:
    """Break text into lines of at most ``width`` pixels; what does not fit into ``lines`` ends in three dots."""
    font = font_for(text, size)
    rows = [""]
    for piece in text.split():
        word = piece
        while font.getlength(word) > width and len(word) > 1:  # a path without spaces
            cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            rows.append(word[:cut])
            word = word[cut:]
        candidate = f"{rows[-1]} {word}".lstrip()
        if font.getlength(candidate) <= width:
            rows[-1] = candidate
        else:
            rows.append(word)
    rows = [row for row in rows if row]
    return rows if len(rows) <= lines else [*rows[: lines - 1], rows[lines - 1][:-3] + "..."]


def place_tag(
    size: tuple[float, float],
    box: Rect,
    picture: tuple[int, int],
    placed: Sequence[Rect],
    boxes: npt.NDArray[np.float64],
) -> Rect | None:
    """Return a place inside the picture that covers no tag already placed, or None when there is none near.

    Args:
        size: width and height of the tag in canvas pixels.
        box: the box that it names.
        picture: width and height of the picture in canvas pixels.
        placed: the tags that are there already.
        boxes: ``(N, 4)`` xyxy, all boxes of the picture in canvas pixels.
    """
    width, height = size
    areas = np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), 1.0)
    best: tuple[float, Rect] | None = None
    for rank, (x, y) in enumerate(_candidates(width, height, box)):
        price = rank * _FARTHER + (_APART if rank >= _TOUCHING else 0.0)
        if best is not None and price >= best[0]:
            break
        left = min(max(x, 0.0), max(picture[0] - 1 - width, 0.0))
        top = min(max(y, 0.0), max(picture[1] - 1 - height, 0.0))
        rect = (left, top, left + width, top + height)
        if any(_overlap(rect, other) for other in placed):
            continue
        shared = np.minimum(boxes[:, 2:], rect[2:]) - np.maximum(boxes[:, :2], rect[:2])
        hidden = float((np.clip(shared, 0, None).prod(axis=1) / areas).sum())
        if best is None or hidden + price < best[0]:
            best = (hidden + price, rect)
    return None if best is None else best[1]


def _candidates(width: float, height: float, box: Rect) -> Iterator[tuple[float, float]]:
    """Yield left-top corners, the best first: on the box's upper edge, along its other edges, then farther away."""
    x1, y1, x2, y2 = box
    yield x1, y1 - height
    yield x1, y1
    yield x2 - width, y1 - height
    yield x1, y2
    yield x2 - width, y1
    yield x1, y2 - height
    yield x2 - width, y2
    yield x2, y1
    yield x1 - width, y1
    for step in range(1, _REACH):
        away = step * (height + 2)
        yield x1, y1 + away
        yield x1, y1 - height - away
        yield x2, y1 + away
        yield x1 - width, y1 + away
        yield x1 + away, y1 - height
        yield x1 + away, y2
        yield x1, y2 + away


def _overlap(a: Rect, b: Rect) -> bool:
    # One pixel of air, so that two tags do not read as one.
    return a[0] <= b[2] + 1 and b[0] <= a[2] + 1 and a[1] <= b[3] + 1 and b[1] <= a[3] + 1
