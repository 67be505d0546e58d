"""What a conversion wrote, skipped and could not hold; and a COCO file's metric traps, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from dettools.datasets.conversion_rules import REASONS, Rules

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from dettools.datasets.conversion import Conversion
    from dettools.datasets.metric_traps import TrapCheck


def print_conversion(conversion: Conversion, rules: Rules, console: Console) -> None:
    """Print the outputs, then each kind of loss."""
    table = Table("written", "split", title=f"to {rules.target.upper()}", title_justify="left")
    table.add_column("images", justify="right")
    table.add_column("objects", justify="right")
    for one in conversion.outputs:
        table.add_row(str(one.path), one.name or "-", f"{one.images:,}", f"{one.annotations:,}")
    console.print(table)
    skipped = {
        f"{reason}: {REASONS.get(reason, reason)}": count for reason, count in sorted(conversion.skipped.counts.items())
    }
    _print_counts("skipped or told", skipped, console)
    _print_counts(f"{rules.target.upper()} has no place for", conversion.lost, console)
    _print_counts("in the source, and not read", conversion.unread, console)
    for note in conversion.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def _print_counts(title: str, counts: Mapping[str, int], console: Console) -> None:
    if not counts:
        console.print(f"{title}: nothing", highlight=False)
        return
    table = Table(title)
    table.add_column("count", justify="right")
    for name, count in sorted(counts.items()):
        table.add_row(name, f"{count:,}")
    console.print(table)


def print_traps(check: TrapCheck, console: Console) -> None:
    """Print the traps with what each costs in points of AP."""
    from dettools.datasets.metric_traps import TRAPS  # with NumPy and the metrics: conversions do without

    if not check.traps:
        console.print(f"no metric trap found; looked for {', '.join(TRAPS)}", highlight=False)
    else:
        table = Table("trap", "in")
        table.add_column("entries", justify="right")
        if check.ap is not None:
            table.add_column("costs, AP points", justify="right")
        for one in check.traps:
            cost = [] if one.cost is None else [f"{100 * one.cost:.2f}"]
            table.add_row(one.kind, one.where, f"{one.count:,}", *cost)
        console.print(table)
        for one in check.traps:
            example = f" ({one.examples[0]})" if one.examples else ""
            console.print(f"{one.kind}: {TRAPS[one.kind]}{example}", markup=False, highlight=False, soft_wrap=True)
    if check.ap is not None and check.ap_undone is not None:
        console.print(
            f"AP as the files are {check.ap:.3f}, with every trap undone {check.ap_undone:.3f}", highlight=False
        )
