"""``detserve browse-dataset``: a data set's photographs with their objects, its figures, and what is wrong with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detserve.errors import DetserveError

if TYPE_CHECKING:
    import argparse

    from dettools.datasets.dataset import Dataset
    from dettools.datasets.inspection import Inspection
    from dettools.datasets.selection import Filters
    from dettools.datasets.statistics import DatasetStatistics

FORMATS = ("coco", "voc", "yolo", "cityscapes", "mmdet")
PAGE_FILE, STATISTICS_FILE, PROBLEMS_FILE = "index.html", "statistics.json", "problems.csv"
# So many pictures are drawn unless more are asked for.
MOST_PICTURES = 500
# Of each kind of problem, in the JSON document.
MOST_EXAMPLES = 5


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "browse-dataset",
        help="look through a data set: objects drawn, statistics, problems flagged; COCO, VOC, YOLO, Cityscapes",
        description="Print a data set's statistics and problems; with --output-dir also draw its images and write a "
        "page to look through them. The photographs are shown as they are on disk, not augmented.",
    )
    parser.add_argument(
        "config",
        type=Path,
        metavar="DATASET",
        help="COCO annotations (.json), folder of Pascal VOC XML, YOLO's data.yaml or folder, Cityscapes folder, or "
        "MMDetection config (read, not run; its training data)",
    )
    parser.add_argument("--format", choices=FORMATS, help="(default: told by the path)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the image files (default: found)")
    parser.add_argument("--split", metavar="NAME", help="such as train, val or test (default: all; of a config: train)")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help=f"write {PAGE_FILE}, pictures and tables")
    parser.add_argument("--no-files", action="store_true", help="do not open the image files to check them")
    parser.add_argument("--read-pixels", action="store_true", help="decode every image file: finds cut off ones")
    parser.add_argument("--check", action="store_true", help="exit code 1 if there is an error")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    filters = parser.add_argument_group(
        "which images are drawn", "All must hold; --classes, --size and --crowd hold of one and the same object."
    )
    filters.add_argument("--classes", nargs="+", metavar="NAME", help="with an object of one of these classes")
    filters.add_argument(
        "--size", nargs="+", metavar="SIZE", help="with an object of COCO's size: small, medium, large"
    )
    filters.add_argument("--crowd", action="store_true", help="with a crowd")
    filters.add_argument("--empty", action="store_true", help="without any object (joined with the above by or)")
    filters.add_argument(
        "--problems", nargs="*", metavar="KIND", help="with a problem, or with one of these; see the table it prints"
    )
    filters.add_argument("--range", metavar="A:B", help="from place A (0 is the first) up to B, B left out")
    filters.add_argument("--random", type=int, metavar="N", help="so many at random")
    filters.add_argument("--seed", type=int, default=0, metavar="N", help="of what is random (default: 0)")
    filters.add_argument(
        "--all", action="store_true", help=f"all of them; else {MOST_PICTURES}, those with problems first"
    )
    config = parser.add_argument_group("of an MMDetection config")
    config.add_argument("--annotations", type=Path, metavar="FILE", help="COCO annotations, instead of the config's")
    config.add_argument("--dataset", type=int, metavar="N", help="which of several joined data sets, from 1")
    config.add_argument("--allow-code", action="store_true", help="a config that is more than assignments is run")
    original = parser.add_argument_group("options of MMDetection's browse_dataset.py")
    original.add_argument("--not-show", action="store_true", help="no effect: no window is opened")
    original.add_argument("--show-interval", type=float, metavar="S", help="no effect: page with the arrow keys")
    original.add_argument("--skip-type", nargs="+", metavar="STEP", help="no effect: no step of the pipeline is run")
    original.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="K=V",
        help="train_dataloader.dataset.ann_file=… and .data_prefix.img=… (below .data_root=…) name the data; others "
        "have no effect",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, look for problems, count, draw; return the exit code."""
    from rich.console import Console

    from dettools.datasets.inspection import find_problems
    from dettools.datasets.selection import check_filters, select_images
    from dettools.datasets.statistics import statistics_of
    from dettools.reports.dataset_tables import print_dataset
    from dettools.reports.progress import progress

    if args.show_interval is not None:
        print("note: --show-interval: no effect, the page is leafed through with the arrow keys", file=sys.stderr)
    filters = _filters(args)
    dataset = _load(args)
    check_filters(dataset, filters)
    with progress() as show:
        inspection = find_problems(
            dataset,
            open_files=not args.no_files,
            read_pixels=args.read_pixels,
            progress=lambda done, total: show("image files", done, total),
        )
    statistics = statistics_of(dataset)
    for note in (*dataset.notes, *inspection.notes):
        print(f"note: {note}", file=sys.stderr)
    places = select_images(dataset, inspection, filters)
    document: dict[str, Any] = {
        "dataset": str(dataset.path),
        "format": dataset.format,
        "notes": [*dataset.notes, *inspection.notes],
        "selected_images": len(places),
    }
    if args.output_dir:
        document["page"] = str(args.output_dir / PAGE_FILE)
        document["pictures"], inspection = _write(args, dataset, inspection, statistics, places)
    print_dataset(dataset, statistics, inspection, Console(stderr=args.json))
    if args.output_dir:
        print(f"{len(document['pictures'])} images in {args.output_dir / PAGE_FILE}", file=sys.stderr)
    elif filters.narrow:
        print(f"images that pass the filters: {len(places)}; --output-dir DIR draws them", file=sys.stderr)
    if args.json:
        print(json.dumps({**document, "statistics": statistics.to_json(), **_problems(dataset, inspection)}))
    return int(args.check and inspection.errors > 0)


def _load(args: argparse.Namespace) -> Dataset:
    from dettools.datasets.formats import Source, load_dataset
    from dettools.reports.progress import progress

    annotations, images = _named(args.cfg_options)
    with progress() as show:
        source = Source(
            args.config,
            images=args.images or images,
            annotations=args.annotations or annotations,
            split=args.split,
            number=args.dataset,
            allow_code=args.allow_code,
            progress=lambda done, total: show("labels", done, total),
        )
        return load_dataset(source, args.format)


def _filters(args: argparse.Namespace) -> Filters:
    from dettools.datasets.selection import Filters

    first, end = 0, None
    if args.range:
        start, colon, stop = args.range.partition(":")
        if not colon or not all(part == "" or part.isdecimal() for part in (start, stop)):
            raise DetserveError(f"--range: got {args.range!r}, expected A:B, such as 100:200, :50 or 4000:")
        first, end = int(start or 0), int(stop) if stop else None
    if args.random is not None and args.random < 1:
        raise DetserveError(f"--random: got {args.random}, expected how many images, at least 1")
    return Filters(
        classes=args.classes,
        sizes=args.size,
        crowd=args.crowd,
        empty=args.empty,
        problems=args.problems,
        first=first,
        end=end,
        sample=args.random,
        seed=args.seed,
    )


def _named(options: list[str]) -> tuple[Path | None, Path | None]:
    """Return the annotation file and the folder of images that --cfg-options names."""
    pairs = {}
    for one in options:
        key, separator, value = one.partition("=")
        if not separator:
            raise DetserveError(f"--cfg-options: got {one!r}, expected KEY=VALUE")
        pairs[key.strip()] = value.strip().strip("\"'")
    file_key, folder_key, root_key = (
        next((key for key in pairs if f".{key}".endswith(end)), None)
        for end in (".ann_file", ".data_prefix.img", ".data_root")
    )
    if ignored := [key for key in pairs if key not in (file_key, folder_key, root_key)]:
        print(f"note: --cfg-options {', '.join(ignored)}: no effect here", file=sys.stderr)
    root = Path(pairs[root_key]) if root_key else Path()
    found = [root / pairs[key] if key else None for key in (file_key, folder_key)]
    if root_key and not any(found):
        raise DetserveError(
            f"--cfg-options {root_key}: expected ann_file and data_prefix.img too, or set MMDET_DATASETS={root}"
        )
    return found[0], found[1]


def _write(
    args: argparse.Namespace,
    dataset: Dataset,
    inspection: Inspection,
    statistics: DatasetStatistics,
    places: list[int],
) -> tuple[list[dict[str, Any]], Inspection]:
    """Draw, then write the page and the tables; return the pictures and the problems with those found while drawing."""
    from dettools.datasets.selection import most_telling
    from dettools.reports.dataset_page import write_page, write_problems
    from dettools.reports.dataset_pictures import draw_pictures
    from dettools.reports.progress import progress

    chosen = places
    if len(places) > MOST_PICTURES and not args.all and args.random is None:
        chosen = most_telling(places, inspection, MOST_PICTURES, args.seed)
        print(
            f"note: {len(chosen)} of {len(places)} images are drawn, those with problems first; --all draws all, "
            "--random N and --range A:B choose others",
            file=sys.stderr,
        )
    folder: Path = args.output_dir
    try:
        drawn = []
        with progress() as show:
            for number, picture in enumerate(draw_pictures(dataset, inspection, chosen, folder), start=1):
                drawn.append(picture)
                show("pictures", number, len(chosen))
        inspection = inspection.with_problems([problem for picture in drawn for problem in picture.problems])
        write_page(folder / PAGE_FILE, dataset, statistics, inspection, drawn, selected=len(places))
        write_problems(folder / PROBLEMS_FILE, dataset, inspection)
        (folder / STATISTICS_FILE).write_text(json.dumps(statistics.to_json(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DetserveError(
            f"{folder}: cannot be written: {error.strerror or error}. Name another --output-dir."
        ) from None
    return [{"image": dataset.name_of(one.image), "picture": one.picture} for one in drawn], inspection


def _problems(dataset: Dataset, inspection: Inspection) -> dict[str, Any]:
    from dettools.datasets.inspection import KINDS, sentence

    kinds = {
        kind: {
            "count": count,
            "severity": KINDS[kind].severity,
            "examples": [sentence(dataset, one) for one in inspection.problems if one.kind == kind][:MOST_EXAMPLES],
        }
        for kind, count in inspection.counts.items()
    }
    return {"errors": inspection.errors, "problems": kinds}
