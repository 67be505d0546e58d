"""When requests are due: rates, distributions and seeds."""

from itertools import islice

import numpy as np
import pytest
from detserve.errors import DetserveError
from dettools.benchmark.schedule import arrival_times, image_order
from scipy import stats


def test_constant_arrivals_are_evenly_spaced_from_zero():
    np.testing.assert_allclose(arrival_times(4, "constant", 1.0), [0, 0.25, 0.5, 0.75])
    assert len(arrival_times(12.5, "constant", 10.0)) == 125


def test_poisson_arrivals_have_the_rate_and_exponential_gaps():
    times = arrival_times(50, "poisson", 200.0, seed=1)
    gaps = np.diff(times, prepend=0.0)
    assert (gaps > 0).all()
    assert times[-1] < 200.0
    assert abs(len(times) - 10_000) < 4 * np.sqrt(10_000)  # the count is Poisson: four standard deviations
    assert stats.kstest(gaps, "expon", args=(0, 1 / 50)).pvalue > 0.01
    # A wrong schedule beside it: evenly spaced requests are no independent users.
    assert stats.kstest(np.diff(arrival_times(50, "constant", 200.0)), "expon", args=(0, 1 / 50)).pvalue < 1e-6


def test_a_seed_fixes_the_schedule():
    np.testing.assert_array_equal(arrival_times(9, "poisson", 30, seed=5), arrival_times(9, "poisson", 30, seed=5))
    assert not np.array_equal(arrival_times(9, "poisson", 30, 5)[:9], arrival_times(9, "poisson", 30, 6)[:9])


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(DetserveError, match="expected more than 0"):
        arrival_times(rate, "poisson", 1.0)


def test_each_pass_has_every_image_once_in_another_order():
    order = list(islice(image_order(20, seed=3), 60))
    passes = [order[:20], order[20:40], order[40:]]
    assert all(sorted(one) == list(range(20)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert order == list(islice(image_order(20, seed=3), 60))
