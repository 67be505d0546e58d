"""A progress bar on stderr for long work; plain lines when stderr is no terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 5.0


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that is told what is being done, how much of it is done, and how much there is (0: unknown)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], completed=done, total=total or None)

        yield show


def _lines() -> Callable[[str, int, int], None]:
    told: dict[str, float] = {}

    def show(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what not in told or done == total or now - told[what] >= _LINE_EVERY_S:
            told[what] = now
            print(f"{what}: {done} of {total}" if total else what, file=sys.stderr, flush=True)

    return show
