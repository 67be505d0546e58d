"""What a conversion wrote, skipped and could not hold; and a COCO file's metric traps, as tables."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from dettools.datasets.conversion import Conversion
from dettools.datasets.conversion_rules import REASONS, Rules


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
