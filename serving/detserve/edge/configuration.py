"""nginx's configuration for an edge: a plan of plain values, and the text that the template makes of it."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Self

from jinja2 import Environment, StrictUndefined

from detserve.edge.settings import EdgeSettings, require_quotable
from detserve.errors import ServerError


@dataclass(frozen=True)
class EdgePlan:
    """All that the template needs, and what the edge's keeper has to watch.

    Attributes:
        folder: the edge's own files; private.
        status_socket: Unix socket that says how many requests are in flight; at most 107 bytes.
        draining: the edge takes no new request while this file exists.
        tokens_folder: a file for each valid token, named like it; None lets everybody in (or leaves it to the
            upstreams, see ``pass_authorization``).
        tokens_file: what the user edits; the keeper brings the folder up to it.
        listen, listen_grpc: ``address:port`` for clients.
        listen_local, listen_grpc_local: the same without TLS, for programs on this machine; None without TLS.
        rest_upstreams, grpc_upstreams: ``address:port`` of TorchServe, or of other edges.
        backend_token: TorchServe's token, put in place of the client's.
        pass_authorization: the upstreams are edges and check the client's token themselves.
        retry: ask the next upstream when one does not answer, is full or drains.
        health: addresses answered without a token, and where they go.
        in_flight: requests at the same time; no more than TorchServe's queue holds, so that it is never full.
        open_inference: whether every worker understands the Open Inference Protocol; one that does not would die.
    """

    folder: str
    status_socket: str
    draining: str
    access_log: str
    error_log: str
    listen: str
    listen_grpc: str
    rest_upstreams: tuple[str, ...]
    grpc_upstreams: tuple[str, ...]
    in_flight: int
    max_request_bytes: int
    rate: int
    burst: int
    connections: int
    client_timeout_s: int
    upstream_timeout_s: int
    shutdown_s: int = 30
    processes: int = 2
    listen_local: str | None = None
    listen_grpc_local: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    tokens_file: str | None = None
    tokens_folder: str | None = None
    backend_token: str | None = None
    pass_authorization: bool = False
    retry: bool = False
    as_root: bool = False
    open_inference: bool = False
    trusted_proxies: tuple[str, ...] = ()
    health: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        tuples = {name: tuple(data[name]) for name in ("rest_upstreams", "grpc_upstreams", "trusted_proxies")}
        return cls(**{**data, **tuples})


def plan_for(
    settings: EdgeSettings,
    *,
    folder: Path,
    socket_folder: Path,
    log_folder: Path,
    draining: Path,
    host: str,
    port: int,
    grpc_port: int,
    local_ports: tuple[int, int] | None,
    rest_upstreams: Sequence[str],
    grpc_upstreams: Sequence[str],
    in_flight: int,
    max_request_bytes: int,
    **more: Any,
) -> EdgePlan:
    """Return the plan of an edge that listens on ``host``.

    Args:
        local_ports: REST and gRPC on this machine beside TLS; None without such.
        more: further attributes of `EdgePlan`.

    Raises:
        ServerError: a path cannot stand in nginx's configuration.
    """
    for path in (folder, socket_folder, log_folder, draining):
        require_quotable(path)
    return EdgePlan(
        folder=str(folder),
        status_socket=str(socket_folder / "edge.sock"),
        draining=str(draining),
        access_log=str(log_folder / "edge.log"),
        error_log=str(log_folder / "edge_error.log"),
        listen=address(host, port),
        listen_grpc=address(host, grpc_port),
        listen_local=address("127.0.0.1", local_ports[0]) if local_ports else None,
        listen_grpc_local=address("127.0.0.1", local_ports[1]) if local_ports else None,
        rest_upstreams=tuple(rest_upstreams),
        grpc_upstreams=tuple(grpc_upstreams),
        in_flight=in_flight,
        max_request_bytes=max_request_bytes,
        rate=settings.rate,
        burst=settings.burst,
        connections=settings.connections,
        client_timeout_s=settings.client_timeout_s,
        upstream_timeout_s=settings.upstream_timeout_s,
        tls_certificate=None if settings.tls_certificate is None else str(settings.tls_certificate.absolute()),
        tls_key=None if settings.tls_key is None else str(settings.tls_key.absolute()),
        trusted_proxies=tuple(settings.trusted_proxies),
        as_root=os.geteuid() == 0,
        **more,
    )


def address(host: str, port: int) -> str:
    """Return ``host:port``, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def render(plan: EdgePlan) -> str:
    """Return nginx.conf."""
    text = resources.files("detserve.edge").joinpath("nginx.conf.j2").read_text(encoding="utf-8")
    # It is no HTML; the values are numbers, addresses and paths that were checked.
    environment = Environment(undefined=StrictUndefined, autoescape=False)  # noqa: S701
    return environment.from_string(text).render(plan=plan) + "\n"


def read_plan(folder: Path) -> EdgePlan:
    """Return the plan that an edge was started with."""
    try:
        return EdgePlan.from_json(json.loads((folder / "plan.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServerError(f"The edge's plan {folder / 'plan.json'} cannot be read ({error}).") from error
