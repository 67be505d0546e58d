"""A benchmark, and the difference of two, as tables in the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dettools.benchmark.difference import Difference, FigureDifference
from dettools.benchmark.run import Run
from dettools.benchmark.summary import (
    accuracy_table,
    error_table,
    findings,
    number,
    shared_reasons,
    stage_table,
    table,
)

COLOURS = {"VALID": "green", "WARN": "yellow", "INVALID": "red"}
MOST_MISMATCHES = 20
LEFT_OUT_FIRST = (
    *("p75 ms", "client CPU ms", "server CPU ms", "CPU ms", "p90 ms", "p99.9 ms", "batch", "max ms"),
    *("AP", "requests", "images", "offered"),
)
WIDE = 120
SHORT = {"network+queue": "net+queue", "preprocess": "pre", "postprocess": "post", "serialise": "json"}
SHORT |= {"sum ms": "sum", "server queue ms": "queue"}


def print_run(run: Run, console: Console) -> None:
    """Print the levels, the parts of the latency, the findings, and the verdict with its reasons."""
    header, rows = _fitting(*table(run), console.width, LEFT_OUT_FIRST)
    console.print(_table(header, rows, stamps=[verdict.stamp for verdict in run.verdicts]))
    for title, (header, rows) in (
        ("mean latency by its parts, ms", stage_table(run)),
        ("errors by code", error_table(run)),
        ("COCO AP of the answers", accuracy_table(run)),
    ):
        if rows:
            names = header if console.width >= WIDE else [SHORT.get(name, name) for name in header]
            console.print(_table(names, rows, title=title))
    for sentence in findings(run):
        console.print(escape(sentence), highlight=False)
    for reason in shared_reasons(run):
        text = escape(f"{reason.text} ({reason.where})")
        console.print(f"[{COLOURS[reason.stamp]}]{reason.stamp} {reason.code}[/] {text}", highlight=False)
    stamp = run.verdict.stamp
    console.print(f"[bold {COLOURS[stamp]}]{stamp}[/] {escape(run.title)}", highlight=False)


def print_difference(difference: Difference, console: Console) -> None:
    """Print every figure of both runs with the verdict on the second, what else differs, and what to know."""
    header = ["level", "figure", "a", "b", "b / a", "95 % interval", "p (Holm)", "b is"]
    rows = [_difference_row(figure) for figure in difference.figures]
    header, rows = _fitting(header, rows, console.width, ("p (Holm)", "95 % interval"))
    title = escape(f"a: {difference.title_a}    b: {difference.title_b}")
    shown = _table(header, rows, title=title, left=(0, 1, len(header) - 1))
    for row, figure in zip(shown.rows, difference.figures, strict=True):
        row.style = "red" if figure.worse else "green" if figure.word in ("faster", "fewer errors", "AP won") else None
    console.print(shown)
    for name, levels in (("a", difference.only_a), ("b", difference.only_b)):
        if levels:
            console.print(escape(f"Only in {name}: {', '.join(levels)}."), highlight=False)
    for mismatch in difference.mismatches[:MOST_MISMATCHES]:
        text = escape(f"{mismatch.name}: {mismatch.a} in a, {mismatch.b} in b")
        console.print(f"[yellow]differs[/] {text}", highlight=False)
    if (more := len(difference.mismatches) - MOST_MISMATCHES) > 0:
        console.print(f"[yellow]differs[/] {more} more things; --json lists them", highlight=False)
    for note in difference.notes:
        console.print(f"[dim]{escape(note)}[/]", highlight=False)
    worse = len(difference.regressions)
    word = "[bold red]SLOWER OR WORSE[/]" if worse else "[bold green]NO REGRESSION SHOWN[/]"
    console.print(f"{word} {worse} of {len(difference.figures)} figures are worse in b", highlight=False)


def _difference_row(figure: FigureDifference) -> list[str]:
    share = figure.figure in ("error rate", "AP")
    left, right = (f"{value:.4f}" if share else number(value) for value in (figure.a, figure.b))
    interval = "–" if figure.low is None or figure.high is None else f"{figure.low:.3f}…{figure.high:.3f}"
    ratio = "–" if figure.ratio is None else f"{figure.ratio:.3f}"
    p = "–" if figure.p is None else f"{figure.p:.2g}"
    unit = {"throughput": "throughput /s", "error rate": "error rate", "AP": "AP"}.get(
        figure.figure, f"{figure.figure} ms"
    )
    return [figure.level, unit, left, right, ratio, interval, p, figure.word]


def _fitting(
    header: list[str], rows: list[list[str]], width: int, left_out_first: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Leave columns out until the terminal is wide enough; the files and the page have them all."""
    for name in left_out_first:
        # Two characters between columns and one at either end, as `_table` has them.
        needed = [max(len(row[index]) for row in (header, *rows)) + 2 for index in range(len(header))]
        if sum(needed) <= width:
            break
        if name in header:
            index = header.index(name)
            header, *rows = ([*row[:index], *row[index + 1 :]] for row in (header, *rows))
    return header, rows


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    stamps: Sequence[str] = (),
    left: Sequence[int] = (0,),
) -> Table:
    found = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    for index, name in enumerate(header):
        found.add_column(name, justify="left" if index in left else "right", no_wrap=index in left)
    for index, row in enumerate(rows):
        cells = [escape(cell) for cell in row]
        if stamps:
            cells[-1] = f"[{COLOURS[stamps[index]]}]{cells[-1]}[/]"
        found.add_row(*cells)
    return found
