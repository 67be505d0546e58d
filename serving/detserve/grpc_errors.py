"""What TorchServe's gRPC statuses mean, and what to do about them: the same errors as `client_errors` makes for REST.

TorchServe says INTERNAL for most of what goes wrong and names its Java exception; the edge, and any other HTTP proxy,
answers with an HTTP status, which gRPC wraps into a status of its own.
"""

import json
import re
from typing import Any

import grpc

from detserve.errors import ClientError, EndpointError

_PASSING = ("Worker died", "no worker", "No worker", "unavailable", "Unavailable")
_LATER = "try again later"  # what the edge says of a server that is being stopped, or does not answer
_TOO_LARGE = ("larger than max", "exceeds maximum size", "larger than this server takes")
_HTTP = re.compile(r"http2 header with status: (\d{3})")
_RETRYABLE = frozenset({429, 502, 503, 504, 507})


def status_error(error: Any, address: str, asked: str, timeout_s: float) -> ClientError:
    """Return the error that a failed call is.

    Args:
        error: as grpc raises it; it has a code and details.
        asked: the model and version, to be named.
    """
    code, details = error.code(), str(error.details() or "").replace("\n", " ")
    found = _HTTP.search(details)
    if found:
        return _http_error(int(found[1]), details)
    if code == grpc.StatusCode.UNAUTHENTICATED or is_token_error(error):
        return _unauthorized()
    if code == grpc.StatusCode.PERMISSION_DENIED and "Model API disabled" in details:
        return EndpointError(
            "This server's model API is off, as it is by default. Start the server with the models, or with its model "
            "API on.",
            status=405,
            type="model_api_disabled",
        )
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return ClientError(
            f"No answer from {address} within {timeout_s:g} s. "
            "Is the model slow or the queue long (`detserve serve status`)? Give it a longer timeout.",
            type="timeout",
        )
    if code == grpc.StatusCode.UNAVAILABLE:
        return _edge_unavailable(details) if _LATER in details else _no_connection(details, address)
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return EndpointError(
            f"{address} does not have this method: {details}. The Open Inference Protocol is served when every archive "
            "was built by a detserve that knows it: build the archives again. Management has a port of its own.",
            status=501,
            type="unimplemented",
        )
    return _server_error(code, details, asked)


def _server_error(code: grpc.StatusCode, details: str, asked: str) -> EndpointError:
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        if any(words in details for words in _TOO_LARGE):
            return EndpointError(
                f"The message is too large: {details}. Send a smaller image, or start the server with a larger "
                "--max-request-size.",
                status=413,
                type="body_too_large",
            )
        return EndpointError(
            f"Too many requests: {details}. Send fewer at once.", status=429, type="too_many_requests", retryable=True
        )
    version = "ModelVersionNotFoundException" in details
    if version or "ModelNotFoundException" in details or code == grpc.StatusCode.NOT_FOUND:
        return EndpointError(
            f"The server does not serve {asked}. `detserve serve status` lists what it serves.",
            status=404,
            type="unknown_version" if version else "unknown_model",
        )
    if code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ABORTED} or "BadRequestException" in details:
        return EndpointError(f"The server refused it: {details}.", status=400, type="bad_request")
    passing = any(word in details for word in _PASSING)
    return EndpointError(
        f"{code.name}: {details.rstrip('.')}. Look at `detserve serve logs`.",
        status=503 if passing else 500,
        type="unavailable" if passing else "server_error",
        retryable=passing,
    )


def is_token_error(error: Any) -> bool:
    """Tell whether a call failed for its token."""
    denied = error.code() == grpc.StatusCode.PERMISSION_DENIED and "token" in str(error.details()).lower()
    return denied or error.code() == grpc.StatusCode.UNAUTHENTICATED


def retry_after(error: Any) -> str | None:
    """Return the Retry-After of a failed call; None when it has none."""
    return next((str(value) for name, value in error.trailing_metadata() or () if name == "retry-after"), None)


def raise_told(answer: bytes, address: str) -> Any:
    """Return the JSON of an answer; the error that stands in it is raised, since TorchServe lets no status through.

    Raises:
        EndpointError: the worker answered with an error.
        ClientError: it is no JSON.
    """
    try:
        parsed = json.loads(answer)
    except ValueError as error:
        raise ClientError(
            f"{address} answered with something that is not JSON: {answer[:100]!r}. Is that a detserve endpoint?",
            type="bad_answer",
        ) from error
    if isinstance(parsed, dict) and parsed.keys() >= {"code", "type", "message"} and type(parsed["code"]) is int:
        status = parsed["code"]
        raise EndpointError(
            str(parsed["message"]),
            status=status,
            type=str(parsed["type"]),
            retryable=status in _RETRYABLE,
            request_id=parsed.get("request_id"),
        )
    return parsed


def _unauthorized() -> EndpointError:
    return EndpointError(
        "The token is missing, wrong or no longer valid. `detserve serve token` prints a valid one; send it in "
        "the metadata as `authorization: Bearer TOKEN`.",
        status=401,
        type="unauthorized",
    )


def _no_connection(details: str, address: str) -> ClientError:
    refused = "refused" in details or "Failed to connect" in details
    return ClientError(
        f"Nothing listens on {address}. Start the server with `detserve serve start --models NAME`."
        if refused
        else f"{address} closed the connection without an answer: {details}.",
        type="refused" if refused else "reset",
    )


def _edge_unavailable(details: str) -> EndpointError:
    return EndpointError(f"Unavailable: {details}.", status=503, type="unavailable", retryable=True)


def _http_error(status: int, details: str) -> EndpointError:
    if status == 401:
        return _unauthorized()
    kind = {429: "too_many_requests", 413: "body_too_large", 403: "forbidden", 404: "unknown_path"}.get(status)
    return EndpointError(
        f"HTTP {status} in place of an answer: {details}. Is that a gRPC port?",
        status=status,
        type=kind or ("unavailable" if status in _RETRYABLE else "http_error"),
        retryable=status in _RETRYABLE,
    )
