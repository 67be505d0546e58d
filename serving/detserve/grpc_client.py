"""The gRPC client of the inference service: the same question, the same detections, the same errors as over REST.

    Predictions(model_name, model_version, input = {"data": image, option: text, …}) ─► the answer's JSON as bytes

TorchServe drops the handler's status codes over gRPC; the worker's error JSON in the answer is raised here as the error
that it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detserve.detecting_client import DetectingClient, image_bytes, option_texts
from detserve.grpc_channel import GrpcChannel
from detserve.grpc_errors import raise_told
from detserve.grpc_messages import PING, PREDICTIONS


class GrpcClient(DetectingClient, GrpcChannel):
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

    def ping(self) -> str:
        """Return TorchServe's word for its health: "Healthy" also while no worker is ready."""
        return self._call(
            PING, PING.request(), lambda answer: str(raise_told(answer.health.encode(), self.address)["status"])
        )


def named(model: str, version: str | None) -> str:
    """Return a model and version as errors name them."""
    return f"{model!r} {version or ''}".strip()
