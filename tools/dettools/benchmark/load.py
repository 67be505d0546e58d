"""The load itself: one `Load` on one target for a bounded time, every request of it recorded.

    closed   N users: each sends, waits for the answer, sends again        ─┐                    ┌► stable
    open     requests at their scheduled times, whatever the server does   ─┼─► Sample … ─► watch ┼► time
                 └─ over the cap of requests in flight: client_overflow     ─┘                    └► interrupted
                                                                      drain, then stage times are read ─► MeasuredLevel

**Latency counts from when a request was due.** A closed loop that meets a stall stops asking: of all the requests that
users would have sent meanwhile it records one per user (coordinated omission, after Gil Tene). The open loop goes on
sending. A timer of the event loop fires up to 1 ms late; that is in the samples (``sent_s``) and in the latency.

**Nothing is tried again**, and no failure is left out: a request that has no answer when the level's drain is over is
recorded as ``unanswered``. Only Ctrl-C leaves out what was in flight: that failure is nobody's.
"""

import asyncio
import contextlib
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from detserve.async_client import AsyncClient, Reply, Target
from detserve.errors import DetserveError

from dettools.benchmark.answers import Answers, stage_times
from dettools.benchmark.measurement import Level, Load, Sample
from dettools.benchmark.monitor import Monitor
from dettools.benchmark.schedule import arrival_times, image_order

Stable = Callable[[Sequence[Sample], float], bool]
"""Whether the samples so far, in the order they were done, and the seconds so far, show a stable level."""

_REFUSED_PAUSE_S = 0.1
"""A user of the closed loop who got no answer at all waits this long, or it would fill the disk with refusals."""
_HURRIED_DRAIN_S = 1.0


@dataclass(frozen=True)
class Picture:
    """One image to send, read before the clock starts."""

    name: str
    body: bytes


@dataclass(frozen=True)
class Bounds:
    """What ends a level, and how far it may go.

    Attributes:
        min_time_s, max_time_s: of sending.
        window_s: length of the windows that stability is judged by.
        min_samples: answers that are needed before a level may end as stable.
        timeout_s: of one request.
        drain_s: how long to wait after the last sending for what is in flight.
        most_in_flight: requests of an open loop at once; those beyond are not sent but counted as ``client_overflow``.
    """

    min_time_s: float = 9.0
    max_time_s: float = 20.0
    window_s: float = 3.0
    min_samples: int = 0
    timeout_s: float = 60.0
    drain_s: float = 10.0
    most_in_flight: int = 512

    def __post_init__(self) -> None:
        if not (0 < self.window_s <= self.max_time_s and self.min_time_s <= self.max_time_s):
            raise DetserveError(
                f"Got windows of {self.window_s:g} s in a level of {self.min_time_s:g} to {self.max_time_s:g} s; "
                "expected 0 < window ≤ longest, and shortest ≤ longest. Change --window, --min-time or --max-time."
            )


@dataclass(frozen=True)
class MeasuredLevel:
    """A level, and its raw answers by the place of their sample, where they were to be kept."""

    level: Level
    answers: Answers | None = field(default=None, repr=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.answers is not None:
            self.answers.close()


def run_load(
    target: Target,
    pictures: Sequence[Picture],
    load: Load,
    bounds: Bounds | None = None,
    *,
    seed: int = 0,
    timings: bool = False,
    keep_answers: bool = False,
    monitor: Monitor | None = None,
    stable: Stable | None = None,
    on_progress: Callable[[float, int, int], None] = lambda *_: None,
) -> MeasuredLevel:
    """Put one load on the target; Ctrl-C ends it early and keeps what there is.

    Args:
        target: where to; ask there for the timings that ``timings`` is to read.
        pictures: sent in seeded random order, each once a pass.
        bounds: of time; the defaults of `Bounds` when None.
        timings: read the worker's stage times from the answers, after the level.
        keep_answers: return the raw answers too.
        monitor: watches CPU, GPU and the server's queue; a plain one when None.
        stable: ends the level before ``max_time_s``; None: it never does.
        on_progress: told at each window's end the seconds, the requests done, and those of them that failed.

    Raises:
        DetserveError: no pictures, or a load that makes no sense.
    """
    bounds = bounds or Bounds()
    if not pictures:
        raise DetserveError("Got no images to send; expected at least one.")
    if load.value <= 0 or (load.loop == "closed" and load.value != int(load.value)):
        raise DetserveError(f"Got the load {load.name!r}; expected a whole number of users or a rate above 0.")
    if load.loop == "open" and load.arrivals is None:
        raise DetserveError(f"Got the load {load.name!r}; expected arrivals, poisson or constant.")
    monitor = monitor or Monitor()
    generator = _Generator(pictures, load, bounds, seed, timings or keep_answers, stable, on_progress)
    # What was there before the level is not walked through again in the middle of it.
    gc.collect()
    gc.freeze()
    monitor.start()
    try:
        asyncio.run(generator.run(target, monitor))
    except BaseException:
        generator.answers.close()
        raise
    finally:
        resources = monitor.stop()
        gc.unfreeze()
    samples, answers = generator.in_order()
    if timings:
        samples = [_with_timings(sample, number, answers) for number, sample in enumerate(samples)]
    if not keep_answers:
        answers.close()
    level = Level(load, tuple(samples), resources, bounds.window_s, generator.stopped)
    return MeasuredLevel(level, answers if keep_answers else None)


class _Generator:
    """One level while it runs."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        load: Load,
        bounds: Bounds,
        seed: int,
        keep: bool,
        stable: Stable | None,
        on_progress: Callable[[float, int, int], None],
    ) -> None:
        self.answers = Answers()
        self.stopped = "time"
        self._pictures = pictures
        self._load = load
        self._bounds = bounds
        self._seed = seed
        self._keep = keep
        self._stable = stable
        self._on_progress = on_progress
        self._order = image_order(len(pictures), seed)
        self._samples: list[Sample] = []
        self._errors = 0
        self._in_flight: dict[object, tuple[Picture, float]] = {}
        self._sending = True
        self._failure: Exception | None = None
        self._start = 0.0

    async def run(self, target: Target, monitor: Monitor) -> None:
        """Send until the level is over, then wait for what is in flight."""
        async with AsyncClient(target, timeout_s=self._bounds.timeout_s) as client:
            requests: set[asyncio.Task[None]] = set()
            over = asyncio.Event()
            with _interruption(over):
                lag = asyncio.create_task(monitor.watch_loop())
                self._start = time.monotonic()
                sender = asyncio.create_task(self._send(client, requests))
                try:
                    await self._watch(over, sender)
                    self._sending = False
                    await self._drain(over, sender, requests)
                finally:
                    everything = [lag, sender, *requests]
                    for task in everything:
                        task.cancel()
                    ended = await asyncio.gather(*everything, return_exceptions=True)
            for result in (self._failure, *ended):
                if isinstance(result, Exception):
                    raise result

    def in_order(self) -> tuple[list[Sample], Answers]:
        """Return the samples as they were due, and the answers numbered alike."""
        order = sorted(range(len(self._samples)), key=lambda number: self._samples[number].scheduled_s)
        self.answers.renumber({old: new for new, old in enumerate(order)})
        return [self._samples[number] for number in order], self.answers

    async def _send(self, client: AsyncClient, requests: set[asyncio.Task[None]]) -> None:
        """Send what the load asks for, until the level is over."""
        if self._load.loop == "closed":
            await asyncio.gather(*(self._user(client) for _ in range(int(self._load.value))))
            return
        arrivals = self._load.arrivals or "constant"
        for due in arrival_times(self._load.value, arrivals, self._bounds.max_time_s, self._seed).tolist():
            if (early := due - self._now()) > 0:
                await asyncio.sleep(early)
            picture = self._pictures[next(self._order)]
            if len(self._in_flight) >= self._bounds.most_in_flight:
                now = self._now()
                self._record(Sample(picture.name, due, now, now, 0, "client_overflow"))
                continue
            task = asyncio.create_task(self._request(client, picture, due))
            requests.add(task)
            task.add_done_callback(requests.discard)

    async def _request(self, client: AsyncClient, picture: Picture, due: float) -> None:
        try:
            await self._ask(client, picture, due)
        except Exception as error:  # noqa: BLE001 - raised again by `run`: nobody waits for this task's result
            self._failure = error

    async def _user(self, client: AsyncClient) -> None:
        while self._sending:
            picture = self._pictures[next(self._order)]
            if not (await self._ask(client, picture, self._now())).status:
                await asyncio.sleep(_REFUSED_PAUSE_S)

    async def _ask(self, client: AsyncClient, picture: Picture, due: float) -> Sample:
        key = object()
        self._in_flight[key] = (picture, due)
        reply = await client.send(picture.body)
        del self._in_flight[key]
        if self._keep and reply.status == 200:
            self.answers.keep(len(self._samples), reply.body)
        sample = self._sample(picture, due, reply)
        self._record(sample)
        return sample

    def _sample(self, picture: Picture, due: float, reply: Reply) -> Sample:
        return Sample(
            picture.name,
            due,
            reply.sent_s - self._start,
            reply.done_s - self._start,
            reply.status,
            reply.error,
            reply.encode_ms,
            reply.request_bytes,
            len(reply.body),
        )

    def _record(self, sample: Sample) -> None:
        self._samples.append(sample)
        self._errors += bool(sample.error)

    def _now(self) -> float:
        return time.monotonic() - self._start

    async def _watch(self, over: asyncio.Event, sender: asyncio.Task[None]) -> None:
        """Return when the level is over; say why in ``stopped``."""
        bounds = self._bounds
        window = 0
        while True:
            window += 1
            until = min(window * bounds.window_s, bounds.max_time_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), max(0.0, until - self._now()))
            if over.is_set():
                self.stopped = "interrupted"
                return
            if sender.done() and self._load.loop == "closed":
                return  # it failed; `run` raises its error
            self._on_progress(self._now(), len(self._samples), self._errors)
            if until >= bounds.max_time_s:
                self.stopped = "time"
                return
            answered = len(self._samples) - self._errors
            if (
                self._stable is not None
                and until >= bounds.min_time_s
                and answered >= bounds.min_samples
                and self._stable(self._samples, until)
            ):
                self.stopped = "stable"
                return

    async def _drain(self, over: asyncio.Event, sender: asyncio.Task[None], requests: set[asyncio.Task[None]]) -> None:
        """Wait for what is in flight: not long after Ctrl-C, whenever that comes."""
        if self._load.loop == "open" and self.stopped != "time":
            sender.cancel()  # at the end of its time it is left to end by itself: its last request may be due just now
        tasks = [sender, *requests]
        if self.stopped != "interrupted":
            interrupted = asyncio.create_task(over.wait())
            everything = asyncio.ensure_future(asyncio.wait(tasks))
            await asyncio.wait(
                {interrupted, everything}, timeout=self._bounds.drain_s, return_when=asyncio.FIRST_COMPLETED
            )
            everything.cancel()
            interrupted.cancel()
            if over.is_set():
                self.stopped = "interrupted"
        if self.stopped == "interrupted":
            await asyncio.wait(tasks, timeout=_HURRIED_DRAIN_S)
            return
        now = self._now()
        for picture, due in self._in_flight.values():
            self._record(Sample(picture.name, due, due, now, 0, "unanswered", 0.0, len(picture.body)))


@contextlib.contextmanager
def _interruption(over: asyncio.Event) -> Iterator[None]:
    """Turn Ctrl-C into the end of the level; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, over.set)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _with_timings(sample: Sample, number: int, answers: Answers) -> Sample:
    found = stage_times(answers.body(number)) if number in answers else None
    return sample if found is None else replace(sample, stages_ms=found[0], batch_size=found[1])
