"""The plots of a detection report, as SVG that a page holds."""

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dettools.analysis.detection_report import Calibration, DetectionReport
from dettools.coco_metrics import IOU_THRESHOLDS
from dettools.reports.evaluation_page import svg

_BLUE, _GREEN, _RED, _ORANGE, _GREY = "#0b62c4", "#009e54", "#c53030", "#dd7a00", "#8a9099"


def precision_recall(report: DetectionReport) -> Markup:
    """Draw precision over recall, the mean of the classes, from IoU .50 to .95."""
    figure, axes = _axes()
    for place, iou in enumerate(IOU_THRESHOLDS):
        strength = 1 - 0.085 * place
        axes.plot(
            report.curves.recall,
            report.curves.by_iou[place],
            color=_BLUE,
            alpha=strength,
            linewidth=2.4 if place in (0, 5) else 1,
            label=f"IoU {iou:.2f}" if place in (0, 5, 9) else None,
        )
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.03))
    axes.legend(loc="lower left", frameon=False)
    return _markup(figure)


def threshold_plot(report: DetectionReport) -> Markup:
    """Draw precision, recall and F1 over the score threshold, with the best and the chosen one."""
    figure, axes = _axes()
    curve = report.thresholds
    lines = (
        ("precision", curve.precision, _BLUE),
        ("recall", curve.recall, _ORANGE),
        ("F1", curve.f1, _GREEN),
    )
    for name, values, colour in lines:
        axes.plot(curve.score, values, color=colour, linewidth=2.6 if name == "F1" else 1.6, label=name)
    if curve.best is not None:
        axes.plot([curve.best.score], [curve.best.f1], "o", color=_GREEN, markersize=8)
        axes.axvline(curve.best.score, color=_GREEN, linestyle=":", linewidth=1.2, label="best F1")
    axes.axvline(report.score_threshold, color=_GREY, linestyle="--", linewidth=1.2, label="counts of this page")
    axes.set(xlabel="score threshold", ylabel="share", xlim=(0, 1), ylim=(0, 1.03))
    axes.legend(loc="lower left", frameon=False)
    return _markup(figure)


def reliability(calibration: Calibration) -> Markup:
    """Draw the share of right detections beside the mean score of each bin, and how many there are."""
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    used = [one for one in calibration.bins if one.count]
    middle = [(one.low + one.high) / 2 for one in used]
    width = [0.92 * (one.high - one.low) for one in used]
    axes.bar(middle, [one.right for one in used], width, color=_BLUE, label="right at IoU 0.50")
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1.2, label="perfect")
    axes.plot([one.score for one in used], [one.right for one in used], "o", color=_ORANGE, label="at the mean score")
    axes.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.03))
    axes.legend(loc="upper left", frameon=False)
    below.bar(middle, [one.count for one in used], width, color=_GREY)
    below.set(xlabel="score", ylabel="detections")
    for one in (axes, below):
        _plain(one)
    return _markup(figure)


def size_plot(report: DetectionReport) -> Markup:
    """Draw how many objects there are of each size, and how many of them are found."""
    figure, axes = _axes()
    side = np.maximum(report.object_side, 1)
    edges = np.geomspace(min(8.0, side.min(initial=8.0)), max(128.0, side.max(initial=128.0)) * 1.01, 25)
    axes.hist(
        [side[report.object_found], side[~report.object_found]],
        bins=edges.tolist(),
        stacked=True,
        color=[_GREEN, _ORANGE],
        label=["found", "not found"],
    )
    top = axes.get_ylim()[1]
    for limit in (32, 96):
        axes.axvline(limit, color=_GREY, linestyle="--", linewidth=1)
    for name, low, high in (("small", edges[0], 32), ("medium", 32, 96), ("large", 96, edges[-1])):
        axes.text((low * high) ** 0.5, top * 1.02, name, ha="center", color="#57606a")
    axes.set(xscale="log", xlabel="√area, px (log)", ylabel="objects", ylim=(0, top * 1.1), xlim=(edges[0], edges[-1]))
    ticks = [one for one in (8, 16, 32, 64, 96, 128, 256, 512, 1024) if edges[0] <= one <= edges[-1]]
    axes.set_xticks(ticks, labels=[str(one) for one in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return _markup(figure)


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 4), layout="constrained")
    axes: Axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.grid(color="#e5e8eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _markup(figure: Figure) -> Markup:
    return Markup(svg(figure))  # noqa: S704 - our own SVG
