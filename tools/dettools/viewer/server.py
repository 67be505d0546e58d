"""The page's own small web server: on this machine only, by number only, for this page only.

    GET /  /view.css  /view.js            the page
    GET /api/meta                         what there is to see, and how the page is to begin
    GET /api/index                        every image, every score
    GET /api/matches?iou=0.5              who found whom
    GET /api/image/N                      boxes and masks of one image
    GET /image/N/VARIANT                  its photograph: thumbnail, view or full
    POST /api/ask                         a photograph for the served model
    GET /upload/N/VARIANT                 that photograph

A page of another site can reach 127.0.0.1 too. It gets nothing: not by a name of its own for this address (the Host is
checked), not by asking the model for it (the Origin is checked), not by embedding (Cross-Origin-Resource-Policy).
There is no password: who has an account on this machine can open the page while it is served.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from shutil import copyfileobj
from typing import TYPE_CHECKING, Any, cast, get_args
from urllib.parse import parse_qs, urlsplit

from detserve.errors import DetserveError

from dettools.viewer.live import LARGEST_UPLOAD, LiveModel, status_of
from dettools.viewer.photographs import Photographs, Picture, Size, Variant

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dettools.viewer.data import ViewData

_LOG = logging.getLogger(__name__)
_OWN_NAMES = frozenset({"127.0.0.1", "localhost"})
_ASSETS = {
    "/": ("view.html", "text/html; charset=utf-8"),
    "/view.css": ("view.css", "text/css; charset=utf-8"),
    "/view.js": ("view.js", "text/javascript; charset=utf-8"),
}
_ONE_IMAGE = re.compile(r"/api/image/(\d{1,9})")
_PHOTOGRAPH = re.compile(rf"/(image|upload)/(\d{{1,9}})/({'|'.join(get_args(Variant))})")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# A photograph's address is new with each start of the server.
_FOR_EVER = "private, max-age=86400, immutable"


class ViewServerError(DetserveError):
    """The page cannot be served."""


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class ViewServer(ThreadingHTTPServer):
    """Serves one data set, one model, or both, on 127.0.0.1.

    Args:
        data: the data set, if there is one.
        live: the served model, if there is one.
        photographs: makes the pictures.
        settings: what the page begins with, and the colours of the roles; handed to it as they are.
        port: 0 takes a free one.

    Raises:
        ViewServerError: the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self,
        data: ViewData | None,
        live: LiveModel | None,
        photographs: Photographs,
        settings: Mapping[str, Any],
        *,
        port: int = 0,
    ) -> None:
        self.data, self.live, self.photographs, self.settings = data, live, photographs, settings
        self.started = secrets.token_hex(8)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise ViewServerError(
                f"got the port {port}, which cannot be used: {error}. Leave --port out for a free one."
            ) from None

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def meta(self) -> dict[str, Any]:
        """Return what the page has to know before anything else."""
        data, live = self.data, self.live
        sources = data.sources if data else None
        return {
            **self.settings,
            "title": sources.title if sources else None,
            "images": len(sources.ground_truth.images) if sources else 0,
            "has_truth": bool(sources and sources.has_truth),
            "has_predictions": bool(sources and sources.has_predictions),
            "iou_type": sources.iou_type if sources else "bbox",
            "notes": list(sources.notes) if sources else [],
            "model": live.model if live else None,
            "model_classes": list(live.categories) if live else [],
            "largest_upload": LARGEST_UPLOAD,
            "started": self.started,
        }


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version = "HTTP/1.1"
    server_version = "detserve"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        _LOG.debug(format, *args)

    def _answer(self, method: Any) -> None:
        try:
            self._check_host()
            method()
        except _RefusedError as error:
            self._send_error(error.status, str(error))
        except DetserveError as error:
            self._send_error(HTTPStatus(status_of(error)), str(error))
        except OSError as error:
            if isinstance(error, (ConnectionError, TimeoutError)):
                raise
            self._send_error(HTTPStatus.UNPROCESSABLE_ENTITY, f"the photograph cannot be read: {error}")

    def _check_host(self) -> None:
        host = urlsplit(f"//{self.headers.get('Host', '')}")
        if host.hostname not in _OWN_NAMES:
            # What was sent along is not read.
            self.close_connection = True
            raise _RefusedError(
                HTTPStatus.MISDIRECTED_REQUEST, f"got the host {host.hostname!r}, expected 127.0.0.1 or localhost"
            )

    def _get(self) -> None:
        parts = urlsplit(self.path)
        data = self.server.data
        if parts.path in _ASSETS:
            name, media_type = _ASSETS[parts.path]
            self._send(_asset(name), media_type)
        elif parts.path == "/api/meta":
            self._send_json(self.server.meta())
        elif parts.path == "/api/index" and data:
            self._send_json(data.index)
        elif parts.path == "/api/matches" and data:
            self._send_json(data.matches(_iou(parts.query)))
        elif data and (found := _ONE_IMAGE.fullmatch(parts.path)):
            self._details(data, int(found[1]))
        elif found := _PHOTOGRAPH.fullmatch(parts.path):
            self._photograph(found[1] == "upload", int(found[2]), cast("Variant", found[3]))
        else:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "there is no such page")

    def _details(self, data: ViewData, number: int) -> None:
        try:
            details = data.details(number)
        except IndexError:
            raise _RefusedError(HTTPStatus.NOT_FOUND, f"there is no image {number}") from None
        path, annotated = data.file(number)
        size, reduced, problem = annotated, False, None
        try:
            if path is None:
                problem = "no file of this name was found"
            else:
                size, reduced = self.server.photographs.size(path, annotated)
        except OSError as error:
            problem = f"the file cannot be read: {error.strerror or 'it is no image'}"
        self._send_json(
            {**details, "size": list(size), "annotated": list(annotated), "reduced": reduced, "problem": problem}
        )

    def _photograph(self, uploaded: bool, number: int, variant: Variant) -> None:
        path: Path | None = None
        annotated: Size = (0, 0)
        try:
            if uploaded:
                path = self.server.live.photograph(number) if self.server.live else None
            elif self.server.data:
                path, annotated = self.server.data.file(number)
        except (KeyError, IndexError):
            path = None
        if path is None:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "there is no such photograph")
        self._send_picture(self.server.photographs.picture(path, annotated, variant))

    def _post(self) -> None:
        live = self.server.live
        # Whatever is refused here has a body that is not read.
        self.close_connection = True
        if urlsplit(self.path).path != "/api/ask" or live is None:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "no model is asked here: start with --model NAME")
        if self.headers.get("Origin") != f"http://{self.headers['Host']}":
            raise _RefusedError(HTTPStatus.FORBIDDEN, "only the page itself may ask the model")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "expected a photograph with its length")
        if int(length) > LARGEST_UPLOAD:
            raise _RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"got {int(length)} bytes, expected at most {LARGEST_UPLOAD}. Send a smaller photograph.",
            )
        content = self.rfile.read(int(length))
        self.close_connection = len(content) != int(length)
        self._send_json(live.ask(content))

    def _send_json(self, document: object) -> None:
        self._send(json.dumps(document, separators=(",", ":")).encode(), "application/json")

    def _send_error(self, status: HTTPStatus, message: str) -> None:
        self._send(json.dumps({"message": message}).encode(), "application/json", status)

    def _send_picture(self, picture: Picture) -> None:
        if isinstance(picture.content, bytes):
            self._send(picture.content, picture.media_type, caching=_FOR_EVER)
            return
        with picture.content.open("rb") as stream:
            length = picture.content.stat().st_size
            self._send_head(HTTPStatus.OK, picture.media_type, length, _FOR_EVER)
            copyfileobj(stream, self.wfile)

    def _send(
        self, content: bytes, media_type: str, status: HTTPStatus = HTTPStatus.OK, caching: str = "no-store"
    ) -> None:
        self._send_head(status, media_type, len(content), caching)
        self.wfile.write(content)

    def _send_head(self, status: HTTPStatus, media_type: str, length: int, caching: str) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", caching)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()


def _iou(query: str) -> float:
    text = parse_qs(query).get("iou", [""])[0]
    try:
        value = round(float(text), 4)
    except ValueError:
        value = -1.0
    if not 0.1 <= value <= 1:
        raise _RefusedError(HTTPStatus.BAD_REQUEST, f"got the IoU threshold {text!r}, expected 0.1 to 1")
    return value


@cache
def _asset(name: str) -> bytes:
    return files("dettools.viewer").joinpath("assets", name).read_bytes()
