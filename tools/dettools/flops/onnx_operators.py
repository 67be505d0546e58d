"""Formulas for the operators of ONNX, from the shapes of one execution, and what the rest of them are.

The operators' definitions are those of onnx's Operators page; com.microsoft's are onnxruntime's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dettools.flops.torch_operators import deform_conv_macs, roi_align_macs
from dettools.onnx_graph.model_file import import_onnx
from dettools.onnx_graph.shapes import NodeShapes

Shape = tuple[int, ...]
Shapes = Sequence[Shape]
Attributes = Mapping[str, Any]
Formula = Callable[[Shapes, Shapes, Attributes], int | None]


def macs_of(execution: NodeShapes) -> int | None:
    """Return the MACs of one execution; None where there is no formula or a shape that it needs is not known."""
    formula = FORMULAS.get(execution.node.op_type)
    if formula is None or execution.node.domain not in ("", "ai.onnx", "com.microsoft"):
        return None
    inputs = execution.inputs
    needed = NEEDED.get(execution.node.op_type, tuple(range(len(inputs))))
    if execution.outputs[:1] == (None,) or any(place >= len(inputs) or inputs[place] is None for place in needed):
        return None
    # The others may be left out or not be known: no formula reads them.
    known = [shape if shape is not None else () for shape in inputs]
    return formula(known, [shape or () for shape in execution.outputs], attributes_of(execution.node))


def has_formula(node: Any) -> bool:
    """Say whether a node's operator is counted."""
    return node.op_type in FORMULAS and node.domain in ("", "ai.onnx", "com.microsoft")


def attributes_of(node: Any) -> dict[str, Any]:
    """Return a node's attributes as plain values."""
    onnx = import_onnx()
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _conv(inputs: Shapes, outputs: Shapes, _: Attributes) -> int:
    # Each output value sums over (C_in / groups) × kernel; stride, dilation and padding are in the output's shape.
    return math.prod(outputs[0]) * math.prod(inputs[1][1:])


def _quantised_conv(inputs: Shapes, outputs: Shapes, _: Attributes) -> int:
    return math.prod(outputs[0]) * math.prod(inputs[3][1:])


def _conv_transpose(inputs: Shapes, _outputs: Shapes, _: Attributes) -> int:
    # Each input value is spread over (C_out / groups) × kernel.
    return math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _deform_conv(inputs: Shapes, outputs: Shapes, _: Attributes) -> int:
    return deform_conv_macs(outputs[0], inputs[1], inputs[0][1])


def _gemm(inputs: Shapes, outputs: Shapes, attributes: Attributes) -> int:
    return math.prod(outputs[0]) * inputs[0][0 if attributes.get("transA") else 1]


def _matmul(inputs: Shapes, outputs: Shapes, attributes: Attributes) -> int:
    left = inputs[0]
    summed = left[-2] if attributes.get("transA") and len(left) > 1 else left[-1]
    return math.prod(outputs[0]) * summed


def _quantised_matmul(inputs: Shapes, outputs: Shapes, _: Attributes) -> int:
    return math.prod(outputs[0]) * inputs[0][-1]


def _einsum(inputs: Shapes, _outputs: Shapes, attributes: Attributes) -> int:
    """Multiply operand after operand: of two, every combination of their indices is one MAC.

    More than two are taken from left to right, each step keeping what later operands or the output still need.
    """
    left, arrow, right = attributes["equation"].decode().replace(" ", "").partition("->")
    terms = left.split(",")
    if "..." in left or not arrow:
        return _einsum_with_ellipsis(terms, inputs)
    sizes = {
        letter: side
        for term, shape in zip(terms, inputs, strict=True)
        for letter, side in zip(term, shape, strict=True)
    }
    macs, kept = 0, set(terms[0])
    for place, term in enumerate(terms[1:], start=1):
        together = kept | set(term)
        macs += math.prod(sizes[letter] for letter in together)
        kept = together & (set(right) | set("".join(terms[place + 1 :])))
    return macs


def _einsum_with_ellipsis(terms: Sequence[str], inputs: Shapes) -> int:
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, inputs, strict=True):
        before, dots, after = term.partition("...")
        names = [*before, *after]
        free = len(shape) - len(names)
        if dots:
            # Counted from the right, as they broadcast.
            names = [*before, *(f"...{axis}" for axis in range(free, 0, -1)), *after]
        for name, side in zip(names, shape, strict=True):
            sizes[name] = max(side, sizes.get(name, 1))
    return math.prod(sizes.values()) if len(terms) > 1 else 0


def _roi_align(_inputs: Shapes, outputs: Shapes, attributes: Attributes) -> int:
    if attributes.get("mode", b"avg") == b"max":
        return 0
    ratio = int(attributes.get("sampling_ratio", 0))
    rois, channels, height, width = outputs[0]
    # With ratio 0 the samples depend on the boxes, which shapes do not tell; two a bin is what detectors take.
    return roi_align_macs([(0.0, 0.0)] * rois, channels, (height, width), ratio or 2)


def _resize(inputs: Shapes, outputs: Shapes, attributes: Attributes) -> int | None:
    taps = {b"nearest": 0, b"linear": 2}.get(attributes.get("mode", b"nearest"))
    if taps is None:
        return None  # cubic enlarges keypoints' heatmaps to boxes, whose sizes are not known
    changed = sum(a != b for a, b in zip(inputs[0], outputs[0], strict=True))
    return math.prod(outputs[0]) * taps**changed if taps and changed else 0


def _grid_sample(_inputs: Shapes, outputs: Shapes, attributes: Attributes) -> int:
    axes = len(outputs[0]) - 2
    taps = {b"nearest": 0, b"linear": 2, b"bilinear": 2, b"cubic": 4, b"bicubic": 4}
    wanted = taps[attributes.get("mode", b"linear")]
    return math.prod(outputs[0]) * wanted**axes if wanted else 0


def _attention(inputs: Shapes, _outputs: Shapes, attributes: Attributes) -> int:
    """Q·Kᵀ and the product with V; ``(B, heads, L, E)``, or ``(B, L, heads × E)`` with the heads as attributes."""
    query, key, value = inputs[:3]
    if len(query) == 4:
        batch, heads, length, width = query
        return batch * heads * length * key[2] * (width + value[3])
    heads, value_heads = attributes["q_num_heads"], attributes["kv_num_heads"]
    batch, length, width = query
    return batch * length * key[1] * (width + value[2] // int(value_heads) * int(heads))


FORMULAS: dict[str, Formula] = {
    "Conv": _conv,
    "FusedConv": _conv,
    "NhwcFusedConv": _conv,
    "ConvInteger": _conv,
    "QLinearConv": _quantised_conv,
    "ConvTranspose": _conv_transpose,
    "DeformConv": _deform_conv,
    "Gemm": _gemm,
    "FusedGemm": _gemm,
    "MatMul": _matmul,
    "FusedMatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _quantised_matmul,
    "Einsum": _einsum,
    "RoiAlign": _roi_align,
    "Resize": _resize,
    "Upsample": _resize,
    "GridSample": _grid_sample,
    "Attention": _attention,
}
# Inputs whose shapes a formula reads, where it does not read all.
NEEDED: dict[str, tuple[int, ...]] = {
    "Conv": (1,),
    "FusedConv": (1,),
    "NhwcFusedConv": (1,),
    "ConvInteger": (1,),
    "QLinearConv": (3,),
    "ConvTranspose": (0, 1),
    "DeformConv": (0, 1),
    "Gemm": (0,),
    "FusedGemm": (0,),
    "MatMul": (0,),
    "FusedMatMul": (0,),
    "MatMulInteger": (0,),
    "QLinearMatMul": (0,),
    "RoiAlign": (),
    "Resize": (0,),
    "Upsample": (0,),
    "GridSample": (),
    "Attention": (0, 1, 2),
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# They change how data is looked at, not the data.
VIEWS = _names("Constant Identity Reshape Squeeze Unsqueeze Flatten Shape Size Dropout If Loop Scan")
COMPARISONS = _names(
    "NonMaxSuppression TopK ArgMax ArgMin Max Min MaxPool GlobalMaxPool ReduceMax ReduceMin Where Greater Less Equal "
    "GreaterOrEqual LessOrEqual And Or Not Xor NonZero Clip Unique IsNaN IsInf"
)
COPIES = _names(
    "Concat Slice Split Transpose Gather GatherElements GatherND ScatterElements ScatterND Scatter Pad Expand Tile "
    "Cast DepthToSpace SpaceToDepth Compress OneHot ReverseSequence Trilu SequenceConstruct SequenceAt SequenceInsert "
    "SequenceEmpty ConcatFromSequence SplitToSequence CastLike Col2Im CenterCropPad"
)
FILLS = _names("ConstantOfShape Range EyeLike RandomNormal RandomUniform RandomNormalLike RandomUniformLike")


def kind_of(operator: str) -> str:
    """Return what an uncounted operator of ONNX does."""
    for kind, names in (("comparisons", COMPARISONS), ("copies", COPIES), ("fill", FILLS)):
        if operator in names:
            return kind
    return "arithmetic"
