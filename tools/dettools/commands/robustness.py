"""``detserve robustness``: AP and latency under corruption, of an endpoint, the runtime or eager."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from detserve.errors import DetserveError

from dettools.endpoint import Endpoint, add_endpoint_arguments

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from dettools.analysis.robustness import Plan, Watcher
    from dettools.analysis.robustness_results import Cell, RobustnessResults
    from dettools.analysis.robustness_subject import Backend, Subject
    from dettools.evaluation.answers import Answer
    from dettools.evaluation.request import DataSet, Request
    from dettools.ground_truth import ImageEntry

RESULTS_FILE = "results.json"
SHEET_SEVERITY = 3
_EPILOG = """\
  detserve robustness shapes --images val/ --annotations val.json
                                       the endpoint, 15 corruptions
  detserve robustness model.yaml --images val/ --annotations val.json \\
      --corruptions noise transport --limit 50
  detserve robustness config.py checkpoint.pth --out robust.json
                                       eager MMDetection, as the original
  detserve robustness-eval robust.json --prints P mPC rPC

corruptions: benchmark (15), all (19), noise, blur, weather, digital, holdout,
  transport, None, or names
exit codes: 0 measured; 1 images without an answer, or detections that change
  although every pixel is kept; 2 usage or input error; 130 interrupted: the
  same command goes on where it was
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    import argparse

    parser = subparsers.add_parser(
        "robustness",
        help="AP and latency under corruption: noise, blur, weather, JPEG, cut-off uploads, EXIF",
        description="Corrupt what is sent, severity by severity, and compute COCO AP each time:\nof a served model, of "
        "the worker's detector in this process, or of the framework\nitself; all get the same bytes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL|CONFIG.py",
        help="name of a served model; a .yaml spec, a .mar or an exported .onnx; or MMDetection's config",
    )
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, metavar="CHECKPOINT.pth", help="its weights, after MMDetection's CONFIG.py"
    )
    parser.add_argument(
        "--backend", choices=("endpoint", "runtime", "eager"),
        help="who is asked (default: a name's endpoint, a file's runtime, a config's eager model)",
    )  # fmt: skip
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder with the images (default: the config's)")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO annotations (default: the config's)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--iou-type", nargs="+", choices=("bbox", "segm", "keypoints"), default=["bbox"])
    parser.add_argument(
        "--processes", type=int, metavar="N", help="that corrupt at once (default: the number of processors, at most 8)"
    )
    parser.add_argument(
        "--resamples", type=int, default=200, metavar="N", help="of AP's 95 %% interval; 0 for none (default: 200)"
    )
    parser.add_argument("--save-corrupted", type=Path, metavar="DIR", help="keep each image as it was sent")
    parser.add_argument("--fresh", action="store_true", help="begin anew and drop the results of an earlier run")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    _add_model_arguments(parser)
    _add_original_arguments(parser)
    parser.set_defaults(run=run)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it is asked")
    group.add_argument("--score-threshold", type=float, default=0.001, metavar="S", help="(default: %(default)s)")
    group.add_argument("--max-detections", type=int, default=100, metavar="N", help="(default: %(default)s)")
    group.add_argument("--categories-by", choices=("auto", "name", "id"), default="auto", help="(default: by name)")
    group.add_argument("--accept-objections", action="store_true", help="measure what would be refused")
    group.add_argument(
        "--concurrency", type=int, default=1, metavar="N",
        help="requests at once; more are faster and wait for each other (default: 1)",
    )  # fmt: skip
    group.add_argument("--patience", type=float, default=60.0, metavar="S", help="for what may pass (default: 60 s)")
    group.add_argument("--version", dest="model_version", metavar="V", help="of the served model")
    group.add_argument("--protocol", choices=("rest", "grpc", "oip"), default="rest", help="(%(default)s)")
    group.add_argument("--timeout", type=float, default=60.0, metavar="S", help="of one request (default: 60 s)")
    group.add_argument("--spec", type=Path, metavar="FILE", help="eager model's spec (default: the model store's)")
    group.add_argument("--weights", type=Path, metavar="FILE", help="checkpoint instead of the spec's")
    group.add_argument("--model-store", type=Path, metavar="DIR", help="default: $DETSERVE_MODEL_STORE or model_store")
    group.add_argument("--device", default="cpu", help="of what runs in this process (default: %(default)s)")
    group.add_argument("--allow-code", action="store_true", help="a config that is more than a literal is run")
    add_endpoint_arguments(parser)


def _add_original_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of MMDetection's test_robustness.py")
    group.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="results file, JSON; x.pkl becomes x_results.json (WORK_DIR/results.json)",
    )
    group.add_argument("--work-dir", type=Path, metavar="DIR", help="of the pictures (out/robustness/MODEL)")
    group.add_argument(
        "--corruptions", nargs="+", default=["benchmark"], metavar="C", help="groups and names, see below"
    )
    group.add_argument(
        "--severities", nargs="+", type=int, choices=range(6), default=list(range(6)), metavar="N", help="(0 to 5)"
    )
    group.add_argument(
        "--summaries",
        nargs="?",
        type=_truth,
        const=True,
        default=False,
        metavar="BOOL",
        help="tell every cell's figures",
    )
    group.add_argument("--show-dir", type=Path, metavar="DIR", help="keep corrupted images with their detections")
    group.add_argument("--show-score-thr", type=float, default=0.3, metavar="S", help="of what is drawn (default: 0.3)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise, image by image (default: 0)")
    group.add_argument(
        "--final-prints", nargs="+", choices=("P", "mPC", "rPC"), default=["mPC"], help="of the block (default: mPC)"
    )
    group.add_argument(
        "--final-prints-aggregate", choices=("all", "benchmark"), default="benchmark", help="(default: %(default)s)"
    )
    group.add_argument("--show", action="store_true", help="no effect: no window is opened; see --show-dir")
    group.add_argument("--wait-time", type=float, metavar="S", help="no effect: no window is opened")
    group.add_argument(
        "--launcher", choices=("none", "pytorch", "slurm", "mpi"), help="no effect: one process asks; see --processes"
    )
    group.add_argument("--local_rank", "--local-rank", type=int, help="no effect: one process asks")
    group.add_argument(
        "--cfg-options", nargs="+", metavar="K=V", help="no effect: name other data by --images and --annotations"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, draw; return the exit code."""
    from rich.console import Console

    from dettools.analysis.robustness import changed_by_lossless, measure, unexpected_failures
    from dettools.analysis.robustness_subject import open_subject
    from dettools.evaluation.request import RefusedError, load_data_set
    from dettools.reports.evaluation_tables import print_refusal
    from dettools.reports.robustness_tables import original_block, print_robustness, write_csv

    for flag, value in (("--show", args.show), ("--launcher", args.launcher), ("--cfg-options", args.cfg_options)):
        if value:
            print(f"note: {flag}: no effect here, see --help", file=sys.stderr)
    work_dir = args.work_dir or Path("out") / "robustness" / Path(args.model).stem
    plan = _plan(args, _results_file(args, work_dir))
    backend, request = _request(args, plan.out.parent)
    data = load_data_set(request)
    for note in data.truth.notes:
        print(f"note: {note}", file=sys.stderr)
    console = Console(stderr=args.json)
    try:
        with open_subject(request, backend, data.truth) as subject:
            results = _watched(args, lambda watcher: measure(request, data, subject, plan, watcher), subject)
            pictures = _pictures(args, work_dir, results, subject, data, plan)
    except RefusedError as refused:
        print_refusal(refused, console)
        return 1
    except KeyboardInterrupt:
        print(f"what was measured is kept in {plan.out.parent}; the same command goes on from there", file=sys.stderr)
        raise
    name = args.final_prints_aggregate
    write_csv(results, work_dir / "robustness.csv")
    for kind in request.iou_types:
        print_robustness(results, console, task=kind, name=name)
    for kind in request.iou_types:
        block = original_block(results, plan.out.name, task=kind, prints=args.final_prints, name=name)
        console.print(f"\nAggregated results:\n{block}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nresults: {plan.out}\npictures: {', '.join(map(str, pictures))}", highlight=False, soft_wrap=True)
    changed, failed = changed_by_lossless(results), unexpected_failures(results)
    if changed:
        what = ", ".join(
            f"{corruption} {severity}: {count} images" for (corruption, severity), count in changed.items()
        )
        print(f"detserve robustness: detections change although every pixel is kept ({what}).", file=sys.stderr)
    if failed:
        what = ", ".join(f"{count} {kind}" for kind, count in failed.items())
        print(f"detserve robustness: images without an answer: {what}; they count as empty.", file=sys.stderr)
    if args.json:
        from dettools.analysis.robustness_figures import aggregate

        means = {kind: aggregate(results, name, task=kind).to_json() for kind in request.iou_types}
        told = {"aggregates": means, "file": str(plan.out), "pictures": list(map(str, pictures))}
        print(json.dumps({**results.to_json(), **told}))
    return 1 if changed or failed else 0


def _plan(args: argparse.Namespace, out: Path) -> Plan:
    from dettools.analysis.corruptions import NO_CORRUPTION, chosen_corruptions
    from dettools.analysis.robustness import Plan

    for name in ("processes", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise DetserveError(f"--{name}: got {value}, expected 1 or more.")
    for name in ("resamples", "seed"):
        if (value := getattr(args, name)) < 0:
            raise DetserveError(f"--{name}: got {value}, expected 0 or more.")
    corruptions = chosen_corruptions(args.corruptions)
    severities = [0] if args.corruptions == [NO_CORRUPTION] else sorted(set(args.severities))
    processes = args.processes or min(8, os.cpu_count() or 1)
    return Plan(corruptions, tuple(severities), args.seed, out, args.resamples, processes, args.fresh)


def _results_file(args: argparse.Namespace, work_dir: Path) -> Path:
    if args.out is None:
        return work_dir / RESULTS_FILE
    if args.out.suffix in (".pkl", ".pickle"):
        path: Path = args.out.with_name(f"{args.out.stem}_results.json")
        print(f"note: --out {args.out}: the results are written as JSON, to {path}", file=sys.stderr)
        return path
    return Path(args.out)


def _request(args: argparse.Namespace, out: Path) -> tuple[Backend, Request]:
    from detserve.model_store import default_model_store

    from dettools.evaluation.request import Request
    from dettools.evaluation.stream import RetryPolicy

    config = args.model.endswith(".py")
    local = args.model.endswith((".yaml", ".yml", ".mar", ".onnx"))
    if config != (args.checkpoint is not None):
        raise DetserveError(f"got {args.model} and {args.checkpoint}, expected MODEL, or CONFIG.py CHECKPOINT.pth.")
    if config and args.backend not in (None, "eager"):
        raise DetserveError(
            f"--backend {args.backend}: a config and its checkpoint are run by MMDetection itself. Pack them with "
            "`detserve archive` and name the archive or the served model."
        )
    backend: Backend = args.backend or ("eager" if config else "runtime" if local else "endpoint")
    images, annotations, classes = _data(args, config=config)
    return backend, Request(
        model=args.model,
        images=images,
        annotations=annotations,
        classes=classes,
        out=out,
        endpoint=Endpoint.of(args) if backend == "endpoint" and not local else None,
        model_store=args.model_store or default_model_store(),
        iou_types=tuple(args.iou_type),
        score_threshold=args.score_threshold,
        max_detections=args.max_detections,
        categories_by=args.categories_by,
        accept_objections=args.accept_objections,
        limit=args.limit,
        concurrency=args.concurrency,
        retry=RetryPolicy(patience_s=args.patience),
        version=args.model_version,
        spec=args.spec,
        weights=args.checkpoint or args.weights,
        device=args.device,
        allow_code=args.allow_code,
    )


def _data(args: argparse.Namespace, *, config: bool) -> tuple[Path, Path, tuple[str, ...]]:
    """Return the folder of images, the annotation file, and the classes that it is restricted to."""
    if args.images is not None and args.annotations is not None:
        return args.images, args.annotations, ()
    if not config:
        missing = [f"--{name}" for name in ("images", "annotations") if getattr(args, name) is None]
        raise DetserveError(f"got no {' and no '.join(missing)}, expected a data set: give --images and --annotations.")

    from detserve.mmdet_dataset import read_dataset

    found = read_dataset(Path(args.model), annotations=args.annotations, images=args.images, allow_code=args.allow_code)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    return found.images, found.annotations, found.class_names


def _watched(
    args: argparse.Namespace, measuring: Callable[[Watcher], RobustnessResults], subject: Subject
) -> RobustnessResults:
    """Measure under a progress bar; keep and draw what was sent, and tell each cell."""
    import shutil

    from dettools.analysis.robustness import Watcher
    from dettools.reports.progress import progress
    from dettools.reports.robustness_pictures import drawn
    from dettools.reports.robustness_tables import summary_line

    def sent(corruption: str, severity: int, entry: ImageEntry, file: Path, answer: Answer) -> None:
        stem = Path(entry.file_name).stem
        if args.save_corrupted:
            folder = args.save_corrupted / corruption / str(severity)
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / f"{stem}{file.suffix}")
        if args.show_dir:
            folder = args.show_dir / corruption / str(severity)
            folder.mkdir(parents=True, exist_ok=True)
            found = answer.detections and answer.detections.filtered(args.show_score_thr, 100)
            failure = answer.failure.type if answer.failure else ""
            drawn(file.read_bytes(), found, subject.names, failure=failure).save(folder / f"{stem}.jpg", quality=90)

    def cell(corruption: str, severity: int, measured: Cell) -> None:
        if args.summaries:
            print(summary_line(corruption, severity, measured), file=sys.stderr)

    with progress() as show:
        return measuring(Watcher(show, sent if args.save_corrupted or args.show_dir else None, cell))


def _pictures(
    args: argparse.Namespace, work_dir: Path, results: RobustnessResults, subject: Subject, data: DataSet, plan: Plan
) -> list[Path]:
    from dettools.analysis.robustness_sheet import sheet_samples
    from dettools.reports.robustness_pictures import save_contact_sheet, save_curves

    work_dir.mkdir(parents=True, exist_ok=True)
    curves, sheet = work_dir / "robustness.png", work_dir / "contact-sheet.png"
    save_curves(results, curves, task=args.iou_type[0], name=args.final_prints_aggregate)
    entry, samples = sheet_samples(subject, data, plan, threshold=args.show_score_thr, severity=SHEET_SEVERITY)
    caption = (
        f"{entry.file_name} under each corruption, detections of {subject.answerer.name} above {args.show_score_thr:g}"
    )
    save_contact_sheet(sheet, samples, subject.names, caption)
    return [curves, sheet]


def _truth(text: str) -> bool:
    """Read a truth value: to `bool`, which the original takes, the text False is true."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(text)
    return text.lower() in ("true", "1", "yes")
