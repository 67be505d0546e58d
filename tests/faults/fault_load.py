"""Clients that go on asking while something breaks, and what became of their requests."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from detserve.client import Client
from detserve.errors import DetserveError


@dataclass(frozen=True)
class Figures:
    """What became of the requests.

    Attributes:
        sent: images that a client was asked for, each counted once.
        answered: of them, those whose answer came.
        retried: how often a client sent a request again.
        lost: images whose client gave up, by its reason.
        wrong: answers that differ from those of the undisturbed server.
    """

    sent: int
    answered: int
    retried: int
    lost: Mapping[str, int]
    wrong: int

    def __str__(self) -> str:
        lost = ", ".join(f"{count} {reason}" for reason, count in self.lost.items()) or "0"
        return f"{self.sent} sent, {self.answered} answered, {self.retried} retried, {lost} lost, {self.wrong} wrong"


@dataclass
class Load:
    """Clients at work. ``answered_at`` are the times of the answers, by `time.monotonic`."""

    answered_at: list[float] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _counts: list["_Counts"] = field(default_factory=list)

    def back_after(self, moment: float) -> float:
        """Return the seconds from ``moment`` to the first answer after it; what was on its way then does not count."""
        later = [one for one in self.answered_at if one > moment + 0.1]
        assert later, "no answer came any more"
        return min(later) - moment

    def wait_for(self, answers: int, *, timeout_s: float = 60.0) -> None:
        """Wait until so many more answers have come."""
        wanted = len(self.answered_at) + answers
        deadline = time.monotonic() + timeout_s
        while len(self.answered_at) < wanted:
            assert time.monotonic() < deadline, f"{wanted - len(self.answered_at)} answers did not come"
            time.sleep(0.02)

    def figures(self, *, all_of_them: bool = False) -> Figures:
        """Let every client finish what it has begun, or all that it was to ask for, and count."""
        if not all_of_them:
            self._stop.set()
        for thread in self._threads:
            thread.join()
        lost: dict[str, int] = {}
        for count in self._counts:
            for reason in count.lost:
                lost[reason] = lost.get(reason, 0) + 1
        return Figures(
            sent=sum(count.sent for count in self._counts),
            answered=sum(count.answered for count in self._counts),
            retried=sum(count.retried for count in self._counts),
            lost=lost,
            wrong=sum(count.wrong for count in self._counts),
        )


@dataclass
class _Counts:
    sent: int = 0
    answered: int = 0
    retried: int = 0
    wrong: int = 0
    lost: list[str] = field(default_factory=list)


@contextmanager
def asking(
    make_client: Callable[[], Client], model: str, expected: Mapping[bytes, object], *, clients: int, most: int = 0
) -> Iterator[Load]:
    """Let clients ask for the images in turn until `Load.figures` is called, or each ``most`` times.

    Args:
        expected: image to its answer by the undisturbed server.
    """
    load = Load()
    pairs = [(image, json.dumps(answer)) for image, answer in expected.items()]

    def ask(number: int, count: _Counts) -> None:
        with make_client() as client:
            while not load._stop.is_set() and not 0 < most <= count.sent:
                image, answer = pairs[(number + count.sent) % len(pairs)]
                count.sent += 1
                try:
                    got = client.predict(model, image)
                except DetserveError as error:
                    count.lost.append(f"{type(error).__name__} {getattr(error, 'type', '')}: {str(error)[:120]}")
                else:
                    count.answered += 1
                    load.answered_at.append(time.monotonic())
                    count.wrong += json.dumps(got) != answer
                count.retried = client.retried

    for number in range(clients):
        count = _Counts()
        load._counts.append(count)
        load._threads.append(threading.Thread(target=ask, args=(number, count)))
    for thread in load._threads:
        thread.start()
    try:
        yield load
    finally:
        load._stop.set()
        for thread in load._threads:
            thread.join()


def answers_of(client: Client, model: str, images: list[bytes]) -> dict[bytes, object]:
    """Return what an undisturbed server says; its answers are right when they come twice the same."""
    first = {image: client.predict(model, image) for image in images}
    assert first == {image: client.predict(model, image) for image in images}
    return first


def tell(figures: str) -> None:
    """Write what a test measured; pytest shows it with -s or -rP."""
    sys.stdout.write(f"\n{figures}\n")
