"""Models in this process as the ones who answer: the worker's own detector, and eager."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Self

from dethandlers.detector import Detector, Request
from dethandlers.errors import RequestError
from dethandlers.options import Options
from detserve.eager import EagerModel
from detserve.errors import DetserveError

from dettools.evaluation.answers import Failure
from dettools.evaluation.stream import Reply

_BATCH_SIZE = 8
"""Where neither the command line nor the spec says."""


class RuntimeAnswerer:
    """The worker's detector in this process."""

    concurrency = 1

    def __init__(self, detector: Detector, *, asked: Options, batch_size: int | None = None) -> None:
        self.batch_size = batch_size or detector.spec.serving.batch_size or _BATCH_SIZE
        self.facts: Mapping[str, Any] = detector.describe()
        self.name = f"{detector.spec.name} {detector.spec.version} in process, runtime {self.facts['runtime']}"
        self.categories = detector.spec.categories
        self._detector = detector
        self._asked = asked

    def asking(self, asked: Options) -> Self:
        """Return the same, asked with other options."""
        other = copy(self)
        other._asked = asked
        return other

    def ask(self, images: Sequence[bytes]) -> list[Reply]:
        """Detect a batch."""
        results = self._detector.detect([Request(image, self._asked) for image in images])
        return [
            Failure(result.type, result.message, result.code) if isinstance(result, RequestError) else result.detections
            for result in results
        ]


class EagerAnswerer:
    """The framework's own inference on the source checkpoint, one image at a time."""

    concurrency = 1
    batch_size = 1

    def __init__(self, model: EagerModel, *, asked: Options) -> None:
        self.name = f"eager: {model.source}"
        self.facts: Mapping[str, Any] = {"source": model.source}
        self.categories = model.categories
        self._model = model
        self._asked = asked

    def ask(self, images: Sequence[bytes]) -> list[Reply]:
        """Detect."""
        asked = self._asked
        replies: list[Reply] = []
        for image in images:
            try:
                replies.append(
                    self._model.detect(
                        image,
                        asked.score_threshold,
                        asked.max_detections,
                        masks=asked.masks,
                        keypoints=asked.keypoints,
                    )
                )
            except DetserveError as error:
                replies.append(Failure("eager_failed", str(error)))
        return replies
