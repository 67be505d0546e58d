"""``detserve report``: one page that tells what a set of predictions is worth, and where it goes wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from detserve.errors import DetserveError

from dettools.argument_types import at_least, fraction

if TYPE_CHECKING:
    import argparse

PAGE_FILE = "detection-report.html"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "report",
        usage="%(prog)s [CONFIG] RESULTS [--annotations FILE] [--images DIR] [--out FILE.html] [options]",
        help="one HTML page of a predictions file: metrics, curves, errors, confusions, sizes, calibration, images",
        description="Write one HTML page that needs neither network nor other files. Its counts are those of "
        "confusion-matrix, analyze-results and coco-error-analysis.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="RESULTS",
        help="results.json, MMDetection's result.pkl (2.x, 3.x) or DIR of `detserve evaluate --out`; MMDetection's "
        "config before it (read, not run) names annotations and images",
    )
    parser.add_argument("--annotations", "--ann", type=Path, metavar="FILE", help="COCO annotation file")
    parser.add_argument("--images", type=Path, metavar="DIR", help="the photographs, to show them in the page")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: beside the results)")
    parser.add_argument("--iou-type", choices=("bbox", "segm"), help="compare boxes or masks (default: boxes)")
    parser.add_argument(
        "--score-thr", type=fraction, default=0.3, metavar="S", help="of the detections that count (default: 0.3)"
    )
    parser.add_argument(
        "--max-images", type=at_least(0), default=48, metavar="N", help="show at most so many photographs (default: 48)"
    )
    parser.add_argument("--title", help="of the page (default: the results' name)")
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="what a pickle's labels stand for: eval-metric")
    parser.add_argument("--allow-code", action="store_true", help="a config that is more than assignments is run")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compute, write the page; return the exit code."""
    from dettools.analysis.analysis_inputs import read_inputs, split_positionals
    from dettools.analysis.detection_report import detection_report
    from dettools.reports.progress import progress
    from dettools.reports.report_page import write_page

    places = split_positionals(args.inputs, None)
    if places.folder is not None:
        raise DetserveError(f"got {places.folder} after the results, expected nothing: name the page with --out FILE.")
    out = args.out or _beside(places.results)
    if out.is_dir():
        raise DetserveError(f"--out {out}: got a folder, expected the file to write, such as {out / PAGE_FILE}.")
    if out.exists() and out.resolve() in (places.results.resolve(), args.annotations and args.annotations.resolve()):
        raise DetserveError(f"--out {out} is a file that is read. Name another.")
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
        report = detection_report(
            inputs,
            iou_type=args.iou_type or inputs.iou_type,
            score_threshold=args.score_thr,
            progress=lambda done, total: show("images compared", done, total),
        )
        try:
            page = write_page(
                out,
                report,
                inputs,
                title=args.title or f"Detection report: {places.results.name}",
                max_images=args.max_images,
                progress=lambda done, total: show("images drawn", done, total),
            )
        except OSError as error:
            raise DetserveError(
                f"{out}: cannot be written: {error.strerror or error}. Name another file with --out."
            ) from None
    for note in page.notes:
        print(f"note: {note}", file=sys.stderr)
    figures, confusion = report.metrics.figures, report.confusion
    ap = "  ".join(
        f"{name} {'–' if figures[name] is None else format(figures[name], '.3f')}" for name in ("AP", "AP50", "AP75")
    )
    print(
        f"{ap}; at score ≥ {args.score_thr:g}: {confusion.found} of {confusion.objects} objects found, "
        f"{confusion.detections - confusion.found} false positives",
        file=sys.stderr,
    )
    print(f"{page.path}: {page.path.stat().st_size / 1e6:.1f} MB, {page.pictures} images shown", file=sys.stderr)
    if args.json:
        document = {
            "annotations": str(inputs.ground_truth.path),
            "annotations_sha256": inputs.ground_truth.sha256,
            "results": str(inputs.predictions.path),
            "page": str(page.path),
            "bytes": page.path.stat().st_size,
            "images_shown": page.pictures,
            "notes": [*inputs.notes, *page.notes],
            **report.to_json(),
        }
        print(json.dumps(document))
    return 0


def _beside(results: Path) -> Path:
    return results / PAGE_FILE if results.is_dir() else results.with_name(f"{results.stem}.report.html")
