"""``detserve compare``: served against eager on the same images: table, JSON, two-panel pictures, exit code.

compare MODEL IMAGE …                                   eager by the model store's spec
compare CONFIG.py CHECKPOINT.pth --model MODEL IMAGE …  eager is MMDetection on these two files
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dettools.endpoint import Clients, Endpoint, add_endpoint_arguments, concerns_every_request

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future, ThreadPoolExecutor

    from dethandlers.detections import Detections
    from detserve.eager import EagerModel

    from dettools.comparison import Comparison, ImageComparison

# As in dettools.agreement, which needs numpy: `detserve --help` must not wait for it. A test keeps them equal.
TIER_CHOICES = ("bit", "numeric", "reduced-precision", "detection")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "compare",
        help="served against eager: the same detections, or which differ and why",
        usage="detserve compare MODEL IMAGE [IMAGE …] [options]\n"
        "       detserve compare CONFIG.py CHECKPOINT.pth --model MODEL IMAGE [IMAGE …] [options]",
        description="Run the same images through the endpoint and through eager inference, both with the same "
        "threshold, and compare. With MMDetection's config and checkpoint eager is MMDetection on them, and masks are "
        "compared where the served model has them. Exit code 0: every image reaches the tier; 1: one does not; 2: "
        "usage.",
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="MODEL IMAGE",
        help="name of the served model, and of its spec in the model store; then image files, folders or patterns",
    )
    parser.add_argument(
        "--model",
        dest="served",
        metavar="MODEL",
        help="name of the served model, where CONFIG.py and CHECKPOINT.pth stand in its place",
    )
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="run a config of MMDetection that is more than a literal, and import its custom_imports",
    )
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="write comparison.json and one picture per image")
    parser.add_argument("--score-threshold", type=float, default=0.05, metavar="S", help="default: %(default)s")
    parser.add_argument("--max-detections", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--tier", choices=TIER_CHOICES, default="numeric", help="to be reached (default: %(default)s)")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="eager model's spec (default: the model store's)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="eager model's weights (default: the spec's)")
    parser.add_argument("--model-store", type=Path, metavar="DIR", help="default: $DETSERVE_MODEL_STORE or model_store")
    parser.add_argument("--device", default="cpu", help="of eager inference (default: %(default)s)")
    parser.add_argument("--masks", action=_optional(), help="compare masks too (of CONFIG.py: where there are any)")
    parser.add_argument("--keypoints", action="store_true", help="compare keypoints too")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (default: 8)")
    add_endpoint_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)
    parser.parse_known_args = _taking_later_inputs(parser.parse_known_args)  # type: ignore[method-assign]


def _taking_later_inputs(parse: Callable[..., tuple[Any, list[str]]]) -> Callable[..., tuple[Any, list[str]]]:
    """Let options stand between the inputs: argparse gives a positional the first stretch of words alone.

    Its own way out, `parse_intermixed_args`, knows no subcommands.
    """

    def parsed(words: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, rest = parse(words, namespace)
        if any(word.startswith("-") for word in rest):
            return found, rest
        found.inputs = [*(found.inputs or []), *rest]
        return found, []

    return parsed


def _optional() -> type[argparse.Action]:
    import argparse

    return argparse.BooleanOptionalAction


def run(args: argparse.Namespace) -> int:
    """Compare; return the exit code."""
    from concurrent.futures import ThreadPoolExecutor

    from rich.console import Console

    from dettools.comparison import compare_images
    from dettools.image_files import find_images, unique_stems
    from dettools.reports.tables import print_comparison

    _take_inputs(args)
    paths = find_images(args.images)
    stems = unique_stems(paths)
    pool = ThreadPoolExecutor(max(1, args.concurrency))
    images: list[ImageComparison] = []
    try:
        with Clients(Endpoint.of(args)) as clients:
            try:
                _heed_masks(args, clients)
                served = _send(args, paths, pool, clients)
                eager = _eager(args)
                print(f"eager: {eager.source}", file=sys.stderr)
                for path, answer in zip(paths, served, strict=True):
                    images.append(_compare(args, path, answer, eager))
                    if len(images) % 10 == 0 or len(images) == len(paths):
                        print(f"compared {len(images)} of {len(paths)} images", file=sys.stderr, flush=True)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        # What was compared before an interruption is not lost.
        comparison = compare_images(
            images, score_threshold=args.score_threshold, max_detections=args.max_detections, required=args.tier
        )
        if args.work_dir and images:
            _write(args, comparison, eager, [stems[path] for path in paths])
    print_comparison(comparison, Console(stderr=args.json))
    if args.json:
        report = str(args.work_dir / "comparison.json") if args.work_dir else None
        document = {**comparison.to_json(per_image=False), "model": args.model, "eager_source": eager.source}
        print(json.dumps({**document, "report": report}))
    return 0 if comparison.passed else 1


def _take_inputs(args: argparse.Namespace) -> None:
    """Tell the two forms of the command line apart: ``model``, ``images``, and ``config`` and ``weights`` or None.

    Raises:
        DetserveError: it is neither of them.
    """
    from detserve.errors import DetserveError

    inputs = list(args.inputs)
    args.config = None
    if inputs and inputs[0].endswith(".py"):
        if not args.served or len(inputs) < 3:
            raise DetserveError(
                f"got {' '.join(inputs)}{'' if args.served else ' and no --model'}, expected CONFIG.py CHECKPOINT.pth "
                "--model MODEL IMAGE …. Complete the command line."
            )
        if args.spec or args.weights:
            raise DetserveError(
                f"got {'--spec' if args.spec else '--weights'} with {inputs[0]}, whose checkpoint follows it. Drop one."
            )
        args.config, args.weights = Path(inputs[0]), Path(inputs[1])
        args.model, args.images = args.served, inputs[2:]
        return
    if args.served:
        # `--model NAME` alone says the same as the name in its place.
        inputs = [args.served, *inputs]
    if len(inputs) < 2:
        got = " ".join(inputs) or "nothing"
        raise DetserveError(f"got {got}, expected MODEL IMAGE …: a served model's name and images. Give both.")
    args.model, *args.images = inputs


def _heed_masks(args: argparse.Namespace, clients: Clients) -> None:
    from detserve.errors import ClientError

    if args.masks is not None or args.config is None:
        args.masks = bool(args.masks)
        return
    try:
        described = clients.mine().describe(args.model)
    except ClientError:
        described = {}  # not one of ours: it is asked for boxes
    args.masks = "masks" in described.get("capabilities", [])


def _eager(args: argparse.Namespace) -> EagerModel:
    if args.config is not None:
        from detserve.eager_mmdet import load_mmdet

        return load_mmdet(args.config, args.weights, device=args.device, allow_code=args.allow_code)

    from detserve.eager import load_eager
    from detserve.model_store import default_model_store

    store = args.model_store or default_model_store()
    return load_eager(
        args.model,
        model_store=store,
        spec=args.spec,
        weights=args.weights,
        device=args.device,
        allow_code=args.allow_code,
    )


def _send(
    args: argparse.Namespace, paths: Sequence[Path], pool: ThreadPoolExecutor, clients: Clients
) -> list[Future[Detections]]:
    """Send all images at once, so that the server forms batches; an error that concerns every image is raised."""
    from detserve.errors import ClientError

    def ask(path: Path) -> Detections:
        return clients.mine().detect(
            args.model,
            path,
            score_threshold=args.score_threshold,
            max_detections=args.max_detections,
            masks=args.masks,
            keypoints=args.keypoints,
        )

    futures = [pool.submit(ask, path) for path in paths]
    error = futures[0].exception()
    if isinstance(error, ClientError) and concerns_every_request(error):
        raise error
    return futures


def _compare(args: argparse.Namespace, path: Path, answer: Future[Detections], eager: EagerModel) -> ImageComparison:
    from detserve.errors import ClientError, DetserveError

    from dettools.comparison import compare_image, failed_image

    try:
        reference = eager.detect(
            path.read_bytes(), args.score_threshold, args.max_detections, masks=args.masks, keypoints=args.keypoints
        )
    except (OSError, DetserveError) as error:
        return failed_image(str(path), "eager_failed", f"{type(error).__name__}: {error}")
    try:
        served = answer.result()
    except ClientError as error:
        return failed_image(str(path), "request_failed", str(error), eager=reference)
    return compare_image(
        str(path),
        reference,
        served,
        score_threshold=args.score_threshold,
        max_detections=args.max_detections,
        required=args.tier,
        names=[category.name for category in eager.categories],
    )


def _write(args: argparse.Namespace, comparison: Comparison, eager: EagerModel, stems: Sequence[str]) -> None:
    from PIL import Image

    from dettools.reports.pictures import side_by_side

    args.work_dir.mkdir(parents=True, exist_ok=True)
    document = {"model": args.model, "eager_source": eager.source, **comparison.to_json()}
    (args.work_dir / "comparison.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    names = [category.name for category in eager.categories]
    titles = (f"eager: {eager.source}", f"served: {args.model}")
    for image, stem in zip(comparison.images, stems, strict=False):
        try:
            with Image.open(image.image) as picture:
                sheet = side_by_side(picture, image.eager, image.served, image, titles, names=names)
            sheet.save(args.work_dir / f"{stem}.png")
        except (OSError, Image.DecompressionBombError) as error:
            print(f"no picture of {image.image}: {error}", file=sys.stderr)
