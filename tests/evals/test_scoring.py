"""Against torch, scikit-learn and counting by hand."""

import numpy as np
import pytest
import torch

from vitcli.evals import scoring
from vitcli.evals.scoring import (
    confusion_matrix,
    expected_calibration_error,
    pad_targets,
    restricted_argmax,
    score_logits,
    single_label_metrics,
    single_label_per_class,
)


def metrics_of(logits, labels):
    return single_label_metrics(score_logits(logits, labels))


@pytest.fixture
def logits():
    return (np.random.default_rng(0).normal(size=(300, 12)) * 3).astype(np.float32)


def test_one_right_output(logits):
    labels = np.random.default_rng(1).integers(0, 12, 300)
    found = score_logits(logits, labels, temperature=1.7)
    z = torch.from_numpy(logits).double() / 1.7
    loss = torch.nn.functional.cross_entropy(z, torch.from_numpy(labels), reduction="none")
    assert np.allclose(found.loss, loss.numpy(), rtol=0, atol=1e-12)
    assert np.allclose(found.confidence, z.softmax(1).max(1).values.numpy(), rtol=0, atol=1e-14)
    assert np.array_equal(found.predicted, logits.argmax(1))
    top5 = torch.from_numpy(logits).topk(5, dim=1).indices.numpy()
    assert np.array_equal(found.top5_correct, (top5 == labels[:, None]).any(1))


def test_several_right_outputs(logits):
    rng = np.random.default_rng(2)
    sets = [sorted(rng.choice(12, rng.integers(1, 4), replace=False).tolist()) for _ in logits]
    found = score_logits(logits, pad_targets(sets))
    shares = torch.from_numpy(logits).double().softmax(1).numpy()
    best5 = np.argsort(-logits, axis=1)[:, :5]
    for i, right in enumerate(sets):
        assert found.correct[i] == (logits[i].argmax() in right)
        assert found.top5_correct[i] == bool(set(best5[i]) & set(right))
        assert found.loss[i] == pytest.approx(-np.log(shares[i, right].sum()), abs=1e-12)


@pytest.mark.parametrize("number", [5, 6, 8, 1000])
def test_constant_logits_have_five_of_k_hits(number):
    found = score_logits(np.zeros((4, number), np.float32), np.arange(4))
    assert found.top5_correct == pytest.approx(np.full(4, 5 / number))


def test_equal_logits_count_as_a_sort_that_favours_no_label_counts():
    """Against the mean over many random orders of the equal ones, with one and several right."""
    rng = np.random.default_rng(3)
    logits = rng.integers(0, 3, size=(60, 9)).astype(np.float32)
    sets = [rng.choice(9, rng.integers(1, 4), replace=False).tolist() for _ in logits]
    found = score_logits(logits, pad_targets(sets)).top5_correct
    assert ((found > 0) & (found < 1)).sum() > 10
    hits, orders = np.zeros(60), 4000
    for _ in range(orders):
        best5 = np.lexsort((rng.random(logits.shape), -logits), axis=1)[:, :5]
        hits += [
            bool(set(row) & set(right)) for row, right in zip(best5.tolist(), sets, strict=True)
        ]
    assert np.abs(found - hits / orders).max() < 0.035
    assert (found[hits == orders] > 0.99).all() and (found[hits == 0] < 0.01).all()


def test_blocks_change_nothing(logits, monkeypatch):
    labels = np.arange(300) % 12
    whole, among = score_logits(logits, labels), restricted_argmax(logits, [7, 3, 5])
    monkeypatch.setattr(scoring, "BLOCK_VALUES", 50)
    parts = score_logits(logits, labels)
    for name in ("predicted", "confidence", "correct", "top5_correct", "loss"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name
    assert np.array_equal(among, restricted_argmax(logits, [7, 3, 5]))
    assert np.array_equal(among, np.array([3, 5, 7])[logits[:, [3, 5, 7]].argmax(1)])


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
    found = metrics_of(logits, labels)
    assert found.images == 400
    assert found.top1 == accuracy_score(labels, logits.argmax(1))
    assert found.top5 == top_k_accuracy_score(labels, logits, k=5)
    shares = torch.from_numpy(logits).double().softmax(1).numpy()
    assert found.loss == pytest.approx(log_loss(labels, shares), abs=1e-12)


def test_few_classes_have_no_five_best(answers):
    logits, labels = answers
    found = metrics_of(logits[:, :3], labels % 3)
    assert found.top5 == 1.0


def test_huge_logits_stay_finite():
    found = metrics_of(np.array([[1e4, 0.0], [0.0, 1e4]], np.float32), np.array([0, 0]))
    assert found.loss == pytest.approx(5e3) and found.top1 == 0.5 and found.ece == 0.5


def test_calibration_error_by_hand(answers):
    # Two images in the bin (0.8, 13/15], one of them right; one in the last bin, right.
    confidence = np.array([0.81, 0.85, 1.0])
    correct = np.array([True, False, True])
    expected = (abs(1 - 0.81 + 0 - 0.85) + 0) / 3
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected)
    logits, labels = answers
    shares = torch.from_numpy(logits).double().softmax(1).numpy()
    top, right = shares.max(1), shares.argmax(1) == labels
    total = 0.0
    for b in range(15):
        inside = (top > b / 15) & (top <= (b + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - top[inside].mean())
    assert metrics_of(logits, labels).ece == pytest.approx(total)


def test_edges_belong_to_the_lower_bin():
    assert expected_calibration_error(np.array([1 / 15]), np.array([True])) == pytest.approx(
        14 / 15
    )
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


def test_classes():
    labels, predicted = np.array([0, 0, 1, 1, 1]), np.array([0, 2, 1, 1, 3])
    found = single_label_per_class(labels, predicted, ("a", "b", "c"))
    assert list(found) == ["a", "b"]  # c has no images
    assert found["a"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "images": 2}
    assert found["b"]["recall"] == pytest.approx(2 / 3)
    counts = confusion_matrix(labels, predicted, 4)
    assert counts.tolist() == [[1, 0, 1, 0], [0, 2, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_counts_of_classes_are_scikit_learns():
    from sklearn import metrics

    rng = np.random.default_rng(3)
    labels, predicted = rng.integers(0, 5, 60), rng.integers(0, 8, 60)  # 5 to 7 have no images
    counts = metrics.confusion_matrix(labels, predicted, labels=range(8))
    assert np.array_equal(confusion_matrix(labels, predicted, 8), counts)
    assert np.array_equal(confusion_matrix(labels, predicted, 6), counts[:6, :6])
    theirs = metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(5), zero_division=0
    )
    found = single_label_per_class(labels, predicted, tuple("abcdefgh"))
    assert [tuple(row.values()) for row in found.values()] == list(zip(*theirs, strict=True))
