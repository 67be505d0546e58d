"""What counting gives: multiply-accumulates (MACs), the range over proposals, and the operators without a formula.

    MACs of one input = macs + sum over parts of (macs of one item) × (number of items)

A multiply-accumulate is one multiplication and one addition; FLOPs = 2 × MACs. Counted are matrix products,
convolutions, attention and the weighted sums of interpolation (bilinear resizing, RoIAlign, deformable and grid
sampling). Biases, normalisation, activations and other elementwise arithmetic have no formula: they are listed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from detserve.errors import DetserveError


class FlopsError(DetserveError):
    """The cost of this input cannot be counted."""


@dataclass(frozen=True)
class Part:
    """A part of the network that runs once per item: the box head per proposal, the mask head per detection.

    Attributes:
        item: ``proposal`` or ``detection``.
        macs: of one item.
        most: items at most.
        seen: items in the run that was measured; None where one item was measured.
    """

    item: str
    macs: int
    most: int
    seen: int | None = None


@dataclass(frozen=True)
class Share:
    """MACs of a module or an operator: a constant, and so much per item of each part.

    Attributes:
        name: the module's path, or the operator.
        macs: without any item.
        per_item: in the order of the cost's parts.
        calls: of an operator in the measured run; 0 for a module.
        parameters: of a module; 0 for an operator.
    """

    name: str
    macs: int
    per_item: tuple[int, ...] = ()
    calls: int = 0
    parameters: int = 0

    def most(self, parts: tuple[Part, ...]) -> int:
        """Return the MACs with as many items as there can be."""
        return self.macs + sum(macs * part.most for macs, part in zip(self.per_item, parts, strict=True))


@dataclass(frozen=True)
class Uncounted:
    """An operator that has no formula.

    Attributes:
        operator: its name.
        kind: ``comparisons``, ``copies`` (moves data), ``fill`` (makes constants) or ``arithmetic``.
        calls: in the measured run.
        elements: of all its outputs.
    """

    operator: str
    kind: str
    calls: int
    elements: int


@dataclass(frozen=True)
class Cost:
    """What one forward pass of a batch costs.

    Attributes:
        subject: what was counted.
        engine: ``torch`` or ``onnx``.
        input_size: ``(H, W)`` px of the network's input, padding included.
        batch: images in the batch.
        macs: with no proposal and no detection.
        parts: what is added per proposal and per detection; empty for one-stage detectors.
        operators: those counted, most MACs first.
        modules: by path, in the order of the network; ONNX: by the scopes in the nodes' names.
        uncounted: most elements first.
        elements: outputs of all operators that are no views, counted or not, of the measured run.
        parameters: elements of the weights.
        buffers: elements kept beside the weights (running means, frozen norms).
        parameter_types: elements by type, as stored.
        activation_bytes: of those outputs, in-place ones left out; None where not known.
        largest_activation_bytes: the largest single output.
        measured_by: where the shapes came from.
        notes: what else a reader must know.
    """

    subject: str
    engine: str
    input_size: tuple[int, int]
    macs: int
    parts: tuple[Part, ...]
    operators: tuple[Share, ...]
    modules: tuple[Share, ...]
    uncounted: tuple[Uncounted, ...]
    elements: int
    parameters: int
    buffers: int
    parameter_types: Mapping[str, int]
    activation_bytes: int | None
    largest_activation_bytes: int | None
    measured_by: str
    batch: int = 1
    notes: tuple[str, ...] = field(default=())

    @property
    def most_macs(self) -> int:
        """MACs with as many proposals and detections as there can be."""
        return self.macs + sum(part.macs * part.most for part in self.parts)

    @property
    def uncounted_share(self) -> float:
        """Share (0..1) of the output elements that operators without a formula made, copies and fills included."""
        return sum(one.elements for one in self.uncounted) / self.elements if self.elements else 0.0

    @property
    def uncounted_arithmetic_share(self) -> float:
        """Share (0..1) of the output elements that uncounted arithmetic made."""
        made = sum(one.elements for one in self.uncounted if one.kind == "arithmetic")
        return made / self.elements if self.elements else 0.0
