"""A data set's figures and problems in the terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dettools.datasets.dataset import Dataset
from dettools.datasets.inspection import KINDS, Inspection, sentence
from dettools.datasets.statistics import DatasetStatistics, Distribution

MOST_CLASSES = 20


def print_dataset(dataset: Dataset, statistics: DatasetStatistics, inspection: Inspection, console: Console) -> None:
    """Print what there is, the classes, and what is wrong."""
    _print_overview(dataset, statistics, console)
    console.print(_classes(statistics))
    print_problems(dataset, inspection, console)


def print_problems(dataset: Dataset, inspection: Inspection, console: Console) -> None:
    """Print one row a kind of problem with its first case, or that there is none."""
    looked = f"{inspection.files_opened} image files opened" if inspection.files_opened else "no image file opened"
    if not inspection.problems:
        console.print(f"[bold green]no problems[/] ({looked})", highlight=False)
        return
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, caption=looked, caption_justify="left")
    table.add_column("problem", no_wrap=True)
    table.add_column("times", justify="right", no_wrap=True)
    table.add_column("which means", ratio=1)
    table.add_column("first", ratio=1, overflow="fold")
    for kind, count in inspection.counts.items():
        first = next(one for one in inspection.problems if one.kind == kind)
        colour = "red" if KINDS[kind].severity == "error" else "yellow"
        table.add_row(f"[{colour}]{kind}[/]", str(count), KINDS[kind].meaning, escape(sentence(dataset, first)))
    console.print(table)


def sizes_line(statistics: DatasetStatistics) -> str:
    """Return the shares of small, medium and large objects."""
    total = max(sum(statistics.sizes.values()), 1)
    return ", ".join(f"{name} {count} ({count / total:.0%})" for name, count in statistics.sizes.items())


def range_line(values: Distribution, unit: str = "") -> str:
    """Return the median and where nine tenths of the values lie."""
    if values.median is None:
        return "–"
    return f"median {values.median:.3g}{unit}, 90% from {values.p05:.3g} to {values.p95:.3g}{unit}"


def image_sizes_line(statistics: DatasetStatistics, most: int) -> str:
    """Return the most frequent image sizes."""
    shown = ", ".join(f"{width} × {height} ({count})" for width, height, count in statistics.image_sizes[:most])
    rest = len(statistics.image_sizes) - most
    return (shown or "–") + (f" and {rest} more" if rest > 0 else "")


def _print_overview(dataset: Dataset, statistics: DatasetStatistics, console: Console) -> None:
    crowds = f", crowds: {statistics.crowds}" if statistics.crowds else ""
    rows = {
        "data set": f"{dataset.path} ({dataset.format})",
        "images": f"{statistics.images}, {statistics.empty_images} of them without an object",
        "objects": f"{statistics.objects}, classes: {len(statistics.classes)}{crowds}",
        "sizes": sizes_line(statistics),
        "objects an image": range_line(statistics.objects_per_image),
        "width / height": range_line(statistics.aspect_ratio),
        "image sizes": image_sizes_line(statistics, 3),
    }
    for name, value in rows.items():
        console.print(f"{name:<18}{value}", markup=False, highlight=False, soft_wrap=True)


def _classes(statistics: DatasetStatistics) -> Table:
    rows = sorted(statistics.classes, key=lambda one: -one.objects)
    with_objects = [one for one in rows if one.objects or one.crowds]
    shown = with_objects[:MOST_CLASSES]
    parts = []
    if len(with_objects) > len(shown):
        parts.append(f"{len(with_objects) - len(shown)} with fewer objects")
    if len(rows) > len(with_objects):
        names = ", ".join(one.name for one in rows if one not in with_objects)
        parts.append(f"classes without any object, {len(rows) - len(with_objects)}: {names}")
    table = Table(
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption=escape("; ".join(parts)) or None,
        caption_justify="left",
    )
    table.add_column("class", overflow="fold")
    for name in ("objects", "images", "small", "medium", "large", "median side px"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in shown:
        side = "–" if one.median_side_px is None else f"{one.median_side_px:.0f}"
        cells = (one.objects, one.images, one.small, one.medium, one.large, side)
        table.add_row(escape(one.name), *map(str, cells))
    return table
