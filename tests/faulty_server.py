"""A small HTTP detector on a real socket, with the faults that a benchmark must find.

It runs in a thread with an event loop of its own. Its worker answers one request after the other; an image's body is
its name, and what it holds is known beforehand, so that every answer is right unless a fault makes it wrong.
"""

import asyncio
import json
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Faults:
    """What the server does wrong.

    Attributes:
        stall: ``(from, to)`` in seconds since `FaultyServer.begin`: the worker stands still, requests queue.
        broken: images whose connection is cut; ``failing``: images answered with a 500.
        shed_over: with more requests than this in its queue, it answers at once that it found nothing.
        silent: requests are read and never answered.
        token: the one that is accepted; None: no token is asked for.
    """

    stall: tuple[float, float] | None = None
    broken: Collection[str] = ()
    failing: Collection[str] = ()
    shed_over: int | None = None
    silent: bool = False
    token: str | None = None


@dataclass
class FaultyServer:
    """See the module. ``asked`` lists the paths of the requests, ``connections`` counts the connections."""

    answers: Mapping[str, list[dict[str, object]]]
    service_s: float = 0.0
    faults: Faults = field(default_factory=Faults)
    port: int = 0
    asked: list[str] = field(default_factory=list)
    connections: int = 0
    _begun: float = 0.0
    _waiting: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def begin(self, **faults: object) -> None:
        """Take these faults, and start their clock."""
        self.faults = Faults(**faults)  # type: ignore[arg-type]
        self.asked.clear()
        self._begun = time.monotonic()

    @contextmanager
    def running(self) -> Iterator["FaultyServer"]:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()

        async def start() -> asyncio.Server:
            self._worker = asyncio.Lock()
            return await asyncio.start_server(self._serve, "127.0.0.1", 0)

        async def stop() -> None:
            server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        server = asyncio.run_coroutine_threadsafe(start(), loop).result()
        self.port = server.sockets[0].getsockname()[1]
        self.begin()
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(stop(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                body = (await reader.readexactly(int(fields["content-length"]))).decode()
                self.asked.append(head.split()[1])
                answer = await self._answer(body, fields.get("authorization"))
                if answer is None:
                    return
                status, document = answer
                text = json.dumps(document).encode()
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(text)) + text)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, image: str, authorization: str | None) -> tuple[int, object] | None:
        faults = self.faults
        if faults.token is not None and authorization != f"bearer {faults.token}":
            return 400, {"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed."}
        if faults.silent:
            await asyncio.sleep(3600)
        if image in faults.broken:
            return None
        if image in faults.failing:
            return 500, {"code": 500, "type": "inference_failed", "message": "as ordered"}
        if faults.shed_over is not None and self._waiting > faults.shed_over:
            return 200, []
        self._waiting += 1
        try:
            async with self._worker:
                since = time.monotonic() - self._begun
                if faults.stall and faults.stall[0] <= since < faults.stall[1]:
                    await asyncio.sleep(faults.stall[1] - since)
                if self.service_s:
                    await asyncio.sleep(self.service_s)
        finally:
            self._waiting -= 1
        timings = {"decode": 1.0, "preprocess": 0.5, "forward": 3.0, "postprocess": 0.25, "serialise": 0.125}
        return 200, {"detections": self.answers.get(image, []), "timings_ms": timings, "batch_size": 1}
