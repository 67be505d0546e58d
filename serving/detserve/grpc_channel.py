"""A channel to one gRPC service: the token in the metadata, a deadline for each call, another try of what may succeed.

call ─► token ─► deadline ─► answer ─► read it
  ▲       └─ refused: a new one, once                     └─ an error that passes: wait, at most ``retries`` times
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Literal, Self, TypeVar

import grpc

from detserve.client import TokenSource
from detserve.errors import ClientError, DetserveError, EndpointError, ServerError
from detserve.grpc_errors import is_token_error, retry_after, status_error
from detserve.grpc_messages import Method
from detserve.instance import Instance
from detserve.retry import wait_s

_LARGEST_MESSAGE = 200_000_000
_T = TypeVar("_T")


class GrpcChannel:
    """What the gRPC clients have in common. May be shared between threads.

    Args:
        address: ``host:port`` of the service.
        token: the token, or a function that returns the one to use now.
        timeout_s: deadline of one call.
        retries: how often to try again what may succeed later (queue full, worker or server being restarted), as
            `detserve.client.Client` does. A cut connection and a token that has run out are tried again once in any
            case, where asking changes nothing.
        root_certificates: PEM of who signed the server's certificate; an empty one stands for those of this machine.
            None: no TLS.

    Attributes:
        retried: how often this client has sent a request again.
    """

    service: Literal["inference", "management"] = "inference"

    def __init__(
        self,
        address: str,
        token: TokenSource = None,
        *,
        timeout_s: float = 60.0,
        retries: int = 0,
        root_certificates: bytes | None = None,
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self.retries = retries
        self.retried = 0
        self._source = token
        self._token: str | None = None
        self._lock = threading.Lock()
        sizes = [(f"grpc.max_{way}_message_length", _LARGEST_MESSAGE) for way in ("send", "receive")]
        # A proxy has no business on the loopback, and elsewhere HTTP proxies rarely pass gRPC on.
        options = [*sizes, ("grpc.enable_http_proxy", 0)]
        if root_certificates is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(root_certificates or None)
            self._channel = grpc.secure_channel(address, credentials, options=options)
        self._calls: dict[str, Callable[..., Any]] = {}

    @classmethod
    def for_instance(cls, name: str | None = None, *, timeout_s: float = 60.0, retries: int = 0) -> Self:
        """Return a client of a server that runs on this machine; its tokens are renewed when they run out."""
        from detserve import server

        instance = Instance.named(name)
        state = instance.require_running()
        source = server.token_source(instance, cls.service) if state.token_auth else None
        managed = cls.service == "management"
        address = f"127.0.0.1:{state.ports.grpc_management}" if managed else state.grpc_address
        return cls(address, source, timeout_s=timeout_s, retries=retries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def _call(self, method: Method, request: Any, read: Callable[[Any], _T], asked: str = "this") -> _T:
        """Call, and return what ``read`` makes of the answer; ``asked`` is the model, to be named in errors."""
        again = self.retries if method.repeatable else 0
        fresh = method.repeatable  # whether a cut connection is tried again at no charge
        renewed = False
        attempt = 0
        while True:
            token, asked_for = None, None
            try:
                token = self._bearer()
                return read(self._send(method, request, token))
            except grpc.RpcError as error:
                if is_token_error(error) and callable(self._source) and not renewed:
                    renewed = True
                    self._forget(token)
                    self.retried += 1
                    continue
                problem: DetserveError = status_error(error, self.address, asked, self.timeout_s)
                problem.__cause__ = error
                asked_for = retry_after(error)
            except (EndpointError, ServerError) as error:
                problem = error
            if fresh and isinstance(problem, ClientError) and problem.type == "reset":
                fresh = False
            elif attempt < again and _may_pass(problem):
                attempt += 1
                renewed = False  # a server that was started anew has other tokens
                time.sleep(wait_s(attempt, asked_for))
            else:
                raise problem
            self.retried += 1

    def _send(self, method: Method, request: Any, token: str | None) -> Any:
        call = self._calls.get(method.path)
        if call is None:
            call = self._calls[method.path] = self._channel.unary_unary(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
        metadata = [("authorization", f"Bearer {token}")] if token else []
        try:
            return call(request, timeout=self.timeout_s, metadata=metadata)
        except ValueError as error:  # "Cannot invoke RPC on closed channel!"
            raise ClientError(f"The client of {self.address} is closed.") from error

    def _bearer(self) -> str | None:
        with self._lock:
            if self._token is None and self._source is not None:
                self._token = self._source() if callable(self._source) else self._source
            return self._token

    def _forget(self, refused: str | None) -> None:
        """Ask the source again, unless another thread has done so since."""
        with self._lock:
            if self._token == refused:
                self._token = None


def _may_pass(problem: DetserveError) -> bool:
    if isinstance(problem, EndpointError):
        return problem.retryable
    # A ServerError is the token's source's: its server is being started anew.
    return isinstance(problem, ServerError) or (
        isinstance(problem, ClientError) and problem.type in {"reset", "refused"}
    )
