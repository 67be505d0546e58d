"""One conversion of weights: a table of rows, what they leave over, and the proof that nothing changed its meaning.

    weights ─► rows (source key, transform, target key, shape) ─► converted weights ─► forward passes compared
                 │                                                     │                       │
                 └─ unused keys                          missing keys ─┴───── certificate ◄────┘

Every converter here writes such a table and nothing else; a row that does not fit the tensors stops the conversion, and
a proof that fails keeps the weights from being written.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detserve.errors import DetserveError

TOLERANCE = 1e-5
"""Largest difference of two outputs, where they are at most 1."""


class ConversionError(DetserveError):
    """The weights cannot be converted as asked."""


@dataclass(frozen=True)
class Copy:
    """A tensor as it is; only its name changes."""

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the target's tensor."""
        return tensor

    def __str__(self) -> str:
        return "copy"


@dataclass(frozen=True)
class MoveBackground(Copy):
    """Output channels whose classes begin with the background, to the order that ends with it or leaves it out.

    Attributes:
        classes: how many, the background among them.
        anchors: how often the classes are repeated.
        per_class: channels of each class, such as 4 of a box.
        kept: the background becomes the last class; else it is left out.
    """

    classes: int
    anchors: int = 1
    per_class: int = 1
    kept: bool = True

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the channels ``tensor (anchors × classes × per_class, …)`` in their new order."""
        rows = range(tensor.shape[0])
        order = [*range(1, self.classes), *([0] if self.kept else [])]
        starts = [(anchor * self.classes + label) * self.per_class for anchor in range(self.anchors) for label in order]
        return tensor[[rows[start + one] for start in starts for one in range(self.per_class)]]

    def moves(self) -> list[tuple[int, slice, slice | None]]:
        """Return each old label and its channels before and after, in the first anchor.

        None stands for channels that are left out.
        """
        found: list[tuple[int, slice, slice | None]] = []
        for label in range(self.classes):
            new = self.classes - 1 if label == 0 else label - 1
            after = self._channels(new) if label or self.kept else None
            found.append((label, self._channels(label), after))
        return found

    def _channels(self, place: int) -> slice:
        return slice(place * self.per_class, (place + 1) * self.per_class)

    def __str__(self) -> str:
        anchors = f" in each of {self.anchors} anchors" if self.anchors > 1 else ""
        return f"background (channel 0 of {self.classes}) {'moved last' if self.kept else 'left out'}{anchors}"


@dataclass(frozen=True)
class Negate(Copy):
    """A tensor with the other sign: a convolution's bias as the mean of the normalisation behind it."""

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the target's tensor."""
        return -tensor

    def __str__(self) -> str:
        return "negate"


@dataclass(frozen=True)
class SwapColours(Copy):
    """The first convolution's weights ``(n, 3, h, w)`` for images of the other colour order, BGR or RGB."""

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the target's tensor."""
        return tensor.flip(1)

    def __str__(self) -> str:
        return "swap the colours"


@dataclass(frozen=True)
class Fill(Copy):
    """A constant where the source has nothing: what it leaves out is that value."""

    value: float

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of that shape and type."""
        return torch.full_like(tensor, self.value)

    def __str__(self) -> str:
        return f"fill with {self.value:.9g}"


COPY = Copy()


@dataclass(frozen=True)
class Row:
    """One target tensor.

    Attributes:
        source: key of the source; for `Fill`, of the tensor whose shape and type it takes.
        target: key of the target.
        shape: that the target has.
        transform: what happens to the tensor.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    transform: Copy = COPY

    def to_json(self) -> dict[str, Any]:
        """Return the row for the certificate."""
        return {
            "source": self.source,
            "transform": str(self.transform),
            "target": self.target,
            "shape": list(self.shape),
        }


@dataclass(frozen=True)
class Proof:
    """Outputs of the source's architecture beside those of the target's, of one random input.

    Attributes:
        name: what was compared.
        max_delta: largest absolute difference; infinite where shapes differ or a value is no number.
        tolerance: largest difference that passes.
        largest: largest absolute output of the source; with nothing but zeros a comparison proves nothing.
        compared: how many numbers.
        targets: converted tensors that these outputs depend on.
    """

    name: str
    max_delta: float
    tolerance: float
    largest: float
    compared: int
    targets: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the outputs agree, and are more than zeros."""
        return self.max_delta <= self.tolerance and self.largest > 0

    def to_json(self) -> dict[str, Any]:
        """Return the proof for the certificate; what is no finite number as None, which JSON can hold."""
        return {
            "name": self.name,
            "max_delta": self.max_delta if math.isfinite(self.max_delta) else None,
            "tolerance": self.tolerance,
            "largest_output": self.largest if math.isfinite(self.largest) else None,
            "compared": self.compared,
            "passed": self.passed,
        }


@dataclass(frozen=True)
class Conversion:
    """Converted weights and all that is known about them.

    Attributes:
        command: that made it.
        source: the file, with its SHA-256 as hex.
        rows: the mapping table.
        state: the converted weights, by the rows' targets.
        unused: keys of the source that no row takes.
        missing: keys that the target's architecture has and no row gives.
        unexpected: targets that the target's architecture has not.
        proofs: the comparisons that were made.
        facts: what is known of source and target: versions, architecture, preprocessing.
        meta: what is written beside the weights.
        notes: what a person should know.
    """

    command: str
    source: Path
    source_sha256: str
    rows: tuple[Row, ...]
    state: dict[str, torch.Tensor]
    unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    proofs: tuple[Proof, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def proven(self) -> bool:
        """Whether no comparison failed, all that changed was compared, and the target gets all that it has."""
        passed = all(proof.passed for proof in self.proofs)
        return passed and not self.missing and not self.coverage["changed_without_proof"]

    @property
    def coverage(self) -> dict[str, int]:
        """How many tensors which evidence stands behind; a name that is only from the table is no proof of it."""
        compared = {target for proof in self.proofs for target in proof.targets}
        others = [row for row in self.rows if row.target not in compared]
        copies = [row for row in others if row.transform == COPY]
        renamed = sum(row.source != row.target for row in copies)
        return {
            "by_outputs": len(self.rows) - len(others),
            "copied_under_their_name": len(copies) - renamed,
            "copied_under_another_name": renamed,
            "changed_without_proof": len(others) - len(copies),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the certificate, but for the written file."""
        return {
            "command": self.command,
            "source": {"name": self.source.name, "sha256": self.source_sha256},
            "proven": self.proven,
            "tensors": self.coverage,
            "facts": dict(self.facts),
            "proofs": [proof.to_json() for proof in self.proofs],
            "unused": list(self.unused),
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "notes": list(self.notes),
            "rows": [row.to_json() for row in self.rows],
        }


def converted(rows: Sequence[Row], source: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Apply a table.

    Returns:
        The rows' targets, each with a storage of its own.

    Raises:
        ConversionError: a tensor is not there, has another shape than its row tells, or two rows have one target.
    """
    state: dict[str, torch.Tensor] = {}
    for row in rows:
        if row.source not in source:
            raise ConversionError(f"got no {row.source}, expected it for {row.target}. Is the file complete?")
        if row.target in state:
            raise ConversionError(f"got two tensors for {row.target}, one of them {row.source}, expected one.")
        tensor = row.transform.apply(source[row.source]).contiguous().clone()
        if tuple(tensor.shape) != row.shape:
            raise ConversionError(
                f"{row.source} ({row.transform}) → {row.target}: got the shape {tuple(tensor.shape)}, expected "
                f"{row.shape}. Is this the architecture that was meant?"
            )
        state[row.target] = tensor
    return state


def unused_keys(rows: Sequence[Row], source: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Return the source's keys that no row takes."""
    taken = {row.source for row in rows if not isinstance(row.transform, Fill)}
    return tuple(key for key in source if key not in taken)


def prove(
    name: str,
    source: Sequence[torch.Tensor],
    target: Sequence[torch.Tensor],
    *,
    relative: bool = True,
    targets: Iterable[str] = (),
) -> Proof:
    """Compare outputs, one by one.

    Args:
        name: of what is compared.
        source: outputs of the source's architecture.
        target: outputs of the target's.
        relative: outputs larger than 1 may differ as many times more, as the rounding of float32 does; each by its
            own size, so that small scores cannot differ as much as large features may.
        targets: converted tensors that the outputs depend on.

    Returns:
        The largest difference, in units of what is allowed there, with what is allowed there.
    """
    pairs = list(zip(source, target, strict=False))
    sizes = [float(one.abs().max()) if one.numel() else 0.0 for one in source]
    allowed = [TOLERANCE * (size if relative and 1 < size < math.inf else 1.0) for size in sizes]
    largest, compared = max(sizes, default=0.0), sum(one.numel() for one in source)
    if len(source) != len(target) or not compared or any(one.shape != other.shape for one, other in pairs):
        return Proof(name, math.inf, TOLERANCE, largest, 0)
    deltas = [float((one.double() - other.double()).abs().max()) if one.numel() else 0.0 for one, other in pairs]
    if not all(delta < math.inf for delta in deltas):  # a comparison with NaN is never true
        return Proof(name, math.inf, TOLERANCE, largest, compared, tuple(targets))
    worst, tolerance = max(zip(deltas, allowed, strict=True), key=lambda one: one[0] / one[1])
    return Proof(name, worst, tolerance, largest, compared, tuple(targets))


def random_input(*shape: int) -> torch.Tensor:
    """Return the same standard normal numbers at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
