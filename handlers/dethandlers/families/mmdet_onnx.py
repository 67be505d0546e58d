"""MMDetection's detectors as exported to ONNX: served without MMDetection, mmcv, MMEngine or OpenCV.

    prepare, as spec.preprocessing says ─► the file: backbone, neck, the head's maps ─► `mmdet_decoding`, as
      spec.decoding.head says ─► boxes of the original image

Everything is data that `detserve export` wrote into the spec; no config is read here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dethandlers.detections import Detections
from dethandlers.errors import ArtefactError
from dethandlers.families import Limits
from dethandlers.mmdet_decoding import Frame, Wanted, decode_head, read_head
from dethandlers.preprocess import Prepared, prepare_mmdet
from dethandlers.spec import Spec


class MmdetOnnxFamily:
    """An exported detector of MMDetection, run by onnxruntime.

    Raises:
        ArtefactError: the spec names another runtime, no head, or another preprocessing than MMDetection's.
    """

    capabilities: frozenset[str] = frozenset()
    drops_classes = False  # the number of detections is cut after the choice of classes

    def __init__(self, spec: Spec) -> None:
        if spec.runtime != "onnx" or not spec.decoding.head:
            raise ArtefactError(
                f"family {spec.family!r}: got runtime {spec.runtime!r} and {'a' if spec.decoding.head else 'no'} "
                "decoding.head, expected the spec of a file that `detserve export` wrote. Export the model."
            )
        if spec.preprocessing.resize not in ("fit", "stretch"):
            raise ArtefactError(
                f"preprocessing.resize: got {spec.preprocessing.resize!r} with family {spec.family!r}, expected fit or "
                "stretch. Export the model again."
            )
        self.spec = spec
        self._head = read_head(spec.decoding.head)
        classes = max(category.model_label for category in spec.categories) + 1
        # The maps may have more classes than the category map; what is beyond it is never wanted.
        self._label_of_model_label = torch.full((max(classes, _MOST_CLASSES),), -1, dtype=torch.int64)
        for label, category in enumerate(spec.categories):
            self._label_of_model_label[category.model_label] = label

    def build(self, weights: Path) -> torch.nn.Module:
        """Refuse: there is no torch network behind an ONNX file."""
        raise ArtefactError(f"family {self.spec.family!r} is run from ONNX, got {weights.name} for the torch runtime.")

    def prepare(self, image: torch.Tensor) -> Prepared:
        """Bring one image to the input as MMDetection's test pipeline does."""
        return prepare_mmdet(image, self.spec.preprocessing)

    def decode(self, outputs: Any, prepared: Sequence[Prepared], limits: Limits) -> list[Detections]:
        """Turn each image's maps into its detections, best score first.

        Raises:
            ArtefactError: the outputs are not the head's.
        """
        return [self._decoded(output, source, limits) for output, source in zip(outputs, prepared, strict=True)]

    def _decoded(self, output: dict[str, torch.Tensor], source: Prepared, limits: Limits) -> Detections:
        wanted = Wanted(limits.score_threshold, limits.max_detections, self._label_of_model_label >= 0)
        found = decode_head(output, self._head, Frame(source.sample, source.scale_xy), wanted)
        labels = self._label_of_model_label[found.labels.cpu()]
        return Detections(found.boxes.cpu().numpy(), found.scores.cpu().numpy(), labels.numpy())


_MOST_CLASSES = 1 << 14
