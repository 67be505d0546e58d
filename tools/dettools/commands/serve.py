"""detserve serve: start, watch and stop a TorchServe instance."""

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detserve.model_store import default_model_store, find_archive, stored_archives

from dettools.edge_options import add_edge_options, edge_settings

if TYPE_CHECKING:
    from detserve.instance import Ports
    from detserve.server import ServerSettings, ServerStatus

LOG_NAMES = ("model", "server", "access", "console", "metrics", "requests", "monitor", "edge", "edge-errors")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``serve`` and its actions."""
    parser = subparsers.add_parser("serve", help="start, watch and stop the server")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--instance", metavar="NAME", help="which server (default: $DETSERVE_INSTANCE or 'default')")
    common.add_argument("--json", action="store_true", help="print one JSON document as the last line of stdout")

    start = actions.add_parser("start", parents=[common], help="start a server and wait until it answers")
    start.add_argument(
        "--models",
        nargs="+",
        metavar="NAME|PATH",
        help="archives: names in the model store, or paths (default: every archive in the model store; of several "
        "versions the one whose file name sorts last is the default)",
    )
    start.add_argument("--model-store", type=Path, default=default_model_store(), metavar="DIR")
    start.add_argument("--port", type=_port, default=None, metavar="N|free", help="inference port (default 8080)")
    for name in ("management", "metrics", "grpc-inference", "grpc-management", "monitor"):
        start.add_argument(f"--{name}-port", type=int, metavar="N")
    start.add_argument("--host", default="127.0.0.1", help="inference and metrics address (default: %(default)s)")
    start.add_argument("--foreground", action="store_true", help="stay until Ctrl-C, then stop the server")
    start.add_argument("--timeout", type=float, default=180.0, metavar="S", help="until ready (default: %(default)g s)")
    start.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    start.add_argument("--workers", type=int, metavar="N", help="default: the archive's, else one a core, or GPU")
    start.add_argument("--batch-size", type=int, metavar="N", help="default: the archive's, else 1; GPU: 8")
    start.add_argument("--max-batch-delay-ms", type=int, metavar="MS", help="default: the archive's")
    start.add_argument("--threads-per-worker", type=int, metavar="N", help="default: the cores shared out")
    start.add_argument("--max-request-bytes", type=int, default=20_000_000, metavar="N")
    start.add_argument("--job-queue-size", type=int, default=1000, metavar="N")
    start.add_argument("--response-timeout", type=int, default=120, metavar="S", help="for archives that set none")
    start.add_argument(
        "--warm-up", type=float, default=3.0, metavar="S", help="before it is called ready (default: 3 s)"
    )
    start.add_argument("--token-minutes", type=float, metavar="MIN", help="how long a token is valid (default: 60)")
    start.add_argument(
        "--no-token", action="store_true", help="no token authorisation: everybody who can connect may ask"
    )
    start.add_argument(
        "--require-signature",
        type=Path,
        action="append",
        metavar="KEY",
        help="public key, or folder of them, one of which must have signed every archive, now and in `detserve models`",
    )
    start.add_argument("--no-model-api", action="store_true", help="no `detserve models register`, `unregister`")

    edge = start.add_argument_group("edge", "nginx on --host and --port; TorchServe is reached by this machine alone")
    edge.add_argument("--edge", action="store_true", help="put nginx before TorchServe; the options below need it")
    edge.add_argument("--edge-grpc-port", dest="grpc_inference_port", type=int, metavar="N", help="(default: 7070)")
    edge.add_argument("--edge-tokens", type=Path, metavar="FILE", help="valid tokens, one a line, read again on change")
    add_edge_options(edge)
    start.add_argument("--no-request-log", action="store_true", help="no JSON line for each request")

    actions.add_parser("status", parents=[common], help="workers, versions, queues, devices (exit 1: not ready)")

    logs = actions.add_parser("logs", parents=[common], help="print a log")
    logs.add_argument("which", nargs="?", default="model", choices=LOG_NAMES)
    logs.add_argument("-n", "--lines", type=int, default=50, metavar="N")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C or the server ends")

    token = actions.add_parser("token", parents=[common], help="print a valid token, nothing else, on stdout")
    token.add_argument("kind", nargs="?", default="inference", choices=("inference", "management", "key"))

    stop = actions.add_parser("stop", parents=[common], help="finish the requests in flight and stop")
    stop.add_argument("--drain-timeout", type=float, default=30.0, metavar="S", help="(default: %(default)g s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run one action."""
    return {"start": _start, "status": _status, "logs": _logs, "token": _token, "stop": _stop}[args.action](args)


def _start(args: argparse.Namespace) -> int:
    from detserve import server

    def ready(status: "ServerStatus") -> None:
        _say(f"Ready: instance {status.instance!r}, pid {status.pid}")
        for what, url in (
            ("inference", status.inference_url),
            ("management", status.management_url),
            ("monitor", status.monitor_url + "/metrics, /ready, /live"),
        ):
            _say(f"  {what:<11} {url}")
        for model in status.models:
            _say(f"  {model.name} {model.version}: {_reported(model.reported) or f'{len(model.workers)} worker(s)'}")
        _say("Try:")
        for name in dict.fromkeys(model.name for model in status.models):
            _say(f"  {curl_line(status, name, args.instance)}")
        if args.json:
            print(json.dumps(status.to_json()), flush=True)

    server.start(
        [find_archive(name, args.model_store) for name in args.models]
        if args.models
        else stored_archives(args.model_store),
        _settings(args),
        instance=server.Instance.named(args.instance),
        timeout_s=args.timeout,
        foreground=args.foreground,
        on_progress=lambda phase: _say(f"… {phase}"),
        on_ready=ready,
        on_log=_say,
    )
    return 0


def _status(args: argparse.Namespace) -> int:
    from detserve import server

    instance = server.Instance.named(args.instance)
    if instance.running() is None:
        _say(f"No server runs in instance {instance.name!r}. Start one with `detserve serve start --models NAME`.")
        if args.json:
            print(json.dumps({"instance": instance.name, "running": False, "ready": False}))
        return 1
    status = server.status(instance)
    if args.json:
        print(json.dumps({"running": True, **status.to_json()}))
    else:
        _print_status(status)
    return 0 if status.ready else 1


def _logs(args: argparse.Namespace) -> int:
    from detserve import server

    instance = server.Instance.named(args.instance)
    lines = server.logs(instance, args.which, lines=args.lines, follow=args.follow and not args.json)
    if args.json:
        print(json.dumps({"path": str(server.log_path(instance, args.which)), "lines": list(lines)}))
        return 0
    try:
        for line in lines:
            print(line, flush=args.follow)
    except KeyboardInterrupt:
        pass
    return 0


def _token(args: argparse.Namespace) -> int:
    from detserve import server

    token = server.token(server.Instance.named(args.instance), args.kind)
    if token.expires_at is not None and sys.stdout.isatty():  # not into the terminal of a `curl … $(…)`
        _say(f"valid until {_local(token.expires_at)}")
    if args.json:
        expires = token.expires_at.isoformat() if token.expires_at else None
        print(json.dumps({"token": token.value, "kind": token.kind, "expires_at": expires}))
    else:
        print(token.value)
    return 0


def _stop(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from detserve import server

    report = server.stop(
        server.Instance.named(args.instance),
        drain_timeout_s=args.drain_timeout,
        on_progress=lambda phase: _say(f"… {phase}"),
    )
    if not report.was_running:
        _say(f"No server ran in instance {report.instance!r}.")
    else:
        _say(f"Stopped instance {report.instance!r} in {report.seconds:.1f} s.")
        if not report.drained:
            _say("Requests were still in flight when the time to drain was over; they were cut off.")
    if args.json:
        print(json.dumps(asdict(report)))
    return 0


def curl_line(status: "ServerStatus", model: str, instance: str | None) -> str:
    """Return the command that sends an image to a model, to be copied."""
    which = f" --instance {instance}" if instance else ""
    token = f'-H "Authorization: Bearer $(detserve serve token{which})" ' if status.token_auth else ""
    return f"curl {token}{status.inference_url}/predictions/{model} -T IMAGE"


def _settings(args: argparse.Namespace) -> "ServerSettings":
    from detserve import server
    from detserve.errors import DetserveError

    if args.edge and args.token_minutes is not None:
        raise DetserveError(
            "Got --token-minutes with --edge, whose tokens do not run out by themselves; expected one of the two. "
            "Change the lines of --edge-tokens FILE while it serves: the old ones end, and no request is lost."
        )
    return server.ServerSettings(
        host=args.host,
        ports=_ports(args),
        max_request_bytes=args.max_request_bytes,
        job_queue_size=args.job_queue_size,
        response_timeout_s=args.response_timeout,
        token_auth=not args.no_token,
        model_api=not args.no_model_api,
        trusted_keys=None if args.require_signature is None else tuple(args.require_signature),
        edge=edge_settings(args) if args.edge else None,
        token_minutes=60.0 if args.token_minutes is None else args.token_minutes,
        request_log=not args.no_request_log,
        device=args.device,
        threads_per_worker=args.threads_per_worker,
        workers=args.workers,
        warm_up_s=args.warm_up,
        batch_size=args.batch_size,
        max_batch_delay_ms=args.max_batch_delay_ms,
    )


def _ports(args: argparse.Namespace) -> "Ports | None":
    from dataclasses import replace

    from detserve import server

    chosen: dict[str, Any] = {
        name: getattr(args, f"{name}_port")
        for name in ("management", "metrics", "grpc_inference", "grpc_management", "monitor")
        if getattr(args, f"{name}_port") is not None
    }
    if args.port == "free":
        return replace(server.free_ports(), **chosen) if chosen else None
    base = server.Ports() if args.port is None else server.ports_from(args.port)
    return replace(base, **chosen)


def _port(text: str) -> int | str:
    if text == "free":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a port number or 'free'") from None


def _print_status(status: "ServerStatus") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"instance {status.instance}  pid {status.pid}  up {_duration(status.uptime_s)}  Java {status.java}",
        highlight=False,
    )
    token = "on" if status.token_auth else "off"
    console.print(
        f"inference {status.inference_url}  management {status.management_url}  tokens {token}", highlight=False
    )
    models = Table("model", "workers", "batch", "queue", "the worker says")
    workers = Table("worker", "model", "state", "pid", "device", "memory")
    for model in status.models:
        ready = sum(worker.state == "READY" for worker in model.workers)
        models.add_row(
            f"{model.name} {model.version}" + ("" if model.default else " (not default)"),
            f"{ready}/{model.min_workers} ready",
            f"{model.batch_size} in {model.max_batch_delay_ms} ms",
            f"{model.pending_requests} waiting",
            _reported(model.reported) or "–",
        )
        for worker in model.workers:
            workers.add_row(
                worker.id,
                f"{model.name} {model.version}",
                worker.state,
                str(worker.pid),
                worker.device + (f" {worker.gpu_usage}" if worker.gpu_usage else ""),
                f"{worker.memory_bytes / 2**20:.0f} MiB",
            )
    console.print(models)
    console.print(workers)


def _reported(reported: dict[str, Any]) -> str:
    """Return what a worker says of itself in a few words: its scalars, the telling ones first."""
    first = [name for name in ("runtime", "provider", "device", "precision") if name in reported]
    return ", ".join(
        f"{name} {reported[name]}" for name in first if isinstance(reported[name], str | int | float | bool)
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _local(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
