"""FastestDet as an ONNX file with its one raw map.

    (B, 5 + C, h, w): objectness, x, y, width, height, C classes; objectness and classes are probabilities
    centre = (tanh(xy) + cell) · stride, size = sigmoid(wh) · input size, score = objectness^0.6 · best class^0.4

Source of the decoding: `handle_preds` of dog-qiuqiu/FastestDet, and the weights 0.6 and 0.4 of its version with an
input of 352 × 352 (its examples for onnxruntime and ncnn say the same).
"""

from collections.abc import Mapping

import torch

from dethandlers.errors import ArtefactError
from dethandlers.onnx_family import Candidates, OnnxFamily, find_output, require_dividing
from dethandlers.spec import Spec

_OBJECTNESS_WEIGHT = 0.6


class FastestdetFamily(OnnxFamily):
    """FastestDet with an undecoded map, run by onnxruntime. Of several outputs, the first of the right shape is taken.

    Raises:
        ArtefactError: the spec names another runtime, or not one stride that divides the input.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        if len(spec.decoding.strides) != 1:
            raise ArtefactError(
                f"decoding.strides: got {list(spec.decoding.strides)}, expected one, the input size by the size of the "
                "map (FastestDet: [16]). Correct the spec."
            )
        require_dividing(spec)
        height, width = spec.preprocessing.size
        (stride,) = spec.decoding.strides
        self._grid_size = height // stride, width // stride
        rows, columns = torch.meshgrid(*(torch.arange(cells) for cells in self._grid_size), indexing="ij")
        self._cells = torch.stack([columns, rows]).float()
        self._stride = stride
        self._input_wh = torch.tensor([width, height], dtype=torch.float32)[:, None, None]

    def candidates(self, outputs: Mapping[str, torch.Tensor]) -> Candidates:
        """Decode one image's ``(5 + C, h, w)`` raw output.

        Raises:
            ArtefactError: the network's output has another shape than the spec describes.
        """
        least = 5 + self.classes
        raw = find_output(
            outputs,
            lambda shape: len(shape) == 3 and shape[0] >= least and shape[1:] == self._grid_size,
            expected=f"(batch, {least} or more, {self._grid_size[0]}, {self._grid_size[1]}) from the categories, "
            "preprocessing.size and decoding.strides",
        )
        centres = (raw[1:3].tanh() + self._cells.to(raw.device)) * self._stride
        sizes = raw[3:5].sigmoid() * self._input_wh.to(raw.device)
        boxes = torch.cat([centres - sizes / 2, centres + sizes / 2]).flatten(1).T
        best, model_labels = raw[5:].flatten(1).max(dim=0)
        objectness = raw[0].flatten().clamp(min=0)
        scores = objectness**_OBJECTNESS_WEIGHT * best.clamp(min=0) ** (1 - _OBJECTNESS_WEIGHT)
        return Candidates(boxes, scores, model_labels)
