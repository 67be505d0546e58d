"""The measurement: rounds in which every server takes its turn, with the same client, images and loads.

    round 1: A up, warm-up, agrees with eager?, c = 1, 8, 16, A down; B …; C …        round 2: A …; B …; C …

Only one server runs at a time, so that an idle one takes nothing from another. A machine that grows slower in the
middle hits all of them, and each start is a new one: both show in the spread over the rounds.
"""

import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from detserve.detecting_client import parse_detections
from detserve.eager import EagerModel
from detserve.errors import DetserveError
from dettools.benchmark.load import Bounds, Picture, run_load
from dettools.benchmark.measurement import Level, Load, Resources
from dettools.benchmark.monitor import Monitor
from dettools.benchmark.statistics import measured_samples, summarise
from dettools.comparison import compare_image
from servers import Endpoint, answers
from standings import Figure

Opener = Callable[[str], AbstractContextManager[Endpoint]]
"""Starts a server for the turn of that name, such as ``round-1-mosec``."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        concurrencies: requests in flight, one level each.
        seconds: of each level; ``warm_up_s``: before them, at the highest concurrency.
        checked: images whose detections are compared with eager's.
    """

    rounds: int
    concurrencies: tuple[int, ...]
    seconds: float
    warm_up_s: float
    checked: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Entrant:
    """A server of the contest, and what became of it.

    Attributes:
        difference: how its detections differ from eager's; empty when they agree.
        failure: why it is not measured; empty when it is.
    """

    name: str
    title: str
    settings: str = ""
    difference: str = ""
    failure: str = ""


def contest(
    openers: dict[str, Opener],
    pictures: Sequence[Picture],
    eager: EagerModel,
    plan: Plan,
    *,
    on_progress: Callable[[str], None] = lambda _: None,
    on_level: Callable[[str, int, Level], None] = lambda *_: None,
) -> tuple[list[Entrant], list[Figure]]:
    """Measure; a server that does not start, or does not answer, is left out of the rounds that follow.

    Ctrl-C ends it and keeps the levels that are done.

    Args:
        openers: by the server's name, in the order of the turns.
        on_level: gets server, round and each level with its raw samples.
    """
    entrants: dict[str, Entrant] = {}
    figures: list[Figure] = []
    try:
        for turn in range(1, plan.rounds + 1):
            for name, opener in openers.items():
                if name in entrants and entrants[name].failure:
                    continue
                on_progress(f"round {turn} of {plan.rounds}: {name}")
                try:
                    with opener(f"round-{turn}-{name}") as endpoint:
                        _level(endpoint, pictures, plan, max(plan.concurrencies), plan.warm_up_s)
                        if name not in entrants:
                            difference = disagreement(endpoint, pictures[: plan.checked], eager)
                            entrants[name] = Entrant(name, endpoint.title, endpoint.settings, difference)
                        for concurrency in plan.concurrencies:
                            level = _level(endpoint, pictures, plan, concurrency, plan.seconds)
                            figures.append(_figure(name, turn, level))
                            on_level(name, turn, level)
                            on_progress(f"  {figures[-1].sentence()}")
                except (DetserveError, OSError, subprocess.SubprocessError) as error:
                    old = entrants.get(name, Entrant(name, name))
                    entrants[name] = Entrant(
                        name, old.title, old.settings, old.difference, str(error).partition("\n")[0]
                    )
                    on_progress(f"  {error}")
    except KeyboardInterrupt:
        on_progress("interrupted; what is measured is kept")
    return list(entrants.values()), figures


def disagreement(endpoint: Endpoint, pictures: Sequence[Picture], eager: EagerModel) -> str:
    """Compare a server's answers, all asked for at once, with eager's, within the tier ``numeric``.

    Returns:
        Which images differ and why; empty when none does. Below the server's own threshold nothing is compared.
    """
    found = answers(endpoint.target, [picture.body for picture in pictures])
    threshold = endpoint.score_threshold
    reasons: list[str] = []
    for picture, rows in zip(pictures, found, strict=True):
        reference = eager.detect(picture.body, threshold, 100)
        compared = compare_image(
            picture.name, reference, parse_detections(rows), score_threshold=threshold, max_detections=100
        )
        if not compared.passed:
            reasons.append(f"{picture.name}: {', '.join(compared.reasons)}")
    if not reasons:
        return ""
    return f"{len(reasons)} of {len(pictures)} images differ ({'; '.join(reasons[:3])})"


def _level(endpoint: Endpoint, pictures: Sequence[Picture], plan: Plan, concurrency: int, seconds: float) -> Level:
    bounds = Bounds(min_time_s=seconds, max_time_s=seconds, window_s=seconds / 4, timeout_s=60.0)
    load = Load("closed", float(concurrency))
    level = run_load(endpoint.target, pictures, load, bounds, seed=plan.seed, monitor=Monitor(endpoint.processes)).level
    if level.stopped == "interrupted":
        raise KeyboardInterrupt
    return level


def _figure(name: str, turn: int, level: Level) -> Figure:
    summary = summarise(level, resamples=0)
    measured = [sample for sample in measured_samples(level.samples, summary.warm_up) if sample.ok]
    return Figure(
        server=name,
        round=turn,
        concurrency=int(level.load.value),
        throughput_rps=summary.throughput_rps.value,
        latencies_ms=tuple(sample.latency_ms for sample in measured),
        requests=summary.requests,
        errors=summary.errors,
        client_cpu_ms=summary.client_cpu_ms,
        server_cpu_ms=summary.server_cpu_ms,
        others_share=_others(level.resources),
    )


def _others(used: Resources) -> float | None:
    """Return the share of the machine's cores that neither the client nor the server took."""
    if used.machine_cpu is None or used.server_cpu_s is None or used.wall_s <= 0:
        return None
    taken = (used.client_cpu_s + used.server_cpu_s) / (used.wall_s * (os.cpu_count() or 1))
    return max(0.0, used.machine_cpu - taken)
