"""The shapes that every node of an ONNX graph really has.

    fixed inputs ─► onnx's shape inference ─► complete? ─► yes: done, nothing is run
                                                   └────► no (NonZero, NMS, Loop): one run by onnxruntime, profiled

onnxruntime tells the shapes of every node that it ran; without its optimisations those are the nodes of the file.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dettools.onnx_graph.inputs import Feed
from dettools.onnx_graph.model_file import OnnxFile, OnnxFileError, bodies, every_graph, import_onnx

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NodeShapes:
    """One execution of a node; a node in a loop has as many as the loop has rounds.

    Attributes:
        node: ``onnx.NodeProto``.
        inputs: shapes in the node's order; None where unknown or left out.
        outputs: likewise.
    """

    node: Any
    inputs: tuple[Shape | None, ...]
    outputs: tuple[Shape | None, ...]


@dataclass(frozen=True)
class GraphShapes:
    """The executions of all nodes in order.

    Attributes:
        nodes: as executed.
        source: where the shapes came from, for people.
        unknown: nodes whose shapes are not known, by static inference only.
        skipped: nodes that did not run: branches not taken.
    """

    nodes: tuple[NodeShapes, ...]
    source: str
    unknown: int = 0
    skipped: int = 0


def infer_shapes(file: OnnxFile, feed: Feed) -> GraphShapes:
    """Infer shapes without running; nodes in the bodies of If, Loop and Scan count as unknown."""
    onnx = import_onnx()
    proto = onnx.ModelProto()
    proto.CopyFrom(file.proto)
    for value in proto.graph.input:
        if value.name in feed.arrays:
            sides = value.type.tensor_type.shape.dim
            for dim, side in zip(sides, feed.arrays[value.name].shape, strict=True):
                dim.dim_value = side
    # What the exporter noted was for its own input.
    del proto.graph.value_info[:]
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # noqa: BLE001 - it refuses graphs of more than 2 GB and operators it does not know
        inferred = proto
    shapes = _constants(inferred.graph)
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        sides = [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.HasField("shape") and None not in sides:
            shapes[value.name] = tuple(side for side in sides if side is not None)
    nodes = tuple(_with_shapes(node, shapes) for node in file.proto.graph.node)
    inner = sum(len(body.node) for node in file.proto.graph.node for top in bodies(node) for body in every_graph(top))
    unknown = inner + sum(
        any(shape is None for name, shape in zip(one.node.output, one.outputs, strict=True) if name) for one in nodes
    )
    return GraphShapes(nodes, "onnx's shape inference, nothing was run", unknown=unknown)


def run_shapes(file: OnnxFile, feed: Feed) -> GraphShapes:
    """Run the file once by onnxruntime on the CPU, without optimisation, and read the shapes of what ran.

    Raises:
        OnnxFileError: onnxruntime is not installed or does not run the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise OnnxFileError(
            f"{file.subject}: its shapes depend on its data, so that it must be run: got no onnxruntime, expected it. "
            "Install it with: pip install 'detserve[onnx]'"
        ) from error
    proto, nodes = _numbered(file.proto)
    with tempfile.TemporaryDirectory(prefix="detserve-") as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(file.path.parent.resolve())
        )
        try:
            session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            session.run(None, dict(feed.arrays))
        except Exception as error:
            raise OnnxFileError(
                f"{file.subject}: onnxruntime {onnxruntime.__version__} does not run it on the CPU with "
                f"{_describe(feed)}: {str(error)[:300]}. Check the shape, and the file with `detserve graph`."
            ) from error
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    known = {name: shape for graph in every_graph(proto.graph) for name, shape in _constants(graph).items()}
    known.update({name: array.shape for name, array in feed.arrays.items()})
    ran: list[NodeShapes] = []
    seen = set()
    for name, outputs in _kernel_events(events):
        node = nodes.get(name)
        if node is None:
            continue
        seen.add(name)
        known.update(zip([output for output in node.output if output], outputs, strict=False))
        ran.append(_with_shapes(node, known))
    constants = {name for name, node in nodes.items() if node.op_type == "Constant"}
    skipped = len(nodes.keys() - seen - constants)
    return GraphShapes(tuple(ran), f"a run by onnxruntime {onnxruntime.__version__}", skipped=skipped)


def _numbered(proto: Any) -> tuple[Any, dict[str, Any]]:
    """Return a copy whose nodes have names of their own, and the file's nodes by those names."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    originals = [node for graph in every_graph(proto.graph) for node in graph.node]
    copies = [node for graph in every_graph(copy.graph) for node in graph.node]
    nodes = {}
    for number, (original, node) in enumerate(zip(originals, copies, strict=True)):
        node.name = f"node_{number}"
        nodes[node.name] = original
    return copy, nodes


def _kernel_events(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Shape]]]:
    for event in events:
        shapes = event.get("args", {}).get("output_type_shape")
        if shapes is not None and str(event["name"]).endswith("_kernel_time"):
            outputs = [tuple(shape) for one in shapes for shape in one.values()]
            yield str(event["name"]).removesuffix("_kernel_time"), outputs


def _constants(graph: Any) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                shapes[node.output[0]] = tuple(attribute.t.dims)
    return shapes


def _with_shapes(node: Any, shapes: Mapping[str, Shape]) -> NodeShapes:
    return NodeShapes(
        node, tuple(shapes.get(name) for name in node.input), tuple(shapes.get(name) for name in node.output)
    )


def _describe(feed: Feed) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in feed.arrays.items())
