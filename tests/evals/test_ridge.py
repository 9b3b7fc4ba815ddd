"""The regularisation path, against scikit-learn, brute force, and its own promise of memory."""

import tracemalloc

import numpy as np
import pytest

from vitcli.evals.fewshot import arrays, ridge
from vitcli.evals.fewshot.arrays import evenly_spaced
from vitcli.evals.fewshot.ridge import (
    L2_CANDIDATES,
    RIDGE_L2,
    RidgePath,
    choose_ridge_l2,
    ridge_head,
)


@pytest.fixture
def blobs():
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(5, 10))
    labels = rng.permutation(np.repeat(np.arange(5), 8))
    x = centres[labels] + 1.5 * rng.normal(size=(40, 10))
    return (x * 10.0 ** rng.uniform(-1, 1, 10) + 5).astype(np.float32), labels


def design(path):
    return path.standardised(slice(None)), 2.0 * np.eye(path.num_classes)[path.labels] - 1


@pytest.mark.parametrize("count", [9, 11, 40])  # fewer rows than columns, as many, more
def test_one_decomposition_gives_every_strength(blobs, count, monkeypatch):
    from sklearn.linear_model import Ridge

    decompositions = []
    real = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda a: decompositions.append(len(a)) or real(a))
    path = RidgePath(blobs[0][:count], blobs[1][:count], 5)
    a, y = design(path)
    for l2 in L2_CANDIDATES:
        theirs = Ridge(alpha=l2, fit_intercept=False, solver="svd").fit(a, y)
        ours = path.fit(l2).weights
        np.testing.assert_allclose(ours, theirs.coef_.T, rtol=1e-6, atol=1e-9)
    assert decompositions == [min(count, 11)]


@pytest.mark.parametrize("count", [9, 40])
@pytest.mark.parametrize("exact", [True, False])
def test_images_left_out_are_judged_as_by_refitting(blobs, count, exact, monkeypatch):
    monkeypatch.setattr(ridge, "MAX_FLOAT64_SCORES", 10**9 if exact else 0)
    monkeypatch.setattr(arrays, "PART_VALUES", 15)  # three rows at a time
    path = RidgePath(blobs[0][:count], blobs[1][:count], 5)
    a, y = design(path)
    rows, strengths = np.arange(0, count, 2), (1.0, 64.0, 4096.0)
    expected = np.zeros((3, len(rows)), dtype=bool)
    for s, l2 in enumerate(strengths):
        for r, i in enumerate(rows):
            rest = np.arange(count) != i
            gram = a[rest].T @ a[rest] + l2 * np.eye(a.shape[1])
            scores = a[i] @ np.linalg.solve(gram, a[rest].T @ y[rest])
            expected[s, r] = scores.argmax() == path.labels[i]
    assert np.array_equal(path.left_out_correct(strengths, rows), expected)
    assert 0 < expected.mean() < 1


def test_in_parts_or_at_once(blobs, monkeypatch):
    whole = RidgePath(*blobs, 5).fit()
    monkeypatch.setattr(arrays, "PART_VALUES", 30)
    parts = RidgePath(*blobs, 5).fit()
    np.testing.assert_allclose(parts.weights, whole.weights, rtol=1e-9, atol=1e-12)
    assert np.array_equal(parts.predict(blobs[0]), whole.scores(blobs[0]).argmax(1))


def test_nothing_of_the_size_of_images_times_classes(monkeypatch):
    """21k classes x 1024 features fit where their scores or targets would not; here smaller."""
    monkeypatch.setattr(arrays, "PART_VALUES", 2**16)
    n, k, d = 4000, 2000, 16
    x = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    y = np.arange(n) % k
    RidgePath(x[:50], y[:50], k).fit().predict(x[:10])  # what is imported on the way
    tracemalloc.start()
    path = RidgePath(x, y, k)
    choice = choose_ridge_l2(path, (1.0, 1024.0))
    path.fit(choice.l2).predict(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert choice.images == ridge.MAX_LEFT_OUT
    assert peak < n * k * 8 / 8, f"{peak / 1e6:.0f} MB"


def test_the_choice_is_what_leaving_out_speaks_for(blobs):
    rng = np.random.default_rng(0)
    path = RidgePath(*blobs, 5)
    choice = choose_ridge_l2(path)
    assert choice.candidates == L2_CANDIDATES and choice.images == 40
    rows = np.arange(40)
    shares = path.left_out_correct(L2_CANDIDATES, rows).mean(axis=1)
    np.testing.assert_array_equal(choice.accuracies, shares)
    chosen = choice.accuracies[L2_CANDIDATES.index(choice.l2)]
    assert choice.accuracies.max() - chosen <= np.sqrt(40) / 40
    # Features of pure noise in 60 of 64 columns ask for a strong penalty, clean ones for none.
    y = np.repeat(np.arange(4), 20)
    signal = np.eye(4)[y] * 4 + rng.normal(size=(80, 4))
    noisy = choose_ridge_l2(RidgePath(np.hstack([signal, rng.normal(size=(80, 60))]), y, 4))
    weak = [a for s, a in zip(noisy.candidates, noisy.accuracies, strict=True) if s <= 4]
    assert max(weak) < noisy.accuracies.max() and noisy.l2 > 4
    clean = choose_ridge_l2(RidgePath(np.eye(4)[y] + rng.normal(size=(80, 4)) / 100, y, 4))
    assert clean.l2 == RIDGE_L2 and clean.accuracies.max() == 1  # all alike: the protocol's


def test_a_single_image_of_each_class_chooses_nothing(blobs):
    first = np.unique(blobs[1], return_index=True)[1]
    choice = choose_ridge_l2(RidgePath(blobs[0][first], blobs[1][first], 5))
    assert (choice.l2, choice.accuracies, choice.images) == (RIDGE_L2, None, 0)
    # One class with a single image: it is not among those left out.
    rows = np.flatnonzero((blobs[1] != 2) | (np.arange(40) == first[2]))
    assert choose_ridge_l2(RidgePath(blobs[0][rows], blobs[1][rows], 5)).images == 32


def test_spread():
    assert evenly_spaced(np.arange(10) * 3, 4).tolist() == [0, 6, 15, 21]
    assert evenly_spaced(np.arange(3), 4).tolist() == [0, 1, 2]


def test_the_head_of_many_classes_is_fitted_on_some_images(blobs, monkeypatch):
    whole = ridge_head(RidgePath(*blobs, 5), RIDGE_L2)
    monkeypatch.setattr(arrays, "PART_VALUES", 5 * 30)  # thirty images
    some = ridge_head(RidgePath(*blobs, 5), RIDGE_L2)
    ratio = some[0] / whole[0]
    assert ratio.min() > 0.5 and ratio.max() < 2  # another temperature, the same classifier
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-9)
