"""``detserve view``: a page on this machine to look at images, objects, detections and a served model's answers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from detserve.errors import DetserveError

from dettools.argument_types import between, fraction
from dettools.endpoint import Endpoint, add_endpoint_arguments

if TYPE_CHECKING:
    import argparse

    from dettools.viewer.data import ViewData

_EPILOG = """\
  detserve view eval/results.json --annotations val.json --images val/
                                       ground truth and predictions
  detserve view result.pkl --annotations val.json
                             MMDetection's, photographs beside val.json
  detserve view --annotations val.json
                                       ground truth alone
  detserve predict shapes photos/ > answers.jsonl; detserve view answers.jsonl
                                       predictions alone
  detserve view --model shapes         drop a photograph on the page

? on the page tells its keys. Ctrl-C ends it.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    import argparse

    parser = subparsers.add_parser(
        "view",
        help="page through images with ground truth and predictions in the browser; ask a served model",
        description="Serve a page on 127.0.0.1 to look at images with objects and detections:\nerrors first, any "
        "threshold, any class, by keyboard; and to drop photographs on\nfor a served model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "predictions",
        type=Path,
        nargs="?",
        metavar="PREDICTIONS",
        help="results.json, MMDetection's result.pkl (2.x, 3.x), DIR of `detserve evaluate --out`, or the lines of "
        "`detserve predict`",
    )
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO annotation file")
    parser.add_argument("--images", type=Path, metavar="DIR", help="the photographs (default: beside --annotations)")
    parser.add_argument(
        "--categories", nargs="+", metavar="NAME", help="what the labels of a pickle stand for, as in eval-metric"
    )
    parser.add_argument("--iou-type", choices=("bbox", "segm"), help="what is compared (default: boxes)")
    parser.add_argument(
        "--score-thr", type=fraction, default=0.3, metavar="S", help="to begin with (default: %(default)s)"
    )
    parser.add_argument(
        "--iou-thr", type=between(0.1, 1), default=0.5, metavar="T", help="to begin with (default: %(default)s)"
    )
    live = parser.add_argument_group("a served model")
    live.add_argument("--model", metavar="NAME", help="what photographs dropped on the page are sent to")
    add_endpoint_arguments(parser)
    page = parser.add_argument_group("the page")
    page.add_argument("--port", type=int, default=0, metavar="N", help="of the page (default: a free one)")
    page.add_argument("--no-browser", action="store_true", help="do not open a browser")
    page.add_argument("--json", action="store_true", help='print {"url": …} as the last line when the page is ready')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C; return the exit code."""
    from dettools.reports.gallery import CLASS_COLOURS, COLOURS, WORDS
    from dettools.reports.pictures import upright_rgb
    from dettools.viewer.live import LiveModel
    from dettools.viewer.photographs import Photographs
    from dettools.viewer.server import ViewServer

    if args.model is None and (args.instance or args.url):
        raise DetserveError("got a server but no model: give --model NAME (`detserve models list` names them).")
    data = _data(args)
    if data is None and args.model is None:
        raise DetserveError(
            "got nothing to show, expected PREDICTIONS, --annotations, --images or --model NAME. See --help."
        )
    settings = {
        "score_threshold": args.score_thr,
        "iou_threshold": args.iou_thr,
        "colours": {role: _hex(colour) for role, colour in COLOURS.items()},
        "words": WORDS,
        "class_colours": [_hex(colour) for colour in CLASS_COLOURS],
    }
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(LiveModel(Endpoint.of(args), args.model)) if args.model else None
        server = stack.enter_context(ViewServer(data, live, Photographs(upright_rgb), settings, port=args.port))
        # Whoever ends it by SIGTERM leaves no photographs behind either.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        # From the moment that its address is told it may be ended.
        with contextlib.suppress(KeyboardInterrupt):
            out = sys.stderr if args.json else sys.stdout
            print(f"{server.url}   (Ctrl-C ends it)", file=out, flush=True)
            if args.json:
                print(json.dumps({"url": server.url}), flush=True)
            if not args.no_browser:
                _open_browser(server.url)
            server.serve_forever()
        signal.signal(signal.SIGTERM, before)
    print("the page is closed", file=sys.stderr)
    return 0


def _data(args: argparse.Namespace) -> ViewData | None:
    from dettools.reports.progress import progress
    from dettools.viewer.data import ViewData
    from dettools.viewer.sources import find_sources

    sources = find_sources(
        args.predictions, args.annotations, args.images, categories=args.categories, iou_type=args.iou_type
    )
    if sources is None:
        return None
    for note in sources.notes:
        print(f"note: {note}", file=sys.stderr)
    with progress() as show:
        data = ViewData(sources, progress=lambda done, total: show("images compared", done, total))
    if data.left_out:
        print(
            f"note: {data.left_out} detections are not among the best 100 of their image and class, as COCO counts, "
            "and are not shown",
            file=sys.stderr,
        )
    print(
        f"{len(sources.ground_truth.images)} images, {sources.ground_truth.objects} objects, "
        f"{data.detections} detections",
        file=sys.stderr,
    )
    return data


def _open_browser(url: str) -> None:
    """Open it where there is a screen; a text browser would take the terminal."""
    import webbrowser

    if sys.platform == "linux" and not any(os.environ.get(one) for one in ("DISPLAY", "WAYLAND_DISPLAY")):
        return
    webbrowser.open(url)


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
