"""Where a running server's facts live.

An instance is one folder, and one server at most runs from it:

    ${DETSERVE_STATE_DIR:-~/.local/state/detserve}/<name>/      0700
        state.json          who runs: pid, creation time, ports, models          0600, written whole or not at all
        config.properties   log4j2.xml                                           what TorchServe was told
        key_file.json       the tokens; TorchServe writes it where it is started
        model_store/        links to the archives that are served
        edge/               nginx's configuration, the edge's tokens and its temporary files
        worker_metrics/     what the workers count, in files that outlive them
        draining            there while a stop waits for the requests in flight
        tmp/                TMPDIR of the server: extracted archives, worker sockets
        logs/               of this run; logs/previous/ of the one before        stays after a stop

A pid alone is not a proof of life: pids are used again. The process must also have been created when the state says.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from detserve.errors import ServerError

DEFAULT_NAME = "default"
FOLDER_VARIABLE = "DETSERVE_INSTANCE_FOLDER"
"""Set in the environment of every process of an instance, so that they are found even when their parent is gone."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SOCKET_PATH_BYTES = 107 - len("/.ts.sock.90000")
"""A Unix socket's path is at most 107 bytes; TorchServe makes one per worker in its temporary folder."""


@dataclass(frozen=True)
class Ports:
    """Where a server listens."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071
    monitor: int = 8083

    def named(self) -> dict[str, int]:
        """Return the ports by name."""
        return asdict(self)


@dataclass(frozen=True)
class ServedModel:
    """One model and version that a server was started with.

    Attributes:
        archive: path of the .mar, as it was given.
        default: whether requests without a version get this one.
    """

    name: str
    version: str
    archive: str
    default: bool
    min_workers: int


@dataclass(frozen=True)
class EdgeState:
    """Where things are when an edge has TorchServe's place: all on 127.0.0.1.

    Attributes:
        backend_port, backend_grpc_port: TorchServe's own.
        local_port, local_grpc_port: the edge for programs on this machine, without TLS; None where it has none anyway.
        tokens_file: the tokens that the edge lets in, one a line; None lets everybody in.
    """

    backend_port: int
    backend_grpc_port: int
    local_port: int | None
    local_grpc_port: int | None
    tokens_file: str | None


@dataclass(frozen=True)
class InstanceState:
    """What is known about the server of an instance.

    Attributes:
        created: when the operating system created the process, seconds since the epoch.
        host: address that the inference API listens on.
        ready: whether every worker had answered once; False while starting.
        trusted_keys: public keys, or folders of them, one of which must have signed what is served; None: no matter.
        open_inference: whether it serves the Open Inference Protocol; then every worker must answer it.
        edge: what is behind ``host`` and ``ports`` when an edge listens there; None when TorchServe does.
        temp_folder: the server's TMPDIR (outside the instance when the instance's path is too long for a socket).
    """

    pid: int
    created: float
    started_at: float
    host: str
    ports: Ports
    models: tuple[ServedModel, ...]
    token_auth: bool
    max_request_bytes: int
    temp_folder: str
    ready: bool = False
    java: str = ""
    trusted_keys: tuple[str, ...] | None = None
    edge: EdgeState | None = None
    open_inference: bool = False

    @property
    def inference_url(self) -> str:
        """Address of the inference API, for a client on this machine."""
        if self.edge is not None and self.edge.local_port is not None:
            return f"http://127.0.0.1:{self.edge.local_port}"
        return f"http://{_reachable(self.host)}:{self.ports.inference}"

    @property
    def grpc_address(self) -> str:
        """Address of the gRPC inference service, ``host:port``, for a client on this machine."""
        if self.edge is not None and self.edge.local_grpc_port is not None:
            return f"127.0.0.1:{self.edge.local_grpc_port}"
        return f"{_reachable(self.host)}:{self.ports.grpc_inference}"

    @property
    def backend_url(self) -> str:
        """Address of TorchServe's own inference API, behind the edge when there is one."""
        return self.inference_url if self.edge is None else f"http://127.0.0.1:{self.edge.backend_port}"

    @property
    def management_url(self) -> str:
        """Address of the management API, for a client on this machine."""
        return f"http://127.0.0.1:{self.ports.management}"

    @property
    def metrics_url(self) -> str:
        """Address of the metrics API, for a client on this machine."""
        host = _reachable(self.host) if self.edge is None else "127.0.0.1"
        return f"http://{host}:{self.ports.metrics}"

    @property
    def monitor_url(self) -> str:
        """Address of the monitor (``/metrics``, ``/ready``, ``/live``), for a client on this machine."""
        return f"http://{_reachable(self.host)}:{self.ports.monitor}"

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        models = tuple(ServedModel(**model) for model in data["models"])
        edge = EdgeState(**data["edge"]) if data.get("edge") else None
        return cls(**{**data, "ports": Ports(**data["ports"]), "models": models, "edge": edge})


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in {"0.0.0.0", "::"} else host  # noqa: S104


def state_folder() -> Path:
    """Return the folder that holds the instances."""
    if chosen := os.environ.get("DETSERVE_STATE_DIR"):
        return Path(chosen).expanduser().resolve()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "detserve"


@dataclass(frozen=True)
class Instance:
    """One named place for one server."""

    name: str
    folder: Path

    @classmethod
    def named(cls, name: str | None = None) -> Self:
        """Return the instance of that name; without one, of ``DETSERVE_INSTANCE``, or the default."""
        chosen = name or os.environ.get("DETSERVE_INSTANCE") or DEFAULT_NAME
        if not _NAME.fullmatch(chosen):
            raise ServerError(
                f"Got the instance name {chosen!r}; a name is letters, digits, '.', '_' and '-', begins with a letter "
                "or digit and has at most 64 characters."
            )
        return cls(chosen, state_folder() / chosen)

    @property
    def state_path(self) -> Path:
        """The facts of the running server."""
        return self.folder / "state.json"

    @property
    def key_path(self) -> Path:
        """The tokens, written by TorchServe into its working directory."""
        return self.folder / "key_file.json"

    @property
    def log_folder(self) -> Path:
        """The logs of the last run."""
        return self.folder / "logs"

    @property
    def model_store(self) -> Path:
        """Links to the archives."""
        return self.folder / "model_store"

    @property
    def worker_metrics(self) -> Path:
        """What the workers count."""
        return self.folder / "worker_metrics"

    @property
    def edge_folder(self) -> Path:
        """What belongs to the edge, when there is one."""
        return self.folder / "edge"

    @property
    def draining_path(self) -> Path:
        """There while a stop waits for the requests in flight."""
        return self.folder / "draining"

    def read(self) -> InstanceState | None:
        """Return what state.json says, alive or not; None when there is none or it is damaged."""
        try:
            return InstanceState.from_json(json.loads(self.state_path.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError):
            return None

    def running(self) -> InstanceState | None:
        """Return the state when its server really runs, else None."""
        state = self.read()
        return state if state is not None and is_alive(state) else None

    def require_running(self) -> InstanceState:
        """Return the state of the running server, or say how to start one."""
        state = self.running()
        if state is None:
            raise ServerError(
                f"No server runs in instance {self.name!r} ({self.folder}). "
                "Start one with `detserve serve start --models NAME`, or name another instance with --instance."
            )
        return state

    def write(self, state: InstanceState) -> None:
        """Write state.json, whole or not at all."""
        text = json.dumps(state.to_json(), indent=2)
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".state.")  # mkstemp makes it 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).replace(self.state_path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def prepare(self) -> Path:
        """Make the folder ready for a new run, the last run's logs under logs/previous; return the TMPDIR to use."""
        self.clean()
        self._make_private()
        previous = self.log_folder / "previous"
        shutil.rmtree(previous, ignore_errors=True)
        old = list(self.log_folder.glob("*")) if self.log_folder.is_dir() else []
        self.log_folder.mkdir(exist_ok=True)
        if old:
            previous.mkdir()
            for path in old:
                path.rename(previous / path.name)
        self.model_store.mkdir()
        self.worker_metrics.mkdir()
        temporary = self.folder / "tmp"
        if len(os.fsencode(temporary)) > _SOCKET_PATH_BYTES:
            return Path(tempfile.mkdtemp(prefix="detserve-", dir="/tmp"))
        temporary.mkdir()
        return temporary

    def clean(self) -> None:
        """Remove what only a running server needs; the logs stay. The server must not run."""
        state = self.read()
        if state is not None:
            shutil.rmtree(state.temp_folder, ignore_errors=True)
        for name in ("tmp", "model_store", "worker_metrics", "edge"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("state.json", "key_file.json", "config.properties", "log4j2.xml", "draining"):
            with contextlib.suppress(NotADirectoryError):
                (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.glob(".state.*"):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the instance for a start or a stop; refuse when another process holds it."""
        self._make_private()
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ServerError(
                    f"Another `detserve serve start` or `stop` is at work on instance {self.name!r}. "
                    "Wait for it, or use another instance with --instance."
                ) from None
            yield
        finally:
            os.close(handle)

    def processes(self) -> list[psutil.Process]:
        """Return every process of this instance, found by the mark in its environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(FOLDER_VARIABLE) == str(self.folder):
                    found.append(process)
        return found

    def _make_private(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
        except OSError as error:
            raise ServerError(
                f"The instance folder {self.folder} cannot be made ({error.strerror}). "
                "Choose another place with the environment variable DETSERVE_STATE_DIR."
            ) from error


def is_alive(state: InstanceState) -> bool:
    """Tell whether the process of that state still runs, and is not another one with the same pid."""
    try:
        process = psutil.Process(state.pid)
        return abs(process.create_time() - state.created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def instances() -> list[Instance]:
    """Return every instance that has a folder."""
    root = state_folder()
    folders = sorted(root.iterdir()) if root.is_dir() else []
    return [Instance(path.name, path) for path in folders if path.is_dir() and _NAME.fullmatch(path.name)]
