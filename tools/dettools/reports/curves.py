"""The pictures of a benchmark as SVG text: drawn without a display, the same bytes from the same run.

Text stays text, so that a page can be searched; every id carries the picture's name, so that many fit on one page.
"""

import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from dettools.benchmark.measurement import STAGES, Sample
from dettools.benchmark.percentiles import latencies_ms
from dettools.benchmark.run import Run
from dettools.benchmark.statistics import LevelSummary, measured_samples
from dettools.benchmark.summary import UNSEEN_MS

Samples = Sequence[Sequence[Sample]]
"""The requests of each level."""

WIDTH_IN = 9.6
INK, GRID, WARN, BAD, GOOD = "#1f2933", "#d9dee5", "#b7791f", "#c53030", "#2f855a"
PERCENTILE_COLOURS = {50.0: "#2b6cb0", 95.0: "#805ad5", 99.0: "#c05621"}
# Waiting in greys, the worker's own work in colours.
STAGE_COLOURS = dict(
    zip(
        STAGES,
        ("#9aa5b1", "#cbd2d9", "#e4e7eb", "#2b6cb0", "#63b3ed", "#dd6b20", "#38a169", "#b794f4"),
        strict=True,
    )
)
MOST_POINTS = 600
_RC: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.constrained_layout.use": True,
}


def latency_throughput(run: Run) -> str:
    """Draw latency over throughput, a point per level, with the knee and the SLO; hollow points are INVALID levels."""
    with figure_style("curve"):
        figure = Figure(figsize=(WIDTH_IN, 4.2))
        axes = figure.subplots()
        order = sorted(range(len(run.levels)), key=lambda index: run.levels[index].load.value)
        rates = [run.levels[index].throughput_rps.value for index in order]
        for p, colour in PERCENTILE_COLOURS.items():
            values = [_shown(run.levels[index], p) for index in order]
            if any(math.isfinite(value) for value in values):
                axes.plot(rates, values, color=colour, linewidth=1.6, label=f"p{p:g}")
                _intervals(axes, run, order, p, colour)
        medians = [_shown(run.levels[index], 50) for index in order]
        _name_points(axes, rates, medians, [f"{run.levels[index].load.value:g}" for index in order])
        if run.knee is not None:
            knee = run.levels[run.knee.level]
            axes.axvline(knee.throughput_rps.value, color=GOOD, linewidth=1.2, linestyle="--", label="knee")
        if run.slo is not None:
            axes.axhline(run.slo.slo.limit_ms, color=BAD, linewidth=1.2, linestyle=":", label=f"SLO {run.slo.slo.name}")
        unit = "requests" if run.kind == "served" else "images"
        axes.set_xlabel(f"throughput, {unit} answered per second")
        axes.set_ylabel("latency, ms")
        axes.set_xlim(left=0)
        _latency_scale(axes, medians)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", ncols=5)
        return inline_svg(figure, "curve")


def throughput_bars(run: Run) -> str:
    """Draw images per second by batch size, with intervals: the picture of a run in process."""
    with figure_style("bars"):
        figure = Figure(figsize=(WIDTH_IN, 1.0 + 0.45 * len(run.levels)))
        axes = figure.subplots()
        for row, level in enumerate(run.levels):
            rate = level.throughput_rps
            axes.barh(row, rate.value, height=0.6, color="#2b6cb0" if row != run.best else GOOD)
            if rate.low is not None and rate.high is not None:
                axes.plot([rate.low, rate.high], [row, row], color=INK, linewidth=1.4)
            axes.annotate(
                f"{rate.value:.1f}", (rate.high or rate.value, row), (6, 0), textcoords="offset points", va="center"
            )
        _level_axis(axes, run)
        axes.set_xlim(0, 1.12 * max((level.throughput_rps.value for level in run.levels), default=1.0))
        axes.set_xlabel("images per second, with the 95 % interval")
        return inline_svg(figure, "bars")


def tails(run: Run, samples: Samples) -> str:
    """Draw which share of the requests took longer than so long, a line per level: the tail that a median hides."""
    with figure_style("tails"):
        figure = Figure(figsize=(WIDTH_IN, 4.0))
        axes = figure.subplots()
        for name, level, sent, colour in zip(run.labels, run.levels, samples, _ramp(len(run.levels)), strict=True):
            latencies = np.sort(_measured(level, sent))
            if len(latencies):
                beyond = 1 - np.arange(1, len(latencies) + 1) / len(latencies)
                keep = _thinned(len(latencies))
                # The last value has nothing beyond it: half a request, to be drawn at all on a logarithmic axis.
                axes.plot(latencies[keep], np.maximum(beyond[keep], 0.5 / len(latencies)), color=colour, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_ticks(axes, "x")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.set_xlabel("latency, ms")
        axes.set_ylabel("requests slower than this")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return inline_svg(figure, "tails")


def histograms(run: Run, samples: Samples) -> str:
    """Draw the latency histogram of each level on one common axis, with p50 and p99."""
    with figure_style("histograms"):
        measured = [_measured(level, sent) for level, sent in zip(run.levels, samples, strict=True)]
        everything = np.concatenate(measured) if measured else np.zeros(0)
        low, high = (everything.min(), everything.max()) if len(everything) else (1.0, 10.0)
        bins = np.geomspace(max(low, 1e-3) * 0.98, max(high, 2e-3) * 1.02, 60)
        figure, cells = _grid(len(run.levels), 1.5)
        for axes, name, level, latencies in zip(cells, run.labels, run.levels, measured, strict=False):
            axes.stairs(np.histogram(latencies, bins)[0], bins, fill=True, color="#90cdf4")
            for p in (50.0, 99.0):
                if math.isfinite(value := _shown(level, p)):
                    axes.axvline(value, color=PERCENTILE_COLOURS[p], linewidth=1.2)
            axes.set_xscale("log")
            _plain_ticks(axes, "x")
            axes.set_title(name)
            axes.set_yticks([])
        figure.supxlabel("latency, ms (lines: p50 blue, p99 orange)", fontsize=9)
        return inline_svg(figure, "histograms")


def over_time(run: Run, samples: Samples) -> str:
    """Draw latency over time for each level: warm-up shaded, failed requests as red marks at the bottom."""
    with figure_style("time"):
        figure, cells = _grid(len(run.levels), 1.6)
        for axes, name, level, sent in zip(cells, run.labels, run.levels, samples, strict=False):
            answered = [sample for sample in sent if sample.ok]
            due = np.array([sample.scheduled_s for sample in answered])
            latencies = latencies_ms(answered)
            if len(latencies) > MOST_POINTS:
                _band(axes, due, latencies)
            elif len(latencies):
                axes.plot(due, latencies, ".", color="#2b6cb0", markersize=3.5)
            failed = [sample.scheduled_s for sample in sent if not sample.ok]
            if failed:
                marks = np.array(failed)[_thinned(len(failed))]
                axes.plot(marks, np.zeros(len(marks)), "|", color=BAD, markersize=9, clip_on=False)
            if level.warm_up.seconds > 0:
                axes.axvspan(0, level.warm_up.seconds, color="#fbd38d", alpha=0.55, linewidth=0)
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.set_title(name)
        figure.supxlabel("seconds since the level began", fontsize=9)
        figure.supylabel("latency, ms", fontsize=9)
        return inline_svg(figure, "time")


def stage_bars(run: Run) -> str:
    """Draw the mean latency of each level by its parts."""
    with figure_style("stages"):
        figure = Figure(figsize=(WIDTH_IN, 1.3 + 0.34 * len(run.levels)))
        axes = figure.subplots()
        used = [stage for stage in STAGES if any(level.stages_ms.get(stage, 0.0) > UNSEEN_MS for level in run.levels)]
        starts = np.zeros(len(run.levels))
        for stage in used:
            widths = np.array([level.stages_ms.get(stage, 0.0) for level in run.levels])
            axes.barh(
                range(len(widths)), widths, left=starts, height=0.66, color=STAGE_COLOURS[stage], label=_words(stage)
            )
            starts += widths
        _level_axis(axes, run)
        axes.set_xlabel("mean latency, ms")
        figure.legend(loc="outside upper left", ncols=len(STAGES), columnspacing=1.1, handlelength=1.1)
        return inline_svg(figure, "stages")


def batch_bars(run: Run) -> str:
    """Draw in which batch sizes the requests of each level were answered."""
    with figure_style("batches"):
        figure = Figure(figsize=(WIDTH_IN, 1.3 + 0.34 * len(run.levels)))
        axes = figure.subplots()
        sizes = sorted({size for level in run.levels for size in level.batch_sizes})
        starts = np.zeros(len(run.levels))
        for size, colour in zip(sizes, _ramp(len(sizes)), strict=True):
            totals = [sum(level.batch_sizes.values()) or 1 for level in run.levels]
            shares = [level.batch_sizes.get(size, 0) for level in run.levels]
            widths = 100 * np.array(shares) / np.array(totals)
            axes.barh(range(len(widths)), widths, left=starts, height=0.66, color=colour, label=f"{size}")
            starts += widths
        _level_axis(axes, run)
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the requests, %")
        figure.legend(loc="outside upper left", ncols=16, title="images in the worker's batch", alignment="left")
        return inline_svg(figure, "batches")


def figure_style(name: str) -> AbstractContextManager[None]:
    """The salt makes matplotlib's random ids the same each time."""
    return mpl.rc_context({**_RC, "svg.hashsalt": name})


def _shown(level: LevelSummary, p: float) -> float:
    found = level.percentile(p)
    return math.nan if found is None or found.ms is None else found.ms


def _measured(level: LevelSummary, samples: Sequence[Sample]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return latencies_ms([sample for sample in measured_samples(samples, level.warm_up) if sample.ok])


def _intervals(axes: Axes, run: Run, order: Sequence[int], p: float, colour: str) -> None:
    for index in order:
        level = run.levels[index]
        found = level.percentile(p)
        if found is None or found.ms is None:
            continue
        rate = level.throughput_rps.value
        if found.low_ms is not None and found.high_ms is not None:
            axes.plot([rate, rate], [found.low_ms, found.high_ms], color=colour, linewidth=4, alpha=0.25)
        invalid = run.verdicts[index].stamp == "INVALID"
        axes.plot(rate, found.ms, "o", markersize=5, color=colour, markerfacecolor="white" if invalid else colour)


def _name_points(axes: Axes, rates: Sequence[float], values: Sequence[float], names: Sequence[str]) -> None:
    """Write each level's load below its median; of points that nearly coincide only the last is named."""
    width = max(rates, default=0.0) or 1.0
    for index, (rate, value, name) in enumerate(zip(rates, values, names, strict=True)):
        crowded = any(
            abs(rate - other) < 0.025 * width and math.isfinite(above) and math.isfinite(value) and above < 1.12 * value
            for other, above in zip(rates[index + 1 :], values[index + 1 :], strict=True)
        )
        if math.isfinite(value) and not crowded:
            axes.annotate(name, (rate, value), (5, -11), textcoords="offset points", fontsize=8, color="#52606d")


def _latency_scale(axes: Axes, medians: Sequence[float]) -> None:
    """A sweep into overload spans decades."""
    finite = [value for value in medians if math.isfinite(value) and value > 0]
    if finite and max(finite) > 12 * min(finite):
        axes.set_yscale("log")
        _plain_ticks(axes, "y")
    else:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.12)


def _plain_ticks(axes: Axes, which: str) -> None:
    """10 and 100 instead of powers; the smaller ticks named only where there are few decades."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    few = low > 0 and high / low < 30
    names = FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.set_minor_formatter(names if few else NullFormatter())


def _level_axis(axes: Axes, run: Run) -> None:
    axes.set_yticks(range(len(run.levels)), run.labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _band(axes: Axes, due: Any, latencies: Any) -> None:
    """Of many points the least, the median and the largest in each of 200 stretches of time."""
    edges = np.linspace(due.min(), due.max() + 1e-9, 201)
    place = np.digitize(due, edges) - 1
    used = np.unique(place)
    parts = [latencies[place == index] for index in used]
    at = (edges[used] + edges[used + 1]) / 2
    least, largest = [part.min() for part in parts], [part.max() for part in parts]
    axes.fill_between(at, least, largest, color="#90cdf4", linewidth=0)
    axes.plot(at, [np.median(part) for part in parts], color="#2b6cb0", linewidth=1)


def _grid(count: int, height_in: float) -> tuple[Figure, list[Axes]]:
    columns = min(4, max(1, count))
    rows = max(1, math.ceil(count / columns))
    figure = Figure(figsize=(WIDTH_IN, 0.5 + height_in * rows))
    cells = np.atleast_1d(figure.subplots(rows, columns)).ravel().tolist()
    for axes in cells[count:]:
        axes.remove()
    return figure, cells[:count]


def _ramp(count: int) -> list[Any]:
    return [mpl.colormaps["viridis"](0.88 * (1 - index / max(1, count - 1))) for index in range(count)]


def _thinned(count: int) -> Any:
    """Return indices of at most 600 of so many points, the last of them all: the tail is what is looked at."""
    if count <= MOST_POINTS:
        return np.arange(count)
    tail = MOST_POINTS // 3
    return np.unique(
        np.concatenate((np.linspace(0, count - 1, MOST_POINTS - tail).astype(int), np.arange(count - tail, count)))
    )


def _words(stage: str) -> str:
    return stage.replace("network_queue", "network + queue")


def inline_svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element of a page; ``name`` keeps its ids apart from those of other figures."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\1{name}-", svg)
    # The page scales it.
    head, tag, rest = svg.partition(">")
    return re.sub(r' (?:width|height)="[^"]*"', "", head) + tag + rest
