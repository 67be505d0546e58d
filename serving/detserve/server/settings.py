"""What TorchServe is told: typed settings, and the two files they become."""

import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import quoteattr

from dethandlers.entry import LOG_LEVEL_VARIABLE
from dethandlers.request_log import PATH_VARIABLE
from dethandlers.worker_metrics import FOLDER_VARIABLE as METRICS_VARIABLE

from detserve.edge import EdgeSettings
from detserve.errors import ServerError
from detserve.instance import FOLDER_VARIABLE, Instance, Ports, ServedModel
from detserve.server.archives import ModelSettings
from detserve.server.capacity import capacity
from detserve.server.logs import LOGS

Device = Literal["auto", "cpu", "gpu"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WORKER_DEFAULTS = {
    # Threads that spin while they wait take the cores from the server and from the other workers.
    "OMP_WAIT_POLICY": "PASSIVE",
    # glibc gives a large block back to the kernel as soon as it is free, and the next image pays for its pages again:
    # a quarter of the demo model's latency (benchmarks/README.md). Blocks over 32 MB are still given back at once.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
"""What a worker's environment gets unless the user has set it."""


@dataclass(frozen=True)
class ServerSettings:
    """How a server is set up.

    Attributes:
        host: address of the inference and metrics APIs; the management API always stays on this machine.
        ports: where to listen; None picks free ones.
        max_request_bytes: TorchServe applies the limit to responses too.
        response_timeout_s: for archives that do not set one.
        device: ``cpu`` hides the GPUs from the workers, ``gpu`` insists on one, ``auto`` takes what is there.
        threads_per_worker: OMP_NUM_THREADS and MKL_NUM_THREADS of each worker; None takes the environment's, else
            on a CPU shares the cores out among a model's workers.
        workers, batch_size, max_batch_delay_ms: win over what the archives say; None leaves theirs, and what suits the
            machine (`detserve.server.capacity`) where an archive does not say.
        model_api: let `detserve models` register and unregister. Whoever may use TorchServe's model API runs code as
            us, so it is off in any case without tokens, and never leaves this machine.
        trusted_keys: public keys, or folders of them, one of which must have signed every archive; None: no matter.
        token_minutes: how long a token is valid.
        worker_log: at INFO TorchServe's worker writes two lines a request, which its frontend reads and parses: a
            noticeable part of a small model's throughput.
        warm_up_s: how long a server that could answer is asked questions before it is called ready
            (`detserve.server.warm_up`).
        edge: what listens on ``host`` in TorchServe's place; None lets TorchServe listen there itself.
        request_log: a JSON line for each request in ``logs/requests.log`` (`dethandlers.request_log`).
    """

    host: str = "127.0.0.1"
    ports: Ports | None = field(default_factory=Ports)
    max_request_bytes: int = 20_000_000
    job_queue_size: int = 1000
    response_timeout_s: int = 120
    startup_timeout_s: int = 120
    token_auth: bool = True
    model_api: bool = True
    trusted_keys: tuple[Path, ...] | None = None
    token_minutes: float = 60.0
    device: Device = "auto"
    threads_per_worker: int | None = None
    workers: int | None = None
    batch_size: int | None = None
    max_batch_delay_ms: int | None = None
    worker_log: Literal["INFO", "WARNING"] = "WARNING"
    warm_up_s: float = 3.0
    edge: EdgeSettings | None = None
    request_log: bool = True

    def __post_init__(self) -> None:
        for name in ("max_request_bytes", "job_queue_size", "response_timeout_s", "startup_timeout_s"):
            _at_least_one(name, getattr(self, name))
        for name in ("threads_per_worker", "workers", "batch_size"):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        if self.max_batch_delay_ms is not None and self.max_batch_delay_ms < 0:
            raise ServerError(f"Got max_batch_delay_ms={self.max_batch_delay_ms}; expected 0 or more.")
        if self.warm_up_s < 0:
            raise ServerError(f"Got warm_up_s={self.warm_up_s}; expected 0 or more.")
        if self.token_minutes <= 0:
            raise ServerError(f"Got token_minutes={self.token_minutes}; expected more than 0.")

    def model_defaults(self) -> ModelSettings:
        """Return what an archive is served with when it does not say."""
        fitting = capacity(self.device)
        return ModelSettings(
            min_workers=fitting.workers,
            max_workers=fitting.workers,
            batch_size=fitting.batch_size,
            max_batch_delay_ms=fitting.max_batch_delay_ms,
            response_timeout_s=self.response_timeout_s,
            startup_timeout_s=self.startup_timeout_s,
        )

    def applied(self, model: ModelSettings) -> ModelSettings:
        """Return an archive's settings with those of this server that win over them."""
        workers = self.workers
        return ModelSettings(
            min_workers=model.min_workers if workers is None else workers,
            max_workers=model.max_workers if workers is None else workers,
            batch_size=model.batch_size if self.batch_size is None else self.batch_size,
            max_batch_delay_ms=model.max_batch_delay_ms if self.max_batch_delay_ms is None else self.max_batch_delay_ms,
            response_timeout_s=model.response_timeout_s,
            startup_timeout_s=model.startup_timeout_s,
        )


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ServerError(f"Got {name}={value}; expected 1 or more.")


def ports_from(inference: int) -> Ports:
    """Return the ports that go with a chosen inference port: the next five in a row."""
    if not 1 <= inference <= 65530:
        raise ServerError(f"Got port {inference}; expected 1 to 65530, as the five ports after it are used too.")
    return Ports(*range(inference, inference + 6))


def free_ports() -> Ports:
    """Return six ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(6)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return Ports(*(one.getsockname()[1] for one in sockets))
    finally:
        for one in sockets:
            one.close()


def config_properties(
    settings: ServerSettings,
    ports: Ports,
    instance: Instance,
    models: Sequence[tuple[ServedModel, str, ModelSettings]],
    *,
    open_inference: bool = False,
) -> str:
    """Return config.properties.

    The models are given as a snapshot to restore: unlike ``load_models`` it lets our values win over those of an
    archive's model-config.yaml, and takes several versions of a model with one of them the default.

    Args:
        models: the model, its file in the model store, and how it is served.
        open_inference: serve the Open Inference Protocol; every handler must answer it.
    """
    entries: dict[str, dict[str, object]] = {}
    for model, file_name, worker in models:
        entry = {"defaultVersion": model.default, "marName": file_name, **worker.to_torchserve()}
        entries.setdefault(model.name, {})[model.version] = entry
    snapshot = {"name": "detserve", "modelCount": len(models), "created": 0, "models": entries}
    values: dict[str, object] = {
        "inference_address": f"http://{settings.host}:{ports.inference}",
        "management_address": f"http://127.0.0.1:{ports.management}",
        "metrics_address": f"http://{settings.host}:{ports.metrics}",
        "grpc_inference_address": settings.host,
        "grpc_inference_port": ports.grpc_inference,
        "grpc_management_address": "127.0.0.1",
        "grpc_management_port": ports.grpc_management,
        "disable_token_authorization": str(not settings.token_auth).lower(),
        "token_expiration_min": settings.token_minutes,
        "enable_model_api": str(settings.model_api and settings.token_auth).lower(),
        "allowed_urls": f"file://{instance.model_store}/.*",
        "install_py_dep_per_model": "false",
        "metrics_mode": "prometheus",
        "max_request_size": settings.max_request_bytes,
        "max_response_size": settings.max_request_bytes,
        "job_queue_size": settings.job_queue_size,
        "default_response_timeout": settings.response_timeout_s,
        "default_startup_timeout": settings.startup_timeout_s,
        "model_snapshot": json.dumps(snapshot),
    }
    # Without it ModelInfer is unknown to the server, which is better than a dead worker.
    if open_inference:
        values["ts_open_inference_protocol"] = "true"
    if settings.device == "cpu":
        values["number_of_gpu"] = 0
    return "".join(f"{key}={_escaped(str(value))}\n" for key, value in values.items())


def _escaped(value: str) -> str:
    """Escape for java.util.Properties, which reads Latin-1 and lets a backslash begin an escape."""
    units = value.replace("\\", "\\\\").encode("utf-16-be")
    codes = [int.from_bytes(units[at : at + 2], "big") for at in range(0, len(units), 2)]
    return "".join(chr(code) if 0x20 <= code <= 0x7E else f"\\u{code:04x}" for code in codes)


def log4j_config(log_folder: Path) -> str:
    """Return log4j2.xml: TorchServe's own files and levels, each line written once, by size rolled five times.

    TorchServe's default also prints every line on the console, which on a detached server is a file without an end;
    here the console gets the warnings only. ``INFO`` of WorkerThread and WorkerLifeCycle must stay: the
    stop reads from it whether a worker is busy, the start whether one died.
    """
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', "<Configuration>", "  <Appenders>"]
    for name in ("access_log", "model_log", "model_metrics", "ts_log", "ts_metrics"):
        detail = "%d{ISO8601} [%-5p] %t %c - %m%n" if name in {"model_log", "ts_log"} else "%d{ISO8601} - %m%n"
        lines += [
            f"    <RollingFile name={quoteattr(name)}",
            f"        fileName={quoteattr(str(log_folder / f'{name}.log'))}",
            f"        filePattern={quoteattr(str(log_folder / f'{name}.%i.log.gz'))}>",
            f"      <PatternLayout pattern={quoteattr(detail)}/>",
            '      <SizeBasedTriggeringPolicy size="50 MB"/>',
            '      <DefaultRolloverStrategy max="5"/>',
            "    </RollingFile>",
        ]
    lines += [
        '    <Console name="console" target="SYSTEM_OUT">',
        '      <PatternLayout pattern="%d{ISO8601} [%-5p] %t %c - %m%n"/>',
        "    </Console>",
        "  </Appenders>",
        "  <Loggers>",
    ]
    lines += [
        f'    <Logger name="{logger}" level="info" additivity="false"><AppenderRef ref="{logger.lower()}"/></Logger>'
        for logger in ("ACCESS_LOG", "MODEL_LOG", "MODEL_METRICS", "TS_METRICS")
    ]
    lines += [
        # A line for every request, of its inner number.
        '    <Logger name="org.pytorch.serve.wlm.BatchAggregator" level="warn"/>',
        '    <Logger name="io.netty" level="error"/>',
        '    <Logger name="org.apache" level="off"/>',
        '    <Root level="info">',
        '      <AppenderRef ref="ts_log"/>',
        '      <AppenderRef ref="console" level="warn"/>',
        "    </Root>",
        "  </Loggers>",
        "</Configuration>",
    ]
    return "\n".join(lines) + "\n"


def server_environment(
    settings: ServerSettings, instance: Instance, temp_folder: Path, workers: int = 1
) -> dict[str, str]:
    """Return the environment of the server, which its workers inherit.

    Args:
        workers: of the model that has most; they share the cores.

    PYTHONPATH is dropped: TorchServe puts it before the archive's own folder, so that code lying around would win over
    the code that the archive pins. The variables that redirect TorchServe's configuration are dropped too.
    """
    dropped = {"PYTHONPATH", "TS_CONFIG_FILE", "LOG_LOCATION", "METRICS_LOCATION", "VIRTUAL_ENV", "PYTHONHOME"}
    dropped.add(PATH_VARIABLE)
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    binaries = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([binaries, environment.get("PATH", os.defpath)])
    if sys.prefix != sys.base_prefix:
        environment["VIRTUAL_ENV"] = sys.prefix
    environment |= {
        "TMPDIR": str(temp_folder),
        "TEMP": str(temp_folder),
        "LOG_LOCATION": str(instance.log_folder),
        "METRICS_LOCATION": str(instance.log_folder),
        LOG_LEVEL_VARIABLE: settings.worker_log,
        "PYTHONUNBUFFERED": "1",  # the last words of a worker that dies must reach the log
        FOLDER_VARIABLE: str(instance.folder),
        METRICS_VARIABLE: str(instance.worker_metrics),
    }
    if settings.request_log:
        environment[PATH_VARIABLE] = str(instance.log_folder / LOGS["requests"])
    for name, value in WORKER_DEFAULTS.items():
        environment.setdefault(name, value)
    if settings.threads_per_worker is not None:
        for name in _THREADS:
            environment[name] = str(settings.threads_per_worker)
    elif not any(name in environment for name in _THREADS):
        threads = capacity(settings.device).threads(workers)
        environment |= {} if threads is None else dict.fromkeys(_THREADS, str(threads))
    return environment
