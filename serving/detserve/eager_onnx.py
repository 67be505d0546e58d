"""The references for foreign ONNX files: onnxruntime on the CPU, and all the rest box by box in NumPy.

There is no framework model behind such a file. Its reference is a second reading of the same description, written
apart from the worker's code, one image at a time in double precision.

A kind of file is added by a class here and a line in `ONNX_REFERENCES`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from dethandlers.detections import Detections
from dethandlers.spec import Spec

from detserve.eager_image import bilinear, decode_rgb
from detserve.errors import CheckpointError, DetserveError, SpecError

Row = tuple[npt.NDArray[np.float64], float, int]
"""A box ``(4,)`` xyxy in pixels of the network's input, its score, and its class as the network numbers them."""
Outputs = Mapping[str, npt.NDArray[Any]]
"""One image's outputs by name, without their batch dimension."""


def open_on_cpu(weights: Path, kind: str) -> tuple[Any, str]:
    """Open an ONNX file by onnxruntime on the CPU; return the session and onnxruntime's version.

    Args:
        weights: the file.
        kind: what is expected, for the message.

    Raises:
        CheckpointError: onnxruntime cannot load it.
        DetserveError: onnxruntime is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DetserveError("eager needs onnxruntime for an ONNX file. Install detserve[onnx].") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The bytes, because an archive's unpacked file is gone after this.
    content = weights.read_bytes()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no root
        raise CheckpointError(
            f"weights {weights.name}: onnxruntime cannot load it ({error}). Expected {kind} in ONNX format."
        ) from error
    return session, str(onnxruntime.__version__)


class OnnxEager(ABC):
    """An ONNX file with a fixed input whose boxes are chosen outside of it.

    Raises:
        CheckpointError: onnxruntime cannot load the file.
        DetserveError: onnxruntime is missing.
    """

    kind: str

    def __init__(self, spec: Spec, weights: Path, *, source: str) -> None:
        self._session, version = open_on_cpu(weights, self.kind)
        self.provider = str(self._session.get_providers()[0])
        self.spec = spec
        self.categories = spec.categories
        self.source = f"onnxruntime {version} on the CPU with a plain decoding, {source}"
        self._label_of = {category.model_label: label for label, category in enumerate(spec.categories)}

    @abstractmethod
    def rows(self, outputs: Outputs) -> Iterator[Row]:
        """Yield every box that the network proposes."""

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
            DetserveError: it is no image, or the file and the spec disagree.
        """
        rgb = decode_rgb(image)
        height, width = rgb.shape[:2]
        feed, (new_height, new_width) = self._prepared(rgb)
        rows = [
            (box, score, self._label_of[model_label])
            for box, score, model_label in self._run(feed)
            if score >= score_threshold and model_label in self._label_of
        ]
        kept = suppressed(sorted(rows, key=lambda row: -row[1]), self.spec.decoding.nms_iou)[:max_detections]
        scale = np.asarray([width / new_width, height / new_height] * 2)
        limit = np.asarray([width, height, width, height], dtype=np.float64)
        return Detections(
            np.asarray([np.clip(box * scale, 0, limit) for box, _, _ in kept], dtype=np.float32).reshape(-1, 4),
            np.asarray([score for _, score, _ in kept], dtype=np.float32),
            np.asarray([label for _, _, label in kept], dtype=np.int64),
        )

    def _prepared(self, rgb: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], tuple[int, int]]:
        """Return the input ``(1, 3, h, w)``, and the size ``(h, w)`` px of its part that is image."""
        settings = self.spec.preprocessing
        input_height, input_width = settings.size
        if settings.resize == "stretch":
            size = input_height, input_width
        else:
            height, width = rgb.shape[:2]
            ratio = min(input_height / height, input_width / width)
            size = max(1, round(height * ratio)), max(1, round(width * ratio))
        canvas = np.full((input_height, input_width, 3), settings.pad_value, dtype=np.float64)
        order = -1 if settings.channel_order == "bgr" else 1
        canvas[: size[0], : size[1]] = bilinear(rgb, *size)[:, :, ::order]
        canvas = (canvas * settings.scale - np.asarray(settings.mean)) / np.asarray(settings.std)
        return canvas.transpose(2, 0, 1)[None].astype(np.float32), size

    def _run(self, feed: npt.NDArray[np.float32]) -> Iterator[Row]:
        (first, *_) = self._session.get_inputs()
        try:
            outputs = self._session.run(None, {first.name: feed})
        except Exception as error:  # as above
            raise SpecError(
                f"the network takes {first.name} {first.shape}, got {feed.shape}: {error}. Correct preprocessing.size."
            ) from error
        names = [one.name for one in self._session.get_outputs()]
        by_name = {name: output[0] for name, output in zip(names, outputs, strict=True)}
        try:
            yield from self.rows(by_name)
        except (IndexError, ValueError) as error:
            shapes = ", ".join(f"{name} {tuple(output.shape)}" for name, output in by_name.items())
            raise SpecError(
                f"network output: got {shapes} for an image, expected {self.kind} of {len(self.categories)} categories "
                f"at preprocessing.size {list(self.spec.preprocessing.size)} and decoding.strides "
                f"{list(self.spec.decoding.strides)}. Correct the spec."
            ) from error


class YoloxEager(OnnxEager):
    """A YOLOX ONNX file: rows of ``x, y, w, h, objectness, classes``, one for each cell of each level."""

    kind = "a YOLOX"

    def rows(self, outputs: Outputs) -> Iterator[Row]:
        """Yield a box for each cell."""
        (raw,) = [output for output in outputs.values() if output.ndim == 2][:1]
        position = 0
        height, width = self.spec.preprocessing.size
        for stride in self.spec.decoding.strides:
            for row in range(height // stride):
                for column in range(width // stride):
                    values = raw[position].astype(np.float64)
                    position += 1
                    best = int(np.argmax(values[5:]))
                    x, y = (values[0] + column) * stride, (values[1] + row) * stride
                    w, h = np.exp(values[2]) * stride, np.exp(values[3]) * stride
                    yield _around(x, y, w, h), float(values[4] * values[5 + best]), best
        if position != len(raw):
            raise ValueError(f"{len(raw)} rows for {position} cells")


class FastestdetEager(OnnxEager):
    """A FastestDet ONNX file: a map whose every cell is ``objectness, x, y, w, h, classes``."""

    kind = "a FastestDet"

    def rows(self, outputs: Outputs) -> Iterator[Row]:
        """Yield a box for each cell."""
        (cells,) = [output for output in outputs.values() if output.ndim == 3][:1]
        height, width = self.spec.preprocessing.size
        _, down, across = cells.shape
        if (down * self.spec.decoding.strides[0], across * self.spec.decoding.strides[0]) != (height, width):
            raise ValueError("a map of another size")
        for row in range(down):
            for column in range(across):
                objectness, x, y, w, h, *classes = (float(value) for value in cells[:, row, column])
                best = int(np.argmax(classes))
                score = max(objectness, 0.0) ** 0.6 * max(classes[best], 0.0) ** 0.4
                box = _around(
                    (column + np.tanh(x)) / across * width,
                    (row + np.tanh(y)) / down * height,
                    _sigmoid(w) * width,
                    _sigmoid(h) * height,
                )
                yield box, score, best


class UltrafaceEager(OnnxEager):
    """An UltraFace ONNX file: ``scores``, the background first, and ``boxes`` as fractions of the input."""

    kind = "an UltraFace"

    def rows(self, outputs: Outputs) -> Iterator[Row]:
        """Yield each box with its best class that is not the background."""
        if {"boxes", "scores"} <= outputs.keys():
            boxes, scores = outputs["boxes"], outputs["scores"]
        else:
            (boxes,) = [output for output in outputs.values() if output.shape[-1] == 4]
            (scores,) = [output for output in outputs.values() if output.shape[-1] != 4]
        height, width = self.spec.preprocessing.size
        for box, probabilities in zip(boxes, scores, strict=True):
            best = 1 + int(np.argmax(probabilities[1:]))
            left, top, right, bottom = (float(value) for value in box)
            corners = np.asarray([left * width, top * height, right * width, bottom * height])
            yield corners, float(probabilities[best]), best


ONNX_REFERENCES: dict[str, type[OnnxEager]] = {
    "fastestdet": FastestdetEager,
    "ultraface": UltrafaceEager,
    "yolox": YoloxEager,
}
"""The reference of each family of foreign ONNX files."""


def suppressed(rows: list[Row], iou: float) -> list[Row]:
    """Keep a box unless a better one of its class overlaps it by more than ``iou``; rows come best first."""
    kept: list[Row] = []
    for box, score, label in rows:
        if all(other_label != label or _iou(box, other) <= iou for other, _, other_label in kept):
            kept.append((box, score, label))
    return kept


def _around(x: float, y: float, width: float, height: float) -> npt.NDArray[np.float64]:
    return np.asarray([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


def _sigmoid(value: float) -> float:
    return float((1 + np.tanh(value / 2)) / 2)


def _iou(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return float(width * height / (areas - width * height))
