"""What TorchServe's metrics say about a stretch of time: how long requests waited in its queue, and how they ended.

    before = read_counters(url, model) … load … read_counters(url, model).since(before).queue_ms

Written for TorchServe 0.12 with ``metrics_mode=prometheus``. Its gauge ``QueueTime`` holds the last request's time in
whole ms; the counter ``ts_queue_latency_microseconds`` sums the time of all of them, and two readings give a mean.
"""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

import requests

from detserve.client import LOOPBACK
from detserve.errors import ClientError

_QUEUE_US, _REQUESTS = "ts_queue_latency_microseconds", "ts_inference_requests_total"
_BY_STATUS = ("Requests2XX", "Requests4XX", "Requests5XX")
_LINE = re.compile(r"(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+\d+)?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Counters:
    """Counters of one model, and of the whole server by HTTP status; since it began, or between two readings.

    Attributes:
        queue_us: time in the queue, summed over the requests.
        requests: that reached a worker's queue.
        status_2xx, status_4xx, status_5xx: answers of the whole server, all its models and its ``/ping`` included.
    """

    queue_us: float
    requests: float
    status_2xx: float
    status_4xx: float
    status_5xx: float

    def since(self, before: "Counters") -> "Counters":
        """Return what was added after another reading."""
        return Counters(
            self.queue_us - before.queue_us,
            self.requests - before.requests,
            self.status_2xx - before.status_2xx,
            self.status_4xx - before.status_4xx,
            self.status_5xx - before.status_5xx,
        )

    @property
    def queue_ms(self) -> float | None:
        """Mean time in the queue; None without requests, or when the server was started anew between the readings."""
        return self.queue_us / self.requests / 1e3 if self.requests > 0 and self.queue_us >= 0 else None


def read_counters(metrics_url: str, model: str, *, timeout_s: float = 5.0) -> Counters:
    """Read the metrics of a server.

    Args:
        metrics_url: such as ``http://127.0.0.1:8082``, with or without ``/metrics``.
        model: whose queue; all its versions together.

    Raises:
        ClientError: the address does not answer with metrics.
    """
    url = metrics_url.rstrip("/")
    url = url if url.endswith("/metrics") else f"{url}/metrics"
    with requests.Session() as session:
        session.trust_env = urlsplit(url).hostname not in LOOPBACK  # a proxy has no business on the loopback
        try:
            answer = session.get(url, timeout=timeout_s)
        except requests.RequestException as error:
            raise ClientError(
                f"The metrics at {url} cannot be read ({type(error).__name__}). Check the address of the metrics port "
                "(8082 unless set otherwise)."
            ) from error
    if answer.status_code != 200:
        raise ClientError(f"The metrics at {url} cannot be read: HTTP {answer.status_code}. Check the address.")
    return parse_counters(answer.text, model)


def parse_counters(text: str, model: str) -> Counters:
    """Return the counters in Prometheus' text format; one that is not there yet counts 0."""
    sums = dict.fromkeys((_QUEUE_US, _REQUESTS, *_BY_STATUS), 0.0)
    for line in text.splitlines():
        found = _LINE.fullmatch(line.strip())
        if found is None or found["name"] not in sums:
            continue
        labels = dict(_LABEL.findall(found["labels"] or ""))
        if labels.get("model_name", model) == model:
            sums[found["name"]] += float(found["value"])
    return Counters(*sums.values())


def parse_queues(text: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Return each model's time in the queue, summed, in s, and its requests, since the server began.

    The version is ``default`` for requests that named none, as TorchServe says it.
    """
    sums: dict[tuple[str, str], list[float]] = {}
    for line in text.splitlines():
        found = _LINE.fullmatch(line.strip())
        if found is not None and found["name"] in {_QUEUE_US, _REQUESTS}:
            labels = dict(_LABEL.findall(found["labels"] or ""))
            key = labels.get("model_name", ""), labels.get("model_version", "")
            sums.setdefault(key, [0.0, 0.0])[found["name"] == _REQUESTS] += float(found["value"])
    return {key: (waited_us / 1e6, requests) for key, (waited_us, requests) in sums.items()}
