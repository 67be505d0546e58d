"""``detserve eval-metric``: COCO AP of predictions that lie on disk, by the original tool's options or by ours."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detserve.errors import DetserveError

from dettools.argument_types import at_least

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dettools.coco_metrics import IouType
    from dettools.ground_truth import GroundTruth
    from dettools.predictions import Predictions

IOU_TYPES = ("bbox", "segm", "keypoints")
# Where MMDetection's configs name the annotation file: 3.x, then 2.x.
ANNOTATION_KEYS = (
    "test_evaluator.ann_file",
    "val_evaluator.ann_file",
    "test_dataloader.dataset.ann_file",
    "val_dataloader.dataset.ann_file",
    "data.test.ann_file",
    "data.val.ann_file",
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "eval-metric",
        help="COCO AP of a results file: COCO JSON, MMDetection pickle or the folder of an evaluation",
        description="Compute the COCO metrics of predictions on disk. The original tool's form CONFIG.py RESULTS.pkl "
        "--eval … works too; the config itself is not read.",
    )
    parser.add_argument(
        "results",
        nargs="+",
        metavar="RESULTS",
        help="results.json, MMDetection's result.pkl (2.x, 3.x) or DIR of `detserve evaluate --out`; a CONFIG.py "
        "before it is allowed",
    )
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO annotation file")
    parser.add_argument(
        "--iou-type", nargs="+", choices=IOU_TYPES, metavar="TYPE", help="bbox (default) segm keypoints"
    )
    parser.add_argument("--per-class", action="store_true", help="one row per class")
    parser.add_argument("--max-dets", nargs="+", type=int, metavar="N", help="per image and class (default: 1 10 100)")
    parser.add_argument(
        "--categories",
        nargs="+",
        metavar="NAME",
        help="what the labels of a pickle stand for: category names in the order of the labels, or `all` or `used` "
        "(annotated) categories in the order of the annotation file, or `ids` (the label is the category_id)",
    )
    parser.add_argument(
        "--confidence",
        nargs="?",
        type=_fraction,
        const=0.95,
        metavar="C",
        help="show the interval of AP by a bootstrap over images (default of the level: 0.95)",
    )
    parser.add_argument(
        "--resamples", type=at_least(1), default=1000, metavar="N", help="of the bootstrap (default: 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap (default: 0)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the metrics (or --format-only's results) as JSON"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    original = parser.add_argument_group("options of MMDetection's eval_metric.py")
    original.add_argument("--eval", nargs="+", metavar="METRIC", help="as --iou-type")
    original.add_argument("--format-only", action="store_true", help="write COCO results JSON, compute nothing")
    original.add_argument(
        "--eval-options", nargs="+", default=[], metavar="K=V", help="classwise, proposal_nums, iou_thrs, metric_items"
    )
    original.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="K=V",
        help="test_evaluator.ann_file=… (or that of the dataset) names the annotations; others have no effect",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, or convert; return the exit code."""
    from dettools.ground_truth import load_ground_truth
    from dettools.predictions import load_predictions

    results = _results(args.results)
    options = _eval_options(_pairs("--eval-options", args.eval_options))
    iou_types = _iou_types(args)
    ground_truth = load_ground_truth(_annotations(args))
    predictions = load_predictions(results, ground_truth, categories=args.categories)
    for note in (*ground_truth.notes, *predictions.notes):
        print(f"note: {note}", file=sys.stderr)
    if args.format_only:
        return _format(args, predictions)
    return _evaluate(args, ground_truth, predictions, iou_types, options)


def _evaluate(
    args: argparse.Namespace,
    ground_truth: GroundTruth,
    predictions: Predictions,
    iou_types: Sequence[IouType],
    options: Mapping[str, Any],
) -> int:
    from rich.console import Console

    from dettools.coco_metrics import ap_interval, evaluate_coco
    from dettools.published_figures import published_figures
    from dettools.reports.metrics_tables import print_metrics

    console = Console(stderr=args.json)
    document: dict[str, Any] = {
        "annotations": str(ground_truth.path),
        "annotations_sha256": ground_truth.sha256,
        "results": str(predictions.path),
        "source": predictions.source,
        "label_rule": predictions.label_rule,
        "notes": [*ground_truth.notes, *predictions.notes],
        "metrics": {},
    }
    per_class = args.per_class or options["per_class"]
    most = args.max_dets or options["max_detections"]
    if args.confidence is not None and options["iou_thresholds"] is not None:
        raise DetserveError(
            "--confidence: got it with iou_thrs; the interval is that of AP over IoU .50:.95. Leave one of them out."
        )
    for iou_type in iou_types:
        metrics = evaluate_coco(
            ground_truth,
            predictions.results,
            iou_type=iou_type,
            max_detections=most,
            iou_thresholds=options["iou_thresholds"],
        )
        interval = None
        if args.confidence is not None:
            interval = ap_interval(
                ground_truth,
                predictions.results,
                iou_type=iou_type,
                max_detections=metrics.max_detections[-1],
                resamples=args.resamples,
                seed=args.seed,
                confidence=args.confidence,
            )
        published = published_figures(ground_truth, predictions.results, metrics)
        print_metrics(metrics, console, published=published, interval=interval, per_class=per_class)
        document["metrics"][iou_type] = {
            **metrics.to_json(),
            **({} if published is None else {"pycocotools": published}),
            **({} if interval is None else {"interval": {**vars(interval), "seed": args.seed}}),
        }
    if args.out:
        _write(args.out, document, indent=2)
    if args.json:
        print(json.dumps(document))
    return 0


def _format(args: argparse.Namespace, predictions: Predictions) -> int:
    out = args.out or predictions.path.with_name(f"{predictions.path.stem}.results.json")
    if out.resolve() == predictions.path.resolve():
        raise DetserveError(f"--out {out} is the file that is read. Name another.")
    _write(out, predictions.results, indent=None)
    print(f"{len(predictions.results)} results written to {out}", file=sys.stderr)
    if args.json:
        document = {"results": str(out), "detections": len(predictions.results), "source": predictions.source}
        print(json.dumps({**document, "label_rule": predictions.label_rule, "notes": list(predictions.notes)}))
    return 0


def _results(given: Sequence[str]) -> Path:
    configs = [one for one in given if one.endswith(".py")]
    files = [Path(one) for one in given if not one.endswith(".py")]
    if len(files) != 1 or len(configs) > 1:
        raise DetserveError(
            f"got {' '.join(given)}, expected one results file or folder, with at most one CONFIG.py before it"
        )
    for config in configs:
        print(f"note: {config} is not read; what counts are the annotations", file=sys.stderr)
    return files[0]


def _annotations(args: argparse.Namespace) -> Path:
    options = _pairs("--cfg-options", args.cfg_options)
    named = next((key for key in ANNOTATION_KEYS if key in options), None)
    used = {named} if named and not args.annotations else set()
    if named and not args.annotations:
        root_key = f"{named.rpartition('.')[0]}.data_root"
        path = Path(options[named])
        if root_key in options and not path.is_file():
            path = Path(options[root_key]) / path
            used.add(root_key)
    if ignored := [key for key in options if key not in used]:
        print(f"note: --cfg-options {', '.join(ignored)}: no effect here, the config is not read", file=sys.stderr)
    if args.annotations:
        annotations: Path = args.annotations
        return annotations
    if not named:
        raise DetserveError(
            "no annotations: give --annotations val.json, the COCO annotation file that the predictions were made with "
            "(in a config: test_evaluator.ann_file, or test_dataloader.dataset.ann_file below its data_root)."
        )
    return path


def _iou_types(args: argparse.Namespace) -> list[IouType]:
    if args.eval and args.iou_type and args.eval != args.iou_type:
        raise DetserveError(f"--eval {' '.join(args.eval)} and --iou-type {' '.join(args.iou_type)}: give one of them")
    instead = {
        "proposal": "proposals have no classes: use --iou-type bbox, whose AR is the mean over the classes",
        "proposal_fast": "proposals have no classes: use --iou-type bbox, whose AR is the mean over the classes",
        "mAP": "that is the Pascal VOC metric: use --iou-type bbox, whose AP50 is near it",
        "recall": "use --iou-type bbox, which gives AR",
    }
    types = list(dict.fromkeys(args.eval or args.iou_type or ["bbox"]))
    for one in types:
        if one not in IOU_TYPES:
            reason = instead.get(one, f"expected {', '.join(IOU_TYPES)}")
            raise DetserveError(f"--eval {one}: {reason}")
    return types


def _eval_options(options: Mapping[str, str]) -> dict[str, Any]:
    read: dict[str, Any] = {"per_class": False, "max_detections": None, "iou_thresholds": None}
    for key, value in options.items():
        if key == "classwise":
            read["per_class"] = value.lower() in ("true", "1")
        elif key == "proposal_nums":
            read["max_detections"] = [int(one) for one in _numbers(key, value)]
        elif key == "iou_thrs":
            read["iou_thresholds"] = _numbers(key, value)
        elif key == "metric_items":
            print("note: --eval-options metric_items: all figures are shown; pick them from --json", file=sys.stderr)
        elif key in ("jsonfile_prefix", "outfile_prefix"):
            print(f"note: --eval-options {key}: results are written by --format-only --out FILE", file=sys.stderr)
        else:
            raise DetserveError(
                f"--eval-options {key}: expected classwise, proposal_nums, iou_thrs or metric_items; for the number of "
                "detections use --max-dets, for rows per class --per-class"
            )
    return read


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    if wrong := [one for one in given if "=" not in one]:
        raise DetserveError(f"{option}: got {wrong[0]!r}, expected KEY=VALUE")
    return {key.strip(): value.strip().strip("\"'") for key, _, value in (one.partition("=") for one in given)}


def _numbers(key: str, value: str) -> list[float]:
    """Read ``100,300``, ``[100,300]``, ``(100, 300)``, and one number."""
    try:
        numbers = [float(one) for one in value.strip("[]() ").split(",") if one.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise DetserveError(f"--eval-options {key}: got {value!r}, expected numbers such as 100,300,1000")
    return numbers


def _write(path: Path, document: object, *, indent: int | None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=indent) + "\n", encoding="utf-8")
    except OSError as error:
        raise DetserveError(
            f"{path}: cannot be written: {error.strerror or error}. Name another file with --out."
        ) from None


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a fraction such as 0.95")
    return value
