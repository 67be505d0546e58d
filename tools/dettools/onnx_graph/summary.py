"""What is in an ONNX file, in one look: operators, inputs and outputs, opsets, metadata, bodies, foreign domains."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dettools.onnx_graph.inputs import ModelInput, model_inputs, value_type
from dettools.onnx_graph.model_file import OnnxFile, bodies, every_graph, import_onnx, numbered_nodes

KNOWN_DOMAINS = ("ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training")


@dataclass(frozen=True)
class OperatorUse:
    """One operator of a file.

    Attributes:
        name: with its domain where it is not ONNX's own.
        nodes: how many.
        parameters: elements of the weights that its nodes read first.
    """

    name: str
    nodes: int
    parameters: int


@dataclass(frozen=True)
class Subgraph:
    """A body of an If, a Loop or a Scan.

    Attributes:
        holder: the node's name, or its first output.
        operator: of the holder.
        name: of the graph.
        nodes: in it, without those of bodies further in.
    """

    holder: str
    operator: str
    name: str
    nodes: int


@dataclass(frozen=True)
class Summary:
    """What is in a file.

    Attributes:
        subject: names it.
        bytes: with its external data.
        ir_version: of the format.
        opsets: version by domain.
        producer: name and version of what wrote it; empty where it says nothing.
        metadata: keys and values, in order.
        inputs: those with a default value included.
        outputs: without defaults.
        operators: most nodes first.
        nodes: of all graphs in it.
        parameters: elements of the weights.
        types: elements of all constants by type.
        subgraphs: bodies, in order.
        custom_domains: domains that are not ONNX's, with the number of their nodes.
    """

    subject: str
    bytes: int
    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    metadata: Mapping[str, str]
    inputs: tuple[ModelInput, ...]
    outputs: tuple[ModelInput, ...]
    operators: tuple[OperatorUse, ...]
    nodes: int
    parameters: int
    types: Mapping[str, int]
    subgraphs: tuple[Subgraph, ...]
    custom_domains: Mapping[str, int]


def summarise(file: OnnxFile) -> Summary:
    """Read a file's contents; nothing is run."""
    proto = file.proto
    nodes = numbered_nodes(proto.graph)
    types = weight_types(proto)
    unread = {name: math.prod(tensor.dims) for name, tensor in _weights(proto)}
    counts: Counter[str] = Counter()
    owned: Counter[str] = Counter()
    for node in nodes:
        name = qualified_name(node.domain, node.op_type)
        counts[name] += 1
        owned[name] += sum(unread.pop(given, 0) for given in node.input)
    foreign = Counter(node.domain for node in nodes if (node.domain or "ai.onnx") not in KNOWN_DOMAINS)
    return Summary(
        subject=file.subject,
        bytes=file.bytes,
        ir_version=proto.ir_version,
        opsets={entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        producer=f"{proto.producer_name} {proto.producer_version}".strip(),
        metadata={entry.key: entry.value for entry in proto.metadata_props},
        inputs=model_inputs(file),
        outputs=tuple(ModelInput(value.name, *value_type(value)) for value in proto.graph.output),
        operators=tuple(OperatorUse(name, count, owned[name]) for name, count in counts.most_common()),
        nodes=len(nodes),
        parameters=count_parameters(types),
        types=types,
        subgraphs=tuple(
            Subgraph(node.name or node.output[0], node.op_type, body.name, len(body.node))
            for node in nodes
            for body in bodies(node)
        ),
        custom_domains=dict(foreign),
    )


def weight_types(proto: Any) -> dict[str, int]:
    """Return the elements of a model's initializers and constants by type, without the defaults of small inputs."""
    onnx = import_onnx()
    small = {value.name for value in proto.graph.input}
    types: Counter[str] = Counter()
    for name, tensor in _weights(proto):
        elements = math.prod(tensor.dims)
        if name not in small or elements > 1:
            types[onnx.TensorProto.DataType.Name(tensor.data_type).lower()] += elements
    return dict(types)


def count_parameters(types: Mapping[str, int]) -> int:
    """Return the weights among constants: int64, bool and string hold shapes and indices."""
    return sum(count for name, count in types.items() if name not in ("int64", "bool", "string"))


def _weights(proto: Any) -> Iterator[tuple[str, Any]]:
    """Yield initializers, and the Constant nodes in which some exporters keep their weights."""
    for graph in every_graph(proto.graph):
        for tensor in graph.initializer:
            yield tensor.name, tensor
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    yield node.output[0], attribute.t


def qualified_name(domain: str, operator: str) -> str:
    """Return the operator, with its domain where it is not ONNX's own."""
    return operator if domain in ("", "ai.onnx") else f"{domain}.{operator}"
