"""What a running server does right now."""

import contextlib
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from detserve.errors import ServerError
from detserve.instance import Instance, InstanceState
from detserve.server.management import Description, Management


@dataclass(frozen=True)
class WorkerStatus:
    """One worker process.

    Attributes:
        state: ``READY``, or ``UNLOADING`` for every other state, as TorchServe says it.
        memory_bytes: resident memory of the process, 0 when it does not run.
    """

    id: str
    state: str
    pid: int
    device: str
    memory_bytes: int
    gpu_usage: str


@dataclass(frozen=True)
class ModelStatus:
    """One version of a model.

    Attributes:
        reported: what a worker says of itself (runtime, device, provider, precision, …); empty when it does not say.
    """

    name: str
    version: str
    default: bool
    archive: str
    batch_size: int
    max_batch_delay_ms: int
    min_workers: int
    max_workers: int
    response_timeout_s: int
    workers: tuple[WorkerStatus, ...]
    pending_requests: int
    queue_left: int
    reported: dict[str, Any]

    @property
    def ready(self) -> bool:
        """Whether the model has its workers and all of them are ready."""
        return len(self.workers) >= self.min_workers and all(worker.state == "READY" for worker in self.workers)


@dataclass(frozen=True)
class ServerStatus:
    """A running server."""

    instance: str
    folder: str
    pid: int
    uptime_s: float
    java: str
    token_auth: bool
    inference_url: str
    management_url: str
    metrics_url: str
    ports: dict[str, int]
    max_request_bytes: int
    models: tuple[ModelStatus, ...]
    monitor_url: str = ""
    edge: bool = False

    @property
    def ready(self) -> bool:
        """Whether every model is ready."""
        return all(model.ready for model in self.models)

    def to_json(self) -> dict[str, Any]:
        """Return the status as JSON values."""
        models = [{**asdict(model), "ready": model.ready} for model in self.models]
        return {**asdict(self), "models": models, "ready": self.ready}


def status(instance: Instance | None = None, *, ask_workers: bool = True, timeout_s: float = 5.0) -> ServerStatus:
    """Return the status of a running server.

    Args:
        ask_workers: let one worker of each model report its runtime and device; waits for a busy one ``timeout_s``.
    """
    instance = instance or Instance.named()
    state = instance.require_running()
    models = []
    with Management(instance, state) as management:
        for name in management.models():
            default = str(management.describe(name)["modelVersion"])
            for described in management.versions(name):
                version = str(described["modelVersion"])
                reported: dict[str, Any] = {}
                if ask_workers and any(worker["status"] == "READY" for worker in described["workers"]):
                    with contextlib.suppress(ServerError):  # a busy or foreign worker does not make the rest unknown
                        answer = management.describe(name, version, from_worker=True, timeout_s=timeout_s)
                        reported = reported_by(answer)
                models.append(_model(described, state, reported, default=version == default))
    return ServerStatus(
        instance=instance.name,
        folder=str(instance.folder),
        pid=state.pid,
        uptime_s=round(time.time() - state.started_at, 1),
        java=state.java,
        token_auth=state.token_auth,
        inference_url=state.inference_url,
        management_url=state.management_url,
        metrics_url=state.metrics_url,
        ports=state.ports.named(),
        max_request_bytes=state.max_request_bytes,
        models=tuple(models),
        monitor_url=state.monitor_url,
        edge=state.edge is not None,
    )


def reported_by(described: Description) -> dict[str, Any]:
    """Return what the worker itself said, empty when it did not."""
    metadata = described.get("customizedMetadata")
    return metadata if isinstance(metadata, dict) else {}


def _model(described: Description, state: InstanceState, reported: dict[str, Any], *, default: bool) -> ModelStatus:
    name, version = str(described["modelName"]), str(described["modelVersion"])
    archives = {(model.name, model.version): model.archive for model in state.models}
    queue = described.get("jobQueueStatus", {})
    return ModelStatus(
        name=name,
        version=version,
        default=default,
        archive=archives.get((name, version), str(described["modelUrl"])),
        batch_size=described["batchSize"],
        max_batch_delay_ms=described["maxBatchDelay"],
        min_workers=described["minWorkers"],
        max_workers=described["maxWorkers"],
        response_timeout_s=described["responseTimeout"],
        workers=tuple(_worker(worker) for worker in described["workers"]),
        pending_requests=queue.get("pendingRequests", 0),
        queue_left=queue.get("remainingCapacity", 0),
        reported=reported,
    )


def _worker(worker: dict[str, Any]) -> WorkerStatus:
    memory = 0
    with contextlib.suppress(psutil.Error):  # TorchServe's own number is up to a minute old
        memory = psutil.Process(worker["pid"]).memory_info().rss if worker["pid"] > 0 else 0
    return WorkerStatus(
        id=worker["id"],
        state=worker["status"],
        pid=worker["pid"],
        device="gpu" if worker["gpu"] else "cpu",
        memory_bytes=memory,
        gpu_usage="" if worker["gpuUsage"] == "N/A" else worker["gpuUsage"],
    )
