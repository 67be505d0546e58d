"""What a benchmark records, before anything is computed from it.

    schedule ─► load ─► Sample … ─► Level ─► statistics ─► LevelSummary ─┐
                            monitor ─► Resources ─┘                      ├─► Run ─► table, JSON, CSV, Markdown, HTML
                                                              validity ──┘

All times of a level are seconds since its own start, read from one monotonic clock.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Loop = Literal["closed", "open"]
Arrivals = Literal["poisson", "constant"]

STAGES = ("encode", "network_queue", "wait", "decode", "preprocess", "forward", "postprocess", "serialise")
"""The parts of a request's latency, in their order.

``encode``: the client builds the request; ``network_queue``: everything between the client and the handler, the
server's queue and the wait for a batch to fill included; ``wait``: in the handler, but for another image of the batch;
the others: the worker's work on this image and on its forward pass.
"""


@dataclass(frozen=True)
class Load:
    """One load level: so many requests in flight (closed loop), or so many requests per second (open loop)."""

    loop: Loop
    value: float
    arrivals: Arrivals | None = None

    @property
    def name(self) -> str:
        """Such as ``concurrency 8`` or ``12.5 req/s poisson``."""
        if self.loop == "closed":
            return f"concurrency {self.value:g}"
        return f"{self.value:g} req/s {self.arrivals}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One request.

    Attributes:
        image: name of the image that was sent.
        scheduled_s: when the request was due; in a closed loop, when it was sent.
        sent_s: when its first byte was handed to the socket.
        done_s: when the last byte of the answer was there, or when it was given up.
        status: HTTP status; 0 when there was no answer at all.
        error: machine word of what went wrong; empty for an answer with detections.
        encode_ms: the client's time to build the request.
        request_bytes, response_bytes: sizes of the bodies.
        stages_ms: the worker's own times, when they were asked for: ``handler`` (all of its time on the batch, until
            this answer was written), ``decode``, ``preprocess``, ``forward``, ``postprocess``, ``serialise``.
        batch_size: requests that shared the worker's batch.
    """

    image: str
    scheduled_s: float
    sent_s: float
    done_s: float
    status: int
    error: str = ""
    encode_ms: float = 0.0
    request_bytes: int = 0
    response_bytes: int = 0
    stages_ms: dict[str, float] | None = None
    batch_size: int | None = None

    @property
    def ok(self) -> bool:
        """Whether detections came back."""
        return not self.error

    @property
    def latency_ms(self) -> float:
        """From when it was *due*: a stalled server makes the requests behind it late (no coordinated omission)."""
        return (self.done_s - self.scheduled_s) * 1e3


@dataclass(frozen=True)
class GpuSample:
    """One look at one GPU; None what its driver does not tell."""

    index: int
    at_s: float
    utilisation: float | None
    memory_mb: float | None
    sm_clock_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    throttled: bool | None


@dataclass(frozen=True)
class Resources:
    """What a level cost, over its whole length.

    Attributes:
        wall_s: how long it took.
        client_cpu_s: CPU time of the client's process.
        server_cpu_s: CPU time of the server and its workers; None when they run elsewhere.
        machine_cpu: share of all cores that was busy, 0 to 1.
        cgroup_throttled_s: how long the container's CPU limit held us back; None without one.
        steal: share of time that the hypervisor took, 0 to 1; None where it is not told.
        loop_lag_ms: the client's own lateness: the event loop's delay, p99.
        queue_ms: mean time in the server's queue, from the server's metrics; None when they cannot be read.
        gpu: looks at the GPUs.
    """

    wall_s: float
    client_cpu_s: float
    server_cpu_s: float | None = None
    machine_cpu: float | None = None
    cgroup_throttled_s: float | None = None
    steal: float | None = None
    loop_lag_ms: float | None = None
    queue_ms: float | None = None
    gpu: tuple[GpuSample, ...] = ()


@dataclass(frozen=True)
class Accuracy:
    """What the answers of a level were worth: COCO AP over the requests of the level, as fractions.

    Attributes:
        ap_answered: over the requests that were answered.
        ap_delivered: over all requests, a failed one counting as an image in which nothing was found.
        requests, failed: how many were scored, and how many of these failed.
    """

    ap_answered: float
    ap50_answered: float
    ap_delivered: float
    ap50_delivered: float
    requests: int
    failed: int


@dataclass(frozen=True)
class Level:
    """One load level as measured, its warm-up included.

    Attributes:
        samples: every request, in the order they were due.
        window_s: length of the windows that stability is judged by.
        stopped: why the level ended: ``stable``, ``time`` (its bound was reached), ``count`` or ``interrupted``.
    """

    load: Load
    samples: tuple[Sample, ...] = field(repr=False)
    resources: Resources
    window_s: float
    stopped: str
    accuracy: Accuracy | None = None


Stamp = Literal["VALID", "WARN", "INVALID"]


@dataclass(frozen=True)
class Verdict:
    """Whether a figure may be quoted, and each reason against it: ``(stamp, machine word, sentence)``."""

    stamp: Stamp
    reasons: tuple[tuple[Stamp, str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "stamp": self.stamp,
            "reasons": [{"stamp": stamp, "code": code, "message": message} for stamp, code, message in self.reasons],
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Verdict":
        """Return the verdict that `to_json` gave."""
        reasons = tuple((one["stamp"], one["code"], one["message"]) for one in document["reasons"])
        return cls(document["stamp"], reasons)
