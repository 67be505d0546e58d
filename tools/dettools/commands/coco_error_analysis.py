"""``detserve coco-error-analysis``: which errors a detector makes, and what each kind of them costs."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detserve.errors import DetserveError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from dettools.analysis.analysis_inputs import Inputs
    from dettools.coco_metrics import IouType
    from dettools.reports.error_page import Part

JSON_FILE = "coco_error_analysis.json"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "coco-error-analysis",
        help="what each kind of error costs, by class and size: COCO's stacks and TIDE, pictures and a page",
        description="Match once, and draw from it for each class and size: the precision-recall stacks C75, C50, Loc, "
        "Sim, Oth, BG, FN of COCO's analysis, and the TIDE errors Cls, Loc, Both, Dupe, Bkg, Miss with what AP would "
        "rise by without them. Numbers as JSON and CSV, one HTML page, examples on photographs.",
    )
    parser.add_argument(
        "results",
        type=Path,
        metavar="RESULTS",
        help="results.json (the detections, not the metrics), MMDetection's result.pkl (2.x, 3.x) or DIR of "
        "`detserve evaluate --out`",
    )
    parser.add_argument(
        "out_dir", type=Path, nargs="?", metavar="DIR", help="write pictures, numbers and index.html; else only print"
    )
    parser.add_argument(
        "--annotations", "--ann", type=Path, metavar="FILE", help="COCO annotation file of the results (required)"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="the photographs, to draw examples of errors on")
    parser.add_argument(
        "--types",
        "--iou-type",
        nargs="+",
        choices=("bbox", "segm"),
        default=["bbox"],
        metavar="TYPE",
        help="compare boxes (bbox, the default), masks (segm), or both",
    )
    parser.add_argument(
        "--areas",
        nargs=3,
        type=float,
        metavar=("SMALL", "MEDIUM", "LARGE"),
        default=[32.0**2, 96.0**2, 1e10],
        help="where small, medium and large end, px² (default: 1024 9216 10000000000)",
    )
    parser.add_argument(
        "--score-thr", type=float, default=0.0, metavar="S", help="leave out detections below it (default: 0)"
    )
    parser.add_argument("--extraplots", action="store_true", help="draw bars of each stack, and the objects' areas")
    parser.add_argument("--no-plots", action="store_true", help="write the numbers only")
    parser.add_argument(
        "--examples", type=int, default=4, metavar="N", help="pictures of each kind of error (default: 4)"
    )
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="what a pickle's labels stand for: eval-metric")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Match, print, write; return the exit code."""
    from dettools.analysis.analysis_inputs import Places, read_inputs

    if args.annotations is None:
        raise DetserveError(
            "no annotations: give --annotations val.json, the file that the predictions were made with."
        )
    if args.out_dir is not None and args.out_dir.exists() and not args.out_dir.is_dir():
        raise DetserveError(f"got {args.out_dir}, expected a folder to write to; that is a file.")
    if args.examples < 0:
        raise DetserveError(f"got --examples {args.examples}, expected 0 or more")
    inputs = read_inputs(
        Places(None, args.results, args.out_dir),
        annotations=args.annotations,
        images=args.images,
        categories=args.categories,
    )
    notes = list(inputs.notes)
    parts: dict[str, Part] = {}
    document: dict[str, Any] = {
        "annotations": str(inputs.ground_truth.path),
        "annotations_sha256": inputs.ground_truth.sha256,
        "results": str(inputs.predictions.path),
        "score_threshold": args.score_thr,
        "notes": notes,
        "types": {},
    }
    for iou_type in dict.fromkeys(args.types):
        parts[iou_type], document["types"][iou_type] = _analysed(args, inputs, iou_type, notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if args.out_dir is not None:
        _write(args, inputs, list(parts.values()), document)
    if args.json:
        print(json.dumps(document))
    return 0


def _analysed(
    args: argparse.Namespace, inputs: Inputs, iou_type: IouType, notes: list[str]
) -> tuple[Part, dict[str, Any]]:
    """Compute and print; in a folder, draw."""
    from rich.console import Console

    from dettools.analysis.error_stacks import error_overlaps, error_stacks
    from dettools.analysis.tide_errors import tide_errors
    from dettools.reports.error_page import PICTURE_FOLDER, Part, draw_examples
    from dettools.reports.error_pictures import SavedStacks, save_area_pictures, save_stacks
    from dettools.reports.error_tables import print_errors, to_json, write_csv
    from dettools.reports.progress import progress

    truth, results = inputs.ground_truth, inputs.predictions.results
    areas = tuple(args.areas)
    with progress() as show:
        overlaps = error_overlaps(
            truth,
            results,
            iou_type=iou_type,
            score_threshold=args.score_thr,
            progress=lambda done, total: show(f"{iou_type}: images compared", done, total),
        )
        stacks = error_stacks(
            truth, overlaps, areas=areas, progress=lambda done, total: show(f"{iou_type}: curves", done, total)
        )
    errors = tide_errors(overlaps, areas=areas)
    names = [one.name for one in truth.categories]
    if stacks.alone and (note := _alone(stacks.alone, len(names))) not in notes:
        notes.append(note)
    console = Console(stderr=args.json)
    console.print(f"{iou_type}", style="bold")
    print_errors(stacks, errors, names, console)
    saved, examples = SavedStacks(), []
    if args.out_dir is not None:
        folder = args.out_dir / iou_type
        with _writing(folder), progress() as show:
            folder.mkdir(parents=True, exist_ok=True)
            write_csv(folder, stacks, errors, names)
            if not args.no_plots:
                saved = save_stacks(
                    folder,
                    stacks,
                    overlaps,
                    names,
                    bars=args.extraplots,
                    progress=lambda done, total: show(f"{iou_type}: classes drawn", done, total),
                )
                if args.extraplots:
                    save_area_pictures(folder, overlaps, areas)
                examples = draw_examples(
                    folder / PICTURE_FOLDER, errors, truth, results, inputs.photographs, args.examples
                )
        if saved.without_objects:
            notes.append(
                f"{iou_type}: {saved.without_objects} of {4 * len(names) + 4} stacks are of a class and size without "
                "objects: they have no curve and are not drawn"
            )
    return Part(stacks, errors, saved, examples), to_json(stacks, errors, names)


def _write(args: argparse.Namespace, inputs: Inputs, parts: list[Part], document: dict[str, Any]) -> None:
    from dettools.reports.error_page import write_page

    with _writing(args.out_dir):
        (args.out_dir / JSON_FILE).write_text(json.dumps(document) + "\n", encoding="utf-8")
        page = write_page(args.out_dir, inputs.ground_truth, inputs.predictions.path, parts, document["notes"])
    stacks = sum(len(part.saved.files) for part in parts)
    examples = sum(len(part.examples) for part in parts)
    print(f"{stacks} stacks, {examples} examples, CSV and {JSON_FILE} in {args.out_dir}; open {page}", file=sys.stderr)


def _alone(names: tuple[str, ...], classes: int) -> str:
    if len(names) == classes:
        return "the categories have no supercategory: no class is similar to another, and Sim equals Loc"
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"categories without supercategory have no similar class: {shown}"


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DetserveError(f"{folder}: cannot be written: {error.strerror or error}. Name another folder.") from None
