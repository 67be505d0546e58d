"""``detserve inspect``: what an archive or an exported file holds, without executing anything in it."""

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
        help="show what an archive or an exported file holds",
        description="Show an archive's model, category map, serving settings and members, or what an exported ONNX "
        "file says of itself. Every member's digest is checked; nothing is executed.",
    )
    parser.add_argument(
        "archive", metavar="ARCHIVE", help="a .mar, a name in the model store, or an exported .onnx file"
    )
    parser.add_argument("--model-store", type=Path, metavar="DIR", help="default: $DETSERVE_MODEL_STORE or model_store")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show the archive or the file; return the exit code."""
    if Path(args.archive).suffix == ".onnx":
        return _run_exported(Path(args.archive), as_json=args.json)
    from dethandlers.artefact import CATEGORY_MAP_FILE, GOLDEN_FILE, SPEC_FILE, parse_category_map
    from dethandlers.errors import ArtefactError
    from dethandlers.spec import Spec
    from detserve.errors import ArchiveError
    from detserve.mar import MANIFEST_FILE, check_archive, read_json_member
    from detserve.model_store import default_model_store, find_archive
    from detserve.signature import read_signature

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
    signature = read_signature(path)
    document: dict[str, Any] = {
        "archive": str(path),
        "bytes": path.stat().st_size,
        "manifest": read_json_member(path, MANIFEST_FILE),
        "spec": spec,
        "categories": categories,
        "golden": golden,
        "signature": None if signature is None else vars(signature),
        "members": [vars(member) for member in members],
    }
    if args.json:
        print(json.dumps(document))
        return 0
    from rich.console import Console

    from dettools.reports.archives import print_archive

    print_archive(document, Console())
    return 0


def _run_exported(path: Path, *, as_json: bool) -> int:
    from dethandlers.artefact import category_map_json, digest_file, golden_json
    from detserve.export.onnx_file import read_signature, require_described

    described = require_described(path)
    golden = None if described.golden is None else golden_json(described.golden[1], described.golden[0])
    signature = read_signature(path)
    document: dict[str, Any] = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": digest_file(path),
        "spec": described.spec.to_json(),
        "categories": category_map_json(described.spec.categories),
        "golden": golden,
        "export": described.facts,
        "inputs": [vars(one) for one in signature.inputs],
        "outputs": [vars(one) for one in signature.outputs],
    }
    if as_json:
        print(json.dumps(document))
        return 0
    from rich.console import Console

    from dettools.reports.archives import print_exported

    print_exported(document, Console())
    return 0
