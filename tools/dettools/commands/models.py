"""``detserve models``: what a running server serves, changed without stopping it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detserve.model_store import default_model_store, find_archive

# As in dettools.agreement, which needs numpy: `detserve --help` must not wait for it. A test keeps them equal.
TIER_CHOICES = ("bit", "numeric", "reduced-precision", "detection")

if TYPE_CHECKING:
    from collections.abc import Callable

    from detserve.server import ServingWish


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``models`` and its actions."""
    parser = subparsers.add_parser(
        "models",
        help="models and versions in, out, scaled and promoted on a running server",
        description="Change what a running server serves. Every archive is checked before it comes in: digests, no "
        "pickle, safe members, and a trusted signature where the server requires one. Exit code 0: done; 1: promote's "
        "checks failed, and everything is as it was; 2: usage, a bad archive, or no server.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--instance", metavar="NAME", help="which server (default: $DETSERVE_INSTANCE or 'default')")
    common.add_argument("--json", action="store_true", help="print one JSON document as the last line of stdout")
    waiting = argparse.ArgumentParser(add_help=False)
    waiting.add_argument("--timeout", type=float, default=180.0, metavar="S", help="until ready (default: 180 s)")
    draining = argparse.ArgumentParser(add_help=False)
    draining.add_argument(
        "--drain-timeout", type=float, default=30.0, metavar="S", help="until no request is left (default: 30 s)"
    )

    actions.add_parser("list", parents=[common], help="the models, their versions and workers")

    register = actions.add_parser(
        "register", parents=[common, waiting], help="serve one more model or version, beside those that there are"
    )
    _add_archive_arguments(register)
    register.add_argument(
        "--allow-foreign", action="store_true", help="also an archive that was not built by detserve; never a pickle"
    )

    scale = actions.add_parser("scale", parents=[common, waiting], help="give a version more or fewer workers")
    scale.add_argument("model", metavar="MODEL")
    scale.add_argument("--min", type=int, required=True, metavar="N", help="workers to have")
    scale.add_argument("--max", type=int, metavar="N", help="(default: as --min)")
    scale.add_argument("--version", metavar="V", help="(default: the default version)")

    default = actions.add_parser(
        "set-default", parents=[common], help="let requests that name no version have this one; none of them fails"
    )
    default.add_argument("model", metavar="MODEL")
    default.add_argument("version", metavar="VERSION")

    unregister = actions.add_parser(
        "unregister", parents=[common, draining], help="take a version out when none of its requests is left"
    )
    unregister.add_argument("model", metavar="MODEL")
    unregister.add_argument("version", metavar="VERSION", nargs="?", help="(default: the only one)")
    unregister.add_argument(
        "--force", action="store_true", help="take it out at the end of the time; what is queued gets no answer"
    )

    promote = actions.add_parser(
        "promote",
        parents=[common, waiting, draining],
        help="bring a new version in, check it on the server, make it the default; else leave all as it was",
        description="Register the new version, ask the server for its golden image, compare served with eager "
        "inference, and only then make it the default. When a check fails the new version is taken out again, the "
        "default stays, and the exit code is 1.",
    )
    _add_archive_arguments(promote)
    promote.add_argument(
        "--images", nargs="+", metavar="IMAGE", help="files, folders or patterns to compare on (default: golden image)"
    )
    promote.add_argument("--tier", choices=TIER_CHOICES, default="numeric", help="to be reached (default: %(default)s)")
    promote.add_argument("--score-threshold", type=float, default=0.05, metavar="S", help="default: %(default)s")
    promote.add_argument("--max-detections", type=int, default=100, metavar="N", help="default: %(default)s")
    promote.add_argument("--device", default="cpu", help="of eager inference (default: %(default)s)")
    promote.add_argument(
        "--allow-code", action="store_true", help="import here what an MMDetection model's config names"
    )
    promote.add_argument(
        "--unregister-old", action="store_true", help="take the previous default out when it is quiet (default: keep)"
    )
    parser.set_defaults(run=run)


def _add_archive_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", metavar="NAME|PATH", help="a name in the model store, or an archive's path")
    parser.add_argument("--model-store", type=Path, metavar="DIR", help="default: $DETSERVE_MODEL_STORE or model_store")
    parser.add_argument("--workers", type=int, metavar="N", help="default: as the default version now, else its own")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: the archive's")
    parser.add_argument("--max-batch-delay-ms", type=int, metavar="MS", help="default: the archive's")
    parser.add_argument(
        "--require-signature",
        type=Path,
        action="append",
        metavar="KEY",
        help="public key, or folder of them, that must have signed it (where the server requires one, its own count)",
    )


def run(args: argparse.Namespace) -> int:
    """Run one action; return the exit code."""
    action: Callable[[argparse.Namespace], int] = {
        "list": _list,
        "register": _register,
        "scale": _scale,
        "set-default": _set_default,
        "unregister": _unregister,
        "promote": _promote,
    }[args.action]
    return action(args)


def _list(args: argparse.Namespace) -> int:
    from detserve import server
    from rich.console import Console
    from rich.table import Table

    status = server.status(server.Instance.named(args.instance), ask_workers=False)
    document = status.to_json()
    if args.json:
        print(json.dumps({"instance": status.instance, "models": document["models"]}))
        return 0
    table = Table("model", "version", "default", "workers", "batch", "queue", "archive")
    for model in status.models:
        ready = sum(worker.state == "READY" for worker in model.workers)
        table.add_row(
            model.name,
            model.version,
            "yes" if model.default else "",
            f"{ready} ready of {model.min_workers} to {model.max_workers}",
            f"{model.batch_size} in {model.max_batch_delay_ms} ms",
            str(model.pending_requests),
            model.archive,
        )
    Console().print(table)
    return 0


def _register(args: argparse.Namespace) -> int:
    from detserve import server

    model = server.register(
        _archive(args),
        instance=server.Instance.named(args.instance),
        wish=_wish(args),
        trusted_keys=args.require_signature,
        foreign=args.allow_foreign,
        timeout_s=args.timeout,
        on_progress=_say,
    )
    now = "is the default" if model.default else "is served beside the default"
    return _done(args, f"{model.name} {model.version} {now}, {model.min_workers} worker(s)", vars(model))


def _scale(args: argparse.Namespace) -> int:
    from detserve import server

    model = server.scale(
        args.model,
        args.min,
        args.max,
        version=args.version,
        instance=server.Instance.named(args.instance),
        timeout_s=args.timeout,
        on_progress=_say,
    )
    return _done(args, f"{model.name} {model.version} has {model.min_workers} worker(s)", vars(model))


def _set_default(args: argparse.Namespace) -> int:
    from detserve import server

    before = server.set_default(args.model, args.version, instance=server.Instance.named(args.instance))
    facts = {"name": args.model, "default": args.version, "previous": before}
    return _done(args, f"{args.model} {args.version} is the default (before: {before})", facts)


def _unregister(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from detserve import server

    gone = server.unregister(
        args.model,
        args.version,
        instance=server.Instance.named(args.instance),
        drain_timeout_s=args.drain_timeout,
        force=args.force,
        on_progress=_say,
    )
    how = "" if gone.drained else "; requests were in its queue and get no answer"
    return _done(args, f"{gone.name} {gone.version} is no longer served{how}", asdict(gone))


def _promote(args: argparse.Namespace) -> int:
    from detserve import server
    from rich.console import Console

    from dettools.image_files import find_images
    from dettools.promotion import Demands, promote
    from dettools.reports.tables import print_comparison

    demands = Demands(
        images=tuple(find_images(args.images or [])),
        tier=args.tier,
        score_threshold=args.score_threshold,
        max_detections=args.max_detections,
        allow_code=args.allow_code,
        device=args.device,
    )
    outcome = promote(
        _archive(args),
        demands,
        instance=server.Instance.named(args.instance),
        wish=_wish(args),
        trusted_keys=args.require_signature,
        unregister_old=args.unregister_old,
        drain_timeout_s=args.drain_timeout,
        timeout_s=args.timeout,
        on_progress=_say,
    )
    if outcome.comparison is not None:
        print_comparison(outcome.comparison, Console(stderr=args.json))
    if outcome.promoted:
        old = "" if outcome.previous is None or not outcome.previous_served else f"; {outcome.previous} stays served"
        sentence = f"{outcome.name} {outcome.version} is the default{old}"
    else:
        stays = "is not served" if outcome.default is None else f"stays at {outcome.default}"
        sentence = (
            f"{outcome.name} {outcome.version} was NOT promoted ({outcome.failed}): {outcome.reason}\n"
            f"{outcome.name} {stays}"
        )
    _done(args, sentence, outcome.to_json())
    return 0 if outcome.promoted else 1


def _archive(args: argparse.Namespace) -> Path:
    return find_archive(args.archive, args.model_store or default_model_store())


def _wish(args: argparse.Namespace) -> ServingWish:
    from detserve import server

    return server.ServingWish(args.workers, args.batch_size, args.max_batch_delay_ms)


def _done(args: argparse.Namespace, sentence: str, facts: dict[str, Any]) -> int:
    print(sentence, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(facts))
    return 0


def _say(text: str) -> None:
    print(f"models: {text}", file=sys.stderr, flush=True)
