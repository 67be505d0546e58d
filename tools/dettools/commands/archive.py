"""``detserve archive``: pack a spec, or a torchvision checkpoint, into a `.mar`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from dethandlers.spec import Spec


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "archive",
        help="pack a detector into a .mar that TorchServe serves",
        description="Pack a spec, or a torchvision checkpoint, into MODEL_STORE/NAME.mar. The checkpoint is read "
        "without executing anything in it; nothing is written unless the packed model reproduces eager inference on "
        "the golden image.",
    )
    parser.add_argument("spec", nargs="?", type=Path, metavar="SPEC.yaml", help="spec of the model")
    parser.add_argument("--torchvision", metavar="BUILDER", help="no spec: a builder of torchvision.models.detection")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="checkpoint (.pth, .safetensors, .onnx)")
    parser.add_argument("--categories", type=Path, metavar="COCO.json", help="annotation file that names the classes")
    parser.add_argument("--name", help="model name (default: the spec's, or the stem of the weights)")
    parser.add_argument("--model-version", metavar="V", help="model version (default: the spec's, or 1.0)")
    parser.add_argument("--num-classes", type=int, metavar="K", help="the builder's num_classes (default: found out)")
    parser.add_argument("--norm-eps", type=float, metavar="E", help="epsilon of frozen batch norms (COCO_V1: 0)")
    parser.add_argument(
        "--builder-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="keyword argument of the builder, the value in YAML (min_size=640); repeatable",
    )
    parser.add_argument(
        "--serving",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one of the spec's serving settings (score_threshold=0.3, precision=fp16); repeatable",
    )
    parser.add_argument("--golden-image", type=Path, metavar="IMAGE", help="image for the golden check")
    parser.add_argument("--out", type=Path, metavar="FILE.mar", help="default: MODEL_STORE/NAME.mar")
    parser.add_argument("--model-store", type=Path, metavar="DIR", help="default: $DETSERVE_MODEL_STORE or model_store")
    parser.add_argument("-f", "--force", action="store_true", help="replace an archive that exists")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build the archive; return the exit code."""
    from detserve.errors import DetserveError

    if (args.spec is None) == (args.torchvision is None):
        raise DetserveError("give either SPEC.yaml or --torchvision BUILDER.")
    if args.torchvision is not None:
        missing = [f"--{name}" for name in ("weights", "categories") if getattr(args, name) is None]
        if missing:
            raise DetserveError(f"--torchvision also needs {' and '.join(missing)}.")

    from detserve.archive import build_archive
    from detserve.model_store import archive_path, default_model_store, spec_path
    from detserve.spec import dump_spec, load_spec, override_spec, parse_spec

    store: Path = args.model_store or default_model_store()
    changes = _changes(args)
    if args.spec is not None:
        spec, folder = override_spec(load_spec(args.spec), changes, where="command line"), args.spec.parent
    else:
        base = {"name": args.weights.stem, "family": "torchvision", "builder": args.torchvision}
        base["categories"] = str(args.categories.resolve())
        spec = parse_spec({**base, **changes}, where="command line", folder=Path())
        folder = Path()
    out: Path = args.out or archive_path(store, spec.name)
    built = build_archive(
        spec,
        folder=folder,
        out=out,
        weights=args.weights,
        golden_image=args.golden_image,
        force=args.force,
        on_progress=lambda step: print(f"archive: {step}", file=sys.stderr),
    )
    written: Path | None = None
    if args.torchvision is not None:
        # `compare` and `evaluate` find the source checkpoint by this spec.
        written = spec_path(store, spec.name)
        dump_spec(_with_paths(spec, args), written)
    size = out.stat().st_size
    for note in built.notes:
        print(f"archive: note: {note}", file=sys.stderr)
    print(
        f"{out}: {spec.name} {spec.version}, {spec.builder or spec.family}, {len(spec.categories)} classes, "
        f"{size / 1e6:.1f} MB, golden image with {built.golden_detections} detections"
    )
    if written is not None:
        print(f"{written}: its spec")
    if args.json:
        document = {
            "archive": str(out),
            "name": spec.name,
            "version": spec.version,
            "bytes": size,
            "golden_detections": built.golden_detections,
            "source_sha256": built.spec.source.sha256 if built.spec.source else None,
            "spec": None if written is None else str(written),
            "notes": list(built.notes),
        }
        print(json.dumps(document))
    return 0


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    given = {
        "name": args.name,
        "version": args.model_version,
        "num_classes": args.num_classes,
        "norm_eps": args.norm_eps,
    }
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if args.spec is not None and args.categories is not None:
        changes["categories"] = str(args.categories.resolve())
    for key, words in (("builder_options", args.builder_option), ("serving", args.serving)):
        if words:
            changes[key] = _pairs(words, key)
    return changes


def _pairs(words: list[str], what: str) -> dict[str, Any]:
    import yaml
    from detserve.errors import SpecError

    pairs: dict[str, Any] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise SpecError(f"{what}: got {word!r}, expected KEY=VALUE.")
        try:
            pairs[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SpecError(f"{what}: {key}: got {text!r}, which is no YAML value.") from error
    return pairs


def _with_paths(spec: Spec, args: argparse.Namespace) -> Spec:
    from dataclasses import replace

    golden = str(args.golden_image.resolve()) if args.golden_image else ""
    return replace(spec, weights=str(args.weights.resolve()), golden_image=golden)
