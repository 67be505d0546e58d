"""``detserve analyze-results``: how good each image came out, the best and the worst as pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detserve.errors import DetserveError

from dettools.argument_types import at_least, fraction

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from dettools.analysis.analysis_inputs import Inputs
    from dettools.analysis.image_results import ImageResult, ImageResults

COLUMNS = (
    *("name", "ap", "class_ap", "f1", "precision", "recall", "tp", "fp", "fn", "confused", "absent_fp", "iou"),
    *("top_fp", "objects"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "analyze-results",
        usage="%(prog)s [CONFIG] RESULTS [DIR]\n       [--annotations FILE] [--images DIR] [options]",
        help="AP, TP, FP, FN and F1 of each image; the best and the worst as pictures, ground truth beside prediction",
        description="Compute the results of every image, sort them, and draw the best into DIR/good and the worst into "
        "DIR/bad. AP ranks all detections of an image together, so that false positives of classes it does not have "
        "cost too; class_ap is the mean over the classes it has.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="RESULTS",
        help="results.json, MMDetection's result.pkl (2.x, 3.x) or DIR of `detserve evaluate --out`; MMDetection's "
        "config before it (read, not run) names annotations and images; the folder after it is written to",
    )
    parser.add_argument("--annotations", "--ann", type=Path, metavar="FILE", help="COCO annotation file")
    parser.add_argument("--images", type=Path, metavar="DIR", help="the photographs; without them only tables")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.csv, results.json, index.html, pictures")
    parser.add_argument(
        "--sort",
        choices=COLUMNS,
        default="ap",
        metavar="COLUMN",
        help=f"from bad to good by: {', '.join(COLUMNS)} (default: ap)",
    )
    parser.add_argument("--score-thr", type=fraction, default=0.3, metavar="S", help="of what is counted (0.3)")
    parser.add_argument(
        "--iou-thr", type=fraction, default=0.5, metavar="T", help="to find an object, from 0.1 on (0.5)"
    )
    parser.add_argument(
        "--iou-type", choices=("bbox", "segm"), help="compare boxes or masks (default: boxes if all results have one)"
    )
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="what a pickle's labels stand for: eval-metric")
    parser.add_argument("--allow-code", action="store_true", help="a config that is more than assignments is run")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    original = parser.add_argument_group("options of MMDetection's analyze_results.py")
    original.add_argument(
        "--topk", type=at_least(1), default=20, metavar="N", help="draw so many of each end, at most half of all (20)"
    )
    original.add_argument(
        "--show-score-thr",
        type=fraction,
        metavar="S",
        help="draw detections from this score on; those that are not counted in grey (default: --score-thr)",
    )
    original.add_argument("--show", action="store_true", help="no window is opened: open DIR/index.html")
    original.add_argument("--wait-time", type=float, metavar="S", help="no effect: no window is opened")
    original.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="K=V", help="no effect: give --annotations and --images"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compute, print, write; return the exit code."""
    from rich.console import Console

    from dettools.analysis.analysis_inputs import read_inputs, split_positionals
    from dettools.analysis.image_results import extremes, image_results, ranked
    from dettools.analysis.overlaps import find_overlaps
    from dettools.reports.progress import progress
    from dettools.reports.results_tables import print_results

    places = split_positionals(args.inputs, args.out)
    _tell_of_no_effect(args)
    inputs = read_inputs(
        places,
        annotations=args.annotations,
        images=args.images,
        categories=args.categories,
        allow_code=args.allow_code,
    )
    for note in inputs.notes:
        print(f"note: {note}", file=sys.stderr)
    with progress() as show:
        overlaps = find_overlaps(
            inputs.ground_truth,
            inputs.predictions.results,
            iou_type=args.iou_type or inputs.iou_type,
            progress=lambda done, total: show("images compared", done, total),
        )
    results = image_results(inputs.ground_truth, overlaps, iou_threshold=args.iou_thr, score_threshold=args.score_thr)
    order = ranked(results.images, args.sort)
    # Where photographs were named, images without one have no picture to look at.
    seen = [one for one in results.images if one.image_id in inputs.photographs] or results.images
    good, bad = extremes(seen, args.sort, args.topk)
    by = args.sort if args.sort not in ("name", "objects") else "ap"
    print_results(results, good, bad, by, Console(stderr=args.json))
    document: dict[str, Any] = {
        "annotations": str(inputs.ground_truth.path),
        "annotations_sha256": inputs.ground_truth.sha256,
        "results": str(inputs.predictions.path),
        "notes": list(inputs.notes),
        "iou_type": overlaps.iou_type,
        "iou_threshold": args.iou_thr,
        "score_threshold": args.score_thr,
        "sort": args.sort,
        "totals": results.totals,
        "images": [vars(one) for one in order],
        "good": [one.image_id for one in good],
        "bad": [one.image_id for one in bad],
        "pictures": {},
    }
    if places.folder is not None:
        _write(args, places.folder, inputs, results, order, {"good": good, "bad": bad}, document, by)
    if args.json:
        print(json.dumps(document))
    return 0


def _write(
    args: argparse.Namespace,
    folder: Path,
    inputs: Inputs,
    results: ImageResults,
    order: Sequence[ImageResult],
    ends: Mapping[str, Sequence[ImageResult]],
    document: dict[str, Any],
    by: str,
) -> None:
    from dettools.reports.results_page import (
        CSV_FILE,
        JSON_FILE,
        ResultPictures,
        remove_earlier_pictures,
        write_page,
    )
    from dettools.reports.results_tables import write_csv

    shown_from = args.score_thr if args.show_score_thr is None else args.show_score_thr
    pictures: dict[int, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_earlier_pictures(folder)
        drawing = ResultPictures(inputs, results, shown_from)
        for end, images in ends.items():
            pictures |= drawing.draw(folder / end, images, by)
        document["pictures"] = {one: path.relative_to(folder).as_posix() for one, path in pictures.items()}
        write_csv(folder / CSV_FILE, order)
        (folder / JSON_FILE).write_text(json.dumps(document) + "\n", encoding="utf-8")
        page = write_page(
            folder, inputs, results, order, ends, pictures, document["notes"], ends_by=by, ordered_by=args.sort
        )
    except OSError as error:
        raise DetserveError(f"{folder}: cannot be written: {error.strerror or error}. Name another folder.") from None
    if not pictures:
        print("note: no pictures: give --images DIR with the photographs", file=sys.stderr)
    print(f"{CSV_FILE}, {JSON_FILE}, {len(pictures)} pictures in {folder}; open {page}", file=sys.stderr)


def _tell_of_no_effect(args: argparse.Namespace) -> None:
    if args.show or args.wait_time is not None:
        print("note: --show, --wait-time: no window is opened; the pictures are in the folder", file=sys.stderr)
    if args.cfg_options:
        print("note: --cfg-options: no effect here; give --annotations and --images", file=sys.stderr)
