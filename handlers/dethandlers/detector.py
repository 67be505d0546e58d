"""The detector: encoded images in, detections out, for a batch of images of different sizes.

    decode ─► prepare ─► group by padded shape ─► one forward pass a group ─► decode ─► filter, best first

An image's answer does not depend on its neighbours: only images that alone would have the same padded shape share a
forward pass, and an image that fails leaves the others their answer.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dethandlers.artefact import Artefact
from dethandlers.detections import Detections
from dethandlers.errors import ArtefactError, RequestError
from dethandlers.families import Batch, Limits, load_family
from dethandlers.golden import TOLERANCES, describe_drift
from dethandlers.images import decode_image, decode_jpeg_on_gpu, gpu_jpeg_available, jpeg_for_gpu
from dethandlers.options import MAX_DETECTIONS_LIMIT, Options
from dethandlers.preprocess import Prepared
from dethandlers.runtimes import load_runtime

_DECODE_THREADS = 4


@dataclass(frozen=True)
class Request:
    """One encoded image and what is asked of it."""

    image: bytes
    options: Options


@dataclass(frozen=True)
class Answer:
    """One image's detections and how they came about.

    Attributes:
        detections: best score first, filtered as the request asked.
        image_size: ``(width, height)`` px, after EXIF orientation.
        batch_size: requests that shared the batch.
        forward_size: images that shared the forward pass.
        timings_ms: decode and preprocess of this image; forward and postprocess of its forward pass.
    """

    detections: Detections
    image_size: tuple[int, int]
    batch_size: int
    forward_size: int
    timings_ms: dict[str, float]


@dataclass
class _Work:
    """One request on its way through the batch."""

    request: Request
    prepared: Prepared
    timings_ms: dict[str, float] = field(default_factory=dict)


class Detector:
    """A loaded artefact.

    Raises:
        ArtefactError: it cannot be loaded here.
    """

    def __init__(self, artefact: Artefact, device: torch.device) -> None:
        self.artefact = artefact
        self.spec = artefact.spec
        if self.spec.serving.threads:  # also for preprocessing and decoding, which are torch's whatever the runtime
            torch.set_num_threads(self.spec.serving.threads)
        self.family = load_family(self.spec)
        self.runtime = load_runtime(self.spec, self.family, artefact.weights, device)
        self._gpu_jpeg = self._chooses_gpu_jpeg()
        self._threads = ThreadPoolExecutor(_DECODE_THREADS, thread_name_prefix="decode")

    def close(self) -> None:
        """End the decoding threads."""
        self._threads.shutdown()

    def detect(self, requests: Sequence[Request], *, batch_size: int | None = None) -> list[Answer | RequestError]:
        """Answer a batch, in its order; a request that fails has its error in its place.

        Args:
            requests: the batch.
            batch_size: of the answers, when requests of the batch were refused before they came here.
        """
        works = (
            list(self._threads.map(self._begin, requests))
            if len(requests) > 1
            else [self._begin(request) for request in requests]
        )
        results: list[Answer | RequestError | None] = [
            work if isinstance(work, RequestError) else None for work in works
        ]
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for position, work in enumerate(works):
            if isinstance(work, _Work):
                key = (position,) if self.spec.serving.deterministic else work.prepared.shape
                groups[key].append(position)
        for positions in groups.values():
            group = [work for position in positions if isinstance(work := works[position], _Work)]
            for position, result in zip(positions, self._answer(group, batch_size or len(requests)), strict=True):
                results[position] = result
        return [result for result in results if result is not None]

    def check_golden(self) -> str:
        """Return the drift on the golden image as a sentence; empty when there is none, or no golden image.

        Raises:
            ArtefactError: the golden image itself cannot be answered.
        """
        golden = self.artefact.golden
        if golden is None:
            return ""
        options = Options(score_threshold=golden.score_threshold, max_detections=golden.max_detections)
        (answer,) = self.detect([Request(golden.image, options)])
        if isinstance(answer, RequestError):
            raise ArtefactError(f"the golden image cannot be answered: {answer.message}")
        return describe_drift(
            golden.detections,
            answer.detections,
            golden.score_threshold,
            TOLERANCES[self.spec.serving.precision],
            self.spec.categories,
        )

    def describe(self) -> dict[str, Any]:
        """Return what runs and what may be asked of it."""
        spec = self.spec
        return {
            "name": spec.name,
            "version": spec.version,
            "family": spec.family,
            "builder": spec.builder,
            **self.runtime.describe(),
            "jpeg_decoder": "gpu" if self._gpu_jpeg else "cpu",
            "capabilities": sorted(self.family.capabilities),
            "score_threshold": spec.serving.score_threshold,
            "min_score_threshold": spec.serving.min_score_threshold,
            "max_detections": spec.serving.max_detections,
            "source": {"file": spec.source.file, "sha256": spec.source.sha256} if spec.source else None,
            "categories": [{"id": category.id, "name": category.name} for category in spec.categories],
        }

    def _begin(self, request: Request) -> _Work | RequestError:
        try:
            begun = time.perf_counter()
            image = self._decode(request.image)
            decoded = time.perf_counter()
            with torch.inference_mode():
                prepared = self.family.prepare(image)
            done = time.perf_counter()
        except RequestError as error:
            return error
        except (RuntimeError, MemoryError) as error:
            return _failure("decoding or preprocessing", "", error)
        return _Work(request, prepared, {"decode": (decoded - begun) * 1e3, "preprocess": (done - decoded) * 1e3})

    def _decode(self, data: bytes) -> torch.Tensor:
        serving = self.spec.serving
        limits = {"max_pixels": serving.max_image_pixels, "min_side": serving.min_image_side}
        if self._gpu_jpeg and jpeg_for_gpu(data, **limits):
            try:
                return decode_jpeg_on_gpu(data, self.runtime.device)
            except RuntimeError:
                pass  # nvJPEG takes fewer kinds of JPEG than Pillow, which also says best what is wrong
        return decode_image(data, **limits, max_seconds=serving.max_decode_s).to(self.runtime.device)

    def _answer(self, works: list[_Work], batch_size: int) -> list[Answer | RequestError]:
        try:
            return list(self._forward(works, batch_size))
        except (RuntimeError, MemoryError, ArtefactError) as error:
            if len(works) > 1:
                return [result for work in works for result in self._answer([work], batch_size)]
            width, height = works[0].prepared.original_size[::-1]
            return [_failure("the forward pass", f" of {width}×{height} pixels", error)]

    def _forward(self, works: list[_Work], batch_size: int) -> Iterable[Answer]:
        limits = _loosest(works)
        begun = time.perf_counter()
        prepared = [work.prepared for work in works]
        batch = Batch(
            torch.stack([one.pixels for one in prepared]),
            tuple(one.resized_size for one in prepared),
            limits,
            tuple(one.sample for one in prepared),
        )
        outputs = self.runtime.run(batch)
        self.runtime.synchronise()
        forwarded = time.perf_counter()
        with torch.inference_mode():
            found = self.family.decode(outputs, prepared, limits)
        done = time.perf_counter()
        for work, detections in zip(works, found, strict=True):
            work.timings_ms["forward"] = (forwarded - begun) * 1e3
            work.timings_ms["postprocess"] = (done - forwarded) * 1e3
            height, width = work.prepared.original_size
            yield Answer(
                _select(detections, work.request.options), (width, height), batch_size, len(works), work.timings_ms
            )

    def _chooses_gpu_jpeg(self) -> bool:
        if self.spec.serving.jpeg_decoder != "gpu":
            return False
        if self.runtime.device.type == "cuda" and gpu_jpeg_available():
            return True
        raise ArtefactError(
            f"jpeg_decoder: got 'gpu', but images are prepared on {self.runtime.device} by a torchvision "
            f"{'with' if gpu_jpeg_available() else 'without'} a JPEG decoder. Set jpeg_decoder: cpu."
        )


def _loosest(works: Sequence[_Work]) -> Limits:
    """The limits that serve every request of a group; each is then filtered by its own.

    Lowering the threshold or raising the maximum only adds detections of lower score: greedy NMS goes by score.
    """
    options = [work.request.options for work in works]
    return Limits(
        score_threshold=min(option.score_threshold for option in options),
        max_detections=max(
            option.max_detections if option.labels is None else MAX_DETECTIONS_LIMIT for option in options
        ),
        masks=any(option.masks for option in options),
        keypoints=any(option.keypoints for option in options),
    )


def _failure(stage: str, size: str, error: Exception) -> RequestError:
    reason = f"{stage} failed on this image{size}: {str(error)[:300]}"
    if isinstance(error, ArtefactError):
        return RequestError(reason, type="inference_failed", code=500)
    return RequestError(
        f"{reason}. Send it smaller, or look into the model's log.",
        type="inference_failed",
        code=507 if isinstance(error, MemoryError) or "memory" in str(error) else 500,
    )


def _select(detections: Detections, options: Options) -> Detections:
    kept: npt.NDArray[np.bool_] = np.asarray(np.isfinite(detections.boxes_xyxy).all(axis=1))
    if options.labels is not None:
        kept &= np.isin(detections.labels, list(options.labels))
    return detections.take(kept).filtered(options.score_threshold, options.max_detections)
