"""Building the archive: from a spec and its checkpoint to a `.mar` that a stock TorchServe can serve.

    spec + checkpoint ─► resolve ─► weights as safetensors or ONNX ─┐
    golden image ─► eager on the source checkpoint ─────────────────┤─► members ─► the worker's own code must reproduce
    dethandlers, copied whole; entry.py as the handler ─────────────┘              the golden detections ─► NAME.mar

Nothing is written before everything has been checked.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import dethandlers
import yaml
from dethandlers.artefact import (
    CATEGORY_MAP_FILE,
    GOLDEN_FILE,
    SPEC_FILE,
    Golden,
    category_map_json,
    digest_file,
    golden_json,
    load_artefact,
)
from dethandlers.errors import ArtefactError, DetectorError
from dethandlers.families.torchvision_detection import build_module
from dethandlers.mmdet_model import MODULES_FOLDER
from dethandlers.spec import Source, Spec
from safetensors import SafetensorError
from safetensors.torch import save
from torchvision.ops import FrozenBatchNorm2d

from detserve.checkpoint import load_state_dict
from detserve.eager import eager_from_source
from detserve.errors import ArchiveError, CheckpointError, SpecError
from detserve.export.onnx_file import described_artefact, read_described, require_described
from detserve.golden_drift import golden_drift
from detserve.golden_image import golden_detections, golden_image_of
from detserve.mar import MANIFEST_FILE, Member, check_archive, manifest_json, unpacked, write_mar
from detserve.mmdet_modules import drift_by_itself
from detserve.mmdet_source import code_in, mmdet_members
from detserve.resolve import resolve_spec

CONFIG_FILE = "model-config.yaml"
HANDLER_FILE = "entry.py"


@dataclass(frozen=True)
class BuiltArchive:
    """What was built.

    Attributes:
        path: the `.mar`.
        spec: as packed.
        members: of the archive.
        golden_detections: how many eager found on the golden image.
        notes: what a person should know.
    """

    path: Path
    spec: Spec
    members: list[Member]
    golden_detections: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Verification:
    """What ``verify_archive`` found.

    Attributes:
        spec: of the archive.
        members: each with its digest.
        golden_detections: of the golden image, or None when the archive has none.
        drift: on the golden image, as a sentence; empty when it is reproduced.
        notes: what a person should know.
    """

    spec: Spec
    members: list[Member]
    golden_detections: int | None
    drift: str
    notes: tuple[str, ...]


def build_archive(
    spec: Spec,
    *,
    folder: Path,
    out: Path,
    weights: Path | None = None,
    golden_image: Path | None = None,
    golden: tuple[str, Golden] | None = None,
    force: bool = False,
    allow_code: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> BuiltArchive:
    """Build an archive.

    Args:
        spec: what to pack.
        folder: what the spec's paths are relative to.
        out: the `.mar` to write.
        weights: checkpoint instead of the spec's.
        golden_image: image instead of the spec's; without either a generated scene is taken.
        golden: a golden image with its name and eager's detections, when they are known already.
        force: replace an existing archive.
        allow_code: a config of MMDetection that is no literal is run, and what it imports is imported.
        on_progress: told what is being done.

    Raises:
        DetserveError: something does not fit; no file is left.
    """
    if out.exists() and not force:
        raise ArchiveError(f"archive {out}: exists already. Replace it with --force, or choose another with --out.")
    checkpoint = checkpoint_path(spec, folder, weights)
    image = golden_image_of(spec, folder, golden_image)
    on_progress(f"reading {checkpoint}")
    if spec.family == "mmdet":
        members, packed, notes = mmdet_members(spec, folder, checkpoint, allow_code=allow_code)
    else:
        members, packed, notes = _weights_member(spec, checkpoint)
    if golden is None:
        if packed.runtime == "onnx" and packed.family == "torchvision":
            notes.append(
                "the golden detections come from the file itself, since its checkpoint is not inside: the golden check "
                "then proves the serving, not the export"
            )
        on_progress("eager inference on the golden image")
        golden = golden_detections(
            eager_from_source(spec, checkpoint, folder=folder, allow_code=allow_code), image, packed.serving
        )
    found = len(golden[1].detections)
    if not found:
        notes.append(
            "eager finds nothing on the golden image, so the golden check sees less; give one with objects by "
            "--golden-image"
        )
    members |= _described_members(packed, golden) | _code_members()
    members[MANIFEST_FILE] = manifest_json(
        name=packed.name,
        version=packed.version,
        serialized_file=packed.weights,
        handler=HANDLER_FILE,
        config_file=CONFIG_FILE,
    ).encode()
    on_progress("the worker's code reproduces the golden detections")
    _rehearse(members)
    written = write_mar(out, members)
    return BuiltArchive(out, packed, written, found, tuple(notes))


def verify_archive(path: Path, *, allow_code: bool = False) -> Verification:
    """Check every member's digest, and reproduce the golden detections by the installed worker code.

    Nothing that the archive contains is executed, unless that is allowed: a model of MMDetection may bring modules.

    Args:
        path: the `.mar`.
        allow_code: let the model import what its config names; else its golden detections are not reproduced.

    Raises:
        ArchiveError: a member is at fault, or the artefact cannot be loaded.
    """
    with unpacked(path) as folder:
        members = check_archive(path)
        try:
            artefact = load_artefact(folder)
            code = [] if allow_code else code_in(artefact)
            drift = "" if code else golden_drift(artefact)
        except DetectorError as error:
            raise ArchiveError(f"archive {path.name}: {error}") from error
        except SafetensorError as error:
            raise ArchiveError(
                f"archive {path.name}: the weights are no safetensors ({error}). Build it again."
            ) from error
        notes = []
        if code:
            notes.append(
                f"the model imports {', '.join(code)}, so the golden detections were not reproduced; allow that with "
                "--allow-code"
            )
        if _code_members() != {
            name: (folder / name).read_bytes() for name in _code_members() if (folder / name).is_file()
        }:
            notes.append(
                "the archive's worker code is not that of this detserve: the golden detections were reproduced by the "
                "installed one"
            )
        golden = None if artefact.golden is None or code else len(artefact.golden.detections)
        return Verification(artefact.spec, members, golden, drift, tuple(notes))


@dataclass(frozen=True)
class FileVerification:
    """What ``verify_exported`` found.

    Attributes:
        spec: as the file describes it.
        golden_detections: of the golden image, or None when the file has none.
        drift: on the golden image, as a sentence; empty when it is reproduced.
    """

    spec: Spec
    golden_detections: int | None
    drift: str


def verify_exported(path: Path) -> FileVerification:
    """Reproduce an exported file's golden detections by the installed worker code.

    Raises:
        ArchiveError: no exported file, or it cannot be loaded.
    """
    with described_artefact(path) as artefact:
        try:
            drift = golden_drift(artefact)
        except DetectorError as error:
            raise ArchiveError(f"{path.name}: {error}") from error
        golden = None if artefact.golden is None else len(artefact.golden.detections)
        return FileVerification(artefact.spec, golden, drift)


def checkpoint_path(spec: Spec, folder: Path, weights: Path | None) -> Path:
    """Return the checkpoint: the one given, or the spec's.

    Raises:
        SpecError: none is named.
        CheckpointError: it is no file.
    """
    if weights is not None:
        checkpoint = weights
    elif spec.weights:
        checkpoint = folder / spec.weights
    else:
        raise SpecError(f"spec {spec.name}: names no weights. Give them with --weights FILE.")
    if not checkpoint.is_file():
        raise CheckpointError(f"weights: got {checkpoint}, which is no file. Give the checkpoint with --weights FILE.")
    return checkpoint


def _weights_member(spec: Spec, checkpoint: Path) -> tuple[dict[str, bytes], Spec, list[str]]:
    """Return the weights as the archive keeps them, the spec as packed, and notes."""
    notes: list[str] = []
    source = Source(checkpoint.name, digest_file(checkpoint))
    if spec.runtime == "onnx":
        if checkpoint.suffix != ".onnx":
            raise SpecError(
                f"runtime: got 'onnx' with the weights {checkpoint.name}, expected an .onnx file. Set runtime: torch, "
                "or give the file that `detserve export` wrote."
            )
        # An exported file tells which checkpoint it was made from.
        source = spec.source or source
        content = checkpoint.read_bytes()
        packed = replace(resolve_spec(spec, None), weights="model.onnx", golden_image="", source=source)
        _require_agreement(packed, checkpoint)
        return {"model.onnx": content}, packed, notes
    state = load_state_dict(checkpoint)
    resolved = resolve_spec(spec, state)
    try:
        module = build_module(resolved, state)
    except ArtefactError as error:
        raise CheckpointError(str(error)) from error
    frozen = [norm for norm in module.modules() if isinstance(norm, FrozenBatchNorm2d)]
    if frozen and spec.norm_eps is None:
        resolved = replace(resolved, norm_eps=float(frozen[0].eps))
        notes.append(
            f"{len(frozen)} frozen batch norms in the checkpoint, no norm_eps in the spec: {frozen[0].eps:g} is taken. "
            "Set norm_eps: 0.0 (--norm-eps 0) when training began from torchvision's COCO_V1 weights"
        )
    # As stored, so that half-precision storage stays half the size; the module widens it on loading.
    kept = {name: state[name].contiguous() for name in module.state_dict()}
    packed = replace(resolved, weights="weights.safetensors", golden_image="", source=source)
    return {"weights.safetensors": save(kept)}, packed, notes


def _require_agreement(spec: Spec, file: Path) -> None:
    """Refuse a spec that says otherwise than the exported file that it is about."""
    described = read_described(file)
    if described is None:
        if spec.family == "torchvision":
            require_described(file)
        return
    inside = described.spec
    for key in ("family", "builder", "preprocessing", "decoding"):
        if getattr(spec, key) != getattr(inside, key):
            raise SpecError(
                f"{key}: the spec says otherwise than {file.name}, which holds its own description. Pack the file "
                f"alone: detserve archive {file.name}."
            )
    if [(one.name, one.model_label) for one in spec.categories] != [
        (one.name, one.model_label) for one in inside.categories
    ]:
        raise SpecError(
            f"categories: the spec's are not those of {file.name}, which holds its own. Pack the file alone: "
            f"detserve archive {file.name}."
        )


def _described_members(spec: Spec, golden: tuple[str, Golden]) -> dict[str, bytes]:
    name, content = golden
    serving = spec.serving
    config: dict[str, int | str] = {
        "minWorkers": serving.workers,
        "maxWorkers": serving.workers,
        "batchSize": serving.batch_size,
        "maxBatchDelay": serving.max_batch_delay_ms,
        "responseTimeout": serving.response_timeout_s,
        "startupTimeout": serving.startup_timeout_s,
    }
    # What the spec leaves open stays open: the server that serves it knows its machine.
    config = {key: value for key, value in config.items() if value}
    if serving.device != "auto":
        config["deviceType"] = serving.device
    return {
        SPEC_FILE: _json(spec.to_json()),
        CATEGORY_MAP_FILE: _json(category_map_json(spec.categories)),
        GOLDEN_FILE: _json(golden_json(content, name)),
        f"golden/{name}": content.image,
        CONFIG_FILE: yaml.safe_dump(config, sort_keys=False).encode(),
    }


def _code_members() -> dict[str, bytes]:
    """The worker's code: the package whole, and its entry once more at the root, where TorchServe wants the handler."""
    root = Path(dethandlers.__file__).parent
    members = {
        f"dethandlers/{path.relative_to(root).as_posix()}": path.read_bytes() for path in sorted(root.rglob("*.py"))
    }
    members[HANDLER_FILE] = members["dethandlers/entry.py"]
    return members


def _rehearse(members: Mapping[str, bytes]) -> None:
    """Load the members as the worker will, and compare with eager; a difference stops the build."""
    with tempfile.TemporaryDirectory(prefix="detserve-") as folder:
        for name, content in members.items():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        try:
            if any(name.startswith(f"{MODULES_FOLDER}/") for name in members):
                drift = drift_by_itself(Path(folder))
            else:
                drift = golden_drift(load_artefact(Path(folder), check_digests=False))
        except DetectorError as error:
            raise ArchiveError(f"the archive would not load: {error}") from error
    if drift:
        raise ArchiveError(
            f"not built: {drift}. What would be served differs from eager; check preprocessing, decoding and the "
            "category map in the spec."
        )


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
