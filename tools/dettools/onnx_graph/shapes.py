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
from dettools.onnx_graph.model_file import OnnxFile, OnnxFileError, bodies, every_graph, import_onnx, numbered_nodes

Shape = tuple[int, ...]
_PREFIX = "detserve_node_"


@dataclass(frozen=True)
class NodeShapes:
    """One execution of a node; a node in a loop has as many as the loop has rounds.

    Attributes:
        number: of the node, as `numbered_nodes` counts.
        node: ``onnx.NodeProto``.
        inputs: shapes in the node's order; None where unknown or left out.
        outputs: likewise.
    """

    number: int
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
    nodes = tuple(_with_shapes(number, node, shapes) for number, node in enumerate(file.proto.graph.node))
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
    constants = {name: shape for graph in every_graph(proto.graph) for name, shape in _constants(graph).items()}
    ran = []
    for number, inputs, outputs in _executions(events):
        if number < len(nodes):
            node = nodes[number]
            made = iter(outputs)
            read = tuple(_aligned(node.input, inputs, constants))
            ran.append(
                NodeShapes(number, node, read, tuple(next(made, None) if name else None for name in node.output))
            )
    # onnxruntime folds the first and drops casts that change nothing.
    quiet = {number for number, node in enumerate(nodes) if node.op_type in ("Constant", "Cast")}
    skipped = len(nodes) - len(quiet | {one.number for one in ran})
    return GraphShapes(tuple(ran), f"a run by onnxruntime {onnxruntime.__version__}", skipped=skipped)


def _numbered(proto: Any) -> tuple[Any, list[Any]]:
    """Return a copy whose nodes are called by their numbers, and the file's nodes by number."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    for number, node in enumerate(numbered_nodes(copy.graph)):
        node.name = f"{_PREFIX}{number}"
    return copy, numbered_nodes(proto.graph)


def _executions(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, list[Shape], list[Shape]]]:
    """Yield number, input and output shapes of what ran, in order; what onnxruntime put in has no number."""
    for event in events:
        name = str(event["name"]).removesuffix("_kernel_time").removeprefix(_PREFIX)
        shapes = event.get("args", {})
        if "output_type_shape" in shapes and str(event["name"]).endswith("_kernel_time") and name.isdecimal():
            inputs, outputs = (
                [tuple(shape) for one in shapes.get(key, []) for shape in one.values()]
                for key in ("input_type_shape", "output_type_shape")
            )
            yield int(name), inputs, outputs


def _aligned(names: Sequence[str], told: Sequence[Shape], constants: Mapping[str, Shape]) -> Iterator[Shape | None]:
    """Join the inputs to the shapes that onnxruntime tells; it leaves out inputs left out and weights it repacked."""
    rest = list(told)
    for name in names:
        if name in constants:
            if rest and rest[0] == constants[name]:
                del rest[0]
            yield constants[name]
        else:
            yield rest.pop(0) if name and rest else None


def _constants(graph: Any) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                shapes[node.output[0]] = tuple(attribute.t.dims)
    return shapes


def _with_shapes(number: int, node: Any, shapes: Mapping[str, Shape]) -> NodeShapes:
    return NodeShapes(
        number, node, tuple(shapes.get(name) for name in node.input), tuple(shapes.get(name) for name in node.output)
    )


def _describe(feed: Feed) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in feed.arrays.items())
