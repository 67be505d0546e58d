"""``detserve confusion-matrix``: which class is taken for which, object by object, with pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detserve.errors import DetserveError

from dettools.argument_types import at_least, fraction

if TYPE_CHECKING:
    import argparse

    from dettools.analysis.analysis_inputs import Inputs
    from dettools.analysis.confusion import Confusion, SweepRow

PICTURE_FILE = "confusion_matrix.png"
CSV_FILE = "confusion_matrix.csv"
JSON_FILE = "confusion_matrix.json"
SWEEP_CSV, SWEEP_PICTURE = "threshold_sweep.csv", "threshold_sweep.png"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "confusion-matrix",
        usage="%(prog)s [CONFIG] RESULTS [DIR]\n       [--annotations FILE] [--images DIR] [options]",
        help="which class is taken for which: one object, one count; picture, CSV, and a page with examples",
        description="Match detections with objects one to one: first those of one class, as COCO does, then what is "
        "left whatever its class. Rows sum to the objects of a class. Crowds are left out.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="RESULTS",
        help="results.json, MMDetection's result.pkl (2.x, 3.x) or DIR of `detserve evaluate --out`; MMDetection's "
        "config before it (read, not run) names annotations and images; the folder after it is written to",
    )
    parser.add_argument("--annotations", "--ann", type=Path, metavar="FILE", help="COCO annotation file")
    parser.add_argument("--images", type=Path, metavar="DIR", help="the photographs, to draw examples on")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"write {PICTURE_FILE}, CSV, JSON and index.html")
    parser.add_argument("--score-thr", type=fraction, default=0.3, metavar="S", help="of detections (default: 0.3)")
    parser.add_argument(
        "--tp-iou-thr", type=fraction, default=0.5, metavar="T", help="to find an object, from 0.1 (default: 0.5)"
    )
    parser.add_argument(
        "--nms-iou-thr", type=fraction, metavar="T", help="first suppress boxes of one class that overlap more"
    )
    parser.add_argument(
        "--iou-type", choices=("bbox", "segm"), help="compare boxes or masks (default: boxes if all results have one)"
    )
    parser.add_argument(
        "--normalize",
        choices=("rows", "columns", "all", "none"),
        default="rows",
        help="the picture's cells as shares of each class's objects (rows, the default), of its detections (columns), "
        "of all, or as counts (none); JSON and page have all of them",
    )
    parser.add_argument(
        "--max-classes",
        type=at_least(1),
        default=40,
        metavar="N",
        help="in the picture: those confused most (default: 40)",
    )
    parser.add_argument(
        "--pictures", type=at_least(0), default=60, metavar="N", help="draw at most so many examples (default: 60)"
    )
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="what a pickle's labels stand for: eval-metric")
    parser.add_argument("--allow-code", action="store_true", help="a config that is more than assignments is run")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    original = parser.add_argument_group("options of MMDetection's confusion_matrix.py")
    original.add_argument("--show", action="store_true", help="no window is opened: the files in DIR are written")
    original.add_argument(
        "--color-theme", default="plasma", metavar="NAME", help="matplotlib colour map (default: plasma)"
    )
    original.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="K=V", help="no effect: give --annotations and --images"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Count, print, write; return the exit code."""
    from rich.console import Console

    from dettools.analysis.analysis_inputs import read_inputs, split_positionals
    from dettools.analysis.confusion import confusion_of, suppressed, sweep
    from dettools.analysis.overlaps import find_overlaps
    from dettools.reports.confusion_page import to_json
    from dettools.reports.confusion_tables import print_confusion
    from dettools.reports.progress import progress

    places = split_positionals(args.inputs, args.out)
    if args.cfg_options:
        print("note: --cfg-options: no effect here; give --annotations and --images", file=sys.stderr)
    inputs = read_inputs(
        places,
        annotations=args.annotations,
        images=args.images,
        categories=args.categories,
        allow_code=args.allow_code,
    )
    notes = list(inputs.notes)
    results = inputs.predictions.results
    if args.nms_iou_thr is not None:
        results = tuple(suppressed(results, args.nms_iou_thr))
        notes.append(f"{len(inputs.predictions.results) - len(results)} detections suppressed by --nms-iou-thr")
        inputs = inputs.with_results(results)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    with progress() as show:
        overlaps = find_overlaps(
            inputs.ground_truth,
            results,
            iou_type=args.iou_type or inputs.iou_type,
            progress=lambda done, total: show("images compared", done, total),
        )
    confusion = confusion_of(overlaps, iou_threshold=args.tp_iou_thr, score_threshold=args.score_thr)
    rows = sweep(overlaps, iou_threshold=args.tp_iou_thr)
    names = [one.name for one in inputs.ground_truth.categories]
    print_confusion(confusion, names, rows, Console(stderr=args.json))
    document = {
        "annotations": str(inputs.ground_truth.path),
        "annotations_sha256": inputs.ground_truth.sha256,
        "results": str(inputs.predictions.path),
        "notes": notes,
        **to_json(confusion, names, rows),
    }
    if places.folder is not None:
        _write(args, places.folder, inputs, confusion, rows, document)
    elif args.show:
        print("note: --show opens no window: name a folder, and the picture is written there", file=sys.stderr)
    if args.json:
        print(json.dumps(document))
    return 0


def _write(
    args: argparse.Namespace,
    folder: Path,
    inputs: Inputs,
    confusion: Confusion,
    rows: list[SweepRow],
    document: dict[str, Any],
) -> None:
    from dettools.reports.confusion_page import PICTURE_FOLDER, Examples, write_page
    from dettools.reports.confusion_pictures import save_matrix, sweep_figure
    from dettools.reports.confusion_tables import write_matrix, write_sweep

    names = [one.name for one in inputs.ground_truth.categories]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_matrix(
            folder / PICTURE_FILE, confusion, names, by=args.normalize, theme=args.color_theme, most=args.max_classes
        )
        sweep_figure(rows, confusion.score_threshold).savefig(folder / SWEEP_PICTURE, dpi=130)
        write_matrix(folder / CSV_FILE, confusion, names)
        write_sweep(folder / SWEEP_CSV, rows)
        (folder / JSON_FILE).write_text(json.dumps(document) + "\n", encoding="utf-8")
        examples = Examples(confusion, inputs)
        drawn = examples.draw(folder / PICTURE_FOLDER, args.pictures)
        page = write_page(folder, examples, rows, drawn, document["notes"], by=args.normalize)
    except OSError as error:
        raise DetserveError(f"{folder}: cannot be written: {error.strerror or error}. Name another folder.") from None
    pictures = f", {len(drawn)} pictures of errors" if drawn else ""
    print(f"{folder / PICTURE_FILE}, CSV, JSON{pictures}; open {page}", file=sys.stderr)
