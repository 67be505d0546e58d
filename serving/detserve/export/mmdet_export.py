"""MMDetection's detectors to ONNX: the network with its head's maps in the file, all that follows as data beside it.

config ─► built network + weights ─┬─► describe_head, describe_preprocessing ─► what the worker does around it
                                   └─► trace (deformable operators in plain ones) ─► the file
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from dethandlers.mmdet_model import quiet
from dethandlers.spec import Decoding, Preprocessing, Spec
from torch import Tensor, nn

from detserve.errors import ExportError
from detserve.export.deformable_graphs import plain_operators
from detserve.export.exporters import ExportOptions, Graph
from detserve.export.mmdet_heads import MAPS, REMEDY, describe_head
from detserve.export.mmdet_pipelines import describe_preprocessing
from detserve.export.tracing import Signature, trace

_ONE_IMAGE_HEADS = ("TOODHead",)
"""Heads that write the number of images that they are traced with into the graph."""


class Maps(nn.Module):
    """A detector up to its head's maps: ``(B, 3, h, w)`` to a tuple of them, kind after kind, level after level."""

    def __init__(self, network: Any, kind: str) -> None:
        super().__init__()
        self._network = network
        self._kind = kind

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run backbone, neck and head."""
        size = (images.shape[2], images.shape[3])
        # The DETR family asks each image whether it is padded; none is, images of one size share a pass.
        samples = [SimpleNamespace(batch_input_shape=size, img_shape=size) for _ in range(len(images))]
        outputs = self._network._forward(images, samples)
        if self._kind == "queries":
            return tuple(layers[-1] for layers in outputs)
        return tuple(level for levels in outputs for level in levels)


def export_network(spec: Spec, network: Any, options: ExportOptions) -> Graph:  # noqa: ARG001 - as every exporter
    """Export a built detector with its weights.

    Args:
        spec: resolved.
        network: of `dethandlers.mmdet_model.build_network`, in evaluation mode.
        options: how.

    Raises:
        ExportError: the model, its pipeline or an option cannot be exported, with the reason.
    """
    head = describe_head(network)
    settings = describe_preprocessing(_test_steps(network.cfg), network.data_preprocessor)
    dynamic = _dynamic(network, settings, head["kind"], options)
    example = _example(settings, dynamic, options.batch)
    graph = Maps(network, head["kind"]).eval()
    with torch.no_grad(), plain_operators(), quiet():
        outputs = graph(example)
        names = _names(head, len(outputs))
        if head["kind"] == "dense":
            head["factors"] = any(name.startswith("factors") for name in names)
        axes = _axes(names, dynamic, head["kind"])
        content = trace(graph, (example,), Signature(("images",), names, axes), opset=options.opset)
    shapes: dict[str, tuple[int | None, ...]] = {
        name: tuple(None if axis in axes.get(name, {}) else size for axis, size in enumerate(output.shape))
        for name, output in zip(names, outputs, strict=True)
    }
    nms = head.get("nms") or {}
    decoding = Decoding(
        strides=tuple(int(x) for x, _ in head.get("strides", ())), nms_iou=nms.get("iou_threshold", 1.0), head=head
    )
    ranges = _input_range(settings, dynamic, options.batch)
    kind = f"{type(network).__name__} with {type(network.bbox_head).__name__}"
    return Graph(content, settings, decoding, dynamic, {}, shapes, ranges, family="mmdet_onnx", builder=kind)


def _test_steps(config: Any) -> list[dict[str, Any]]:
    from mmdet.utils import get_test_pipeline_cfg

    return [dict(step) for step in get_test_pipeline_cfg(config)]


def _dynamic(network: Any, settings: Preprocessing, kind: str, options: ExportOptions) -> tuple[str, ...]:
    if options.precision != "fp32":
        raise ExportError(
            f"precision: got {options.precision} with {type(network).__name__}, expected fp32. {REMEDY}, with "
            f"--serving precision={options.precision}"
        )
    if options.nms == "graph":
        raise ExportError(
            "nms: got 'graph', expected 'host': MMDetection's heads are exported up to their maps. Leave it out."
        )
    if kind == "queries" and (settings.divisor != 1 or settings.pad_to != "none"):
        raise ExportError(
            "data_preprocessor: got padding with a model of the DETR family, which masks it; expected "
            f"pad_size_divisor=1 and no Pad. {REMEDY}"
        )
    alone = any(type(module).__name__ in _ONE_IMAGE_HEADS for module in network.modules())
    fixed = _fixed_size(settings) is not None
    possible = [axis for axis, can in (("batch", not alone), ("size", not fixed)) if can]
    wanted = possible if options.dynamic is None else list(options.dynamic)
    if options.dynamic is None and options.batch != 1:
        wanted = [axis for axis in possible if axis != "batch"]
    if "size" in wanted and fixed:
        raise ExportError("dynamic: got size, but every image is resized to one size. Export it with --dynamic batch.")
    if "size" not in wanted and not fixed:
        raise ExportError(
            "dynamic: got no size, but each image keeps its aspect ratio: one fixed size would give other detections. "
            f"Export it with --dynamic {','.join(possible)}."
        )
    if "batch" in wanted and alone:
        raise ExportError("dynamic: got batch, but this head's graph holds one image. Export it with --dynamic size.")
    if options.batch != 1 and (alone or "batch" in wanted):
        raise ExportError(f"batch: got {options.batch}, expected 1 with this model, or no --dynamic batch.")
    return tuple(axis for axis in ("batch", "size") if axis in wanted)


def _fixed_size(settings: Preprocessing) -> tuple[int, int] | None:
    """The ``(h, w)`` px that every image gets; None where images keep their own."""
    if settings.resize == "stretch":
        size = settings.size
    elif settings.pad_to == "square" and settings.shorter_side == settings.longer_side:
        size = settings.longer_side, settings.longer_side
    elif settings.pad_to == "size" and _always_within(settings):
        size = settings.size
    else:
        return None
    return _padded(size[0], settings), _padded(size[1], settings)


def _always_within(settings: Preprocessing) -> bool:
    return min(settings.size) >= settings.longer_side


def _padded(side: int, settings: Preprocessing) -> int:
    return math.ceil(side / settings.divisor) * settings.divisor


def _example(settings: Preprocessing, dynamic: tuple[str, ...], batch: int) -> Tensor:
    """Pixels to trace with; small where the size is free, since only the operators matter."""
    free = (_padded(224, settings), _padded(288, settings))
    height, width = _fixed_size(settings) or free
    count = 2 if "batch" in dynamic else batch
    return torch.rand((count, 3, height, width), generator=torch.Generator().manual_seed(0))


def _names(head: dict[str, Any], count: int) -> list[str]:
    kinds = MAPS[head["kind"]]
    if head["kind"] == "queries":
        return list(kinds)
    levels = len(head["strides"])
    made, left = divmod(count, levels)
    if left or not 1 <= made <= len(kinds):
        raise ExportError(f"head: got {count} maps for {levels} levels, which cannot be exported. {REMEDY}")
    return [f"{kind}_{level}" for kind in kinds[:made] for level in range(levels)]


def _axes(names: list[str], dynamic: tuple[str, ...], kind: str) -> dict[str, dict[int, str]]:
    batch = {0: "batch"} if "batch" in dynamic else {}
    size = {2: "height", 3: "width"} if "size" in dynamic else {}
    maps = {} if kind == "queries" else {axis: f"{{}}_{name}" for axis, name in size.items()}
    axes = {name: {**batch, **{axis: text.format(name) for axis, text in maps.items()}} for name in names}
    return {"images": {**batch, **size}, **axes}


def _input_range(settings: Preprocessing, dynamic: tuple[str, ...], batch: int) -> dict[str, tuple[int, int | None]]:
    images = (1, None) if "batch" in dynamic else (batch, batch)
    fixed = _fixed_size(settings)
    if fixed:
        return {"batch": images, "height": (fixed[0], fixed[0]), "width": (fixed[1], fixed[1])}
    most = max(settings.longer_side, *(settings.size if settings.pad_to == "size" else (0,)))
    sides = (settings.divisor, _padded(most, settings))
    return {"batch": images, "height": sides, "width": sides}
