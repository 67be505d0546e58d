"""A file server on a free port that answers each request as its script says: whole, cut, stalled, changed, lying."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer:
    """Files by path, and for each path the ways to answer, one for each request; the last one stays.

    whole      with Range, If-Range and ETag, as a good server
    drop       half of what is asked for, then the connection is closed
    stall      half of what is asked for, then nothing until the test ends
    plain      whole, and Range is ignored
    truncate   half, and that half's length is stated as all
    longer     a length is stated that never comes
    tamper     whole, with a byte changed
    shifted    a range is answered from another place
    cut-chunks chunked, without the last chunk
    chunks     chunked, whole
    no-length  neither length nor chunks
    stubborn   If-Range is ignored, and Range is not
    page       whole, and said to be a web page
    odd        503, come again after a number that is none of ASCII
    nowhere    redirected to what is no address
    gzip       said to be compressed
    busy       503, come again at once
    gone       404
    redirect   to the same path below /moved
    loop       to itself
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.scripts: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.ended = threading.Event()
        self.url = ""

    def answer_of(self, path: str) -> str:
        script = self.scripts.get(path, ["whole"])
        return script.pop(0) if len(script) > 1 else script[0]


@contextmanager
def file_server() -> Iterator[FileServer]:
    """Serve until the block ends; no thread and no port stays."""
    state = FileServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    server.daemon_threads = False
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        state.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def handler(state: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            data = state.files.get(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()

        def do_GET(self) -> None:
            self.close_connection = True
            state.asked.append((self.path, self.headers.get("Range", ""), self.headers.get("If-Range", "")))
            way, data = state.answer_of(self.path), state.files.get(self.path.removeprefix("/moved"))
            with suppress(BrokenPipeError, ConnectionResetError):
                self.give(way, data)

        def give(self, way: str, data: bytes | None) -> None:
            if way == "gone" or data is None:
                self.head(404, **{"Content-Length": "0"})
            elif way == "busy":
                self.head(503, **{"Content-Length": "0", "Retry-After": "0"})
            elif way == "odd":
                self.head(503, **{"Content-Length": "0", "Retry-After": "²"})
            elif way == "nowhere":
                self.head(302, **{"Content-Length": "0", "Location": "http://[::1"})
            elif way in ("redirect", "loop"):
                to = self.path if way == "loop" else f"/moved{self.path}"
                self.head(302, **{"Content-Length": "0", "Location": to})
            elif way in ("chunks", "cut-chunks"):
                self.head(200, **{"Transfer-Encoding": "chunked"})
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.write(b"0\r\n\r\n" if way == "chunks" else b"")
            elif way == "no-length":
                self.head(200)
                self.wfile.write(data)
            else:
                self.body(way, data)

        def body(self, way: str, data: bytes) -> None:
            tag = f'"{hash(data)}"'
            if way == "tamper":
                data = data[:-1] + bytes([data[-1] ^ 1])
            asked = self.headers.get("Range", "").removeprefix("bytes=").rstrip("-")
            fresh = way == "stubborn" or self.headers.get("If-Range", tag) == tag
            start = int(asked) if asked and fresh and way != "plain" else 0
            if start >= len(data) and start:
                self.head(416, **{"Content-Length": "0"})
                return
            told = start - 1 if way == "shifted" and start else start
            rest = data[told:]
            sent = rest[: len(rest) // 2] if way in ("drop", "stall", "truncate") else rest
            length = {"truncate": len(sent), "longer": len(rest) + 10}.get(way, len(rest))
            headers = {"Content-Length": str(length), "ETag": tag}
            if start:
                headers["Content-Range"] = f"bytes {told}-{len(data) - 1}/{len(data)}"
            if way == "page":
                headers["Content-Type"] = "text/html; charset=utf-8"
            if way == "gzip":
                headers["Content-Encoding"] = "gzip"
            self.head(206 if start else 200, **headers)
            self.wfile.write(sent)
            self.wfile.flush()
            if way == "stall":
                state.ended.wait(5)

        def head(self, status: int, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()

    return Handler
