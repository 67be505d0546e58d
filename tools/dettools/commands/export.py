"""``detserve export``: a spec, or a checkpoint of torchvision or MMDetection, to an ONNX file that is proven equal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dettools.model_source import add_model_arguments, read_source, require_free_spec, write_spec

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from dethandlers.spec import Precision
    from detserve.export.model import ExportedFile

    from dettools.ground_truth import GroundTruth
    from dettools.model_source import ModelSource
    from dettools.verification.parity import Parity


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "export",
        help="turn a detector into an ONNX file that is proven equal",
        description="Export a spec, a torchvision checkpoint, or MMDetection's config and checkpoint (one-stage models "
        "and the DETR family) to ONNX. The file holds all that `detserve archive` needs: category map, preprocessing, "
        "decoding, thresholds, the golden detections and the checkpoint's SHA-256. "
        "It is written only if the worker's code finds in it what eager inference finds in the checkpoint, on the "
        "golden image at four sizes, alone and in a batch. With --verify your own images are compared too, at two "
        "sizes and in batches of 1, 3 and 8, and a certificate is written beside the file. Exit code 0: exported; 1: "
        "refused by --verify; 2: cannot be exported.",
    )
    add_model_arguments(parser, takes="SPEC.yaml|CONFIG.py")
    parser.add_argument("--out", "--output-file", type=Path, metavar="FILE.onnx", help="default: MODEL_STORE/NAME.onnx")
    parser.add_argument("--precision", choices=("fp32", "fp16"), help="of the layers (default: the spec's, else fp32)")
    parser.add_argument(
        "--nms",
        choices=("graph", "host"),
        help="non-maximum suppression in the file, or in the detector (default: host for one-stage models, graph for "
        "two-stage ones)",
    )
    parser.add_argument("--opset", "--opset-version", type=int, metavar="N", help="16 to 20 (default: 17)")
    parser.add_argument(
        "--dynamic", metavar="AXES", help="batch, size, both with a comma, or none (default: all that the model allows)"
    )
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="images per run where the batch is not dynamic"
    )
    check = parser.add_argument_group("proof on your own images")
    check.add_argument("--verify", nargs="+", metavar="IMAGES", help="files, folders or patterns")
    check.add_argument("--annotations", type=Path, metavar="COCO.json", help="labels of the folder of --verify: AP")
    check.add_argument(
        "--ap-budget", type=float, metavar="AP", help="AP points that the file may cost (default: fp32 0.1, fp16 0.2)"
    )
    parser.add_argument("--model-store", type=Path, metavar="DIR", help="default: $DETSERVE_MODEL_STORE or model_store")
    parser.add_argument("-f", "--force", action="store_true", help="replace a file that exists")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export, and prove; return the exit code."""
    from detserve.errors import DetserveError
    from detserve.export.exporters import ExportOptions
    from detserve.export.tracing import DEFAULT_OPSET
    from detserve.model_store import default_model_store, spec_path

    from dettools.ground_truth import load_ground_truth

    source = read_source(args)
    if source.golden is not None or (args.spec is not None and args.spec.suffix == ".onnx"):
        raise DetserveError(f"got {args.spec}, which is exported already, expected a spec or a checkpoint.")
    if args.annotations is not None and (not args.verify or len(args.verify) != 1 or not Path(args.verify[0]).is_dir()):
        raise DetserveError("--annotations: expected --verify with the one folder whose images they label.")
    if args.ap_budget is not None and not 0 <= args.ap_budget <= 100:
        raise DetserveError(f"--ap-budget: got {args.ap_budget:g}, expected AP points from 0 to 100, such as 0.2.")
    out: Path = args.out or (args.model_store or default_model_store()) / f"{source.spec.name}.onnx"
    images = _images(args.verify)
    dynamic = None
    if args.dynamic is not None:
        dynamic = () if args.dynamic == "none" else tuple(word.strip() for word in args.dynamic.split(","))
    opset = DEFAULT_OPSET if args.opset is None else args.opset
    options = ExportOptions(_precision(args.precision, source), args.nms, opset, dynamic, args.batch)
    store: Path = args.model_store or default_model_store()
    require_free_spec(source, spec_path(store, source.spec.name), force=args.force)
    truth = load_ground_truth(args.annotations) if args.annotations else None

    parity: list[Parity] = []

    def prove(file: Path) -> str:
        parity.append(_prove(file, source, images, truth, args))
        return "; ".join(parity[0].refusals)

    from detserve.export.model import export_model

    exported = export_model(
        source.spec,
        folder=source.folder,
        out=out,
        weights=source.weights,
        golden_image=args.golden_image,
        options=options,
        force=args.force,
        allow_code=source.allow_code,
        prove=prove if images else None,
        on_progress=lambda step: print(f"export: {step}", file=sys.stderr),
    )
    return _report(exported, parity[0] if parity else None, source, args)


def _images(arguments: Sequence[str] | None) -> list[Path]:
    from dettools.image_files import find_images

    return find_images(arguments) if arguments else []


def _precision(given: Precision | None, source: ModelSource) -> Literal["fp32", "fp16"]:
    from detserve.errors import SpecError

    wanted = given or source.spec.serving.precision
    if wanted == "bf16":
        raise SpecError("serving.precision: got bf16, expected fp32 or fp16 for an ONNX file. Give --precision.")
    return wanted


def _prove(
    file: Path, source: ModelSource, images: Sequence[Path], truth: GroundTruth | None, args: argparse.Namespace
) -> Parity:
    from detserve.archive import checkpoint_path
    from detserve.eager import eager_from_source

    from dettools.local_detector import open_detector, open_source
    from dettools.reports.progress import progress
    from dettools.verification.parity_check import Sides, check_parity

    checkpoint = checkpoint_path(source.spec, source.folder, source.weights)
    with (
        open_source(
            source.spec, folder=source.folder, weights=source.weights, allow_code=source.allow_code
        ) as torch_detector,
        open_detector(file, model_store=Path()) as onnx_detector,
        progress() as show,
    ):
        return check_parity(
            Sides(
                eager_from_source(source.spec, checkpoint, folder=source.folder, allow_code=source.allow_code),
                torch_detector,
                onnx_detector,
            ),
            images,
            truth=truth,
            folder=Path(args.verify[0]) if truth is not None else None,
            ap_budget=None if args.ap_budget is None else args.ap_budget / 100,
            on_progress=show,
        )


def _report(exported: ExportedFile, parity: Parity | None, source: ModelSource, args: argparse.Namespace) -> int:
    from detserve.model_store import default_model_store, spec_path
    from rich.console import Console

    from dettools.reports.exports import print_export, print_parity
    from dettools.verification.parity_certificate import (
        certificate_path,
        remove_stale_certificate,
        write_certificate,
    )

    console = Console()
    certificate: Path | None = None
    notes = [*exported.notes, *(parity.notes if parity else ())]
    if parity is not None:
        certificate = certificate_path(exported.path, passed=not exported.refused)
        write_certificate(certificate, exported, parity)
    elif remove_stale_certificate(exported.path):
        notes.append("the certificate that lay beside it was about another file and was removed: prove it by --verify")
    if not exported.refused and source.described_here:
        written = spec_path(args.model_store or default_model_store(), source.spec.name)
        write_spec(source, args.golden_image, written)
        print(f"{written}: its spec")
    for note in notes:
        print(f"export: note: {note}", file=sys.stderr)
    print_export(exported, console)
    if parity is not None:
        print_parity(parity, console)
        console.print(f"{certificate}: {'refusal' if exported.refused else 'certificate'}", highlight=False)
    if exported.refused:
        print(f"export: refused, {exported.path} is not written: {exported.refused}", file=sys.stderr)
    if args.json:
        document: dict[str, Any] = {
            "file": None if exported.refused else str(exported.path),
            "refused": exported.refused or None,
            "certificate": None if certificate is None else str(certificate),
            "sha256": exported.sha256,
            "bytes": exported.bytes,
            "name": exported.spec.name,
            "version": exported.spec.version,
            "export": exported.facts.to_json(),
            "source": vars(exported.spec.source) if exported.spec.source else None,
            "golden_detections": exported.golden_detections,
            "parity": parity.to_json() if parity else None,
            "notes": notes,
        }
        print(json.dumps(document))
    return 1 if exported.refused else 0
