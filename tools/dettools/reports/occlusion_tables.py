"""The recall of occluded and separated objects in the terminal: the original's block, then intervals and sizes."""

from rich import box
from rich.console import Console
from rich.table import Table

from dettools.analysis.occluded_recall import SIZES, OccludedRecallResult, RecallType, Share
from dettools.analysis.occlusion import SUBSETS


def original_block(result: OccludedRecallResult, iou_type: RecallType = "segm") -> str:
    """Return what the original prints: two lines for each subset, then its table."""
    word = "mask" if iou_type == "segm" else "box"
    lines = []
    rows = [(f"{word} type", "recall", "num correct")]
    for subset in SUBSETS:
        share = result.of(subset, iou_type).all
        lines += [
            f"COCO {subset} {word} recall: {_percent(share)}",
            f"COCO {subset} {word} success num: {share.found}",
        ]
        rows.append((subset, _percent(share), str(share.found)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    rule = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    cells = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([*lines, rule, cells[0], rule, *cells[1:], rule])


def print_occluded_recall(result: OccludedRecallResult, console: Console) -> None:
    """Print a table for each IoU type: the subsets and all other objects, with intervals and COCO's sizes."""
    for iou_type in dict.fromkeys(one.iou_type for one in result.subsets):
        table = Table(
            title=f"{'masks' if iou_type == 'segm' else 'boxes'}: recall at IoU {result.iou_threshold:g}, "
            f"scores from {result.score_threshold:g}",
            title_justify="left",
            header_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        table.add_column("objects", no_wrap=True)
        for name in ("recall", f"{result.confidence:.0%} interval", "found", *SIZES):
            table.add_column(name, justify="right", no_wrap=True)
        for one in result.subsets:
            share = one.all
            if one.iou_type == iou_type:
                table.add_row(
                    one.subset,
                    "–" if share.recall is None else f"{share.recall:.1%}",
                    "–" if share.low is None or share.high is None else f"{share.low * 100:.0f} to {share.high:.0%}",
                    f"{share.found}/{share.total}",
                    *(_short(one.by_size[size]) for size in SIZES),
                )
        console.print(table)


def _percent(share: Share) -> str:
    return "nan%" if share.recall is None else f"{share.recall * 100:.2f}%"


def _short(share: Share) -> str:
    return "–" if share.recall is None else f"{share.recall:.0%} of {share.total}"
