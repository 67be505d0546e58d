"""The client that generates load: many requests in flight from one process, at a small and known cost of its own.

    image ─► Target.encode ─► one POST ─► Reply (status, raw body, machine word, times)
                                └─ token refused ─► renewed once, sent again within the same latency

`detserve.client` serves people and programs; this one serves measurements. It parses nothing but error answers, tries
nothing again (a retry would hide what is measured) but a request whose token ran out, follows no redirect, keeps
connections alive, and goes through no proxy. A `Target` may also be a foreign server.
"""

import asyncio
import errno
import json
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import quote, urlencode, urlsplit

from detserve.client import TokenSource, request_path
from detserve.client_errors import Said
from detserve.errors import ClientError
from detserve.http_connection import Answer, BadAnswerError, Connection

_IDLE_S = 4.0
"""A connection idle for longer is not used again: servers close theirs after 5 s, and that must not meet a request."""


def read_list(body: bytes) -> list[dict[str, Any]]:
    """Return the detections of an answer in the response contract's default form, timings around it or not.

    Raises:
        ClientError: it is not such an answer.
    """
    try:
        answer = json.loads(body)
        found = answer["detections"] if isinstance(answer, dict) else answer
        if isinstance(found, list) and all(isinstance(one, dict) for one in found):
            return found
    except (ValueError, KeyError):
        pass
    raise ClientError(f"Expected a list of detections, got {body[:100]!r}. Is that a detserve endpoint?")


@dataclass(frozen=True)
class Target:
    """What requests go to.

    Attributes:
        base_url: scheme, host and port, such as ``http://127.0.0.1:8080``.
        path: of the request; ``query`` is appended to it.
        headers: sent with each request, beside ``content_type`` and the token.
        encode: makes the body from the image's bytes, each time it is sent; None: the bytes are the body.
        read: the detections of an answer of status 200, as the default response form has them.
        token: as of `detserve.client.Client`.
    """

    base_url: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/octet-stream"
    encode: Callable[[bytes], bytes] | None = None
    read: Callable[[bytes], list[dict[str, Any]]] = read_list
    token: TokenSource = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ClientError(f"Got the address {self.base_url!r}; expected one such as http://127.0.0.1:8080.")

    @classmethod
    def served(
        cls,
        base_url: str,
        model: str,
        *,
        version: str | None = None,
        options: Mapping[str, object] | None = None,
        token: TokenSource = None,
    ) -> Self:
        """Return the target of a model that detserve serves; ``options`` as `Client.predict` takes them."""
        path, query = request_path(model, version, options)
        return cls(base_url.rstrip("/"), path, query=query, token=token)

    def head(self, token: str | None) -> bytes:
        """Return the head of every request, up to the value of its Content-Length.

        Raises:
            ClientError: a header holds what no header can.
        """
        parts = urlsplit(self.base_url)
        where = parts.path.rstrip("/") + self.path
        if self.query:
            where += "?" + urlencode(self.query, quote_via=quote)
        fields = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": self.content_type, **self.headers}
        if token:
            fields["Authorization"] = f"Bearer {token}"
        lines = [f"POST {where} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "Content-Length: "]
        if any(not line.isascii() or not line.isprintable() for line in lines):
            raise ClientError("Got a token, path or header with line breaks or letters outside ASCII; check the token.")
        return "\r\n".join(lines).encode("ascii")


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one request; times are of `time.monotonic`.

    Attributes:
        status: HTTP status, 0 without an answer.
        body: raw, as it came; empty without an answer.
        error: machine word; empty for status 200. Without an answer ``timeout``, ``refused``, ``reset``,
            ``bad_http`` or ``no_connection``; with one the server's own word, or detserve's for TorchServe's.
        sent_s: when the request was handed to the connection.
        done_s: when the last byte had come, or it was given up.
        encode_ms: the time that building the body took.
    """

    status: int
    body: bytes
    error: str
    sent_s: float
    done_s: float
    encode_ms: float
    request_bytes: int


class AsyncClient:
    """Sends images to one target; to be used inside one event loop: ``async with AsyncClient(target) as client``.

    As many connections are opened as requests are in flight; they are kept for the next ones.

    Args:
        timeout_s: of one request, from the call of `send` to the last byte.
    """

    def __init__(self, target: Target, *, timeout_s: float = 60.0) -> None:
        self.target = target
        self.timeout_s = timeout_s
        parts = urlsplit(target.base_url)
        self._secure = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = (parts.hostname or "", parts.port or (443 if self._secure else 80))
        self._idle: list[tuple[float, Connection]] = []
        self._open: set[Connection] = set()
        self._head = b""
        self._token: str | None = None
        self._renewing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self._take_token(None)
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._open:
            connection.close()
        await asyncio.sleep(0)  # the transports say goodbye in the loop's next turn

    async def send(self, image: bytes) -> Reply:
        """Send one image; every failure is a `Reply` too, never an exception."""
        begun = time.monotonic()
        body = image if self.target.encode is None else self.target.encode(image)
        sent = time.monotonic()
        token = self._token
        status, answer, error = await self._ask(body)
        if error == "unauthorized" and callable(self.target.token):
            try:
                await self._take_token(token)
            except Exception:  # noqa: BLE001 - a token's source is foreign code; the server's refusal stands
                return Reply(status, answer, error, sent, time.monotonic(), (sent - begun) * 1e3, len(body))
            status, answer, error = await self._ask(body)
        return Reply(status, answer, error, sent, time.monotonic(), (sent - begun) * 1e3, len(body))

    async def _ask(self, body: bytes) -> tuple[int, bytes, str]:
        try:
            async with asyncio.timeout(self.timeout_s):
                try:
                    connection = self._kept() or await self._connect()
                except OSError as error:
                    # A name with two addresses gives one OSError that tells of both.
                    refused = f"[Errno {errno.ECONNREFUSED}]" in str(error)
                    return 0, b"", "refused" if refused else "no_connection"
                try:
                    answer = await connection.ask(self._head + b"%d\r\n\r\n" % len(body), body)
                finally:
                    self._keep(connection)
        except TimeoutError:
            return 0, b"", "timeout"
        except OSError:
            return 0, b"", "reset"
        except BadAnswerError:
            return 0, b"", "bad_http"
        return answer.status, answer.body, "" if answer.status == 200 else _word(answer, len(body))

    def _kept(self) -> Connection | None:
        """Return a connection that is open and idle for a short time only."""
        now = time.monotonic()
        while self._idle:
            since, connection = self._idle.pop()
            if connection.reusable and now - since < _IDLE_S:
                return connection
            connection.close()
            self._open.discard(connection)
        return None

    def _keep(self, connection: Connection) -> None:
        if connection.reusable:
            self._idle.append((time.monotonic(), connection))
        else:
            self._open.discard(connection)

    async def _connect(self) -> Connection:
        host, port = self._address
        _, connection = await asyncio.get_running_loop().create_connection(Connection, host, port, ssl=self._secure)
        self._open.add(connection)
        return connection

    async def _take_token(self, refused: str | None) -> None:
        """Ask the source for a token, unless another request has done so since ``refused`` was sent."""
        source = self.target.token
        async with self._renewing:
            if refused is not None and self._token != refused:
                return
            # The source may read a file or ask the server: the other requests go on meanwhile.
            self._token = await asyncio.to_thread(source) if callable(source) else source
            self._head = self.target.head(self._token)


def _word(answer: Answer, sent_bytes: int) -> str:
    return Said.of(answer.status, answer.body, answer.reason, sent_bytes).word
