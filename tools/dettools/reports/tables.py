"""A comparison as a table in the terminal."""

from collections.abc import Sequence
from pathlib import PurePath

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dettools.comparison import Comparison, ImageComparison

MOST_ROWS = 40


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the images, the hints and the verdict."""
    console.print(comparison_table(comparison))
    for hint in comparison.hints:
        console.print(f"[yellow]hint[/] {escape(hint.message)}", highlight=False)
    colour = "green" if comparison.passed else "red"
    verdict, _, rest = summary_line(comparison).partition(" ")
    console.print(f"[bold {colour}]{verdict}[/] {escape(rest)}", highlight=False)


def comparison_table(comparison: Comparison) -> Table:
    """Return one row per image in the order given; of many, the worst ones only."""
    images = comparison.images if len(comparison.images) <= MOST_ROWS else comparison.worst[:MOST_ROWS]
    masks = any(image.min_mask_iou is not None for image in images)
    keypoints = any(image.max_keypoint_delta_px is not None for image in images)
    left_out = len(comparison.images) - len(images)
    caption = f"the {len(images)} worst; {left_out} more images are in comparison.json" if left_out else None
    reasons = any(_reasons(image) for image in images)
    table = Table(caption=caption, caption_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("image", overflow="fold")
    for name in ("eager", "served", "matched", "|Δbox| px", "|Δscore|"):
        table.add_column(name, justify="right", no_wrap=True)
    if masks:
        table.add_column("mask IoU", justify="right", no_wrap=True)
    if keypoints:
        table.add_column("|Δkeypoint| px", justify="right", no_wrap=True)
    table.add_column("tier", no_wrap=True)
    if reasons:
        table.add_column("reasons", overflow="fold")
    for image, name in zip(images, _short_names([image.image for image in images]), strict=True):
        cells = [
            escape(name),
            "–" if image.eager is None else str(len(image.eager)),
            "–" if image.served is None else str(len(image.served)),
            str(len(image.pairs)),
            f"{image.max_box_delta_px:.3g}" if image.pairs else "–",
            f"{image.max_score_delta:.2g}" if image.pairs else "–",
        ]
        if masks:
            cells.append("–" if image.min_mask_iou is None else f"{image.min_mask_iou:.4f}")
        if keypoints:
            cells.append("–" if image.max_keypoint_delta_px is None else f"{image.max_keypoint_delta_px:.3g}")
        cells += [image.tier or "none", *([escape(_reasons(image))] if reasons else [])]
        table.add_row(*cells, style=None if image.passed else "red")
    return table


def summary_line(comparison: Comparison) -> str:
    """Return the verdict in one line."""
    passed = sum(image.passed for image in comparison.images)
    box = max((image.max_box_delta_px for image in comparison.images), default=0.0)
    score = max((image.max_score_delta for image in comparison.images), default=0.0)
    reasons = ", ".join(f"{reason} in {count}" for reason, count in comparison.reasons.items())
    return (
        f"{'PASS' if comparison.passed else 'FAIL'} {passed} of {len(comparison.images)} images reach the tier "
        f"{comparison.required} (all reach: {comparison.tier or 'none'}); "
        f"{sum(len(image.pairs) for image in comparison.images)} detections matched, "
        f"max |Δbox| {box:.3g} px, max |Δscore| {score:.2g}" + (f"; {reasons}" if reasons else "")
    )


def _short_names(paths: Sequence[str]) -> list[str]:
    """Return the file names where they tell the images apart, else the paths."""
    names = [PurePath(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def _reasons(image: ImageComparison) -> str:
    """Return the reason codes with the number of detections, or what the failed request said."""
    if image.swapped_with is not None:
        return f"swapped_replies: answered with {image.swapped_with}"
    counts = {reason: sum(finding.reason == reason for finding in image.findings) for reason in image.reasons}
    words = [f"{reason} ×{count}" if count > 1 else reason for reason, count in counts.items()]
    failed = [finding.detail for finding in image.findings if finding.reason in ("request_failed", "eager_failed")]
    return ", ".join(words) + (f": {failed[0]}" if failed else "")
