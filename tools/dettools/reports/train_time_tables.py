"""Training times for people: the block of MMDetection's script word for word, and our table beneath."""

import csv
import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dettools.analysis.train_time import EpochTime, TrainTime, speed_ratio


def original_block(time: TrainTime) -> str:
    """Return the lines that MMDetection 3.x's cal_train_time prints, with figures weighted by iterations."""
    slowest, fastest = time.slowest, time.fastest
    return "\n".join(
        (
            f"{'-' * 5}Analyze train time of {time.log}{'-' * 5}",
            f"slowest epoch {_number(slowest)}, average time is {slowest.mean_s:.4f} s/iter",
            f"fastest epoch {_number(fastest)}, average time is {fastest.mean_s:.4f} s/iter",
            f"time std over epochs is {time.std_over_epochs_s:.4f}",
            f"average iter time: {time.mean_s:.4f} s/iter",
            "",
        )
    )


def print_times(times: Sequence[TrainTime], names: Sequence[str], console: Console) -> None:
    """Print one column per run."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("seconds per iteration")
    for name in names:
        table.add_column(escape(name), justify="right", overflow="fold")
    reference = times[0]
    rows: list[tuple[str, list[str]]] = [
        ("mean, weighted by iterations", [f"{one.mean_s:.4f}" for one in times]),
        ("  95 % interval", [_range(one.low_s, one.high_s, "{:.4f}") for one in times]),
        ("median", [f"{one.median_s:.4f}" for one in times]),
        ("p95", [f"{one.p95_s:.4f}" for one in times]),
        ("waiting for data", [_optional(one.data_time_share, "{:.1%}") for one in times]),
        ("iterations counted", [f"{one.iterations:,}" for one in times]),
        ("images per second", [_optional(one.images_per_s, "{:.1f}") for one in times]),
        ("largest memory, MB", [_optional(one.memory_mb, "{:.0f}") for one in times]),
        ("time of all logged iterations", [duration(one.total_s) for one in times]),
        ("still to go", [_left(one.remaining_s) for one in times]),
    ]
    for title, cells in rows:
        if any(cell != "–" for cell in cells):
            table.add_row(title, *cells)
    if len(times) > 1:
        cells = ["1"]
        for one in times[1:]:
            ratio, low, high = speed_ratio(reference, one)
            cells.append(f"× {ratio:.2f}" + ("" if low is None else f"  {_range(low, high, '{:.2f}')}"))
        table.add_row(f"speed beside {escape(names[0])}", *cells)
    console.print(table)


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    days, hours = divmod(minutes // 60, 24)
    if minutes < 60:
        return f"{minutes} min"
    return f"{days} d {hours} h" if days else f"{hours} h {minutes % 60:02d} min"


def epochs_csv(times: Sequence[TrainTime]) -> str:
    """Return the mean of every epoch of every run, one a line."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("log", "epoch", "iterations", "seconds_per_iteration"))
    for one in times:
        for epoch in one.epochs:
            writer.writerow((one.log, "" if epoch.epoch is None else epoch.epoch, epoch.iterations, epoch.mean_s))
    return stream.getvalue()


def _number(epoch: EpochTime) -> str:
    return "unknown" if epoch.epoch is None else str(epoch.epoch)


def _optional(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _range(low: float | None, high: float | None, form: str) -> str:
    return "–" if low is None or high is None else f"({form.format(low)} to {form.format(high)})"


def _left(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"about {duration(seconds)}" if seconds else "nothing, it is finished"
