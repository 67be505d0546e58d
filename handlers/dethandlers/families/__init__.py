"""Model families: how a kind of model is built, fed and decoded. A new one is a file here and a line in FAMILIES.

A family's module is imported only when a spec names it, so that its framework is needed by nobody else.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from dethandlers.detections import Detections
from dethandlers.errors import ArtefactError
from dethandlers.preprocess import Prepared
from dethandlers.spec import Spec

FAMILIES: dict[str, str] = {
    "fastestdet": "dethandlers.families.fastestdet:FastestdetFamily",
    "mmdet": "dethandlers.families.mmdet:MmdetFamily",
    "mmdet_onnx": "dethandlers.families.mmdet_onnx:MmdetOnnxFamily",
    "torchvision": "dethandlers.families.torchvision_detection:TorchvisionFamily",
    "ultraface": "dethandlers.families.ultraface:UltrafaceFamily",
    "yolox": "dethandlers.families.yolox:YoloxFamily",
}


@dataclass(frozen=True)
class Limits:
    """What one forward pass must at least return: the loosest wishes of the requests that share it."""

    score_threshold: float
    max_detections: int
    masks: bool = False
    keypoints: bool = False


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass: images of one padded shape.

    Attributes:
        pixels: ``(B, 3, h, w)`` float32.
        sizes: ``(h, w)`` of the image's part of each, px.
        limits: what the pass must return.
        samples: what the family noted of each when it prepared it.
    """

    pixels: torch.Tensor
    sizes: tuple[tuple[int, int], ...]
    limits: Limits
    samples: tuple[Any, ...] = ()


class Family(Protocol):
    """What the detector asks of a family."""

    capabilities: frozenset[str]
    """Of ``masks`` and ``keypoints``, what the model can answer."""
    drops_classes: bool
    """Whether ``decode`` drops classes that the category map lacks. A network that cuts at a number of detections is
    then asked for the most, and ``decode`` cuts at what is wanted: an answer must not depend on what others ask for."""

    def build(self, weights: Path) -> torch.nn.Module:
        """Return the network for the torch runtime: ``module(batch: Batch)`` gives what ``decode`` takes.

        Raises:
            ArtefactError: the family has no torch network, or the weights do not fit.
        """
        ...

    def prepare(self, image: torch.Tensor) -> Prepared:
        """Turn ``(3, H, W)`` uint8 RGB, on any device, into the network's input."""
        ...

    def decode(self, outputs: Any, prepared: Sequence[Prepared], limits: Limits) -> list[Detections]:
        """Turn a forward pass's outputs into the detections of its images, best score first."""
        ...


def load_family(spec: Spec) -> Family:
    """Return the spec's family.

    Raises:
        ArtefactError: the family is unknown.
    """
    if spec.family not in FAMILIES:
        raise ArtefactError(
            f"family: got {spec.family!r}, expected one of {', '.join(sorted(FAMILIES))}. "
            "Rebuild the archive with a detserve that has this family."
        )
    module, _, name = FAMILIES[spec.family].partition(":")
    return cast("Family", getattr(importlib.import_module(module), name)(spec))
