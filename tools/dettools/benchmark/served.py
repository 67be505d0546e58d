"""The benchmark of a served model: its endpoint found and asked once, then put under one load after the other."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from detserve.async_client import Target
from detserve.client import Client
from detserve.errors import ClientError, DetserveError
from detserve.instance import Instance
from detserve.server_metrics import read_counters

from dettools.benchmark.knee import Slo
from dettools.benchmark.load import Bounds, Picture, run_load
from dettools.benchmark.measurement import Level, Load
from dettools.benchmark.monitor import Monitor, QueueMean
from dettools.benchmark.scoring import ScoringError, check_categories, images_by_name, score_level
from dettools.benchmark.sweep import Sweep, run_sweep, stability_of
from dettools.ground_truth import GroundTruth

_BEYOND = 10
"""Answers beyond the SLO's percentile that a level waits for, if its longest time allows."""


@dataclass(frozen=True)
class Endpoint:
    """A served model.

    Attributes:
        target: what requests go to.
        metrics_url: of the server's metrics; None: not known.
        processes: of the server, when it runs on this machine as an instance of ours.
        described: what the worker says of itself, and the address.
    """

    target: Target
    metrics_url: str | None = None
    processes: Callable[[], list[psutil.Process]] | None = None
    described: Mapping[str, Any] = field(default_factory=dict)


def find_endpoint(
    model: str,
    options: Mapping[str, object],
    *,
    instance: str | None = None,
    url: str | None = None,
    token: str | None = None,
    metrics_url: str | None = None,
) -> Endpoint:
    """Find a model: in a server of this machine, or at ``url``.

    Raises:
        DetserveError: no server runs there, or the metrics that were named cannot be read.
    """
    if metrics_url:
        read_counters(metrics_url, model)
    if url:
        target = Target.served(url, model, options=options, token=token)
        with Client(url, token) as client:
            return Endpoint(target, metrics_url, described={"url": url, **_described(client, model)})
    from detserve import server

    place = Instance.named(instance)
    state = place.require_running()
    source = server.token_source(place, "inference") if state.token_auth else None

    with Client.for_instance(instance) as client:
        described = _described(client, model)
    target = Target.served(state.inference_url, model, options=options, token=source)
    facts = {"instance": place.name, "url": state.inference_url, "java": state.java, **described}
    return Endpoint(target, metrics_url or state.metrics_url, lambda: [psutil.Process(state.pid)], facts)


def _described(client: Client, model: str) -> dict[str, Any]:
    try:
        return client.describe(model)
    except DetserveError:
        return {}  # a foreign server; what is wrong with ours, `ask_once` says


def ask_once(client: Client, model: str, image: bytes, options: Mapping[str, object]) -> list[dict[str, Any]]:
    """Send one request as a user would, so that what concerns all of them is said before the load, with its remedy.

    Raises:
        ClientError: no answer, an error, or one that holds no detections.
    """
    answer = client.predict(model, image, options=options)
    found = answer.get("detections") if isinstance(answer, dict) else answer
    if not isinstance(found, list):
        raise ClientError(
            f"Expected a list of detections, got {str(answer)[:100]!r}. Ask for format=list, and is that a detserve "
            "endpoint?"
        )
    return found


def read_pictures(paths: Sequence[Path]) -> tuple[Picture, ...]:
    """Read the images; named by their file names where these tell them apart.

    Raises:
        DetserveError: one cannot be read.
    """
    names = [path.name for path in paths]
    distinct = len(set(names)) == len(names)
    try:
        return tuple(Picture(path.name if distinct else str(path), path.read_bytes()) for path in paths)
    except OSError as error:
        raise DetserveError(f"The image {error.filename} cannot be read: {error.strerror}.") from error


@dataclass(frozen=True)
class ServedBenchmark:
    """How a served model is measured.

    Attributes:
        timings: whether the worker's stage times are asked for; the target must do so.
        ground_truth: scores the answers of each level; None: they are not looked at.
        warm_up_s: how long the first load is put on before anything is recorded.
        say: told what is going on.
    """

    endpoint: Endpoint
    pictures: tuple[Picture, ...]
    bounds: Bounds
    timings: bool = True
    ground_truth: GroundTruth | None = None
    slo: Slo | None = None
    stop_at_slo: bool = False
    warm_up_s: float = 2.0
    seed: int = 0
    say: Callable[[str], None] = lambda _: None

    def check_answer(self, detections: Sequence[Mapping[str, Any]]) -> None:
        """Refuse before the load what could not be scored after it.

        Raises:
            DetserveError: unknown classes, or pictures without annotations.
        """
        if self.ground_truth is not None:
            images_by_name(self.ground_truth, [picture.name for picture in self.pictures])
            check_categories(self.ground_truth, detections)

    def run(self, model: str, loads: Sequence[Load], on_level: Callable[[Level], None] = lambda _: None) -> Sweep:
        """Measure the levels."""
        monitor = Monitor(self.endpoint.processes, self._begin_queue(model))
        if self.warm_up_s > 0 and loads and self._warm_up(loads[0]):
            return Sweep((), interrupted=True)
        return run_sweep(
            loads,
            lambda load: self._measure(load, monitor),
            slo=self.slo,
            stop_at_slo=self.stop_at_slo,
            on_level=on_level,
        )

    def _warm_up(self, load: Load) -> bool:
        self.say(f"warm-up: {load.name} for {self.warm_up_s:g} s, not recorded")
        short = Bounds(self.warm_up_s, self.warm_up_s, self.warm_up_s, timeout_s=self.bounds.timeout_s)
        with run_load(self.endpoint.target, self.pictures, load, short, seed=self.seed + 1) as measured:
            return measured.level.stopped == "interrupted"

    def _measure(self, load: Load, monitor: Monitor) -> Level:
        bounds = self.bounds
        if self.slo is not None:
            bounds = replace(bounds, min_samples=math.ceil(_BEYOND / (1 - self.slo.p / 100)))

        def progress(elapsed_s: float, done: int, failed: int) -> None:
            errors = f", {failed} failed" if failed else ""
            self.say(f"{load.name}: {elapsed_s:.0f} s of at most {bounds.max_time_s:g} s, {done} requests{errors}")

        with run_load(
            self.endpoint.target,
            self.pictures,
            load,
            bounds,
            seed=self.seed,
            timings=self.timings,
            keep_answers=self.ground_truth is not None,
            monitor=monitor,
            stable=stability_of(bounds.window_s),
            on_progress=progress,
        ) as measured:
            if self.ground_truth is None:
                return measured.level
            images = images_by_name(self.ground_truth, [picture.name for picture in self.pictures])
            try:
                return score_level(measured, self.ground_truth, images, self.endpoint.target.read)
            except ScoringError as error:
                self.say(f"{load.name}: not scored: {error}")  # what was measured is not lost for it
                return measured.level

    def _begin_queue(self, model: str) -> Callable[[], QueueMean] | None:
        url = self.endpoint.metrics_url
        if url is None:
            return None

        def begin() -> QueueMean:
            try:
                before = read_counters(url, model)
            except ClientError:
                return lambda: None

            def end() -> float | None:
                try:
                    return read_counters(url, model).since(before).queue_ms
                except ClientError:
                    return None

            return end

        return begin
