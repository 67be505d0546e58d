"""``detserve occluded-recall``: how many of the occluded and of the separated objects are found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from detserve.errors import DetserveError

if TYPE_CHECKING:
    import argparse

    from dettools.analysis.occluded_recall import RecallType
    from dettools.analysis.occlusion import OcclusionSubsets
    from dettools.ground_truth import GroundTruth
    from dettools.predictions import Predictions


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "occluded-recall",
        help="recall of occluded and separated objects, of masks and boxes, with intervals",
        description="Tell from the annotations' masks which objects are occluded (connected, bordered by an occluder) "
        "and which are separated (cut by one), and count how many of them the predictions find.",
    )
    parser.add_argument(
        "results",
        type=Path,
        nargs="?",
        metavar="RESULTS",
        help="results.json, MMDetection's result.pkl (2.x, 3.x) or DIR of `detserve evaluate --out`; not needed "
        "with --make-subsets",
    )
    parser.add_argument(
        "--annotations",
        "--ann",
        type=Path,
        metavar="FILE",
        help="COCO annotation file, with masks to make subsets from",
    )
    subsets = parser.add_mutually_exclusive_group()
    subsets.add_argument("--make-subsets", type=Path, metavar="FILE", help="write the subsets as JSON")
    subsets.add_argument("--subsets", type=Path, metavar="FILE", help="subsets that --make-subsets wrote")
    parser.add_argument("--score-thr", type=float, default=0.3, metavar="S", help="of detections (default: 0.3)")
    parser.add_argument("--iou-thr", type=float, default=0.75, metavar="T", help="to find an object (default: 0.75)")
    parser.add_argument(
        "--iou-type",
        nargs="+",
        choices=("segm", "bbox"),
        metavar="TYPE",
        help="segm bbox (default: both, if there are)",
    )
    parser.add_argument("--confidence", type=float, default=0.95, metavar="C", help="of the intervals (default: 0.95)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    rule = parser.add_argument_group("what counts as occluded")
    rule.add_argument("--contact-px", type=int, default=3, metavar="PX", help="masks so near touch (default: 3)")
    rule.add_argument(
        "--min-contact", type=float, default=0.2, metavar="F", help="share of the outline that touches (default: 0.2)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make or read the subsets, count; return the exit code."""
    from rich.console import Console

    from dettools.analysis.occluded_recall import OccludedRecall
    from dettools.analysis.occlusion import SUBSETS
    from dettools.ground_truth import load_ground_truth
    from dettools.predictions import load_predictions
    from dettools.reports.occlusion_tables import original_block, print_occluded_recall

    if args.annotations is None:
        raise DetserveError(
            "no annotations: give --annotations val.json, the file that the predictions were made with."
        )
    if args.results is None and args.make_subsets is None:
        raise DetserveError("got no RESULTS, expected a results file; or --make-subsets FILE to make the subsets only")
    if args.out and args.out.suffix in (".pkl", ".pickle"):
        raise DetserveError(f"--out {args.out}: the figures are written as JSON. Name a .json file.")
    ground_truth = load_ground_truth(args.annotations)
    predictions = load_predictions(args.results, ground_truth) if args.results else None
    for note in (*ground_truth.notes, *(predictions.notes if predictions else ())):
        print(f"note: {note}", file=sys.stderr)
    subsets = _subsets(args, ground_truth)
    counts = ", ".join(f"{len(getattr(subsets, kind))} {kind}" for kind in SUBSETS)
    print(
        f"{subsets.objects} objects with masks: {counts}; {subsets.split_alone} in parts that no object cuts",
        file=sys.stderr,
    )
    if predictions is None:
        if args.json:
            print(json.dumps({"subsets": str(args.make_subsets), **{k: len(getattr(subsets, k)) for k in SUBSETS}}))
        return 0
    recall = OccludedRecall(
        ground_truth,
        subsets,
        score_threshold=args.score_thr,
        iou_threshold=args.iou_thr,
        iou_types=_iou_types(args, predictions),
        confidence=args.confidence,
    )
    recall.update_results(predictions.results)
    result = recall.result()
    console = Console(stderr=args.json)
    console.print(original_block(result, result.subsets[0].iou_type), markup=False, highlight=False, soft_wrap=True)
    print_occluded_recall(result, console)
    document = {
        **result.to_json(),
        "annotations": str(ground_truth.path),
        "annotations_sha256": ground_truth.sha256,
        "results": str(predictions.path),
        "rule": vars(subsets.rule),
    }
    if args.out:
        _write(args.out, document)
        print(f"Evaluation results have been saved to {args.out}.", file=sys.stderr)
    if args.json:
        print(json.dumps(document))
    return 0


def _subsets(args: argparse.Namespace, ground_truth: GroundTruth) -> OcclusionSubsets:
    from dettools.analysis.occlusion import OcclusionRule, load_subsets, make_subsets
    from dettools.reports.progress import progress

    if args.subsets:
        return load_subsets(args.subsets, ground_truth)
    rule = OcclusionRule(contact_px=args.contact_px, min_contact=args.min_contact)
    with progress() as show:
        subsets = make_subsets(ground_truth, rule, progress=lambda done, total: show("images looked at", done, total))
    if args.make_subsets:
        _write(args.make_subsets, subsets.to_json())
        print(f"subsets written to {args.make_subsets}", file=sys.stderr)
    return subsets


def _iou_types(args: argparse.Namespace, predictions: Predictions) -> list[RecallType]:
    results = predictions.results
    if args.iou_type:
        return list(args.iou_type)
    masks = all(one.get("segmentation") is not None for one in results)
    boxes = all(one.get("bbox") is not None for one in results)
    if not masks:
        print("note: the predictions have no masks: only their boxes are compared", file=sys.stderr)
    types: list[RecallType] = ["segm"] if masks else []
    return [*types, "bbox"] if boxes or not types else types


def _write(path: Path, document: object) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DetserveError(f"{path}: cannot be written: {error.strerror or error}. Name another file.") from None
