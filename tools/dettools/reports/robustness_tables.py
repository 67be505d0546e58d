"""Robustness in the terminal: MMDetection's block of lines, then one row per corruption, and what is missing."""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dettools.analysis.corruptions import GROUPS, severities_of
from dettools.analysis.corruptions_transport import LOSSLESS, level_name
from dettools.analysis.robustness_figures import Aggregate, aggregate, corruption_mean, groups_of, missing_text
from dettools.analysis.robustness_results import METRICS, Cell, RobustnessResults

BLOCK_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_TITLES = {
    "P": "Performance on Clean Data [P]",
    "mPC": "Mean Performance under Corruption [mPC]",
    "rPC": "Relative Performance under Corruption [rPC]",
}
_ROWS = (
    ("0.50:0.95", "all"),
    ("0.50", "all"),
    ("0.75", "all"),
    *(("0.50:0.95", area) for area in ("small", "medium", "large")),
)


def original_block(
    results: RobustnessResults,
    model: str,
    *,
    task: str = "bbox",
    prints: Sequence[str] = ("mPC",),
    name: str = "benchmark",
    metrics: Sequence[str] = (),
) -> str:
    """Return the lines that MMDetection's robustness_eval.py prints; a partial mean is marked, and n/a is not 0.

    Args:
        results: of a run.
        model: file name in the first line.
        task: IoU type.
        prints: of ``P``, ``mPC``, ``rPC``.
        name: ``benchmark`` or ``all``.
        metrics: COCO's short names; none for the six lines.
    """
    found = {metric: aggregate(results, name, task=task, metric=metric) for metric in metrics or BLOCK_METRICS}
    lines = [f"model: {model}"]
    for kind in _TITLES:
        if kind not in prints:
            continue
        partial = kind != "P" and next(iter(found.values())).partial
        lines.append(f"{_TITLES[kind]} ({task}){'  PARTIAL' if partial else ''}")
        for place, one in enumerate(found.values()):
            value = {"P": one.p, "mPC": one.mpc, "rPC": one.rpc}[kind]
            if metrics:
                percent = "n/a" if value is None else f"{100 * value:0.1f} %"
                figure = "n/a" if value is None else f"{value:0.3f}"
                lines.append(f"{one.metric:5} => {percent}" if kind == "rPC" else f"{one.metric:5} =  {figure}")
            else:
                iou, area = _ROWS[place]
                figure = "n/a" if value is None else f"{value:0.3f}"
                lines.append(
                    f" {'Average Precision':<18} (AP) @[ IoU={iou:<9} | area={area:>6s} | maxDets=100 ] = {figure}"
                )
    return "\n".join(lines)


def voc_block(results: RobustnessResults, model: str, *, prints: Sequence[str], name: str) -> str:
    """Return the same for Pascal VOC, where the figure is AP50."""
    one = aggregate(results, name, metric="AP50")
    partial = "  PARTIAL" if one.partial else ""
    values = {
        "P": f"{_TITLES['P']} in AP50 = {_figure(one.p)}",
        "mPC": f"{_TITLES['mPC']} in AP50 = {_figure(one.mpc)}{partial}",
        "rPC": f"{_TITLES['rPC']} in % = {'n/a' if one.rpc is None else f'{100 * one.rpc:0.1f}'}{partial}",
    }
    return "\n".join([f"model: {model}", *(values[kind] for kind in values if kind in prints)])


def print_robustness(
    results: RobustnessResults, console: Console, *, task: str = "bbox", metric: str = "AP", name: str = "benchmark"
) -> None:
    """Print one row per corruption with its severities, one per group, and the mean with what it lacks."""
    table = Table(
        title=f"{task} {metric} by severity",
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("corruption", no_wrap=True)
    for column in ("1", "2", "3", "4", "5", "mean", "of P", "p50/95 ms"):
        table.add_column(column, justify="right", no_wrap=True)
    if results.clean is not None:
        clean = _figure(_value(results.clean, task, metric))
        table.add_row("no corruption", *[""] * 5, clean, "", _latency([results.clean]))
    known = {one for group in GROUPS.values() for one in group}
    others = tuple(one for one in results.cells if one not in known)
    for group, corruptions in {**{one: GROUPS[one] for one in groups_of(results)}, "others": others}.items():
        if corruptions:
            table.add_section()
        for corruption in corruptions:
            if corruption not in results.cells:
                continue
            cells = results.cells[corruption]
            levels = severities_of(corruption)
            row = [
                _figure(_value(cells[one], task, metric)) if one in cells else "–" if one in levels else ""
                for one in range(1, 6)
            ]
            mean = corruption_mean(results, corruption, task=task, metric=metric)
            table.add_row(corruption, *row, *_means(mean), _latency(list(cells.values())))
        # The ways of a file are too different from each other for a mean.
        if group in GROUPS and group != "transport":
            mean = aggregate(results, group, task=task, metric=metric)
            table.add_row(*(f"[bold]{value}[/]" for value in (group, *[""] * 5, *_means(mean))), end_section=True)
    whole = aggregate(results, name, task=task, metric=metric)
    if whole.mpc is not None:
        table.add_section()
        table.add_row(*(f"[bold]{value}[/]" for value in (f"mPC of {name}", *[""] * 5, *_means(whole))))
    console.print(table)
    for corruption, cells in results.cells.items():
        if failures := _failures(list(cells.values())):
            console.print(f"without answer: {corruption}: {failures}", markup=False, highlight=False, soft_wrap=True)
    for note in notes_on(results, whole):
        console.print(f"[yellow]{escape(note)}[/]", highlight=False, soft_wrap=True)
    _print_levels(results, console)


def notes_on(results: RobustnessResults, mean: Aggregate) -> list[str]:
    """Return what a reader of the mean must know."""
    notes = []
    if mean.mpc is None:
        notes.append(f"{mean.name}: no cell has a figure, so there is no mPC")
    elif mean.partial:
        notes.append(
            f"PARTIAL (*): mPC of {mean.name} is the mean over {mean.cells} of its {mean.cells + len(mean.missing)} "
            f"cells; missing: {missing_text(mean.missing)}"
        )
    if results.clean is None:
        notes.append("no run without corruption (severity 0): there is neither P nor rPC")
    return notes


def summary_line(corruption: str, severity: int, cell: Cell) -> str:
    """Return what is told when a cell is done."""
    head = "no corruption" if severity == 0 else f"{corruption} {severity}"
    level = level_name(corruption, severity) if severity else ""
    name = f"{head} ({level})" if level else head
    parts = []
    for kind, figures in cell.figures.items():
        interval = cell.intervals.get(kind)
        span = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
        parts.append(f"{kind} AP {_figure(figures.get('AP'))}{span}, AP50 {_figure(figures.get('AP50'))}")
    if cell.latency_ms:
        parts.append(f"p50 {cell.latency_ms['p50']:.1f} ms")
    if cell.failed:
        parts.append(f"without answer: {_failures([cell])}")
    if cell.unchanged is not None:
        parts.append(f"detections unchanged on {cell.unchanged} of {cell.images} images")
    return f"{name}: {', '.join(parts)}"


def write_csv(results: RobustnessResults, path: Path) -> None:
    """Write one row per cell: all figures of all IoU types, intervals, latency and failures."""
    tasks = sorted({kind for cell in _all_cells(results) for kind in cell.figures})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            ["corruption", "severity", "level", "images", "without_answer", "unchanged", "p50_ms", "p95_ms"]
            + [f"{kind}_{name}" for kind in tasks for name in (*METRICS, "AP_low", "AP_high")]
        )
        rows = [("None", 0, results.clean)] if results.clean else []
        rows += [(name, one, cells[one]) for name, cells in results.cells.items() for one in sorted(cells)]
        for corruption, severity, cell in rows:
            level = level_name(corruption, severity) if severity else ""
            line: list[object] = [corruption, severity, level, cell.images, sum(cell.failed.values()), cell.unchanged]
            line += [cell.latency_ms.get("p50"), cell.latency_ms.get("p95")]
            for kind in tasks:
                line += [cell.figures.get(kind, {}).get(name) for name in METRICS]
                line += cell.intervals.get(kind, (None, None))
            writer.writerow(line)


def _print_levels(results: RobustnessResults, console: Console) -> None:
    for corruption in GROUPS["transport"]:
        cells = results.cells.get(corruption)
        if not cells:
            continue
        levels = ", ".join(level_name(corruption, one) for one in severities_of(corruption))
        told = [cell for cell in cells.values() if cell.unchanged is not None]
        same = ""
        if corruption in LOSSLESS and told:
            kept, asked = sum(cell.unchanged or 0 for cell in told), sum(cell.images for cell in told)
            colour = "green" if kept == asked else "red"
            same = f"; every pixel is kept: [{colour}]detections unchanged in {kept} of {asked} answers[/]"
        console.print(f"{corruption}: {levels}{same}", highlight=False, soft_wrap=True)


def _means(one: Aggregate) -> tuple[str, str]:
    mark = "*" if one.partial and one.mpc is not None else ""
    return f"{_figure(one.mpc)}{mark}", "–" if one.rpc is None else f"{one.rpc:.0%}{mark}"


def _latency(cells: Sequence[Cell]) -> str:
    """Return the median of the cells' medians, and their largest p95."""
    told = [cell.latency_ms for cell in cells if cell.latency_ms]
    if not told:
        return "–"
    return f"{statistics.median(one['p50'] for one in told):.0f}/{max(one['p95'] for one in told):.0f}"


def _failures(cells: Sequence[Cell]) -> str:
    counts: dict[str, int] = {}
    for cell in cells:
        for kind, count in cell.failed.items():
            counts[kind] = counts.get(kind, 0) + count
    asked = sum(cell.images for cell in cells)
    return ", ".join(f"{count} of {asked} {kind}" for kind, count in counts.items())


def _value(cell: Cell, task: str, metric: str) -> float | None:
    return cell.figures.get(task, {}).get(metric)


def _all_cells(results: RobustnessResults) -> list[Cell]:
    clean = [results.clean] if results.clean else []
    return clean + [cell for cells in results.cells.values() for cell in cells.values()]


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
