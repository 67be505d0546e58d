"""Starting a server, and waiting until it really answers.

archives ─► read, check ─► ports free? ─► config.properties, log4j2.xml, model_store/ ─► java
                                                                                          │
ready  ◄── a worker of every model has answered ◄── every worker READY ◄── management API ┘
   any worker dies, Java ends, time is over, Ctrl-C, SIGTERM ─► everything ended, its own error raised
"""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from detserve.edge.process import TOKEN_MINUTES, EdgeProcess, behind, edge_state
from detserve.errors import DetserveError, ServerError
from detserve.instance import Instance, InstanceState, ServedModel
from detserve.mar import check_archive
from detserve.server.admission import copy_archive
from detserve.server.archives import ArchiveFacts, ModelSettings, read_archive
from detserve.server.failures import PortTakenError, frontend_died, not_registered, too_slow, worker_died
from detserve.server.interrupts import Interrupts
from detserve.server.java import find_java
from detserve.server.management import Management, NotServedError
from detserve.server.monitor_process import MonitorProcess
from detserve.server.processes import require_free, spawn
from detserve.server.settings import (
    ServerSettings,
    config_properties,
    free_ports,
    log4j_config,
    server_environment,
)
from detserve.server.status import ServerStatus, status
from detserve.server.stop import end_strays, kill_server, stop
from detserve.server.tokens import NotAnsweringError, token
from detserve.server.warm_up import warm_up
from detserve.server.worker_log import LogFollower, StartupWatch
from detserve.signature import check_signature

_POLL_S = 0.05
_PORT_TRIES = 3
_OUR_QUESTIONS = ('"GET /models', '"GET /metrics ', '"OPTIONS / ')
"""What the stop and the monitor ask the server, as the access log has it."""


def start(
    archives: Sequence[Path],
    settings: ServerSettings | None = None,
    *,
    instance: Instance | None = None,
    timeout_s: float = 180.0,
    foreground: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
    on_ready: Callable[[ServerStatus], None] = lambda _: None,
    on_log: Callable[[str], None] = lambda _: None,
) -> ServerStatus:
    """Start a server and return when every worker of every model has answered.

    Args:
        foreground: call ``on_ready``, then stay until Ctrl-C or SIGTERM, stop the server and return.
        on_log: gets each request and each warning while in the foreground.

    Raises:
        ServerError: it could not be started; nothing is left running, the logs stay.
    """
    instance = instance or Instance.named()
    settings = settings or ServerSettings()
    models = _models(archives, settings)
    with Interrupts() as interrupts:
        with instance.lock():
            _require_stopped(instance)
            for attempt in range(1, _PORT_TRIES + 1):
                try:
                    process, state = _launch(instance, settings, models)
                    monitor = MonitorProcess(instance, settings.host, state.ports.monitor)
                    with _ended_unless_ready(instance, process):
                        monitor.start()
                        _wait_ready(instance, state, process, time.monotonic() + timeout_s, interrupts, on_progress)
                        started = status(instance)
                        _warm_up(instance, state, started, settings, on_progress)
                        interrupts.check()
                        edge = _start_edge(instance, state, settings)
                        instance.write(replace(state, ready=True))
                    break
                except PortTakenError:
                    if settings.ports is not None or attempt == _PORT_TRIES:
                        raise
        on_ready(started)
        if foreground:
            _stay(instance, process, monitor, edge, interrupts, on_log)
    # Left to itself from here on: it is not ours to wait for.
    process.returncode = 0
    if edge is not None:
        edge.leave()
    return started


def _models(
    archives: Sequence[Path], settings: ServerSettings
) -> list[tuple[ServedModel, ArchiveFacts, ModelSettings]]:
    """Read the archives; of several versions of a model the last one named is its default."""
    if not archives:
        raise ServerError("Got no archive to serve; name at least one: `detserve serve start --models NAME`.")
    if settings.trusted_keys is not None:
        for path in archives:  # before anything in them is read
            check_signature(Path(path), settings.trusted_keys)
    facts = [read_archive(Path(path).resolve(), settings.model_defaults()) for path in archives]
    seen: dict[tuple[str, str], ArchiveFacts] = {}
    for one in facts:
        if other := seen.get((one.name, one.version)):
            raise ServerError(
                f"{one.path} and {other.path} are both model {one.name!r} version {one.version}; "
                "serve one of them, or give one another version in its spec and build it again."
            )
        seen[one.name, one.version] = one
        check_archive(one.path, trusted_keys=settings.trusted_keys, pickles=False)
    default = {one.name: one.version for one in facts}
    models = []
    for one in facts:
        worker = settings.applied(one.settings)
        is_default = default[one.name] == one.version
        models.append((ServedModel(one.name, one.version, str(one.path), is_default, worker.min_workers), one, worker))
    return models


def _require_stopped(instance: Instance) -> None:
    """Refuse a second start; end what a crashed server, or a start that was killed, left. The lock is held."""
    state = instance.running()
    if state is not None and not state.ready:
        kill_server(state.pid)
    elif state is not None:
        served = ", ".join(f"{model.name} {model.version}" for model in state.models)
        raise ServerError(
            f"Instance {instance.name!r} already runs (pid {state.pid}, {state.inference_url}, serving {served}). "
            "Stop it with `detserve serve stop`, or start another with --instance NAME --port free."
        )
    end_strays(instance)


def _launch(
    instance: Instance,
    settings: ServerSettings,
    models: list[tuple[ServedModel, ArchiveFacts, ModelSettings]],
) -> tuple[subprocess.Popen[bytes], InstanceState]:
    java = find_java()
    _require_gpu(settings)
    ports = settings.ports or free_ports()
    require_free(settings.host, ports)
    edge, own_settings, own_ports = None, settings, ports
    if settings.edge is not None:
        edge = edge_state(settings.edge, instance, token_auth=settings.token_auth)
        own_settings = replace(settings, host="127.0.0.1", token_minutes=TOKEN_MINUTES)
        own_ports = behind(ports, edge)
    temp_folder = instance.prepare()
    try:
        files = []
        for model, facts, worker in models:
            name = f"{facts.name}-{facts.version}.mar"
            _store(facts, instance.model_store / name, settings)
            files.append((model, name, worker))
        open_inference = all(facts.open_inference for _, facts, _ in models)
        told = config_properties(own_settings, own_ports, instance, files, open_inference=open_inference)
        _write_private(instance.folder / "config.properties", told)
        _write_private(instance.folder / "log4j2.xml", log4j_config(instance.log_folder))
        most = max((worker.min_workers for _, _, worker in models), default=1)
        process = spawn(instance, java, server_environment(settings, instance, temp_folder, most))
    except BaseException:
        instance.clean()
        with contextlib.suppress(OSError):
            temp_folder.rmdir()
        raise
    try:
        created = psutil.Process(process.pid).create_time()
    except psutil.NoSuchProcess:
        created = time.time()
    state = InstanceState(
        pid=process.pid,
        created=created,
        started_at=time.time(),
        host=settings.host,
        ports=ports,
        models=tuple(model for model, _, _ in models),
        token_auth=settings.token_auth,
        max_request_bytes=settings.max_request_bytes,
        temp_folder=str(temp_folder),
        java=f"{java.version} ({java.source}: {java.path})",
        trusted_keys=_absolute(settings.trusted_keys),
        edge=edge,
        open_inference=open_inference,
    )
    with _ended_unless_ready(instance, process):
        instance.write(state)
    return process, state


def _absolute(keys: Sequence[Path] | None) -> tuple[str, ...] | None:
    """Not resolved: Kubernetes changes a secret by a link above it, and what the link led to is gone then."""
    return None if keys is None else tuple(str(key.absolute()) for key in keys)


def _store(facts: ArchiveFacts, place: Path, settings: ServerSettings) -> None:
    """Put an archive into the instance's model store: a link; where a signature is required a copy, checked itself."""
    if settings.trusted_keys is None:
        place.symlink_to(facts.path)
        return
    copy_archive(facts.path, place)
    check_archive(place, trusted_keys=settings.trusted_keys, pickles=False)


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")


def _require_gpu(settings: ServerSettings) -> None:
    if settings.device != "gpu":
        return
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)  # noqa: S607
        found = answer.returncode == 0 and "GPU" in answer.stdout
    except (OSError, subprocess.TimeoutExpired):
        found = False
    if not found:
        raise ServerError(
            "Got device gpu, but nvidia-smi finds no GPU (TorchServe asks it too). "
            "Install the NVIDIA driver's tools, or use --device cpu or auto."
        )


@contextlib.contextmanager
def _ended_unless_ready(instance: Instance, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End everything when the start fails or is interrupted."""
    try:
        yield
    except BaseException:
        kill_server(process.pid)
        process.poll()
        end_strays(instance)
        instance.clean()
        raise


def _wait_ready(
    instance: Instance,
    state: InstanceState,
    process: subprocess.Popen[bytes],
    deadline: float,
    interrupts: Interrupts,
    on_progress: Callable[[str], None],
) -> None:
    """Return as soon as every worker is READY and one of each model has answered."""
    watch = StartupWatch(instance.log_folder)
    waiting = list(state.models)
    told = ""
    with Management(instance, state) as management:
        while waiting:
            phase = "starting TorchServe"
            if instance.key_path.exists() or not state.token_auth:
                phase = f"loading {', '.join(f'{model.name} {model.version}' for model in waiting)}"
                with contextlib.suppress(NotAnsweringError):
                    waiting = _unanswered(management, waiting, watch)
            if phase != told and waiting:
                on_progress(phase)
                told = phase
            interrupts.check()
            if (failure := watch.failure()) is not None:
                raise worker_died(instance, state, failure)
            if watch.registration_error is not None:
                raise not_registered(instance, watch.registration_error)
            if process.poll() is not None:
                raise frontend_died(instance, process.returncode)
            if waiting and time.monotonic() > deadline:
                raise too_slow(instance, waiting)
            if waiting:
                time.sleep(_POLL_S)


def _unanswered(management: Management, waiting: list[ServedModel], watch: StartupWatch) -> list[ServedModel]:
    try:
        return [one for one in waiting if not management.answers(one.name, one.version, one.min_workers)]
    except NotServedError as error:
        watch.registration_error = str(error)
        return waiting


def _warm_up(
    instance: Instance,
    state: InstanceState,
    started: ServerStatus,
    settings: ServerSettings,
    on_progress: Callable[[str], None],
) -> None:
    ours = [model.name for model in started.models if "categories" in (model.reported or {})]
    if ours and settings.warm_up_s:
        on_progress("warming up")
        # A courtesy: what goes wrong here is told to whoever asks in earnest.
        with contextlib.suppress(DetserveError):
            inference = token(instance, "inference").value if state.token_auth else None
            warm_up(state, inference, list(dict.fromkeys(ours)), settings.warm_up_s)


def _start_edge(instance: Instance, state: InstanceState, settings: ServerSettings) -> EdgeProcess | None:
    if settings.edge is None:
        return None
    edge = EdgeProcess(instance, state, settings.edge, in_flight=settings.job_queue_size)
    edge.start()
    return edge


def _stay(
    instance: Instance,
    process: subprocess.Popen[bytes],
    monitor: MonitorProcess,
    edge: EdgeProcess | None,
    interrupts: Interrupts,
    on_log: Callable[[str], None],
) -> None:
    """Stay until Ctrl-C or SIGTERM, or until the server ends by itself or by `serve stop`."""
    followers = [LogFollower(instance.log_folder / name, from_end=True) for name in ("access_log.log", "console.log")]
    while process.poll() is None and interrupts.received is None:
        for line in (line for follower in followers for line in follower.lines()):
            if not any(question in line for question in _OUR_QUESTIONS):
                on_log(line)
        monitor.keep()
        if edge is not None:
            edge.keep()
        time.sleep(0.1)
    if interrupts.received is not None:
        stop(instance)
    elif process.returncode not in {0, 128 + signal.SIGTERM, -signal.SIGTERM}:
        with instance.lock():
            end_strays(instance)
            instance.clean()
        raise ServerError(
            f"The server ended by itself (exit code {process.returncode}). "
            f"Look into {instance.log_folder / 'ts_log.log'} and {instance.log_folder / 'console.log'}."
        )
