"""Optimized anchors for people: a table beside the present ones, and a picture of the boxes with the anchors on it."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dettools.analysis.anchor_boxes import Coverage, Sizes
from dettools.analysis.anchor_config import Anchor, AnchorLayout

# Fewer boxes are drawn one by one.
FEWEST_COUNTED = 5000
_ROWS = {
    "mean_iou": "mean IoU with the best anchor",
    "best_possible_recall": "best possible recall (sides within ×4)",
    "recall50": "recall at IoU .50",
    "recall75": "recall at IoU .75",
    "average_recall": "average recall, IoU .50:.95",
}


def print_coverage(now: Coverage, before: Coverage | None, console: Console) -> None:
    """Print one row per figure; with the present anchors' beside it where there are some."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"{now.boxes} boxes")
    if before is not None:
        table.add_column("present", justify="right")
    table.add_column("new", justify="right")
    if before is not None:
        table.add_column("change", justify="right")
    for key, name in _ROWS.items():
        value = getattr(now, key)
        if before is None:
            table.add_row(name, f"{value:.4f}")
        else:
            change = value - getattr(before, key)
            colour = "green" if change > 0 else "red" if change < 0 else "dim"
            table.add_row(name, f"{getattr(before, key):.4f}", f"{value:.4f}", f"[{colour}]{change:+.4f}[/]")
    console.print(table)


def print_levels(
    levels: Sequence[Sequence[Anchor]], layout: AnchorLayout, coverage: Coverage, console: Console
) -> None:
    """Print the anchors of each level with the share of the boxes that each one covers best."""
    by_area = sorted((anchor for level in levels for anchor in level), key=lambda one: (one[0] * one[1], one))
    shares = dict(zip(by_area, coverage.per_anchor, strict=True))
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stride", justify="right")
    table.add_column("anchors, width × height px (share of the boxes)")
    for stride, level in zip(layout.strides, levels, strict=True):
        table.add_row(
            str(stride),
            escape("   ".join(f"{width} × {height} ({shares[width, height]:.0%})" for width, height in level)),
        )
    console.print(table)


def save_anchor_picture(
    path: Path, sizes: Sizes, anchors: Sequence[Anchor], present: Sequence[Sequence[float]], coverage: Coverage
) -> None:
    """Draw how many boxes have which width and height, with the anchors as crosses on it."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.patheffects import withStroke

    figure, axes = plt.subplots(figsize=(7.2, 6.2), dpi=120, layout="constrained")
    low, high = max(1.0, float(sizes.min())), float(sizes.max()) * 1.05
    if coverage.boxes > FEWEST_COUNTED:
        edges = np.geomspace(low, max(high, low * 1.1), 70)
        width, height = sizes.clip(low).T
        *_, image = axes.hist2d(width, height, bins=[edges, edges], norm=LogNorm(), cmap="Blues")
        figure.colorbar(image, ax=axes, label="boxes", shrink=0.8)
    else:
        axes.plot(*sizes.clip(low).T, ".", color="steelblue", markersize=5, alpha=0.5, label="boxes")
    if present:
        table = np.array(present, np.float64)
        axes.plot(table[:, 0], table[:, 1], "s", color="0.35", markersize=8, fillstyle="none", label="present anchors")
    table = np.array(anchors, np.float64)
    axes.plot(
        table[:, 0], table[:, 1], "P", color="crimson", markeredgecolor="white", markersize=12, label="new anchors"
    )
    outlined = [withStroke(linewidth=2.5, foreground="white")]
    for anchor in anchors:
        name = f"{anchor[0]}×{anchor[1]}"
        axes.annotate(
            name, anchor, xytext=(7, 5), textcoords="offset points", fontsize=8, color="crimson", path_effects=outlined
        )
    axes.set(xscale="log", yscale="log", xlabel="width at the network's input, px", ylabel="height, px", aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_title(f"{coverage.boxes} boxes: mean IoU with the best anchor {coverage.mean_iou:.3f}")
    axes.legend(loc="upper left", framealpha=0.9)
    figure.savefig(path)
    plt.close(figure)
