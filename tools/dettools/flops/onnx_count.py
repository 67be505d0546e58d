"""The cost of an ONNX file, node by node, with the shapes that its nodes really have.

Nodes behind a RoiAlign run over as many RoIs as the image has: their cost of one RoI is their cost in the run divided
by the RoIs of the run, and the total is a range, as for PyTorch.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from detserve.export.onnx_file import SPEC_KEY

from dettools.flops.cost import Cost, Part, Share, Uncounted
from dettools.flops.onnx_operators import VIEWS, kind_of, macs_of
from dettools.flops.onnx_stages import Stages, find_stages
from dettools.onnx_graph.inputs import make_feed
from dettools.onnx_graph.model_file import OnnxFile
from dettools.onnx_graph.shapes import GraphShapes, NodeShapes, infer_shapes, run_shapes
from dettools.onnx_graph.summary import count_parameters, qualified_name, weight_types

# torchvision's defaults: rpn_post_nms_top_n_test and box_detections_per_img.
MAX_PROPOSALS = 1000
MAX_DETECTIONS = 100
# Builders with a default of their own.
_PROPOSALS_OF = {"fasterrcnn_mobilenet_v3_large_320_fpn": 150}


def count_onnx(
    file: OnnxFile,
    asked: tuple[int, int] | None,
    *,
    max_proposals: int | None = None,
    max_detections: int | None = None,
) -> Cost:
    """Count one forward pass of the file's batch, or of one image where the batch is open.

    Args:
        file: the model.
        asked: ``(H, W)`` px of the input; None where the file fixes them.
        max_proposals: RoIs of a box head at most; None takes what the file says (exported by detserve), or 1000.
        max_detections: RoIs of a mask or keypoint head at most; None takes what the file says, or 100.

    Raises:
        OnnxFileError: the size is missing or contradicts the file, or the file does not run.
    """
    feed = make_feed(file, asked)
    shapes = infer_shapes(file, feed)
    if shapes.unknown:
        shapes = run_shapes(file, feed)
    stages = find_stages(file.proto.graph)
    limits = _limits(file.proto)
    limits = {"proposal": max_proposals or limits["proposal"], "detection": max_detections or limits["detection"]}
    tally, seen = _tally(shapes, stages)
    parts = tuple(
        Part(item, tally.of_stage(stage), max(limits[item], rois), rois)
        for stage, (item, rois) in enumerate(zip(stages.items, seen, strict=True), start=1)
    )
    types = weight_types(file.proto)
    notes = [
        f"{sum(part.item == item for part in parts)} stages run over {item}s"
        for item in dict.fromkeys(stages.items)
        if sum(part.item == item for part in parts) > 1
    ]
    if shapes.skipped:
        notes.append(f"{shapes.skipped} nodes did not run: branches not taken, or replaced by onnxruntime")
    if tally.adaptive:
        notes.append("RoiAlign with sampling_ratio 0 is counted as 2×2 samples a bin")
    return Cost(
        subject=file.subject,
        engine="onnx",
        input_size=feed.size,
        macs=tally.of_stage(0),
        parts=parts,
        operators=tuple(sorted(tally.shares(tally.by_operator), key=lambda share: -share.most(parts))),
        modules=tally.shares(tally.by_scope),
        uncounted=tally.uncounted(),
        elements=tally.elements,
        parameters=count_parameters(types),
        buffers=0,
        parameter_types=types,
        activation_bytes=None,
        largest_activation_bytes=None,
        measured_by=shapes.source,
        batch=feed.batch,
        notes=tuple(notes),
    )


@dataclass
class _Tally:
    """Sums over the executions of the nodes; the lists hold one figure per stage, stage 0 first."""

    stages: int
    rois: list[int] = field(default_factory=list)
    by_operator: dict[str, list[int]] = field(default_factory=dict)
    by_scope: dict[str, list[int]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    elements: int = 0
    adaptive: bool = False
    other_calls: Counter[str] = field(default_factory=Counter)
    other_elements: Counter[str] = field(default_factory=Counter)

    def add(self, node: Any, stage: int, macs: int) -> None:
        names = [
            (self.by_operator, qualified_name(node.domain, node.op_type)),
            *((self.by_scope, scope) for scope in _scopes(node.name)),
        ]
        for table, name in names:
            table.setdefault(name, [0] * (self.stages + 1))[stage] += macs

    def of_stage(self, stage: int) -> int:
        return sum(macs[stage] for macs in self.by_operator.values()) // self.rois[stage]

    def shares(self, table: dict[str, list[int]]) -> tuple[Share, ...]:
        return tuple(
            Share(
                name,
                macs[0],
                tuple(one // rois for one, rois in zip(macs[1:], self.rois[1:], strict=True)),
                calls=self.calls[name],
            )
            for name, macs in table.items()
        )

    def uncounted(self) -> tuple[Uncounted, ...]:
        return tuple(
            Uncounted(name, kind_of(name), self.other_calls[name], elements)
            for name, elements in self.other_elements.most_common()
        )


def _limits(proto: Any) -> dict[str, int]:
    """Return the most proposals and detections: of a file that detserve exported those of its spec."""
    limits = {"proposal": MAX_PROPOSALS, "detection": MAX_DETECTIONS}
    text = next((entry.value for entry in proto.metadata_props if entry.key == SPEC_KEY), "")
    try:
        spec = json.loads(text) if text else {}
        chosen = spec.get("builder_options", {}).get("rpn_post_nms_top_n_test")
        limits["proposal"] = int(chosen or _PROPOSALS_OF.get(str(spec.get("builder")), MAX_PROPOSALS))
        limits["detection"] = int(spec.get("serving", {}).get("max_detections", MAX_DETECTIONS))
    except (ValueError, TypeError, AttributeError):
        return {"proposal": MAX_PROPOSALS, "detection": MAX_DETECTIONS}
    return limits


def _tally(shapes: GraphShapes, stages: Stages) -> tuple[_Tally, tuple[int, ...]]:
    """Return the sums, and the RoIs of each stage from 1 on in the run."""
    tally = _Tally(len(stages.items))
    executions: dict[int, list[tuple[NodeShapes, int]]] = {stage: [] for stage in range(len(stages.items) + 1)}
    for execution in shapes.nodes:
        node = execution.node
        name = qualified_name(node.domain, node.op_type)
        if name in VIEWS:
            continue
        elements = sum(math.prod(shape) for shape in execution.outputs if shape is not None)
        tally.elements += elements
        macs = macs_of(execution)
        if macs is None:
            tally.other_calls[name] += 1
            tally.other_elements[name] += elements
        else:
            tally.calls[name] += 1
            executions[stages.of_node[execution.number]].append((execution, macs))
            ratios = [attribute.i for attribute in node.attribute if attribute.name == "sampling_ratio"]
            tally.adaptive |= node.op_type == "RoiAlign" and not any(ratios)
    seen = tuple(_rois([execution for execution, _ in executions[stage]]) for stage in range(1, tally.stages + 1))
    tally.rois = [1, *(rois or 1 for rois in seen)]
    for stage, found in executions.items():
        counted = found if stage == 0 or seen[stage - 1] else _of_one_roi([execution for execution, _ in found])
        for execution, macs in counted:
            tally.add(execution.node, stage, macs)
    return tally, seen


def _rois(executions: list[NodeShapes]) -> int:
    """Return the RoIs of a stage: the levels share them, or each level has all; the head behind tells which."""
    aligned = [one.outputs[0][0] for one in executions if one.node.op_type == "RoiAlign" and one.outputs[0]]
    heads = {one.outputs[0][0] for one in executions if one.node.op_type != "RoiAlign" and one.outputs[0]}
    together, largest = sum(aligned), max(aligned, default=0)
    return largest if largest in heads and together not in heads else together


def _of_one_roi(executions: list[NodeShapes]) -> list[tuple[NodeShapes, int]]:
    """Return what the executions would cost with one RoI, of a run that had none: the first side is the RoIs."""
    levels = [one.number for one in executions if one.node.op_type == "RoiAlign"][1:]
    found = []
    for execution in executions:
        if execution.number in levels:
            continue
        single = NodeShapes(
            execution.number,
            execution.node,
            tuple((1, *shape[1:]) if shape and shape[0] == 0 else shape for shape in execution.inputs),
            tuple((1, *shape[1:]) if shape and shape[0] == 0 else shape for shape in execution.outputs),
        )
        found.append((execution, macs_of(single) or 0))
    return found


def _scopes(name: str) -> list[str]:
    """Return the module paths in a node's name: of ``/roi_heads/box_head/fc6/Gemm`` three."""
    parts = [part for part in name.split("/") if part][:-1]
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
