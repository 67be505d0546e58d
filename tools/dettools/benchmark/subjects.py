"""What an in-process benchmark measures: the worker's detector on an artefact, or eager on the source checkpoint."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from dethandlers.detector import Detector, Request
from dethandlers.errors import RequestError
from dethandlers.options import Options
from dethandlers.responses import to_json_text
from detserve.eager import EagerModel, load_eager
from detserve.eager_mmdet import load_mmdet
from detserve.errors import DetserveError

from dettools.local_detector import open_detector, torch_device


class InProcessError(DetserveError):
    """What was asked for cannot be measured in process."""


@dataclass(frozen=True)
class Outcome:
    """What became of one image of a batch.

    Attributes:
        error: machine word; empty when detections were found, or none were there.
        response_bytes: length of the answer's JSON text; 0 where none is written.
        stages_ms: as in ``Sample``, without ``handler``.
    """

    status: int = 200
    error: str = ""
    response_bytes: int = 0
    stages_ms: dict[str, float] = field(default_factory=dict)


class Subject(Protocol):
    """What is measured: takes a batch of encoded images and returns when every answer is there."""

    def answer(self, images: Sequence[bytes]) -> list[Outcome]:
        """Answer one batch, in its order."""
        ...


class RuntimeSubject:
    """The worker's detector with the answer's JSON text, as the worker writes it."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        serving = detector.spec.serving
        self._options = Options(score_threshold=serving.score_threshold, max_detections=serving.max_detections)

    def answer(self, images: Sequence[bytes]) -> list[Outcome]:
        """Detect and write the JSON of each image."""
        outcomes = []
        for result in self._detector.detect([Request(image, self._options) for image in images]):
            if isinstance(result, RequestError):
                outcomes.append(Outcome(status=result.code, error=result.type))
                continue
            begun = time.perf_counter()
            text = to_json_text(result, self._options, self._detector.spec.categories).encode()
            stages = {**result.timings_ms, "serialise": (time.perf_counter() - begun) * 1e3}
            outcomes.append(Outcome(response_bytes=len(text), stages_ms=stages))
        return outcomes


class EagerSubject:
    """The framework's own inference, image by image."""

    def __init__(self, model: EagerModel, score_threshold: float, max_detections: int) -> None:
        self._model = model
        self._limits = (score_threshold, max_detections)

    def answer(self, images: Sequence[bytes]) -> list[Outcome]:
        """Detect; what it does inside is its own affair, so there is no split into stages."""
        outcomes = []
        for image in images:
            try:
                self._model.detect(image, *self._limits)
            except DetserveError:
                outcomes.append(Outcome(status=0, error="eager_failed"))
            else:
                outcomes.append(Outcome())
        return outcomes


_Opened = Iterator[tuple[Subject, dict[str, Any]]]


@contextlib.contextmanager
def open_runtime(
    model: str | Path,
    weights: Path | None,
    store: Path,
    device: str,
    threads: int | None,
    on_progress: Callable[[str], None],
    *,
    allow_code: bool = False,
) -> _Opened:
    """Load an artefact; a spec is packed into one first, in a temporary folder.

    A model of MMDetection imports what its config names when ``allow_code`` says so.

    Yields:
        The subject, and what runs.

    Raises:
        DetserveError: it cannot be built or loaded here.
    """
    with open_detector(
        model,
        model_store=store,
        weights=weights,
        device=device,
        threads=threads,
        allow_code=allow_code,
        on_progress=on_progress,
    ) as detector:
        includes = "decode, preprocess, forward, postprocess, JSON"
        yield RuntimeSubject(detector), {**detector.describe(), "includes": includes}


@contextlib.contextmanager
def open_eager(
    model: str | Path,
    weights: Path | None,
    store: Path,
    device: str,
    threads: int | None,
    on_progress: Callable[[str], None],
    *,
    allow_code: bool = False,
) -> _Opened:
    """Load the source checkpoint into its framework; threads are torch's, which the caller has set.

    A config of MMDetection with its checkpoint as ``weights`` is run by MMDetection; ``allow_code`` as there.

    Yields:
        The subject, and what runs.

    Raises:
        DetserveError: it cannot be loaded, or its threads cannot be set.
    """
    on_progress("loading the source checkpoint")
    where = str(torch_device(device))
    loaded: EagerModel
    if Path(model).suffix == ".py":
        if weights is None:
            raise InProcessError(f"model: got {model} alone, expected its checkpoint too: CONFIG.py CHECKPOINT.pth.")
        loaded = load_mmdet(Path(model), weights, device=where, allow_code=allow_code)
    else:
        loaded = load_eager(model, model_store=store, weights=weights, device=where, allow_code=allow_code)
    if threads is not None and not loaded.source.startswith(("torchvision", "MMDetection")):
        raise InProcessError(
            f"threads: got {threads}, but eager runs an ONNX file with onnxruntime's own choice of threads. "
            "Leave --threads out, or measure `benchmark runtime`."
        )
    described = {
        "source": loaded.source,
        # Of references that onnxruntime runs.
        **({"provider": loaded.provider} if hasattr(loaded, "provider") else {}),
        "device": device,
        "threads": torch.get_num_threads(),
        "includes": "decode, transform, forward, postprocess; no JSON",
    }
    yield EagerSubject(loaded, score_threshold=0.05, max_detections=100), described


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Set torch's threads, and put back what was, also what a spec set."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
