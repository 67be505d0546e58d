"""``detserve upgrade-checkpoint``: a detector's weights of an older MMDetection for a newer one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "upgrade-checkpoint",
        help="weights of an older MMDetection for a newer one, with a certificate",
        description="Rename and reorder what MMDetection's versions changed: heads under roi_head, the background from "
        "the first class to the last in weights and biases, RetinaNet's and SSD's layers. Each moved layer is run "
        "before and after on random features; when a class gets another score, nothing is written. Nothing in the "
        "checkpoint is executed. Exit code 1: a proof failed, or --config's model misses weights.",
    )
    parser.add_argument("in_file", type=Path, metavar="IN", help="checkpoint with meta.mmdet_version (or --from)")
    parser.add_argument(
        "out_file", type=Path, metavar="OUT", help=".pth or .safetensors; OUT.certificate.json is written beside it"
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="classes of the detector with the background, such as 81 (default: read from the weights, else 81)",
    )
    parser.add_argument("--from", dest="made_by", metavar="VERSION", help="that made the weights (default: from meta)")
    parser.add_argument(
        "--to", dest="wanted", metavar="VERSION", help="that shall load them (default: the newest known, 3.3.0)"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="of the new version (read, not run): do the weights fit its model?"
    )
    parser.add_argument("--allow-code", action="store_true", help="run a --config that is more than assignments")
    parser.add_argument("--explain", action="store_true", help="print every row, and the channels class by class")
    parser.add_argument("-n", "--dry-run", action="store_true", help="show what would be done, and write nothing")
    parser.add_argument("--json", action="store_true", help="print the certificate as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Upgrade the checkpoint; return the exit code."""
    from dettools.converters.mmdet_upgrade import upgrade_checkpoint
    from dettools.converters.weight_files import check_output, save_conversion
    from dettools.reports.conversion_tables import print_conversion

    check_output(args.in_file, args.out_file)
    conversion = upgrade_checkpoint(
        args.in_file,
        classes=args.num_classes,
        made_by=args.made_by,
        wanted=args.wanted,
        config=args.config,
        allow_code=args.allow_code,
    )
    written = save_conversion(conversion, args.out_file) if conversion.proven and not args.dry_run else None
    print_conversion(conversion, written, args.out_file, explain=args.explain, as_json=args.json)
    return 0 if conversion.proven else 1
