"""``detserve evaluate``: the COCO AP of an endpoint, or of a model in this process, and its certificate."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dettools.endpoint import Endpoint, add_endpoint_arguments

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

    from dettools.evaluation.evaluation import Evaluation
    from dettools.evaluation.request import Request
    from dettools.evaluation.run import Progress

# As in dettools.agreement, which needs numpy: `detserve --help` must not wait for it. A test keeps them equal.
TIER_CHOICES = ("bit", "numeric", "reduced-precision", "detection")

_EPILOG = """\
  detserve evaluate shapes --images val/ --annotations val.json --out eval/        through the endpoint
  detserve evaluate shapes --images val/ --annotations val.json --against eager    as accurate as what was trained?
  detserve evaluate model.yaml --images val/ --annotations val.json                in this process, no server
  detserve evaluate nano --config yolox_nano.py         the data set that the config tests on
  detserve evaluate model.onnx --images val/ --annotations val.json --against eager --spec model.yaml
                                                        is the exported file as accurate as the checkpoint?
  detserve evaluate shapes … --out eval/ --shard 3/8    one of eight processes, 0/8 to 7/8
  detserve evaluate shapes --annotations val.json --merge eval/
                                                        the figures of all eight, as of one process

exit codes: 0 evaluated, and the certificate (if asked for) is given; 1 refused, images without an answer, or no
certificate; 2 usage or input error; 130 interrupted: the same command goes on where it was
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    import argparse

    parser = subparsers.add_parser(
        "evaluate",
        help="COCO AP through the endpoint or in process; certificate that served equals eager",
        description="Send a data set to the endpoint, count every image as answered or failed, and compute COCO AP. "
        "An endpoint that cuts the precision-recall curve off, or has other classes, is refused, with the cost.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        help="name of the served model; or a .yaml spec, a .mar archive or an exported .onnx, run in this process",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder with the images (default: --config's)")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO annotation file (default: --config's)")
    data = parser.add_argument_group("the data set of an MMDetection config")
    data.add_argument("--config", type=Path, metavar="CONFIG.py", help="take the data set from there; it is not run")
    data.add_argument("--split", choices=("test", "val", "train"), default="test", help="default: %(default)s")
    data.add_argument("--dataset", type=int, metavar="N", help="which one, from 1, where the config joins several")
    data.add_argument(
        "--allow-code",
        action="store_true",
        help="run a config of MMDetection that is more than a literal, and import its custom_imports",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="results.json, metrics.json, report.html and the journal to go on from (default: out/evaluate/MODEL)",
    )  # fmt: skip
    parser.add_argument(
        "--against", choices=("eager", "runtime"),
        help="also run the source checkpoint's framework, or the archive's detector in this process, and certify; the "
        "eager reference of an exported file without --spec is the file itself, read plainly",
    )  # fmt: skip
    parser.add_argument("--iou-type", nargs="+", choices=("bbox", "segm", "keypoints"), default=["bbox"])
    parser.add_argument(
        "--score-threshold", type=float, default=0.001, metavar="S", help="asked (default: %(default)s)"
    )
    parser.add_argument("--max-detections", type=int, default=100, metavar="N", help="asked (default: %(default)s)")
    parser.add_argument(
        "--categories-by", choices=("auto", "name", "id"), default="auto",
        help="how the model's classes are matched with the data set's (default: by name)",
    )  # fmt: skip
    parser.add_argument(
        "--accept-objections", action="store_true", help="evaluate what would be refused; the report is stamped"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="requests at once (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="in this process (default: the spec's)")
    parser.add_argument(
        "--patience", type=float, default=60.0, metavar="S",
        help="how long to wait for what may pass: a worker restarting, a full queue (default: %(default)g s)",
    )  # fmt: skip
    parts = parser.add_argument_group("a large data set in parts")
    parts.add_argument(
        "--shard", metavar="I/N", help="only every N-th image, from the I-th on (I from 0): answers, no figures, in "
        "--out/shard-I-of-N",
    )  # fmt: skip
    parts.add_argument(
        "--merge", type=Path, metavar="DIR", help="the figures of the whole from the N shards in DIR; asks nobody"
    )
    parts.add_argument("--wait", type=float, default=0.0, metavar="S", help="for shards that --merge finds unfinished")
    parser.add_argument("--fresh", action="store_true", help="begin anew and drop the answers of an interrupted run")
    parser.add_argument("--per-class", action="store_true", help="print each category's figures too")
    parser.add_argument("--margin", type=float, default=0.1, metavar="AP", help="of the certificate (default: 0.1 AP)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the certificate (default: %(default)s)")
    parser.add_argument(
        "--tier", choices=TIER_CHOICES, default="numeric",
        help="that the certificate's counterexamples fail to reach, image by image (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--version", dest="model_version", metavar="V", help="of the served model")
    parser.add_argument("--protocol", choices=("rest", "grpc", "oip"), default="rest", help="(%(default)s)")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="of one request (default: 60 s)")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="eager model's spec (default: the model store's)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="checkpoint instead of the spec's")
    parser.add_argument("--model-store", type=Path, metavar="DIR", help="default: $DETSERVE_MODEL_STORE or model_store")
    parser.add_argument("--device", default="cpu", help="of what runs in this process (default: %(default)s)")
    add_endpoint_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate; return the exit code."""
    from rich.console import Console

    from dettools.evaluation.request import RefusedError
    from dettools.evaluation.run import evaluate
    from dettools.reports.evaluation_tables import print_refusal
    from dettools.reports.progress import progress

    console = Console(stderr=args.json)
    if args.merge is not None:
        return _merge(args, console)
    request = _request(args)
    with contextlib.ExitStack() as stack:
        show = stack.enter_context(progress())
        try:
            if args.shard is not None:
                return _shard(args, request, console, show, stack)
            evaluation = evaluate(request, on_progress=show)
        except RefusedError as refused:
            stack.close()
            print_refusal(refused, console)
            if args.json:
                print(json.dumps({"refused": True, "objections": [one.to_json() for one in refused.objections]}))
            return 1
        except KeyboardInterrupt:
            stack.close()
            print(f"what was answered is kept in {request.out}; the same command goes on from there", file=sys.stderr)
            raise
    return _report(args, evaluation, request.out, console)


def _shard(
    args: argparse.Namespace, request: Request, console: Console, show: Progress, stack: contextlib.ExitStack
) -> int:
    from dettools.evaluation.run import evaluate_shard
    from dettools.evaluation.shards import Shard
    from dettools.reports.evaluation_tables import print_part

    part = evaluate_shard(request, Shard.parse(args.shard), on_progress=show)
    stack.close()
    print_part(part, console)
    if args.json:
        print(json.dumps(part.to_json()))
    return 0 if part.passed else 1


def _merge(args: argparse.Namespace, console: Console) -> int:
    from detserve.errors import DetserveError

    from dettools.evaluation.run import merge

    if args.shard is not None:
        raise DetserveError("got --shard and --merge, expected one of them: shards first, then one merge.")
    annotations = _annotations(args)
    evaluation = merge(
        args.merge, annotations, wait_s=args.wait, tier=args.tier, margin=args.margin / 100, confidence=args.confidence
    )
    return _report(args, evaluation, args.out or args.merge, console)


def _report(args: argparse.Namespace, evaluation: Evaluation, out: Path, console: Console) -> int:
    from dettools.evaluation.evaluation import write_evaluation
    from dettools.reports.evaluation_page import write_page
    from dettools.reports.evaluation_tables import print_evaluation

    write_evaluation(evaluation, out)
    page = write_page(evaluation, out / "report.html")
    print_evaluation(evaluation, console, per_class=args.per_class)
    console.print(f"report: {page}", soft_wrap=True)
    if args.json:
        print(json.dumps({**evaluation.to_json(), "report": str(page), "results": str(out / "results.json")}))
    return 0 if evaluation.passed else 1


def _request(args: argparse.Namespace) -> Request:
    from detserve.model_store import default_model_store

    from dettools.evaluation.request import Request
    from dettools.evaluation.stream import RetryPolicy

    images, annotations, classes = _data(args)
    local = args.model.endswith((".yaml", ".yml", ".mar", ".onnx"))
    return Request(
        model=args.model,
        images=images,
        annotations=annotations,
        classes=classes,
        out=args.out or Path("out") / "evaluate" / Path(args.model).name,
        endpoint=None if local else Endpoint.of(args),
        model_store=args.model_store or default_model_store(),
        against=args.against,
        iou_types=tuple(args.iou_type),
        score_threshold=args.score_threshold,
        max_detections=args.max_detections,
        categories_by=args.categories_by,
        accept_objections=args.accept_objections,
        limit=args.limit,
        concurrency=args.concurrency,
        batch_size=args.batch_size,
        retry=RetryPolicy(patience_s=args.patience),
        fresh=args.fresh,
        margin=args.margin / 100,
        confidence=args.confidence,
        tier=args.tier,
        version=args.model_version,
        spec=args.spec,
        weights=args.weights,
        device=args.device,
        allow_code=args.allow_code,
    )


def _annotations(args: argparse.Namespace) -> Path:
    """Return the annotation file alone: a merge needs no images."""
    from detserve.errors import DetserveError

    if args.config is not None:
        return _data(args)[1]
    if args.annotations is None:
        raise DetserveError("got no --annotations, expected the file that the shards read.")
    return Path(args.annotations)


def _data(args: argparse.Namespace) -> tuple[Path, Path, tuple[str, ...]]:
    """Return the folder of images, the annotation file, and the classes that it is restricted to."""
    from detserve.errors import DetserveError

    if args.config is None:
        missing = [f"--{name}" for name in ("images", "annotations") if getattr(args, name) is None]
        if missing:
            raise DetserveError(
                f"got no {' and no '.join(missing)}, expected a data set. Give --images and --annotations, or --config "
                "with MMDetection's config."
            )
        return args.images, args.annotations, ()

    from detserve.mmdet_dataset import read_dataset

    found = read_dataset(
        args.config,
        split=args.split,
        number=args.dataset,
        annotations=args.annotations,
        images=args.images,
        allow_code=args.allow_code,
    )
    for note in found.notes:
        print(f"evaluate: note: {note}", file=sys.stderr)
    print(f"evaluate: {found.annotations}, images in {found.images}", file=sys.stderr)
    return found.images, found.annotations, found.class_names
