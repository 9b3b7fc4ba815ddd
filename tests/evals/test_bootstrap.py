"""Against scipy's bootstrap, scikit-learn's average precision, and the coverage promised."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score

from vitcli.evals.bootstrap import (
    RankedScores,
    percentile_interval,
    resample_counts,
    resampled_map,
    single_label_intervals,
)
from vitcli.evals.scoring import ImageScores, expected_calibration_error, score_logits


def scores_of(correct, confidence):
    n = len(correct)
    zeros = np.zeros(n, np.int64)
    top5 = np.asarray(correct, dtype=float)
    return ImageScores(20, zeros, confidence, correct, top5, np.zeros(n))


def test_every_resample_has_as_many_images():
    blocks = list(resample_counts(50, 7, seed=3))
    counts = np.concatenate(blocks)
    assert counts.shape == (7, 50) and (counts.sum(1) == 50).all()
    assert np.array_equal(counts, np.concatenate(list(resample_counts(50, 7, seed=3))))
    assert not np.array_equal(counts, np.concatenate(list(resample_counts(50, 7, seed=4))))


def test_shares_against_scipy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 8)).astype(np.float32)
    labels = rng.integers(0, 8, 400)
    logits[np.arange(400), labels] += 1.5
    found = score_logits(logits, labels)
    of = single_label_intervals(found, {"odd": labels % 2}).of
    for name, values in (
        ("top1", found.correct),
        ("top5", found.top5_correct),
        ("odd", labels % 2),
    ):
        wanted = stats.bootstrap(
            (values.astype(float),), np.mean, n_resamples=4000, method="percentile", rng=rng
        ).confidence_interval
        assert of[name] == pytest.approx((wanted.low, wanted.high), abs=0.006)


def test_what_does_not_belong_to_a_share():
    """The mean is over the images that have a value, in each resample."""
    correct = np.ones(200, dtype=bool)
    values = np.where(np.arange(200) < 100, np.arange(200) % 2, np.nan)
    of = single_label_intervals(scores_of(correct, np.full(200, 0.9)), {"half": values}).of
    assert of["half"][0] == pytest.approx(0.5 - 0.098, abs=0.02)
    assert of["half"][1] == pytest.approx(0.5 + 0.098, abs=0.02)
    assert of["top1"] == (1.0, 1.0)


def test_calibration_error_is_that_of_resampled_images():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.4, 1.0, 500)
    correct = rng.random(500) < confidence - 0.15
    of = single_label_intervals(scores_of(correct, confidence), {}).of
    picks = rng.integers(0, 500, (1500, 500))
    errors = np.array([expected_calibration_error(confidence[p], correct[p]) for p in picks])
    figure = expected_calibration_error(confidence, correct)
    wanted = np.quantile(errors, [0.025, 0.975]) - errors.mean() + figure
    assert of["ece"] == pytest.approx(wanted, abs=0.005)
    assert of["ece"][0] < figure < of["ece"][1]


def test_a_model_that_is_calibrated_has_its_error_inside():
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.1, 1.0, 400)
    correct = rng.random(400) < confidence
    low, high = single_label_intervals(scores_of(correct, confidence), {}).of["ece"]
    assert 0 <= low <= expected_calibration_error(confidence, correct) <= high


def test_coverage():
    """Of 300 samples about 95 % of the intervals hold the share that they were drawn with."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        correct = rng.random(150) < 0.7
        found = scores_of(correct, np.full(150, 0.7))
        low, high = single_label_intervals(found, {}, num_resamples=300).of["top1"]
        held += low <= 0.7 <= high
    assert 0.90 <= held / 300 <= 0.98


def test_average_precision_is_scikit_learns():
    rng = np.random.default_rng(0)
    scores = np.round(rng.random((60, 4)), 1)  # with many ties
    targets = (rng.random((60, 4)) < 0.3).astype(np.uint8)
    targets[:, 3] = 0
    ranked = RankedScores(scores, targets)
    for counts in (np.ones(60), *next(resample_counts(60, 5, seed=0))):
        each = [
            average_precision_score(targets[:, k], scores[:, k], sample_weight=counts)
            for k in range(3)
            if (counts * targets[:, k]).any()
        ]
        assert ranked.mean_average_precision(counts) == pytest.approx(np.mean(each), abs=1e-12)


def test_two_models_are_drawn_the_same_images():
    rng = np.random.default_rng(0)
    targets = (rng.random((80, 3)) < 0.4).astype(np.uint8)
    scores = rng.random((80, 3)) + 0.4 * targets
    one, two = (resampled_map(s, targets, num_resamples=50) for s in (scores, scores * 2))
    assert np.array_equal(one, two)
    low, high = percentile_interval(one)
    assert low < np.mean(one) < high
