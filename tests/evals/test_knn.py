import numpy as np
import pytest

from vitcli.evals.fewshot import knn
from vitcli.evals.fewshot.knn import NearestNeighbors


@pytest.fixture
def cloud():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 150)
    centres = rng.normal(size=(6, 8))
    return (centres[labels] + 1.2 * rng.normal(size=(150, 8))).astype(np.float32), labels


@pytest.mark.parametrize("neighbors", [1, 20, 500])
def test_against_scikit_learn(cloud, neighbors, monkeypatch):
    from sklearn.neighbors import KNeighborsClassifier

    x, y = cloud
    theirs = KNeighborsClassifier(
        min(neighbors, 100), metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(x[:100], y[:100])
    expected = theirs.predict(x[100:])
    assert np.array_equal(
        NearestNeighbors(x[:100], y[:100], 6, neighbors).predict(x[100:]), expected
    )
    monkeypatch.setattr(knn, "MAX_SIMILARITIES", 700)  # seven images at a time
    assert np.array_equal(
        NearestNeighbors(x[:100], y[:100], 6, neighbors).predict(x[100:]), expected
    )


def test_weights_stay_in_range(cloud):
    x, y = cloud
    near = NearestNeighbors(x, y, 6, temperature=1e-4)  # exp(1 / 1e-4) is no number
    assert np.array_equal(near.predict(x), y)  # each is its own nearest


def test_a_row_of_zeros(cloud):
    x, y = cloud
    assert NearestNeighbors(x, y, 6).predict(np.zeros((1, 8))).shape == (1,)
