import math

import pytest
from detserve.errors import DetserveError
from dettools.benchmark.knee import Knee, Slo, find_knee, highest_sustained, judge_slo, judge_sweep, power
from dettools.benchmark.statistics import summarise
from synthetic_levels import open_loop, sequential, steady


def at(rate, latency_s, count=400):
    return summarise(open_loop(rate, [latency_s] * count), resamples=100)


def test_power_is_throughput_over_latency():
    assert power(summarise(sequential([0.02] * 500), resamples=0)) == pytest.approx(50 / 0.02, rel=0.01)
    assert power(summarise(sequential([0.02] * 50, failed=range(50)), resamples=0)) == 0


def test_the_knee_is_where_more_load_buys_more_latency_than_answers():
    """Of a queue with one server (M/M/1), power is largest at half of its capacity (Kleinrock 1979)."""
    capacity = 100.0
    rates = [10, 30, 50, 70, 90]
    levels = [at(rate, 1 / (capacity - rate), count=40 * rate) for rate in rates]
    assert find_knee(levels) == Knee(2, pytest.approx(50 * 50, rel=0.01), bracketed=True)


def test_a_knee_at_the_end_of_the_sweep_is_told_to_be_there():
    levels = [at(rate, 0.02) for rate in (10, 20, 40)]
    knee = find_knee(levels)
    assert (knee.level, knee.bracketed) == (2, False)


def test_two_levels_have_no_knee():
    assert find_knee([at(10, 0.02), at(20, 0.02)]) is None
    assert find_knee([summarise(sequential([0.01] * 30, failed=range(30)), resamples=0)] * 3) is None


def test_the_highest_sustained_rate_is_the_last_before_the_queue_grows():
    growing = summarise(open_loop(40, [0.05 + index / 40 * 0.3 for index in range(800)]), resamples=0)
    assert growing.throughput_rps.value < 0.95 * growing.offered_rps
    levels = [at(20, 0.03), growing, at(10, 0.02)]
    assert highest_sustained(levels) == 0
    assert highest_sustained([growing]) is None


def test_a_queue_that_grows_too_slowly_for_its_throughput_is_not_sustained():
    slow = summarise(open_loop(40, [0.05 + index / 40 * 0.04 for index in range(800)]), resamples=0)
    assert slow.throughput_rps.value >= 0.95 * slow.offered_rps
    assert highest_sustained([slow]) is None


def test_two_requests_on_their_way_are_no_overload():
    """Of a short level they are more than one in twenty."""
    latencies = [0.02] * 26 + [5.0, 5.0] + [0.02]
    level = summarise(open_loop(5, latencies), resamples=0)
    assert level.throughput_rps.value < 0.95 * level.offered_rps
    assert highest_sustained([level]) == 0
    three = summarise(open_loop(5, [0.02] * 25 + [5.0] * 3 + [0.02]), resamples=0)
    assert highest_sustained([three]) is None


def test_a_closed_loop_offers_no_rate():
    assert highest_sustained([summarise(steady(500), resamples=0)]) is None


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("p99=250ms", Slo(99, 250)),
        ("p95=0.2s", Slo(95, 200)),
        (" p99.9 = 1 s ", Slo(99.9, 1000)),
        ("p50=30", Slo(50, 30)),
    ],
)
def test_an_slo_is_read(text, slo):
    assert Slo.parse(text) == slo


@pytest.mark.parametrize("text", ["", "99=250ms", "p99", "p99=0ms", "p99=-3ms", "p0=3ms", "p100=3ms", "p99=250min"])
def test_what_is_no_slo_is_refused(text):
    with pytest.raises(DetserveError, match="expected a percentile and its limit, such as p99=250ms"):
        Slo.parse(text)


def test_an_slo_is_met_up_to_the_first_level_that_misses_it():
    levels = [at(10, 0.02), at(40, 0.3), at(20, 0.1), at(80, 0.02)]
    verdict = judge_sweep(levels, Slo(95, 250))
    assert [outcome.met for outcome in verdict.outcomes] == [True, False, True, True]
    assert verdict.highest == 2
    assert verdict.sentence([level.name for level in levels]).startswith(
        "p95 ≤ 250 ms: met up to 20 req/s constant (100.0"
    )
    assert "no level meets it" in judge_sweep(levels, Slo(95, 10)).sentence(["a", "b", "c", "d"])


def test_an_slo_near_its_limit_is_not_sure():
    level = summarise(steady(400), resamples=200)
    p95 = level.percentile(95)
    assert judge_slo(level, Slo(95, p95.high_ms + 0.01)).sure
    near = judge_slo(level, Slo(95, (p95.ms + p95.high_ms) / 2))
    assert (near.met, near.sure) == (True, False)
    assert not judge_slo(level, Slo(95, (p95.ms + p95.low_ms) / 2)).sure


def test_too_few_answers_never_make_an_slo_sure():
    outcome = judge_slo(summarise(steady(100), resamples=100), Slo(99, 250))
    assert (outcome.met, outcome.sure, outcome.high_ms) == (True, False, None)


def test_failed_requests_miss_an_slo_that_the_answers_meet():
    """Every twentieth is refused: the 95 that are answered are fast, the p99 of the service is not."""
    level = summarise(steady(2000, failed=range(0, 2000, 20)), resamples=100)
    assert level.percentile(99).ms < 25
    outcome = judge_slo(level, Slo(99, 250))
    assert (outcome.met, outcome.sure) == (False, True)
    assert math.isinf(outcome.strict_ms)


def test_an_slo_on_a_percentile_that_was_not_computed_is_refused():
    with pytest.raises(DetserveError, match="expected one of the percentiles that are computed: p50, p75"):
        judge_slo(at(10, 0.02), Slo(97, 100))
