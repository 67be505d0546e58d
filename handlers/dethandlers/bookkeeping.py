"""What is written down of each request while its batch is answered: its id, what became of it, and the stages' times.

    batch.begin ─► id ─► batch.answer | batch.refuse ─► batch.close ─► worker_metrics, request_log

Every request that began is in the books when the batch is closed, also when the handler itself failed.
"""

import os
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dethandlers.errors import RequestError
from dethandlers.request_log import PATH_VARIABLE, RequestLog, RequestRecord, take_request_id
from dethandlers.worker_metrics import HANDLER, WorkerMetrics, open_worker_metrics

if TYPE_CHECKING:
    import torch

    from dethandlers.detector import Answer


class Books:
    """The metrics and the request log of one worker.

    Args:
        model: name, as it is asked for.
        version: of the model.
    """

    def __init__(self, model: str, version: str) -> None:
        path = os.environ.get(PATH_VARIABLE)
        self.metrics: WorkerMetrics = open_worker_metrics(model, version)
        self.log = RequestLog(Path(path) if path else None, model, version)
        self.device: torch.device | None = None

    def started(self, outcome: str, *, golden_passed: bool | None = None) -> None:
        """Note that the worker is ready, or the machine word of what kept it from that."""
        self.metrics.started(outcome, golden_passed=golden_passed, device=self.device)

    def batch(self, size: int) -> "BatchBooks":
        """Begin a batch of ``size`` requests."""
        return BatchBooks(self, size)


class BatchBooks:
    """The books of one batch; a request is named by its place in it."""

    def __init__(self, books: Books, size: int) -> None:
        self._books = books
        self._size = size
        self._begun = time.perf_counter()
        self._records: dict[int, RequestRecord] = {}

    def begin(
        self, index: int, row: MutableMapping[str, Any], headers: Mapping[str, Any], frontend_id: str | None
    ) -> str:
        """Note a request and return its id, which is taken out of its fields."""
        request_id = take_request_id(row, headers, frontend_id)
        # Until it is known better: the handler itself failed.
        self._records[index] = RequestRecord(request_id, frontend_id or "", 503, "handler_failed", self._size)
        return request_id

    def request_id(self, index: int) -> str:
        """Return the id of a request."""
        return self._records[index].request_id

    def answer(self, index: int, answer: "Answer", *, body_bytes: int, written_since: float) -> None:
        """Note an answer that is written.

        Args:
            body_bytes: size of the encoded image.
            written_since: when its writing began, by `time.perf_counter`.
        """
        now = time.perf_counter()
        stages = {**answer.timings_ms, "serialise": (now - written_since) * 1e3, HANDLER: (now - self._begun) * 1e3}
        self._records[index] = replace(
            self._records[index],
            status=200,
            type="ok",
            body_bytes=body_bytes,
            image_size=answer.image_size,
            detections=len(answer.detections),
            forward_size=answer.forward_size,
            stages_ms=stages,
        )

    def refuse(self, index: int, error: RequestError, *, body_bytes: int | None = None) -> None:
        """Note a request that gets an error."""
        stages = {HANDLER: (time.perf_counter() - self._begun) * 1e3}
        self._records[index] = replace(
            self._records[index], status=error.code, type=error.type, body_bytes=body_bytes, stages_ms=stages
        )

    def close(self) -> None:
        """Hand the batch to the metrics and the log."""
        records = [self._records[index] for index in sorted(self._records)]
        self._books.metrics.observe(records, self._books.device)
        self._books.log.write(records)
