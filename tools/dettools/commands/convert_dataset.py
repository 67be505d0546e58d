"""``detserve convert-dataset``: a data set in another format, and what a COCO file's mistakes cost."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detserve.errors import DetserveError

if TYPE_CHECKING:
    import argparse

    from dettools.datasets.conversion import Conversion, Converter
    from dettools.datasets.conversion_parts import Part, Reader
    from dettools.datasets.conversion_rules import Rules

REPORT = "conversion.report.json"
_TARGETS = ("coco", "voc", "yolo")


class ConvertOptionsError(DetserveError):
    """Options that do not fit together."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "convert-dataset",
        help="between COCO, VOC and YOLO, from Cityscapes; check a COCO file for what falsifies AP",
        description="Convert a data set by several processes, with a report of what was skipped and of what the target "
        "format has no place for. Ids count from 1: pycocotools counts an annotation with the id 0 as never found.",
    )
    kinds = parser.add_subparsers(title="from", metavar="FORMAT", dest="source_format", required=True)
    _add_cityscapes(kinds)
    _add_voc(kinds)
    for kind, what in (("yolo", "data.yaml, or its folder"), ("coco", "annotations (.json), or their folder")):
        one = kinds.add_parser(kind, help=f"from {kind.upper()}", description=f"Convert a {kind.upper()} data set.")
        one.add_argument("source", type=Path, metavar="SOURCE", help=what)
        _add_target(one, required=True)
        one.add_argument("--images", type=Path, metavar="DIR", help="folder of the image files (default: found)")
        one.add_argument("-o", "--out-dir", "--out", dest="out", type=Path, metavar="OUT", required=True, help=_OUT)
        _add_conversion(one)
    check = kinds.add_parser(
        "check",
        help="a COCO file: what falsifies its AP, and by how much",
        description="Look for what falsifies COCO metrics: id 0, ids twice, category index instead of id, corners as "
        "width and height, normalised boxes, sizes swapped by EXIF (needs the image files), duplicates, empty boxes; "
        "in COCO results too. With --predictions, tell what each takes from AP in files that are sound but for it. "
        "Exit code 1: there is one.",
    )
    check.add_argument("annotations", type=Path, metavar="ANNOTATIONS", help="COCO annotation file")
    check.add_argument(
        "--predictions",
        type=Path,
        metavar="RESULTS",
        help="COCO results, MMDetection's .pkl, or an evaluation's folder",
    )
    check.add_argument("--images", type=Path, metavar="DIR", help="folder of the image files (default: found)")
    check.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    check.set_defaults(run=run_check)


_OUT = "COCO: a .json file, or a folder with one file a split; VOC, YOLO: a new folder"


def _add_cityscapes(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "cityscapes",
        help="from Cityscapes; its instances are written as COCO, VOC or YOLO, nothing is written as Cityscapes",
        description="Convert Cityscapes' instances. COCO: instancesonly_filtered_gtFine_{split}.json, masks as RLE, "
        "Cityscapes' own category ids, groups as crowds. A split without objects, as test is, is not written.",
    )
    parser.add_argument("source", type=Path, metavar="CITYSCAPES", help="folder with leftImg8bit and gtFine")
    _add_target(parser)
    parser.add_argument("--boxes-only", action="store_true", help="no masks: half the time, a fifth of the file")
    original = parser.add_argument_group("options of MMDetection's cityscapes.py")
    original.add_argument("--img-dir", type=Path, default=Path("leftImg8bit"), metavar="DIR", help="in CITYSCAPES")
    original.add_argument("--gt-dir", type=Path, default=Path("gtFine"), metavar="DIR", help="in CITYSCAPES")
    original.add_argument(
        "-o", "--out-dir", "--out", dest="out", type=Path, metavar="OUT", help=f"{_OUT} (default: CITYSCAPES)"
    )
    _add_conversion(parser)


def _add_voc(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "voc",
        help="from Pascal VOC",
        description="Convert Pascal VOC's XML files, of any classes. COCO: one file a split, voc07_train.json and "
        "so on of a VOCdevkit, and the two years joined.",
    )
    parser.add_argument("source", type=Path, metavar="VOC", help="VOCdevkit, or a folder with XML files")
    _add_target(parser)
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the image files (default: found)")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="these only, numbered in this order (default: those of the splits that are converted, by the alphabet)",
    )
    original = parser.add_argument_group("options of MMDetection's pascal_voc.py")
    original.add_argument(
        "-o", "--out-dir", "--out", dest="out", type=Path, metavar="OUT", help=f"{_OUT} (default: VOC)"
    )
    original.add_argument(
        "--out-format", choices=("pkl", "coco"), help="coco: as --to coco; pkl is refused, MMDetection 3 cannot read it"
    )
    _add_conversion(parser)


def _add_target(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    parser.add_argument(
        "--to",
        choices=_TARGETS,
        required=required,
        default=None if required else "coco",
        help="format of the output" + ("" if required else " (default: coco)"),
    )


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", metavar="NAME", help="this one only (default: all that are there)")
    parser.add_argument(
        "--difficult",
        choices=("crowd", "keep", "drop"),
        help="objects that VOC marks difficult: crowd, which COCO's metrics ignore; keep, as ordinary objects; drop "
        "(default: crowd; YOLO: drop, as Ultralytics does)",
    )
    parser.add_argument(
        "--crowd",
        choices=("keep", "drop", "difficult"),
        help="crowds: keep, as ordinary objects where the format has none; drop; difficult, VOC's mark "
        "(default: COCO keep, VOC difficult, YOLO drop)",
    )
    parser.add_argument(
        "--first-pixel",
        type=int,
        choices=(0, 1),
        help="VOC: what the first pixel of a row is called (default: 1, but 0 if a coordinate is below 1 or more than "
        "1 %% of the boxes have fractions)",
    )
    parser.add_argument("--outlines", action="store_true", help="YOLO: lines are outlines, for segmentation")
    parser.add_argument("--contiguous-ids", action="store_true", help="COCO: number the categories from 1")
    parser.add_argument(
        "--image-files",
        choices=("link", "copy", "none"),
        default="link",
        help="VOC, YOLO: link or copy the image files into OUT (default: link)",
    )
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes (default: 1; 0: one a core)")
    parser.add_argument("--json", action="store_true", help="print the report as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert; return the exit code."""
    from rich.console import Console

    from dettools.datasets.conversion import Converter
    from dettools.datasets.conversion_rules import rules_for
    from dettools.reports.dataset_conversion import print_conversion
    from dettools.reports.progress import progress

    if getattr(args, "out_format", None) == "pkl":
        raise ConvertOptionsError(
            "--out-format pkl: MMDetection 3 cannot read the list of MMDetection 2 any more. "
            "Use --to coco and CocoDataset instead."
        )
    if args.nproc < 0:
        raise ConvertOptionsError(f"--nproc: got {args.nproc}, expected how many processes, or 0 for one a core")
    boxes_only = getattr(args, "boxes_only", False)
    rules = rules_for(
        args.to,
        args.difficult,
        args.crowd,
        boxes_only=boxes_only,
        outlines=args.outlines,
        contiguous=args.contiguous_ids,
    )
    reader, parts = _source(args, rules)
    if not parts:
        raise ConvertOptionsError(f"{args.source}: got no image, expected at least one. Check the path and --split.")
    with progress() as show:
        converter = Converter(
            reader,
            rules,
            processes=args.nproc or os.cpu_count() or 1,
            first_pixel=args.first_pixel,
            files=args.image_files,
            progress=lambda done, total: show("images read and written", done, total),
        )
        try:
            conversion, report = _convert(args, converter, reader, parts)
            conversion = _told_if_empty(args, conversion)
            document = _document(args, rules, conversion)
            report.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConvertOptionsError(
                f"{error.filename2 or error.filename or args.out}: {error.strerror or error}. Name another --out."
            ) from None
        except UnicodeEncodeError as error:
            got = error.object[max(0, error.start - 40) : error.end + 40]
            raise ConvertOptionsError(f"got the name {got!r}, expected one in UTF-8. Rename the file.") from None
    print_conversion(conversion, rules, Console(stderr=args.json))
    print(f"report: {report}", file=sys.stderr)
    if args.json:
        print(json.dumps(document))
    return 0


def _source(args: argparse.Namespace, rules: Rules) -> tuple[Reader, list[Part]]:
    from dettools.datasets.conversion_parts import cityscapes_parts, loaded_parts, voc_parts, yolo_parts

    if not args.source.exists():
        raise ConvertOptionsError(f"got {args.source}, expected a data set. There is no such path.")
    kind = args.source_format
    if kind in ("cityscapes", "voc") and not args.source.is_dir():
        raise ConvertOptionsError(f"got {args.source}, expected a folder.")
    if kind == "cityscapes":
        if not (args.source / args.gt_dir).is_dir():
            raise ConvertOptionsError(f"--gt-dir: got {args.source / args.gt_dir}, expected the folder of the truth.")
        masks = not rules.boxes_only and (rules.target == "coco" or rules.outlines)
        return cityscapes_parts(args.source, args.img_dir, args.gt_dir, split=args.split, masks=masks)
    if kind == "voc":
        return voc_parts(
            args.source,
            args.images,
            split=args.split,
            overlapping=rules.target == "coco",
            classes=tuple(dict.fromkeys(args.classes or ())),
        )
    if kind == "yolo":
        return yolo_parts(args.source, args.images, split=args.split)
    from dettools.datasets.formats import Source, load_dataset  # with every reader, which the others do without

    return loaded_parts(load_dataset(Source(args.source, images=args.images, split=args.split), "coco"))


def _convert(
    args: argparse.Namespace, converter: Converter, reader: Reader, parts: list[Part]
) -> tuple[Conversion, Path]:
    """Write; return what was written and where its report goes."""
    from dettools.datasets.conversion_parts import LoadedReader

    out: Path = args.out or args.source
    if args.to != "coco":
        return converter.to_folder(out, parts), out / REPORT
    extra: dict[str, Any] = {}
    if isinstance(reader, LoadedReader):
        known = ("images", "annotations", "categories")
        extra = {key: value for key, value in reader.dataset.document.items() if key not in known}
    if out.suffix != ".json":
        paths = {out / _file_name(args.source_format, part.name): part for part in parts}
        return converter.to_coco(paths, extra, keep_empty=False), out / REPORT
    if len(parts) != 1:
        raise ConvertOptionsError(
            f"--out {out}: got one file for the splits {', '.join(part.name for part in parts)}. "
            "Choose one with --split, or name a folder."
        )
    return converter.to_coco({out: parts[0]}, extra, keep_empty=True), out.with_suffix(".report.json")


def _told_if_empty(args: argparse.Namespace, conversion: Conversion) -> Conversion:
    """Add a note if there is no object in what was written; a data set of which nothing is written is an error."""
    if any(one.annotations for one in conversion.outputs):
        return conversion
    if not conversion.outputs:
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(conversion.skipped.counts.items()))
        raise ConvertOptionsError(
            f"{args.source}: got no object, so that no file is written ({counts}). "
            "Check the source; for a list of images without objects name a file: --out FILE.json"
        )
    note = f"no object was found in {args.source}, read as {args.source_format}: check the format and where labels lie"
    return replace(conversion, notes=(*conversion.notes, note))


def _file_name(kind: str, split: str) -> str:
    if kind == "cityscapes":
        return f"instancesonly_filtered_gtFine_{split}.json"
    if kind == "voc" and split:
        return f"{split}.json"
    return f"instances_{split}.json" if split else "instances.json"


def _document(args: argparse.Namespace, rules: Rules, conversion: Conversion) -> dict[str, Any]:
    return {
        "source": str(args.source),
        "from": args.source_format,
        "to": args.to,
        "rules": {"difficult": rules.difficult, "crowd": rules.crowd},
        **conversion.to_json(),
    }


def run_check(args: argparse.Namespace) -> int:
    """Look for traps and measure them; return the exit code."""
    from rich.console import Console

    from dettools.datasets.coco import read_coco
    from dettools.datasets.metric_traps import find_traps
    from dettools.reports.dataset_conversion import print_traps

    dataset = read_coco(args.annotations, images=args.images)
    check = find_traps(dataset, args.predictions)
    for note in (*dataset.notes, *check.notes):
        print(f"note: {note}", file=sys.stderr)
    print_traps(check, Console(stderr=args.json))
    if args.json:
        print(json.dumps({"annotations": str(args.annotations), **check.to_json()}))
    return int(bool(check.traps))
