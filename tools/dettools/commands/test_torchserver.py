"""``detserve test-torchserver``: MMDetection's script by its name and flags; `detserve compare` does the work."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

_ADDRESS = "127.0.0.1:8080"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "test-torchserver",
        help="as MMDetection's script of that name: `compare` with its flags",
        description="Compare what TorchServe answers with what PyTorch finds, with the flags of MMDetection's "
        "test_torchserver.py. The same as `detserve compare`, which has more of them; the command is told before it "
        "runs. Both sides get the threshold, and a difference is a table and exit code 1 instead of a traceback. "
        "No window is opened: with --work-dir the two pictures are written side by side into IMG's name, .png.",
    )
    parser.add_argument("img", help="image file")
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument("model_name", help="the model name in the server")
    parser.add_argument(
        "--inference-addr",
        metavar="HOST:PORT",
        help=f"of the inference server (default: that of `detserve serve start`, else {_ADDRESS}); its token is taken "
        "from there, or from $DETSERVE_TOKEN",
    )
    parser.add_argument("--device", help="of PyTorch's inference (default: cuda:0 where there is one, else cpu)")
    parser.add_argument("--score-thr", type=float, default=0.5, metavar="S", help="box score threshold (default: 0.5)")
    parser.add_argument("--work-dir", metavar="DIR", help="where the picture and comparison.json are written")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare; return the exit code."""
    import torch
    from detserve.instance import Instance

    from dettools.cli import main

    running = Instance.named(None).running()
    command = arguments(
        args, own_url=running.inference_url if running else None, has_cuda=bool(torch.cuda.is_available())
    )
    print(f"test-torchserver: {shlex.join(['detserve', *command])}", file=sys.stderr, flush=True)
    return main(command)


def arguments(args: argparse.Namespace, *, own_url: str | None, has_cuda: bool) -> list[str]:
    """Return the command line of `detserve compare`.

    Args:
        args: of this command.
        own_url: where this machine's own server answers, whose token is known; None without one.
        has_cuda: whether torch sees a GPU.
    """
    command = ["compare", args.config, args.checkpoint, "--model", args.model_name, args.img]
    command += ["--score-threshold", str(args.score_thr)]
    command += ["--device", args.device or ("cuda:0" if has_cuda else "cpu")]
    url = _url(args.inference_addr or _ADDRESS)
    if own_url is None or (args.inference_addr and url != _url(own_url)):
        command += ["--url", url]
    return command + (["--work-dir", args.work_dir] if args.work_dir else [])


def _url(address: str) -> str:
    text = address if "://" in address else f"http://{address}"
    return text.rstrip("/").replace("//localhost:", "//127.0.0.1:")
