"""A data set as a page to look through, with the pictures beside it; no network, no server.

    index.html · pictures/ · thumbnails/ · problems.csv

What the page filters by is in it as JSON; the pictures are fetched as they are scrolled to.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from dettools.datasets.dataset import Dataset, box_of, is_id, size_of
from dettools.datasets.inspection import KINDS, Inspection, sentence
from dettools.datasets.statistics import SIZES, DatasetStatistics, Distribution, area_of, size_name
from dettools.reports.dataset_pictures import Drawn
from dettools.reports.dataset_tables import image_sizes_line, range_line, sizes_line
from dettools.reports.evaluation_page import svg

# As many cases of one kind as the page lists; problems.csv has them all.
MOST_CASES = 50
_BLUE = "#4878a8"


def write_page(
    path: Path,
    dataset: Dataset,
    statistics: DatasetStatistics,
    inspection: Inspection,
    drawn: Sequence[Drawn],
    *,
    selected: int,
) -> Path:
    """Write the page beside the pictures; return its path.

    Args:
        path: of the page; the pictures' paths begin in its folder.
        dataset: what was read.
        statistics: of all its images.
        inspection: of all its images.
        drawn: the images that the page shows.
        selected: how many images passed the filters of the command line.
    """
    template = files("dettools.reports").joinpath("templates/dataset.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    # The classes of an image stand in the order of their numbers of objects, not of the alphabet.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    content = _content(dataset, statistics, inspection, drawn, selected)
    path.write_text(environment.from_string(template).render(content), encoding="utf-8")
    return path


def write_problems(path: Path, dataset: Dataset, inspection: Inspection) -> None:
    """Write one line a problem: kind, severity, image, annotation id, detail."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("kind", "severity", "image", "annotation", "detail"))
        for one in inspection.problems:
            image = "" if one.image is None else dataset.name_of(one.image)
            annotation = "" if one.annotation is None else dataset.annotations[one.annotation].get("id")
            writer.writerow((one.kind, KINDS[one.kind].severity, image, annotation, one.detail))


def _content(
    dataset: Dataset,
    statistics: DatasetStatistics,
    inspection: Inspection,
    drawn: Sequence[Drawn],
    selected: int,
) -> dict[str, Any]:
    classes = sorted(statistics.classes, key=lambda one: -one.objects)
    most = max((one.objects for one in classes), default=0)
    return {
        "name": dataset.path.name or str(dataset.path),
        "path": str(dataset.path),
        "format": dataset.format,
        "statistics": statistics,
        "notes": [*dataset.notes, *inspection.notes],
        "drawn": len(drawn),
        "selected": selected,
        "figures": [
            ("objects an image", range_line(statistics.objects_per_image)),
            ("COCO sizes", sizes_line(statistics)),
            ("width / height", range_line(statistics.aspect_ratio)),
            ("side, as a share of the image's", range_line(statistics.relative_side)),
            ("image sizes", image_sizes_line(statistics, 5)),
        ],
        "plots": [(title, Markup(picture)) for title, picture in _plots(statistics)],  # noqa: S704 - our own SVG
        "classes": [(one, f"{100 * one.objects / most:.1f}" if most else "0") for one in classes],
        "problems": [_kind(dataset, inspection, kind) for kind in inspection.counts],
        "errors": inspection.errors,
        "count": len(inspection.problems),
        "data": {
            "classes": list(dict.fromkeys(dataset.names.values())),
            "words": {kind: {"word": one.word, "severity": one.severity} for kind, one in KINDS.items()},
            "images": [_image(dataset, inspection, one) for one in drawn],
        },
    }


def _image(dataset: Dataset, inspection: Inspection, drawn: Drawn) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    sizes: set[str] = set()
    crowds, smallest = 0, None
    for place in dataset.annotations_of.get(drawn.image, ()):
        one = dataset.annotations[place]
        category = one.get("category_id")
        counts[dataset.names.get(category, f"category {category}") if is_id(category) else "no class"] += 1
        crowds += bool(one.get("iscrowd"))
        if not one.get("iscrowd") and box_of(one) is not None:
            area = area_of(one)
            sizes.add(size_name(area))
            smallest = area if smallest is None else min(smallest, area)
    return {
        "name": dataset.name_of(drawn.image),
        "place": drawn.image,
        "size": size_of(dataset.images[drawn.image]) or (None, None),
        "picture": drawn.picture,
        "thumbnail": drawn.thumbnail,
        "objects": dict(counts.most_common()),
        "sizes": [size for size in SIZES if size in sizes],
        "crowds": crowds,
        "smallest": smallest,
        "problems": [[one.kind, one.detail] for one in inspection.of_image.get(drawn.image, ())],
    }


def _kind(dataset: Dataset, inspection: Inspection, kind: str) -> dict[str, Any]:
    cases = [one for one in inspection.problems if one.kind == kind]
    return {
        "kind": kind,
        "severity": KINDS[kind].severity,
        "meaning": KINDS[kind].meaning,
        "count": len(cases),
        "images": len({one.image for one in cases if one.image is not None}),
        "cases": [sentence(dataset, one) for one in cases[:MOST_CASES]],
    }


def _plots(statistics: DatasetStatistics) -> list[tuple[str, str]]:
    plots = []
    if statistics.objects:
        plots = [
            ("How large the objects are (COCO)", _sizes(statistics)),
            ("Their side, as a share of the image's", _bars(statistics.relative_side, "√(box area / image area)")),
            ("Their shape", _bars(statistics.aspect_ratio, "width / height", log=True)),
            ("Where their centres lie", _centres(statistics)),
        ]
    return [
        ("How many objects an image has", _bars(statistics.objects_per_image, "objects", what="images")),
        *plots,
        ("How large the images are", _images(statistics)),
    ]


def _axes(height: float = 2.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.6, height), layout="constrained")
    axes = figure.subplots()
    for side in ("right", "top"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _bars(values: Distribution, label: str, *, what: str = "objects", log: bool = False) -> str:
    figure, axes = _axes()
    edges, counts = np.array(values.edges), np.array(values.counts)
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=_BLUE, edgecolor="white", linewidth=0.4)
    if values.median is not None:
        # A count's bar begins at it: its middle is meant.
        shift = 0.5 if what == "images" else 0.0
        axes.axvline(min(values.median + shift, edges[-1]), color="#b42318", linewidth=1.2)
        axes.set_title(f"median {values.median:.3g}", fontsize=9, color="#b42318", loc="right")
    if log:
        axes.set_xscale("log", base=2)
        axes.set_xticks([1 / 16, 1 / 4, 1, 4, 16], ["1:16", "1:4", "1:1", "4:1", "16:1"])
    if what == "images":
        step = max(1, len(counts) // 8)
        ticks = list(range(0, len(counts), step))
        axes.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    axes.set(xlabel=label, ylabel=what)
    return svg(figure)


def _sizes(statistics: DatasetStatistics) -> str:
    figure, axes = _axes()
    names = ["small\n< 32² px", "medium\n< 96² px", "large"]
    counts = list(statistics.sizes.values())
    bars = axes.bar(names, counts, color=_BLUE, width=0.7)
    axes.bar_label(bars, [f"{count} ({count / max(sum(counts), 1):.0%})" for count in counts], fontsize=9, padding=2)
    axes.margins(y=0.15)
    axes.set(ylabel="objects")
    return svg(figure)


def _centres(statistics: DatasetStatistics) -> str:
    figure, axes = _axes(3.0)
    picture = axes.imshow(np.array(statistics.centres), cmap="Blues", extent=(0, 1, 1, 0), aspect="auto")
    figure.colorbar(picture, ax=axes, label="objects", shrink=0.9)
    axes.set(xlabel="share of the width", ylabel="share of the height")
    return svg(figure)


def _images(statistics: DatasetStatistics) -> str:
    figure, axes = _axes(3.0)
    table = np.array(statistics.image_sizes, np.float64).reshape(-1, 3)
    area = 12 + 160 * table[:, 2] / table[:, 2].max(initial=1)
    axes.scatter(table[:, 0], table[:, 1], s=area, color=_BLUE, alpha=0.55, linewidth=0)
    axes.set(xlabel="width, px", ylabel="height, px")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return svg(figure)
