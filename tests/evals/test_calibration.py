"""Temperatures against scipy's minimiser, torch's gradient and logits of a known temperature."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from vitcli.errors import VitcliError
from vitcli.evals.calibration import fit_score_temperature, fit_temperature
from vitcli.evals.scoring import expected_calibration_error, pad_targets, reliability_bins


def drawn(n=4000, k=7, temperature=2.5, seed=0):
    """Labels drawn from softmax(logits / temperature): that temperature is the right one."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(n, k)) * 4).astype(np.float32)
    shares = torch.from_numpy(logits / temperature).double().softmax(1).numpy()
    labels = (shares.cumsum(1) > rng.random((n, 1))).argmax(1)
    return logits, labels


def mean_loss(logits, labels, temperature):
    z = torch.from_numpy(logits).double() / temperature
    return float(torch.nn.functional.cross_entropy(z, torch.from_numpy(labels)))


def test_the_least_loss():
    logits, labels = drawn()
    found = fit_temperature(logits, labels)
    best = minimize_scalar(
        lambda x: mean_loss(logits, labels, np.exp(x)), bounds=(-5, 5), options={"xatol": 1e-9}
    )
    assert found == pytest.approx(np.exp(best.x), rel=1e-6)
    assert found == pytest.approx(2.5, rel=0.05)
    t = torch.tensor(found, dtype=torch.float64, requires_grad=True)
    z = torch.from_numpy(logits).double()
    torch.nn.functional.cross_entropy(z / t, torch.from_numpy(labels)).backward()
    assert abs(float(t.grad)) < 1e-9


def test_it_is_that_of_any_scale():
    logits, labels = drawn(500)
    assert fit_temperature(logits * 8, labels) == pytest.approx(8 * fit_temperature(logits, labels))


def test_a_calibrated_model_has_less_error():
    logits, labels = drawn(temperature=3.0)
    t = fit_temperature(*drawn(temperature=3.0, seed=1))
    errors = []
    for scale in (1.0, t):
        shares = torch.from_numpy(logits / scale).double().softmax(1).numpy()
        errors.append(expected_calibration_error(shares.max(1), shares.argmax(1) == labels))
    assert errors[1] < 0.03 < 0.2 < errors[0]


def test_several_right_outputs():
    logits, labels = drawn(800)
    sets = pad_targets([(int(y), (int(y) + 3) % 7) for y in labels])
    found = fit_temperature(logits, sets)

    def loss(x):
        z = torch.from_numpy(logits).double() / np.exp(x)
        both = torch.stack([z.log_softmax(1)[range(800), sets[:, j]] for j in (0, 1)])
        return -float(both.logsumexp(0).mean())

    best = minimize_scalar(loss, bounds=(-5, 5), options={"xatol": 1e-9})
    assert found == pytest.approx(np.exp(best.x), rel=1e-5)


def test_images_that_are_all_right_ask_for_no_certainty():
    logits = (np.random.default_rng(0).normal(size=(30, 4)) * 2).astype(np.float32)
    found = fit_temperature(logits, logits.argmax(1))
    assert 0.01 < found < 10
    assert found == pytest.approx(
        fit_score_temperature(logits.astype(float), logits.argmax(1)), rel=1e-4
    )


def test_worse_than_a_guess():
    logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    with pytest.raises(VitcliError, match="no temperature"):
        fit_temperature(logits, logits.argmin(1))


def test_labels_each_for_itself():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(600, 5)) * 3).astype(np.float32)
    targets = (rng.random((600, 5)) < 1 / (1 + np.exp(-logits / 1.8))).astype(np.uint8)
    found = fit_temperature(logits, targets, "sigmoid")
    y, z = torch.from_numpy(targets).double(), torch.from_numpy(logits).double()
    best = minimize_scalar(
        lambda x: float(
            torch.nn.functional.binary_cross_entropy_with_logits(z / float(np.exp(x)), y)
        ),
        bounds=(-5, 5),
        options={"xatol": 1e-9},
    )
    assert found == pytest.approx(np.exp(best.x), rel=1e-6)
    all_right = (logits > 0).astype(np.uint8)
    assert 0.001 < fit_temperature(logits, all_right, "sigmoid") < 5


def test_bins_are_those_of_the_error():
    logits, labels = drawn(700)
    shares = torch.from_numpy(logits).double().softmax(1).numpy()
    confidence, correct = shares.max(1), shares.argmax(1) == labels
    bins = reliability_bins(confidence, correct)
    full = bins.images > 0
    gap = np.abs(bins.accuracy - bins.confidence)[full] @ bins.images[full] / 700
    assert gap == pytest.approx(expected_calibration_error(confidence, correct))
    assert bins.images.sum() == 700 and len(bins.to_json()) == full.sum()
    inside = (confidence > 14 / 15) & (confidence <= 1)
    assert bins.accuracy[-1] == pytest.approx(correct[inside].mean())
