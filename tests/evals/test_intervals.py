"""Intervals against scipy and statistics done by hand, and the coverage that they promise."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, f1_score

from vitcli.evals.intervals import (
    LeaveOneOut,
    calibration_error,
    leave_out_micro_f1,
    multi_label_intervals,
    paired_interval,
    single_label_intervals,
    wilson_interval,
)
from vitcli.evals.ranking import leave_out_average_precision
from vitcli.evals.scoring import ImageScores, confidence_bins, expected_calibration_error


def scores_of(correct, confidence):
    n = len(correct)
    zeros = np.zeros(n, np.int64)
    top5 = np.asarray(correct, dtype=float)
    return ImageScores(20, zeros, confidence, correct, top5, np.zeros(n))


@pytest.mark.parametrize(("right", "n"), [(0, 7), (1, 1), (28, 28), (99, 100), (70, 150)])
def test_wilson_is_scipys(right, n):
    wanted = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson_interval(right / n, n) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_all_images_right_does_not_prove_perfection():
    low, high = wilson_interval(1.0, 28)
    assert 0.85 < low < 0.90 and high == 1.0
    assert all(math.isnan(x) for x in wilson_interval(math.nan, 0))


def test_a_proportion_of_some_images_counts_only_these():
    correct = np.ones(200, dtype=bool)
    half = np.where(np.arange(200) < 100, np.arange(200) % 2, np.nan)
    error = calibration_error(np.full(200, 0.9), correct)
    of = single_label_intervals(scores_of(correct, np.full(200, 0.9)), {"half": half}, error).of
    assert of["half"] == wilson_interval(0.5, 100)
    assert of["top1"] == wilson_interval(1.0, 200)
    assert of["ece"] == error.interval


def wilson_coverage(n, p):
    """Exact: summed over the binomial distribution, and averaged over accuracies near p.

    At a single accuracy no interval of a discrete figure can have exactly 95 %.
    """
    k = np.arange(n + 1)
    low, high = np.array([wilson_interval(x / n, n) for x in k]).T
    near = np.linspace(p - (1 - p) / 2, p + (1 - p) / 2, 101)
    return np.mean([stats.binom.pmf(k, n, q) @ ((low <= q) & (q <= high)) for q in near])


@pytest.mark.parametrize(
    ("n", "p"), [(50, 0.98), (100, 0.99), (150, 0.99), (359, 0.993), (100, 0.5), (1000, 0.9)]
)
def test_coverage_of_an_accuracy(n, p):
    assert 0.93 <= wilson_coverage(n, p) <= 0.97


def map_of(scores, targets, self_weight=0.5):
    """Mean average precision image by image; an image counts `self_weight` at its own threshold."""
    found = []
    for s, y in zip(scores.T, targets.T, strict=True):
        terms = []
        for i in np.flatnonzero(y):
            above = (s >= s[i]) & (np.arange(len(s)) != i)
            right = (above & (y == 1)).sum() + self_weight
            terms.append(right / (above.sum() + self_weight))
        if len(terms) > 1:
            found.append(np.mean(terms))
    return np.mean(found)


def test_leaving_out_is_computing_again():
    rng = np.random.default_rng(0)
    scores = np.round(rng.random((40, 3)), 1)  # with many ties
    targets = (rng.random((40, 3)) < 0.3).astype(np.uint8)
    sklearn = np.mean([average_precision_score(targets[:, k], scores[:, k]) for k in range(3)])
    assert map_of(scores, targets, self_weight=1) == pytest.approx(sklearn)
    found = leave_out_average_precision(scores, targets)
    assert found.whole == pytest.approx(map_of(scores, targets))
    f1 = leave_out_micro_f1(scores, targets)
    assert f1.whole == pytest.approx(f1_score(targets, scores >= 0.5, average="micro"))
    for i in range(40):
        rest = np.arange(40) != i
        assert found.without[i] == pytest.approx(map_of(scores[rest], targets[rest]), abs=1e-12)
        again = f1_score(targets[rest], scores[rest] >= 0.5, average="micro")
        assert f1.without[i] == pytest.approx(again, abs=1e-12)


def test_the_jackknife_of_a_mean_is_its_t_interval():
    x = np.random.default_rng(0).normal(size=5000)
    rest = (x.sum() - x) / (len(x) - 1)
    found = LeaveOneOut(float(x.mean()), rest)
    wanted = stats.ttest_1samp(x, 0).confidence_interval()
    assert found.corrected == pytest.approx(x.mean())
    assert found.difference_interval() == pytest.approx((wanted.low, wanted.high), rel=1e-3)


def multi_label(rng, n, classes, prevalence, separation):
    targets = rng.random((n, classes)) < prevalence
    return rng.normal(size=(n, classes)) + separation * targets, targets.astype(np.uint8)


def map_coverage(rng, n, classes, prevalence, separation, trials):
    scores, targets = multi_label(rng, 1_000_000, 1, prevalence, separation)
    truth = average_precision_score(targets[:, 0], scores[:, 0])
    held = used = 0
    while used < trials:
        scores, targets = multi_label(rng, n, classes, prevalence, separation)
        if targets.sum(axis=0).min() >= 10:
            low, high = leave_out_average_precision(scores, targets).share_interval(n)
            held, used = held + (low <= truth <= high), used + 1
    return held / trials


def test_coverage_of_a_rare_class():
    """The percentile bootstrap holds the value in 9 to 15 of 100 such sets."""
    assert map_coverage(np.random.default_rng(0), 1000, 20, 0.02, 0.8, 60) >= 0.88


def test_few_images_of_a_class_give_a_reason():
    rng = np.random.default_rng(0)
    scores, targets = multi_label(rng, 100, 3, 0.3, 1.0)
    p = 1 / (1 + np.exp(-scores))
    leave_out = leave_out_average_precision(p, targets)
    low, high = multi_label_intervals(p, targets, leave_out, "abc").of["map"]
    assert low < leave_out.corrected < high
    targets[:, 1] = np.arange(100) < 3
    found = multi_label_intervals(p, targets, leave_out_average_precision(p, targets), "abc")
    assert found.of["map"] is None and "class b has 3 images" in found.reasons["map"]
    assert found.to_json()["map"] is None and "map" in found.to_json()["reasons"]
    targets[:] = 0
    found = multi_label_intervals(p, targets, leave_out_average_precision(p, targets), "abc")
    assert found.of["map"] is None


def test_a_perfect_ranking_has_an_interval():
    targets = (np.arange(60)[:, None] % 3 == np.arange(3)).astype(np.uint8)
    found = multi_label_intervals(
        targets * 0.9, targets, leave_out_average_precision(targets * 0.9, targets), "abc"
    )
    assert found.of["map"] == found.of["micro_f1"] == wilson_interval(1.0, 60)
    same = leave_out_average_precision(targets * 0.9, targets)
    low, high = (same - same).difference_interval()
    assert low == -high < 0
    one = leave_out_micro_f1(targets[:1] * 0.9, targets[:1])
    assert one.share_interval(1) == wilson_interval(1.0, 1)


def drawn(rng, n, shift):
    """A model with the log-odds `shift` times too large; its confidences, and what is right."""
    confidence = rng.beta(4, 2, n).clip(0.02, 0.999)
    odds = np.log(confidence / (1 - confidence))
    return confidence, rng.random(n) < 1 / (1 + np.exp(-odds / shift))


def true_error(shift):
    confidence, _ = drawn(np.random.default_rng(9), 400_000, shift)
    odds = np.log(confidence / (1 - confidence))
    gap = 1 / (1 + np.exp(-odds / shift)) - confidence
    return np.abs(np.bincount(confidence_bins(confidence), gap)).sum() / len(gap)


def test_a_calibrated_model_is_compared_with_itself():
    """`if_calibrated` is the mean error of models that are calibrated; debiased is near 0."""
    rng = np.random.default_rng(0)
    found = [calibration_error(*drawn(rng, 400, 1.0)) for _ in range(40)]
    shown = np.mean([one.estimate for one in found])
    assert shown == pytest.approx(np.mean([one.if_calibrated for one in found]), rel=0.08)
    assert shown > 0.04 and np.median([one.debiased for one in found]) < shown / 2
    assert np.mean([one.interval[0] == 0 for one in found]) >= 0.85


def test_a_large_error_is_hardly_changed():
    confidence, correct = drawn(np.random.default_rng(0), 20_000, 2.5)
    found = calibration_error(confidence, correct)
    assert found.estimate == pytest.approx(expected_calibration_error(confidence, correct))
    assert found.debiased == pytest.approx(found.estimate, rel=0.02)
    assert found.interval[0] < true_error(2.5) < found.interval[1]


@pytest.mark.parametrize(
    ("confidence", "correct"), [([1.0], [True]), ([0.3], [False]), ([1.0] * 9, [False] * 9)]
)
def test_an_error_of_few_images_is_finite(confidence, correct):
    found = calibration_error(np.array(confidence), np.array(correct))
    assert 0 <= found.interval[0] <= found.interval[1] <= 1 and 0 <= found.debiased <= 1


def test_coverage_of_a_calibration_error():
    rng, truth = np.random.default_rng(0), true_error(1.5)
    intervals = [calibration_error(*drawn(rng, 300, 1.5)).interval for _ in range(60)]
    assert np.mean([low <= truth <= high for low, high in intervals]) >= 0.88


def newcombe_cases():
    return [(28, 0, 0), (100, 3, 0), (400, 25, 31), (5, 5, 0)]


@pytest.mark.parametrize(("n", "only_first", "only_second"), newcombe_cases())
def test_paired_interval(n, only_first, only_second):
    low, high = paired_interval(n, only_first, only_second)
    assert -1 <= low < (only_second - only_first) / n < high <= 1 or only_first == n
    mirrored = paired_interval(n, only_second, only_first)
    assert (low, high) == pytest.approx((-mirrored[1], -mirrored[0]))


def paired_coverage(rng, n, lost, gained, trials=4000):
    drawn = rng.multinomial(n, [lost, gained, 1 - lost - gained], trials)
    found = np.array([paired_interval(n, a, b) for a, b, _ in drawn])
    return np.mean((found[:, 0] <= gained - lost) & (gained - lost <= found[:, 1]))


@pytest.mark.slow
def test_coverage_over_a_grid():
    """0.93 to 0.97 on average of each kind, and nowhere far off."""
    rng = np.random.default_rng(0)
    accuracy = [wilson_coverage(n, p) for n in (30, 100, 300, 2000) for p in (0.5, 0.9, 0.98, 0.99)]
    assert min(accuracy) >= 0.93 and max(accuracy) <= 0.97
    pairs = [
        paired_coverage(rng, n, a, b)
        for n in (50, 300, 3000)
        for a, b in ((0.05, 0.05), (0.02, 0.1), (0.1, 0.3))
    ]
    assert 0.93 <= np.mean(pairs) <= 0.97 and min(pairs) >= 0.93
    maps = [
        map_coverage(rng, n, classes, prevalence, separation, 100)
        for n, classes, prevalence in ((1000, 1, 0.03), (1000, 20, 0.02), (300, 10, 0.1))
        for separation in (0.8, 2.0, 3.0)
    ]
    assert 0.93 <= np.mean(maps) <= 0.97 and min(maps) >= 0.88
    errors = []
    for shift in (1.0, 1.2, 1.5, 2.5):
        truth = true_error(shift) if shift != 1.0 else 0.0
        for n in (100, 500, 5000):
            found = [calibration_error(*drawn(rng, n, shift)).interval for _ in range(100)]
            errors.append(np.mean([low <= truth <= high for low, high in found]))
    assert 0.93 <= np.mean(errors) <= 0.97 and min(errors) >= 0.88
