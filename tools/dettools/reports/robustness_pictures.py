"""Robustness to look at: AP over severity, a photograph under every corruption, and each photograph as sent."""

import io
from collections.abc import Sequence
from pathlib import Path

from dethandlers.detections import Detections
from PIL import Image, ImageDraw, UnidentifiedImageError

from dettools.analysis.corruptions import GROUPS, severities_of
from dettools.analysis.robustness_figures import Aggregate, aggregate, groups_of
from dettools.analysis.robustness_results import RobustnessResults
from dettools.analysis.robustness_sheet import Sample
from dettools.reports.lettering import font_for, wrapped
from dettools.reports.pictures import draw_detections, upright_rgb

_COLUMNS = 5
_TILE_PX = 384
_GAP_PX = 10
_TEXT_PX = 19
_INK, _PAPER, _GREY, _RED = (25, 25, 25), (255, 255, 255), (225, 227, 230), (198, 40, 40)
_LINES = ("#0072b2", "#d55e00", "#009e73", "#8e44ad", "#b8860b")


def save_contact_sheet(path: Path, samples: Sequence[Sample], names: Sequence[str], caption: str) -> None:
    """Draw a photograph under many corruptions side by side, with what was found; the first tile is without any.

    Args:
        path: where to.
        samples: in their order.
        names: class names by label.
        caption: one paragraph above.
    """
    pictures = [drawn(tile.body, tile.detections, names, failure=tile.failure, long_side=_TILE_PX) for tile in samples]
    cell_width = max(picture.width for picture in pictures)
    cell_height = max(picture.height for picture in pictures)
    columns = min(_COLUMNS, len(samples))
    row = _TEXT_PX + 8
    width = columns * (cell_width + _GAP_PX) + _GAP_PX
    lines = wrapped(caption, _TEXT_PX, width - 2 * _GAP_PX, lines=3)
    head = len(lines) * row + _GAP_PX
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (width, head + rows * (cell_height + row + _GAP_PX)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, line in enumerate(lines):
        draw.text((_GAP_PX, _GAP_PX // 2 + place * row), line, font=font_for(line, _TEXT_PX), fill=_INK)
    for place, (tile, picture) in enumerate(zip(samples, pictures, strict=True)):
        left = _GAP_PX + place % columns * (cell_width + _GAP_PX)
        top = head + place // columns * (cell_height + row + _GAP_PX)
        told = tile.failure or ("nothing found" if not tile.detections else f"{len(tile.detections)} found")
        draw.text((left, top), tile.title, font=font_for(tile.title, _TEXT_PX), fill=_INK)
        ink = _RED if tile.failure or not tile.detections else _INK
        draw.text((left + cell_width, top), told, font=font_for(told, _TEXT_PX - 3), fill=ink, anchor="ra")
        sheet.paste(picture, (left, top + row))
    sheet.save(path)


def drawn(
    body: bytes, detections: Detections | None, names: Sequence[str], *, failure: str = "", long_side: int | None = None
) -> Image.Image:
    """Draw what was found on an image as it was sent; a grey field with the reason where it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(body)) as image:
            if detections is None:
                picture = upright_rgb(image)
                return picture if long_side is None else _fitted(picture, long_side)
            return draw_detections(image, detections, names, long_side=long_side)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError):
        side = long_side or _TILE_PX
        field = Image.new("RGB", (side, side * 2 // 3), _GREY)
        draw = ImageDraw.Draw(field)
        for place, line in enumerate(wrapped(failure or "cannot be decoded", _TEXT_PX, side - 40, lines=3)):
            draw.text((20, side // 4 + place * 28), line, font=font_for(line, _TEXT_PX), fill=_RED)
        return field


def save_curves(
    results: RobustnessResults, path: Path, *, task: str = "bbox", metric: str = "AP", name: str = "benchmark"
) -> None:
    """Draw the figure over severity, a line per corruption and a panel per group; bars are bootstrap intervals."""
    from matplotlib.figure import Figure

    groups = groups_of(results)
    columns = min(3, max(1, len(groups)))
    rows = -(-max(1, len(groups)) // columns)
    figure = Figure(figsize=(4.6 * columns + 0.4, 3.5 * rows + 0.8), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    clean = results.clean.figures.get(task, {}).get(metric) if results.clean else None
    band = results.clean.intervals.get(task) if results.clean and metric == "AP" else None
    for axes, group in zip(grid, groups, strict=False):
        if clean is not None:
            axes.axhline(clean, color="0.45", linewidth=1.2, linestyle="--")
        if band:
            axes.axhspan(*band, color="0.5", alpha=0.10, linewidth=0)
        measured = [one for one in GROUPS[group] if one in results.cells]
        for place, corruption in enumerate(measured):
            cells = results.cells[corruption]
            points = [
                (one, value, cells[one].intervals.get(task) if metric == "AP" else None)
                for one in sorted(cells)
                if (value := cells[one].figures.get(task, {}).get(metric)) is not None
            ]
            start = [(0, clean)] if clean is not None else []
            colour = _LINES[place % len(_LINES)]
            xs = [x for x, _ in start] + [x for x, _, _ in points]
            ys = [y for _, y in start] + [y for _, y, _ in points]
            axes.plot(xs, ys, "o-", color=colour, linewidth=1.8, markersize=4.5, label=corruption.replace("_", " "))
            for severity, _, interval in points:
                if interval:
                    # Side by side, so that the bars of one severity can be told apart.
                    at = severity + 0.05 * (place - (len(measured) - 1) / 2)
                    axes.plot([at, at], interval, color=colour, linewidth=1.2, alpha=0.55)
        mean = aggregate(results, group, task=task, metric=metric)
        title = "transport: of the file, not of the picture" if group == "transport" else _title(mean)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xticks(range(6), ["clean", *map(str, range(1, 6))])
        axes.set_xlim(-0.25, 5.25)
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        # Of a cut-off file nothing is found: that line runs along the bottom.
        place_of_legend = ("center right", (1, 0.3)) if group == "transport" else ("lower left", None)
        axes.legend(fontsize=8, framealpha=0.85, loc=place_of_legend[0], bbox_to_anchor=place_of_legend[1])
        if any(len(severities_of(corruption)) < 5 for corruption in measured):
            axes.set_xlabel("severity (some corruptions have fewer levels)", fontsize=9)
        else:
            axes.set_xlabel("severity", fontsize=9)
    for axes in grid[len(groups) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel(f"{task} {metric}")
    mean = aggregate(results, name, task=task, metric=metric)
    p = (
        "no run without corruption"
        if clean is None
        else f"P {clean:.3f} (dashed{'; grey: its 95 % interval' if band else ''})"
    )
    figure.suptitle(f"{results.model}: {p}\n{_title(mean)}", fontsize=11, x=0.01, ha="left")
    figure.savefig(path)


def _title(one: Aggregate) -> str:
    if one.mpc is None:
        return f"{one.name}: no mPC, nothing of it was measured"
    share = "" if one.rpc is None else f" = {one.rpc:.0%} of P"
    part = f", PARTIAL: {one.cells} of {one.cells + len(one.missing)} cells" if one.partial else ""
    return f"{one.name}: mean {one.mpc:.3f}{share}{part}"


def _fitted(image: Image.Image, long_side: int) -> Image.Image:
    scale = long_side / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
