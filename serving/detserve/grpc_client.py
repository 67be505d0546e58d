"""The gRPC client: the same question, the same detections, the same errors as over REST.

    Predictions(model_name, model_version, input = {"data": image, option: text, …}) ─► the answer's JSON as bytes

TorchServe drops the handler's status codes over gRPC; the worker's error JSON in the answer is raised here as the error
that it is. The two messages are declared below, field by field, so that no generated code has to be kept; the field
numbers are those of TorchServe's ``inference.proto``.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import grpc
from dethandlers.detections import Detections
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from detserve.client import TokenSource, option_text, parse_detections
from detserve.errors import ClientError, EndpointError
from detserve.instance import Instance

_PACKAGE = "org.pytorch.serve.grpc.inference"
_PREDICTIONS = f"/{_PACKAGE}.InferenceAPIsService/Predictions"
_LARGEST_MESSAGE = 200_000_000


def _messages() -> tuple[Any, Any]:
    """Declare PredictionsRequest and PredictionResponse."""
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="detserve/predictions.proto", package=_PACKAGE, syntax="proto3")
    request = file.message_type.add(name="PredictionsRequest")
    optional = kind.LABEL_OPTIONAL
    request.field.add(name="model_name", number=1, type=kind.TYPE_STRING, label=optional)
    request.field.add(name="model_version", number=2, type=kind.TYPE_STRING, label=optional)
    entry = request.nested_type.add(name="InputEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kind.TYPE_STRING, label=optional)
    entry.field.add(name="value", number=2, type=kind.TYPE_BYTES, label=optional)
    request.field.add(
        name="input",
        number=3,
        type=kind.TYPE_MESSAGE,
        label=kind.LABEL_REPEATED,
        type_name=f".{_PACKAGE}.PredictionsRequest.InputEntry",
    )
    response = file.message_type.add(name="PredictionResponse")
    response.field.add(name="prediction", number=1, type=kind.TYPE_BYTES, label=optional)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = ("PredictionsRequest", "PredictionResponse")
    request_class, response_class = (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in names
    )
    return request_class, response_class


_Request, _Response = _messages()


class GrpcClient:
    """Calls the models of one server over gRPC. May be shared between threads.

    Args:
        address: ``host:port`` of the inference service.
        token: the inference token, or a function that returns the one to use now.
        timeout_s: deadline of one call.
    """

    def __init__(self, address: str, token: TokenSource = None, *, timeout_s: float = 60.0) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._source = token
        self._token: str | None = None
        sizes = [(f"grpc.max_{way}_message_length", _LARGEST_MESSAGE) for way in ("send", "receive")]
        # A proxy has no business on the loopback, and elsewhere HTTP proxies rarely pass gRPC on.
        self._channel = grpc.insecure_channel(address, options=[*sizes, ("grpc.enable_http_proxy", 0)])
        self._call: Callable[..., Any] = self._channel.unary_unary(
            _PREDICTIONS,
            request_serializer=_Request.SerializeToString,
            response_deserializer=_Response.FromString,
        )

    @classmethod
    def for_instance(cls, name: str | None = None, *, timeout_s: float = 60.0) -> Self:
        """Return a client of a server that runs on this machine; its tokens are renewed when they run out."""
        from detserve import server

        instance = Instance.named(name)
        state = instance.require_running()
        source = (lambda: server.token(instance, "inference").value) if state.token_auth else None
        host = "127.0.0.1" if state.host in ("0.0.0.0", "::") else state.host  # noqa: S104
        return cls(f"{host}:{state.ports.grpc_inference}", source, timeout_s=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def predict(
        self, model: str, image: bytes, *, version: str | None = None, options: Mapping[str, object] | None = None
    ) -> Any:
        """Send one image, return the JSON answer.

        Raises:
            EndpointError: the worker, or TorchServe, answered with an error.
            ClientError: there was no answer.
        """
        entries = {name: option_text(value).encode() for name, value in (options or {}).items() if value is not None}
        request = _Request(model_name=model, model_version=version or "", input={"data": image, **entries})
        answer = self._send(request)
        try:
            parsed = json.loads(answer.prediction)
        except ValueError as error:
            raise ClientError(
                f"{self.address} answered with something that is not JSON: {answer.prediction[:100]!r}. "
                "Is that a detserve endpoint?",
                type="bad_answer",
            ) from error
        if isinstance(parsed, dict) and parsed.keys() >= {"code", "type", "message"}:
            status = int(parsed["code"])
            raise EndpointError(
                str(parsed["message"]),
                status=status,
                type=str(parsed["type"]),
                retryable=status in {502, 503, 504, 507},
            )
        return parsed

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
        """Send one image, return its detections, best first."""
        options = {
            "score_threshold": score_threshold,
            "max_detections": max_detections,
            "masks": "rle" if masks else None,
            "keypoints": True if keypoints else None,
        }
        found = parse_detections(self.predict(model, image, version=version, options=options))
        return replace(found, masks=[]) if masks and not len(found) else found

    def _send(self, request: Any) -> Any:
        renewed = False
        while True:
            token = self._token
            if token is None and self._source is not None:
                token = self._source() if callable(self._source) else self._source
                self._token = token
            metadata = [("authorization", f"Bearer {token}")] if token else []
            try:
                return self._call(request, timeout=self.timeout_s, metadata=metadata)
            except grpc.RpcError as error:
                code = error.code()
                if code == grpc.StatusCode.PERMISSION_DENIED and callable(self._source) and not renewed:
                    renewed, self._token = True, None
                    continue
                raise self._error(code, str(error.details()), request) from error

    def _error(self, code: grpc.StatusCode, details: str, request: Any) -> ClientError:
        """TorchServe's gRPC status as the error that REST gives."""
        what = f"{request.model_name!r} {request.model_version}".strip()
        if code == grpc.StatusCode.PERMISSION_DENIED:
            return EndpointError(
                "The token is missing, wrong or no longer valid. `detserve serve token` prints a valid one; send it in "
                "the metadata as `authorization: Bearer TOKEN`.",
                status=401,
                type="unauthorized",
            )
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return ClientError(
                f"No answer from {self.address} within {self.timeout_s:g} s. "
                "Is the model slow or the queue long (`detserve serve status`)? Give it a longer timeout.",
                type="timeout",
            )
        if code == grpc.StatusCode.UNAVAILABLE:
            refused = "refused" in details or "Failed to connect" in details
            return ClientError(
                f"Nothing listens on {self.address}. Start the server with `detserve serve start --models NAME`."
                if refused
                else f"{self.address} closed the connection without an answer: {details}.",
                type="refused" if refused else "reset",
            )
        if "not found" in details.lower():
            return EndpointError(
                f"The server does not serve {what}. `detserve serve status` lists what it serves.",
                status=404,
                type="unknown_model",
            )
        passing = any(
            word in details for word in ("Worker died", "no worker", "No worker", "unavailable", "Unavailable")
        )
        return EndpointError(
            f"{code.name}: {details.rstrip('.')}. Look at `detserve serve logs`.",
            status=503 if passing else 500,
            type="unavailable" if passing else "server_error",
            retryable=passing,
        )
