"""Thousands of odd requests at a running server: no worker dies, nothing fails but in declared ways, nothing grows."""

import collections
import http.client
import queue
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import psutil
import pytest
from detserve import server
from mutations import MODEL, SEEDS, Sent, requests_of

CLIENTS = 6
MOST_GROWTH = 0.05
LONGEST_LINE = 4096
"""The frontend closes the connection on a longer request line, often before its answer is read; the edge says 414."""


@dataclass
class Findings:
    """What came of the requests: how many of each status, and the undeclared ones."""

    statuses: collections.Counter = field(default_factory=collections.Counter)
    by_kind: collections.Counter = field(default_factory=collections.Counter)
    undeclared: list[tuple[int, Sent, bytes]] = field(default_factory=list)
    silent: list[Sent] = field(default_factory=list)
    cut_off: int = 0
    refused_whole: collections.Counter = field(default_factory=collections.Counter)


def declared(status: int, body: bytes) -> bool:
    """Whether this is an answer that the documentation knows.

    Of 5xx these: an image needs more memory than there is, and the frontend's own word for a form that it cannot read.
    """
    if status < 500:
        return True
    return (status == 507 and b'"inference_failed"' in body) or (status == 500 and b"ErrorDataDecoder" in body)


def fire(instance, requests: Iterable[Sent], found: Findings | None = None) -> Findings:
    """Send everything, each client over its own connection."""
    parts = urlsplit(instance.require_running().inference_url)
    token = server.token(instance).value
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    lock = threading.Lock()
    found = Findings() if found is None else found

    def work() -> None:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
        while (sent := waiting.get()) is not None:
            headers = {"Authorization": f"Bearer {token}", **sent.headers}
            for _attempt in range(2):
                try:
                    connection.request(
                        sent.method,
                        sent.path,
                        body=sent.body,
                        headers={name: value.encode("utf-8") for name, value in headers.items()},
                    )
                    answer = connection.getresponse()
                    status, body = answer.status, answer.read()
                    if status == 417:  # its body was sent all the same: nobody knows what this connection is at
                        connection.close()
                    break
                except (OSError, http.client.HTTPException):
                    # A connection that the server had closed meanwhile; twice is silence.
                    connection.close()
                    status, body = 0, b""
            with lock:
                found.statuses[status] += 1
                found.by_kind[f"{sent.kind.rpartition(', ')[2]} {status}"] += 1
                if not status and len(sent.path) < LONGEST_LINE:
                    found.silent.append(sent)
                elif not status:
                    found.cut_off += 1
                elif not declared(status, body):
                    found.undeclared.append((status, sent, body))
                if sent.whole and status != 200:
                    found.refused_whole[f"{sent.kind}: {status} {body[:200]!r}"] += 1
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        for sent in requests:
            while waiting.qsize() > 50:
                time.sleep(0.002)
            waiting.put(sent)
    finally:
        for _ in threads:
            waiting.put(None)
        for thread in threads:
            thread.join()
    return found


def memory_of(instance) -> dict[str, int]:
    """Resident bytes of the frontend and of the worker, the least of some moments."""
    status = server.status(instance, ask_workers=False)
    pids = {"frontend": status.pid, "worker": status.models[0].workers[0].pid}
    least = dict.fromkeys(pids, sys.maxsize)
    for _ in range(10):
        for name, pid in pids.items():
            least[name] = min(least[name], psutil.Process(pid).memory_info().rss)
        time.sleep(0.1)
    return least


def run(instance, *, warm_up: int, seeds: Iterable[int], each: int) -> tuple[Findings, dict[str, float]]:
    """Warm up with requests of the same kinds, fire, and compare the memory and the processes."""
    fire(instance, requests_of(1, warm_up))
    (before,) = server.status(instance, ask_workers=False).models
    first = memory = memory_of(instance)
    begun = time.monotonic()
    found, on_the_way = Findings(), []
    for seed in seeds:
        fire(instance, requests_of(seed, each), found)
        memory = memory_of(instance)
        on_the_way.append("/".join(f"{size >> 20}" for size in memory.values()))
    seconds = time.monotonic() - begun
    (after,) = server.status(instance, ask_workers=False).models
    growth = {name: size / first[name] - 1 for name, size in memory.items()}
    sys.stdout.write(
        f"\n{sum(found.statuses.values())} requests in {seconds:.0f} s: {dict(sorted(found.statuses.items()))}; "
        f"{found.statuses[200]} decoded; growth {', '.join(f'{name} {one:+.1%}' for name, one in growth.items())}\n"
        f"  MiB, {'/'.join(first)}: {'/'.join(f'{size >> 20}' for size in first.values())}, {', '.join(on_the_way)}\n"
    )
    for line, count in found.refused_whole.most_common(30):
        sys.stdout.write(f"  {count} × {line}\n")
    for status, sent, body in found.undeclared[:30]:
        sys.stdout.write(f"  {status} {sent.kind} {sent.method} {sent.path[:80]} {sent.headers} → {body[:200]!r}\n")
    for sent in found.silent[:30]:
        sys.stdout.write(f"  no answer: {sent.kind} {sent.path[:80]} {str(sent.headers)[:200]}\n")
    assert [worker.pid for worker in after.workers] == [worker.pid for worker in before.workers]
    assert after.ready
    return found, growth


@pytest.mark.server
def test_some_odd_requests(fuzzed):
    found, _ = run(fuzzed, warm_up=50, seeds=SEEDS[:3], each=500)
    assert (found.undeclared, found.silent) == ([], [])
    assert found.statuses[200] >= 750


@pytest.mark.server
@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_thousand_odd_requests(fuzzed):
    found, growth = run(fuzzed, warm_up=8000, seeds=SEEDS, each=1000)
    assert (found.undeclared, found.silent) == ([], [])
    assert found.statuses[200] >= 10_000
    assert sum(found.statuses.values()) == 20_000
    assert max(growth.values()) <= MOST_GROWTH


def test_a_seed_gives_the_same_requests():
    first, second = (list(requests_of(SEEDS[0], 50)) for _ in range(2))
    assert first == second
    assert first != list(requests_of(SEEDS[1], 50))
    assert len({sent.kind for sent in first}) > 20
    assert all(MODEL in sent.path or sent.kind == "odd path" for sent in first)
