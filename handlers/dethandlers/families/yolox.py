"""YOLOX as an ONNX file with its raw head: letterbox in, grid decoding and NMS here.

    (B, N, 5 + C) raw ─► centre = (xy + cell) · stride, size = exp(wh) · stride ─► score = obj · best class ─► NMS

Source of the decoding: YOLOX (arXiv:2107.08430) and `YOLOXHead.decode_outputs` of its reference implementation. One
label per box, NMS per class, boxes clipped to the image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import batched_nms

from dethandlers.detections import Detections
from dethandlers.errors import ArtefactError
from dethandlers.families import Limits
from dethandlers.postprocess import clip_boxes, scale_boxes
from dethandlers.preprocess import Prepared, prepare_fixed
from dethandlers.spec import Spec

# exp() of a larger raw size passes every image; the clamp keeps a broken network from overflowing to inf.
_MAX_RAW_SIZE = 12.0


class YoloxFamily:
    """YOLOX with an undecoded head, run by onnxruntime.

    Raises:
        ArtefactError: the spec names another runtime, or strides that do not divide the input.
    """

    capabilities: frozenset[str] = frozenset()

    def __init__(self, spec: Spec) -> None:
        if spec.runtime != "onnx":
            raise ArtefactError(
                f"runtime: got {spec.runtime!r} with family 'yolox', expected 'onnx'. Correct the spec."
            )
        height, width = spec.preprocessing.size
        bad = [stride for stride in spec.decoding.strides if height % stride or width % stride]
        if bad:
            raise ArtefactError(
                f"decoding.strides: got {bad[0]}, expected divisors of the input {height}×{width}. Correct the spec."
            )
        self.spec = spec
        self._classes = max(category.model_label for category in spec.categories) + 1
        # One place more, for all classes of the network beyond the map.
        self._label_of_model_label = torch.full((self._classes + 1,), -1, dtype=torch.int64)
        for label, category in enumerate(spec.categories):
            self._label_of_model_label[category.model_label] = label
        self._cells, self._strides = _grid(height, width, spec.decoding.strides)

    def build(self, weights: Path) -> torch.nn.Module:
        """Refuse: there is no torch network behind an ONNX file."""
        raise ArtefactError(f"family 'yolox' is run from ONNX, got {weights.name} for the torch runtime.")

    def prepare(self, image: torch.Tensor) -> Prepared:
        """Bring one image to the input as the spec's preprocessing says."""
        return prepare_fixed(image, self.spec.preprocessing)

    def decode(self, outputs: Any, prepared: Sequence[Prepared], limits: Limits) -> list[Detections]:
        """Decode each image's ``(N, 5 + C)`` raw output, the file's first.

        Raises:
            ArtefactError: the network's output has another shape than the spec describes.
        """
        return [
            self._decode_one(next(iter(output.values())), source, limits)
            for output, source in zip(outputs, prepared, strict=True)
        ]

    def _decode_one(self, raw: torch.Tensor, source: Prepared, limits: Limits) -> Detections:
        if raw.ndim != 2 or raw.shape[0] != len(self._cells) or raw.shape[1] < 5 + self._classes:
            raise ArtefactError(
                f"network output: got {_shape(raw)}, "
                f"expected (batch, {len(self._cells)}, {5 + self._classes} or more) "
                "from preprocessing.size, decoding.strides and the categories. Correct the spec."
            )
        raw = raw.float()
        cells, strides = self._cells.to(raw.device), self._strides.to(raw.device)
        centres = (raw[:, :2] + cells) * strides
        sizes = raw[:, 2:4].clamp(max=_MAX_RAW_SIZE).exp() * strides
        boxes = torch.cat([centres - sizes / 2, centres + sizes / 2], dim=-1)
        best, model_labels = raw[:, 5:].max(dim=-1)
        return self._select(boxes, best * raw[:, 4], model_labels, source, limits)

    def _select(
        self, boxes: torch.Tensor, scores: torch.Tensor, model_labels: torch.Tensor, source: Prepared, limits: Limits
    ) -> Detections:
        labels = self._label_of_model_label.to(model_labels.device)[model_labels.clamp(max=self._classes)]
        above = (scores >= limits.score_threshold) & (labels >= 0)
        boxes, scores, labels = boxes[above], scores[above], labels[above]
        kept = batched_nms(boxes, scores, labels, self.spec.decoding.nms_iou)[: limits.max_detections]
        original = clip_boxes(scale_boxes(boxes[kept], source.scale_xy), source.original_size)
        return Detections(original.cpu().numpy(), scores[kept].cpu().numpy(), labels[kept].cpu().numpy())


def _shape(raw: torch.Tensor) -> str:
    return f"(batch, {', '.join(map(str, raw.shape))})"


def _grid(height: int, width: int, strides: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cells' ``(N, 2)`` xy indices and their ``(N, 1)`` strides, level after level, row after row."""
    cells, cell_strides = [], []
    for stride in strides:
        rows, columns = torch.meshgrid(torch.arange(height // stride), torch.arange(width // stride), indexing="ij")
        cells.append(torch.stack([columns, rows], dim=-1).reshape(-1, 2))
        cell_strides.append(torch.full((len(cells[-1]), 1), stride))
    return torch.cat(cells).float(), torch.cat(cell_strides).float()
