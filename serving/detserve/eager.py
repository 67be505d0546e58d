"""Eager: the framework's own inference on the source checkpoint, the reference for everything that is served.

It shares no pre- or post-processing with the worker: one image goes in at a time, and torchvision's own transform,
forward and post-processing do the rest. (Only the decoder is the same library, Pillow; torchvision's is deprecated.)
For a foreign ONNX file there is no framework model; its references are those of `eager_onnx`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from dethandlers.artefact import load_artefact
from dethandlers.detections import Category, Detections
from dethandlers.mmdet_model import MODULES_FOLDER
from dethandlers.spec import Spec

from detserve.checkpoint import load_state_dict
from detserve.eager_exported import ExportedEager
from detserve.eager_image import decode_rgb as decode_rgb
from detserve.eager_mmdet_onnx import MmdetOnnxEager
from detserve.eager_onnx import ONNX_REFERENCES
from detserve.eager_torchvision import TorchvisionEager as TorchvisionEager
from detserve.errors import CheckpointError, DetserveError, SpecError
from detserve.export.onnx_file import require_described
from detserve.mar import unpacked
from detserve.mmdet_modules import module_folders
from detserve.mmdet_source import config_path
from detserve.model_store import archive_path, spec_path
from detserve.resolve import resolve_spec
from detserve.spec import load_spec


class EagerModel(Protocol):
    """The reference."""

    categories: tuple[Category, ...]
    source: str
    """What it runs, for people."""

    def detect(
        self, image: bytes, score_threshold: float, max_detections: int, *, masks: bool = False, keypoints: bool = False
    ) -> Detections:
        """Find objects in one encoded image, best score first, boxes in pixels after EXIF orientation."""
        ...


def load_eager(
    model: str | Path,
    *,
    model_store: Path,
    spec: Path | None = None,
    weights: Path | None = None,
    device: str = "cpu",
    allow_code: bool = False,
) -> EagerModel:
    """Find a model's source and load it.

    In this order: the spec given, or ``model`` itself when it is a spec or an archive, or the model store's spec with
    its weights. When those weights are not there, the archive's own weights are run, and ``source`` says so.

    Args:
        model: name in the model store, a ``.yaml`` spec, a ``.mar`` archive or an exported ``.onnx`` file.
        model_store: where names are looked up.
        spec: a spec instead of the model store's.
        weights: a checkpoint instead of the spec's.
        device: where torch runs it.
        allow_code: a config of MMDetection that is no literal is run, and what it imports is imported.

    Raises:
        DetserveError: no source is found, or it cannot be loaded.
    """
    path = Path(model)
    if spec is None and path.suffix == ".onnx":
        return eager_from_file(path)
    if spec is None and path.suffix in (".yaml", ".yml"):
        spec = path
    if spec is None and path.suffix != ".mar" and spec_path(model_store, str(model)).is_file():
        spec = spec_path(model_store, str(model))
    if spec is not None:
        described = load_spec(spec, weights=weights, allow_code=allow_code)
        checkpoint = weights or spec.parent / (described.weights or "-")
        if checkpoint.is_file():
            return eager_from_source(described, checkpoint, folder=spec.parent, device=device, allow_code=allow_code)
        if weights is not None or path.suffix in (".yaml", ".yml"):
            raise CheckpointError(f"weights: got {checkpoint}, which is no file. Give the checkpoint with --weights.")
    archive = path if path.suffix == ".mar" else archive_path(model_store, str(model))
    if not archive.is_file():
        raise DetserveError(
            f"model: got {str(model)!r}, but there is neither {spec_path(model_store, str(model))} nor {archive}. "
            "Give the source with --spec and --weights, or the model store with --model-store."
        )
    if weights is not None:
        return _eager_as_archived(archive, weights, device=device, allow_code=allow_code)
    return eager_from_archive(archive, device=device, allow_code=allow_code)


def _eager_as_archived(archive: Path, checkpoint: Path, *, device: str, allow_code: bool) -> EagerModel:
    """Load a checkpoint as the model that an archive describes."""
    with unpacked(archive) as folder:
        spec = load_artefact(folder).spec
        if spec.family == "mmdet":
            return eager_from_source(spec, checkpoint, folder=folder, device=device, allow_code=allow_code)
    if spec.family == "torchvision" and spec.runtime == "onnx" and checkpoint.suffix != ".onnx":
        # The file was exported from a checkpoint, and its spec still tells the builder.
        spec = replace(spec, runtime="torch")
    return eager_from_source(spec, checkpoint, device=device)


def eager_from_source(
    spec: Spec, checkpoint: Path, *, folder: Path = Path(), device: str = "cpu", allow_code: bool = False
) -> EagerModel:
    """Load the reference from a spec and its checkpoint.

    Args:
        spec: of the model.
        checkpoint: its weights.
        folder: what the spec's other paths are relative to.
        device: where torch runs it.
        allow_code: as for `load_eager`.

    Raises:
        DetserveError: the checkpoint cannot be read or does not fit.
    """
    if spec.family == "torchvision" and spec.runtime == "torch":
        state = load_state_dict(checkpoint)
        return TorchvisionEager(resolve_spec(spec, state), state, source=f"{checkpoint}", device=device)
    if spec.family == "mmdet":
        from detserve.eager_mmdet import load_mmdet

        return load_mmdet(
            config_path(spec, folder),
            checkpoint,
            categories=spec.categories,
            device=device,
            allow_code=allow_code,
            modules=[*module_folders(spec, folder), folder / MODULES_FOLDER],
        )
    return _onnx_reference(resolve_spec(spec, None), checkpoint, source=f"{checkpoint}")


def eager_from_file(path: Path) -> EagerModel:
    """Load the reference for an exported ONNX file: the file itself, read plainly."""
    described = require_described(path)
    return _onnx_reference(described.spec, path, source=f"{path.name} itself (its source checkpoint is not inside)")


def eager_from_archive(archive: Path, *, device: str = "cpu", allow_code: bool = False) -> EagerModel:
    """Load the reference from the weights that an archive carries."""
    with unpacked(archive) as folder:
        artefact = load_artefact(folder)
        source = f"the weights inside {archive.name} (its source checkpoint was not found)"
        if artefact.spec.family == "torchvision" and artefact.spec.runtime == "torch":
            return TorchvisionEager(artefact.spec, load_state_dict(artefact.weights), source=source, device=device)
        if artefact.spec.family == "mmdet":
            made = eager_from_source(
                artefact.spec, artefact.weights, folder=folder, device=device, allow_code=allow_code
            )
            made.source = made.source.replace(str(artefact.weights), source)
            return made
        return _onnx_reference(artefact.spec, artefact.weights, source=source)


def _onnx_reference(spec: Spec, weights: Path, *, source: str) -> EagerModel:
    if spec.family == "torchvision":
        return ExportedEager(spec, weights, source=source)
    if spec.family == "mmdet_onnx":
        return MmdetOnnxEager(spec, weights, source=source)
    if spec.family not in ONNX_REFERENCES:
        raise SpecError(
            f"family: got {spec.family!r}, which has no eager reference; expected torchvision, "
            f"{', '.join(sorted(ONNX_REFERENCES))}. Correct the spec."
        )
    return ONNX_REFERENCES[spec.family](spec, weights, source=source)
