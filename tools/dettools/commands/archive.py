"""``detserve archive``: pack a spec, a checkpoint of torchvision or MMDetection, or an exported file into a `.mar`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dettools.model_source import add_model_arguments, read_source, require_free_spec, write_spec

if TYPE_CHECKING:
    import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "archive",
        help="pack a detector into a .mar that TorchServe serves",
        description="Pack a spec, a torchvision checkpoint, MMDetection's config and checkpoint, a file of "
        "`detserve export`, or what is in an archive of MMDetection's own script into MODEL_STORE/NAME.mar. "
        "An exported file holds all that is needed. A checkpoint is read without executing anything in it; nothing is "
        "written unless the packed model reproduces eager inference on the golden image.",
    )
    add_model_arguments(parser, takes="SPEC.yaml|CONFIG.py|FILE.onnx|OLD.mar")
    parser.add_argument("--out", type=Path, metavar="FILE.mar", help="default: MODEL_STORE/NAME.mar")
    parser.add_argument("--model-store", type=Path, metavar="DIR", help="default: $DETSERVE_MODEL_STORE or model_store")
    parser.add_argument("--sign", type=Path, metavar="KEY.pem", help="private key: also write FILE.mar.sig")
    parser.add_argument("-f", "--force", action="store_true", help="replace an archive that exists")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build the archive; return the exit code."""
    from detserve.model_store import default_model_store

    from dettools.archive_repair import original_unpacked

    store: Path = args.model_store or default_model_store()
    with original_unpacked(args, store) as notes:
        return _build(args, store, notes)


def _build(args: argparse.Namespace, store: Path, notes: tuple[str, ...]) -> int:
    from detserve.archive import build_archive
    from detserve.model_store import archive_path, spec_path
    from detserve.signature import drop_stale_signature, load_private_key, sign_archive, signature_path

    if args.sign is not None:
        load_private_key(args.sign)  # before the work, not after it
    source = read_source(args)
    spec = source.spec
    out: Path = args.out or archive_path(store, spec.name)
    require_free_spec(source, spec_path(store, spec.name), force=args.force)
    built = build_archive(
        spec,
        folder=source.folder,
        out=out,
        weights=source.weights,
        golden_image=args.golden_image,
        golden=source.golden,
        force=args.force,
        allow_code=source.allow_code,
        on_progress=lambda step: print(f"archive: {step}", file=sys.stderr),
    )
    signature = None if args.sign is None else sign_archive(out, args.sign)
    if signature is None and drop_stale_signature(out):
        notes += (f"{signature_path(out).name} was about the archive before, and is removed; sign again with --sign",)
    written: Path | None = None
    if source.described_here:
        # `compare` and `evaluate` find the source checkpoint by this spec.
        written = spec_path(store, spec.name)
        write_spec(source, args.golden_image, written)
    size = out.stat().st_size
    notes += built.notes
    for note in notes:
        print(f"archive: note: {note}", file=sys.stderr)
    print(
        f"{out}: {spec.name} {spec.version}, {spec.builder or spec.family}, {len(spec.categories)} classes, "
        f"{size / 1e6:.1f} MB, golden image with {built.golden_detections} detections"
    )
    if written is not None:
        print(f"{written}: its spec")
    if signature is not None:
        print(f"{signature_path(out)}: signed by the key {signature.key}")
    if args.json:
        document = {
            "archive": str(out),
            "name": spec.name,
            "version": spec.version,
            "bytes": size,
            "golden_detections": built.golden_detections,
            "source_sha256": built.spec.source.sha256 if built.spec.source else None,
            "signed_by": None if signature is None else signature.key,
            "spec": None if written is None else str(written),
            "notes": list(notes),
        }
        print(json.dumps(document))
    return 0
