"""What a worker counts and times, kept by prometheus-client in files that outlive the worker.

    worker ─► files of PROMETHEUS_MULTIPROC_DIR (one set a process) ─► detserve.monitor adds them up ─► GET /metrics

TorchServe's own way sends every figure as a line of the log, which its frontend parses, and loses them where the logs
are quiet. Without the variable, without prometheus-client (a stock TorchServe has neither) or without a place to write,
the worker serves all the same and counts nothing.
"""

import errno
import logging
import os
import shutil
import time
from collections import Counter as Tally
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dethandlers.request_log import RequestRecord

if TYPE_CHECKING:
    import torch

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus-client's own variable."""

STAGES = ("decode", "preprocess", "forward", "postprocess", "serialise")
HANDLER = "handler"
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
DETECTIONS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 300, 500, 1000)
REASONS = (
    "animated_image",
    "answer_too_long",
    "bad_request",
    "decode_too_slow",
    "empty_body",
    "image_too_costly",
    "image_too_large",
    "image_too_small",
    "invalid_image",
    "invalid_option",
    "malformed_request",
    "not_an_image",
    "truncated_image",
    "unknown_option",
)
"""Series that are there from the start, so that the first rejection is an increase; another reason gets its own."""
_MOST_REASONS = 64
_MODEL = ("model_name", "model_version")
_MEMORY_EVERY_S = 1.0
_ROOM_BYTES = 4 << 20


def open_worker_metrics(model: str, version: str) -> "WorkerMetrics":
    """Return the metrics of this worker, or such as count nothing where there is no place or package for them."""
    log = logging.getLogger("detserve")
    if not os.environ.get(FOLDER_VARIABLE):
        return WorkerMetrics(None)
    try:
        return WorkerMetrics(_Families(model, version))
    except ImportError:
        log.info("no metrics: prometheus-client is not installed")
    except (OSError, ValueError) as error:
        log.warning("no metrics: %s", error)
    return WorkerMetrics(None)


class WorkerMetrics:
    """Counts what one worker does; never raises, since an answer is worth more than a count of it."""

    def __init__(self, families: "_Families | None") -> None:
        self._families = families

    @property
    def active(self) -> bool:
        """Whether anything is counted."""
        return self._families is not None

    def started(self, outcome: str, *, golden_passed: bool | None = None, device: "torch.device | None" = None) -> None:
        """Count a start.

        Args:
            outcome: ``ready``, or the machine word of the error that kept the worker from starting.
            golden_passed: what the golden check said; None when there was none.
            device: on which the model is, for its memory.
        """
        self._do(lambda families: families.started(outcome, golden_passed, device))

    def observe(self, records: Sequence[RequestRecord], device: "torch.device | None" = None) -> None:
        """Count the requests of one batch; ``device`` is asked for its memory now and then."""
        self._do(lambda families: families.observe(records, device))

    def _do(self, act: "Callable[[_Families], None]") -> None:
        if self._families is None:
            return
        try:
            act(self._families)
        except (OSError, ValueError, RuntimeError) as error:
            self._families = None
            logging.getLogger("detserve").warning("no more metrics: %s", error)


class _Families:
    """prometheus-client's objects, each bound to the model's labels once: looking them up costs as much as counting."""

    def __init__(self, model: str, version: str) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        folder = Path(os.environ[FOLDER_VARIABLE])
        if shutil.disk_usage(folder).free < _ROOM_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        self._labels = (model, version)
        self._folder = folder
        registry: Any = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Any:
            return Histogram(name, text, (*_MODEL, *labels), buckets=buckets, registry=registry)

        stages = histogram(
            "detserve_stage_seconds", "Time in a stage, per image; forward is its whole pass's.", SECONDS, "stage"
        )
        self._stages = {stage: stages.labels(*self._labels, stage) for stage in STAGES}
        self._handler = histogram(
            "detserve_handler_seconds", "From the batch's arrival in the worker until the answer was written.", SECONDS
        ).labels(*self._labels)
        self._batches = histogram("detserve_batch_size", "Requests in a batch, per batch.", SIZES).labels(*self._labels)
        self._forwards = histogram("detserve_forward_size", "Images in a forward pass, per pass.", SIZES).labels(
            *self._labels
        )
        self._detections = histogram("detserve_detections_per_image", "Detections in an answer.", DETECTIONS).labels(
            *self._labels
        )
        self._images = Counter("detserve_images", "Images answered with detections.", _MODEL, registry=registry).labels(
            *self._labels
        )
        reason = (*_MODEL, "reason")
        self._rejected = Counter(
            "detserve_rejected_inputs", "Requests refused for what they sent (4xx).", reason, registry=registry
        )
        self._failed = Counter(
            "detserve_failed_requests", "Requests that failed here (5xx).", reason, registry=registry
        )
        outcome = (*_MODEL, "outcome")
        self._starts = Counter(
            "detserve_worker_starts", "Starts of a worker: ready, or the error.", outcome, registry=registry
        )
        self._begun = Gauge(
            "detserve_worker_start_time_seconds",
            "When the worker was ready, since the epoch.",
            _MODEL,
            registry=registry,
            multiprocess_mode="liveall",
        )
        self._golden = Gauge(
            "detserve_golden_check_passed",
            "1: every worker reproduces its golden image; 0: one does not, and serves, as its spec allows.",
            _MODEL,
            registry=registry,
            multiprocess_mode="livemin",
        )
        device = (*_MODEL, "device")
        self._gpu_used = Gauge(
            "detserve_gpu_memory_used_bytes",
            "Memory of the GPU in use, by whomever.",
            device,
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        self._memory = Gauge(
            "detserve_device_memory_bytes",
            "Memory that the model's workers hold: of a GPU what torch has reserved, on a CPU the resident set.",
            device,
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._memory_due_s = 0.0
        self._reasons: set[str] = set()
        for one in REASONS:
            self._rejected.labels(*self._labels, one)
        self._failed.labels(*self._labels, "inference_failed")
        for one in ("ready", "golden_drift"):
            self._starts.labels(*self._labels, one)
        _allot(folder)

    def started(self, outcome: str, golden_passed: bool | None, device: "torch.device | None") -> None:
        self._starts.labels(*self._labels, outcome).inc()
        if golden_passed is not None:
            self._golden.labels(*self._labels).set(float(golden_passed))
        if outcome == "ready":
            self._begun.labels(*self._labels).set_to_current_time()
        self._observe_memory(device)
        _allot(self._folder)

    def observe(self, records: Sequence[RequestRecord], device: "torch.device | None") -> None:
        if not records:
            return
        self._batches.observe(records[0].batch_size)
        answered = [record for record in records if record.status == 200]
        if answered:
            self._images.inc(len(answered))
        for record in answered:
            for stage, value in record.stages_ms.items():
                into = self._handler if stage == HANDLER else self._stages.get(stage)
                if into is not None:
                    into.observe(value / 1e3)
            self._detections.observe(record.detections or 0)
        # Every image of a pass says its size: a pass of n images was said n times.
        for size, times in Tally(record.forward_size for record in answered if record.forward_size).items():
            for _ in range(-(-times // size)):
                self._forwards.observe(size)
        for record in records:
            if record.status != 200:
                family = self._failed if record.status >= 500 else self._rejected
                family.labels(*self._labels, self._reason(record.type)).inc()
        self._observe_memory(device)

    def _reason(self, word: str) -> str:
        """The word itself, unless somebody makes words up: each is a series for ever."""
        if word not in self._reasons and len(self._reasons) >= _MOST_REASONS:
            return "other"
        self._reasons.add(word)
        return word

    def _observe_memory(self, device: "torch.device | None") -> None:
        now = time.monotonic()
        if device is None or now < self._memory_due_s:
            return
        self._memory_due_s = now + _MEMORY_EVERY_S
        if device.type == "cuda":
            import torch

            free, total = torch.cuda.mem_get_info(device)
            self._gpu_used.labels(*self._labels, str(device)).set(total - free)
            held = torch.cuda.memory_reserved(device)
        else:
            held = int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self._memory.labels(*self._labels, str(device)).set(held)


def _allot(folder: Path) -> None:
    """Take the disk's blocks for this process's files now: a mapped page without a block kills who writes to it.

    Raises:
        OSError: the disk is full.
    """
    for path in folder.glob(f"*_{os.getpid()}.db"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
