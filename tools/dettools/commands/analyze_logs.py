"""``detserve analyze-logs``: curves of training runs, and how long their iterations took."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from detserve.errors import DetserveError

from dettools.argument_types import at_least

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from dettools.analysis.training_curves import Band
    from dettools.analysis.training_log import TrainingLog
    from dettools.reports.log_curves import Drawn

_LOGS = (
    "of MMDetection 2.x (….log.json) or 3.x (vis_data/scalars.json), TensorBoard's event file, CSV (ultralytics, "
    "Lightning), or the folder of a run with all its starts; found out from the content"
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "analyze-logs",
        help="curves and times of training runs: MMDetection 2.x and 3.x, TensorBoard, CSV",
        description="Draw what training logs hold, or tell how long iterations took. Resumed runs are joined, values "
        "that are NaN are shown and counted.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_plot_curve(actions)
    _add_cal_train_time(actions)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("json_logs", type=Path, nargs="+", metavar="LOG", help=_LOGS)
    parser.add_argument(
        "--resumed",
        action="store_true",
        help="all LOGs are one run, in this order: the later wins where they overlap",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the figures as CSV")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")


def _add_plot_curve(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "plot_curve",
        aliases=["plot-curve"],
        help="draw losses, AP, learning rate, times … over iterations or epochs",
        description="Draw metrics of one or several runs into one picture. No window is opened: the picture is a file.",
    )
    _add_common(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=".png .pdf .svg .jpg (default: curves_KEYS.png in the current folder)"
    )
    parser.add_argument(
        "--smoothing",
        type=_weight,
        default=0.0,
        metavar="W",
        help="of training values, as TensorBoard's, 0 to below 1",
    )
    parser.add_argument(
        "--mean",
        nargs="*",
        metavar="GROUP",
        help="mean ± standard deviation over the runs; with one GROUP per LOG, of each group",
    )
    original = parser.add_argument_group("options of MMDetection's analyze_logs.py")
    original.add_argument(
        "--keys", nargs="+", default=["bbox_mAP"], metavar="KEY", help="metrics; val/KEY: of evaluations (bbox_mAP)"
    )
    original.add_argument("--start-epoch", type=int, default=1, metavar="N", help="leave out earlier ones (default: 1)")
    original.add_argument("--eval-interval", metavar="N", help="no effect: the log tells when it was evaluated")
    original.add_argument("--title", metavar="TEXT", help="above the picture")
    original.add_argument("--legend", nargs="+", metavar="NAME", help="one for each LOG and KEY, a LOG's KEYs together")
    original.add_argument("--backend", metavar="NAME", help="no effect: pictures are drawn without a display")
    original.add_argument(
        "--style",
        default="whitegrid",
        metavar="NAME",
        help="dark, darkgrid, white, whitegrid, ticks, or a style of matplotlib (default: whitegrid)",
    )
    parser.set_defaults(run=run_plot_curve)


def _add_cal_train_time(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "cal_train_time",
        aliases=["cal-train-time"],
        help="seconds per iteration: mean, median, p95, by epoch; waiting for data, throughput, time to go",
        description="Tell how long training iterations took, each logged value weighted by its iterations.",
    )
    _add_common(parser)
    parser.add_argument(
        "--batch-size", type=at_least(1), metavar="N", help="images per iteration, on all GPUs: for images/s"
    )
    parser.add_argument(
        "--max-epochs", type=at_least(1), metavar="N", help="of the training (default: as the log says)"
    )
    parser.add_argument(
        "--epoch-iters", type=at_least(1), metavar="N", help="iterations of an epoch (default: as logged)"
    )
    original = parser.add_argument_group("options of MMDetection's analyze_logs.py")
    original.add_argument(
        "--include-outliers", action="store_true", help="keep the first value of every epoch, in which workers start"
    )
    parser.set_defaults(run=run_cal_train_time)


def run_plot_curve(args: argparse.Namespace) -> int:
    """Read, draw, print; return the exit code."""
    from rich.console import Console

    from dettools.analysis.training_curves import curve_of
    from dettools.reports.log_curves import Drawn, curves_csv, print_curves, save_curves, short_names

    for flag in ("eval_interval", "backend"):
        if getattr(args, flag) is not None:
            print(f"note: --{flag.replace('_', '-')} {getattr(args, flag)}: no effect", file=sys.stderr)
    logs = _read(args)
    groups = _groups(args, logs)
    _check_style(args.style)
    labels = _labels(args, logs, groups)
    console = Console(stderr=args.json)
    names = short_names([log.name for log in logs])
    drawn = []
    for run, log in enumerate(logs):
        if not log.rows:
            continue
        for key, name in enumerate(args.keys):
            _say(console, f"plot curve of {log.name}, metric is {name}")
            curve = curve_of(log, name, start_epoch=args.start_epoch, smoothing=args.smoothing)
            if curve.absent:
                print(
                    f"note: {log.name}: {curve.absent} evaluations of {curve.metric} are -1, no such objects: left out",
                    file=sys.stderr,
                )
            drawn.append(Drawn(curve, labels[run][key], run, key, log.resumed_at))
    if not drawn:
        raise DetserveError(
            f"{logs[0].name}: no iteration was logged, so there is nothing to draw: the training ended before its "
            "first logged iteration. A later file beside it may hold the run: give the folder."
        )
    bands, band_labels = _bands(args, drawn, groups)
    out = args.out or Path("curves_" + re.sub(r"[^\w.-]+", "-", "_".join(args.keys))[:80] + ".png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_curves(
            out,
            drawn,
            bands,
            title=args.title or (names[0] if len(logs) == 1 and not args.legend else None),
            style=args.style,
            band_labels=band_labels,
        )
    except OSError as error:
        raise DetserveError(f"{out}: cannot be written: {error.strerror or error}. Name another --out.") from None
    except ValueError as error:
        raise DetserveError(f"--out {out}: {error}") from None
    curves = [one.curve for one in drawn]
    print_curves(curves, [names[one.run] for one in drawn], console)
    _write_csv(args.csv, curves_csv(curves))
    _say(console, f"save curve to: {out}")
    if args.json:
        print(
            json.dumps(
                {
                    "out": str(out),
                    "runs": [_run_json(log) for log in logs],
                    "curves": [curve.to_json() for curve in curves],
                    "means": [
                        {"group": one.name, "key": one.key, "runs": one.runs, "x": one.x.tolist()}
                        | {"mean": one.mean.tolist(), "std": one.std.tolist()}
                        for one in bands
                    ],
                }
            )
        )
    return 0


def run_cal_train_time(args: argparse.Namespace) -> int:
    """Read, average, print; return the exit code."""
    from rich.console import Console

    from dettools.analysis.train_time import train_time
    from dettools.analysis.training_log import TrainingLogError
    from dettools.reports.log_curves import short_names
    from dettools.reports.train_time_tables import epochs_csv, original_block, print_times

    logs = _read(args)
    times = []
    for log in logs:
        try:
            time = train_time(
                log,
                include_outliers=args.include_outliers,
                batch_size=args.batch_size,
                max_epochs=args.max_epochs,
                epoch_iterations=args.epoch_iters,
            )
        except TrainingLogError:
            if len(logs) == 1 or log.rows:
                raise
            continue
        times.append(time)
        for note in time.notes:
            print(f"note: {log.name}: {note}", file=sys.stderr)
        if args.batch_size is None and log.plan.images_per_gpu:
            print(
                f"note: {log.name}: {log.plan.images_per_gpu} images per GPU by its config: --batch-size "
                f"{log.plan.images_per_gpu} × GPUs gives images per second",
                file=sys.stderr,
            )
    if not times:
        raise DetserveError("no log has a logged iteration, so there is no time to average. Name other logs.")
    console = Console(stderr=args.json)
    for time in times:
        _say(console, original_block(time))
    print_times(times, short_names([time.log for time in times]), console)
    _write_csv(args.csv, epochs_csv(times))
    if args.json:
        runs = {log.name: _run_json(log) for log in logs}
        print(json.dumps({"runs": list(runs.values()), "times": [time.to_json() for time in times]}))
    return 0


def _read(args: argparse.Namespace) -> list[TrainingLog]:
    from dettools.analysis.training_log_files import read_resumed_run, read_run

    logs = [read_resumed_run(args.json_logs)] if args.resumed else [read_run(path) for path in args.json_logs]
    for log in logs:
        for note in log.notes:
            print(f"note: {note}", file=sys.stderr)
        if not log.rows and len(logs) > 1:
            print(f"note: {log.name}: no iteration was logged; it is left out", file=sys.stderr)
    return logs


def _groups(args: argparse.Namespace, logs: Sequence[TrainingLog]) -> list[str] | None:
    """Return the group of each run, None without --mean."""
    if args.mean is None:
        return None
    if args.mean and len(args.mean) != len(logs):
        raise DetserveError(f"--mean: got {len(args.mean)} groups for {len(logs)} logs, expected none, or one for each")
    return list(args.mean) or ["all"] * len(logs)


def _labels(args: argparse.Namespace, logs: Sequence[TrainingLog], groups: Sequence[str] | None) -> list[list[str]]:
    """Return the legend's name of each run's metrics."""
    from dettools.reports.log_curves import short_names

    keys = args.keys
    if args.legend is None or groups is not None:
        names = short_names([log.name for log in logs])
        return [[key if len(logs) == 1 else f"{name} {key}" for key in keys] for name in names]
    if len(args.legend) != len(logs) * len(keys):
        raise DetserveError(
            f"--legend: got {len(args.legend)} names, expected {len(logs)} logs × {len(keys)} keys = "
            f"{len(logs) * len(keys)}"
        )
    return [args.legend[run * len(keys) : (run + 1) * len(keys)] for run in range(len(logs))]


def _bands(
    args: argparse.Namespace, drawn: Sequence[Drawn], groups: Sequence[str] | None
) -> tuple[list[Band], list[str]]:
    from dettools.analysis.training_curves import band_of
    from dettools.reports.log_curves import drawn_by_epoch

    if groups is None:
        return [], []
    names = list(dict.fromkeys(groups))
    if args.legend and len(args.legend) != len(names) * len(args.keys):
        raise DetserveError(
            f"--legend: got {len(args.legend)} names, expected {len(names)} groups × {len(args.keys)} keys"
        )
    bands: list[Band] = []
    labels: list[str] = []
    for group, name in enumerate(names):
        for key, metric in enumerate(args.keys):
            members = [one for one in drawn if one.key == key and groups[one.run] == name]
            of_key = [one for one in drawn if one.key == key]
            bands.append(band_of(name, [one.curve for one in members], by_epoch=drawn_by_epoch(of_key)))
            told = metric if len(names) == 1 else f"{name} {metric}"
            labels.append(args.legend[group * len(args.keys) + key] if args.legend else told)
    return bands, labels


def _check_style(name: str) -> None:
    import matplotlib.style

    from dettools.reports.log_curves import STYLES

    if name not in STYLES and name not in matplotlib.style.available and name != "default":
        others = ", ".join(style for style in matplotlib.style.available if not style.startswith(("_", "seaborn")))
        raise DetserveError(f"--style: got {name!r}, expected {', '.join(STYLES)}, default, {others}")


def _run_json(log: TrainingLog) -> dict[str, object]:
    return {
        "log": log.name,
        "format": log.format,
        "files": [str(path) for path in log.files],
        "rows": len(log.rows),
        "resumed_at": list(log.resumed_at),
        "superseded_rows": log.superseded,
        "plan": vars(log.plan),
        "notes": list(log.notes),
    }


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _write_csv(path: Path | None, text: str) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DetserveError(f"{path}: cannot be written: {error.strerror or error}. Name another --csv.") from None
    print(f"figures written to {path}", file=sys.stderr)


def _weight(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {value:g}, expected 0 to below 1")
    return value
