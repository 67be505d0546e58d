"""``detserve graph``: what is in an ONNX file, who can run it, and what differs from another file."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from dettools.onnx_graph.model_file import OnnxFile


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "graph",
        help="show what is in an ONNX file and who can run it; compare two",
        description="Show an ONNX file's operators, parameters, MACs, inputs and outputs, opsets and metadata, and "
        "which operators the CPU, CUDA and TensorRT do not take. With --diff: what differs from another file; exit "
        "code 0 nothing, 1 something.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="an .onnx file, or a .mar with one inside")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="compare with this file")
    parser.add_argument(
        "--shape", type=int, nargs="+", metavar="PX", help="height and width of the input, for files that leave it open"
    )
    parser.add_argument("--netron", action="store_true", help="show the graph in Netron on 127.0.0.1 until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show or compare; return the exit code."""
    from dettools.onnx_graph.model_file import OnnxFileError, open_onnx

    if args.diff and args.netron:
        raise OnnxFileError("got both --diff and --netron, expected one. Drop one.")
    if args.shape is not None and (len(args.shape) > 2 or min(args.shape) < 1):
        raise OnnxFileError(
            f"--shape: got {' '.join(map(str, args.shape))}, expected a height and a width in pixels, or one number "
            "for a square. Correct the command line."
        )
    with open_onnx(args.model) as file:
        if args.diff:
            with open_onnx(args.diff) as other:
                return _compare(file, other, as_json=args.json)
        if args.netron:
            return _show_in_netron(file.path)
        return _show(file, (args.shape[0], args.shape[-1]) if args.shape else None, as_json=args.json)


def _show(file: OnnxFile, asked: tuple[int, int] | None, *, as_json: bool) -> int:
    from rich.console import Console

    from dettools.flops.onnx_count import count_onnx
    from dettools.onnx_graph.model_file import OnnxFileError
    from dettools.onnx_graph.providers import check_providers
    from dettools.onnx_graph.summary import summarise
    from dettools.reports.graph_tables import graph_document, print_graph

    print(f"graph: reading {file.subject}", file=sys.stderr, flush=True)
    summary, providers = summarise(file), check_providers(file)
    cost, why_not = None, ""
    try:
        cost = count_onnx(file, asked)
    except OnnxFileError as error:
        why_not = str(error)
    if as_json:
        print(json.dumps(graph_document(summary, providers, cost, why_not)))
    else:
        print_graph(summary, providers, cost, why_not, Console())
    return 0


def _compare(file: OnnxFile, other: OnnxFile, *, as_json: bool) -> int:
    from rich.console import Console

    from dettools.onnx_graph.difference import compare_files
    from dettools.reports.graph_tables import print_changes

    changes = compare_files(file, other)
    if as_json:
        print(json.dumps({"equal": not changes, "changes": [vars(change) for change in changes]}))
    else:
        print_changes(changes, (file.subject, other.subject), Console())
    return 1 if changes else 0


def _show_in_netron(path: Path) -> int:
    from dettools.onnx_graph.model_file import OnnxFileError

    try:
        netron = importlib.import_module("netron")
    except ImportError as error:
        raise OnnxFileError(
            "--netron: got no package netron, expected it to draw the graph. Install it with: pip install netron"
        ) from error
    host, port = netron.start(str(path), address=("127.0.0.1", None))
    print(f"graph: {path.name} is shown on http://{host}:{port} until Ctrl-C", file=sys.stderr, flush=True)
    netron.wait()
    return 0
