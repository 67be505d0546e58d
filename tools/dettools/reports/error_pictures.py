"""Error stacks and TIDE errors as pictures; the stacks under the names that MMDetection's tool gives them.

Hundreds of stacks are drawn, so one figure is used again and again, and only what changes is drawn anew. A class
without objects of a size has no picture: zeros would say that nothing of it was found.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from dettools.analysis.error_stacks import AREA_NAMES, CURVES, RECALLS, ErrorStacks, size_groups
from dettools.analysis.overlaps import Floats, Overlaps
from dettools.analysis.tide_errors import KINDS, SPECIALS, TideErrors

# The originals' colours; what is right is grey instead of white twice.
COLOURS = dict(zip(CURVES, ("#f3f4f6", "#c9ced6", "#4f82bd", "#bf4f4d", "#5ce661", "#8064a3", "#ff9900"), strict=True))
KIND_COLOURS = dict(
    zip(
        (*KINDS, *SPECIALS),
        ("#805ad5", "#4f82bd", "#2c7a7b", "#d69e2e", "#c53030", "#ff9900", "#7b8794", "#7b8794"),
        strict=True,
    )
)
CURVE_WORDS = {
    "C75": "right at IoU .75",
    "C50": "right at IoU .5",
    "Loc": "badly placed (IoU .1)",
    "Sim": "taken for a similar class",
    "Oth": "taken for another class",
    "BG": "on background",
    "FN": "not found",
}
ALL_CLASSES = "allclass"
EXTRA_BARS = "ap bar plot"
EXTRA_GROUPS = "number of annotations per area group"
EXTRA_HISTOGRAM = "gt annotation areas histogram plot"
_DPI = 100
_LONGEST_NAME = 120


@dataclass
class SavedStacks:
    """The pictures by class (None: all) and area, and how many have no object to be drawn."""

    files: dict[tuple[int | None, int], Path] = field(default_factory=dict)
    without_objects: int = 0


def file_names(names: Sequence[str], category_ids: Sequence[int]) -> list[str]:
    """Return for each class what stands for it in a file name: different ones, valid on every system."""
    # File systems end a name at 255 bytes, and type, size and extension come to it.
    short = [name.encode()[:_LONGEST_NAME].decode(errors="ignore") for name in names]
    safe = [re.sub(r'[\x00-\x1f<>:"/\\|?*]', "_", name).strip(". ") or "class" for name in short]
    taken = [name.casefold() for name in (*safe, ALL_CLASSES)]
    return [
        name if taken.count(name.casefold()) == 1 else f"{name} ({identifier})"
        for name, identifier in zip(safe, category_ids, strict=True)
    ]


def save_stacks(
    folder: Path,
    stacks: ErrorStacks,
    overlaps: Overlaps,
    names: Sequence[str],
    *,
    bars: bool,
    progress: Callable[[int, int], None] | None = None,
) -> SavedStacks:
    """Draw ``{type}-{class}-{area}.png`` of all classes together and of each."""
    saved = SavedStacks()
    stack, bar = _StackPicture(), _BarPicture() if bars else None
    shown = file_names(names, overlaps.category_ids.tolist())
    labels = [(None, ALL_CLASSES, ALL_CLASSES), *zip(range(len(names)), names, shown, strict=True)]
    for done, (label, name, file_name) in enumerate(labels, start=1):
        for area, area_name in enumerate(AREA_NAMES):
            curves, ap = stacks.curves(area, label), stacks.ap(area, label)
            if curves is None or ap is None:
                saved.without_objects += 1
                continue
            title = f"{overlaps.iou_type}-{name}-{area_name}".replace("$", r"\$")
            count = stacks.objects[area].sum() if label is None else stacks.objects[area, label]
            path = folder / f"{overlaps.iou_type}-{file_name}-{area_name}.png"
            stack.save(path, f"{title}  ({count} objects)", curves, ap)
            saved.files[label, area] = path
            if bar:
                bar.save(path.with_name(f"{path.stem}-{EXTRA_BARS}.png"), f"{title}  ({count} objects)", ap)
        if progress:
            progress(done, len(labels))
    return saved


class _Repeated:
    """A figure of which only some parts change from picture to picture: what stands still is drawn once."""

    def __init__(self, figure: Figure, moving: Sequence[Artist]) -> None:
        # The canvas has no types.
        self._canvas = cast("Any", FigureCanvasAgg(figure))
        self._figure, self._moving = figure, moving
        for one in moving:
            one.set_animated(True)
        self._canvas.draw()
        self._ground = self._canvas.copy_from_bbox(figure.bbox)

    def save(self, path: Path) -> None:
        self._canvas.restore_region(self._ground)
        for one in self._moving:
            self._figure.draw_artist(one)
        Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB").save(path)


class _StackPicture:
    """Seven layers of precision over recall."""

    def __init__(self) -> None:
        figure = Figure(figsize=(7.6, 4.8), dpi=_DPI)
        axes = figure.add_axes((0.085, 0.115, 0.56, 0.8))
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision")
        flat = np.zeros_like(RECALLS)
        self._layers = [axes.fill_between(RECALLS, flat, flat, color=COLOURS[name], lw=0) for name in CURVES]
        self._lines = [axes.plot(RECALLS, flat, color="black", linewidth=0.6)[0] for _ in CURVES]
        self._title = figure.text(0.365, 0.94, "", ha="center", fontsize=10)
        self._figures = []
        # Top down as the layers lie on each other.
        for place, name in enumerate(CURVES[::-1]):
            y = 0.89 - 0.055 * place
            figure.add_artist(
                Rectangle((0.665, y - 0.006), 0.022, 0.027, facecolor=COLOURS[name], edgecolor="black", linewidth=0.6)
            )
            self._figures.append(figure.text(0.694, y, "", fontsize=8.5))
            figure.text(0.764, y, f"{name}  {CURVE_WORDS[name]}", fontsize=8.3)
        moving = (*self._layers, *self._lines, *axes.spines.values(), self._title, *self._figures)
        self._picture = _Repeated(figure, moving)

    def save(self, path: Path, title: str, curves: Floats, ap: dict[str, float]) -> None:
        below = np.zeros_like(RECALLS)
        for layer, line, curve in zip(self._layers, self._lines, curves, strict=True):
            layer.set_data(RECALLS, below, curve)
            line.set_ydata(curve)
            below = curve
        for text, name in zip(self._figures, CURVES[::-1], strict=True):
            text.set_text(f"[{ap[name]:.3f}]")
        self._title.set_text(title)
        self._picture.save(path)


class _BarPicture:
    """The area below each curve as a bar, and how much each error takes."""

    def __init__(self) -> None:
        figure = Figure(figsize=(6.4, 4.2), dpi=_DPI)
        axes = figure.add_axes((0.11, 0.12, 0.86, 0.78))
        colours = list(COLOURS.values())
        self._bars = axes.bar(CURVES, [0.0] * len(CURVES), color=colours, edgecolor="black", linewidth=0.6)
        self._texts = [axes.text(place, 0, "", ha="center", fontsize=8.5) for place in range(len(CURVES))]
        self._title = figure.text(0.54, 0.94, "", ha="center", fontsize=10)
        axes.set(ylim=(0, 1.15), ylabel="area below the curve")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        self._picture = _Repeated(figure, (*self._bars, *self._texts, axes.spines["bottom"], self._title))

    def save(self, path: Path, title: str, ap: dict[str, float]) -> None:
        before = 0.0
        for place, (bar, text, value) in enumerate(zip(self._bars, self._texts, ap.values(), strict=True)):
            bar.set_height(value)
            text.set_y(value + 0.015)
            text.set_text(f"{value:.3f}\n(+{value - before:.3f})" if place else f"{value:.3f}")
            before = value
        self._title.set_text(title)
        self._picture.save(path)


def save_area_pictures(folder: Path, overlaps: Overlaps, areas: Sequence[float]) -> list[Path]:
    """Draw how many objects are small, medium and large, and the histogram of their areas."""
    area = overlaps.object_area[~overlaps.crowd]
    groups = np.bincount(size_groups(area, areas), minlength=4)
    small, medium, _ = areas
    words = [f"0 to {small:g} px²", f"{small:g} to {medium:g} px²", f"from {medium:g} px²"]
    words = [f"{name}\n{text}" for name, text in zip(AREA_NAMES[1:], words, strict=True)]
    figure = Figure(figsize=(6.4, 4.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    counts = [len(area), *groups[:3].tolist()]
    drawn = axes.bar([f"{AREA_NAMES[0]}\n ", *words], counts, color=["#7b8794", "#90cdf4", "#4299e1", "#2b6cb0"])
    axes.bar_label(drawn, [f"{count}\n({count / max(len(area), 1):.0%})" for count in counts], fontsize=9)
    axes.margins(y=0.18)
    axes.set(ylabel="objects", title=EXTRA_GROUPS)
    grouped = folder / f"{EXTRA_GROUPS}.png"
    figure.savefig(grouped)
    figure = Figure(figsize=(6.4, 4.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    sides = np.sqrt(area[area > 0])
    if len(sides):
        axes.hist(sides, bins=np.geomspace(sides.min() * 0.99, sides.max() * 1.01, 60).tolist(), color="#4f82bd")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        for end in areas[:2]:
            axes.axvline(end**0.5, color="black", linewidth=1, linestyle="--")
    axes.set(xlabel="√area, px (dashed: small | medium | large)", ylabel="objects", title=EXTRA_HISTOGRAM)
    histogram = folder / f"{EXTRA_HISTOGRAM}.png"
    figure.savefig(histogram)
    return [grouped, histogram]


def tide_figure(errors: TideErrors, area: int = 0, label: int | None = None) -> Figure:
    """Draw what each kind of error costs, in AP points, beside how often it occurs."""
    figures = errors.figures(area, label)
    figure = Figure(figsize=(10.4, 3.3), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.25, 0.75, 1.25])
    delta = figures.delta_ap or {}
    for axes, kinds, title in ((left, KINDS, "cost of each kind"), (middle, SPECIALS, "all of one side")):
        values = [100 * delta.get(kind, 0.0) for kind in kinds]
        _bars(axes, kinds, values, [f"{value:.1f}" for value in values])
        axes.set_title(f"{title}, AP points", fontsize=10)
    # The same scale for each picture of ΔAP would hide the smaller ones behind FP and FN.
    _bars(right, KINDS, [figures.counts[kind] for kind in KINDS], [f"{figures.counts[kind]:,}" for kind in KINDS])
    right.set_title("how many", fontsize=10)
    return figure


def _bars(axes: Axes, kinds: Sequence[str], values: Sequence[float], texts: Sequence[str]) -> None:
    # Bars of one thickness, however many there are.
    thickness = 0.7 * len(kinds) / len(KINDS)
    bars = axes.barh(kinds, values, color=[KIND_COLOURS[kind] for kind in kinds], height=thickness)
    axes.bar_label(bars, texts, padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    if not any(values):
        axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
