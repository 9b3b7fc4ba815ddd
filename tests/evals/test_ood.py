"""The distance to what a model knows, against scipy and scikit-learn, and what it is good for."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from vitcli.errors import VitcliError
from vitcli.evals.ood import fit_reference, load_reference, save_reference
from vitcli.weights.store import save_tensors


def clouds(n, seed, classes=3, dim=12):
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(9).normal(size=(classes, dim)) * 3
    labels = rng.integers(0, classes, n)
    scales = np.linspace(0.2, 2, dim)
    return (means[labels] + rng.normal(size=(n, dim)) * scales).astype(np.float32), labels


@pytest.fixture
def reference():
    features, labels = clouds(300, 0)
    return fit_reference(features, labels, clouds(200, 1)[0], {"data": "clouds"})


def test_distances_are_those_of_scipy(reference):
    features, labels = clouds(300, 0)
    others = clouds(50, 2)[0]
    x, z = (a.astype(np.float64) / np.linalg.norm(a, axis=1)[:, None] for a in (features, others))
    means = np.stack([x[labels == c].mean(axis=0) for c in range(3)])
    fitted = LedoitWolf(assume_centered=True).fit(x - means[labels])
    expected = cdist(z, means, "mahalanobis", VI=np.linalg.inv(fitted.covariance_)).min(axis=1)
    found = reference.distances(torch.from_numpy(others))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_the_length_of_features_does_not_matter(reference):
    features = torch.from_numpy(clouds(20, 3)[0])
    torch.testing.assert_close(
        reference.distances(7 * features), reference.distances(features), rtol=1e-4, atol=1e-4
    )


def test_shares(reference):
    held_out = reference.distances(torch.from_numpy(clouds(200, 1)[0]))
    share = reference.scores(held_out)
    rank = held_out.argsort().argsort()
    assert torch.allclose(share, rank.double() / 200)  # of itself none lies nearer
    ends = reference.scores(torch.tensor([0.0, 1e9, torch.nan]))
    assert ends.tolist() == [0.0, 1.0, 1.0]


def test_of_usual_images_a_share_above_0_9_has_one_in_ten(reference):
    share = reference.scores(reference.distances(torch.from_numpy(clouds(4000, 4)[0])))
    # The share of 200 held-out images that lie beyond a quantile: Beta, sd sqrt(0.09 / 200).
    assert float((share > 0.9).double().mean()) == pytest.approx(0.1, abs=4 * 0.0212)


def test_other_things_lie_farther(reference):
    usual = reference.distances(torch.from_numpy(clouds(200, 5)[0]))
    other = np.random.default_rng(6).normal(size=(200, 12)).astype(np.float32)
    found = torch.cat([usual, reference.distances(torch.from_numpy(other))])
    assert roc_auc_score([0] * 200 + [1] * 200, found.numpy()) > 0.95


@pytest.mark.parametrize("kind", ["one image a class", "no labels", "several labels", "dead unit"])
def test_odd_references(kind):
    features, labels = clouds(60, 0)
    if kind == "dead unit":
        features[:, 3] = 0
    targets = {
        "one image a class": np.arange(60),
        "no labels": np.zeros(60, dtype=np.int64),
        "several labels": np.ones((60, 4), dtype=np.uint8),
        "dead unit": labels,
    }[kind]
    found = fit_reference(features, targets, clouds(30, 1)[0])
    assert len(found.means) == (3 if kind == "dead unit" else 1)
    assert found.held_out.isfinite().all() and (found.held_out.diff() >= 0).all()


def test_more_dimensions_than_images():
    features, labels = clouds(20, 0, dim=64)
    found = fit_reference(features, labels, clouds(20, 1, dim=64)[0])
    other = np.random.default_rng(6).normal(size=(20, 64)).astype(np.float32)
    far = found.distances(torch.from_numpy(other))
    assert float((found.scores(far) > 0.9).double().mean()) > 0.9


def test_too_few_or_no_numbers():
    features, labels = clouds(4, 0)
    for few in ((features[:1], labels[:1], features), (features, labels, features[:0])):
        with pytest.raises(VitcliError, match="too few"):
            fit_reference(*few)
    features[0, 0] = np.nan
    with pytest.raises(VitcliError, match="not finite"):
        fit_reference(features, labels, features)


def test_stored_and_read(reference, tmp_path):
    save_reference(tmp_path / "r.safetensors", reference)
    found = load_reference(tmp_path / "r.safetensors")
    features = torch.from_numpy(clouds(20, 3)[0])
    assert torch.equal(found.distances(features), reference.distances(features))
    assert torch.equal(found.held_out, reference.held_out) and found.facts["data"] == "clouds"


def test_damaged_files(reference, tmp_path):
    path = tmp_path / "r.safetensors"
    save_tensors(path, {"centre": reference.centre}, {"vitcli_reference": '{"format": 1}'})
    with pytest.raises(VitcliError, match="cannot be used") as error:
        load_reference(path)
    assert "--reference" in error.value.hint
    for said in ('{"format": 2}', "nothing", "[]"):
        save_tensors(path, {"centre": reference.centre}, {"vitcli_reference": said})
        with pytest.raises(VitcliError, match="cannot be used"):
            load_reference(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(VitcliError, match="not a safetensors file"):
        load_reference(path)
