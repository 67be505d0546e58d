"""``detserve predict``: send images to the endpoint; JSON lines on stdout, pictures on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dettools.endpoint import Clients, Endpoint, add_endpoint_arguments, concerns_every_request

if TYPE_CHECKING:
    import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "predict",
        help="send images to the endpoint: JSON lines, and pictures with the boxes drawn",
        description="Send images to a served model and print one JSON line per image, in the order given: "
        '{"image": path, "detections": [...]} or {"image": path, "error": {...}}. '
        "Exit code 0: all answered; 1: some failed; 2: an input is missing or nothing is served.",
    )
    parser.add_argument("model", help="name of the served model")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file, folder or pattern")
    parser.add_argument("--save-dir", type=Path, metavar="DIR", help="write each image with its detections drawn")
    parser.add_argument("--score-threshold", type=float, metavar="S", help="default: the model's own")
    parser.add_argument("--max-detections", type=int, metavar="N", help="default: the model's own")
    parser.add_argument("--classes", metavar="NAME,NAME", help="only these classes (default: all)")
    parser.add_argument("--masks", action="store_true", help="ask for masks and draw them")
    parser.add_argument("--keypoints", action="store_true", help="ask for keypoints and draw them")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (default: 8)")
    add_endpoint_arguments(parser)
    parser.add_argument(
        "--protocol",
        choices=("rest", "grpc", "oip"),
        default="rest",
        help="oip: the Open Inference Protocol over gRPC; with these two, --url is the gRPC service's (default: rest)",
    )
    parser.add_argument("--json", action="store_true", help="print a summary document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Send the images; return the exit code."""
    from concurrent.futures import ThreadPoolExecutor

    from detserve.errors import ClientError, EndpointError

    from dettools.image_files import find_images, unique_stems

    paths = find_images(args.images)
    stems = unique_stems(paths)
    options = _options(args)
    failed = 0
    pool = ThreadPoolExecutor(max(1, args.concurrency))
    with Clients(Endpoint.of(args)) as clients:

        def ask(path: Path) -> Any:
            return clients.detecting().predict(args.model, path, options=options)

        try:
            futures = [pool.submit(ask, path) for path in paths]
            for path, future in zip(paths, futures, strict=True):
                try:
                    answer = future.result()
                except ClientError as error:
                    if concerns_every_request(error):
                        raise
                    failed += 1
                    told = {"code": error.status, "type": error.type} if isinstance(error, EndpointError) else {}
                    print(json.dumps({"image": str(path), "error": {**told, "message": str(error)}}), flush=True)
                    continue
                print(json.dumps({"image": str(path), "detections": answer}), flush=True)
                if args.save_dir:
                    _save_picture(path, answer, args.save_dir / f"{stems[path]}.png")
        finally:
            # Leaving early must not wait for the images that nobody has asked for yet.
            pool.shutdown(wait=True, cancel_futures=True)
    if args.json:
        saved = None if args.save_dir is None else str(args.save_dir)
        answered = len(paths) - failed
        summary = {"model": args.model, "images": len(paths), "answered": answered, "failed": failed, "pictures": saved}
        print(json.dumps(summary))
    return 1 if failed else 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    wanted = {
        "score_threshold": args.score_threshold,
        "max_detections": args.max_detections,
        "classes": args.classes,
        "masks": "rle" if args.masks else None,
        "keypoints": True if args.keypoints else None,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def _save_picture(path: Path, answer: list[dict[str, Any]], target: Path) -> None:
    from detserve.detecting_client import parse_detections
    from PIL import Image

    from dettools.reports.pictures import draw_detections

    name_of = {int(entry["class_label"]): str(entry["class_name"]) for entry in answer}
    names = [name_of.get(label, "") for label in range(max(name_of, default=-1) + 1)]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Image.open(path) as image:
            draw_detections(image, parse_detections(answer), names).save(target)
    except (OSError, Image.DecompressionBombError) as error:
        print(f"no picture of {path}: {error}", file=sys.stderr)
