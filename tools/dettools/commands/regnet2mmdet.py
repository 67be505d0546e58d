"""``detserve regnet2mmdet``: a RegNet's weights between the names of pycls, timm, torchvision and MMDetection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

NAMES = ("pycls", "timm", "torchvision", "mmdet")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "regnet2mmdet",
        help="a RegNet's weights between pycls, timm, torchvision and MMDetection, with a certificate",
        description="Rename a RegNetX's or RegNetY's tensors. The architecture is read from their shapes; the source's "
        "forward pass and the target's are compared on a random image, stage by stage, and when they differ nothing is "
        "written. Nothing in the checkpoint is executed. MMDetection's RegNet has no squeeze-excite: it takes RegNetX "
        "only. Exit code 1: a proof failed.",
    )
    parser.add_argument("src", type=Path, metavar="IN", help="checkpoint of pycls, timm, torchvision or MMDetection")
    parser.add_argument(
        "dst", type=Path, metavar="OUT", help=".pth or .safetensors; OUT.certificate.json is written beside it"
    )
    parser.add_argument("--from", dest="names", choices=NAMES, help="whose names IN has (default: found out)")
    parser.add_argument("--to", choices=NAMES, default="mmdet", help="whose names OUT gets (default: mmdet)")
    parser.add_argument(
        "--swap-colours",
        action="store_true",
        help="turn the first convolution between BGR (pycls) and RGB (timm, torchvision) images",
    )
    parser.add_argument("--explain", action="store_true", help="print every row: Convert A to B")
    parser.add_argument("-n", "--dry-run", action="store_true", help="show what would be done, and write nothing")
    parser.add_argument("--json", action="store_true", help="print the certificate as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert the weights; return the exit code."""
    from dettools.converters.regnet import convert_regnet
    from dettools.converters.weight_files import check_output, save_conversion
    from dettools.reports.conversion_tables import print_conversion

    check_output(args.src, args.dst)
    conversion = convert_regnet(args.src, names=args.names, to=args.to, swap_colours=args.swap_colours)
    written = save_conversion(conversion, args.dst) if conversion.proven and not args.dry_run else None
    print_conversion(conversion, written, args.dst, explain=args.explain, as_json=args.json)
    return 0 if conversion.proven else 1
