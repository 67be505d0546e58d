"""A confusion matrix as a picture that can be read, also with 80 classes; and its counts over the score threshold.

Of many classes those that are confused most are drawn, all others as one row and one column, so that rows still sum up.
A cell that counts nothing is left white, and so is a row that has nothing to count.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from detserve.errors import DetserveError
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dettools.analysis.confusion import Confusion, Normalization, SweepRow, chosen_classes, merged, normalized
from dettools.reports.confusion_tables import BACKGROUND, MISSED, OTHERS

COLOURS = {"found": "#2f855a", "confused": "#805ad5", "missed": "#dd8b20", "background": "#c53030"}
_HEADS: dict[Normalization, str] = {
    "rows": "% of each class's objects (a row sums to 100)",
    "columns": "% of each class's detections (a column sums to 100)",
    "all": "% of everything that is counted",
    "none": "counts",
}
_LONGEST_NAME = 24


class ColourThemeError(DetserveError):
    """matplotlib has no colour map of this name."""


def save_matrix(
    path: Path, confusion: Confusion, names: Sequence[str], *, by: Normalization, theme: str, most: int
) -> int:
    """Draw the matrix; return how many classes have a row of their own.

    Args:
        path: of the PNG.
        confusion: what was counted.
        names: of the classes.
        by: what the cells show.
        theme: a colour map of matplotlib.
        most: draw at most so many classes.

    Raises:
        ColourThemeError: an unknown theme.
    """
    if theme not in mpl.colormaps:
        raise ColourThemeError(
            f"--color-theme {theme}: expected a colour map of matplotlib, such as plasma, viridis, Blues or Greens"
        )
    chosen = chosen_classes(confusion, most)
    counts = merged(confusion.counts, chosen)
    others = [OTHERS] if len(chosen) < confusion.classes else []
    kept = [names[one] for one in chosen] + others
    values = normalized(counts, by) * (1 if by == "none" else 100)
    shown = np.where(counts > 0, values, np.nan)
    size = len(counts)
    # The corner (background, missed) is nothing that could be counted.
    cell_in = 0.5 if size <= 12 else 0.36
    figure = Figure(figsize=(max(size * cell_in + 2.6, 6.4), max(size * cell_in + 2.2, 5.2)), layout="constrained")
    axes = figure.subplots()
    colours = mpl.colormaps[theme]
    largest = 100.0 if by in ("rows", "columns") else max(float(np.nanmax(shown, initial=1e-9)), 1e-9)
    image = axes.imshow(np.ma.masked_invalid(shown), cmap=colours, norm=Normalize(0, largest), aspect="equal")
    for row, column in np.argwhere(counts > 0):
        value = values[row, column]
        red, green, blue, _ = colours(value / largest)
        # Halves go up, as on the page.
        text = f"{int(value + 0.5)}" if by == "none" or value >= 0.5 else "<1"
        # A count of many digits still fits its cell.
        points = (9 if size <= 12 else 7) * min(1.0, 3.2 / max(len(text), 1))
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"
        axes.text(column, row, text, ha="center", va="center", fontsize=points, color=ink)
    rows = _with_counts([*kept, BACKGROUND], counts.sum(axis=1).tolist())
    columns = _with_counts([*kept, MISSED], counts.sum(axis=0).tolist())
    points = 9 if size <= 12 else 7.5
    axes.set_xticks(range(size), columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=points)
    axes.set_yticks(range(size), rows, fontsize=points)
    axes.set_xticks(np.arange(-0.5, size), minor=True)
    axes.set_yticks(np.arange(-0.5, size), minor=True)
    axes.grid(which="minor", color="#d9dee5", linewidth=0.5)
    axes.tick_params(which="both", length=0)
    for line in (axes.axhline, axes.axvline):
        line(size - 1.5, color="#1f2933", linewidth=1)
    axes.set_xlabel("predicted class (detections)", fontsize=1.2 * points)
    axes.set_ylabel("true class (objects)", fontsize=1.2 * points)
    lines = [_HEADS[by], f"score ≥ {confusion.score_threshold:g}, IoU ≥ {confusion.iou_threshold:g}"]
    if others:
        lines[1] += f"; {len(chosen)} of {confusion.classes} classes: the most confused, then the most frequent"
    title = "Normalized Confusion Matrix" if by != "none" else "Confusion Matrix"
    axes.set_title("\n".join([title, *lines]), fontsize=max(10.0, 0.4 * size), pad=12)
    figure.colorbar(image, ax=axes, shrink=0.5, aspect=30, pad=0.02, label="count" if by == "none" else "%")
    figure.savefig(path, dpi=150)
    return len(chosen)


def sweep_figure(rows: Sequence[SweepRow], at: float) -> Figure:
    """Draw what becomes of the objects, and of the detections, over the score threshold; ``at`` is the one in use."""
    scores = [one.score_threshold for one in rows]
    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    kinds = ("found", "confused", "missed")
    values = [[getattr(one, kind) for one in rows] for kind in kinds]
    upper.stackplot(scores, *values, labels=kinds, colors=[COLOURS[kind] for kind in kinds], alpha=0.85)
    upper.set_ylabel("objects")
    names = {"found": "right", "confused": "wrong class", "background": "on background"}
    values = [[getattr(one, kind) for one in rows] for kind in names]
    lower.stackplot(scores, *values, labels=names.values(), colors=[COLOURS[kind] for kind in names], alpha=0.85)
    lower.set_ylabel("detections")
    lower.set_xlabel("score threshold")
    best = max(rows, key=lambda one: one.f1)
    for axes in (upper, lower):
        axes.axvline(at, color="#1f2933", linewidth=1.2, label=f"in use: {at:g}")
        axes.axvline(
            best.score_threshold,
            color="#1f2933",
            linewidth=1.2,
            linestyle=":",
            label=f"best F1: {best.f1:.3f} at {best.score_threshold:g}",
        )
        axes.set_xlim(scores[0], scores[-1])
        axes.set_ylim(bottom=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def _with_counts(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    short = (name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…" for name in names)
    # A name with a dollar sign would be read as a formula.
    return [f"{name} ({count})".replace("$", r"\$") for name, count in zip(short, counts, strict=True)]
