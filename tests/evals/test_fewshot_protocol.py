"""The closed form, against big_vision's own numbers, scikit-learn, and brute force."""

import json

import numpy as np
import pytest
import torch

from vitcli.errors import VitcliError
from vitcli.evals.calibration import fit_score_temperature
from vitcli.evals.fewshot.protocol import draw_shots, fewshot
from vitcli.evals.fewshot.ridge import RIDGE_L2, RidgePath, choose_ridge_l2, ridge_head


@pytest.fixture
def blobs():
    """Noisy classes with features of very different scales and one that is constant."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 12))
    labels = np.repeat(np.arange(4), 15)
    x = centres[labels] + rng.normal(size=(60, 12))
    x = x * 10.0 ** rng.uniform(-2, 2, 12) + rng.normal(size=12) * 30
    x[:, 5] = 3.0
    return x.astype(np.float32), labels


def test_reference_predictions(shared):
    cases = sorted((shared / "reference/bigvision_fewshot").glob("*/expected.json"))
    assert len(cases) >= 2
    compared = 0
    for path in cases:
        expected, data = json.loads(path.read_text()), np.load(path.parent / "data.npz")
        parts = [data[f"{s}_{k}"] for s in ("train", "test") for k in ("features", "labels")]
        for name, by_shots in expected["accuracy_default_l2"].items():
            seed = int(name.removeprefix("seed"))
            for shots, accuracy in by_shots.items():
                ours = fewshot(*parts, shots=int(shots), seed=seed)
                n = expected["n_test"]
                assert round(ours * n) == round(accuracy * n), (path, name, shots)
                compared += 1
    assert compared >= 18


def test_reference_draws_and_weights(shared):
    branches = set()
    for path in sorted((shared / "reference/bigvision_fewshot").glob("*/data.npz")):
        data = np.load(path)
        x, y = data["train_features"], data["train_labels"]
        k = int(y.max()) + 1
        for name in data.files:
            if name.startswith("idx/"):
                seed, shots = (int("".join(filter(str.isdigit, p))) for p in name.split("_"))
                assert np.array_equal(draw_shots(y, shots, seed, k), data[name])
            if not name.startswith("w/") or not name.endswith("_1024"):
                continue
            shots = int(name.split("shot")[1].split("_")[0])
            chosen = draw_shots(y, shots, 0, k)
            ridge = RidgePath(x[chosen], y[chosen], k).fit()
            branches.add(len(chosen) >= x.shape[1] + 1)
            np.testing.assert_allclose(ridge.weights, data[name], atol=5e-5)
            exact = name.replace("w/", "w64/")
            if exact in data:
                np.testing.assert_allclose(ridge.weights, data[exact], rtol=1e-8, atol=1e-10)
            mean, std = (data[f"cache/shot{shots}_{s}"][0] for s in ("mean", "std"))
            np.testing.assert_allclose(ridge.mean, mean, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(ridge.std, std, rtol=1e-4, atol=1e-6)
    assert branches == {True, False}


@pytest.mark.parametrize("count", [8, 60])
def test_against_scikit_learn(blobs, count):
    from sklearn.linear_model import Ridge

    x, y = blobs[0][::-1][:count], blobs[1][::-1][:count]
    ours = RidgePath(x, y, 4).fit(7.0)
    z = np.pad((x.astype(np.float64) - ours.mean) / ours.std, ((0, 0), (0, 1)), constant_values=100)
    theirs = Ridge(alpha=7.0, fit_intercept=False, solver="svd").fit(z, 2.0 * np.eye(4)[y] - 1)
    np.testing.assert_allclose(ours.weights, theirs.coef_.T, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("count", [8, 60])
def test_leave_one_out_is_what_refitting_gives(blobs, count):
    x, y = blobs[0][::-1][:count].astype(np.float64), blobs[1][::-1][:count]
    mean, std = x.mean(0), x.std(0) + 1e-5
    z = np.pad((x - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)
    t = 2.0 * np.eye(4)[y] - 1
    left_out = RidgePath(x, y, 4).left_out_scores(5.0)
    for i in range(0, count, 7):
        rest = np.arange(count) != i
        gram = z[rest].T @ z[rest] + 5.0 * np.eye(z.shape[1])
        weights = np.linalg.solve(gram, z[rest].T @ t[rest])
        np.testing.assert_allclose(left_out[i], z[i] @ weights, atol=1e-7)


def test_the_head_is_the_classifier_in_float32(blobs):
    x, y = blobs
    ridge = RidgePath(x, y, 4).fit()
    weight, bias = (torch.from_numpy(v).float() for v in ridge_head(RidgePath(x, y, 4), RIDGE_L2))
    head = torch.nn.functional.linear(torch.from_numpy(x), weight, bias)
    assert np.array_equal(head.argmax(1).numpy(), ridge.scores(x).argmax(1))
    share = head.softmax(1).max(1).values.mean()
    assert 0.4 < share < 0.999  # neither uniform nor certain


def test_the_temperature_is_the_likeliest():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2000, 5)) * 2
    labels = np.array([rng.choice(5, p=np.exp(z) / np.exp(z).sum()) for z in logits])
    # The scores are the true logits, a hundred times too small.
    assert fit_score_temperature(logits / 100, labels) == pytest.approx(0.01, rel=0.1)


def test_one_shot_has_a_head_too(blobs):
    x, y = blobs
    chosen = draw_shots(y, 1, 0, 4)
    weight, bias = ridge_head(RidgePath(x[chosen], y[chosen], 4), RIDGE_L2)
    assert np.isfinite(weight).all() and np.isfinite(bias).all()
    assert ((x[chosen] @ weight.T + bias).argmax(1) == y[chosen]).all()


def test_tensors_and_arrays_of_any_type(blobs):
    x, y = blobs
    expected = fewshot(x, y, x, y, shots=3, seed=1)
    assert isinstance(expected, float) and 0 < expected <= 1
    tensors = torch.from_numpy(x), torch.from_numpy(y).int()
    assert fewshot(*tensors, *tensors, shots=3, seed=1) == expected
    assert fewshot(x.tolist(), y.tolist(), x, y, shots=3, seed=1) == expected
    bf16 = tensors[0].bfloat16().requires_grad_(), tensors[1]
    assert 0 < fewshot(*bf16, *bf16, shots=3) <= 1


def test_small_and_absent_classes():
    labels = [0, 0, 0, 2]
    assert sorted(labels[i] for i in draw_shots(labels, 2, 0, 4)) == [0, 0, 2]
    few, more = draw_shots(labels, 1, 5, 4), draw_shots(labels, 3, 5, 4)
    assert few[0] == more[0] and few[-1] == more[-1]


def test_wrong_input(blobs):
    x, y = blobs
    for arguments, words in (
        ((x, y, x[:, :3], y), "with the same D"),
        ((x, y[:-1], x, y), "60 rows of features, but `labels`"),
        ((x * np.nan, y, x, y), "features of `labels` are not all finite"),
        ((x, y - 1, x, y), "integers from 0"),
    ):
        with pytest.raises(VitcliError, match=words):
            fewshot(*arguments)
    with pytest.raises(VitcliError, match="shots = 0"):
        fewshot(x, y, x, y, shots=0)


def test_the_strength_can_be_chosen(blobs):
    x, y = blobs
    rest = np.setdiff1d(np.arange(60), draw_shots(y, 5, 0, 4))
    path = RidgePath(x[draw_shots(y, 5, 0, 4)], y[draw_shots(y, 5, 0, 4)], 4)
    expected = np.mean(path.fit(choose_ridge_l2(path).l2).predict(x[rest]) == y[rest])
    assert fewshot(x, y, x[rest], y[rest], l2="auto") == expected
    with pytest.raises(VitcliError, match="l2 = best"):
        fewshot(x, y, x, y, l2="best")


def test_the_schema_knows_the_settings_of_the_methods():
    from vitcli.config.schema import FewshotSection
    from vitcli.evals.fewshot.methods import METHODS

    fields = FewshotSection.model_fields
    assert fields["method"].default in METHODS
    assert all(set(method.settings) <= set(fields) for method in METHODS.values())
