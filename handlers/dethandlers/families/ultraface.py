"""UltraFace as an ONNX file: boxes decoded inside, NMS left to do.

    scores (B, N, K) probabilities, the first class is the background; boxes (B, N, 4) xyxy as fractions of the input

Source of the layout: `detect_imgs_onnx.py` of Linzaer/Ultra-Light-Fast-Generic-Face-Detector-1MB.
"""

from collections.abc import Mapping

import torch

from dethandlers.errors import ArtefactError
from dethandlers.onnx_family import Candidates, OnnxFamily, shapes_of
from dethandlers.spec import Spec

_BOXES, _SCORES = "boxes", "scores"


class UltrafaceFamily(OnnxFamily):
    """UltraFace, run by onnxruntime.

    Its two outputs are known by the names ``boxes`` and ``scores``; where they are named otherwise, by their widths.

    Raises:
        ArtefactError: the spec names another runtime, or a category that is the background.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        background = [category.name for category in spec.categories if category.model_label == 0]
        if background:
            raise ArtefactError(
                f"categories: got model_label 0 for {background[0]!r}, which is the background in family "
                f"{spec.family!r}; expected 1 or more. Set num_classes: {len(spec.categories) + 1}, or the model_label "
                "of each category."
            )

    def candidates(self, outputs: Mapping[str, torch.Tensor]) -> Candidates:
        """Decode one image's ``(N, K)`` scores and ``(N, 4)`` boxes.

        Raises:
            ArtefactError: the network's outputs have other shapes than the spec describes.
        """
        boxes, scores = self._boxes_and_scores(outputs)
        height, width = self.spec.preprocessing.size
        best, foreground = scores[:, 1:].max(dim=-1)
        return Candidates(boxes * boxes.new_tensor([width, height, width, height]), best, foreground + 1)

    def _boxes_and_scores(self, outputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if outputs.keys() >= {_BOXES, _SCORES}:
            pairs = [(outputs[_BOXES], outputs[_SCORES])]
        else:
            flat = [output for output in outputs.values() if output.ndim == 2]
            pairs = [(one, other) for one in flat for other in flat if one is not other]
        fitting = [
            (boxes.float(), scores.float())
            for boxes, scores in pairs
            if boxes.ndim == scores.ndim == 2
            and len(boxes) == len(scores)
            and boxes.shape[1] == 4
            and scores.shape[1] >= max(2, self.classes)
        ]
        if len(fitting) != 1:
            raise ArtefactError(
                f"network output: got {shapes_of(outputs)}, expected boxes (batch, N, 4) and scores (batch, N, "
                f"{self.classes} or more, the first of them the background) from the categories"
                f"{'; the widths do not tell which is which' if fitting else ''}. Correct num_classes and the "
                "categories in the spec, or its family; or name the file's outputs 'boxes' and 'scores'."
            )
        return fitting[0]
