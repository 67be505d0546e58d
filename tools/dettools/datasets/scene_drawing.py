"""How the synthetic scenes are drawn: backgrounds, clutter and the objects of the six classes.

Everything paints into one canvas, (H, W, 3) float32 in 0–1, and takes its chances from one numpy Generator, so that a
scene's seed decides its pixels. A shape is a polygon around the origin; its coverage is drawn at four times the size
and reduced, which gives smooth edges and, cut at one half, the object's mask.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dettools.datasets.scenes import SceneParameters

    Floats = NDArray[np.float32]
    Points = NDArray[np.float64]

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
_SUPERSAMPLING = 4


def _soft_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> Floats:
    """(H, W) smooth noise of zero mean and unit variance, with about `cells` bumps along a side."""
    small = Image.fromarray(rng.normal(0, 1, (cells + 2, cells + 2)).astype(np.float32))
    field = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    noise: Floats = (field - field.mean()) / (field.std() + 1e-6)
    return noise


def draw_background(rng: np.random.Generator, height: int, width: int, p: SceneParameters) -> Floats:
    """(H, W, 3) float32 in 0–1: a gradient, structures of three scales, sometimes boards or tiles."""
    first, second = _color(rng, saturation=0.55), _color(rng, saturation=0.55)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = x / width * math.cos(angle) + y / height * math.sin(angle)
    ramp = ((ramp - ramp.min()) / (ramp.max() - ramp.min()))[..., None]
    canvas = first * (1 - ramp) + (0.5 * first + 0.5 * second) * ramp
    for cells, strength in ((3, 1.0), (9, 0.6), (60, 0.35)):
        tint = 1 + rng.uniform(-0.4, 0.4, 3).astype(np.float32)
        field = _soft_noise(rng, height, width, cells)[..., None]
        canvas = canvas + field * tint * (strength * p.background_texture * rng.uniform(0.3, 1))
    if rng.random() < 0.35:
        period = rng.uniform(0.04, 0.2) * min(height, width)
        turn = rng.uniform(0, math.pi)
        along = (x * math.cos(turn) + y * math.sin(turn)) / period
        pattern = np.floor(along) % 2
        if rng.random() < 0.4:
            pattern = (pattern + np.floor((y * math.cos(turn) - x * math.sin(turn)) / period)) % 2
        canvas = canvas + (pattern[..., None] - 0.5) * rng.uniform(0.04, 0.16)
    background: Floats = np.clip(canvas, 0, 1).astype(np.float32)
    return background


def _color(rng: np.random.Generator, saturation: float = 1.0) -> Floats:
    """(3,) float32 RGB in 0–1."""
    hue, value = rng.uniform(0, 6), rng.uniform(0.12, 0.98)
    pure = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    color: Floats = (value * (1 - rng.uniform(0, saturation) * (1 - pure))).astype(np.float32)
    return color


def _outline(rng: np.random.Generator, label: int, stretch: float) -> list[Points]:
    """The polygons of one object, (K, 2) each, rotated and stretched; the second one is a hole.

    The origin is the centre of the object's box, whose longest side is 1.
    """
    name = SHAPES[label]
    if name == "circle":
        polygons = [_regular(72)]
    elif name == "ring":
        polygons = [_regular(72), _regular(72) * rng.uniform(0.45, 0.68)]
    elif name == "square":
        polygons = [_regular(4)]
    elif name == "triangle":
        polygons = [_regular(3)]
    elif name == "star":
        spikes = _regular(10)
        spikes[1::2] *= rng.uniform(0.40, 0.52)
        polygons = [spikes]
    else:
        a = rng.uniform(0.24, 0.38)
        arm = np.array([(a, -a), (1, -a), (1, a)])
        polygons = [np.concatenate([arm @ _rotation(quarter * math.pi / 2).T for quarter in range(4)])]
    spin, axis = rng.uniform(0, 2 * math.pi, 2)
    squeeze = _rotation(axis) @ np.diag([rng.uniform(1 / stretch, 1), 1.0]) @ _rotation(-axis)
    polygons = [points @ (squeeze @ _rotation(spin)).T for points in polygons]
    low, high = polygons[0].min(axis=0), polygons[0].max(axis=0)
    return [(points - (low + high) / 2) / (high - low).max() for points in polygons]


def _regular(corners: int) -> Points:
    """(corners, 2) corners of a regular polygon on the unit circle."""
    turns = np.arange(corners) * (2 * math.pi / corners)
    return np.stack([np.cos(turns), np.sin(turns)], axis=1)


def _rotation(angle: float) -> Points:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def draw_objects(
    rng: np.random.Generator, canvas: Floats, p: SceneParameters
) -> tuple[list[NDArray[np.bool_]], list[int], list[int]]:
    """Draw the objects into the canvas, back to front.

    Returns:
        Visible masks (H, W), the objects' own areas in px and their labels.
    """
    height, width = canvas.shape[:2]
    visible: list[NDArray[np.bool_]] = []
    areas: list[int] = []
    labels: list[int] = []
    wanted = int(rng.integers(p.object_count[0], p.object_count[1] + 1))
    for _ in range(60 * wanted):
        if len(visible) == wanted:
            break
        label = int(rng.integers(len(SHAPES)))
        low, high = p.object_size
        # Small objects are as frequent as large ones (log-uniform), and crowded pictures hold smaller ones.
        size = min(height, width) * math.exp(rng.uniform(math.log(low), math.log(high)))
        if len(visible) > 2:
            size = max(size * 0.8, low * min(height, width))
        center = np.array(
            [rng.uniform(size / 2 + 3, width - size / 2 - 3), rng.uniform(size / 2 + 3, height - size / 2 - 3)]
        )
        if visible and rng.random() < p.overlap_chance:
            near = box_of_mask(visible[rng.integers(len(visible))])
            reach = (size + max(near[2] - near[0], near[3] - near[1])) / 2 * rng.uniform(0.65, 1.0)
            turn = rng.uniform(0, 2 * math.pi)
            center = (near[:2] + near[2:]) / 2 + reach * np.array([math.cos(turn), math.sin(turn)])
            lows, highs = size / 2 + 3, np.array([width, height]) - size / 2 - 3
            if (center < lows).any() or (center > highs).any():
                continue
        alpha, window = _alpha([center + size * points for points in _outline(rng, label, p.object_stretch)], canvas)
        mask = np.zeros((height, width), np.bool_)
        mask[window] = alpha > 0.5
        left = [int((other & ~mask).sum()) for other in visible]
        if any(kept < (1 - p.max_occlusion) * area for kept, area in zip(left, areas, strict=True)):
            continue
        _paint_object(rng, canvas, alpha, window, p.min_contrast)
        visible = [other & ~mask for other in visible]
        visible.append(mask)
        areas.append(int(mask.sum()))
        labels.append(label)
    return visible, areas, labels


def _alpha(polygons: list[Points], canvas: Floats) -> tuple[Floats, tuple[slice, slice]]:
    """Anti-aliased coverage, 0–1, of polygons in px (the second one is a hole), and its window in the canvas."""
    height, width = canvas.shape[:2]
    left, top = (max(0, math.floor(low) - 1) for low in polygons[0].min(axis=0))
    right, bottom = (math.ceil(high) + 2 for high in polygons[0].max(axis=0))
    right, bottom = min(width, right), min(height, bottom)
    n = _SUPERSAMPLING
    drawing = Image.new("L", (max(1, right - left) * n, max(1, bottom - top) * n))
    for points, ink in zip(polygons, (255, 0), strict=False):
        ImageDraw.Draw(drawing).polygon([tuple(point) for point in ((points - (left, top)) * n).tolist()], fill=ink)
    return np.asarray(drawing.reduce(n), np.float32) / np.float32(255), (slice(top, bottom), slice(left, right))


def _paint_object(
    rng: np.random.Generator, canvas: Floats, alpha: Floats, window: tuple[slice, slice], min_contrast: float
) -> None:
    """Paint one object: a color that stands out, a texture, sometimes a shadow and a rim."""
    height, width = alpha.shape
    patch = canvas[window]
    around = patch[alpha < 0.5] if (alpha < 0.5).any() else patch.reshape(-1, 3)
    color = _color(rng)
    for _ in range(50):
        if np.sqrt(np.square(around - color).sum(axis=1)).mean() > min_contrast and (
            np.linalg.norm(around.mean(axis=0) - color) > min_contrast
        ):
            break
        color = _color(rng)
    if rng.random() < 0.5:
        blur = ImageFilter.GaussianBlur(0.02 * max(height, width) + 1)
        shade = np.asarray(Image.fromarray(np.uint8(alpha * 255)).filter(blur), np.float32) / 255
        dx, dy = (round(float(rng.uniform(-0.05, 0.05)) * max(height, width)) for _ in range(2))
        canvas[window] *= 1 - 0.45 * np.roll(shade, (dy, dx), (0, 1))[..., None] * _fade(height, width)
        patch = canvas[window]

    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    along = (x * math.cos(angle) + y * math.sin(angle)) / max(height, width)
    texture: Floats = np.zeros((height, width), np.float32)
    kind = rng.choice(["plain", "ramp", "stripes", "marble", "checks"], p=[0.25, 0.3, 0.15, 0.2, 0.1])
    if kind == "ramp":
        texture = along - along.mean()
    elif kind == "stripes":
        texture = np.where(np.floor(along * rng.uniform(5, 14)) % 2 > 0, 0.16, -0.16)
    elif kind == "marble":
        texture = 0.12 * _soft_noise(rng, height, width, int(rng.integers(4, 12)))
    elif kind == "checks":
        across = (y * math.cos(angle) - x * math.sin(angle)) / max(height, width)
        squares = rng.uniform(5, 12)
        texture = np.where((np.floor(along * squares) + np.floor(across * squares)) % 2 > 0, 0.13, -0.13)
    fill = color * (1 + rng.uniform(0.5, 1) * texture[..., None])
    if rng.random() < 0.3:
        rim = max(2, round(0.03 * max(height, width)))
        core = Image.fromarray(np.uint8(alpha * 255)).filter(ImageFilter.GaussianBlur(rim))
        inside = np.clip((np.asarray(core, np.float32) / 255 - 0.5) * 4, 0, 1)[..., None]
        fill = fill * inside + fill * rng.uniform(0.45, 0.75) * (1 - inside)
    canvas[window] = np.clip(patch * (1 - alpha[..., None]) + fill * alpha[..., None], 0, 1)


def _fade(height: int, width: int) -> Floats:
    """(H, W, 1) weight that falls to 0 at the borders of a window, so that a shadow is not cut off by it."""
    y, x = (np.minimum(np.arange(n), np.arange(n)[::-1]) / max(1.0, 0.06 * n) for n in (height, width))
    return np.minimum(1, y[:, None] * np.minimum(1, x)[None, :]).astype(np.float32)[..., None]


def draw_clutter(rng: np.random.Generator, canvas: Floats) -> None:
    """Draw one distractor that belongs to no class: a line, an arc, a scribble, strokes like handwriting, or a blob."""
    height, width = canvas.shape[:2]
    unit = min(height, width)
    center = np.array([rng.uniform(0, width), rng.uniform(0, height)])
    angle = rng.uniform(0, 2 * math.pi)
    thickness = max(1.0, rng.uniform(0.003, 0.016) * unit)
    strength = rng.uniform(0.35, 0.95)
    kind = rng.choice(["line", "arc", "scribble", "writing", "blob"], p=[0.2, 0.2, 0.2, 0.15, 0.25])
    paths: list[Points] = []
    if kind == "line":
        reach = rng.uniform(0.1, 0.8) * unit * np.array([math.cos(angle), math.sin(angle)])
        paths = [np.stack([center - reach, center + reach])]
    elif kind == "arc":
        turns = angle + np.linspace(0, rng.uniform(0.6, 2.6), 24)
        paths = [center + rng.uniform(0.05, 0.3) * unit * np.stack([np.cos(turns), np.sin(turns)], axis=1)]
    elif kind == "scribble":
        headings = angle + np.cumsum(rng.normal(0, 0.45, 24))
        steps = rng.uniform(0.01, 0.03) * unit * np.stack([np.cos(headings), np.sin(headings)], axis=1)
        paths = [center + np.cumsum(steps, axis=0)]
    elif kind == "writing":
        letter, turn = rng.uniform(0.015, 0.035) * unit, _rotation(rng.uniform(-0.5, 0.5))
        thickness = max(1.0, 0.12 * letter)
        for k in range(rng.integers(3, 10)):
            marks = np.array([1.25 * k, 0]) + rng.uniform(-0.5, 0.5, (rng.integers(3, 6), 2))
            paths.append(center + letter * marks @ turn.T)
    if kind == "blob":
        turns = np.linspace(0, 2 * math.pi, 90, endpoint=False)
        waves = [rng.uniform(0.1, 0.5) / k * np.cos(k * turns + rng.uniform(0, 6)) for k in (2, 3, 5)]
        radius = 1 + np.sum(waves, axis=0)
        ring = np.stack([np.cos(turns), np.sin(turns) * rng.uniform(0.2, 0.6)], axis=1) * radius[:, None]
        polygons = [center + rng.uniform(0.03, 0.16) * unit * ring @ _rotation(angle).T]
        strength *= 0.7
    else:
        polygons = [_stroke(path, thickness) for path in paths]
    color = _color(rng, saturation=0.8)
    for polygon in polygons:
        if (polygon.max(axis=0) < 1).any() or (polygon.min(axis=0) > (width - 2, height - 2)).any():
            continue
        alpha, window = _alpha([polygon], canvas)
        alpha = strength * alpha[..., None]
        canvas[window] = canvas[window] * (1 - alpha) + color * alpha


def _stroke(path: Points, thickness: float) -> Points:
    """(2K, 2) the polygon around a path of K points, as wide as `thickness` px."""
    along = np.gradient(path, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) / (np.linalg.norm(along, axis=1, keepdims=True) + 1e-9)
    return np.concatenate([path + across * thickness / 2, (path - across * thickness / 2)[::-1]])


def box_of_mask(mask: NDArray[np.bool_]) -> Floats:
    """(4,) xyxy px: the smallest box that encloses the mask's pixels, edges included."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
