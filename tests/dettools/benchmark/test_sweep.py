"""Which levels a sweep has, how long they may take, and what ends it."""

import pytest
from detserve.errors import DetserveError
from dettools.benchmark.knee import Slo
from dettools.benchmark.load import Bounds
from dettools.benchmark.measurement import Level, Load, Resources, Sample
from dettools.benchmark.sweep import (
    SweepError,
    closed_loads,
    expected_seconds,
    open_loads,
    run_sweep,
    seconds,
    stability_of,
)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("8", [8]),
        ("1:4", [1, 2, 3, 4]),
        ("1:16:5", [1, 6, 11, 16]),
        ("1:15:5", [1, 6, 11]),
        ("1,2,4,8", [1, 2, 4, 8]),
        ("4,4,1", [4, 1]),
        ("3:3", [3]),
    ],
)
def test_concurrency_is_start_end_step_or_a_list(text, values):
    assert closed_loads(text) == tuple(Load("closed", value) for value in values)


def test_rates_need_not_be_whole():
    assert [load.value for load in open_loads("5:40:5", "poisson")] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert [load.name for load in open_loads("0.1:0.4:0.1", "constant")] == [
        f"{rate} req/s constant" for rate in (0.1, 0.2, 0.3, 0.4)
    ]


@pytest.mark.parametrize(
    "text", ["", "a", "1:", ":4", "4:1", "1:4:0", "1:2:3:4", "0", "-1", "1.5", "1:1e9", "nan", "inf"]
)
def test_levels_that_are_none_are_refused(text):
    with pytest.raises(SweepError, match="--concurrency: got"):
        closed_loads(text)


def test_a_rate_of_nothing_is_refused():
    for text in ("0,5", "-5:5:5", "x", "nan"):
        with pytest.raises(SweepError, match="--rate: got"):
            open_loads(text, "poisson")


@pytest.mark.parametrize(("text", "value"), [("250ms", 0.25), ("5s", 5), ("2min", 120), ("1.5", 1.5), (" 3 s ", 3)])
def test_durations(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "5h", "-1s", "s", "1e3s"])
def test_durations_that_are_none(text):
    with pytest.raises(DetserveError, match="such as 250ms"):
        seconds(text)


def test_how_long_a_sweep_may_take_with_the_defaults():
    """1:16 stays within a few minutes."""
    assert expected_seconds(16, Bounds(), 2.0) == (2 + 16 * 9, 2 + 16 * 20)


def level(load, latency_ms=10.0, stopped="time", count=400):
    samples = [Sample("a", i / 100, i / 100, i / 100 + latency_ms / 1e3, 200) for i in range(count)]
    return Level(load, tuple(samples), Resources(4.0, 0.1), 1.0, stopped)


LOADS = closed_loads("1:4")


def test_every_level_is_measured_and_told():
    told = []
    sweep = run_sweep(LOADS, level, on_level=told.append)
    assert [one.load for one in sweep.levels] == list(LOADS)
    assert list(sweep.levels) == told
    assert not sweep.interrupted


def test_a_level_that_misses_the_slo_ends_the_sweep_only_if_asked():
    def slower(load):
        return level(load, latency_ms=100 * load.value)

    slo = Slo.parse("p95=250ms")
    assert len(run_sweep(LOADS, slower, slo=slo).levels) == 4
    sweep = run_sweep(LOADS, slower, slo=slo, stop_at_slo=True)
    assert [one.load.value for one in sweep.levels] == [1, 2, 3]
    assert (sweep.missed_slo, sweep.interrupted) == (True, False)


def test_an_interruption_keeps_the_finished_levels():
    def interrupted_at_2(load):
        return level(load, stopped="interrupted" if load.value == 2 else "time", count=50)

    sweep = run_sweep(LOADS, interrupted_at_2)
    assert [one.load.value for one in sweep.levels] == [1, 2]
    assert sweep.interrupted
    nothing_yet = run_sweep(LOADS, lambda load: level(load, stopped="interrupted", count=0))
    assert (nothing_yet.levels, nothing_yet.interrupted) == ((), True)


def test_ctrl_c_between_two_levels_keeps_the_finished_ones():
    def between(load):
        if load.value == 3:
            raise KeyboardInterrupt
        return level(load)

    sweep = run_sweep(LOADS, between)
    assert [one.load.value for one in sweep.levels] == [1, 2]
    assert sweep.interrupted


def test_a_level_is_stable_when_its_last_three_windows_agree():
    steady = level(LOADS[0], count=400).samples
    assert stability_of(1.0)(steady, 4.0)
    assert not stability_of(1.0)(steady[:250], 2.5)  # two windows only
    stalled = [one for one in steady if not 2.2 <= one.done_s < 2.6]
    assert not stability_of(1.0)(stalled, 4.0)
