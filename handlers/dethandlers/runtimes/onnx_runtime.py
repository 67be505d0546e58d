"""The onnx runtime: CUDA provider on the GPU, CPU provider otherwise; what runs is reported, never lowered silently."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dethandlers.errors import ArtefactError
from dethandlers.families import Batch, Family
from dethandlers.spec import Spec

# Besides the images, its first input, a file may take these; `detserve export` writes files that do.
IMAGE_SIZES = "image_sizes"
"""``(B, 2)`` int64: ``(h, w)`` of the image's part of each input, px."""
SCORE_THRESHOLD = "score_threshold"
"""``()`` float32: detections with a lower score are not wanted."""
MAX_DETECTIONS = "max_detections"
"""``()`` int64: most detections per image."""


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
        self._takes = {
            one.name for one in (*self._session.get_inputs(), *self._session.get_overridable_initializers())
        }
        self._gives = [one.name for one in self._session.get_outputs()]
        fixed = self._input.shape[0]
        self._fixed_batch = fixed if isinstance(fixed, int) and fixed > 0 else None

    def run(self, batch: Batch) -> list[dict[str, torch.Tensor]]:
        """Run the session on one batch.

        Returns:
            One dict per image: the file's outputs by name, without their batch dimension.

        Raises:
            ArtefactError: the file refuses the input that the spec describes.
        """
        step = self._fixed_batch or len(batch.pixels)
        return [
            image for start in range(0, len(batch.pixels), step) for image in self._run(batch, slice(start, start + step))
        ]

    def _run(self, batch: Batch, part: slice) -> list[dict[str, torch.Tensor]]:
        pixels, sizes = batch.pixels[part], batch.sizes[part]
        count = len(pixels)
        missing = (self._fixed_batch or count) - count
        if missing:
            pixels = torch.cat([pixels, pixels.new_zeros((missing, *pixels.shape[1:]))])
            sizes += sizes[-1:] * missing
        feeds: dict[str, Any] = {
            self._input.name: pixels.numpy(),
            IMAGE_SIZES: np.asarray(sizes, dtype=np.int64),
            SCORE_THRESHOLD: np.float32(batch.limits.score_threshold),
            MAX_DETECTIONS: np.int64(batch.limits.max_detections),
        }
        try:
            outputs = self._session.run(
                None, {name: np.asarray(value) for name, value in feeds.items() if name in self._takes}
            )
        except Exception as error:
            raise ArtefactError(
                f"the network takes {self._input.name} {self._input.shape}, got {tuple(pixels.shape)}: {error}. "
                "Correct preprocessing.size in the spec."
            ) from error
        tensors = [torch.from_numpy(output) for output in outputs]
        strange = [name for name, one in zip(self._gives, tensors, strict=True) if one.ndim == 0 or len(one) < count]
        if strange:
            raise ArtefactError(
                f"network output {strange[0]}: got a first dimension that is not the batch of {count}, expected one. "
                "Export the file again, with the batch as the first dimension of every output."
            )
        return [
            {name: tensor[place] for name, tensor in zip(self._gives, tensors, strict=True)} for place in range(count)
        ]

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
