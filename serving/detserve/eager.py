"""Eager: the framework's own inference on the source checkpoint, the reference for everything that is served.

It shares no pre- or post-processing with the worker: one image goes in at a time, and torchvision's own transform,
forward and post-processing do the rest. (Only the decoder is the same library, Pillow; torchvision's is deprecated.)
For a foreign ONNX file there is no framework model; there it is onnxruntime with a plain decoding in NumPy, written
apart from the worker's.
"""

import io
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
from PIL import Image, ImageOps

from detserve.checkpoint import load_state_dict
from detserve.errors import CheckpointError, DetserveError
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
    return YoloxEager(resolve_spec(spec, None), checkpoint, source=f"{checkpoint}")


def eager_from_archive(archive: Path, *, device: str = "cpu") -> EagerModel:
    """Load the reference from the weights that an archive carries."""
    with unpacked(archive) as folder:
        artefact = load_artefact(folder)
        source = f"the weights inside {archive.name} (its source checkpoint was not found)"
        if artefact.spec.family == "torchvision":
            return TorchvisionEager(artefact.spec, load_state_dict(artefact.weights), source=source, device=device)
        return YoloxEager(artefact.spec, artefact.weights, source=source)


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


class YoloxEager:
    """A YOLOX ONNX file run by onnxruntime on the CPU, decoded box by box in NumPy."""

    def __init__(self, spec: Spec, weights: Path, *, source: str) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise DetserveError("eager needs onnxruntime for an ONNX file. Install detserve[onnx].") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # The bytes, because an archive's unpacked file is gone after this.
        content = weights.read_bytes()
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no root
            raise CheckpointError(
                f"weights {weights.name}: onnxruntime cannot load it ({error}). Expected a YOLOX in ONNX format."
            ) from error
        self._spec = spec
        self.categories = spec.categories
        self.source = f"onnxruntime {onnxruntime.__version__} on the CPU with a plain decoding, {source}"
        self._label_of = {category.model_label: label for label, category in enumerate(spec.categories)}

    def detect(
        self,
        image: bytes,
        score_threshold: float,
        max_detections: int,
        *,
        masks: bool = False,  # noqa: ARG002
        keypoints: bool = False,  # noqa: ARG002
    ) -> Detections:
        """Find objects in one encoded image.

        Raises:
            DetserveError: it is no image.
        """
        rgb = decode_rgb(image)
        height, width = rgb.shape[:2]
        settings = self._spec.preprocessing
        input_height, input_width = settings.size
        ratio = min(input_height / height, input_width / width)
        new_height, new_width = max(1, round(height * ratio)), max(1, round(width * ratio))
        canvas = np.full((input_height, input_width, 3), settings.pad_value, dtype=np.float64)
        canvas[:new_height, :new_width] = _bilinear(rgb, new_height, new_width)[
            :, :, :: -1 if settings.channel_order == "bgr" else 1
        ]
        canvas = (canvas * settings.scale - np.asarray(settings.mean)) / np.asarray(settings.std)
        feed = canvas.transpose(2, 0, 1)[None].astype(np.float32)
        (raw,) = self._session.run(None, {self._session.get_inputs()[0].name: feed})
        rows = self._decoded(raw[0], score_threshold)
        kept = _nms(rows, self._spec.decoding.nms_iou)[:max_detections]
        scale = np.asarray([width / new_width, height / new_height] * 2)
        limit = np.asarray([width, height, width, height], dtype=np.float64)
        return Detections(
            np.asarray([np.clip(box * scale, 0, limit) for box, _, _ in kept], dtype=np.float32).reshape(-1, 4),
            np.asarray([score for _, score, _ in kept], dtype=np.float32),
            np.asarray([label for _, _, label in kept], dtype=np.int64),
        )

    def _decoded(self, raw: npt.NDArray[np.float32], threshold: float) -> list["_Row"]:
        rows: list[_Row] = []
        position = 0
        height, width = self._spec.preprocessing.size
        for stride in self._spec.decoding.strides:
            for row in range(height // stride):
                for column in range(width // stride):
                    values = raw[position]
                    position += 1
                    best = int(np.argmax(values[5:]))
                    score = float(values[4] * values[5 + best])
                    if score < threshold or best not in self._label_of:
                        continue
                    x, y = (float(values[0]) + column) * stride, (float(values[1]) + row) * stride
                    w, h = np.exp(float(values[2])) * stride, np.exp(float(values[3])) * stride
                    box = np.asarray([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
                    rows.append((box, score, self._label_of[best]))
        return sorted(rows, key=lambda item: -item[1])


_Row = tuple[npt.NDArray[np.float64], float, int]


def decode_rgb(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode an image to ``(H, W, 3)`` uint8 RGB with its EXIF orientation applied, as training scripts do: by Pillow.

    Raises:
        DetserveError: Pillow cannot.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return np.array(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DetserveError(f"got {len(data)} bytes that eager cannot decode ({error}), expected an image.") from error


def _rle(masks: torch.Tensor) -> list[dict[str, Any]]:
    """Encode ``(N, 1, H, W)`` probabilities by pycocotools."""
    from pycocotools import mask as coco_mask

    encoded = [coco_mask.encode(np.asfortranarray((one[0] > 0.5).numpy().astype(np.uint8))) for one in masks]
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in encoded]


def _keypoints(found: dict[str, torch.Tensor], known: list[int]) -> npt.NDArray[np.float32]:
    points = found["keypoints"][known].clone()
    points[..., 2] = found["keypoints_scores"][known]
    return np.asarray(points.numpy(), dtype=np.float32)


def _bilinear(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.float64]:
    """Resize by sampling between the four nearest pixel centres, without antialiasing."""
    source = image.astype(np.float64)

    def neighbours(old: int, new: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(np.intp)
        return low, np.minimum(low + 1, old - 1), at - low

    top, bottom, down = neighbours(image.shape[0], height)
    left, right, across = neighbours(image.shape[1], width)
    rows = source[top] * (1 - down)[:, None, None] + source[bottom] * down[:, None, None]
    return np.asarray(rows[:, left] * (1 - across)[None, :, None] + rows[:, right] * across[None, :, None])


def _nms(rows: list[_Row], iou: float) -> list[_Row]:
    """Keep a box unless a better one of its class overlaps it by more than ``iou``; rows come best first."""
    kept: list[_Row] = []
    for box, score, label in rows:
        if all(other_label != label or _iou(box, other) <= iou for other, _, other_label in kept):
            kept.append((box, score, label))
    return kept


def _iou(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return float(width * height / (areas - width * height))
