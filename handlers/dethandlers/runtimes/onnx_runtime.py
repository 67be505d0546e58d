"""The onnx runtime: CUDA provider on the GPU, CPU provider otherwise; what runs is reported, never lowered silently.

    file ─► optimised graph (`graph_cache`) ─► session ─► batch bound where it lies (`bound_session`) ─► image by image

**Precision** is the file's own: a file that `detserve export` wrote says it in its metadata, of another file the type
of its input does. The spec has to name the same.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from dethandlers.bound_session import BoundSession
from dethandlers.errors import ArtefactError
from dethandlers.families import Batch, Family
from dethandlers.graph_cache import graph_key, open_with_cache
from dethandlers.options import MAX_DETECTIONS_LIMIT
from dethandlers.spec import Serving, Spec

# Besides the images, its first input, a file may take these; `detserve export` writes files that do.
IMAGE_SIZES = "image_sizes"
"""``(B, 2)`` int64: ``(h, w)`` of the image's part of each input, px."""
SCORE_THRESHOLD = "score_threshold"
"""``()`` float32: detections with a lower score are not wanted."""
MAX_DETECTIONS = "max_detections"
"""``()`` int64: most detections per image."""

EXPORT_METADATA = "detserve.export"
"""Key of the metadata in which `detserve export` says how a file was made: JSON, with ``precision``."""

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_INPUT_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


class OnnxRuntime:
    """Runs an ONNX file by onnxruntime. A file with a fixed batch size is fed in chunks of that size.

    Raises:
        ArtefactError: onnxruntime is missing or broken, the GPU was asked for and its provider did not start, or the
            file and the spec disagree.
    """

    def __init__(self, spec: Spec, family: Family, weights: Path, device: torch.device) -> None:
        onnxruntime = _onnxruntime()
        self.device = device
        self.version = str(onnxruntime.__version__)
        self.provider = _CUDA if device.type == "cuda" else _CPU
        self._serving = spec.serving
        self._asks_for_most = family.drops_classes
        # onnxruntime does not look at the variables that tell torch: it takes every core.
        self._threads = spec.serving.threads or int(os.environ.get("OMP_NUM_THREADS") or 0)
        available = onnxruntime.get_available_providers()
        if self.provider not in available:
            raise ArtefactError(
                f"device: got {device}, but onnxruntime {self.version} has only {', '.join(available)}. "
                "Install detserve[onnx-gpu] in place of detserve[onnx], or set device: cpu."
            )
        if device.type == "cuda" and hasattr(onnxruntime, "preload_dlls"):  # since 1.21
            # After `import torch`, whose CUDA libraries are taken where they fit; these are those of NVIDIA's packages.
            onnxruntime.preload_dlls()
        session, self.optimisation = self._open(onnxruntime, weights)
        self._input = session.get_inputs()[0]
        self._check(session, weights.name)
        self.precision = spec.serving.precision
        self._session = BoundSession(session, device)
        self._takes = {one.name for one in (*session.get_inputs(), *session.get_overridable_initializers())}
        fixed = self._input.shape[0] if self._input.shape else None
        self._fixed_batch = fixed if isinstance(fixed, int) and fixed > 0 else None

    def _open(self, onnxruntime: Any, weights: Path) -> tuple[Any, str]:
        provider_options = _cuda_options(self._serving) if self.provider == _CUDA else {}
        device_options = {"device_id": str(self.device.index or 0)} if self.provider == _CUDA else {}

        def open_session(path: Path, options: Any) -> Any:
            providers = [(self.provider, provider_options | device_options)]
            session = onnxruntime.InferenceSession(str(path), options, providers=providers)
            running = session.get_providers()
            if self.provider not in running:
                raise ArtefactError(
                    f"device: got {self.device}, but onnxruntime started {', '.join(running)} instead of "
                    f"{self.provider}. Check that its CUDA and cuDNN versions match the driver, or set device: cpu."
                )
            return session

        def optimise(save_as: Path | None) -> Any:
            options = self._options(onnxruntime)
            if save_as is not None:
                options.optimized_model_filepath = str(save_as)
            return open_session(weights, options)

        def load(path: Path) -> Any:
            options = self._options(onnxruntime)
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            return open_session(path, options)

        gpu = torch.cuda.get_device_name(self.device) if self.provider == _CUDA else None
        made_by = {"onnxruntime": self.version, "provider": self.provider, "options": provider_options, "gpu": gpu}
        try:
            key = graph_key(weights, {**made_by, "level": "all"})
            return open_with_cache(key, optimise, load)
        except ArtefactError:
            raise
        except Exception as error:
            raise ArtefactError(f"{weights.name} cannot be loaded by onnxruntime: {error}") from error

    def _options(self, onnxruntime: Any) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        options.use_deterministic_compute = self._serving.deterministic
        # Threads that spin while they wait cost the server and the other workers of a small machine more than it gains.
        if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options

    def _check(self, session: Any, name: str) -> None:
        """Hold the file's input and precision against the spec."""
        if self._input.type not in _INPUT_DTYPES:
            raise ArtefactError(
                f"{name}: got an input {self._input.name} of {self._input.type}, expected one of "
                f"{', '.join(_INPUT_DTYPES)}. Export the file again with such an input."
            )
        precision = _precision(session.get_modelmeta().custom_metadata_map, self._input.type, name)
        wanted = self._serving.precision
        if precision != wanted:
            raise ArtefactError(
                f"precision: got {wanted!r} with runtime 'onnx', expected {precision!r}, the precision of {name} "
                f"itself. Set precision: {precision}, or export the file in the precision you want."
            )

    def run(self, batch: Batch) -> list[dict[str, torch.Tensor]]:
        """Run the session on one batch: once, or once for every fixed batch size that the file has.

        Returns:
            One dict per image: the file's outputs by name, without their batch dimension.

        Raises:
            ArtefactError: the file refuses the input that the spec describes.
        """
        step = self._fixed_batch or len(batch.pixels)
        return [
            image
            for start in range(0, len(batch.pixels), step)
            for image in self._run(batch, slice(start, start + step))
        ]

    def _run(self, batch: Batch, part: slice) -> list[dict[str, torch.Tensor]]:
        pixels, sizes = batch.pixels[part], batch.sizes[part]
        count = len(pixels)
        missing = (self._fixed_batch or count) - count
        if missing:
            pixels = torch.cat([pixels, pixels.new_zeros((missing, *pixels.shape[1:]))])
            sizes += sizes[-1:] * missing
        most = MAX_DETECTIONS_LIMIT if self._asks_for_most else batch.limits.max_detections
        feeds = {
            self._input.name: pixels.to(self.device, _INPUT_DTYPES[self._input.type]),
            IMAGE_SIZES: torch.tensor(sizes, dtype=torch.int64),
            SCORE_THRESHOLD: torch.tensor(batch.limits.score_threshold, dtype=torch.float32),
            MAX_DETECTIONS: torch.tensor(most, dtype=torch.int64),
        }
        try:
            outputs = self._session.run({name: value for name, value in feeds.items() if name in self._takes})
        except Exception as error:
            raise ArtefactError(
                f"the network takes {self._input.name} {self._input.shape}, got {tuple(pixels.shape)}: {error}. "
                "Correct preprocessing.size in the spec."
            ) from error
        strange = [name for name, output in outputs.items() if output.ndim == 0 or len(output) < count]
        if strange:
            raise ArtefactError(
                f"network output {strange[0]}: got a first dimension that is not the batch of {count}, expected one. "
                "Export the file again, with the batch as the first dimension of every output."
            )
        return [{name: output[place] for name, output in outputs.items()} for place in range(count)]

    def synchronise(self) -> None:
        """Wait for torch's part, the widening of half precision; onnxruntime's is done when a run returns."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def describe(self) -> dict[str, Any]:
        """Return what really runs."""
        on_gpu = self.device.type == "cuda"
        return {
            "runtime": "onnx",
            "runtime_version": self.version,
            "device": str(self.device),
            "device_name": torch.cuda.get_device_name(self.device) if on_gpu else "CPU",
            "provider": self.provider,
            "precision": self.precision,
            "tf32": on_gpu and self._serving.tf32,
            "deterministic": self._serving.deterministic,
            "threads": self._threads or None,
            "optimisation": self.optimisation,
        }


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        raise ArtefactError(
            f"runtime 'onnx' needs onnxruntime, which is not installed or does not load ({error}). Install "
            "detserve[onnx] for the CPU or detserve[onnx-gpu] for the GPU (one of the two)."
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise ArtefactError(
            "runtime 'onnx': got an onnxruntime without its content, which is left over when onnxruntime and "
            "onnxruntime-gpu were both installed and one was removed. Uninstall both, then install detserve[onnx] or "
            "detserve[onnx-gpu]."
        )
    return onnxruntime


def _cuda_options(serving: Serving) -> dict[str, str]:
    """Return the CUDA provider's options, which also decide how a graph is optimised."""
    return {
        # The default measures every algorithm anew for each shape of input, and images come in many.
        "cudnn_conv_algo_search": "HEURISTIC",
        # The default doubles the memory at each growth, beside torch's own.
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "1" if serving.tf32 else "0",
    }


def _precision(metadata: dict[str, str], input_type: str, name: str) -> str:
    if EXPORT_METADATA not in metadata:
        return "fp16" if input_type == "tensor(float16)" else "fp32"
    try:
        return str(json.loads(metadata[EXPORT_METADATA])["precision"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"{name}: got metadata {EXPORT_METADATA!r} that is not read ({metadata[EXPORT_METADATA][:60]!r}), "
            'expected JSON with "precision". Export the file again.'
        ) from error
