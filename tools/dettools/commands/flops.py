"""``detserve flops``: multiply-accumulates, parameters and what was not counted, of a model or a config alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

_IMAGES = 100


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "flops",
        help="count multiply-accumulates (MACs), FLOPs and parameters",
        description="Count what one forward pass costs: MACs and FLOPs (2 × MACs) by operator and module, parameters, "
        "and the operators that no formula counts. No data set and no weights are needed: a config of MMDetection is "
        "enough. Two-stage detectors give a range over their proposals and detections.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a spec (.yaml), an MMDetection config (.py), an .onnx file, a .mar, or a stored name",
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs="+",
        metavar="PX",
        help="height and width of the network's input after resizing, or one number for a square (default: the "
        "model's own; of a model that resizes, the largest landscape image)",
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a checkpoint instead of the spec's")
    parser.add_argument("--max-proposals", type=int, metavar="N", help="upper end of the range (default: the model's)")
    parser.add_argument("--max-detections", type=int, metavar="N", help="upper end of the range (default: the spec's)")
    parser.add_argument("--images", metavar="DIR", help="average over these images, each at the size it is served at")
    parser.add_argument(
        "--num-images",
        type=int,
        metavar="N",
        help="of --images the first N (100); of a config without --images, of the data set that it validates on",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="replace keys of the spec or config: builder_options.min_size=640 model.bbox_head.num_classes=3",
    )
    parser.add_argument(
        "--allow-code", action="store_true", help="run a config that is no literal, and its custom_imports"
    )
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="of the table of modules (2; 0: no table)")
    parser.add_argument("--model-store", type=Path, metavar="DIR", help="default: $DETSERVE_MODEL_STORE or model_store")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Count; return the exit code."""
    from detserve.model_store import default_model_store
    from rich.console import Console

    from dettools.flops.averages import average
    from dettools.flops.subjects import Asked, open_subject
    from dettools.reports.flops_tables import (
        average_document,
        cost_document,
        original_block,
        print_average,
        print_cost,
    )

    shape = _shape(args)
    asked = Asked(
        args.weights, _changes(args.cfg_options), args.max_proposals, args.max_detections, allow_code=args.allow_code
    )
    images = _images(args)
    mean = None
    with open_subject(args.model, model_store=args.model_store or default_model_store(), asked=asked) as subject:
        if images:
            mean = average(subject, images, progress=_progress)
            cost = mean.largest
        else:
            print(f"flops: counting {subject.name}", file=sys.stderr, flush=True)
            cost = subject.count(shape)
    if args.json:
        print(json.dumps({**cost_document(cost), "average": average_document(mean) if mean else None}))
        return 0
    console = Console()
    if mean:
        print_average(mean, console)
    print_cost(cost, console, depth=args.depth)
    print(original_block(cost, mean))
    return 0


def _shape(args: argparse.Namespace) -> tuple[int, int] | None:
    from dettools.flops.cost import FlopsError

    for name in ("num_images", "max_proposals", "max_detections"):
        number = getattr(args, name)
        if number is not None and number < 1:
            raise FlopsError(
                f"--{name.replace('_', '-')}: got {number}, expected at least 1. Correct the command line."
            )
    if args.shape is None:
        return None
    if args.images:
        raise FlopsError("got both --shape and --images, expected one: images bring their own sizes. Drop one.")
    if len(args.shape) > 2 or min(args.shape) < 1:
        raise FlopsError(
            f"--shape: got {' '.join(map(str, args.shape))}, expected a height and a width in pixels, or one number "
            "for a square. Correct the command line."
        )
    return args.shape[0], args.shape[-1]


def _images(args: argparse.Namespace) -> list[Path]:
    """Return the images to average over: those of ``--images``, or those of a config's data set when asked for some."""
    if args.images:
        from dettools.image_files import find_images

        return find_images([args.images])[: args.num_images or _IMAGES]
    if args.num_images is None or args.shape is not None or not args.model.endswith(".py"):
        return []

    from detserve.mmdet_dataset import read_dataset

    from dettools.ground_truth import load_ground_truth

    found = read_dataset(Path(args.model), split="val", allow_code=args.allow_code)
    files, _ = load_ground_truth(found.annotations).image_files(found.images)
    return list(files.values())[: args.num_images]


def _changes(options: list[str]) -> dict[str, Any]:
    """Read ``key=value``; a dot leads into a mapping, values are YAML."""
    import yaml

    from dettools.flops.cost import FlopsError

    changes: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        outer, dot, inner = key.partition(".")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise FlopsError(f"--cfg-options {option}: the value is not YAML ({error}). Put it in quotes.") from error
        if not equals or not outer or (dot and not inner):
            raise FlopsError(
                f"--cfg-options: got {option!r}, expected KEY=VALUE, such as builder_options.min_size=640."
            )
        if dot:
            changes.setdefault(outer, {})[inner] = value
        else:
            changes[outer] = value
    return changes


def _progress(done: int, count: int) -> None:
    if done % 10 == 0 or done == count:
        print(f"flops: {done} of {count} images", file=sys.stderr, flush=True)
