"""Ctrl-C and SIGTERM while a server starts or runs in the foreground."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class Interrupts:
    """Notes Ctrl-C and SIGTERM, so that a start ends in good order and not in the middle of a step."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number

    def check(self) -> None:
        """Raise what the signal asks for."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)
