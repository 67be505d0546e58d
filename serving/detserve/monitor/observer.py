"""Looks at one server: once a second by itself, and when somebody asks.

What somebody asks is answered from at most `_FRESH_S` before, so that many who ask at once cost the server one look.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import psutil
import requests

from detserve.errors import DetserveError
from detserve.instance import FOLDER_VARIABLE, Instance, InstanceState, is_alive
from detserve.monitor.exposition import exposition, server_families
from detserve.monitor.queue_times import QueueTimes
from detserve.monitor.readiness import Readiness, readiness
from detserve.monitor.worker_files import WorkerFiles
from detserve.server_metrics import parse_queues

_FRESH_S = 0.5
_LIVE_TIMEOUT_S = 3.0
_METRICS_TIMEOUT_S = 2.0
_TOLD_AGAIN_S = 60.0

T = TypeVar("T")


class _Fresh(Generic[T]):
    """A value that is found again when it is too old; whoever asks meanwhile waits for the same one."""

    def __init__(self, find: Callable[[], T], keep: Callable[[T], bool] = lambda _: True) -> None:
        self._find = find
        self._keep = keep
        self._lock = threading.Lock()
        self._found: T | None = None
        self._at = -_FRESH_S

    def get(self) -> T:
        with self._lock:
            if self._found is None or time.monotonic() - self._at > _FRESH_S:
                found = self._find()
                if not self._keep(found):
                    self._found = None
                    return found
                self._found, self._at = found, time.monotonic()
            return self._found


class Observer:
    """One server and what is known of it. Safe to use from several threads."""

    def __init__(self, instance: Instance, state: InstanceState) -> None:
        self._instance = instance
        self._state = state
        self._files = WorkerFiles(instance.worker_metrics)
        self._queues = QueueTimes()
        self._queues_lock = threading.Lock()
        self._session = threading.local()
        # While it starts it may be ready at any moment, and costs nothing to ask.
        self._readiness = _Fresh(self._look, keep=lambda found: found.status is not None)
        self._live = _Fresh(self._ask_frontend)
        self._text = _Fresh(self._expose)
        self._told: dict[str, float] = {}

    def is_there(self) -> bool:
        """Whether the server's process runs."""
        return is_alive(self._state)

    def live(self) -> str:
        """Return why the frontend does not live; empty when it answers."""
        return self._live.get()

    def ready(self) -> Readiness:
        """Return whether the server may get requests."""
        if self._instance.draining_path.exists():
            return self._look()
        return self._readiness.get()

    def metrics(self) -> str:
        """Return all metrics as one text."""
        return self._text.get()

    def tick(self) -> None:
        """Do what is due once a second; what goes wrong is logged, not raised."""
        try:
            self._files.compact(self._is_ours)
            text = self._frontend_metrics()
            if text is not None:
                with self._queues_lock:
                    self._queues.take(parse_queues(text))
        except (DetserveError, OSError, ValueError) as error:
            self._tell(str(error))

    def _look(self) -> Readiness:
        # The management API is given longer to answer than a probe waits: it is asked only when it will.
        return readiness(self._instance, self._files.read().golden, frontend_problem=self.live())

    def _expose(self) -> str:
        workers = self._files.read()
        text = self._frontend_metrics()
        with self._queues_lock:
            queues = list(self._queues.collect())
        ours = server_families(self._state, self.ready(), frontend_up=text is not None)
        return exposition(text, [*workers.families, *queues, *ours])

    def _ask_frontend(self) -> str:
        if not self.is_there():
            return "the server's process is gone"
        # Needs no token, and is no question to a model. Whatever it answers, it answers.
        return self._reach("OPTIONS", f"{self._state.backend_url}/", _LIVE_TIMEOUT_S)[1]

    def _frontend_metrics(self) -> str | None:
        answer, problem = self._reach("GET", f"{self._state.metrics_url}/metrics", _METRICS_TIMEOUT_S)
        if answer is None or answer.status_code != 200:
            self._tell(problem or f"TorchServe's metrics: HTTP {answer.status_code if answer is not None else ''}")
            return None
        return answer.text

    def _reach(self, method: str, url: str, timeout_s: float) -> tuple[requests.Response | None, str]:
        if not hasattr(self._session, "own"):
            self._session.own = requests.Session()
            self._session.own.trust_env = False
        try:
            return self._session.own.request(method, url, timeout=timeout_s, allow_redirects=False), ""
        except requests.Timeout:
            return None, f"the frontend does not answer within {timeout_s:g} s"
        except requests.RequestException as error:
            return None, f"the frontend cannot be reached ({type(error).__name__})"

    def _is_ours(self, pid: int) -> bool:
        try:
            return psutil.Process(pid).environ().get(FOLDER_VARIABLE) == str(self._instance.folder)
        except (psutil.Error, OSError):
            return False

    def _tell(self, problem: str) -> None:
        now = time.monotonic()
        if now - self._told.get(problem, -_TOLD_AGAIN_S) >= _TOLD_AGAIN_S:
            if len(self._told) > 100:
                self._told.clear()
            self._told[problem] = now
            logging.getLogger("detserve.monitor").warning(problem)
