"""``detserve evaluate``: the COCO AP of an endpoint, or of a model in this process, and its certificate."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dettools.endpoint import add_endpoint_arguments

if TYPE_CHECKING:
    import argparse

_EPILOG = """\
  detserve evaluate shapes --images val/ --annotations val.json --out eval/        through the endpoint
  detserve evaluate shapes --images val/ --annotations val.json --against eager    is it as accurate as what was trained?
  detserve evaluate model.yaml --images val/ --annotations val.json                in this process, no server

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
        "An endpoint that cuts the precision-recall curve off, or has other classes, is refused with what it would cost.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="name of the served model; or a .yaml spec or .mar archive, run in this process")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder with the images")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="COCO annotation file")
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="results.json, metrics.json, report.html and the journal to go on from (default: out/evaluate/MODEL)",
    )  # fmt: skip
    parser.add_argument(
        "--against", choices=("eager", "runtime"),
        help="also run the source checkpoint's framework, or the archive's detector in this process, and certify",
    )  # fmt: skip
    parser.add_argument("--iou-type", nargs="+", choices=("bbox", "segm", "keypoints"), default=["bbox"])
    parser.add_argument("--score-threshold", type=float, default=0.001, metavar="S", help="asked (default: %(default)s)")
    parser.add_argument("--max-detections", type=int, default=100, metavar="N", help="asked (default: %(default)s)")
    parser.add_argument(
        "--categories-by", choices=("auto", "name", "id"), default="auto",
        help="how the model's classes are matched with the data set's (default: by name)",
    )  # fmt: skip
    parser.add_argument(
        "--accept-objections", action="store_true", help="evaluate what would be refused; the report is stamped"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="in this process (default: the spec's)")
    parser.add_argument(
        "--patience", type=float, default=60.0, metavar="S",
        help="how long an error that may pass is waited for: a worker restarting, a full queue (default: %(default)g s)",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="begin anew and drop the answers of an interrupted run")
    parser.add_argument("--per-class", action="store_true", help="print each category's figures too")
    parser.add_argument("--margin", type=float, default=0.1, metavar="AP", help="of the certificate (default: 0.1 AP)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the certificate (default: %(default)s)")
    parser.add_argument("--tier", default="numeric", help="of the comparison image by image (default: %(default)s)")
    parser.add_argument("--version", dest="model_version", metavar="V", help="of the served model")
    parser.add_argument("--protocol", choices=("rest", "grpc"), default="rest", help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="of one request (default: 60 s)")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="eager model's spec (default: the model store's)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights instead of the spec's")
    parser.add_argument("--model-store", type=Path, metavar="DIR", help="default: $DETSERVE_MODEL_STORE or model_store")
    parser.add_argument("--device", default="cpu", help="of what runs in this process (default: %(default)s)")
    add_endpoint_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate; return the exit code."""
    from rich.console import Console

    from dettools.evaluation.evaluation import write_evaluation
    from dettools.evaluation.run import RefusedError, evaluate
    from dettools.reports.evaluation_page import write_page
    from dettools.reports.evaluation_tables import print_evaluation, print_refusal
    from dettools.reports.progress import progress

    request = _request(args)
    console = Console(stderr=args.json)
    with contextlib.ExitStack() as stack:
        show = stack.enter_context(progress())
        try:
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
    write_evaluation(evaluation, request.out)
    page = write_page(evaluation, request.out / "report.html")
    print_evaluation(evaluation, console, per_class=args.per_class)
    console.print(f"report: {page}", soft_wrap=True)
    if args.json:
        print(json.dumps({**evaluation.to_json(), "report": str(page), "results": str(request.out / "results.json")}))
    return 0 if evaluation.passed else 1


def _request(args: argparse.Namespace):  # type: ignore[no-untyped-def]  # noqa: ANN202
    raise NotImplementedError
