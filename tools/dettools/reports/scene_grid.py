"""A sheet of synthetic scenes with their ground truth: what the demo detector is trained and measured on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from dettools.datasets.scene_drawing import SHAPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dettools.datasets.scenes import Scene

_COLORS = ((255, 196, 0), (0, 200, 255), (255, 90, 90), (120, 230, 60), (255, 120, 230), (255, 255, 255))
_GAP_PX = 6


def draw_scene_grid(scenes: Sequence[Scene], columns: int = 4, width_px: int = 1400) -> Image.Image:
    """Draw the scenes in rows of equal width, every object with its box and class name."""
    rows = [scenes[first : first + columns] for first in range(0, len(scenes), columns)]
    strips = []
    for row in rows:
        free = width_px - _GAP_PX * (columns - 1)
        # All pictures of a row share one height, and together they fill the row.
        height = free / sum(scene.image.width / scene.image.height for scene in row) * len(row) / columns
        strips.append([_draw_scene(scene, round(height)) for scene in row])
    total = sum(strip[0].height for strip in strips) + _GAP_PX * (len(strips) - 1)
    sheet = Image.new("RGB", (width_px, total), (255, 255, 255))
    top = 0
    for strip in strips:
        left = 0
        for picture in strip:
            sheet.paste(picture, (left, top))
            left += picture.width + _GAP_PX
        top += strip[0].height + _GAP_PX
    return sheet


def _draw_scene(scene: Scene, height_px: int) -> Image.Image:
    scale = height_px / scene.image.height
    picture = scene.image.resize((round(scene.image.width * scale), height_px), Image.Resampling.LANCZOS)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    objects = list(zip((scene.boxes_xyxy * scale).tolist(), scene.labels.tolist(), strict=True))
    for box, label in objects:
        draw.rectangle(box, outline=_COLORS[label], width=2)
    for box, label in objects:
        corner = (box[0] + 3, max(0.0, box[1] - 15))
        left, top, right, bottom = draw.textbbox(corner, SHAPES[label], font=font)
        draw.rectangle((left - 3, top - 2, right + 2, bottom + 2), fill=_COLORS[label])
        draw.text(corner, SHAPES[label], fill=(0, 0, 0), font=font)
    return picture
