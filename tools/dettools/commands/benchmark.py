"""``detserve benchmark``: how fast is it, honestly: a served model, a model in process, two runs compared."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detserve.errors import DetserveError

from dettools.endpoint import TOKEN_VARIABLE, Endpoint, add_endpoint_arguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dettools.benchmark.knee import Slo
    from dettools.benchmark.measurement import Level
    from dettools.benchmark.run import Run

_REPLACED = {
    "max_iter": "--max-iter: a level lasts as long as its figures need; use --min-time instead",
    "log_interval": "--log-interval: progress is told after each turn",
    "num_warmup": "--num-warmup: the warm-up is found in the measurement and left out",
    "fuse_conv_bn": "--fuse-conv-bn: the model runs as it was built; fuse it when you export it",
}
"""Flags of MMDetection's benchmark.py that change nothing here, and what does their work."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "benchmark",
        help="throughput and latency of a served model, or of the model in process; compare two runs",
        description="Measure a served model under load, or the same model in process, and say whether the figures may "
        "be quoted (VALID, WARN, INVALID); or compare two runs.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--images", nargs="+", required=True, metavar="PATH", help="image files, folders or patterns")
    output.add_argument("--seed", type=int, default=0, metavar="N", help="of arrivals and image order (default: 0)")
    output.add_argument(
        "--out",
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="write run.json, samples.jsonl, summary.csv, summary.md and report.html",
    )
    output.add_argument("--title", default="", help="of the report")
    output.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    _add_served(kinds, output)
    for kind, what in (
        ("eager", "the framework's own inference on the source checkpoint, in process, one image at a time"),
        ("runtime", "the artefact by the worker's own code, in process: the ceiling of serving"),
    ):
        parser_of_kind = kinds.add_parser(kind, parents=[output], help=what, description=f"Measure {what}.")
        _add_in_process(parser_of_kind, config=kind == "eager")
    _add_diff(kinds)
    parser.set_defaults(run=run)


def _add_served(kinds: argparse._SubParsersAction[argparse.ArgumentParser], output: argparse.ArgumentParser) -> None:
    served = kinds.add_parser(
        "served",
        parents=[output],
        help="a served model under load: closed loop (--concurrency) or open loop (--rate)",
        description="Put load on a served model. Exit code 0; 1: with an SLO, no level meets it; 2: usage; 130: "
        "interrupted, what was finished is written.",
    )
    served.add_argument("model", help="name of the served model")
    how = served.add_mutually_exclusive_group()
    how.add_argument("--concurrency", metavar="N", help="requests in flight: 8, 1:16, 1:16:5 or 1,2,4,8 (default: 1:8)")
    how.add_argument(
        "--rate", metavar="R", help="requests per second, sent whatever the server does: 5:40:5 or 5,10,20"
    )
    served.add_argument(
        "--arrivals", choices=("poisson", "constant"), default="poisson", help="with --rate (default: %(default)s)"
    )
    slo = served.add_mutually_exclusive_group()
    slo.add_argument("--slo-p99", metavar="TIME", help="such as 250ms: the highest load that meets it is told")
    slo.add_argument("--slo", metavar="pN=TIME", help="the same for another percentile, such as p95=200ms")
    served.add_argument("--stop-at-slo", action="store_true", help="stop after the first level that misses it")
    served.add_argument("--window", default="3s", metavar="TIME", help="that stability is judged by (default: 3s)")
    served.add_argument("--min-time", metavar="TIME", help="of a level (default: three windows)")
    served.add_argument("--max-time", default="20s", metavar="TIME", help="of a level not stable (default: 20s)")
    served.add_argument("--warm-up", default="2s", metavar="TIME", help="load before the first level (default: 2s)")
    served.add_argument("--timeout", default="60s", metavar="TIME", help="of a request (default: 60s)")
    served.add_argument(
        "--max-in-flight", type=int, default=512, metavar="N", help="with --rate (default: %(default)s)"
    )
    served.add_argument("--annotations", type=Path, metavar="FILE", help="COCO: score the answers of each level too")
    served.add_argument(
        "--options", nargs="+", default=[], metavar="K=V", help="of each request: score_threshold=0.3 …"
    )
    served.add_argument("--no-timings", action="store_true", help="do not ask the worker for its stage times")
    served.add_argument("--metrics-url", metavar="URL", help="of the server's metrics, for the time in its queue")
    add_endpoint_arguments(served)


def _add_in_process(parser: argparse.ArgumentParser, *, config: bool) -> None:
    more = "; or MMDetection's CONFIG.py, its checkpoint next" if config else ""
    parser.add_argument(
        "model", help=f"a .yaml spec, a .mar archive, an exported .onnx, or a name in the model store{more}"
    )
    if config:
        parser.add_argument("config_checkpoint", nargs="?", type=Path, metavar="CHECKPOINT", help="of CONFIG.py")
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="run a config of MMDetection that is more than a literal, and import its custom_imports",
    )
    parser.add_argument("--batch-sizes", default="1,4,8", metavar="N,N", help="eager takes 1 only (default: 1,4,8)")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch and onnxruntime (default: the library's)")
    parser.add_argument("--repeat", "--repeat-num", type=int, default=3, metavar="N", help="turns per batch size")
    parser.add_argument("--min-time", default="10s", metavar="TIME", help="per batch size (default: 10s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--weights", "--checkpoint", type=Path, metavar="FILE", help="instead of the spec's")
    parser.add_argument("--model-store", type=Path, metavar="DIR", help="default: $DETSERVE_MODEL_STORE or model_store")
    old = parser.add_argument_group("flags of MMDetection's benchmark.py")
    old.add_argument("--task", choices=("inference", "dataloader", "dataset"), help="inference is what is measured")
    old.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), help="none is what there is")
    for name in ("--max-iter", "--log-interval", "--num-warmup"):
        old.add_argument(name, type=int, metavar="N", help="accepted; says what replaces it")
    old.add_argument("--fuse-conv-bn", action="store_true", default=None, help="accepted; says what replaces it")


def _add_diff(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    diff = kinds.add_parser(
        "diff",
        help="two runs side by side: which figures differ by more than chance",
        description="Compare b against a. Exit code 1: with --fail-on-regression, a figure of b is worse.",
    )
    diff.add_argument("a", type=Path, help="folder or run.json of a benchmark")
    diff.add_argument("b", type=Path, help="the one that is judged")
    diff.add_argument("--tolerance", type=float, default=0.05, metavar="X", help="negligible share (default: 0.05)")
    diff.add_argument("--allow-different-images", action="store_true", help="compare runs of other pictures too")
    diff.add_argument("--fail-on-regression", action="store_true", help="exit 1 when a figure of b is worse")
    diff.add_argument("--json", action="store_true", help="print one JSON document as the last line")


def run(args: argparse.Namespace) -> int:
    """Measure or compare; return the exit code."""
    if args.kind == "diff":
        return _diff(args)
    return _served(args) if args.kind == "served" else _in_process(args)


def _served(args: argparse.Namespace) -> int:
    import os

    from dettools.benchmark.images import describe_images
    from dettools.benchmark.load import Bounds
    from dettools.benchmark.run import make_run
    from dettools.benchmark.served import ServedBenchmark, ask_once, find_endpoint, read_pictures
    from dettools.benchmark.sweep import closed_loads, expected_seconds, open_loads, seconds
    from dettools.environment import describe_environment
    from dettools.ground_truth import load_ground_truth
    from dettools.image_files import find_images

    loads = open_loads(args.rate, args.arrivals) if args.rate else closed_loads(args.concurrency or "1:8")
    window_s, max_time_s = seconds(args.window), seconds(args.max_time)
    bounds = Bounds(
        min_time_s=seconds(args.min_time) if args.min_time else min(3 * window_s, max_time_s),
        max_time_s=max_time_s,
        window_s=window_s,
        timeout_s=seconds(args.timeout),
        most_in_flight=args.max_in_flight,
    )
    slo = _slo(args)
    options = _options(args.options)
    if not args.no_timings:
        options["timings"] = "true"
    pictures = read_pictures(find_images(args.images))
    token = args.token or os.environ.get(TOKEN_VARIABLE)
    endpoint = find_endpoint(
        args.model, options, instance=args.instance, url=args.url, token=token, metrics_url=args.metrics_url
    )
    benchmark = ServedBenchmark(
        endpoint,
        pictures,
        bounds,
        timings=not args.no_timings,
        ground_truth=load_ground_truth(args.annotations) if args.annotations else None,
        slo=slo,
        stop_at_slo=args.stop_at_slo,
        warm_up_s=seconds(args.warm_up),
        seed=args.seed,
        say=_say,
    )
    with Endpoint(args.instance, args.url, token, timeout_s=bounds.timeout_s).open() as client:
        benchmark.check_answer(ask_once(client, args.model, pictures[0].body, options))
    shortest, longest = expected_seconds(len(loads), bounds, benchmark.warm_up_s)
    _say(f"{len(loads)} levels, {shortest:.0f} to {longest:.0f} s; Ctrl-C ends it and keeps what is finished")
    sweep = benchmark.run(args.model, loads, on_level=_say_level)
    if sweep.missed_slo and slo is not None:
        _say(f"{slo.name} is missed: stopped, as --stop-at-slo asks")
    if not sweep.levels:
        raise KeyboardInterrupt
    names = ("concurrency", "rate", "arrivals", "window", "min_time", "max_time", "warm_up", "timeout", "seed")
    settings = {name: getattr(args, name) for name in (*names, "max_in_flight", "annotations", "title", "out")}
    found = make_run(
        "served",
        args.model,
        sweep.levels,
        images=describe_images([picture.body for picture in pictures]),
        target=dict(endpoint.described),
        settings={**_plain(settings), "options": options},
        environment=describe_environment(),
        title=args.title,
        slo=slo,
        interrupted=sweep.interrupted,
        seed=args.seed,
    )
    _report(args, found, sweep.levels)
    if sweep.interrupted:
        return 130
    return 1 if found.slo is not None and found.slo.highest is None else 0


def _in_process(args: argparse.Namespace) -> int:
    from dettools.benchmark.images import describe_images
    from dettools.benchmark.in_process import benchmark_in_process
    from dettools.benchmark.run import make_run
    from dettools.benchmark.served import read_pictures
    from dettools.benchmark.sweep import seconds
    from dettools.environment import describe_environment
    from dettools.image_files import find_images

    _heed_old_flags(args)
    _heed_config(args)
    paths = find_images(args.images)
    try:
        batch_sizes = [int(part) for part in args.batch_sizes.split(",")]
    except ValueError:
        raise DetserveError(f"--batch-sizes: got {args.batch_sizes!r}, expected such as 1,4,8.") from None
    target: dict[str, Any] = {}
    levels = benchmark_in_process(
        args.kind,
        args.model,
        paths,
        batch_sizes=batch_sizes,
        threads=args.threads,
        device=args.device,
        weights=args.weights,
        model_store=args.model_store,
        allow_code=args.allow_code,
        min_time_s=seconds(args.min_time),
        repeats=args.repeat,
        seed=args.seed,
        on_progress=_say,
        on_loaded=target.update,
    )
    levels = [level for level in levels if level.samples]
    interrupted = any(level.stopped == "interrupted" for level in levels)
    if not levels:
        raise KeyboardInterrupt
    names = ("batch_sizes", "threads", "repeat", "min_time", "device", "weights", "seed", "title", "out")
    found = make_run(
        args.kind,
        Path(args.model).stem,
        levels,
        images=describe_images([picture.body for picture in read_pictures(paths)]),
        target=target,
        settings=_plain({name: getattr(args, name) for name in names}),
        environment=describe_environment(),
        title=args.title,
        interrupted=interrupted,
        seed=args.seed,
    )
    _report(args, found, levels)
    return 130 if interrupted else 0


def _heed_config(args: argparse.Namespace) -> None:
    """Take the checkpoint that stands after a config for ``--weights``."""
    given: Path | None = getattr(args, "config_checkpoint", None)
    if given is None:
        return
    if not args.model.endswith(".py") or args.weights is not None:
        got = f"--weights {args.weights} too" if args.weights else f"it after {args.model}"
        raise DetserveError(f"checkpoint: got {given}, and {got}; expected CONFIG.py CHECKPOINT.pth. Correct the line.")
    args.weights = given


def _diff(args: argparse.Namespace) -> int:
    from rich.console import Console

    from dettools.benchmark.difference import compare_runs
    from dettools.benchmark.run import load_run
    from dettools.reports.benchmark_tables import print_difference

    found = compare_runs(
        load_run(args.a),
        load_run(args.b),
        tolerance=args.tolerance,
        allow_different_images=args.allow_different_images,
    )
    print_difference(found, Console(stderr=args.json))
    if args.json:
        print(json.dumps(found.to_json()))
    return 1 if args.fail_on_regression and found.regressions else 0


def _report(args: argparse.Namespace, found: Run, levels: Sequence[Level]) -> None:
    """Write the files, print the table and, if asked for, the document without what only the files need."""
    from rich.console import Console

    from dettools.benchmark.run import write_run
    from dettools.reports.benchmark_page import write_page
    from dettools.reports.benchmark_tables import print_run

    if args.out:
        write_run(found, levels, args.out)
        write_page(found, [level.samples for level in levels], args.out / "report.html")
        _say(f"written to {args.out}: report.html, run.json, samples.jsonl, summary.csv, summary.md")
    print_run(found, Console(stderr=args.json))
    if args.json:
        report = str(args.out / "run.json") if args.out else None
        print(json.dumps({**found.to_json(), "report": report}))


def _slo(args: argparse.Namespace) -> Slo | None:
    from dettools.benchmark.knee import Slo

    if args.slo_p99:
        return Slo.parse(f"p99={args.slo_p99}")
    if args.slo:
        return Slo.parse(args.slo)
    if args.stop_at_slo:
        raise DetserveError("--stop-at-slo needs --slo-p99 or --slo to say at what.")
    return None


def _options(pairs: Sequence[str]) -> dict[str, object]:
    options: dict[str, object] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise DetserveError(f"--options: got {pair!r}, expected KEY=VALUE such as score_threshold=0.3.")
        options[name] = value
    return options


def _heed_old_flags(args: argparse.Namespace) -> None:
    """Say what replaces a flag of MMDetection's benchmark.py; refuse what asks for another measurement."""
    if args.task not in {None, "inference"}:
        raise DetserveError(
            f"--task {args.task} is not measured: loading is part of every figure here, and its share is the stage "
            "'decode'. Leave --task out."
        )
    if args.launcher not in {None, "none"}:
        raise DetserveError(f"--launcher {args.launcher}: one process is measured. Leave --launcher out.")
    for name, hint in _REPLACED.items():
        if getattr(args, name) is not None:
            _say(f"hint: {hint}")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Paths become text: their last part, so that no path of this machine travels with a report."""
    return {name: value.name if isinstance(value, Path) else value for name, value in settings.items()}


def _say_level(level: Level) -> None:
    failed = sum(not sample.ok for sample in level.samples)
    ended = {"stable": "stable", "time": "its time is over", "interrupted": "interrupted"}.get(level.stopped)
    _say(f"{level.load.name}: {len(level.samples)} requests, {failed} failed ({ended})")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
