"""Which endpoint a command talks to, and whether an error is about one image or about all of them."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Self

from detserve.errors import ClientError, EndpointError

if TYPE_CHECKING:
    import argparse

    from detserve.client import Client

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


def open_client(args: argparse.Namespace) -> Client:
    """Return a client for the endpoint that the arguments name."""
    from detserve.client import Client

    if args.url:
        return Client(args.url, token=args.token or os.environ.get(TOKEN_VARIABLE))
    return Client.for_instance(args.instance)


class Clients:
    """One client per thread, all of the same endpoint; closed together."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._local = threading.local()
        self._opened: list[Client] = []

    def __enter__(self) -> Self:
        self.mine()  # no server at all is told before anything else is done
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._opened:
            client.close()

    def mine(self) -> Client:
        """Return the calling thread's own client."""
        if not hasattr(self._local, "client"):
            self._local.client = open_client(self._args)
            self._opened.append(self._local.client)
        client: Client = self._local.client
        return client


def concerns_every_request(error: ClientError) -> bool:
    """Tell whether every image would get this error: nothing listens, no such model, no right to ask, a bad option."""
    from requests import ConnectionError as NoConnectionError

    if isinstance(error, EndpointError):
        return error.type in _ABOUT_ALL
    return isinstance(error.__cause__, NoConnectionError)
