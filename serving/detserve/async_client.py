"""The client that generates load: many requests in flight from one process, at a small and known cost of its own.

    image ─► Target.encode ─► one POST ─► Reply (status, raw body, machine word, times)
                                └─ token refused ─► renewed once, sent again within the same latency

`detserve.client` serves people and programs; this one serves measurements. It parses nothing but error answers, tries
nothing again (a retry would hide what is measured) but a request whose token ran out, follows no redirect, keeps
connections alive, and never goes through a proxy on the loopback. A `Target` may also be a foreign server.
"""

import asyncio
import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
from aiohttp.payload import BytesPayload
from yarl import URL

from detserve.client import LOOPBACK, TokenSource, request_path
from detserve.client_errors import Said
from detserve.errors import ClientError

_KEEP_ALIVE_S = 4.0
"""Idle connections are closed before the server's usual 5 s are over: its closing must not meet our next request."""
_WARNED_BYTES = 2**20
"""Above this aiohttp warns of a body in memory; ours are in memory on purpose, read before the clock starts."""


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
        """Return the target of a model served by detserve; ``options`` as `detserve.client.Client.predict` takes them."""
        path, query = request_path(model, version, options)
        return cls(base_url.rstrip("/"), path, query=query, token=token)

    @property
    def on_this_machine(self) -> bool:
        """Whether the address is the loopback's."""
        return urlsplit(self.base_url).hostname in LOOPBACK

    @property
    def url(self) -> URL:
        """The whole address."""
        return URL(self.base_url.rstrip("/") + self.path, encoded=True).with_query(dict(self.query) or None)


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

    Args:
        timeout_s: of one request, from the call of `send` to the last byte.
        connections: the most at once; 0 for no limit.
    """

    def __init__(self, target: Target, *, timeout_s: float = 60.0, connections: int = 0) -> None:
        self.target = target
        self.timeout_s = timeout_s
        self._url = target.url
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None
        self._headers: dict[str, str] = {}
        self._token_used: str | None = None
        self._renewing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=_KEEP_ALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=not self.target.on_this_machine,
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
        )
        try:
            await self._take_token(None)
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, image: bytes) -> Reply:
        """Send one image; every failure is a `Reply` too, never an exception."""
        begun = time.monotonic()
        body = image if self.target.encode is None else self.target.encode(image)
        sent = time.monotonic()
        encode_ms = (sent - begun) * 1e3
        token = self._token_used
        status, answer, error = await self._post(body)
        if error == "unauthorized" and callable(self.target.token):
            try:
                await self._take_token(token)
            except Exception:  # noqa: BLE001 - a token's source is foreign code; the server's refusal stands
                return Reply(status, answer, error, sent, time.monotonic(), encode_ms, len(body))
            status, answer, error = await self._post(body)
        return Reply(status, answer, error, sent, time.monotonic(), encode_ms, len(body))

    async def _post(self, body: bytes) -> tuple[int, bytes, str]:
        if self._session is None:
            raise ClientError("The client is not open: use it as `async with AsyncClient(target) as client`.")
        try:
            async with self._session.post(
                self._url, data=_payload(body), headers=self._headers, allow_redirects=False
            ) as response:
                answer = await response.read()
                status, reason = response.status, response.reason
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return 0, b"", no_answer_word(error)
        if status == 200:
            return status, answer, ""
        return status, answer, Said.of(status, answer, reason or "", len(body)).word

    async def _take_token(self, refused: str | None) -> None:
        """Ask the source for a token, unless another request has done so since ``refused`` was sent."""
        source = self.target.token
        async with self._renewing:
            if refused is not None and self._token_used != refused:
                return
            # The source may read a file or ask the server: the other requests go on meanwhile.
            value = await asyncio.to_thread(source) if callable(source) else source
            self._token_used = value
            self._headers = {"Content-Type": self.target.content_type, **self.target.headers}
            if value:
                self._headers["Authorization"] = f"Bearer {value}"


def no_answer_word(error: BaseException) -> str:
    """Return the machine word for an exception of aiohttp by which a request got no answer."""
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "refused" if isinstance(error.os_error, ConnectionRefusedError) else "no_connection"
    if isinstance(error, aiohttp.ServerConnectionError | aiohttp.ClientPayloadError | aiohttp.ClientOSError | OSError):
        return "reset"
    return "bad_http" if isinstance(error, aiohttp.ClientResponseError) else "no_connection"


def _payload(body: bytes) -> BytesPayload | bytes:
    if len(body) <= _WARNED_BYTES:
        return body
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        return BytesPayload(body)
