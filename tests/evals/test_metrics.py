"""Against scikit-learn, torch and counting by hand."""

import numpy as np
import pytest
import torch

from vitcli.evals.metrics import calibration_error, confusion_matrix, measure, per_class


@pytest.fixture
def answers():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, 400)
    logits = rng.normal(size=(400, 8)).astype(np.float32)
    logits[np.arange(400), labels] += 1.5
    return logits, labels


def test_accuracies_and_loss(answers):
    from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score

    logits, labels = answers
    found = measure(logits, labels)
    assert found.images == 400
    assert found.top1 == accuracy_score(labels, logits.argmax(1))
    assert found.top5 == top_k_accuracy_score(labels, logits, k=5)
    shares = torch.from_numpy(logits).double().softmax(1).numpy()
    assert found.loss == pytest.approx(log_loss(labels, shares), abs=1e-12)


def test_few_classes_have_no_five_best(answers):
    logits, labels = answers
    found = measure(logits[:, :3], labels % 3)
    assert found.top5 == 1.0


def test_huge_logits_stay_finite():
    found = measure(np.array([[1e4, 0.0], [0.0, 1e4]], np.float32), np.array([0, 0]))
    assert found.loss == pytest.approx(5e3) and found.top1 == 0.5 and found.ece == 0.5


def test_calibration_error_by_hand(answers):
    # Two images in the bin (0.8, 13/15], one of them right; one in the last bin, right.
    confidence = np.array([0.81, 0.85, 1.0])
    correct = np.array([True, False, True])
    expected = (abs(1 - 0.81 + 0 - 0.85) + 0) / 3
    assert calibration_error(confidence, correct) == pytest.approx(expected)
    logits, labels = answers
    shares = torch.from_numpy(logits).double().softmax(1).numpy()
    top, right = shares.max(1), shares.argmax(1) == labels
    total = 0.0
    for b in range(15):
        inside = (top > b / 15) & (top <= (b + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - top[inside].mean())
    assert measure(logits, labels).ece == pytest.approx(total)


def test_edges_belong_to_the_lower_bin():
    assert calibration_error(np.array([1 / 15]), np.array([True])) == pytest.approx(14 / 15)
    assert calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


def test_classes():
    labels, predicted = np.array([0, 0, 1, 1, 1]), np.array([0, 2, 1, 1, 3])
    found = per_class(labels, predicted, ("a", "b", "c"))
    assert list(found) == ["a", "b"]  # c has no images
    assert found["a"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "images": 2}
    assert found["b"]["recall"] == pytest.approx(2 / 3)
    counts = confusion_matrix(labels, predicted, 4)
    assert counts.tolist() == [[1, 0, 1, 0], [0, 2, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
