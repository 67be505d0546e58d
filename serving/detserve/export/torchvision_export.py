"""torchvision's detectors to ONNX: which graph, which axes may be free, what the detector has to do around it."""

import math
from collections.abc import Mapping

import torch
from dethandlers.errors import ArtefactError
from dethandlers.families.torchvision_detection import build_module, transform_settings
from dethandlers.runtimes.onnx_runtime import IMAGE_SIZES, MAX_DETECTIONS, SCORE_THRESHOLD
from dethandlers.spec import Decoding, Preprocessing, Spec
from torch import nn

from detserve.errors import CheckpointError, ExportError
from detserve.export.exporters import ExportOptions, Graph
from detserve.export.torchvision_graphs import ONE_STAGE, OneStage, TwoStage
from detserve.export.tracing import Signature, trace

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def export_torchvision(spec: Spec, state: Mapping[str, torch.Tensor], options: ExportOptions) -> Graph:
    """Export a detector of torchvision.

    Args:
        spec: resolved.
        state: the checkpoint's weights.
        options: how.

    Raises:
        ExportError: the model cannot be exported that way, with the reason.
        CheckpointError: the weights do not fit.
    """
    try:
        module = build_module(spec, state)
    except ArtefactError as error:
        raise CheckpointError(str(error)) from error
    settings = transform_settings(module)
    one_stage = isinstance(module, ONE_STAGE)
    dynamic = _dynamic(spec, settings, options, one_stage=one_stage)
    if options.nms == "host" and not one_stage:
        raise ExportError(
            f"nms: got 'host' with {spec.builder}, whose second stage needs the kept proposals inside the graph. "
            "Export it with --nms graph."
        )
    nms = options.nms or ("host" if one_stage else "graph")
    decoding = Decoding(strides=(), nms_iou=float(getattr(module, "roi_heads", module).nms_thresh), nms=nms)  # type: ignore[arg-type]
    most, threshold = torch.tensor(spec.serving.max_detections), torch.tensor(spec.serving.score_threshold)
    optional = {} if nms == "host" else {SCORE_THRESHOLD: threshold, MAX_DETECTIONS: most}
    graph: nn.Module = (
        OneStage(module, _DTYPES[options.precision], nms=nms == "graph")
        if one_stage
        else TwoStage(module, _DTYPES[options.precision])
    )
    example = _example(settings, 1 if "batch" not in dynamic else 2, options.batch, dynamic)
    sizes = {} if settings.resize == "stretch" else {IMAGE_SIZES: _sizes(example)}
    # Few detections are enough to trace with; each goes through the second stage's heads.
    few = {name: value if name == SCORE_THRESHOLD else torch.tensor(5) for name, value in optional.items()}
    arguments = (example, *sizes.values(), *few.values())
    signature = _signature(graph, ("images", *sizes, *optional), dynamic)
    content = trace(graph, arguments, signature, opset=options.opset)
    with torch.no_grad():
        outputs = dict(zip(signature.outputs, graph(*arguments), strict=True))
    shapes = {
        name: tuple(None if axis in signature.dynamic.get(name, {}) else size for axis, size in enumerate(output.shape))
        for name, output in outputs.items()
    }
    ranges = _input_range(settings, dynamic, options.batch)
    return Graph(content, settings, decoding, dynamic, optional, shapes, ranges)


def _dynamic(spec: Spec, settings: Preprocessing, options: ExportOptions, *, one_stage: bool) -> tuple[str, ...]:
    fixed = settings.resize == "stretch"
    possible = [axis for axis, can in (("batch", one_stage), ("size", not fixed)) if can]
    if options.dynamic is None:
        wanted = [axis for axis in possible if axis != "batch" or options.batch == 1]
    else:
        wanted = list(options.dynamic)
    if "size" in wanted and fixed:
        height, width = settings.size
        raise ExportError(
            f"dynamic: got size with {spec.builder}, which resizes every image to {height}×{width}. "
            "Export it with --dynamic batch."
        )
    if "batch" in wanted and not one_stage:
        raise ExportError(
            f"dynamic: got batch with {spec.builder}, a two-stage model, whose graph holds one image: each has its own "
            "number of proposals. Export it with --dynamic size; the detector runs a batch image by image."
        )
    if "size" not in wanted and not fixed:
        raise ExportError(
            f"dynamic: got no size with {spec.builder}, which eager inference pads to multiples of {settings.divisor}, "
            "each image as it needs: one fixed size would give other detections. Export it with --dynamic "
            f"{','.join(possible)}."
        )
    if options.batch != 1 and not one_stage:
        raise ExportError(f"batch: got {options.batch} with {spec.builder}, whose graph holds one image. Leave it out.")
    if options.batch != 1 and "batch" in wanted:
        raise ExportError(f"batch: got {options.batch} with --dynamic batch, expected one of the two.")
    return tuple(axis for axis in ("batch", "size") if axis in wanted)


def _example(settings: Preprocessing, dynamic_batch: int, batch: int, dynamic: tuple[str, ...]) -> torch.Tensor:
    """Pixels to trace with; small where the size is free, since only the operators matter."""
    height, width = (
        settings.size
        if settings.resize == "stretch"
        else (_padded(min(256, settings.longer_side), settings), _padded(min(320, settings.longer_side), settings))
    )
    generator = torch.Generator().manual_seed(0)
    return torch.rand((dynamic_batch if "batch" in dynamic else batch, 3, height, width), generator=generator)


def _padded(side: int, settings: Preprocessing) -> int:
    return math.ceil(side / settings.divisor) * settings.divisor


def _sizes(images: torch.Tensor) -> torch.Tensor:
    return torch.tensor([images.shape[-2:]] * len(images))


def _signature(graph: nn.Module, inputs: tuple[str, ...], dynamic: tuple[str, ...]) -> Signature:
    batch = {0: "batch"} if "batch" in dynamic else {}
    size = {2: "height", 3: "width"} if "size" in dynamic else {}
    axes: dict[str, dict[int, str]] = {"images": {**batch, **size}, IMAGE_SIZES: batch}
    if isinstance(graph, OneStage):
        rows = "detections" if SCORE_THRESHOLD in inputs else "candidates"
        outputs = ["boxes", "scores", "labels"]
        # Candidates of a fixed input are always as many.
        free = {} if rows == "candidates" and not graph.takes_sizes else {1: rows}
        axes |= {name: {**batch, **free} for name in outputs}
        if SCORE_THRESHOLD in inputs:
            outputs.append("num_detections")
            axes["num_detections"] = batch
    else:
        more = [name for name, has in (("masks", graph.has_masks), ("keypoint_maps", graph.has_keypoints)) if has]
        outputs = ["boxes", "scores", "labels", *more]
        axes |= {name: {1: "detections"} for name in outputs}
    return Signature(inputs, outputs, {name: one for name, one in axes.items() if name in (*inputs, *outputs)})


def _input_range(settings: Preprocessing, dynamic: tuple[str, ...], batch: int) -> dict[str, tuple[int, int | None]]:
    images = (1, None) if "batch" in dynamic else (batch, batch)
    if settings.resize == "stretch":
        height, width = settings.size
        return {"batch": images, "height": (height, height), "width": (width, width)}
    sides = (settings.divisor, _padded(settings.longer_side, settings))
    return {"batch": images, "height": sides, "width": sides}
