"""``detserve robustness-eval``: P, mPC and rPC of a robustness run's results file, ours or MMDetection's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from detserve.errors import DetserveError

if TYPE_CHECKING:
    import argparse

    from dettools.analysis.robustness_results import RobustnessResults


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "robustness-eval",
        help="P, mPC and rPC of a results file of `robustness`; partial ones are marked, never filled with zeros",
        description="Print MMDetection's block of lines, and a table by corruption and group. A mean that lacks cells "
        "is marked PARTIAL and says which. Corruptions are told apart by their names, not by their order.",
    )
    parser.add_argument("filename", type=Path, help="results file of `detserve robustness`, or MMDetection's .pkl")
    parser.add_argument(
        "--dataset", choices=("coco", "voc", "cityscapes"), default="coco", help="voc: AP50 only (default: coco)"
    )
    parser.add_argument("--task", nargs="+", choices=("bbox", "segm"), default=["bbox"], help="(default: bbox)")
    parser.add_argument(
        "--metric", nargs="+", default=[], metavar="M", help="AP AP50 … ARl, or mAP mAP_50 … (default: the six APs)"
    )
    parser.add_argument(
        "--prints", nargs="+", choices=("P", "mPC", "rPC"), default=["mPC"], help="of the block (default: mPC)"
    )
    parser.add_argument(
        "--aggregate", choices=("all", "benchmark"), default="benchmark", help="mean over (default: benchmark, the 15)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figure over severity")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write one row per corruption and severity")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, average, print; return the exit code."""
    from rich.console import Console

    from dettools.analysis.robustness_figures import aggregate, groups_of
    from dettools.analysis.robustness_results import METRICS, canonical_metric, read_results
    from dettools.reports.robustness_tables import original_block, print_robustness, voc_block

    metrics = [canonical_metric(name) for name in args.metric]
    if None in metrics:
        wrong = args.metric[metrics.index(None)]
        raise DetserveError(f"--metric: got {wrong!r}, expected {', '.join(METRICS)}, or mAP, mAP_50, mAP_s and so on.")
    chosen = [name for name in metrics if name is not None]
    results = read_results(args.filename)
    console = Console(stderr=args.json)
    voc = args.dataset == "voc"
    if voc and (args.task != ["bbox"] or chosen not in ([], ["AP"], ["AP50"])):
        print("note: of Pascal VOC only boxes and AP50 are reported", file=sys.stderr)
    tasks, shown = (["bbox"], "AP50") if voc else (args.task, chosen[0] if chosen else "AP")
    for task in tasks:
        _require_figures(results, args.filename, task, shown)
        block = (
            voc_block(results, args.filename.name, prints=args.prints, name=args.aggregate)
            if voc
            else original_block(
                results, args.filename.name, task=task, prints=args.prints, name=args.aggregate, metrics=chosen
            )
        )
        console.print(f"\n{block}\n", markup=False, highlight=False, soft_wrap=True)
        print_robustness(results, console, task=task, metric=shown, name=args.aggregate)
    _write(args, results, tasks[0], shown)
    if args.json:
        names = (args.aggregate, *groups_of(results))
        means = {
            task: [
                aggregate(results, name, task=task, metric=metric).to_json()
                for name in names
                for metric in ([shown] if voc else chosen or METRICS)
            ]
            for task in tasks
        }
        print(json.dumps({"file": str(args.filename), "model": results.model, "aggregates": means}))
    return 0


def _require_figures(results: RobustnessResults, path: Path, task: str, metric: str) -> None:
    """Tell a task or figure that no cell has, instead of printing a table of nothing."""
    cells = [*([results.clean] if results.clean else []), *(c for row in results.cells.values() for c in row.values())]
    if not any(metric in cell.figures.get(task, {}) for cell in cells):
        kinds = {kind for cell in cells for kind in cell.figures}
        figures = {name for cell in cells for name in cell.figures.get(task, {})}
        there = sorted(figures or kinds)
        raise DetserveError(
            f"{path}: no cell has {task} {metric}; it has {', '.join(there) or 'no figure'}. Choose another --task, "
            "--metric or --dataset."
        )


def _write(args: argparse.Namespace, results: RobustnessResults, task: str, metric: str) -> None:
    from dettools.reports.robustness_pictures import save_curves
    from dettools.reports.robustness_tables import write_csv

    try:
        if args.csv:
            write_csv(results, args.csv)
        if args.plot:
            args.plot.parent.mkdir(parents=True, exist_ok=True)
            save_curves(results, args.plot, task=task, metric=metric, name=args.aggregate)
    except OSError as error:
        raise DetserveError(f"{error.filename}: cannot be written: {error.strerror}. Name another file.") from None
