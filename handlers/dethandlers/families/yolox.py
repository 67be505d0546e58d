"""YOLOX as an ONNX file with its raw head.

    (B, N, 5 + C) raw ─► centre = (xy + cell) · stride, size = exp(wh) · stride ─► score = obj · best class

Source of the decoding: YOLOX (arXiv:2107.08430) and `YOLOXHead.decode_outputs` of its reference implementation.
"""

from collections.abc import Mapping, Sequence

import torch

from dethandlers.onnx_family import Candidates, OnnxFamily, find_output, require_dividing
from dethandlers.spec import Spec

# exp() of a larger raw size passes every image; the clamp keeps a broken network from overflowing to inf.
_MAX_RAW_SIZE = 12.0


class YoloxFamily(OnnxFamily):
    """YOLOX with an undecoded head, run by onnxruntime. Of several outputs, the first of the right shape is taken.

    Raises:
        ArtefactError: the spec names another runtime, or strides that do not divide the input.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        require_dividing(spec)
        height, width = spec.preprocessing.size
        self._cells, self._strides = _grid(height, width, spec.decoding.strides)

    def candidates(self, outputs: Mapping[str, torch.Tensor]) -> Candidates:
        """Decode one image's ``(N, 5 + C)`` raw output.

        Raises:
            ArtefactError: the network's output has another shape than the spec describes.
        """
        cells, least = len(self._cells), 5 + self.classes
        raw = find_output(
            outputs,
            lambda shape: len(shape) == 2 and shape[0] == cells and shape[1] >= least,
            expected=f"(batch, {cells}, {least} or more) from preprocessing.size, decoding.strides and the categories",
        )
        grid, strides = self._cells.to(raw.device), self._strides.to(raw.device)
        centres = (raw[:, :2] + grid) * strides
        sizes = raw[:, 2:4].clamp(max=_MAX_RAW_SIZE).exp() * strides
        boxes = torch.cat([centres - sizes / 2, centres + sizes / 2], dim=-1)
        best, model_labels = raw[:, 5:].max(dim=-1)
        return Candidates(boxes, best * raw[:, 4], model_labels)


def _grid(height: int, width: int, strides: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cells' ``(N, 2)`` xy indices and their ``(N, 1)`` strides, level after level, row after row."""
    cells, cell_strides = [], []
    for stride in strides:
        rows, columns = torch.meshgrid(torch.arange(height // stride), torch.arange(width // stride), indexing="ij")
        cells.append(torch.stack([columns, rows], dim=-1).reshape(-1, 2))
        cell_strides.append(torch.full((len(cells[-1]), 1), stride))
    return torch.cat(cells).float(), torch.cat(cell_strides).float()
