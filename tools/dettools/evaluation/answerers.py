"""The endpoint as the one who answers, over REST or gRPC. It needs no torch: a client starts at once."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Protocol, Self

import tenacity
from dethandlers.detections import Category, Detections
from dethandlers.options import Options
from detserve.client import Client
from detserve.errors import ClientError, EndpointError

from dettools.endpoint import concerns_every_request
from dettools.evaluation.stream import Reply, failure_of, may_pass


class Detecting(Protocol):
    """A client of either protocol."""

    def detect(
        self,
        model: str,
        image: bytes,
        *,
        score_threshold: float | None = None,
        max_detections: int | None = None,
        masks: bool = False,
        keypoints: bool = False,
        version: str | None = None,
    ) -> Detections:
        """Send one image, return its detections."""
        ...


class EndpointAnswerer:
    """A served model, asked one image a request.

    Args:
        client: returns the calling thread's own client.
        describing: a client that may be able to describe the model.
    """

    batch_size = 1

    def __init__(
        self,
        client: Callable[[], Detecting],
        describing: Client,
        model: str,
        *,
        version: str | None = None,
        asked: Options,
        concurrency: int = 8,
        patience_s: float = 60.0,
    ) -> None:
        self.concurrency = concurrency
        self.name = f"{model} {version} at {describing.base_url}" if version else f"{model} at {describing.base_url}"
        self._client = client
        self._model, self._version = model, version
        self._asked = asked
        self.facts: Mapping[str, Any] = _described(describing, model, version, patience_s)
        self.categories = _categories(self.facts)

    def asking(self, asked: Options) -> Self:
        """Return the same, asked with other options."""
        other = copy(self)
        other._asked = asked
        return other

    def ask(self, images: Sequence[bytes]) -> list[Reply]:
        """Send one image; an error that is about this image alone is its reply.

        Raises:
            ClientError: one that may pass, or that every request would get.
        """
        (image,) = images
        asked = self._asked
        try:
            found = self._client().detect(
                self._model,
                image,
                score_threshold=asked.score_threshold,
                max_detections=asked.max_detections,
                masks=asked.masks,
                keypoints=asked.keypoints,
                version=self._version,
            )
        except EndpointError as error:
            if _about_one(error):
                return [failure_of(error)]
            raise
        return [found]


def _about_one(error: EndpointError) -> bool:
    """Whether the error is about this image, and not about the server or about every request."""
    return not may_pass(error) and not concerns_every_request(error)


def _described(client: Client, model: str, version: str | None, patience_s: float) -> dict[str, Any]:
    """What the worker says of itself; empty when the endpoint is not ours and cannot tell."""
    waiting = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=tenacity.wait_fixed(0.5),
        stop=tenacity.stop_after_delay(patience_s) & tenacity.stop_after_attempt(2),
        reraise=True,
    )
    try:
        described: dict[str, Any] = waiting(client.describe, model, version)
    except ClientError as error:
        if may_pass(error) or concerns_every_request(error):
            raise
        return {}
    return described


def _categories(facts: Mapping[str, Any]) -> tuple[Category, ...] | None:
    if "categories" not in facts:
        return None
    return tuple(
        Category(id=entry["id"], name=entry["name"], model_label=label)
        for label, entry in enumerate(facts["categories"])
    )
