"""Curves of training runs as one picture without a display, a table of their last and best values, and a CSV file."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich import box
from rich.markup import escape
from rich.table import Table

from dettools.analysis.training_curves import Band, Curve, Point, places_of, scale_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from rich.console import Console

STYLES = ("dark", "darkgrid", "ticks", "white", "whitegrid")
"""Seaborn's; matplotlib brings them along."""

_COLOURS = (
    "#2b6cb0",
    "#dd6b20",
    "#2f855a",
    "#805ad5",
    "#b83280",
    "#319795",
    "#975a16",
    "#4a5568",
    "#63b3ed",
    "#68d391",
)
_TIME = re.compile(r"\d{8}_\d{6}")
_SAY_NOTHING = ("vis_data", "scalars.json", "results.csv", "metrics.csv")
_LINES = ("-", "--", ":", "-.")
_BAD = "#c53030"
# From here on a linear axis shows a few values and a flat line.
_WIDE_RANGE = 50
_MOST_MARKED = 80
_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.alpha": 0.6,
    "grid.linewidth": 0.6,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "detserve",
}


@dataclass(frozen=True)
class Drawn:
    """A curve as it is drawn.

    Attributes:
        curve: the values.
        label: in the legend.
        run, key: place of its run and of its metric among those given.
        resumed_at: iterations at which the run was resumed.
    """

    curve: Curve
    label: str
    run: int
    key: int
    resumed_at: tuple[int, ...] = ()


def short_names(names: Sequence[str]) -> list[str]:
    """Return the part of each path that tells the runs apart; the whole paths where no one part does."""
    parts = [[part for part in PurePath(name).parts if part not in ("/", "..")] for name in names]
    # The folder of 20210113_153932.log.json or vis_data/scalars.json says more than the file.
    telling = [[part for part in own if part not in _SAY_NOTHING and not _TIME.match(part)] for own in parts]
    last = [own[-1] if own else name for own, name in zip(telling, names, strict=True)]
    if len(set(last)) == len(names):
        return last
    for place in range(max(map(len, parts))):
        column = [own[place] if place < len(own) else "" for own in parts]
        if len(set(column)) == len(names) and all(column):
            return column
    return list(names)


def save_curves(
    path: Path,
    drawn: Sequence[Drawn],
    bands: Sequence[Band] = (),
    *,
    title: str | None = None,
    style: str = "whitegrid",
    band_labels: Sequence[str] = (),
) -> None:
    """Draw the curves, those of one scale in one panel; with bands the single runs stand faint behind them.

    Raises:
        OSError: the file cannot be written.
        ValueError: the file's ending names no kind of picture.
    """
    name = f"seaborn-v0_8-{style}" if style in STYLES else style
    with matplotlib.style.context(name), mpl.rc_context(_RC):
        panels = _panels(drawn)
        figure = Figure(figsize=(9.6, 0.5 + 3.7 * len(panels)), dpi=130)
        several = len({one.run for one in drawn}) > 1
        labels = dict(zip(map(id, bands), band_labels, strict=True)) if band_labels else {}
        for axes, (scale, members) in zip(np.atleast_1d(figure.subplots(len(panels), 1)), panels.items(), strict=True):
            keys = {one.curve.key for one in members}
            own = [band for band in bands if band.key in keys]
            _panel(axes, scale, members, own, several=several)
            for place, band in enumerate(own):
                _band(axes, band, labels.get(id(band), band.name), _COLOURS[place % len(_COLOURS)])
            _legend(axes)
        if title:
            figure.suptitle(title, fontsize=12)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def drawn_by_epoch(drawn: Sequence[Drawn]) -> bool:
    """Whether these curves are shown over epochs: evaluations whose epochs are known, as the original does."""
    return all(one.curve.evaluation and all(point.epoch for point in one.curve.points) for one in drawn)


def _panels(drawn: Sequence[Drawn]) -> dict[str, list[Drawn]]:
    found: dict[str, list[Drawn]] = {}
    for one in drawn:
        where = " of evaluations" if one.curve.evaluation and scale_of(one.curve.metric) != "accuracy" else ""
        found.setdefault(scale_of(one.curve.metric) + where, []).append(one)
    return found


def _panel(axes: Axes, scale: str, members: Sequence[Drawn], bands: Sequence[Band], *, several: bool) -> None:
    by_epoch = drawn_by_epoch(members)
    keys = list(dict.fromkeys(one.key for one in members))
    values: list[float] = []
    for place, one in enumerate(members):
        colour = _COLOURS[(one.run if several else place) % len(_COLOURS)]
        dashes = _LINES[keys.index(one.key) % len(_LINES)] if several else "-"
        x, y = places_of(one.curve, by_epoch=by_epoch)
        raw = np.array([point.value for point in one.curve.points])
        values += raw.tolist()
        faint = bool(bands)
        label = None if faint else _label(one)
        if one.curve.smoothed_by and not faint:
            axes.plot(x, raw, color=colour, alpha=0.25, linewidth=0.6)
        marker = "o" if one.curve.evaluation and len(x) <= _MOST_MARKED else None
        axes.plot(
            x,
            y,
            color=colour if not faint else "0.6",
            linestyle=dashes,
            linewidth=0.7 if faint else 1.4 if one.curve.evaluation or one.curve.smoothed_by else 0.9,
            marker=None if faint else marker,
            markersize=3.5,
            label=label,
        )
        if one.curve.evaluation and not faint:
            _mark_best(axes, one.curve, colour, by_epoch=by_epoch)
        _mark_lost(axes, one, colour, by_epoch=by_epoch)
        if not by_epoch:
            for step in one.resumed_at:
                axes.axvline(step, color=colour, linewidth=0.9, linestyle=":", zorder=1)
    if _logarithmic(scale, values):
        axes.set_yscale("log")
    ends = [max(point.step for point in (*one.curve.points, *one.curve.lost)) for one in members]
    if not by_epoch and max(ends) > _WIDE_RANGE * max(min(ends), 1):
        # On a linear axis the shorter run is a vertical stroke.
        axes.set_xscale("log")
    axes.set_xlabel("epoch" if by_epoch else "iteration")
    axes.set_ylabel(scale if len({one.curve.metric for one in members}) > 1 else members[0].curve.metric)
    if not by_epoch:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02)


def _label(one: Drawn) -> str:
    told = one.label
    best = one.curve.best if one.curve.evaluation else None
    if best is not None:
        told += f"\n★ best {_cell(best)}"
    if one.curve.lost:
        total = len(one.curve.lost) + len(one.curve.points)
        told += f"\n{one.curve.lost_as} in {len(one.curve.lost)} of {total} rows"
    return told + ("\n(dotted: resumed)" if one.resumed_at and not one.curve.evaluation else "")


def _mark_best(axes: Axes, curve: Curve, colour: str, *, by_epoch: bool) -> None:
    best = curve.best
    if best is None:
        return
    at = (best.epoch if by_epoch else best.step) or 0
    place = curve.points.index(best)
    axes.plot(at, curve.smoothed[place], "*", color=colour, markersize=13, markeredgecolor="white", zorder=5)


def _mark_lost(axes: Axes, one: Drawn, colour: str, *, by_epoch: bool) -> None:
    """Shade from the first to the last value that is no number, with a mark at each one."""
    lost = one.curve.lost
    if not lost:
        return
    x = np.array([(point.epoch if by_epoch else point.step) or 0 for point in lost], np.float64)
    axes.axvspan(x[0], x[-1], color=_BAD, alpha=0.07, linewidth=0)
    bottom = axes.get_xaxis_transform()
    axes.plot(x, np.full(len(x), 0.015 + 0.03 * one.key), "|", color=colour, markersize=6, transform=bottom)
    axes.axvline(x[0], color=_BAD, linewidth=1)
    axes.annotate(
        f"{one.curve.key} is {one.curve.lost_as} from {'epoch' if by_epoch else 'iteration'} {x[0]:.0f}",
        (x[0], 0.96 - 0.07 * one.key),
        (5, 0),
        xycoords=bottom,
        textcoords="offset points",
        va="top",
        fontsize=8,
        color=_BAD,
    )


def _band(axes: Axes, band: Band, label: str, colour: str) -> None:
    axes.fill_between(band.x, band.mean - band.std, band.mean + band.std, color=colour, alpha=0.2, linewidth=0)
    axes.plot(band.x, band.mean, color=colour, linewidth=1.8, label=f"{label}\nmean ± std of {band.runs} runs")


def _legend(axes: Axes) -> None:
    _, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8.5, labelspacing=0.8)


def _logarithmic(scale: str, values: Sequence[float]) -> bool:
    if not values or min(values) <= 0 or not scale.startswith(("loss", "learning rate", "seconds")):
        return False
    middle = float(np.median(values))
    return max(values) > _WIDE_RANGE * middle or middle > _WIDE_RANGE * min(values)


def print_curves(curves: Sequence[Curve], names: Sequence[str], console: Console) -> None:
    """Print the last and the best value of each curve, and how many were no numbers."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric")
    for name in ("values", "last", "best", "NaN"):
        table.add_column(name, justify="right")
    shown = names[0] if len(set(names)) == 1 else None
    for curve, name in zip(curves, names, strict=True):
        if name != shown:
            table.add_section()
            table.add_row(f"[bold]{escape(name)}[/]")
            shown = name
        total = len(curve.points) + len(curve.lost)
        first = curve.lost[0].step if curve.lost else 0
        lost = f"[red]{len(curve.lost)} of {total}, from iteration {first}[/]" if curve.lost else "–"
        best = _cell(curve.best if curve.evaluation else None)
        table.add_row(escape(curve.metric), str(len(curve.points)), _cell(curve.last), best, lost)
    console.print(table)


def _cell(point: Point | None) -> str:
    if point is None:
        return "–"
    where = f"epoch {point.epoch}" if point.epoch else f"iteration {point.step}"
    return f"{point.value:.4g} at {where}"


def curves_csv(curves: Sequence[Curve]) -> str:
    """Return all values, one a line; those that are no numbers as they were logged."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("log", "metric", "evaluation", "epoch", "step", "value", "smoothed"))
    for curve in curves:
        smooth = {id(point): value for point, value in zip(curve.points, curve.smoothed, strict=True)}
        for point in sorted((*curve.points, *curve.lost), key=lambda one: one.step):
            writer.writerow(
                (
                    curve.log,
                    curve.metric,
                    int(curve.evaluation),
                    "" if point.epoch is None else point.epoch,
                    point.step,
                    repr(point.value),
                    repr(smooth[id(point)]) if id(point) in smooth else "",
                )
            )
    return stream.getvalue()
