"""The torch runtime: device, precision, memory layout and TF32 are set explicitly and reported."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dethandlers.families import Batch, Family
from dethandlers.spec import Spec

_AUTOCAST_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}


class TorchRuntime:
    """Runs a family's torch module.

    fp16 and bf16 run under autocast: convolutions and matrix products in half precision, box decoding and NMS in
    float32, because half precision cannot hold a coordinate of a large image.
    """

    def __init__(self, spec: Spec, family: Family, weights: Path, device: torch.device) -> None:
        serving = spec.serving
        self.device = device
        self.precision = serving.precision
        self._layout = torch.channels_last if serving.channels_last else torch.contiguous_format
        set_tf32(allowed=serving.tf32)
        self.tf32 = serving.tf32
        self.deterministic = serving.deterministic
        if serving.deterministic:
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
        self._module = family.build(weights).to(device)
        self._module = self._module.to(memory_format=self._layout)

    def run(self, batch: Batch) -> Any:
        """Run the module on one batch."""
        pixels = batch.pixels.to(self.device).contiguous(memory_format=self._layout)
        moved = replace(batch, pixels=pixels)
        with torch.inference_mode(), self._autocast():
            return self._module(moved)

    def synchronise(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def describe(self) -> dict[str, Any]:
        """Return what really runs."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return {
            "runtime": "torch",
            "runtime_version": torch.__version__,
            "device": str(self.device),
            "device_name": name,
            "precision": self.precision,
            "channels_last": self._layout is torch.channels_last,
            "tf32": self.tf32,
            "deterministic": self.deterministic,
            "threads": torch.get_num_threads(),
        }

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST_DTYPE[self.precision])


def set_tf32(*, allowed: bool) -> None:
    """Allow or forbid TensorFloat-32 in matrix products and convolutions, whatever the default was."""
    word = "tf32" if allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = word
    torch.backends.cudnn.conv.fp32_precision = word  # type: ignore[attr-defined]
