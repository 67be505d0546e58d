"""COCO metrics in the terminal: the twelve lines that everybody knows, and one row per class."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dettools.coco_metrics import Metrics
from dettools.resampling import ApInterval

AREAS = {"s": "small", "m": "medium", "l": "large"}


def print_metrics(
    metrics: Metrics,
    console: Console,
    *,
    published: Mapping[str, float | None] | None = None,
    interval: ApInterval | None = None,
    per_class: bool = False,
) -> None:
    """Print the block of lines, the interval, MMDetection's line to copy, and one row per class if wanted.

    ``published`` are the figures of pycocotools where an annotation with the id 0 makes them wrong.
    """
    console.print(
        f"[bold]{metrics.iou_type}[/]: {metrics.images} images, {metrics.objects} objects, "
        f"{metrics.detections} detections",
        highlight=False,
    )
    for line in coco_lines(metrics):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if interval is not None:
        console.print(f"[bold]{escape(interval_line(interval))}[/]", highlight=False, soft_wrap=True)
    console.print(copypaste_line(metrics.iou_type, metrics.figures), highlight=False, soft_wrap=True)
    if published is not None:
        console.print(
            "[yellow]pycocotools and MMDetection lose the annotation with the id 0 and show on this file:[/]",
            highlight=False,
            soft_wrap=True,
        )
        console.print(copypaste_line(metrics.iou_type, published), highlight=False, soft_wrap=True)
    if per_class:
        console.print(class_table(metrics))


def coco_lines(metrics: Metrics) -> list[str]:
    """Return the figures as `COCOeval.summarize` prints them, to the letter; -1.000 is what cannot be measured."""
    lines = []
    iou = f"{metrics.iou_thresholds[0]:0.2f}:{metrics.iou_thresholds[-1]:0.2f}"
    for name, value in metrics.figures.items():
        kind, rest = name[:2], name[2:]
        title = "Average Precision  (AP)" if kind == "AP" else "Average Recall     (AR)"
        counts = kind == "AR" and rest.isdecimal() and metrics.iou_type != "keypoints"
        at = f"0.{rest}" if rest in ("50", "75") and not counts else iou
        most = int(rest) if counts else metrics.max_detections[-1]
        area = AREAS.get(rest, "all")
        figure = -1 if value is None else value
        lines.append(f" {title} @[ IoU={at:<9} | area={area:>6s} | maxDets={most:>3d} ] = {figure:0.3f}")
    return lines


def copypaste_line(iou_type: str, figures: Mapping[str, float | None]) -> str:
    """Return the APs as MMDetection prints them."""
    values = (value for name, value in figures.items() if name.startswith("AP"))
    return f"{iou_type}_mAP_copypaste: " + " ".join(f"{-1 if value is None else value:.3f}" for value in values)


def interval_line(interval: ApInterval) -> str:
    """Return AP with its interval in one line."""
    half = (interval.high - interval.low) / 2
    return (
        f"AP {interval.ap:.3f} ± {half:.3f} ({interval.confidence:.0%} interval {interval.low:.3f} to "
        f"{interval.high:.3f}, {interval.resamples} resamples of the images)"
    )


def class_table(metrics: Metrics) -> Table:
    """Return one row per class that has objects or detections; the others are counted in the caption."""
    shown = [one for one in metrics.per_class if one.objects or one.detections]
    left = len(metrics.per_class) - len(shown)
    caption = f"classes with neither objects nor detections: {left}" if left else None
    table = Table(caption=caption, caption_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class", overflow="fold")
    for name in ("AP", "AP50", f"AR{metrics.max_detections[-1]}", "objects", "detections"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in shown:
        table.add_row(escape(one.name), *_figures((one.ap, one.ap50, one.ar)), str(one.objects), str(one.detections))
    return table


def _figures(values: Sequence[float | None]) -> list[str]:
    return ["–" if value is None else f"{value:.3f}" for value in values]
