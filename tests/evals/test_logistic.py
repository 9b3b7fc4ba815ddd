"""Linear probes, against scikit-learn and brute force."""

import numpy as np
import pytest

from vitcli.evals.fewshot import logistic as probe
from vitcli.evals.fewshot.logistic import LOGISTIC_L2, LinearProbe, choose_logistic_l2
from vitcli.evals.fewshot.nearest_mean import NearestMean


@pytest.fixture
def cloud():
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat(np.arange(4), 40))
    centres = rng.normal(size=(4, 6))
    x = centres[labels] + 1.3 * rng.normal(size=(160, 6))
    return (x * 10.0 ** rng.uniform(-1, 1, 6) + 3).astype(np.float32), labels


def loss(found, x, y, l2):
    z = x @ found.weight.T + found.bias
    z = z - z.max(axis=1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    std = x.astype(np.float64).std(axis=0) + 1e-5
    return -log_p[np.arange(len(y)), y].sum() + l2 / 2 * ((found.weight * std) ** 2).sum()


def test_logistic_against_scikit_learn(cloud):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = cloud[0].astype(np.float64), cloud[1]
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=1 / 3, tol=1e-8)).fit(x, y)
    ours = LinearProbe(x, y, 4, 3.0)
    assert ours.converged
    assert np.array_equal(ours.predict(x), theirs.predict(x))
    z = x @ ours.weight.T + ours.bias
    z = np.exp(z - z.max(axis=1, keepdims=True))
    np.testing.assert_allclose(z / z.sum(axis=1, keepdims=True), theirs.predict_proba(x), atol=2e-3)


@pytest.mark.parametrize("l2", [0.5, 30.0])
def test_descent_comes_to_the_same_minimum(cloud, l2, monkeypatch):
    monkeypatch.setattr(probe, "SGD_STEPS", 250)
    x, y = cloud
    exact = LinearProbe(x, y, 4, l2, use_sgd=False)
    found, again = (LinearProbe(x, y, 4, l2, use_sgd=True) for _ in range(2))
    assert loss(found, x, y, l2) == pytest.approx(loss(exact, x, y, l2), rel=1e-3)
    assert np.array_equal(found.weight, again.weight)


def test_two_classes_and_absent_ones(cloud):
    x, y = cloud
    two = y < 2
    found = LinearProbe(x[two], y[two], 4)
    weight, bias = found.linear()
    assert weight.shape == (4, 6) and set(found.predict(x)) == {0, 1}
    from sklearn.linear_model import LogisticRegression

    z = (x - x[two].mean(0)) / (x[two].std(0) + 1e-5)
    theirs = LogisticRegression().fit(z[two], y[two])
    assert np.array_equal(found.predict(x), theirs.predict(z))
    assert (bias[2:] < bias[:2].min() - 50).all()
    only = LinearProbe(x[y == 3], y[y == 3], 4)
    assert set(only.predict(x)) == {3}


def test_the_strength_is_chosen_on_held_out_images(cloud):
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 20)
    noisy = np.hstack([np.eye(3)[y] * 2 + rng.normal(size=(60, 3)), rng.normal(size=(60, 80))])
    choice = choose_logistic_l2(noisy, y, 3)
    assert choice.images == 60 and len(choice.accuracies) == len(choice.candidates)
    assert choice.accuracies[choice.candidates.index(choice.l2)] == choice.accuracies.max()
    assert choice.l2 >= LOGISTIC_L2
    single = choose_logistic_l2(noisy[::20], y[::20], 3)
    assert (single.l2, single.accuracies) == (LOGISTIC_L2, None)


def test_class_means_by_hand(cloud):
    x, y = cloud[0].astype(np.float64), cloud[1]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    means = np.stack([unit[y == k].mean(axis=0) for k in range(4)])
    cosine = unit @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    found = NearestMean(x, y, 5)  # the last class has no image
    assert np.array_equal(found.predict(x), cosine.argmax(axis=1))
    weight, bias = found.linear()
    assert np.array_equal((x @ weight.T + bias).argmax(axis=1), found.predict(x))
    left_out = found._left_out_scores(np.arange(0, 160, 9))
    for row, i in enumerate(range(0, 160, 9)):
        rest = (np.arange(160) != i) & (y == y[i])
        mean = unit[rest].mean(axis=0)
        expected = unit[i] @ mean / np.linalg.norm(mean)
        assert left_out[row, y[i]] == pytest.approx(expected, abs=1e-6)


def test_class_means_of_single_images(cloud):
    first = np.unique(cloud[1], return_index=True)[1]
    weight, bias = NearestMean(cloud[0][first], cloud[1][first], 4).linear()
    assert np.isfinite(weight).all() and (bias == 0).all()
