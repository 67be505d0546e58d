"""What a command packs or exports: a spec, a torchvision checkpoint, MMDetection's config and checkpoint, or a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detserve.errors import DetserveError, SpecError

if TYPE_CHECKING:
    import argparse

    from dethandlers.artefact import Golden
    from dethandlers.spec import Spec


_CHECKPOINTS = (".pth", ".pt", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class ModelSource:
    """A model as the command line names it.

    Attributes:
        spec: with the command line's changes.
        folder: what its paths are relative to.
        weights: checkpoint or ONNX file instead of the spec's; None for the spec's own.
        allow_code: whether a config of MMDetection may be run, and what it imports.
        golden: golden image and eager's detections, of an exported file.
        described_here: whether there is no spec but the command line.
    """

    spec: Spec
    folder: Path
    weights: Path | None
    golden: tuple[str, Golden] | None
    described_here: bool
    allow_code: bool = False


def add_model_arguments(parser: argparse.ArgumentParser, *, takes: str) -> None:
    """Add the arguments that name and change a model.

    Args:
        parser: of the command.
        takes: the positional's metavar.
    """
    parser.add_argument("spec", nargs="?", type=Path, metavar=takes, help="what describes the model")
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, metavar="CHECKPOINT.pth", help="its weights, after MMDetection's CONFIG.py"
    )
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
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="file or package of your own that MMDetection's config imports (custom_imports); packed along; repeatable",
    )
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="run a config of MMDetection that is more than a literal, and import its custom_imports",
    )
    parser.add_argument("--golden-image", type=Path, metavar="IMAGE", help="image for the golden check")


def read_source(args: argparse.Namespace) -> ModelSource:
    """Return what the command line names.

    Raises:
        DetserveError: nothing, or two things at once, or something that cannot be read.
    """
    config = args.spec if args.spec is not None and args.spec.suffix == ".py" else None
    if config is not None and args.torchvision is None:
        return _mmdet_source(args, config)
    for given, option in ((args.checkpoint, str(args.checkpoint)), (args.module, "--module")):
        if given:
            raise DetserveError(f"got {option} without a config of MMDetection. Give CONFIG.py CHECKPOINT.pth.")
    if (args.spec is None) == (args.torchvision is None):
        raise DetserveError("give either SPEC.yaml or --torchvision BUILDER; `archive` also takes a file of `export`.")
    if args.torchvision is not None:
        missing = [f"--{name}" for name in ("weights", "categories") if getattr(args, name) is None]
        if missing:
            raise DetserveError(f"--torchvision also needs {' and '.join(missing)}.")

    from detserve.spec import load_spec, override_spec, parse_spec

    if args.spec is not None and args.spec.suffix in _CHECKPOINTS:
        raise SpecError(
            f"got the checkpoint {args.spec.name}, expected what describes it: a spec, or --torchvision BUILDER "
            f"--weights {args.spec.name} --categories COCO.json, or MMDetection's CONFIG.py {args.spec.name}."
        )
    changes = _changes(args)
    if args.spec is None:
        base = {"name": args.weights.stem, "family": "torchvision", "builder": args.torchvision}
        base["categories"] = str(args.categories.resolve())
        spec = parse_spec({**base, **changes}, where="command line", folder=Path())
        return ModelSource(spec, Path(), args.weights, None, described_here=True)
    if args.spec.suffix != ".onnx":
        loaded = load_spec(args.spec, weights=args.weights, categories=args.categories, allow_code=args.allow_code)
        spec = override_spec(loaded, changes, where="command line")
        return ModelSource(spec, args.spec.parent, args.weights, None, described_here=False, allow_code=args.allow_code)
    held = {
        "--weights": args.weights,
        "--categories": args.categories,
        "--num-classes": args.num_classes,
        "--norm-eps": args.norm_eps,
        "--builder-option": args.builder_option or None,
    }
    given = next((name for name, value in held.items() if value is not None), None)
    if given:
        raise SpecError(f"{given}: got it with {args.spec.name}, which is exported with its own. Leave it out.")

    from detserve.export.onnx_file import require_described

    described = require_described(args.spec)
    spec = override_spec(described.spec, changes, where="command line")
    golden = described.golden if args.golden_image is None else None
    return ModelSource(spec, args.spec.parent, args.spec, golden, described_here=False)


def _mmdet_source(args: argparse.Namespace, config: Path) -> ModelSource:
    """Describe MMDetection's config and checkpoint; their classes are the map unless --categories says otherwise."""
    from detserve.mmdet_checkpoint import read_checkpoint
    from detserve.mmdet_config import read_config
    from detserve.mmdet_source import found_categories
    from detserve.spec import override_spec, parse_spec

    checkpoint = args.checkpoint or args.weights
    if checkpoint is None:
        raise DetserveError(f"got {config} alone, expected its checkpoint too: CONFIG.py CHECKPOINT.pth.")
    held = {"--num-classes": args.num_classes, "--norm-eps": args.norm_eps, "--builder-option": args.builder_option}
    given = next((name for name, value in held.items() if value), None)
    if given or (args.checkpoint and args.weights):
        raise SpecError(f"{given or '--weights'}: got it with {config.name}, which tells that itself. Leave it out.")
    values = read_config(config, allow_code=args.allow_code)
    base: dict[str, Any] = {"name": checkpoint.stem, "family": "mmdet", "config": str(config)}
    model = values.values.get("model")
    base["builder"] = str(model.get("type", "")) if isinstance(model, dict) else ""
    if args.categories is not None:
        base["categories"] = str(args.categories.resolve())
    else:
        base["categories"] = [vars(one) for one in found_categories(values, read_checkpoint(checkpoint))]
    # A quarter faster on a CPU, and what tensor cores want on a GPU.
    base["serving"] = {"channels_last": True}
    if args.module:
        base["modules"] = [str(path) for path in args.module]
    changes = {key: value for key, value in _changes(args).items() if key != "categories"}
    spec = override_spec(parse_spec(base, where="command line", folder=Path()), changes, where="command line")
    return ModelSource(spec, Path(), checkpoint, None, described_here=True, allow_code=args.allow_code)


def require_free_spec(source: ModelSource, path: Path, *, force: bool) -> None:
    """Refuse to go on when the spec that will be written is there already.

    Raises:
        SpecError: it is, and nobody said that it may be replaced.
    """
    if source.described_here and path.exists() and not force:
        raise SpecError(f"spec {path}: exists already. Replace it with --force, or give the model another --name.")


def write_spec(source: ModelSource, golden_image: Path | None, path: Path) -> None:
    """Write down what the command line described: `compare` and `evaluate` find the source checkpoint by it.

    Raises:
        SpecError: it cannot be written there.
    """
    from detserve.spec import dump_spec

    def absolute(name: str | Path | None) -> str:
        return str((source.folder / name).resolve()) if name else ""

    spec = replace(
        source.spec,
        weights=absolute(source.weights),
        golden_image=absolute(golden_image),
        config=absolute(source.spec.config),
        modules=tuple(absolute(name) for name in source.spec.modules),
    )
    dump_spec(spec, path)


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
