"""An onnxruntime session run on memory where it lies: tensors are bound by their address, outputs come back uncopied.

    torch tensors ─► bind by address ─► run ─► onnxruntime's memory ─► torch tensors on it

**Streams**: torch and onnxruntime each have their own. Before a run torch's is waited for: what it still writes into
the inputs is then done, and so is what it still reads from memory of earlier outputs, which onnxruntime may use again.
After a run onnxruntime's is waited for. On the CPU neither has anything to wait for.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dethandlers.errors import ArtefactError

DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}
"""onnxruntime's names of element types that an output may have."""
_ELEMENT_TYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}
_HALF = (torch.float16, torch.bfloat16)


class BoundSession:
    """Runs a session on tensors of a device, and of the CPU.

    Args:
        session: an ``onnxruntime.InferenceSession``.
        device: where outputs are wanted.

    Raises:
        ArtefactError: an output is no tensor of numbers.
    """

    def __init__(self, session: Any, device: torch.device) -> None:
        self._session = session
        self._device = device
        self.outputs: tuple[str, ...] = tuple(one.name for one in session.get_outputs())
        for one in session.get_outputs():
            if one.type not in DTYPES:
                raise ArtefactError(
                    f"network output {one.name}: got {one.type}, expected one of {', '.join(DTYPES)}. "
                    "Export the file again without this output."
                )

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the session once.

        Args:
            inputs: float32, float16 or int64, by name; those on the CPU are copied to the device if it needs them.

        Returns:
            The outputs by name, in the file's order; half precision is widened to float32.

        Raises:
            Exception: onnxruntime's own, whatever it is.
        """
        held = {name: tensor.contiguous() for name, tensor in inputs.items()}
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        # A binding of its own for each run: it holds the memory of the outputs, which live as long as they are used.
        binding = self._session.io_binding()
        for name, tensor in held.items():
            device = tensor.device
            element = _ELEMENT_TYPES[tensor.dtype]
            binding.bind_input(name, device.type, device.index or 0, element, list(tensor.shape), tensor.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, self._device.type, self._device.index or 0)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return {name: self._tensor(value) for name, value in zip(self.outputs, binding.get_outputs(), strict=True)}

    def _tensor(self, value: Any) -> torch.Tensor:
        """Return an ``OrtValue`` as a tensor on the same memory, unless that is on another device than it should be."""
        shape, dtype = list(value.shape()), DTYPES[value.data_type()]
        size = math.prod(shape) * dtype.itemsize
        # Bound to the GPU, an output may still be left on the CPU.
        cuda = value.device_name().lower() == "cuda"
        if size == 0:
            raw = torch.empty(0, dtype=torch.uint8)
        elif cuda:
            raw = torch.as_tensor(_Memory(value, size, cuda=True), device=self._device)
        else:
            raw = torch.from_numpy(np.asarray(_Memory(value, size, cuda=False)))
        tensor = raw.view(dtype).reshape(shape).to(self._device)
        return tensor.float() if dtype in _HALF else tensor


class _Memory:
    """Bytes of onnxruntime's, as the array interfaces of NumPy and CUDA describe them; held as long as this is."""

    def __init__(self, value: Any, size: int, *, cuda: bool) -> None:
        self._value = value
        described = {"shape": (size,), "typestr": "|u1", "data": (value.data_ptr(), False), "version": 3}
        if cuda:
            self.__cuda_array_interface__ = described
        else:
            self.__array_interface__ = described
