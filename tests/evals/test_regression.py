"""Errors of predicted numbers equal scikit-learn's; their intervals have the promised coverage."""

import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_rel
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from vitcli.evals.regression import (
    MIN_IMAGES,
    mae_difference_interval,
    regression_intervals,
    regression_metrics,
)

REFERENCES = {"mae": mean_absolute_error, "rmse": root_mean_squared_error, "r2": r2_score}


def drawn(n, seed=0, mean=0.0):
    rng = np.random.default_rng(seed)
    targets = rng.normal(mean, 2.0, n)
    return targets, mean + 0.8 * (targets - mean) + rng.normal(0, 1.0, n)


@pytest.mark.parametrize("mean", [0.0, 1e9])
@pytest.mark.parametrize("n", [2, 7, 1000])
def test_metrics_are_those_of_scikit_learn(n, mean):
    targets, predicted = drawn(n, mean=mean)
    found = regression_metrics(targets, predicted).to_json()
    assert found.pop("images") == n
    expected = {name: f(targets, predicted) for name, f in REFERENCES.items()}
    assert found == pytest.approx(expected, rel=1e-9)


def test_r2_is_undefined_for_one_image_and_for_equal_numbers():
    one = regression_metrics(np.array([3.0]), np.array([5.0]))
    assert (one.mae, one.rmse, one.r2) == (2.0, 2.0, None)
    targets = np.full(50, 3.3)
    assert regression_metrics(targets, targets + 0.5).r2 is None
    found = regression_intervals(targets, np.arange(50.0))
    assert found.of["r2"] is None and found.reasons == {"r2": "all numbers are equal"}
    assert found.of["mae"] is not None


def test_few_images_have_no_interval():
    found = regression_intervals(*drawn(MIN_IMAGES - 1))
    assert set(found.of.values()) == {None}
    assert set(found.reasons) == {"mae", "rmse", "r2"}


def test_intervals_are_near_scipy_s_bca_bootstrap():
    targets, predicted = drawn(300)
    found = regression_intervals(targets, predicted).of
    for name, metric in (("mae", mean_absolute_error), ("r2", r2_score)):
        reference = bootstrap(
            (targets, predicted), metric, paired=True, vectorized=False, n_resamples=600, rng=0
        ).confidence_interval
        width = reference.high - reference.low
        assert found[name] == pytest.approx(reference, abs=0.15 * width)


def test_a_perfect_model_has_an_interval_without_width():
    targets = np.arange(30.0)
    found = regression_intervals(targets, targets).of
    assert found == {"mae": (0.0, 0.0), "rmse": (0.0, 0.0), "r2": (1.0, 1.0)}


def test_the_difference_of_two_models_is_a_paired_t_test():
    first, second = np.abs(np.random.default_rng(0).normal(size=(2, 40)))
    low, high = ttest_rel(second, first).confidence_interval()
    assert mae_difference_interval(first, second) == pytest.approx((low, high))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "least"), [(10, 0.87), (20, 0.87), (50, 0.91), (200, 0.91)])
def test_coverage(n, least):
    true = regression_metrics(*drawn(1_000_000, seed=1))
    hits = dict.fromkeys(REFERENCES, 0)
    for seed in range(400):
        found = regression_intervals(*drawn(n, seed=seed + 2)).of
        for name in hits:
            low, high = found[name]
            hits[name] += low <= getattr(true, name) <= high
    assert all(least <= count / 400 <= 0.99 for count in hits.values()), hits
