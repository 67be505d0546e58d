"""The plots of a detection report, as SVG that a page holds.

They have no ground of their own: on a dark page its style turns their ink light.
"""

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dettools.analysis.detection_report import Calibration, DetectionReport
from dettools.coco_metrics import IOU_THRESHOLDS
from dettools.reports.curves import figure_style, inline_svg

_BLUE, _GREEN, _ORANGE, _GREY = "#0b62c4", "#009e54", "#dd7a00", "#6e7781"
_TICKS_PX = (1, 2, 4, 8, 16, 32, 96, 192, 384, 768, 1536, 3072)


def precision_recall(report: DetectionReport) -> Markup:
    """Draw precision over recall, the mean of the classes, from IoU .50 to .95."""
    with figure_style("pr"):
        figure, axes = _axes()
        for place, iou in enumerate(IOU_THRESHOLDS):
            named = place in (0, 5, 9)
            axes.plot(
                report.curves.recall,
                report.curves.by_iou[place],
                color=_BLUE,
                alpha=1 - 0.085 * place,
                linewidth=2.4 if place in (0, 5) else 1,
                label=f"IoU {iou:.2f}" if named else None,
            )
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.03))
        _legend_above(axes)
        return _markup(figure, "pr")


def threshold_plot(report: DetectionReport) -> Markup:
    """Draw precision, recall and F1 over the score threshold, with the best and the chosen one."""
    with figure_style("thresholds"):
        figure, axes = _axes()
        curve = report.thresholds
        lines = (("precision", curve.precision, _BLUE), ("recall", curve.recall, _ORANGE), ("F1", curve.f1, _GREEN))
        for name, values, colour in lines:
            axes.plot(curve.score, values, color=colour, linewidth=2.6 if name == "F1" else 1.6, label=name)
        if (best := curve.best) is not None:
            axes.plot([best.score], [best.f1], "o", color=_GREEN, markersize=7)
            axes.axvline(best.score, color=_GREEN, linestyle=":", linewidth=1.4, label=f"best F1: {best.score:.2f}")
        in_use = f"in use: {report.score_threshold:g}"
        axes.axvline(report.score_threshold, color=_GREY, linestyle="--", linewidth=1.4, label=in_use)
        axes.set(xlabel="score threshold", ylabel="share", xlim=(0, 1), ylim=(0, 1.03))
        _legend_above(axes)
        return _markup(figure, "thresholds")


def reliability(calibration: Calibration) -> Markup:
    """Draw the share of right detections beside the mean score of each bin, and how many there are."""
    with figure_style("reliability"):
        figure = Figure(figsize=(5.6, 4.6))
        axes, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        used = [one for one in calibration.bins if one.count]
        middle = [(one.low + one.high) / 2 for one in used]
        width = [0.92 * (one.high - one.low) for one in used]
        axes.bar(middle, [one.right for one in used], width, color=_BLUE, label="share that is right")
        axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1.4, label="calibrated")
        axes.plot(
            [one.score for one in used], [one.right for one in used], "o", color=_ORANGE, label="at the mean score"
        )
        axes.set(ylabel="right at IoU 0.50", xlim=(0, 1), ylim=(0, 1.03))
        _legend_above(axes)
        below.bar(middle, [one.count for one in used], width, color=_GREY)
        below.set(xlabel="score", ylabel="detections")
        return _markup(figure, "reliability")


def size_plot(report: DetectionReport) -> Markup:
    """Draw how many objects there are of each size, and how many of them are found."""
    with figure_style("sizes"):
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
            axes.axvline(limit, color=_GREY, linestyle="--", linewidth=1.2)
        for name, low, high in (("small", edges[0], 32), ("medium", 32, 96), ("large", 96, edges[-1])):
            axes.text((low * high) ** 0.5, top * 1.02, name, ha="center", color=_GREY)
        axes.set(xscale="log", xlabel="√area, px", ylabel="objects", ylim=(0, top * 1.1), xlim=(edges[0], edges[-1]))
        ticks = [one for one in _TICKS_PX if edges[0] <= one <= edges[-1]]
        axes.set_xticks(ticks, labels=[str(one) for one in ticks])
        axes.minorticks_off()
        _legend_above(axes)
        return _markup(figure, "sizes")


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 4))
    axes: Axes = figure.subplots()
    return figure, axes


def _legend_above(axes: Axes) -> None:
    """Put the legend where no curve can run."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, columnspacing=1.2, handlelength=1.6)


def _markup(figure: Figure, name: str) -> Markup:
    return Markup(inline_svg(figure, name))  # noqa: S704 - our own SVG
