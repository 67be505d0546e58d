"""One text of all metrics: TorchServe's as they come, then the workers' and the monitor's, no family twice.

TorchServe's families are passed on line by line: its counters are not named as prometheus-client would write them. What
cannot be parsed, or has a name of ours, is left out: one bad line would cost a scraper the whole answer.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from detserve.instance import InstanceState
from detserve.monitor.readiness import Readiness, alive_workers

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OURS = "detserve_"


class _Collected:
    """Families that were collected already, as a registry wants them."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def exposition(frontend: str | None, families: Sequence[Metric]) -> str:
    """Return the text.

    Args:
        frontend: TorchServe's, None when it does not answer.
        families: ours.
    """
    registry: Any = CollectorRegistry()
    registry.register(_Collected(families))
    return passed_on(frontend or "") + generate_latest(registry).decode("utf-8")


def passed_on(frontend: str) -> str:
    """Return the families of a foreign text that may stand beside ours; nothing of a text that is none."""
    blocks: dict[str, list[str]] = {}
    for line in frontend.splitlines():
        words = line.split(None, 3)
        if not words:
            continue
        comment = words[0] == "#"
        if comment and (len(words) < 3 or words[1] not in {"HELP", "TYPE"}):
            continue
        name = words[2] if comment else line.partition("{")[0].split()[0]
        # The samples of a histogram or summary belong to its family.
        family = next((name[: -len(end)] for end in _PARTS if name.endswith(end) and name[: -len(end)] in blocks), name)
        blocks.setdefault(family, []).append(line)
    return "".join("\n".join(lines) + "\n" for name, lines in blocks.items() if _may_stand(name, lines))


_PARTS = ("_bucket", "_sum", "_count")


def _may_stand(name: str, lines: list[str]) -> bool:
    if name.startswith(OURS):
        return False
    try:
        list(text_string_to_metric_families("\n".join(lines) + "\n"))
    except (ValueError, IndexError, KeyError):
        return False
    return True


def server_families(state: InstanceState, readiness: Readiness, *, frontend_up: bool) -> list[Metric]:
    """Return what the monitor itself has seen."""
    model = ("model_name", "model_version")
    families = {
        "up": GaugeMetricFamily("detserve_frontend_up", "1: TorchServe's frontend answers.", float(frontend_up)),
        "ready": GaugeMetricFamily("detserve_ready", "1: the server may get requests.", float(readiness.ready)),
        "draining": GaugeMetricFamily(
            "detserve_draining", "1: a stop waits for the requests in flight.", float(readiness.draining)
        ),
        "started": GaugeMetricFamily(
            "detserve_server_start_time_seconds", "When the server was started, since the epoch.", state.started_at
        ),
        "serving": GaugeMetricFamily("detserve_workers_ready", "Workers that answer.", labels=model),
        "wanted": GaugeMetricFamily("detserve_workers_wanted", "Workers that there must be.", labels=model),
        "pending": GaugeMetricFamily("detserve_queue_pending_requests", "Requests in the queue.", labels=model),
        "memory": GaugeMetricFamily("detserve_workers_memory_bytes", "Resident memory of the workers.", labels=model),
    }
    for one in readiness.status.models if readiness.status else ():
        key = [one.name, one.version]
        families["serving"].add_metric(key, alive_workers(one))
        families["wanted"].add_metric(key, max(one.min_workers, len(one.workers)))
        families["pending"].add_metric(key, one.pending_requests)
        families["memory"].add_metric(key, sum(worker.memory_bytes for worker in one.workers))
    return list(families.values())
