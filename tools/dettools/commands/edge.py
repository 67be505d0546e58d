"""detserve edge: one address for several instances, so that each can be restarted while the others answer."""

import argparse
import json
import sys
from pathlib import Path

from dettools.edge_options import add_edge_options, edge_settings


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``edge``."""
    parser = subparsers.add_parser(
        "edge",
        help="one address for several instances, for restarts without loss",
        description="Runs nginx before the edges of several instances until Ctrl-C or SIGTERM. What one of them "
        "refuses because it is stopped, full or gone, the next one answers.",
    )
    parser.add_argument("--instances", nargs="+", required=True, metavar="NAME", help="started with --edge")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="for REST (default: %(default)s)")
    parser.add_argument("--grpc-port", type=int, default=7000, metavar="N", help="for gRPC (default: %(default)s)")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep its logs there")
    parser.add_argument("--drain-timeout", type=float, default=30.0, metavar="S", help="(default: %(default)g s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line of stdout")
    add_edge_options(parser.add_argument_group("limits and TLS"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until told to end; exit code 1 when requests were cut off."""
    from detserve.edge.front import run_front
    from detserve.instance import Instance

    scheme = "https" if args.tls_cert else "http"

    def ready() -> None:
        names = ", ".join(args.instances)
        _say(f"Ready: {scheme}://{args.host}:{args.port} and gRPC on port {args.grpc_port}, before {names}")

    if args.logs is not None:
        args.logs.mkdir(parents=True, exist_ok=True)
    report = run_front(
        [Instance.named(name) for name in args.instances],
        edge_settings(args),
        host=args.host,
        port=args.port,
        grpc_port=args.grpc_port,
        log_folder=None if args.logs is None else args.logs.absolute(),
        drain_timeout_s=args.drain_timeout,
        on_ready=ready,
    )
    _say("Ended." if report.drained else "Ended; requests were still in flight when the time to drain was over.")
    if args.json:
        print(json.dumps({"drained": report.drained}))
    return 0 if report.drained else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
