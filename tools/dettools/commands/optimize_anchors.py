"""``detserve optimize-anchors``: anchors that fit the boxes of a data set, beside those that are in use."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detserve.errors import DetserveError

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

    from dettools.analysis.anchor_boxes import BoxSizes, Coverage
    from dettools.analysis.anchor_config import Anchor, AnchorLayout
    from dettools.analysis.anchor_search import Search
    from dettools.ground_truth import GroundTruth

ALGORITHMS = ("k-means", "differential_evolution")
RESULT_FILE = "anchor_optimize_result.json"
REPORT_FILE = "anchor_report.json"
PICTURE_FILE = "anchors.png"
# Cells of the histogram along each side: evolution asks it for 270 sets of anchors in every generation.
FINE_CELLS, COARSE_CELLS = 100, 50


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "optimize-anchors",
        help="anchors that fit a data set's boxes; refused unless they are better than the present ones",
        description="Find anchor sizes by k-means or differential evolution over the IoU of boxes and anchors, scaled "
        "as the photographs are. Exit code 1: the present anchors are as good or better, nothing is written.",
    )
    parser.add_argument(
        "config",
        type=Path,
        metavar="CONFIG|ANNOTATIONS",
        help="MMDetection config (read, not run; names the training data and the present anchors) or COCO annotations",
    )
    parser.add_argument(
        "--annotations", type=Path, metavar="FILE", help="COCO annotation file, instead of the config's"
    )
    parser.add_argument(
        "--algorithm", choices=ALGORITHMS, default="differential_evolution", help="(default: differential_evolution)"
    )
    parser.add_argument(
        "--input-shape", nargs=2, type=int, default=[608, 608], metavar=("W", "H"), help="of the network (608 608)"
    )
    parser.add_argument("--iters", type=int, default=1000, metavar="N", help="steps at most (default: 1000)")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help=f"write {RESULT_FILE}, a report and a picture")
    parser.add_argument("--restarts", type=int, default=10, metavar="N", help="of k-means (default: 10)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same anchors (default: 0)")
    parser.add_argument(
        "--stretch", action="store_true", help="the input is filled: the resize does not keep the ratio"
    )
    parser.add_argument("--min-size", type=float, default=0.0, metavar="PX", help="leave out boxes with a smaller side")
    parser.add_argument(
        "--no-polish", action="store_true", help="keep what the algorithm found: no last climb to the top"
    )
    parser.add_argument("--allow-code", action="store_true", help="a config that is more than assignments is run")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    plain = parser.add_argument_group("without a config")
    plain.add_argument("--anchors", nargs="+", metavar="W,H", help="the present ones, in the order of the strides")
    plain.add_argument("--strides", nargs="+", type=int, metavar="N", help="of the levels (default: 8 16 32)")
    plain.add_argument("--per-level", type=int, metavar="N", help="anchors of each level (default: 3)")
    original = parser.add_argument_group("options of MMDetection's optimize_anchors.py")
    original.add_argument("--device", metavar="DEVICE", help="no effect: the boxes' histogram needs no GPU")
    original.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="K=V",
        help="train_dataloader.dataset.ann_file=… names the annotations; others have no effect",
    )
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class _Outcome:
    levels: tuple[tuple[Anchor, ...], ...]
    anchors: tuple[Anchor, ...]
    now: Coverage
    before: Coverage | None

    @property
    def better(self) -> bool:
        return self.before is None or self.now.mean_iou > self.before.mean_iou


def run(args: argparse.Namespace) -> int:
    """Search, compare, write; return the exit code."""
    from rich.console import Console

    from dettools.analysis.anchor_boxes import as_sizes, box_sizes, coverage_of, rounded
    from dettools.analysis.anchor_config import config_text, grouped
    from dettools.reports.anchors import print_coverage, print_levels

    if args.device:
        print(f"note: --device {args.device}: no effect, the search runs on the CPU", file=sys.stderr)
    ground_truth, layout = _inputs(args)
    if args.seed < 0:
        raise DetserveError(f"--seed: got {args.seed}, expected 0 or more")
    width, height = args.input_shape
    boxes = box_sizes(ground_truth, (width, height), keep_ratio=not args.stretch, smallest_px=args.min_size)
    for note in (*ground_truth.notes, *_left_out(boxes)):
        print(f"note: {note}", file=sys.stderr)
    search = _search(args, boxes, layout.count)
    anchors = rounded(search.anchors)
    outcome = _Outcome(
        levels=grouped(anchors, layout),
        anchors=anchors,
        now=coverage_of(as_sizes(anchors), boxes.sizes),
        before=coverage_of(as_sizes(layout.anchors), boxes.sizes) if layout.current else None,
    )
    console = Console(stderr=args.json)
    text = config_text(outcome.levels, layout)
    print_coverage(outcome.now, outcome.before, console)
    if outcome.better:
        print_levels(outcome.levels, layout, outcome.now, console)
        verb = "cluster" if args.algorithm == "k-means" else "evolution"
        _say(console, f"Anchor {verb} finish. Average IOU: {outcome.now.mean_iou:.4f}")
        _say(console, f"Anchor optimize result:{[list(anchor) for anchor in outcome.anchors]}")
        _say(console, f"\nfor the config:\n{text}")
        if outcome.before is not None and outcome.now.recall50 < outcome.before.recall50:
            print(
                f"note: the recall at IoU .50 falls from {outcome.before.recall50:.3f} to {outcome.now.recall50:.3f}: "
                "the mean IoU is what was optimized",
                file=sys.stderr,
            )
    document = _document(args, ground_truth, boxes, layout, search, outcome, text)
    if outcome.better and args.output_dir:
        _write(args.output_dir, document, boxes, layout, outcome)
        _say(console, f"Result saved in {args.output_dir / RESULT_FILE}")
    if args.json:
        print(json.dumps(document))
    if not outcome.better and outcome.before is not None:
        print(
            f"detserve optimize-anchors: the new anchors have a mean IoU of {outcome.now.mean_iou:.4f}, the present "
            f"ones {outcome.before.mean_iou:.4f}: keep the present ones. Nothing was written.",
            file=sys.stderr,
        )
    return 0 if outcome.better else 1


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _search(args: argparse.Namespace, boxes: BoxSizes, count: int) -> Search:
    from dettools.analysis.anchor_boxes import histogram_of
    from dettools.analysis.anchor_search import cluster_anchors, evolve_anchors, polished

    fine = histogram_of(boxes.sizes, FINE_CELLS)
    if args.algorithm == "k-means":
        found = cluster_anchors(fine, count, iterations=args.iters, restarts=args.restarts, seed=args.seed)
        repaired = f", {found.repaired} empty clusters repaired" if found.repaired else ""
        print(f"k-means: {args.restarts} restarts, {found.steps} iterations in the best{repaired}", file=sys.stderr)
    else:
        coarse = histogram_of(boxes.sizes, COARSE_CELLS)
        found = evolve_anchors(
            coarse, count, boxes.input_size, steps=args.iters, seed=args.seed, progress=_tell_of_evolution
        )
        ended = "converged" if found.converged else "stopped by --iters"
        print(f"differential evolution: {found.steps} steps, {ended}", file=sys.stderr)
    return found if args.no_polish else polished(found, fine, boxes.input_size)


def _tell_of_evolution(step: int, mean_iou: float) -> None:
    if step == 1 or step % 50 == 0:
        print(f"differential_evolution step {step}: f(x)= {1 - mean_iou:.6g}", file=sys.stderr)


def _inputs(args: argparse.Namespace) -> tuple[GroundTruth, AnchorLayout]:
    from detserve.mmdet_dataset import read_dataset

    from dettools.analysis.anchor_config import layout_of, read_layout
    from dettools.ground_truth import load_ground_truth

    annotations = args.annotations or _named(args.cfg_options)
    if args.config.suffix not in (".py", ".yaml", ".yml"):
        if annotations:
            raise DetserveError(f"got the annotations twice, {args.config} and {annotations}: expected one file")
        layout = layout_of(args.strides or [8, 16, 32], args.per_level or 3, _pairs(args.anchors or []))
        return load_ground_truth(args.config), layout
    if args.anchors or args.strides or args.per_level:
        raise DetserveError(
            f"--anchors, --strides and --per-level describe a detector without a config; {args.config} has its own. "
            "Leave them out, or give the annotations instead of the config."
        )
    layout = read_layout(args.config, allow_code=args.allow_code)
    if annotations:
        return load_ground_truth(annotations), layout
    # The pictures are not looked at: they need not be here.
    dataset = read_dataset(args.config, split="train", images=Path(), allow_code=args.allow_code)
    for note in dataset.notes:
        print(f"note: {note}", file=sys.stderr)
    ground_truth = load_ground_truth(dataset.annotations)
    return ground_truth.with_categories(dataset.class_names) if dataset.class_names else ground_truth, layout


def _named(options: list[str]) -> Path | None:
    """Return the annotation file that --cfg-options names."""
    pairs = {}
    for one in options:
        key, separator, value = one.partition("=")
        if not separator:
            raise DetserveError(f"--cfg-options: got {one!r}, expected KEY=VALUE")
        pairs[key.strip()] = value.strip().strip("\"'")
    named = next((key for key in pairs if key.endswith(".ann_file")), None)
    root_key = f"{named.rpartition('.')[0]}.data_root" if named else None
    if ignored := [key for key in pairs if key not in (named, root_key)]:
        print(f"note: --cfg-options {', '.join(ignored)}: no effect here", file=sys.stderr)
    if named is None:
        return None
    path = Path(pairs[named])
    return Path(pairs[root_key]) / path if root_key in pairs and not path.is_file() else path


def _pairs(texts: list[str]) -> list[tuple[float, float]]:
    pairs = []
    for text in texts:
        try:
            width, height = (float(one) for one in text.split(","))
        except ValueError:
            width = height = math.nan
        if not (0 < width < math.inf and 0 < height < math.inf):
            raise DetserveError(f"--anchors: got {text!r}, expected width,height such as 10,13")
        pairs.append((width, height))
    return pairs


def _left_out(boxes: BoxSizes) -> list[str]:
    return [f"{count} boxes left out: {reason}" for reason, count in boxes.left_out.items() if count]


def _document(
    args: argparse.Namespace,
    ground_truth: GroundTruth,
    boxes: BoxSizes,
    layout: AnchorLayout,
    search: Search,
    outcome: _Outcome,
    text: str,
) -> dict[str, Any]:
    return {
        "annotations": str(ground_truth.path),
        "annotations_sha256": ground_truth.sha256,
        "algorithm": args.algorithm,
        "seed": args.seed,
        "input_shape": list(boxes.input_size),
        "keep_ratio": not args.stretch,
        "left_out": dict(boxes.left_out),
        "steps": search.steps,
        "converged": search.converged,
        "repaired_clusters": search.repaired,
        "restarts_mean_iou": list(search.spread),
        "better": outcome.better,
        "anchors": [list(anchor) for anchor in outcome.anchors],
        "base_sizes": [[list(anchor) for anchor in level] for level in outcome.levels],
        "strides": list(layout.strides),
        "coverage": outcome.now.to_json(),
        "present_anchors": [list(anchor) for anchor in layout.anchors] if layout.current else None,
        "present_coverage": None if outcome.before is None else outcome.before.to_json(),
        "config_text": text,
    }


def _write(folder: Path, document: dict[str, Any], boxes: BoxSizes, layout: AnchorLayout, outcome: _Outcome) -> None:
    from dettools.reports.anchors import save_anchor_picture

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULT_FILE).write_text(json.dumps(document["anchors"]) + "\n", encoding="utf-8")
        (folder / REPORT_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        present = layout.anchors if layout.current else ()
        save_anchor_picture(folder / PICTURE_FILE, boxes.sizes, outcome.anchors, present, outcome.now)
    except OSError as error:
        raise DetserveError(
            f"{folder}: cannot be written: {error.strerror or error}. Name another --output-dir."
        ) from None
