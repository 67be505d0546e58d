"""``detserve mmdet2torchserve``: MMDetection's script by its name and flags; `detserve archive` does the work."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "mmdet2torchserve",
        help="as MMDetection's script of that name: `archive` with its flags",
        description="Convert an MMDetection model (config and checkpoint) to a TorchServe .mar, with the flags of "
        "MMDetection's mmdet2torchserve.py. The same as `detserve archive`, which has more of them; the command is "
        "told before it runs. The folder also gets the model's spec, by which `compare` finds the checkpoint.",
    )
    parser.add_argument("config", help="config file path")
    parser.add_argument("checkpoint", help="checkpoint file path")
    parser.add_argument("--output-folder", required=True, metavar="DIR", help="folder where MODEL_NAME.mar is created")
    parser.add_argument("--model-name", metavar="NAME", help="default: the stem of the checkpoint")
    parser.add_argument("--model-version", default="1.0", metavar="V", help="default: %(default)s")
    parser.add_argument("-f", "--force", action="store_true", help="overwrite the existing MODEL_NAME.mar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Pack; return the exit code."""
    from dettools.cli import main

    command = arguments(args)
    print(f"mmdet2torchserve: {shlex.join(['detserve', *command])}", file=sys.stderr, flush=True)
    return main(command)


def arguments(args: argparse.Namespace) -> list[str]:
    """Return the command line of `detserve archive`."""
    command = ["archive", args.config, args.checkpoint, "--model-store", args.output_folder]
    command += ["--name", args.model_name] if args.model_name else []
    command += ["--model-version", args.model_version]
    return command + (["--force"] if args.force else [])
