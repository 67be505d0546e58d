"""``detserve inspect``: what an archive holds, without executing anything in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what an archive holds",
        description="Show an archive's model, category map, serving settings and members. Every member's digest is "
        "checked; nothing in the archive is executed.",
    )
    parser.add_argument("archive", metavar="ARCHIVE", help="a .mar, or a name in the model store")
    parser.add_argument("--model-store", type=Path, metavar="DIR", help="default: $DETSERVE_MODEL_STORE or model_store")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show the archive; return the exit code."""
    from dethandlers.artefact import CATEGORY_MAP_FILE, GOLDEN_FILE, SPEC_FILE, parse_category_map
    from dethandlers.errors import ArtefactError
    from dethandlers.spec import Spec
    from detserve.errors import ArchiveError
    from detserve.mar import MANIFEST_FILE, check_archive, read_json_member
    from detserve.model_store import default_model_store, find_archive

    path = find_archive(args.archive, args.model_store or default_model_store())
    members = check_archive(path)
    names = {member.name for member in members}
    if SPEC_FILE not in names:
        raise ArchiveError(
            f"archive {path.name}: no {SPEC_FILE} in it, so it was not built by detserve. It may still be served; see "
            f"its files with `unzip -l {path}`."
        )
    spec = read_json_member(path, SPEC_FILE)
    categories = read_json_member(path, CATEGORY_MAP_FILE)
    golden = read_json_member(path, GOLDEN_FILE) if GOLDEN_FILE in names else None
    try:
        Spec.from_json(spec, parse_category_map(categories))
        if golden is not None:
            len(golden["scores"]), golden["image"]
    except (ArtefactError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArchiveError(
            f"archive {path.name}: its spec, category map or golden detections are not what this detserve writes "
            f"({type(error).__name__}: {error}). Build it again with `detserve archive`."
        ) from error
    document: dict[str, Any] = {
        "archive": str(path),
        "bytes": path.stat().st_size,
        "manifest": read_json_member(path, MANIFEST_FILE),
        "spec": spec,
        "categories": categories,
        "golden": golden,
        "members": [vars(member) for member in members],
    }
    if args.json:
        print(json.dumps(document))
        return 0
    from rich.console import Console

    from dettools.reports.archives import print_archive

    print_archive(document, Console())
    return 0
