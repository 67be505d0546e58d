"""What the families of foreign ONNX files share, so that each of them is its layout and no more.

    prepare, as spec.preprocessing says ─► the file ─► raw outputs by name ─► the family's candidates()
      ─► score threshold, known classes only ─► NMS per class at decoding.nms_iou ─► clipped boxes of the image

A foreign file says next to nothing about itself. The spec alone describes it, and no code of the user is needed: a
family finds its outputs by their shapes, or by their names where shapes cannot tell, whatever their order in the file.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Candidates:
    """What the network proposes for one image, before anything is chosen.

    Attributes:
        boxes_xyxy: ``(N, 4)`` float32, pixels of the network's input.
        scores: ``(N,)`` float32.
        model_labels: ``(N,)`` int64, the best class of each as the network numbers them.
    """

    boxes_xyxy: torch.Tensor
    scores: torch.Tensor
    model_labels: torch.Tensor


class OnnxFamily(ABC):
    """A family whose network is an ONNX file with a fixed input and outputs that are decoded here.

    Raises:
        ArtefactError: the spec names another runtime, or an NMS inside the file.
    """

    capabilities: frozenset[str] = frozenset()
    drops_classes = False  # NMS, and with it the number of detections, comes after the choice of classes

    def __init__(self, spec: Spec) -> None:
        if spec.runtime != "onnx":
            raise ArtefactError(
                f"runtime: got {spec.runtime!r} with family {spec.family!r}, expected 'onnx'. Correct the spec."
            )
        if spec.decoding.nms != "host":
            raise ArtefactError(
                f"decoding.nms: got {spec.decoding.nms!r} with family {spec.family!r}, whose outputs are raw; expected "
                "'host'. Correct the spec."
            )
        self.spec = spec
        self.classes = max(category.model_label for category in spec.categories) + 1
        """How many classes the network must put out at least."""
        # One place more, for all classes of the network beyond the map.
        self._label_of_model_label = torch.full((self.classes + 1,), -1, dtype=torch.int64)
        for label, category in enumerate(spec.categories):
            self._label_of_model_label[category.model_label] = label

    @abstractmethod
    def candidates(self, outputs: Mapping[str, torch.Tensor]) -> Candidates:
        """Decode one image's raw outputs, by name and without their batch dimension.

        Raises:
            ArtefactError: the outputs have other shapes than the spec describes.
        """

    def build(self, weights: Path) -> torch.nn.Module:
        """Refuse: there is no torch network behind an ONNX file."""
        raise ArtefactError(f"family {self.spec.family!r} is run from ONNX, got {weights.name} for the torch runtime.")

    def prepare(self, image: torch.Tensor) -> Prepared:
        """Bring one image to the input as the spec's preprocessing says."""
        return prepare_fixed(image, self.spec.preprocessing)

    def decode(self, outputs: Any, prepared: Sequence[Prepared], limits: Limits) -> list[Detections]:
        """Turn each image's raw outputs into its detections: one label per box, best score first.

        Raises:
            ArtefactError: the outputs have other shapes than the spec describes.
        """
        return [
            self._select(self.candidates(output), source, limits)
            for output, source in zip(outputs, prepared, strict=True)
        ]

    def _select(self, found: Candidates, source: Prepared, limits: Limits) -> Detections:
        label_of = self._label_of_model_label.to(found.model_labels.device)
        labels = label_of[found.model_labels.clamp(max=self.classes)]
        above = (found.scores >= limits.score_threshold) & (labels >= 0)
        boxes, scores, labels = found.boxes_xyxy[above], found.scores[above], labels[above]
        kept = batched_nms(boxes, scores, labels, self.spec.decoding.nms_iou)[: limits.max_detections]
        original = clip_boxes(scale_boxes(boxes[kept], source.scale_xy), source.original_size)
        return Detections(original.cpu().numpy(), scores[kept].cpu().numpy(), labels[kept].cpu().numpy())


def find_output(
    outputs: Mapping[str, torch.Tensor], fits: Callable[[tuple[int, ...]], bool], *, expected: str
) -> torch.Tensor:
    """Return the first output whose shape fits, as float32.

    Args:
        outputs: of one image, by name.
        fits: told a shape without the batch dimension.
        expected: the shape wanted, and the keys of the spec that it follows from; ends the message before "Correct".

    Raises:
        ArtefactError: none fits.
    """
    for output in outputs.values():
        if fits(tuple(output.shape)):
            return output.float()
    raise ArtefactError(f"network output: got {shapes_of(outputs)}, expected {expected}. Correct the spec.")


def shapes_of(outputs: Mapping[str, torch.Tensor]) -> str:
    """Return the outputs' shapes for a message; with their names where there are several."""
    shapes = {name: f"(batch, {', '.join(map(str, output.shape))})" for name, output in outputs.items()}
    if len(shapes) == 1:
        return next(iter(shapes.values()))
    return " and ".join(f"{name} {shape}" for name, shape in shapes.items())


def require_dividing(spec: Spec) -> None:
    """Check that the strides divide the input.

    Raises:
        ArtefactError: one does not.
    """
    height, width = spec.preprocessing.size
    bad = [stride for stride in spec.decoding.strides if height % stride or width % stride]
    if bad:
        raise ArtefactError(
            f"decoding.strides: got {bad[0]}, expected divisors of the input {height}×{width}. Correct the spec."
        )
