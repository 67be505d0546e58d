from dataclasses import replace

import numpy as np
import pytest
from dettools.benchmark.measurement import GpuSample, Verdict
from dettools.benchmark.statistics import summarise
from dettools.benchmark.validity import validate_level, validate_run
from synthetic_levels import open_loop, sequential, steady


def verdict_of(level, **facts):
    return validate_level(summarise(level, resamples=0), **facts)


def codes(verdict):
    return {code: stamp for stamp, code, _ in verdict.reasons}


def hot(throttled):
    look = GpuSample(0, 0.0, 99.0, 4000.0, 1100.0, 300.0, 88.0, throttled=throttled)
    level = steady()
    return replace(level, resources=replace(level.resources, gpu=(look,)))


def swinging(amplitude):
    """Latencies that rise and fall with a period of 20 s, four of the windows."""
    now, latencies = 0.0, []
    while now < 60:
        latencies.append(0.02 * (1 + amplitude * np.sin(now / 20 * 2 * np.pi)))
        now += latencies[-1]
    return sequential(latencies)


# Code, stamp, a level that gives it, and the like of it that does not.
CASES = [
    ("no_answers", "INVALID", sequential([0.01] * 100, failed=range(100)), steady()),
    ("too_few_samples", "INVALID", steady(19), steady(20)),
    ("too_few_samples", "WARN", steady(999), steady(1000)),
    ("interrupted", "WARN", steady(stopped="interrupted"), steady(stopped="stable")),
    ("warm_up_not_found", "WARN", sequential(np.linspace(0.01, 0.03, 1500)), steady()),
    ("too_short", "WARN", steady(window_s=25.0), steady(window_s=5.0)),
    ("unstable", "WARN", swinging(0.15), swinging(0.01)),
    ("unstable", "INVALID", swinging(0.6), swinging(0.01)),
    ("errors", "WARN", steady(failed=[700]), steady()),
    ("errors", "INVALID", steady(failed=range(0, 1500, 50)), steady(failed=[700])),
    ("throttled", "WARN", steady(cgroup_throttled_s=1.0), steady(cgroup_throttled_s=0.2)),
    ("throttled", "INVALID", steady(cgroup_throttled_s=5.0), steady(cgroup_throttled_s=None)),
    ("stolen_cpu", "WARN", steady(steal=0.05), steady(steal=0.01)),
    ("stolen_cpu", "INVALID", steady(steal=0.2), steady(steal=None)),
    ("gpu_throttled", "WARN", hot(throttled=True), hot(throttled=False)),
    ("client_saturated", "WARN", steady(client_cpu_s=26.0), steady(client_cpu_s=20.0)),
    ("client_saturated", "INVALID", steady(client_cpu_s=29.5), steady(client_cpu_s=20.0)),
    ("client_late", "WARN", steady(loop_lag_ms=6.0), steady(loop_lag_ms=4.0)),
    ("client_late", "WARN", open_loop(50, [0.02] * 1500, late_s=0.006), open_loop(50, [0.02] * 1500, late_s=0.004)),
    ("client_late", "WARN", steady(mean_s=0.2, loop_lag_ms=21.0), steady(mean_s=0.2, loop_lag_ms=19.0)),
    ("client_overflow", "WARN", steady(failed=[700], error="client_overflow"), steady(failed=[700])),
    ("overloaded", "WARN", open_loop(50, np.arange(1500) * 0.01), open_loop(50, [0.02] * 1500)),
    ("stall_hidden", "WARN", sequential([0.02] * 700 + [2.0] + [0.02] * 800), sequential([0.02] * 1500)),
    ("machine_busy", "WARN", steady(machine_cpu=0.85), steady(machine_cpu=0.7)),
]


@pytest.mark.parametrize(("code", "stamp", "bad", "good"), CASES, ids=[f"{code}-{stamp}" for code, stamp, *_ in CASES])
def test_a_reason_is_given_where_it_is_true_and_only_there(code, stamp, bad, good):
    found = verdict_of(bad, cores=2)
    assert codes(found)[code] == stamp
    assert found.stamp == stamp or found.stamp == "INVALID"
    other = codes(verdict_of(good, cores=2))
    assert other.get(code) != stamp


def test_a_level_without_fault_is_valid():
    assert verdict_of(steady(), cores=2) == Verdict("VALID")


def test_every_reason_says_what_was_got_and_expected():
    for _, _, bad, _ in CASES:
        for _, _, sentence in verdict_of(bad, cores=2).reasons:
            assert sentence.endswith(".")
            assert any(character.isdigit() for character in sentence)


def test_a_saturated_server_is_a_finding_no_fault_of_the_measurement():
    found = verdict_of(open_loop(50, np.arange(1500) * 0.01))
    assert found.stamp == "WARN"
    assert any("Quote the throughput, not the latency" in text for _, _, text in found.reasons)


def test_in_process_the_client_is_what_is_measured():
    busy = steady(client_cpu_s=55.0, server_cpu_s=None, machine_cpu=0.95)
    assert verdict_of(busy, kind="runtime", cores=2) == Verdict("VALID")
    assert "client_saturated" in codes(verdict_of(busy, kind="served"))


def test_without_the_number_of_cores_other_processes_are_not_judged():
    assert "machine_busy" not in codes(verdict_of(steady(machine_cpu=0.99)))
    assert "machine_busy" not in codes(verdict_of(steady(machine_cpu=0.99, server_cpu_s=None), cores=2))


# Whole runs.

FINE, DOUBT, BAD = Verdict("VALID"), Verdict("WARN", (("WARN", "unstable", "…"),)), Verdict("INVALID", ())


def run_verdict(*verdicts, **facts):
    levels = [summarise(steady(100, value=index + 1), resamples=0) for index in range(len(verdicts))]
    return validate_run(levels, verdicts, **{"distinct_images": 20, **facts})


def test_a_run_of_valid_levels_is_valid():
    assert run_verdict(FINE, FINE) == Verdict("VALID")


def test_a_run_names_the_levels_that_may_not_be_quoted():
    found = run_verdict(FINE, BAD, FINE)
    assert found.stamp == "WARN"
    assert codes(found) == {"levels_invalid": "WARN"}
    assert "1 of 3 levels are INVALID (concurrency 2)" in found.reasons[0][2]


def test_a_run_without_a_level_that_is_better_is_invalid():
    assert run_verdict(BAD, BAD).stamp == "INVALID"
    assert run_verdict().stamp == "INVALID"


def test_a_run_gathers_the_reservations_of_its_levels():
    found = run_verdict(FINE, DOUBT)
    assert found.stamp == "WARN"
    assert "unstable: concurrency 2" in found.reasons[0][2]


def test_identical_images_are_a_reservation():
    assert codes(run_verdict(FINE, distinct_images=1)) == {"identical_images": "WARN"}
    assert run_verdict(FINE, distinct_images=2).stamp == "VALID"


def test_an_interrupted_run_says_that_levels_are_missing():
    assert codes(run_verdict(FINE, interrupted=True)) == {"interrupted": "WARN"}


def test_a_verdict_survives_json():
    assert Verdict.from_json(DOUBT.to_json()) == DOUBT
