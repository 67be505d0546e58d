"""Levels whose figures are known beforehand: made from latencies, not measured."""

from collections.abc import Sequence

import numpy as np
from dettools.benchmark.images import ImageFacts, describe_images
from dettools.benchmark.measurement import Arrivals, Level, Load, Resources, Sample
from dettools.benchmark.run import Run, make_run

IMAGES: ImageFacts = describe_images([bytes([number]) * 1000 for number in range(20)])
ENVIRONMENT = {"date": "2026-11-23T10:00:00+00:00", "cpu": {"model": "a processor", "cores": 2}, "gpus": []}


def quiet_resources(wall_s: float, **changed: object) -> Resources:
    """A client and a server that nothing disturbs, on two cores."""
    values = {"client_cpu_s": 0.05 * wall_s, "server_cpu_s": 1.2 * wall_s, "machine_cpu": 0.65, "loop_lag_ms": 0.5}
    return Resources(wall_s=wall_s, **{**values, "steal": 0.0, "cgroup_throttled_s": 0.0, **changed})


def sequential(
    latencies_s: Sequence[float],
    *,
    failed: Sequence[int] = (),
    error: str = "queue_full",
    images: int = 20,
    value: float = 1,
    window_s: float = 5.0,
    stopped: str = "time",
    **changed: object,
) -> Level:
    """A closed loop with one request after the other."""
    samples, now = [], 0.0
    for index, latency_s in enumerate(latencies_s):
        bad = index in failed
        samples.append(
            Sample(
                f"{index % images:03}.jpg",
                now,
                now,
                now + float(latency_s),
                503 if bad else 200,
                error if bad else "",
                encode_ms=0.1,
                stages_ms=None if bad else {"handler": float(latency_s) * 800, "forward": float(latency_s) * 500},
                batch_size=None if bad else 1 + index % 2,
            )
        )
        now += float(latency_s)
    return Level(Load("closed", value), tuple(samples), quiet_resources(now, **changed), window_s, stopped)


def steady(count: int = 1500, mean_s: float = 0.02, *, seed: int = 0, **options: object) -> Level:
    """A closed loop without anything to find fault with."""
    noise = np.random.default_rng(seed).normal(mean_s, mean_s / 20, count)
    return sequential(noise.tolist(), **options)


def open_loop(
    rate: float,
    latencies_s: Sequence[float],
    *,
    late_s: float = 0.0,
    arrivals: Arrivals = "constant",
    window_s: float = 5.0,
    **changed: object,
) -> Level:
    """Requests due at a constant rate, each with its latency from then."""
    samples = tuple(
        Sample(f"{index % 20:03}.jpg", index / rate, index / rate + late_s, index / rate + float(latency_s), 200)
        for index, latency_s in enumerate(latencies_s)
    )
    resources = quiet_resources(len(samples) / rate, **changed)
    return Level(Load("open", rate, arrivals), samples, resources, window_s, "time")


def run_of(levels: Sequence[Level], **options: object) -> Run:
    """A run of these levels with everything else filled in."""
    values = {"images": IMAGES, "target": {"runtime": "torch"}, "settings": {"seed": 0}, "environment": ENVIRONMENT}
    values = {"kind": "served", "model": "shapes", "resamples": 200, **values, **options}
    return make_run(levels=levels, **values)
