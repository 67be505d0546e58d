"""A data set streamed through something that answers: bounded concurrency, safe retries, every image accounted for.

    images to ask ─► threads ─► answerer.ask(batch) ─► Answer ─► journal
                        │  error that may pass (worker restarting, queue full, reset): wait, send again
                        └─ error of this image (not an image, too large): failed, counted, the others go on

Asking for detections changes nothing on the server, so an answer that was lost on the way can be asked for again; an
error that says the image or the question is wrong is not asked twice.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import tenacity
from dethandlers.detections import Category, Detections
from detserve.errors import ClientError, EndpointError

from dettools.endpoint import concerns_every_request
from dettools.evaluation.answers import Answer, Event, Failure, Journal
from dettools.ground_truth import ImageEntry

Reply = Detections | Failure


class Answerer(Protocol):
    """Something that finds objects in encoded images: an endpoint, or a model in this process."""

    @property
    def name(self) -> str:
        """What it is, for people."""
        ...

    @property
    def categories(self) -> tuple[Category, ...] | None:
        """Its category map by label; None when it does not tell."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What runs there, as it says itself."""
        ...

    @property
    def batch_size(self) -> int:
        """How many images `ask` takes at once."""
        ...

    @property
    def concurrency(self) -> int:
        """How many threads may ask at once."""
        ...

    def ask(self, images: Sequence[bytes]) -> list[Reply]:
        """Answer some images, in their order.

        Raises:
            ClientError: none of them was answered.
        """
        ...


@dataclass(frozen=True)
class RetryPolicy:
    """When a request is sent again.

    Attributes:
        patience_s: how long an error that may pass is waited for, from the first time that an image gets it.
        longest_wait_s: between two attempts.
    """

    patience_s: float = 60.0
    longest_wait_s: float = 2.0


class EndpointLostError(ClientError):
    """The endpoint is gone for longer than we wait; what was answered is kept."""


def stream(
    answerer: Answerer,
    entries: Iterable[ImageEntry],
    files: Mapping[int, Path],
    journal: Journal,
    *,
    retry: RetryPolicy = RetryPolicy(),
    on_answer: Callable[[Answer], None] = lambda _: None,
) -> None:
    """Ask for every image that the journal has no answer of; failed ones are asked for again.

    Args:
        answerer: who answers.
        entries: images of the data set; what the journal has answered is left out.
        files: image id to file; an image without a file fails as ``no_file``.
        journal: where answers go, from this thread only.
        retry: how patient to be.
        on_answer: told each answer.

    Raises:
        EndpointLostError: nobody listens, or more images in a row than are asked for at once got no answer.
        ClientError: an error that every request would get (no such model, no right to ask).
    """
    waiting = [entry for entry in entries if _is_open(journal, entry)]
    missing = [entry for entry in waiting if entry.id not in files]
    for entry in missing:
        failure = Failure("no_file", f"{entry.file_name} is not in the image folder.")
        _keep(journal, Answer(entry.id, entry.file_name, failure=failure, attempts=0), on_answer)
    batches = _batches((entry for entry in waiting if entry.id in files), answerer.batch_size)
    done: queue.SimpleQueue[Answer | Event | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()
    lock = threading.Lock()
    silence = _Silence(answerer.concurrency)
    begun = time.monotonic()

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    batch = next(batches, None)
                if batch is None:
                    break
                for message in _answered(answerer, batch, files, retry, stop, begun, done.put, silence):
                    done.put(message)
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            done.put(error)
        done.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(max(1, answerer.concurrency))]
    for thread in threads:
        thread.start()
    try:
        _collect(done, len(threads), journal, on_answer)
    finally:
        # After an interruption or an error: no new request; what is in flight is answered, and kept.
        stop.set()
        for thread in threads:
            thread.join()
        while not done.empty():
            left = done.get()
            if isinstance(left, Answer):
                _keep(journal, left, on_answer)


def _is_open(journal: Journal, entry: ImageEntry) -> bool:
    known = journal.answers.get(entry.id)
    return known is None or known.failure is not None


def _collect(
    done: "queue.SimpleQueue[Answer | Event | BaseException | None]",
    threads: int,
    journal: Journal,
    on_answer: Callable[[Answer], None],
) -> None:
    running = threads
    while running:
        message = done.get()
        if message is None:
            running -= 1
        elif isinstance(message, BaseException):
            raise message
        elif isinstance(message, Event):
            journal.note(message)
        else:
            _keep(journal, message, on_answer)


def _keep(journal: Journal, answer: Answer, on_answer: Callable[[Answer], None]) -> None:
    journal.add(answer)
    on_answer(answer)


def _batches(entries: Iterable[ImageEntry], size: int) -> Iterator[list[ImageEntry]]:
    iterator = iter(entries)
    while batch := list(islice(iterator, max(1, size))):
        yield batch


def _answered(
    answerer: Answerer,
    batch: Sequence[ImageEntry],
    files: Mapping[int, Path],
    retry: RetryPolicy,
    stop: threading.Event,
    begun: float,
    tell: Callable[[Event], None],
    silence: "_Silence",
) -> Iterator[Answer]:
    """Ask for one batch, again while the error may pass."""
    readable: list[ImageEntry] = []
    bodies: list[bytes] = []
    for entry in batch:
        try:
            bodies.append(files[entry.id].read_bytes())
            readable.append(entry)
        except OSError as error:
            failure = Failure("unreadable_file", f"{entry.file_name}: {error.strerror}.")
            yield Answer(entry.id, entry.file_name, failure=failure, attempts=0)
    if not readable:
        return
    attempts = 0
    latency_ms = 0.0
    first_error_at: float | None = None

    def ask() -> list[Reply]:
        nonlocal attempts, latency_ms
        attempts += 1
        asked = time.perf_counter()
        try:
            return answerer.ask(bodies)
        finally:
            latency_ms = (time.perf_counter() - asked) * 1e3

    def out_of_patience(_: tenacity.RetryCallState) -> bool:
        nonlocal first_error_at
        first_error_at = first_error_at or time.monotonic()
        return time.monotonic() - first_error_at >= retry.patience_s

    def note(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, ClientError):
            failure = failure_of(error)
            name = readable[0].file_name
            tell(Event(time.monotonic() - begun, name, failure.type, failure.status, failure.message))

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=retry.longest_wait_s),
        stop=lambda state: out_of_patience(state) or stop.is_set(),
        before_sleep=note,
        sleep=tenacity.sleep_using_event(stop),
        reraise=True,
    )
    try:
        replies = retrying(ask)
        silence.broken()
    except ClientError as error:
        if stop.is_set() and may_pass(error):
            return  # interrupted while waiting: the image stays open
        if is_gone(error) or (may_pass(error) and silence.lasts()):
            raise EndpointLostError(
                f"{error} It was waited for {retry.patience_s:g} s. What was answered is kept: start again to go on."
            ) from error
        if concerns_every_request(error):
            raise
        replies = [failure_of(error)] * len(readable)
    for entry, reply in zip(readable, replies, strict=True):
        if isinstance(reply, Failure):
            answer = Answer(entry.id, entry.file_name, failure=reply, attempts=attempts, latency_ms=latency_ms)
        else:
            answer = Answer(entry.id, entry.file_name, reply, attempts=attempts, latency_ms=latency_ms)
        yield answer


class _Silence:
    """How many images in a row got no answer; more than are asked for at once, and the endpoint is lost."""

    def __init__(self, concurrency: int) -> None:
        self._bearable = concurrency
        self._images = 0
        self._lock = threading.Lock()

    def broken(self) -> None:
        """An answer came."""
        with self._lock:
            self._images = 0

    def lasts(self) -> bool:
        """Count an image without an answer; return whether it is one too many."""
        with self._lock:
            self._images += 1
            return self._images > self._bearable


def may_pass(error: BaseException) -> bool:
    """Tell whether the same request may get an answer later, and may safely be sent again."""
    if isinstance(error, EndpointError):
        # Our worker says inference_failed about one image; TorchServe's own 5xx are about the worker or the queue.
        return error.retryable and error.type != "inference_failed"
    return isinstance(error, ClientError) and error.type in {"reset", "timeout", "refused"}


def is_gone(error: ClientError) -> bool:
    """Tell whether nobody listens at the endpoint's address."""
    return error.type == "refused"


def failure_of(error: ClientError) -> Failure:
    """Return an exception of the client as the record of a failed image."""
    return Failure(error.type, str(error), error.status if isinstance(error, EndpointError) else None)
