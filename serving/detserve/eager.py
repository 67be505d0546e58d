"""Eager: the framework's own inference on the source checkpoint, the reference for everything that is served.

It shares no pre- or post-processing with the worker: one image goes in at a time, and torchvision's own transform,
forward and post-processing do the rest. (Only the decoder is the same library, Pillow; torchvision's is deprecated.)
For a foreign ONNX file there is no framework model; its references are those of `eager_onnx`.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from dethandlers.artefact import load_artefact
from dethandlers.detections import Category, Detections
from dethandlers.errors import ArtefactError
from dethandlers.families.torchvision_detection import build_module
from dethandlers.runtimes.torch_runtime import set_tf32
from dethandlers.spec import Spec

from detserve.checkpoint import load_state_dict
from detserve.eager_image import decode_rgb as decode_rgb
from detserve.eager_onnx import ONNX_REFERENCES
from detserve.errors import CheckpointError, DetserveError, SpecError
from detserve.mar import unpacked
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
) -> EagerModel:
    """Find a model's source and load it.

    In this order: the spec given, or ``model`` itself when it is a spec or an archive, or the model store's spec with
    its weights. When those weights are not there, the archive's own weights are run, and ``source`` says so.

    Args:
        model: name in the model store, a ``.yaml`` spec or a ``.mar`` archive.
        model_store: where names are looked up.
        spec: a spec instead of the model store's.
        weights: a checkpoint instead of the spec's.
        device: where torch runs it.

    Raises:
        DetserveError: no source is found, or it cannot be loaded.
    """
    path = Path(model)
    if spec is None and path.suffix in (".yaml", ".yml"):
        spec = path
    if spec is None and path.suffix != ".mar" and spec_path(model_store, str(model)).is_file():
        spec = spec_path(model_store, str(model))
    if spec is not None:
        described = load_spec(spec)
        checkpoint = weights or spec.parent / (described.weights or "-")
        if checkpoint.is_file():
            return eager_from_source(described, checkpoint, device=device)
        if weights is not None or path.suffix in (".yaml", ".yml"):
            raise CheckpointError(f"weights: got {checkpoint}, which is no file. Give the checkpoint with --weights.")
    archive = path if path.suffix == ".mar" else archive_path(model_store, str(model))
    if not archive.is_file():
        raise DetserveError(
            f"model: got {str(model)!r}, but there is neither {spec_path(model_store, str(model))} nor {archive}. "
            "Give the source with --spec and --weights, or the model store with --model-store."
        )
    return eager_from_archive(archive, device=device)


def eager_from_source(spec: Spec, checkpoint: Path, *, device: str = "cpu") -> EagerModel:
    """Load the reference from a spec and its checkpoint.

    Raises:
        DetserveError: the checkpoint cannot be read or does not fit.
    """
    if spec.family == "torchvision":
        state = load_state_dict(checkpoint)
        return TorchvisionEager(resolve_spec(spec, state), state, source=f"{checkpoint}", device=device)
    return _onnx_reference(resolve_spec(spec, None), checkpoint, source=f"{checkpoint}")


def eager_from_archive(archive: Path, *, device: str = "cpu") -> EagerModel:
    """Load the reference from the weights that an archive carries."""
    with unpacked(archive) as folder:
        artefact = load_artefact(folder)
        source = f"the weights inside {archive.name} (its source checkpoint was not found)"
        if artefact.spec.family == "torchvision":
            return TorchvisionEager(artefact.spec, load_state_dict(artefact.weights), source=source, device=device)
        return _onnx_reference(artefact.spec, artefact.weights, source=source)


def _onnx_reference(spec: Spec, weights: Path, *, source: str) -> EagerModel:
    if spec.family not in ONNX_REFERENCES:
        raise SpecError(
            f"family: got {spec.family!r}, which has no eager reference; expected torchvision, "
            f"{', '.join(sorted(ONNX_REFERENCES))}. Correct the spec."
        )
    return ONNX_REFERENCES[spec.family](spec, weights, source=source)


class TorchvisionEager:
    """torchvision's model, its own transform and its own forward, one image at a time in float32.

    Raises:
        CheckpointError: the weights do not fit.
    """

    def __init__(self, spec: Spec, state: dict[str, torch.Tensor], *, source: str, device: str = "cpu") -> None:
        self.categories = spec.categories
        self.source = f"torchvision {torchvision.__version__} {spec.builder}, {source}, on {device}"
        self._label_of = {category.model_label: label for label, category in enumerate(spec.categories)}
        self._device = torch.device(device)
        set_tf32(allowed=False)
        try:
            self._module = build_module(spec, state).to(self._device)
        except ArtefactError as error:
            raise CheckpointError(str(error)) from error

    def detect(
        self, image: bytes, score_threshold: float, max_detections: int, *, masks: bool = False, keypoints: bool = False
    ) -> Detections:
        """Find objects in one encoded image.

        Raises:
            DetserveError: it is no image.
        """
        heads: Any = getattr(self._module, "roi_heads", self._module)
        heads.score_thresh = score_threshold
        heads.detections_per_img = max_detections
        pixels = torch.from_numpy(decode_rgb(image)).permute(2, 0, 1).float() / 255.0
        with torch.inference_mode():
            (found,) = self._module([pixels.to(self._device)])
        found = {name: tensor.cpu() for name, tensor in found.items()}
        known = [place for place, label in enumerate(found["labels"].tolist()) if label in self._label_of]
        labels = [self._label_of[int(found["labels"][place])] for place in known]
        return Detections(
            found["boxes"][known].numpy(),
            found["scores"][known].numpy(),
            np.asarray(labels, dtype=np.int64),
            masks=_rle(found["masks"][known]) if masks and "masks" in found else None,
            keypoints=_keypoints(found, known) if keypoints and "keypoints" in found else None,
        )


def _rle(masks: torch.Tensor) -> list[dict[str, Any]]:
    """Encode ``(N, 1, H, W)`` probabilities by pycocotools."""
    from pycocotools import mask as coco_mask

    encoded = [coco_mask.encode(np.asfortranarray((one[0] > 0.5).numpy().astype(np.uint8))) for one in masks]
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in encoded]


def _keypoints(found: dict[str, torch.Tensor], known: list[int]) -> npt.NDArray[np.float32]:
    points = found["keypoints"][known].clone()
    points[..., 2] = found["keypoints_scores"][known]
    return np.asarray(points.numpy(), dtype=np.float32)
