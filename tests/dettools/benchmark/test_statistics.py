import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from dettools.benchmark.bootstrap import block_length, interval, resample
from dettools.benchmark.gpu_use import gpu_use
from dettools.benchmark.measurement import Accuracy, GpuSample, Level, Load, Sample
from dettools.benchmark.percentiles import fewest_answers, latency_percentiles, strict_percentile
from dettools.benchmark.statistics import LevelSummary, Window, is_stable, stage_split, summarise, windows_of
from synthetic_levels import open_loop, quiet_resources, sequential, steady


def autoregressive(count, correlation, seed):
    noise = np.random.default_rng(seed).normal(size=count)
    series = np.empty(count)
    series[0] = noise[0] / math.sqrt(1 - correlation**2)
    for index in range(1, count):
        series[index] = correlation * series[index - 1] + noise[index]
    return series


# Percentiles.


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 777])
@pytest.mark.parametrize("p", [50, 90, 99, 99.9])
def test_the_strict_percentile_is_numpys_when_nothing_failed(count, p):
    values = np.sort(np.random.default_rng(count).exponential(size=count))
    assert strict_percentile(values, p) == pytest.approx(np.percentile(values, p))


def test_percentiles_are_numpys_over_the_answered():
    level = steady(2000, failed=range(0, 2000, 100))
    latencies = [sample.latency_ms for sample in level.samples if sample.ok]
    found = latency_percentiles(level.samples, resamples=0)
    assert [one.ms for one in found[:5]] == pytest.approx(np.percentile(latencies, [50, 75, 90, 95, 99]).tolist())


def test_failed_requests_take_for_ever_in_the_strict_percentile():
    """Two in a hundred fail at once: p99 over the answers looks fine, the service's p99 is infinite."""
    level = sequential([0.02] * 1000, failed=range(0, 1000, 50))
    p95, p99 = latency_percentiles(level.samples, (95, 99), resamples=0)
    assert p99.ms == pytest.approx(20)
    assert math.isinf(p99.strict_ms)
    assert p95.strict_ms == pytest.approx(20)


def test_a_percentile_is_shown_when_its_interval_can_exist():
    assert [fewest_answers(p) for p in (50, 95, 99, 99.9)] == [6, 72, 368, 3688]
    for p in (95, 99, 99.9):
        # The largest of n values lies beyond the percentile with a probability of 97.5 %, of n - 1 it does not.
        n = fewest_answers(p)
        assert 1 - (p / 100) ** n >= 0.975 > 1 - (p / 100) ** (n - 1)


def test_a_percentile_of_too_few_is_not_shown_and_says_why():
    shown = {one.name: one for one in latency_percentiles(steady(368).samples, resamples=50)}
    assert shown["p99"].ms is not None
    assert shown["p99.9"].ms is None
    assert shown["p99.9"].low_ms is None
    assert shown["p99.9"].reason == "368 answers, at least 3688 are needed"
    fewer = latency_percentiles(steady(367).samples, (99,), resamples=50)
    assert fewer[0].ms is None


def test_samples_beyond_a_percentile_are_counted_exactly():
    found = latency_percentiles(steady(100).samples, (50, 90, 99, 99.9), resamples=0)
    assert [one.beyond for one in found] == pytest.approx([50, 10, 1, 0.1], abs=1e-12)
    assert found[1].beyond == 10


# Bootstrap.


def test_the_block_length_is_that_of_the_theory():
    """Politis and White 2004 for a first-order autoregression, where the sums are known in closed form."""
    count, correlation = 2000, 0.7
    g = 2 * correlation / ((1 - correlation) ** 2 * (1 - correlation**2))
    s = 1 / (1 - correlation) ** 2
    theory = (2 * g**2 / (4 / 3 * s**2) * count) ** (1 / 3)
    found = [block_length(autoregressive(count, correlation, seed)) for seed in range(20)]
    assert np.mean(found) == pytest.approx(theory, rel=0.25)


def test_uncorrelated_values_need_no_blocks():
    found = [block_length(np.random.default_rng(seed).normal(size=2000)) for seed in range(20)]
    assert np.mean(found) < 5
    assert block_length(np.full(100, 3.0)) == 1
    assert block_length(np.zeros(0)) == 1


def test_intervals_hold_what_they_promise_for_correlated_latencies_and_single_draws_do_not():
    covered = {"blocks": 0, "single": 0}
    for seed in range(100):
        series = autoregressive(600, 0.7, seed)
        for name, block in (("blocks", None), ("single", 1)):
            estimates = resample(series, lambda rows: np.median(rows, axis=1), resamples=200, seed=seed, block=block)
            low, high = interval(estimates, 0.95)
            # The true median is 0.
            covered[name] += bool(low <= 0 <= high)
    assert covered["blocks"] >= 85
    assert covered["single"] <= 75


def test_the_same_seed_gives_the_same_interval():
    first, second, other = (summarise(steady(500), resamples=100, seed=seed) for seed in (1, 1, 2))
    assert first == second
    assert first.percentiles[0].ms == other.percentiles[0].ms
    assert first.percentiles[0].low_ms != other.percentiles[0].low_ms


def test_the_interval_encloses_the_figure():
    summary = summarise(steady(2000), resamples=200)
    rate = summary.throughput_rps
    assert rate.low < rate.value < rate.high
    assert all(one.low_ms <= one.ms <= one.high_ms for one in summary.percentiles if one.ms is not None)


# Throughput.


def test_throughput_is_answers_per_second_without_the_warm_up():
    summary = summarise(sequential([0.5] * 50 + [0.02] * 1450), resamples=0)
    assert summary.throughput_rps.value == pytest.approx(50, rel=1e-3)
    assert summary.offered_rps == pytest.approx(50, rel=1e-3)
    assert (summary.warm_up.requests, summary.requests, summary.measured) == (50, 1500, 1450)
    # The wrong figure: 1500 requests over all of the time.
    assert pytest.approx(27.8, abs=0.1) == 1500 / (50 * 0.5 + 1450 * 0.02)


@pytest.mark.parametrize("spread_s", [0.0, 0.05, 1.0])
def test_neither_draining_nor_the_place_in_a_batch_counts(spread_s):
    """Eight slots of 1 s each for 10 s, answered all at once or one by one: eight per second."""
    samples = []
    for slot in range(8):
        # All begin at once; each slot's answers come a little later than the one's before it.
        ends = [0.0, *(turn + spread_s * slot / 8 for turn in range(1, 11))]
        samples += [Sample("a.jpg", sent, sent, done, 200) for sent, done in pairwise(ends)]
    samples.sort(key=lambda sample: sample.scheduled_s)
    level = Level(Load("closed", 8), tuple(samples), quiet_resources(11.0), 5.0, "time")
    assert summarise(level, resamples=0).throughput_rps.value == pytest.approx(8, rel=0.01 + 0.05 * spread_s)


def test_a_level_that_ends_in_a_stall_is_slowed_down_by_it():
    summary = summarise(sequential([0.02] * 400 + [2.0], value=1), resamples=0)
    assert summary.throughput_rps.value == pytest.approx(401 / 10, rel=0.01)


def test_batches_in_process_are_counted_as_images():
    samples = [
        Sample(f"{image}.jpg", turn * 0.1, turn * 0.1, (turn + 1) * 0.1, 200)
        for turn in range(100)
        for image in range(8)
    ]
    level = Level(Load("closed", 8), tuple(samples), quiet_resources(10.0), 5.0, "time")
    assert summarise(level, resamples=0).throughput_rps.value == pytest.approx(80, rel=1e-6)


def test_what_a_saturated_server_answers_is_less_than_what_is_offered():
    """20 per second are offered, 10 answered: each answer comes later than the one before."""
    summary = summarise(open_loop(20, [index * 0.05 + 0.05 for index in range(400)]), resamples=0)
    assert summary.offered_rps == pytest.approx(20, rel=0.01)
    assert summary.throughput_rps.value == pytest.approx(10, rel=0.05)


# Windows.


def test_windows_end_at_the_end_and_are_whole():
    level = sequential([0.1] * 120)
    windows = windows_of(level.samples, 5.0, end_s=12.05)
    assert [window.start_s for window in windows] == pytest.approx([2.05, 7.05])
    assert [window.throughput_rps for window in windows] == pytest.approx([10, 10])
    assert [window.latency_ms for window in windows] == pytest.approx([100, 100])


def test_a_window_without_answers_has_no_latency():
    windows = windows_of(sequential([0.1] * 50 + [10.05]).samples, 5.0)
    assert [window.throughput_rps for window in windows] == pytest.approx([9.8, 0, 0.2], abs=0.21)
    assert windows[1].latency_ms is None
    assert not is_stable(windows)


@pytest.mark.parametrize(
    ("rates", "latencies", "stable"),
    [
        ((100, 105, 110), (20, 20, 20), True),
        ((100, 105, 111), (20, 20, 20), False),
        ((100, 100, 100), (20, 21, 22), True),
        ((100, 100, 100), (20, 21, 22.1), False),
        ((10, 100, 100, 100), (90, 20, 20, 20), True),
        ((100, 100), (20, 20), False),
    ],
)
def test_stable_is_three_windows_within_ten_per_cent(rates, latencies, stable):
    windows = [Window(0.0, rate, latency) for rate, latency in zip(rates, latencies, strict=True)]
    assert is_stable(windows) is stable


def test_a_level_that_ended_stable_has_its_three_windows_after_the_cut():
    """It ran for three windows; the warm-up takes a little of the first."""
    summary = summarise(sequential([0.05] * 20 + [0.02] * 720), resamples=0)
    assert summary.window_s == pytest.approx(14.4 / 3, rel=0.01)
    assert (len(summary.windows), summary.stable) == (3, True)


# Parts and costs.


def test_the_parts_of_a_latency_add_up_to_it():
    stages = {"handler": 30.0, "decode": 4.0, "preprocess": 2.0, "forward": 15.0, "postprocess": 3.0, "serialise": 1.0}
    sample = Sample("a.jpg", 0.0, 0.0, 0.05, 200, encode_ms=0.5, stages_ms=stages)
    split = stage_split([sample, replace(sample, stages_ms=None)])
    assert split["wait"] == pytest.approx(5)
    assert split["network_queue"] == pytest.approx(19.5)
    assert sum(split.values()) == pytest.approx(sample.latency_ms)
    assert list(split) == [
        "encode",
        "network_queue",
        "wait",
        "decode",
        "preprocess",
        "forward",
        "postprocess",
        "serialise",
    ]


def test_clocks_that_disagree_give_no_negative_part():
    sample = Sample("a.jpg", 0.0, 0.0, 0.01, 200, stages_ms={"handler": 10.4, "forward": 10.5})
    split = stage_split([sample])
    assert split["network_queue"] == split["wait"] == 0
    assert stage_split([replace(sample, stages_ms=None)]) == {}


def test_errors_in_the_warm_up_are_no_less_errors():
    summary = summarise(sequential([0.5] * 50 + [0.02] * 950, failed=[3, 500], error="reset"), resamples=0)
    assert summary.errors == {"reset": 2}
    assert summary.error_rate == pytest.approx(0.002)
    assert (summary.measured, summary.answered) == (949, 948)


def test_costs_are_per_request():
    level = steady(1000, client_cpu_s=0.4, server_cpu_s=22.0, queue_ms=3.0)
    summary = summarise(level, resamples=0)
    assert (summary.client_cpu_ms, summary.server_cpu_ms) == pytest.approx((0.4, 22.0))
    assert sum(summary.batch_sizes.values()) == summary.answered
    assert summary.images == 20


def test_gpus_are_summed_up_one_by_one():
    look = GpuSample(0, 0.0, 80.0, 1000.0, 1500.0, 200.0, 60.0, throttled=False)
    hot = GpuSample(0, 1.0, 100.0, 1200.0, 1300.0, None, 80.0, throttled=True)
    other = GpuSample(1, 0.0, None, None, None, None, None, None)
    first, second = gpu_use([look, hot, other])
    assert (first.utilisation, first.memory_mb, first.sm_clock_mhz, first.power_w) == (90, 1200, 1400, 200)
    assert (first.temperature_c, first.throttled) == (80, True)
    assert (second.index, second.utilisation, second.throttled) == (1, None, None)


def test_a_level_without_answers_or_requests_is_summarised_too():
    refused = summarise(sequential([0.001] * 30, failed=range(30), error="refused"))
    assert (refused.answered, refused.mean_ms, refused.throughput_rps.value) == (0, None, 0)
    assert math.isinf(refused.percentiles[0].strict_ms)
    empty = summarise(Level(Load("closed", 1), (), quiet_resources(1.0), 5.0, "interrupted"))
    assert (empty.requests, empty.seconds, empty.offered_rps) == (0, 0, 0)
    single = summarise(sequential([0.25]))
    assert single.throughput_rps.value == pytest.approx(4)


def test_a_summary_survives_json():
    level = steady(800, failed=range(0, 800, 20), queue_ms=2.0)
    looks = (GpuSample(0, 0.0, 80.0, 1000.0, None, 200.0, 60.0, throttled=None),)
    level = replace(
        level, resources=replace(level.resources, gpu=looks), accuracy=Accuracy(0.3, 0.5, 0.28, 0.47, 800, 40)
    )
    summary = summarise(level, resamples=50)
    text = json.dumps(summary.to_json(), allow_nan=False)
    assert '"inf"' in text
    assert LevelSummary.from_json(json.loads(text)) == summary
