"""``detserve verify``: every member as built, the golden detections reproduced, the declared AP reached."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from dettools.verification.labelled import LabelledCheck

_SPECS = (".yaml", ".yml")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "verify",
        help="check an archive's members, its golden detections, and its declared AP on labelled images",
        description="Check the SHA-256 of every member, and run the installed worker code on the archive's golden "
        "image: it must find what eager inference found when the archive was built. With --images and --annotations, "
        "also measure AP by the worker code and hold it to what the spec declares (accuracy.ap): a wrong description "
        "of the input, the decoding or the classes shows there and nowhere else, and the descriptions that would fit "
        "are looked for. An exported file is also held to the certificate beside it. With --trusted-key "
        "the archive must be signed by a key that is trusted. Nothing in the archive is executed. Exit code 0: "
        "verified; 1: the detections drifted, or AP is below what is declared; 2: damaged or no archive.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a .mar, a name in the model store, a file of export; with --images also a spec"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a checkpoint instead of the spec's")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder with labelled images")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="their COCO annotation file")
    parser.add_argument("--expect-ap", type=float, metavar="AP", help="AP as a fraction, instead of the spec's")
    parser.add_argument(
        "--ap-tolerance", type=float, default=0.005, metavar="AP", help="it may be below by this (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N, for the images (default: cpu)")
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="import what an MMDetection model's config names; it runs here",
    )
    parser.add_argument(
        "--trusted-key",
        type=Path,
        action="append",
        metavar="KEY",
        help="public key, or folder of them, one of which must have signed the archive",
    )
    parser.add_argument("--model-store", type=Path, metavar="DIR", help="default: $DETSERVE_MODEL_STORE or model_store")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify the model; return the exit code."""
    from detserve.model_store import default_model_store, find_archive

    _require_consistent(args)
    store = args.model_store or default_model_store()
    is_spec = Path(args.model).suffix in _SPECS
    is_file = Path(args.model).suffix == ".onnx"
    model = Path(args.model) if is_spec or is_file else find_archive(args.model, store)
    document: dict[str, Any] = {"model": str(model)}
    if is_file:
        document = _verify_exported(model)
    elif not is_spec:
        document = _verify_archive(model, allow_code=args.allow_code, trusted_keys=args.trusted_key)
    verified = is_spec or document["verified"]
    if args.images is not None:
        check = _verify_labelled(args, model, store)
        document["labelled"] = check.to_json()
        verified = verified and check.passed
    document["verified"] = verified
    if args.json:
        print(json.dumps(document))
    return 0 if verified else 1


def _verify_archive(path: Path, *, allow_code: bool, trusted_keys: list[Path] | None) -> dict[str, Any]:
    from detserve.archive import verify_archive
    from detserve.signature import check_signature, read_signature

    # First: of what nobody vouches for nothing is read.
    signed_by = None if trusted_keys is None else check_signature(path, trusted_keys)
    if trusted_keys is None and (signature := read_signature(path)) is not None:
        print(
            f"verify: note: a signature of the key {signature.key} lies beside it; check it with --trusted-key",
            file=sys.stderr,
        )
    found = verify_archive(path, allow_code=allow_code)
    for note in found.notes:
        print(f"verify: note: {note}", file=sys.stderr)
    golden = _golden(found.golden_detections, found.drift)
    print(f"{path}: {len(found.members)} members as built, {golden}{f', signed by {signed_by}' if signed_by else ''}")
    return {
        "archive": str(path),
        "verified": not found.drift,
        "members": len(found.members),
        "golden_detections": found.golden_detections,
        "drift": found.drift,
        "signed_by": signed_by,
        "notes": list(found.notes),
    }


def _golden(detections: int | None, drift: str) -> str:
    if detections is None:
        return "no golden detections reproduced"
    return f"golden check FAILED: {drift}" if drift else f"{detections} golden detections reproduced"


def _verify_exported(path: Path) -> dict[str, Any]:
    from detserve.archive import verify_exported

    from dettools.verification.parity_certificate import certified

    found = verify_exported(path)
    proof = certified(path)
    golden = _golden(found.golden_detections, found.drift)
    words: dict[bool | None, str] = {
        True: ", the file that its certificate is about",
        False: ", NOT the file that its certificate is about",
    }
    print(f"{path}: {found.spec.name} {found.spec.version}, {golden}{words.get(proof, '')}")
    return {
        "file": str(path),
        "verified": not found.drift and proof is not False,
        "golden_detections": found.golden_detections,
        "drift": found.drift,
        "certified": proof,
    }


def _verify_labelled(args: argparse.Namespace, model: Path, store: Path) -> LabelledCheck:
    from dettools.local_detector import open_detector, torch_device
    from dettools.reports.progress import progress
    from dettools.verification.labelled import check_labelled

    with (
        progress() as show,
        open_detector(
            model,
            model_store=store,
            weights=args.weights,
            device=args.device,
            allow_code=args.allow_code,
            on_progress=lambda what: print(f"verify: {what}", file=sys.stderr),
        ) as detector,
    ):
        check = check_labelled(
            detector,
            images=args.images,
            annotations=args.annotations,
            device=torch_device(args.device),
            expect_ap=args.expect_ap,
            tolerance=args.ap_tolerance,
            on_progress=show,
        )
    for note in check.notes:
        print(f"verify: note: {note}", file=sys.stderr)
    print(f"{model}: {'' if check.passed else 'FAILED: '}{check.sentence()}")
    return check


def _require_consistent(args: argparse.Namespace) -> None:
    from detserve.errors import DetserveError

    if (args.images is None) != (args.annotations is None):
        raise DetserveError("got one of --images and --annotations, expected both or neither. Give the other.")
    if args.weights is not None and Path(args.model).suffix not in _SPECS:
        raise DetserveError(f"--weights: got it with {args.model}, whose weights are inside. Leave it out.")
    if args.trusted_key is not None and Path(args.model).suffix in (*_SPECS, ".onnx"):
        raise DetserveError(f"--trusted-key: got it with {args.model}; expected an archive. Leave it out.")
    if args.images is not None:
        return
    if args.expect_ap is not None:
        raise DetserveError("--expect-ap: got it without labelled images. Give --images and --annotations.")
    if Path(args.model).suffix in _SPECS:
        raise DetserveError(
            f"model: got the spec {args.model} without labelled images, expected an archive. Give --images and "
            "--annotations, or build the archive: detserve archive."
        )
