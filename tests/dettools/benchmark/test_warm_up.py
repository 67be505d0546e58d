import numpy as np
import pytest
from dettools.benchmark.warm_up import BATCH, find_warm_up, mser, truncation
from synthetic_levels import sequential


def noise(count, *, mean=20.0, seed=0):
    return np.random.default_rng(seed).normal(mean, mean / 10, count)


def test_the_statistic_is_the_squared_standard_error_of_what_is_kept():
    means = noise(40)
    expected = [means[cut:].var() / (len(means) - cut) for cut in range(len(means))]
    assert mser(means) == pytest.approx(expected, abs=1e-12)


def test_a_slow_start_is_cut_where_it_ends():
    cut, settled = truncation(np.concatenate((noise(60, mean=90.0), noise(940))))
    assert (cut, settled) == (60, True)


def test_a_fast_start_is_cut_too():
    """An open loop begins with an empty queue."""
    cut, settled = truncation(np.concatenate((noise(60, mean=5.0), noise(940))))
    assert (cut, settled) == (60, True)


def test_a_decaying_start_is_cut_until_it_drowns_in_the_noise():
    decay = 100 * np.exp(-np.arange(2000) / 50)
    cut, settled = truncation(noise(2000) + decay)
    # At 200 the excess is 1.8, below the noise of 2.
    assert 100 <= cut <= 300
    assert settled


def test_the_mean_is_wrong_without_the_cut_and_right_with_it():
    series = np.concatenate((noise(100, mean=100.0), noise(900)))
    cut, _ = truncation(series)
    assert series.mean() == pytest.approx(28, abs=0.5)
    assert series[cut:].mean() == pytest.approx(20, abs=0.3)


@pytest.mark.parametrize("seed", range(10))
def test_little_is_cut_where_there_is_no_warm_up(seed):
    cut, settled = truncation(noise(1000, seed=seed))
    assert cut <= 50
    assert settled


def test_a_stall_is_not_taken_for_a_warm_up():
    """MSER alone cuts all that lies before the stall, and with it the tail that is to be shown."""
    series = noise(1000)
    series[300:320] += np.linspace(2000, 0, 20)
    means = series.reshape(-1, BATCH).mean(axis=1)
    assert int(np.argmin(mser(means)[:101])) * BATCH >= 320
    cut, settled = truncation(series)
    assert cut < 300
    assert settled


def test_a_slow_first_request_is_cut_without_the_stall_behind_it():
    series = noise(1000)
    series[0] += 3000
    series[300:320] += 1000
    cut, settled = truncation(series)
    assert BATCH <= cut <= 50
    assert settled


def test_a_queue_that_only_grows_never_settles():
    cut, settled = truncation(noise(1000) + np.arange(1000))
    assert (cut, settled) == (500, False)


def test_a_level_that_does_not_settle_rises_or_falls():
    growing = find_warm_up(sequential(np.linspace(0.01, 0.05, 1000)).samples)
    falling = find_warm_up(sequential(np.linspace(0.05, 0.01, 1000)).samples)
    assert (growing.settled, growing.rising) == (False, True)
    assert (falling.settled, falling.rising) == (False, False)


def test_too_few_latencies_are_left_alone():
    assert truncation(np.concatenate((noise(10, mean=500.0), noise(25)))) == (0, True)
    assert truncation(np.zeros(0)) == (0, True)


def test_equal_latencies_have_no_warm_up():
    assert truncation(np.full(500, 20.0)) == (0, True)


def test_the_warm_up_is_told_in_requests_and_seconds():
    level = sequential([0.1] * 50 + [0.01] * 950)
    warm_up = find_warm_up(level.samples)
    assert warm_up.requests == 50
    assert warm_up.seconds == pytest.approx(5.0)


def test_failed_requests_neither_hide_nor_make_a_warm_up():
    """A refused request is answered at once."""
    latencies = [0.0001 if index % 3 == 0 else 0.02 for index in range(900)]
    level = sequential(latencies, failed=range(0, 300, 3))
    assert find_warm_up(level.samples).requests <= 300
    slow = sequential([5.0] * 30 + [0.02] * 900, failed=range(30))
    assert find_warm_up(slow.samples).requests == 0
