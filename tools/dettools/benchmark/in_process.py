"""The same model without a server: eager's speed, and the artefact's own, the ceiling that serving can reach.

    images in memory ─► batches of one size ─► Subject ─► Sample per image ─┐
       each size takes its turn, several times (A B C A B C …) ────────────┴─► Level per size

**What is counted.** ``runtime`` runs the worker's own detector on the artefact and counts all that a request costs the
worker: decode, preprocess, forward, postprocess and the JSON text of the answer; only reading the files is left out.
``eager`` runs the framework's own inference on the source checkpoint: decode, transform, forward and postprocess, one
image at a time, no JSON. An image's latency is that of its batch: nobody gets an answer before the batch is done.

Noise of a shared machine changes over seconds. The sizes therefore take turns, so that it hits all alike; a level's
clock stands still while another one runs.

Threads are set in this process (``torch.set_num_threads``, and onnxruntime's session by the spec): that reaches every
operator and the decoding threads, so no second process is needed. On a GPU, work that preprocessing only started is
waited for in the forward pass and counted there; forward is synchronised, and postprocessing ends on the CPU.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from detserve.model_store import default_model_store

from dettools.benchmark.measurement import GpuSample, Level, Load, Resources, Sample
from dettools.benchmark.monitor import Monitor
from dettools.benchmark.schedule import image_order
from dettools.benchmark.subjects import (
    InProcessError,
    Subject,
    open_eager,
    open_runtime,
    torch_threads,
)

Kind = Literal["eager", "runtime"]
_WARM_UP_BATCHES = 3


def benchmark_in_process(
    kind: Kind,
    model: str | Path,
    images: Sequence[Path],
    *,
    batch_sizes: Sequence[int] = (1, 4, 8),
    threads: int | None = None,
    device: str = "cpu",
    weights: Path | None = None,
    model_store: Path | None = None,
    allow_code: bool = False,
    min_time_s: float = 10.0,
    repeats: int = 3,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda _: None,
    on_loaded: Callable[[dict[str, Any]], None] = lambda _: None,
) -> list[Level]:
    """Measure a model in this process, once per batch size.

    Args:
        kind: ``runtime``: the artefact by the worker's code; ``eager``: the source checkpoint by its framework.
        model: a ``.yaml`` spec, a ``.mar`` archive, or a name in the model store; for ``eager`` also MMDetection's
            config, its checkpoint as ``weights``.
        images: taken in a seeded random order, a new one for each pass; the same for every batch size.
        batch_sizes: of ``runtime``; eager takes one image at a time, and ``on_progress`` says so when asked for more.
        threads: of torch and of onnxruntime's session; None leaves what the spec or the library says.
        device: ``cpu`` or ``cuda``, ``cuda:1`` ….
        weights: a checkpoint instead of the spec's.
        allow_code: a config that is not literal is run, and what it imports is imported.
        min_time_s: per batch size, over all its turns.
        repeats: turns per batch size.
        on_loaded: told what runs: runtime, version, device, threads, and what the figures include.

    Returns:
        A level per batch size: closed loop, ``value`` the batch size, a sample per image. Ctrl-C ends the measurement
        and keeps what there is, with ``stopped`` ``interrupted``.

    Raises:
        DetserveError: the model cannot be loaded here, there are no images, or a number makes no sense.
    """
    _check(batch_sizes, threads, min_time_s, repeats)
    if not images:
        raise InProcessError("images: got none, expected at least one. Name files or a folder.")
    loaded = [(path.name, _read(path)) for path in images]
    sizes = list(dict.fromkeys(batch_sizes))
    if kind == "eager" and sizes != [1]:
        on_progress("eager runs one image at a time; batch sizes other than 1 are left out")
        sizes = [1]
    store = model_store or default_model_store()
    opened = partial(open_eager if kind == "eager" else open_runtime, allow_code=allow_code)
    with torch_threads(threads), opened(model, weights, store, device, threads, on_progress) as loading:
        subject, described = loading
        on_loaded({"kind": kind, **described, "images": len(loaded)})
        return measure(
            subject, loaded, sizes, min_time_s=min_time_s, repeats=repeats, seed=seed, on_progress=on_progress
        )


def measure(
    subject: Subject,
    images: Sequence[tuple[str, bytes]],
    batch_sizes: Sequence[int],
    *,
    min_time_s: float,
    repeats: int,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[Level]:
    """Measure a loaded model; ``images`` are (name, encoded bytes)."""
    series = [_Series(subject, size, images, seed) for size in batch_sizes]
    turn_s = min_time_s / repeats
    stopped = "time"
    try:
        for one in series:
            one.warm_up(_WARM_UP_BATCHES)
        for turn in range(repeats):
            for one in series:
                one.take_turn(turn_s)
                on_progress(
                    f"turn {turn + 1} of {repeats}, batch size {one.batch_size}: {one.rate:.1f} images/s so far"
                )
    except KeyboardInterrupt:
        stopped = "interrupted"
    return [one.level(turn_s, stopped) for one in series if one.samples]


class _Series:
    """The batches of one size, over all their turns."""

    def __init__(self, subject: Subject, batch_size: int, images: Sequence[tuple[str, bytes]], seed: int) -> None:
        self.batch_size = batch_size
        self.samples: list[Sample] = []
        self._subject = subject
        self._images = images
        self._order = image_order(len(images), seed)
        self._clock_s = 0.0
        self._turns: list[Resources] = []

    @property
    def rate(self) -> float:
        """Images per second over the turns so far."""
        return len(self.samples) / self._clock_s if self._clock_s else 0.0

    def warm_up(self, batches: int) -> None:
        """Run some batches that nobody counts."""
        for _ in range(batches):
            self._subject.answer([image for _, image in self._next()])

    def take_turn(self, length_s: float) -> None:
        """Run batches until the turn is over; at least one."""
        self.warm_up(1)  # the caches are still another size's
        monitor = Monitor()
        monitor.start()
        begun = time.perf_counter()
        offset = self._clock_s
        try:
            while True:
                done = self._run_batch(begun - offset)
                self._clock_s = done
                if done - offset >= length_s:
                    break
        finally:
            self._turns.append(monitor.stop())

    def level(self, window_s: float, stopped: str) -> Level:
        """Return the level."""
        resources = _resources(self._clock_s, self._turns)
        return Level(Load("closed", float(self.batch_size)), tuple(self.samples), resources, window_s, stopped)

    def _next(self) -> list[tuple[str, bytes]]:
        return [self._images[next(self._order)] for _ in range(self.batch_size)]

    def _run_batch(self, origin: float) -> float:
        """Run one batch; return when it was done, on this series' own clock."""
        batch = self._next()
        sent = time.perf_counter() - origin
        outcomes = self._subject.answer([image for _, image in batch])
        done = time.perf_counter() - origin
        for (name, image), outcome in zip(batch, outcomes, strict=True):
            self.samples.append(
                Sample(
                    image=name,
                    scheduled_s=sent,
                    sent_s=sent,
                    done_s=done,
                    status=outcome.status,
                    error=outcome.error,
                    request_bytes=len(image),
                    response_bytes=outcome.response_bytes,
                    stages_ms={"handler": (done - sent) * 1e3, **outcome.stages_ms} if outcome.stages_ms else None,
                    batch_size=len(batch),
                )
            )
        return done


def _resources(wall_s: float, turns: Sequence[Resources]) -> Resources:
    """Gather the turns; there is no client, so that all CPU time of this process counts as the server's."""
    watched_s = sum(turn.wall_s for turn in turns)
    throttled = [turn.cgroup_throttled_s for turn in turns if turn.cgroup_throttled_s is not None]
    looks: list[GpuSample] = []
    passed_s = 0.0
    for turn in turns:
        looks += [replace(look, at_s=look.at_s + passed_s) for look in turn.gpu]
        passed_s += turn.wall_s

    def share(of: Callable[[Resources], float | None]) -> float | None:
        told = [(value, turn.wall_s) for turn in turns if (value := of(turn)) is not None]
        if not told:
            return None
        # The kernel counts in ticks of 10 ms, and its iowait may go back (proc(5)): a short turn can leave 0 to 1.
        return min(1.0, max(0.0, sum(value * weight for value, weight in told) / watched_s))

    return Resources(
        wall_s=wall_s,
        client_cpu_s=0.0,
        server_cpu_s=sum(turn.client_cpu_s for turn in turns),
        machine_cpu=share(lambda turn: turn.machine_cpu),
        cgroup_throttled_s=sum(throttled) if throttled else None,
        steal=share(lambda turn: turn.steal),
        gpu=tuple(looks),
    )


def _check(batch_sizes: Sequence[int], threads: int | None, min_time_s: float, repeats: int) -> None:
    if not batch_sizes or min(batch_sizes) < 1:
        raise InProcessError(f"batch sizes: got {list(batch_sizes)}, expected whole numbers from 1, such as 1,4,8.")
    for name, value in (("threads", threads), ("repeats", repeats)):
        if value is not None and value < 1:
            raise InProcessError(f"{name}: got {value}, expected 1 or more.")
    if not min_time_s > 0:
        raise InProcessError(f"min_time_s: got {min_time_s:g}, expected more than 0.")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InProcessError(f"image {path}: it cannot be read ({error.strerror}). Check the path.") from error
