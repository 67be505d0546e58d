"""Forward passes of RegNet and ResNet straight from named tensors: the source's architecture, without its library.

pycls, timm, Caffe2 and Detectron2 need not be installed. The formulas are those of the papers (arXiv 2003.13678 for
RegNet, 1512.03385 for ResNet); what a tensor is for is told by the source's names alone, so that the target's own
implementation in torchvision or MMDetection is an independent second opinion.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from dettools.converters.conversion import ConversionError

BATCH_NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class Layer:
    """A convolution, with the affine map of its channels that normalisation is at inference.

    Attributes:
        weight: ``(out, in / groups, k, k)``.
        bias: of the convolution, ``(out,)``, or None.
        scale: ``(out,)``; None for a convolution without normalisation.
        shift: ``(out,)``, where there is a scale.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def __call__(self, pixels: torch.Tensor, stride: int = 1) -> torch.Tensor:
        """Run it, padded so that the size is kept, in as many groups as weights and input tell."""
        groups = pixels.shape[1] // self.weight.shape[1]
        padding = self.weight.shape[-1] // 2
        found = functional.conv2d(pixels, self.weight, self.bias, stride=stride, padding=padding, groups=groups)
        if self.scale is None or self.shift is None:
            return found
        return found * self.scale[:, None, None] + self.shift[:, None, None]


def normalised(weight: torch.Tensor, norm: Sequence[torch.Tensor]) -> Layer:
    """Return a convolution with batch normalisation behind it: weight, bias, mean and variance."""
    gain, offset, mean, variance = norm
    scale = gain / torch.sqrt(variance + BATCH_NORM_EPSILON)
    return Layer(weight, None, scale, offset - mean * scale)


Parts = Callable[[int, int, str], Layer | None]
"""Gives the layer of a stage (from 1), a block (from 0) and a part: a, b, c, shortcut, squeeze, excite."""


def regnet_stages(stem: Layer, parts: Parts, depths: Sequence[int], pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the outputs of RegNet's stages; the 3×3 convolution carries the stride."""
    found = []
    pixels = stem(pixels, 2).relu()
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            named = partial(parts, stage, block)
            pixels = _bottleneck(pixels, named, 1, 2 if block == 0 else 1, named("squeeze"))
        found.append(pixels)
    return found


def resnet_stages(
    stem: Layer, parts: Parts, depths: Sequence[int], pixels: torch.Tensor, *, stride_in_1x1: bool
) -> list[torch.Tensor]:
    """Return the outputs of ResNet's stages; Caffe's models stride in the first convolution of a block."""
    found = []
    pixels = functional.max_pool2d(stem(pixels, 2).relu(), 3, 2, 1)
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            stride = 2 if block == 0 and stage > 1 else 1
            strides = (stride, 1) if stride_in_1x1 else (1, stride)
            pixels = _bottleneck(pixels, partial(parts, stage, block), *strides, None)
        found.append(pixels)
    return found


def _bottleneck(
    pixels: torch.Tensor, named: Callable[[str], Layer | None], first: int, second: int, squeeze: Layer | None
) -> torch.Tensor:
    """Run one block; ``first`` and ``second`` are the strides of its 1×1 and its 3×3 convolution."""

    def part(name: str) -> Layer:
        layer = named(name)
        if layer is None:
            raise ConversionError(f"got a block without its convolution {name}, expected one. Is the file complete?")
        return layer

    shortcut = named("shortcut")
    inner = part("a")(pixels, first).relu()
    inner = part("b")(inner, second).relu()
    if squeeze is not None:
        weights = squeeze(inner.mean((2, 3), keepdim=True)).relu()
        inner = inner * part("excite")(weights).sigmoid()
    inner = part("c")(inner)
    return (inner + (pixels if shortcut is None else shortcut(pixels, first * second))).relu()
