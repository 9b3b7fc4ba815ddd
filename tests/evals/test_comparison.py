"""Paired comparisons against a bootstrap that really resamples, and scipy."""

import numpy as np
import pytest
from scipy import stats

from vitcli.evals.comparison import compare_paired


@pytest.fixture
def outcomes():
    rng = np.random.default_rng(0)
    first = rng.random(400) < 0.7
    second = np.where(rng.random(400) < 0.85, first, rng.random(400) < 0.9)
    return first, second


def test_the_interval_is_near_that_of_resampled_images(outcomes):
    first, second = outcomes
    found = compare_paired(first, second)
    rng = np.random.default_rng(1)
    d = second.astype(int) - first.astype(int)
    means = d[rng.integers(0, 400, (4000, 400))].mean(axis=1)
    assert found.difference == pytest.approx(d.mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)
    assert found.low < found.difference < found.high


def test_the_test_is_mcnemars(outcomes):
    first, second = outcomes
    found = compare_paired(first, second)
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    assert (found.only_first, found.only_second) == (b, c)
    exact = min(1.0, 2 * stats.binom.cdf(min(b, c), b + c, 0.5))
    assert found.p_value == pytest.approx(exact)


def test_equal_ones_do_not_differ():
    same = np.array([True, False, True])
    found = compare_paired(same, same)
    assert (found.difference, found.p_value) == (0.0, 1.0)
    # Three images show nothing: the models may differ by far more than 0.
    assert found.low < -0.3 and found.high > 0.3


def test_what_cannot_be_paired():
    with pytest.raises(ValueError, match="cannot be paired"):
        compare_paired([True], [True, False])
