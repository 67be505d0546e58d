"""What TorchServe's own answers mean, and what to do about them.

Our handler answers an error with ``{"code", "type", "message"}`` that says it all. TorchServe answers with the names of
its Java exceptions, with the same text for a full queue as for no worker, and with no text for too large a body.
"""

import json
from dataclasses import dataclass
from typing import Self

import requests

from detserve.errors import ClientError, EndpointError

_TORCHSERVE = {
    "InternalServerException": "server_error",
    "BadRequestException": "bad_request",
    "ResourceNotFoundException": "unknown_path",
    "MethodNotAllowedException": "method_not_allowed",
    "RequestTimeoutException": "timeout",
    "ErrorDataDecoderException": "malformed_form",  # with status 500, though it is the request's fault
    "InvalidModelVersionException": "unknown_version",
}
"""TorchServe's words for its errors, and ours."""

_UNKNOWN = {"ModelNotFoundException": "unknown_model", "ModelVersionNotFoundException": "unknown_version"}

_UNAVAILABLE = {
    "queue_full": (
        "The queue of {what} is full. Try again later, send fewer at once, or start the server with more --workers or "
        "a larger --job-queue-size."
    ),
    "no_worker": (
        "No worker of {what} is ready: it is starting, or it died and is being started again. Try again in some "
        "seconds; `detserve serve logs` says why it died."
    ),
    "unavailable": (
        "The queue of {what} is full, or none of its workers is ready. Try again later; `detserve serve status` shows "
        "which it is."
    ),
}
_RESET = ("Connection reset", "RemoteDisconnected", "Connection aborted", "Broken pipe", "ConnectionResetError")


@dataclass(frozen=True)
class Said:
    """An error answer, taken apart; the body of one may be empty or no JSON."""

    status: int
    type: str
    message: str
    sent_bytes: int | None = None

    @classmethod
    def by(cls, answer: requests.Response) -> Self:
        """Read an answer."""
        body = answer.request.body
        return cls.of(
            answer.status_code, answer.content, answer.reason or "", len(body) if isinstance(body, bytes) else None
        )

    @classmethod
    def of(cls, status: int, body: bytes, reason: str = "", sent_bytes: int | None = None) -> Self:
        """Read the body of an answer that is not 200; ``reason`` is the status line's, for an empty body."""
        try:
            error = json.loads(body)
            return cls(status, str(error["type"]), str(error["message"]), sent_bytes)
        except (ValueError, KeyError, TypeError):
            text = body.decode("utf-8", "replace").strip()[:200] or reason or "no text"
            return cls(status, "http_error", f"HTTP {status}: {text}.", sent_bytes)

    @property
    def word(self) -> str:
        """The error's machine word as far as the answer alone tells it: ``unavailable`` is full queue or no worker."""
        if self.unknown is not None:
            return self.unknown
        if self.status == 413 and self.type == "http_error":
            return "body_too_large"
        if self.unavailable:
            return "unavailable"
        if self.bad_token:
            return "unauthorized"
        return _TORCHSERVE.get(self.type, self.type)

    @property
    def bad_token(self) -> bool:
        """The token is missing, wrong or over."""
        return self.status == 401 or (self.status == 400 and self.type == "InvalidKeyException")

    @property
    def unknown(self) -> str | None:
        """``unknown_model``, ``unknown_version`` or None."""
        return _UNKNOWN.get(self.type) if self.status == 404 else None

    @property
    def unavailable(self) -> bool:
        """A full queue or no worker; TorchServe says the same for both."""
        return self.type == "ServiceUnavailableException"

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        if self.status == 500:
            return self.type == "InternalServerException" and "Worker" in self.message
        if self.status == 503:  # a full queue, no worker, a server that drains; but not a handler that failed
            return self.type != "InternalServerException"
        return self.status in {429, 502, 504, 507}


def endpoint_error(said: Said, what: str, details: str, limit_bytes: int | None) -> EndpointError:
    """Return the error for an answer that is not 200.

    Args:
        what: the model that was asked, to be named.
        details: for an unknown model what is served instead, for an unavailable one the reason's machine word.
    """
    kind, message = said.type, said.message
    if said.unknown is not None:
        kind, message = said.unknown, f"The server does not serve {what}. {details}"
    elif said.status == 413 and kind == "http_error":
        return too_large(said.sent_bytes, limit_bytes)
    elif said.unavailable:
        kind, message = details, _UNAVAILABLE[details].format(what=what)
    elif said.bad_token:
        kind = "unauthorized"
        message = (
            "The token is missing, wrong or no longer valid. `detserve serve token` prints a valid one; send it as the "
            "header `Authorization: Bearer TOKEN`."
        )
    elif kind in _TORCHSERVE:
        kind, message = _TORCHSERVE[kind], f"{message.rstrip('.')}. {_hint(said)}"
    return EndpointError(message, status=said.status, type=kind, retryable=said.retryable)


def _hint(said: Said) -> str:
    if "Worker" in said.message:
        return "The worker is being started again: try again in some seconds; `detserve serve logs` says why it died."
    if "Prediction failed" in said.message:
        return "The handler failed on the whole batch: `detserve serve logs` has its traceback."
    if said.status == 507:
        return "The worker ran out of memory: send a smaller image, or start the server with a smaller --batch-size."
    return "Look at `detserve serve logs`."


def too_large(sent_bytes: int | None, limit_bytes: int | None) -> EndpointError:
    """Return the error for a body over the server's limit."""
    got = "" if sent_bytes is None else f"got {sent_bytes} bytes, "
    limit = "its max_request_size" if limit_bytes is None else f"{limit_bytes} bytes"
    return EndpointError(
        f"The image is larger than the server takes: {got}the limit is {limit}. "
        "Send a smaller one, or start the server with a larger --max-request-bytes.",
        status=413,
        type="body_too_large",
    )


def is_reset(error: requests.ConnectionError) -> bool:
    """Whether the connection was cut after it had been made."""
    return any(word in str(error) for word in _RESET)


def no_connection(
    base_url: str, error: requests.ConnectionError, body: bytes | None, limit_bytes: int | None
) -> ClientError:
    """Return why there was no answer; a server may cut off a body that is too large before its 413 is read."""
    if is_reset(error) and body is not None and limit_bytes is not None and len(body) > limit_bytes:
        return too_large(len(body), limit_bytes)
    if "refused" in str(error):
        return ClientError(
            f"Nothing listens on {base_url}. Start the server with `detserve serve start --models NAME`, "
            "or see `detserve serve status` for its address.",
            type="refused",
        )
    if is_reset(error):
        return ClientError(
            f"{base_url} closed the connection without an answer. Was the server stopped, or is the image larger than "
            "its --max-request-bytes?",
            type="reset",
        )
    return ClientError(f"{base_url} cannot be reached: {error}. Check the address and the network.", type="unreachable")
