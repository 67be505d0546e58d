"""The table of exporters, and what an exporter takes and gives. A new family's is one file here and one line."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from dethandlers.spec import Decoding, Preprocessing, Spec

from detserve.export.tracing import DEFAULT_OPSET

EXPORTERS: dict[str, str] = {
    "mmdet": "detserve.export.mmdet_export:export_network",
    "torchvision": "detserve.export.torchvision_export:export_torchvision",
}

FREE_AXES = ("batch", "size")
"""What may be dynamic: the number of images, and their height and width."""


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        precision: of the layers' weights and arithmetic; boxes, scores and NMS are float32 in both.
        nms: where non-maximum suppression happens; None lets the family choose.
        opset: ONNX operator set.
        dynamic: of ``FREE_AXES``; None is everything that the model allows.
        batch: images per run, where the batch is not dynamic.
    """

    precision: Literal["fp32", "fp16"] = "fp32"
    nms: Literal["host", "graph"] | None = None
    opset: int = DEFAULT_OPSET
    dynamic: tuple[str, ...] | None = None
    batch: int = 1


@dataclass(frozen=True)
class Graph:
    """What a family's exporter makes.

    Attributes:
        content: the ONNX file's bytes, without description.
        preprocessing: how the detector has to prepare images for it.
        decoding: what the detector has to do with its outputs.
        dynamic: of ``FREE_AXES``, what is.
        defaults: optional inputs, by name, with the value that they have when they are not given.
        output_shapes: per output, sizes of its axes; None where an axis is free.
        input_range: ``{"batch" | "height" | "width": (least, most or None)}`` that the preprocessing gives.
        family: that serves the file; empty for the spec's own.
        builder: the model's kind, for people; empty for the spec's own.
    """

    content: bytes
    preprocessing: Preprocessing
    decoding: Decoding
    dynamic: tuple[str, ...]
    defaults: dict[str, torch.Tensor]
    output_shapes: dict[str, tuple[int | None, ...]]
    input_range: dict[str, tuple[int, int | None]]
    family: str = ""
    builder: str = ""


def exporter_of(family: str) -> Callable[[Spec, Any, ExportOptions], Graph]:
    """Return a family's exporter: ``(resolved spec, weights, options)`` to a graph.

    The weights are a state dict; for ``mmdet``, whose config says what to build, the built network that holds them.
    """
    module, _, name = EXPORTERS[family].partition(":")
    exporter: Any = getattr(importlib.import_module(module), name)
    return exporter  # type: ignore[no-any-return]
