"""The gRPC client of the inference service: the same question, the same detections, the same errors as over REST.

    Predictions(model_name, model_version, input = {"data": image, option: text, …}) ─► the answer's JSON as bytes

TorchServe drops the handler's status codes over gRPC; the worker's error JSON in the answer is raised here as the error
that it is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dethandlers.detections import Detections

from detserve.client import option_text, parse_detections
from detserve.errors import ClientError
from detserve.grpc_channel import GrpcChannel
from detserve.grpc_errors import raise_told
from detserve.grpc_messages import PING, PREDICTIONS


class GrpcClient(GrpcChannel):
    """Calls the models of one server over gRPC. May be shared between threads; the arguments are `GrpcChannel`'s."""

    def predict(
        self,
        model: str,
        image: bytes | Path,
        *,
        version: str | None = None,
        options: Mapping[str, object] | None = None,
    ) -> Any:
        """Send one image, return the JSON answer; the arguments are those of `Client.predict`.

        Raises:
            EndpointError: the worker, or TorchServe, answered with an error.
            ClientError: there was no answer.
        """
        entries = {name: text.encode() for name, text in option_texts(options).items()}
        request = PREDICTIONS.request(
            model_name=model, model_version=version or "", input={**entries, "data": image_bytes(image)}
        )
        return self._call(
            PREDICTIONS, request, lambda answer: raise_told(answer.prediction, self.address), named(model, version)
        )

    def detect(
        self,
        model: str,
        image: bytes | Path,
        *,
        score_threshold: float | None = None,
        max_detections: int | None = None,
        classes: Iterable[str] | None = None,
        masks: bool = False,
        keypoints: bool = False,
        version: str | None = None,
    ) -> Detections:
        """Send one image, return its detections, best first."""
        options = {
            "score_threshold": score_threshold,
            "max_detections": max_detections,
            "classes": None if classes is None else list(classes),
            "masks": "rle" if masks else None,
            "keypoints": True if keypoints else None,
        }
        found = parse_detections(self.predict(model, image, version=version, options=options))
        return replace(found, masks=[]) if masks and not len(found) else found

    def ping(self) -> str:
        """Return TorchServe's word for its health: "Healthy" also while no worker is ready."""
        return self._call(
            PING, PING.request(), lambda answer: str(raise_told(answer.health.encode(), self.address)["status"])
        )


def option_texts(options: Mapping[str, object] | None) -> dict[str, str]:
    """Return the options as text, without those that are None."""
    return {name: option_text(value) for name, value in (options or {}).items() if value is not None}


def named(model: str, version: str | None) -> str:
    """Return a model and version as errors name them."""
    return f"{model!r} {version or ''}".strip()


def image_bytes(image: bytes | Path) -> bytes:
    """Return an image file's bytes.

    Raises:
        ClientError: the file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise ClientError(f"The image {image} cannot be read: {error.strerror}.") from error
