"""``detserve detectron2pytorch``: a backbone of Detectron or Detectron2 for torchvision and MMDetection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "detectron2pytorch",
        help="a ResNet or ResNeXt of Detectron (Caffe2) or Detectron2 under torchvision's names, with a certificate",
        description="Rename a backbone's tensors, and turn Caffe2's affine maps into batch normalisation that computes "
        "the same. The source's forward pass and torchvision's are compared on a random image, stage by stage; when "
        "they differ, nothing is written. The pickle is read by an unpickler that admits arrays and nothing else. What "
        "images the weights are made for is recorded beside them. Exit code 1: a proof failed.",
    )
    parser.add_argument("src", type=Path, metavar="IN", help=".pkl of Detectron or Detectron2")
    parser.add_argument(
        "dst", type=Path, metavar="OUT", help=".pth or .safetensors; OUT.certificate.json is written beside it"
    )
    parser.add_argument(
        "depth", type=int, nargs="?", metavar="DEPTH", help="50, 101 or 152; checked, and found out when left out"
    )
    parser.add_argument(
        "--style",
        choices=("caffe", "pytorch"),
        help="where blocks stride: caffe in the 1×1, pytorch in the 3×3 convolution (default: as published)",
    )
    parser.add_argument("--explain", action="store_true", help="print every row: Convert A to B")
    parser.add_argument("-n", "--dry-run", action="store_true", help="show what would be done, and write nothing")
    parser.add_argument("--json", action="store_true", help="print the certificate as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert the weights; return the exit code."""
    from dettools.converters.detectron import convert_detectron
    from dettools.converters.weight_files import check_output, save_conversion
    from dettools.reports.conversion_tables import print_conversion

    check_output(args.src, args.dst)
    conversion = convert_detectron(args.src, depth=args.depth, style=args.style)
    written = save_conversion(conversion, args.dst) if conversion.proven and not args.dry_run else None
    print_conversion(conversion, written, args.dst, explain=args.explain, as_json=args.json)
    return 0 if conversion.proven else 1
