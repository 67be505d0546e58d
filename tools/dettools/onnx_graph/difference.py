"""What changed between two ONNX files: header, inputs and outputs, operators, their attributes and wiring, weights.

Nodes are joined by name, nameless ones by their first output; weights by name, and by content where the names differ.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dettools.onnx_graph.inputs import ModelInput, format_shape
from dettools.onnx_graph.model_file import OnnxFile, OnnxFileError, every_graph, import_onnx, numbered_nodes
from dettools.onnx_graph.summary import Summary, qualified_name, summarise


@dataclass(frozen=True)
class Change:
    """One difference.

    Attributes:
        part: ``header``, ``metadata``, ``input``, ``output``, ``operators``, ``node`` or ``weight``.
        where: the key, the operator, or the name.
        before: in the first file; empty where it is not there.
        after: in the second.
    """

    part: str
    where: str
    before: str
    after: str


def compare_files(first: OnnxFile, second: OnnxFile) -> tuple[Change, ...]:
    """Return every difference, from the header down to the weights; empty when the files are alike.

    Raises:
        OnnxFileError: weights in an external file cannot be read.
    """
    before, after = summarise(first), summarise(second)
    return (
        *_changes("header", _header(before), _header(after)),
        *_changes("metadata", before.metadata, after.metadata),
        *_changes("input", _values(before.inputs), _values(after.inputs)),
        *_changes("output", _values(before.outputs), _values(after.outputs)),
        *_changes("operators", _counts(before), _counts(after)),
        *_changes("node", _nodes(first), _nodes(second)),
        *_weight_changes(first, second),
    )


def _changes(part: str, before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[Change]:
    for where in dict.fromkeys([*before, *after]):
        old, new = before.get(where, ""), after.get(where, "")
        if (where in before) != (where in after) or old != new:
            yield Change(part, where, old, new)


def _header(summary: Summary) -> dict[str, str]:
    opsets = {f"opset {domain}": str(version) for domain, version in summary.opsets.items()}
    return {"IR version": str(summary.ir_version), "producer": summary.producer, **opsets}


def _values(values: tuple[ModelInput, ...]) -> dict[str, str]:
    return {
        one.name: f"{one.type} {format_shape(one.shape)}{' with default' if one.has_default else ''}" for one in values
    }


def _counts(summary: Summary) -> dict[str, str]:
    return {one.name: str(one.nodes) for one in summary.operators}


def _nodes(file: OnnxFile) -> dict[str, str]:
    """Return each node as text: operator, inputs, outputs and attributes."""
    nodes = numbered_nodes(file.proto.graph)
    names = Counter(node.name for node in nodes)
    found: dict[str, str] = {}
    for number, node in enumerate(nodes):
        own = node.name if node.name and names[node.name] == 1 else next(iter(node.output), "")
        key = own if own not in found else f"{own} #{number}"
        attributes = ", ".join(
            f"{one.name}={_attribute(one)}" for one in sorted(node.attribute, key=lambda one: one.name)
        )
        operator = qualified_name(node.domain, node.op_type)
        found[key] = f"{operator}({', '.join(node.input)}) -> {', '.join(node.output)}" + (
            f" [{attributes}]" if attributes else ""
        )
    return found


def _attribute(attribute: Any) -> str:
    onnx = import_onnx()
    if attribute.HasField("t"):
        return f"tensor {_digest(attribute.t, '')[:16]}"
    if attribute.HasField("g"):
        return f"graph of {len(attribute.g.node)} nodes"
    if attribute.graphs or attribute.tensors:
        return f"{len(attribute.graphs)} graphs, {len(attribute.tensors)} tensors"
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return _plain(value)


def _plain(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _weight_changes(first: OnnxFile, second: OnnxFile) -> Iterator[Change]:
    before, after = _weights(first), _weights(second)
    lost = {name: text for name, text in before.items() if name not in after}
    gained = {name: text for name, text in after.items() if name not in before}
    # The same content under another name.
    homes: dict[str, list[str]] = {}
    for name, text in gained.items():
        homes.setdefault(text, []).append(name)
    for name, text in lost.items():
        if homes.get(text):
            new = homes[text].pop(0)
            del gained[new]
            yield Change("weight", name, text, f"renamed to {new}")
        else:
            yield Change("weight", name, text, "")
    for name, text in gained.items():
        yield Change("weight", name, "", text)
    for name in (name for name in before if name in after):
        if before[name] != after[name]:
            yield Change("weight", name, before[name], after[name])


def _weights(file: OnnxFile) -> dict[str, str]:
    onnx = import_onnx()
    found = {}
    for graph in every_graph(file.proto.graph):
        for tensor in graph.initializer:
            kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
            try:
                digest = _digest(tensor, str(file.path.parent))
            except Exception as error:
                raise OnnxFileError(
                    f"{file.subject}: the weight {tensor.name!r} cannot be read ({error}). Export or copy it again."
                ) from error
            found[tensor.name] = f"{kind} {list(tensor.dims)} SHA-256 {digest[:16]}"
    return found


def _digest(tensor: Any, folder: str) -> str:
    """Digest the values, which a file may keep in more than one way."""
    onnx = import_onnx()
    values = onnx.numpy_helper.to_array(tensor, base_dir=folder)
    content = values.tobytes() if values.dtype != object else repr(values.tolist()).encode()
    return hashlib.sha256(content).hexdigest()
