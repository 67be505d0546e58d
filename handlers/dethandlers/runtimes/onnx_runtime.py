"""The onnx runtime: CUDA provider on the GPU, CPU provider otherwise; what runs is reported, never lowered silently."""

import os
from pathlib import Path
from typing import Any

import torch

from dethandlers.errors import ArtefactError
from dethandlers.families import Batch, Family
from dethandlers.spec import Spec


class OnnxRuntime:
    """Runs an ONNX file by onnxruntime. A file with a fixed batch size is fed in chunks of that size.

    Raises:
        ArtefactError: onnxruntime is missing, the GPU was asked for and its provider did not start, or the file and
            the spec disagree.
    """

    def __init__(self, spec: Spec, family: Family, weights: Path, device: torch.device) -> None:  # noqa: ARG002
        try:
            import onnxruntime
        except ImportError as error:
            raise ArtefactError(
                "runtime 'onnx' needs onnxruntime, which is not installed. Install detserve[onnx] for the CPU or "
                "detserve[onnx-gpu] for the GPU (one of the two)."
            ) from error
        if spec.serving.precision != "fp32":
            raise ArtefactError(
                f"precision: got {spec.serving.precision!r} with runtime 'onnx', whose precision is the file's own. "
                "Set precision: fp32."
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # onnxruntime does not look at the variables that tell torch: it takes every core, and its threads spin while
        # they wait, which costs the server and the other workers of a small machine more than it gains.
        threads = spec.serving.threads or int(os.environ.get("OMP_NUM_THREADS") or 0)
        options.intra_op_num_threads = threads
        if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        wanted = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
        if wanted not in onnxruntime.get_available_providers():
            raise ArtefactError(
                f"device: got {device}, but onnxruntime {onnxruntime.__version__} has only "
                f"{', '.join(onnxruntime.get_available_providers())}. Install detserve[onnx-gpu] in place of "
                "detserve[onnx], or set device: cpu."
            )
        provider: Any = (wanted, {"device_id": device.index or 0}) if device.type == "cuda" else wanted
        try:
            self._session = onnxruntime.InferenceSession(str(weights), options, providers=[provider])
        except Exception as error:
            raise ArtefactError(f"{weights.name} cannot be loaded by onnxruntime: {error}") from error
        running = self._session.get_providers()
        if wanted not in running:
            raise ArtefactError(
                f"device: got {device}, but onnxruntime started {', '.join(running)} instead of {wanted}. "
                "Check that its CUDA and cuDNN versions match the driver, or set device: cpu."
            )
        self.provider = wanted
        self.version = onnxruntime.__version__
        # The images are prepared where they are decoded; onnxruntime copies the batch to its device.
        self.device = torch.device("cpu")
        self._runs_on = device
        self._threads = threads
        self._input = self._session.get_inputs()[0]
        fixed = self._input.shape[0]
        self._fixed_batch = fixed if isinstance(fixed, int) and fixed > 0 else None

    def run(self, batch: Batch) -> list[torch.Tensor]:
        """Run the session on one batch.

        Raises:
            ArtefactError: the file refuses the input that the spec describes.
        """
        pixels = batch.pixels
        step = self._fixed_batch or len(pixels)
        chunks = [self._run(pixels[start : start + step], step) for start in range(0, len(pixels), step)]
        return [torch.cat(parts)[: len(pixels)] for parts in zip(*chunks, strict=True)]

    def _run(self, pixels: torch.Tensor, size: int) -> list[torch.Tensor]:
        if len(pixels) < size:
            pixels = torch.cat([pixels, pixels.new_zeros((size - len(pixels), *pixels.shape[1:]))])
        try:
            outputs = self._session.run(None, {self._input.name: pixels.numpy()})
        except Exception as error:
            raise ArtefactError(
                f"the network takes {self._input.name} {self._input.shape}, got {tuple(pixels.shape)}: {error}. "
                "Correct preprocessing.size in the spec."
            ) from error
        return [torch.from_numpy(output) for output in outputs]

    def synchronise(self) -> None:
        """Nothing to wait for: a run returns when it is done."""

    def describe(self) -> dict[str, Any]:
        """Return what really runs."""
        name = torch.cuda.get_device_name(self._runs_on) if self._runs_on.type == "cuda" else "CPU"
        return {
            "runtime": "onnx",
            "runtime_version": self.version,
            "device": str(self._runs_on),
            "device_name": name,
            "provider": self.provider,
            "precision": "fp32",
            "threads": self._threads or None,
        }
