"""Which endpoint a command talks to, and whether an error is about one image or about all of them."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self
from urllib.parse import urlsplit

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
        url: address of any other server instead; for gRPC that of its gRPC service, ``https`` with TLS.
        token: for ``url``.
        protocol: ``oip`` is the Open Inference Protocol, over gRPC.
    """

    instance: str | None = None
    url: str | None = None
    token: str | None = None
    protocol: Literal["rest", "grpc", "oip"] = "rest"
    timeout_s: float = 60.0

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
            if self.protocol != "rest":
                raise DetserveError(
                    f"Got --protocol {self.protocol} with --url; expected a server of this machine (--instance), which "
                    "also tells over REST what it serves. Ask the other one over REST."
                )
            return Client(self.url, token=self.token, timeout_s=self.timeout_s)
        return Client.for_instance(self.instance, timeout_s=self.timeout_s)

    def open_grpc(self) -> GrpcClient:
        """Return a gRPC client."""
        from detserve.grpc_client import GrpcClient
        from detserve.open_inference_client import OpenInferenceClient

        kind = OpenInferenceClient if self.protocol == "oip" else GrpcClient
        if not self.url:
            return kind.for_instance(self.instance, timeout_s=self.timeout_s)
        parts = urlsplit(self.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or not parts.port:
            raise DetserveError(f"Got the address {self.url!r}; expected one such as http://127.0.0.1:7070.")
        certificates = b"" if parts.scheme == "https" else None
        return kind(parts.netloc, self.token, timeout_s=self.timeout_s, root_certificates=certificates)


class Clients:
    """One REST client per thread, and one gRPC client for all, of the same endpoint; closed together."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._local = threading.local()
        self._opened: list[Client] = []
        self._grpc: GrpcClient | None = None

    def __enter__(self) -> Self:
        # No server at all is told before anything else is done.
        if self._endpoint.protocol != "rest":
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
