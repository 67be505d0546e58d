"""What a running instance leaves open to whoever can reach it, each with what closes it.

It looks at the sockets that the instance's processes listen on and at the files as they are, not at what was asked for.
"""

import ipaddress
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from detserve.errors import DetserveError
from detserve.instance import Instance, InstanceState, ServedModel
from detserve.mar import check_archive
from detserve.server import stored_archive
from detserve.signature import check_signature, signature_path

from dettools.diagnosis import Finding

_EDGE = "Start it with `detserve serve start --edge`."


def diagnose_security(instance: Instance) -> list[Finding]:
    """Return what is open (``fail``) and what is closed (``ok``) on a running instance.

    Raises:
        ServerError: no server runs in it.
    """
    state = instance.require_running()
    checks: list[Callable[[], Iterator[Finding]]] = [
        lambda: _edge(state),
        lambda: _tls(instance, state),
        lambda: _tokens(state),
        lambda: _listening(instance, state),
        lambda: _archives(instance, state),
        lambda: _files(instance, state),
        lambda: _user(state),
    ]
    return [finding for check in checks for finding in check()]


def _edge(state: InstanceState) -> Iterator[Finding]:
    if state.edge is not None:
        yield Finding("edge", "ok", "only what asks for detections reaches TorchServe")
        return
    yield Finding(
        "edge",
        "fail",
        "absent: one gRPC call of the wrong kind ends a worker, GET and DELETE run the model, nothing limits the rate "
        "of a client, and requests in flight are cut off when the server ends",
        _EDGE,
    )


def _tls(instance: Instance, state: InstanceState) -> Iterator[Finding]:
    if _is_local(state.host):
        yield Finding("TLS", "ok", f"not needed: {state.host} is this machine alone")
    elif state.edge is None:
        yield Finding("TLS", "fail", f"images and tokens cross the network in the clear ({state.host})", _EDGE)
    elif _tls_key(instance) is None:
        yield Finding(
            "TLS",
            "fail",
            f"images and tokens cross the network in the clear ({state.host})",
            "Start it with --tls-cert and --tls-key, unless what stands before it ends TLS on this machine.",
        )
    else:
        yield Finding("TLS", "ok", "1.2 or newer")


def _tokens(state: InstanceState) -> Iterator[Finding]:
    if state.token_auth and (state.edge is None or state.edge.tokens_file is not None):
        yield Finding("tokens", "ok", "every request needs one")
        return
    yield Finding(
        "tokens",
        "fail",
        "off: whoever reaches the port may ask and keep the workers busy",
        "Start it without --no-token.",
    )


def _listening(instance: Instance, state: InstanceState) -> Iterator[Finding]:
    """What listens on more than this machine."""
    public = {
        connection.laddr.port: connection.laddr.ip
        for process in instance.processes()
        for connection in _connections(process)
        if connection.status == psutil.CONN_LISTEN and not _is_local(connection.laddr.ip)
    }
    names = {port: name for name, port in state.ports.named().items()}
    asked_for = {state.ports.inference, state.ports.grpc_inference}
    closed = True
    for port, address in sorted(public.items()):
        if port in asked_for and state.edge is not None:
            continue
        closed = False
        name = names.get(port, "unknown").replace("_", " ")
        if port in asked_for:
            yield Finding(f"{name} port", "fail", f"TorchServe itself listens on {address}:{port}", _EDGE)
        elif name in {"metrics", "monitor"}:
            yield Finding(
                f"{name} port",
                "fail",
                f"anybody who reaches {address}:{port} may read it, without a token",
                "Let only Prometheus and the probes reach it: a NetworkPolicy or a firewall; or --host 127.0.0.1.",
            )
        else:
            yield Finding(
                f"{name} port",
                "fail",
                f"reachable on {address}:{port}; who may use it runs code as this user",
                "Stop the server, and start it with `detserve serve start`, which keeps it on this machine.",
            )
    if closed:
        yield Finding("ports", "ok", "management, metrics and TorchServe itself listen on this machine alone")


def _archives(instance: Instance, state: InstanceState) -> Iterator[Finding]:
    keys = None if state.trusted_keys is None else [Path(key) for key in state.trusted_keys]
    if keys is None:
        yield Finding(
            "signatures",
            "fail",
            "none is asked for: whoever can write into the model store decides what code runs here",
            "Sign with `detserve archive … --sign KEY`, start with `--require-signature KEY.pub`.",
        )
    for model in state.models:
        yield _archive(instance, model, keys)


def _archive(instance: Instance, model: ServedModel, keys: list[Path] | None) -> Finding:
    """What is served: a copy of the archive that was named, or a link to it."""
    subject, path = f"{model.name} {model.version}", stored_archive(instance, model.name, model.version)
    try:
        check_archive(path, built_by_detserve=True, pickles=False)
        if keys is not None:
            # What was registered has its signature where it came from, and is checked against it there.
            check_signature(path if signature_path(path).exists() else Path(model.archive), keys)
    except (DetserveError, OSError) as error:
        return Finding(subject, "fail", str(error), "Build it with `detserve archive`, sign it, and start again.")
    return Finding(subject, "ok", f"no pickle, digests right{'' if keys is None else ', signed by a trusted key'}")


def _files(instance: Instance, state: InstanceState) -> Iterator[Finding]:
    """Secrets that others can read, archives that others can write."""
    secrets = [instance.folder, instance.state_path, instance.key_path]
    if state.edge is not None and state.edge.tokens_file is not None:
        secrets.append(Path(state.edge.tokens_file))
    if (key := _tls_key(instance)) is not None:
        secrets.append(key)
    closed = True
    for path in secrets:
        mode = _mode(path)
        if mode & 0o007 or (mode & 0o070 and path == instance.key_path):
            closed = False
            yield Finding(path.name, "fail", f"{path} is open to others (mode {mode:o})", f"chmod go= {path}")
    for archive in sorted({Path(model.archive) for model in state.models}):
        if _mode(archive) & 0o002:
            closed = False
            yield Finding(archive.name, "fail", f"anybody may write into {archive}", f"chmod o-w {archive}")
    for folder in sorted({Path(model.archive).parent for model in state.models}):
        if _mode(folder) & 0o002:
            closed = False
            yield Finding("model store", "fail", f"anybody may write into {folder}", f"chmod o-w {folder}")
    if closed:
        yield Finding("files", "ok", "tokens and keys are the server's alone")


def _user(state: InstanceState) -> Iterator[Finding]:
    try:
        root = psutil.Process(state.pid).uids().effective == 0
    except psutil.Error:
        return
    if root:
        yield Finding(
            "user", "fail", "the server runs as root", "Run it as a user of its own; the container image does so."
        )
    else:
        yield Finding("user", "ok", "not root")


def _connections(process: psutil.Process) -> list[Any]:
    try:
        return process.net_connections("inet")
    except psutil.Error:
        return []


def _is_local(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        parsed = ipaddress.ip_address(address.removeprefix("::ffff:"))
    except ValueError:
        return False
    return parsed.is_loopback


def _tls_key(instance: Instance) -> Path | None:
    """The key that the edge's configuration names."""
    try:
        text = (instance.edge_folder / "nginx.conf").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r'^\s*ssl_certificate_key\s+"?([^";]+)"?;', text, re.MULTILINE)
    return Path(found.group(1)) if found else None


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode & 0o777  # noqa: PTH116 - through a link, as whoever reads it
    except OSError:
        return 0
