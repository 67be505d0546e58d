"""``detserve verify``: every member as built, and the golden detections reproduced."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "verify",
        help="check an archive's members and reproduce its golden detections",
        description="Check the SHA-256 of every member, and run the installed worker code on the archive's golden "
        "image: it must find what eager inference found when the archive was built. Nothing in the archive is "
        "executed. Exit code 0: verified; 1: the detections drifted; 2: damaged or no archive.",
    )
    parser.add_argument("archive", metavar="ARCHIVE", help="a .mar, or a name in the model store")
    parser.add_argument("--model-store", type=Path, metavar="DIR", help="default: $DETSERVE_MODEL_STORE or model_store")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify the archive; return the exit code."""
    from detserve.archive import verify_archive
    from detserve.model_store import default_model_store, find_archive

    path = find_archive(args.archive, args.model_store or default_model_store())
    found = verify_archive(path)
    for note in found.notes:
        print(f"verify: note: {note}", file=sys.stderr)
    golden = (
        "no golden image"
        if found.golden_detections is None
        else f"golden check FAILED: {found.drift}"
        if found.drift
        else f"{found.golden_detections} golden detections reproduced"
    )
    print(f"{path}: {len(found.members)} members as built, {golden}")
    if args.json:
        document = {
            "archive": str(path),
            "verified": not found.drift,
            "members": len(found.members),
            "golden_detections": found.golden_detections,
            "drift": found.drift,
            "notes": list(found.notes),
        }
        print(json.dumps(document))
    return 1 if found.drift else 0
