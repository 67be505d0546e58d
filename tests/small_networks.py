"""Small ONNX networks written node by node."""

import json

import onnx
from onnx import TensorProto, helper


def write_graph(path, nodes, inputs, outputs, constants=(), *, defaults=(), metadata=None):
    """Write a checked file.

    Args:
        inputs, outputs: ``(name, type, shape)``.
        defaults: initializers that an input of the same name overrides.
        metadata: value of ``detserve.export``; text is written as it is.
    """
    values = [helper.make_tensor_value_info(*one) for one in inputs]
    results = [helper.make_tensor_value_info(*one) for one in outputs]
    graph = helper.make_graph(list(nodes), "small", values, results, [*constants, *defaults])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    if metadata is not None:
        text = metadata if isinstance(metadata, str) else json.dumps(metadata)
        helper.set_model_props(model, {"detserve.export": text})
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return path


def witness(path, *, batch="batch", **changes):
    """Write a network that says of each image what it got: its mean, and how many images were in its run."""
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["means"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Shape", ["images"], ["count"], start=0, end=1),
        helper.make_node("Expand", ["count", "count"], ["together"]),
    ]
    inputs = [("images", TensorProto.FLOAT, [batch, 3, "height", "width"])]
    outputs = [("means", TensorProto.FLOAT, [batch]), ("together", TensorProto.INT64, [batch])]
    return write_graph(path, nodes, inputs, outputs, **changes)
