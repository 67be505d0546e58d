"""Counting what a PyTorch module does while it does it.

call ─► recorder (every operator: calls, output elements) ─► torch's FlopCounterMode (formulas, module by module)
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dettools.flops.cost import Uncounted
from dettools.flops.torch_operators import FORMULAS, kind_of


@dataclass(frozen=True)
class TorchCount:
    """What one call did.

    Attributes:
        macs: of the call.
        by_operator: MACs by operator.
        by_module: MACs by module path below the called module, whose own path is empty.
        calls: of the counted operators.
        uncounted: operators without formula, most elements first.
        elements: outputs of all operators that are no views.
        activation_bytes: of those outputs, without those written in place.
        largest_activation_bytes: of one output.
    """

    macs: int
    by_operator: Mapping[str, int]
    by_module: Mapping[str, int]
    calls: Mapping[str, int]
    uncounted: tuple[Uncounted, ...]
    elements: int
    activation_bytes: int
    largest_activation_bytes: int


def count_call(module: nn.Module, *inputs: Any) -> TorchCount:
    """Run a module once, without gradients, and count.

    Args:
        module: on any device; as it is (call ``eval()`` before).
        inputs: of its forward.
    """
    flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    recorder = _Recorder(flops.flop_registry)
    with torch.no_grad(), _without_fused_layers(), flops, recorder:
        module(*inputs)
    counts = flops.get_flop_counts()
    root = type(module).__name__
    return TorchCount(
        macs=flops.get_total_flops() // 2,
        by_operator={_name(packet): value // 2 for packet, value in counts.get("Global", {}).items()},
        by_module={
            name.removeprefix(root).removeprefix("."): sum(operators.values()) // 2
            for name, operators in counts.items()
            if name != "Global" and (name == root or name.startswith(f"{root}."))
        },
        calls=dict(recorder.counted),
        uncounted=recorder.uncounted(),
        elements=recorder.elements,
        activation_bytes=recorder.activation_bytes,
        largest_activation_bytes=recorder.largest_bytes,
    )


# They give their input on, though their schemas do not call them views.
_AS_IT_IS = frozenset({torch.ops.aten.lift_fresh.default, torch.ops.aten._unsafe_view.default})


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator that is no view."""

    def __init__(self, formulas: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._formulas = formulas
        self._calls: Counter[str] = Counter()
        self._elements: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()
        self.elements = 0
        self.activation_bytes = 0
        self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [value for value in _flattened(result) if isinstance(value, torch.Tensor)]
        if func.is_view or not outputs or func in _AS_IT_IS:
            return result
        elements = sum(output.numel() for output in outputs)
        self.elements += elements
        if not func._schema.is_mutable:
            sizes = [output.numel() * output.element_size() for output in outputs]
            self.activation_bytes += sum(sizes)
            self.largest_bytes = max(self.largest_bytes, *sizes)
        name = _name(func._overloadpacket)
        if func._overloadpacket in self._formulas:
            self.counted[name] += 1
        else:
            self._calls[name] += 1
            self._elements[name] += elements
        return result

    def uncounted(self) -> tuple[Uncounted, ...]:
        return tuple(
            Uncounted(name, kind_of(name.rpartition(".")[2]), self._calls[name], elements)
            for name, elements in self._elements.most_common()
        )


def _flattened(result: Any) -> Iterator[Any]:
    if isinstance(result, list | tuple):
        for one in result:
            yield from _flattened(one)
    else:
        yield result


def _name(packet: Any) -> str:
    return str(packet)


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """Transformer layers in eval mode run as one operator that hides its matrix products; here they do not."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
