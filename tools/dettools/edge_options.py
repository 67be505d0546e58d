"""The command-line options of an edge, the same for `serve start --edge` and `edge`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detserve.edge import EdgeSettings


def add_edge_options(group: "argparse._ArgumentGroup") -> None:
    """Add what `edge_settings` reads."""
    group.add_argument("--tls-cert", type=Path, metavar="PEM", help="certificate, with its chain; TLS 1.2 and newer")
    group.add_argument("--tls-key", type=Path, metavar="PEM", help="its key")
    group.add_argument("--rate", type=int, default=200, metavar="N", help="requests/s of a client; 0: no limit (200)")
    group.add_argument("--burst", type=int, default=400, metavar="N", help="at once beyond that (default: %(default)s)")
    group.add_argument(
        "--connections", type=int, default=128, metavar="N", help="of a client at the same time; 0: no limit (128)"
    )
    group.add_argument(
        "--client-timeout", type=int, default=15, metavar="S", help="that a client may pause (default: %(default)s s)"
    )
    group.add_argument("--upstream-timeout", type=int, default=300, metavar="S", help="for an answer (%(default)s s)")
    group.add_argument(
        "--trusted-proxy", nargs="+", default=[], metavar="CIDR", help="whose X-Forwarded-For names the client"
    )


def edge_settings(args: argparse.Namespace) -> "EdgeSettings":
    """Return the settings that the options say."""
    from detserve.edge import EdgeSettings

    return EdgeSettings(
        tls_certificate=args.tls_cert,
        tls_key=args.tls_key,
        tokens=getattr(args, "edge_tokens", None),
        rate=args.rate,
        burst=args.burst,
        connections=args.connections,
        client_timeout_s=args.client_timeout,
        upstream_timeout_s=args.upstream_timeout,
        trusted_proxies=tuple(args.trusted_proxy),
    )
