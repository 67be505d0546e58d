"""``detserve download-dataset``: COCO, VOC, LVIS and others, resumed, proven whole, unpacked safely."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detserve.errors import DetserveError

if TYPE_CHECKING:
    import argparse

    from dettools.datasets.download import Options, Outcome, Plan
    from dettools.datasets.download_table import DataSet


_LONGEST_TIMEOUT_S = 86_400


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "download-dataset",
        help="COCO, VOC, LVIS, Objects365, ADE20K, RefCOCO, balloon: resumed, proven whole, unpacked safely",
        description="Download a data set's parts. What is there is proven and not downloaded again, what was cut is "
        "resumed, and a file gets its name only once it is whole. A file that you have already is taken when it lies "
        "in the folder under its name. Exit code 1: a file failed; the others are there. For a small data set "
        "without a network see `detserve scenes`.",
    )
    parser.add_argument("--list", action="store_true", help="list the data sets with their parts, and end")
    parser.add_argument("--parts", nargs="+", default=[], metavar="PART", help="such as val annotations; or all")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; nothing is asked or written")
    parser.add_argument(
        "--mirror",
        action="append",
        default=[],
        metavar="URL",
        help="a folder on another server that holds the files, tried first; digests are checked all the same",
    )
    parser.add_argument("--retries", type=int, default=5, metavar="N", help="attempts without a further byte (5)")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds without a byte (60)")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    original = parser.add_argument_group("options of MMDetection's download_dataset.py")
    original.add_argument("--dataset-name", default="coco2017", metavar="NAME", help="(default: coco2017); see --list")
    original.add_argument("--save-dir", type=Path, default=Path("data/coco"), metavar="DIR", help="(data/coco)")
    original.add_argument("--unzip", action="store_true", help="unpack the archives")
    original.add_argument("--delete", action="store_true", help="remove an archive once it is unpacked (--unzip)")
    original.add_argument("--threads", type=int, default=4, metavar="N", help="files at a time (default: 4)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan, download, tell; return the exit code."""
    import threading

    from dettools.datasets.download import Options, plan_download, run_download
    from dettools.datasets.download_file import Patience
    from dettools.datasets.download_table import DATA_SETS, data_set
    from dettools.reports.downloads import print_data_sets, print_outcomes, print_plan
    from dettools.reports.progress import progress

    if args.list:
        print_data_sets(list(DATA_SETS.values()), json_follows=args.json)
        if args.json:
            print(json.dumps({"data_sets": {name: one.part_names for name, one in DATA_SETS.items()}}))
        return 0
    _check(args)
    chosen: DataSet = data_set(args.dataset_name)
    options: Options = Options(args.threads, args.unzip, args.delete, Patience(args.retries, args.timeout))
    plan = plan_download(chosen, args.parts, args.save_dir, args.mirror, options, ask=not args.dry_run)
    print_plan(chosen, plan, json_follows=args.json)
    if args.dry_run:
        if args.json:
            print(json.dumps(_planned(chosen, plan)))
        return 0
    stop = threading.Event()
    with progress() as show:
        outcomes = run_download(plan, options, show, stop)
    print_outcomes(plan.folder, outcomes, json_follows=args.json)
    if args.json:
        print(json.dumps({**_planned(chosen, plan), "outcomes": [asdict(one) for one in outcomes]}))
    return _told(outcomes)


def _check(args: argparse.Namespace) -> None:
    if args.threads < 1 or args.retries < 0 or not 0 < args.timeout < _LONGEST_TIMEOUT_S:
        raise DetserveError(
            f"--threads {args.threads}, --retries {args.retries}, --timeout {args.timeout:g}: expected at least 1, "
            f"at least 0, and seconds more than 0 and less than {_LONGEST_TIMEOUT_S}."
        )
    if args.delete and not args.unzip:
        raise DetserveError("--delete removes archives once they are unpacked: give --unzip with it.")
    for mirror in args.mirror:
        if not _is_address(mirror):
            raise DetserveError(f"--mirror: got {mirror!r}, expected an address with http:// or https://.")


def _is_address(text: str) -> bool:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _told(outcomes: list[Outcome]) -> int:
    failed = [one for one in outcomes if one.error]
    for one in failed:
        print(f"detserve download-dataset: {one.path}: {one.error}", file=sys.stderr)
    if failed:
        print(
            f"detserve download-dataset: {len(failed)} of {len(outcomes)} files failed. The same command goes on where "
            "this one ended.",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _planned(chosen: DataSet, plan: Plan) -> dict[str, Any]:
    files = [
        {"part": one.part.name, "path": one.part.path, "state": one.state, "size": one.size, "to_come": one.to_come}
        | {"urls": list(one.urls), "digest": one.part.digest}
        for one in plan.files
    ]
    return {
        "data_set": chosen.name,
        "folder": str(plan.folder),
        "needed_bytes": plan.needed,
        "free_bytes": plan.free,
        "files": files,
    }
