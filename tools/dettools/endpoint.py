"""Which endpoint a command talks to, and whether an error is about one image or about all of them."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from detserve.errors import ClientError, DetserveError, EndpointError

if TYPE_CHECKING:
    import argparse

    from detserve.client import Client
    from detserve.grpc_client import GrpcClient

TOKEN_VARIABLE = "DETSERVE_TOKEN"  # noqa: S105
"""Where a token for ``--url`` is read from when the command line gives none."""
_ABOUT_ALL = {
    *("unauthorized", "unknown_model", "unknown_version", "unknown_path"),
    # All requests of a command carry the same options.
    *("unknown_option", "invalid_option"),
}


def add_endpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--instance``, ``--url`` and ``--token``."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--instance", metavar="NAME", help="server started by `detserve serve start` (default: default)")
    where.add_argument("--url", help="address of any other server's inference API, such as http://127.0.0.1:8080")
    parser.add_argument("--token", help=f"inference token for --url (default: ${TOKEN_VARIABLE})")


@dataclass(frozen=True)
class Endpoint:
    """Which endpoint a command talks to, and how.

    Attributes:
        instance: a server on this machine; None for the default one.
        url: address of any other server instead; over REST only.
        token: for ``url``.
    """

    instance: str | None = None
    url: str | None = None
    token: str | None = None
    protocol: Literal["rest", "grpc"] = "rest"
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.url and self.protocol == "grpc":
            raise DetserveError(
                "Got --protocol grpc with --url; expected a server of this machine (--instance), which also tells over "
                "REST what it serves. Ask the other one over REST."
            )

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Return what a command line names."""
        return cls(
            instance=args.instance,
            url=args.url,
            token=args.token or os.environ.get(TOKEN_VARIABLE),
            protocol=getattr(args, "protocol", "rest"),
            timeout_s=getattr(args, "timeout", 60.0),
        )

    def open(self) -> Client:
        """Return a REST client."""
        from detserve.client import Client

        if self.url:
            return Client(self.url, token=self.token, timeout_s=self.timeout_s)
        return Client.for_instance(self.instance, timeout_s=self.timeout_s)

    def open_grpc(self) -> GrpcClient:
        """Return a gRPC client."""
        from detserve.grpc_client import GrpcClient

        return GrpcClient.for_instance(self.instance, timeout_s=self.timeout_s)


class Clients:
    """One REST client per thread, and one gRPC client for all, of the same endpoint; closed together."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._local = threading.local()
        self._opened: list[Client] = []
        self._grpc: GrpcClient | None = None

    def __enter__(self) -> Self:
        # No server at all is told before anything else is done.
        if self._endpoint.protocol == "grpc":
            self._grpc = self._endpoint.open_grpc()
        else:
            self.mine()
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._opened:
            client.close()
        if self._grpc is not None:
            self._grpc.close()

    def mine(self) -> Client:
        """Return the calling thread's own REST client."""
        if not hasattr(self._local, "client"):
            self._local.client = self._endpoint.open()
            self._opened.append(self._local.client)
        client: Client = self._local.client
        return client

    def detecting(self) -> Client | GrpcClient:
        """Return the client to ask for detections, by the endpoint's protocol."""
        return self._grpc or self.mine()


def concerns_every_request(error: ClientError) -> bool:
    """Tell whether every image would get this error: nothing listens, no such model, no right to ask, a bad option."""
    if isinstance(error, EndpointError):
        return error.type in _ABOUT_ALL
    return error.type in {"refused", "unreachable"}
