"""``detserve publish``: strip, hash and verify a checkpoint for release."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from detserve.publish import Published


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "publish",
        help="strip a checkpoint for release, under a name that proves its content",
        description="Write a checkpoint's weights and what is needed to load them to OUT's folder, named by the first "
        "eight digits of the file's SHA-256 (released-1a2b3c4d.pth, as torch.hub checks it). Optimiser, training "
        "state, configuration, paths and names are left out; nothing in the checkpoint is executed, the release is "
        "read back and compared before it gets its name, and the same input gives the same file.",
    )
    parser.add_argument("in_file", type=Path, metavar="IN", help="checkpoint: .pth, .pt, .ckpt or .safetensors")
    parser.add_argument("out_file", type=Path, metavar="OUT", help="such as released.pth or released.safetensors")
    parser.add_argument(
        "--save-keys",
        nargs="+",
        default=["meta", "state_dict"],
        metavar="KEY",
        help="keys of the checkpoint to keep (default: meta state_dict)",
    )
    parser.add_argument(
        "--ema",
        choices=["auto", "use", "drop"],
        default="auto",
        help="averaged weights: use or drop them; auto takes what `detserve archive` takes (default)",
    )
    parser.add_argument("--half", action="store_true", help="store floating-point tensors as float16")
    parser.add_argument("--allow-nonfinite", action="store_true", help="publish NaN and infinite weights")
    parser.add_argument("-n", "--dry-run", action="store_true", help="show what would be written, and write nothing")
    parser.add_argument("-f", "--force", action="store_true", help="replace another file of the release's name")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Publish the checkpoint; return the exit code."""
    from detserve.publish import publish

    found = publish(
        args.in_file,
        args.out_file,
        save_keys=args.save_keys,
        ema=args.ema,
        half=args.half,
        allow_nonfinite=args.allow_nonfinite,
        dry_run=args.dry_run,
        force=args.force,
    )
    for note in found.notes:
        print(f"publish: note: {note}", file=sys.stderr)
    for one in found.dropped:
        print(f"dropped {one.key}: {_size(one.size)}")
    for one in found.scrubbed:
        print(f"scrubbed {one.key}: {_size(one.size)}, {one.reason}")
    kind = {True: ", the averaged ones", False: ", not averaged", None: ""}[found.averaged]
    print(f"weights: {found.weights or 'the state dict'}{kind}{', stored as float16' if found.half else ''}")
    state = "written and read back" if found.written else "would be written"
    if found.existed:
        state = "there already, the very same file"
    print(
        f"{found.path}: {state}, {found.tensors} tensors, {_size(found.size)} of {_size(found.source_size)}, "
        f"sha256 {found.sha256}"
    )
    if args.json:
        print(json.dumps(_document(found)))
    return 0


def _document(found: Published) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "sha256": found.sha256,
        "bytes": found.size,
        "tensors": found.tensors,
        "source": str(found.source),
        "source_bytes": found.source_size,
        "source_sha256": found.source_sha256,
        "weights": found.weights,
        "averaged": found.averaged,
        "half": found.half,
        "dropped": [{"key": one.key, "bytes": one.size} for one in found.dropped],
        "scrubbed": [{"key": one.key, "bytes": one.size, "reason": one.reason} for one in found.scrubbed],
        "written": found.written,
        "existed": found.existed,
        "notes": list(found.notes),
    }


def _size(count: int) -> str:
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= divisor:
            return f"{count / divisor:.1f} {unit}"
    return f"{count} bytes"
