"""Runtimes: what executes a network's forward pass. A new runtime is one file here and one line in RUNTIMES."""

import importlib
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from dethandlers.errors import ArtefactError
from dethandlers.families import Batch, Family
from dethandlers.spec import Spec

RUNTIMES: dict[str, str] = {
    "torch": "dethandlers.runtimes.torch_runtime:TorchRuntime",
    "onnx": "dethandlers.runtimes.onnx_runtime:OnnxRuntime",
}


class Runtime(Protocol):
    """What the detector asks of a runtime."""

    device: torch.device
    """Where images are prepared and batches expected."""

    def run(self, batch: Batch) -> Any:
        """Execute one forward pass; the family decodes what comes back."""
        ...

    def synchronise(self) -> None:
        """Wait until the device has done what was asked, so that stage times are true."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what really runs: runtime, version, device, provider, precision."""
        ...


def load_runtime(spec: Spec, family: Family, weights: Path, device: torch.device) -> Runtime:
    """Return the spec's runtime with the weights loaded.

    Raises:
        ArtefactError: the runtime is unknown or cannot run here.
    """
    if spec.runtime not in RUNTIMES:
        raise ArtefactError(
            f"runtime: got {spec.runtime!r}, expected one of {', '.join(sorted(RUNTIMES))}. "
            "Rebuild the archive with a detserve that has this runtime."
        )
    module, _, name = RUNTIMES[spec.runtime].partition(":")
    return cast("Runtime", getattr(importlib.import_module(module), name)(spec, family, weights, device))


def choose_device(wanted: str, gpu_id: int | None) -> torch.device:
    """Choose the device of a worker.

    Args:
        wanted: the spec's ``device``: ``auto``, ``cpu`` or ``gpu``.
        gpu_id: what TorchServe assigned; None or a negative number when it assigned none.

    Raises:
        ArtefactError: a GPU is wanted and there is none.
    """
    available = torch.cuda.is_available()
    assigned = gpu_id if gpu_id is not None and gpu_id >= 0 else None
    if wanted == "gpu" and not available:
        raise ArtefactError(
            "device: got 'gpu' in the spec, but torch sees no CUDA device. "
            "Set device: auto or cpu, or install the driver."
        )
    if wanted == "cpu" or not available or (wanted == "auto" and assigned is None):
        return torch.device("cpu")
    return torch.device("cuda", assigned or 0)
