"""The monitor's three addresses, for Prometheus, for probes and for people with curl."""

import contextlib
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6, SHUT_RDWR, socket
from typing import Any

from detserve.monitor.exposition import CONTENT_TYPE
from detserve.monitor.observer import Observer

_MOST_AT_ONCE = 32
_TIMEOUT_S = 10.0
_JSON = "application/json"


class Endpoint(ThreadingHTTPServer):
    """Answers from an observer. Slow and many clients cost threads, so both have a limit.

    Raises:
        OSError: the address is taken.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, port: int, observer: Observer) -> None:
        if ":" in host:
            self.address_family = AF_INET6
        self.observer = observer
        self._room = threading.BoundedSemaphore(_MOST_AT_ONCE)
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, unless there are too many of them."""
        if not self._room.acquire(timeout=1.0):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room again."""
        # The socket's own timeout begins anew with every byte: who sends one now and then would keep a probe's place.
        end = threading.Timer(_TIMEOUT_S, _cut, [request])
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log what went wrong with one client, in one line: mostly it left."""
        logging.getLogger("detserve.monitor").debug("%s left", client_address, exc_info=True)


def _cut(connection: socket) -> None:
    with contextlib.suppress(OSError):  # closed meanwhile
        connection.shutdown(SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """One connection, one request."""

    server: Endpoint
    timeout = _TIMEOUT_S
    server_version = "detserve-monitor"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        try:
            status, kind, text = self._answer(path)
        except Exception as error:
            logging.getLogger("detserve.monitor").exception("%s failed", path)
            status, kind, text = 500, _JSON, _object(code=500, type="monitor_failed", message=repr(error))
        body = text.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: probes come every few seconds."""

    def _answer(self, path: str) -> tuple[int, str, str]:
        observer = self.server.observer
        if path == "/metrics":
            return 200, CONTENT_TYPE, observer.metrics()
        if path == "/ready":
            readiness = observer.ready()
            return (200 if readiness.ready else 503), _JSON, json.dumps(readiness.to_json())
        if path == "/live":
            problem = observer.live()
            return (503 if problem else 200), _JSON, _object(live=not problem, reason=problem)
        message = f"Got {path[:80]!r}; there are /metrics, /ready and /live."
        return 404, _JSON, _object(code=404, type="unknown_path", message=message)


def _object(**values: object) -> str:
    return json.dumps(values)
