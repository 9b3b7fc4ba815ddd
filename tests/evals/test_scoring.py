"""Against torch, scikit-learn and counting by hand."""

import numpy as np
import pytest
import torch

from vitcli.evals import scoring as outcomes
from vitcli.evals.scoring import best_among, filled_up, judge


@pytest.fixture
def logits():
    return (np.random.default_rng(0).normal(size=(300, 12)) * 3).astype(np.float32)


def test_one_right_output(logits):
    labels = np.random.default_rng(1).integers(0, 12, 300)
    found = judge(logits, labels, temperature=1.7)
    z = torch.from_numpy(logits).double() / 1.7
    loss = torch.nn.functional.cross_entropy(z, torch.from_numpy(labels), reduction="none")
    assert np.allclose(found.loss, loss.numpy(), rtol=0, atol=1e-12)
    assert np.allclose(found.confidence, z.softmax(1).max(1).values.numpy(), rtol=0, atol=1e-14)
    assert np.array_equal(found.predicted, logits.argmax(1))
    top5 = torch.from_numpy(logits).topk(5, dim=1).indices.numpy()
    assert np.array_equal(found.in_five, (top5 == labels[:, None]).any(1))


def test_several_right_outputs(logits):
    rng = np.random.default_rng(2)
    sets = [sorted(rng.choice(12, rng.integers(1, 4), replace=False).tolist()) for _ in logits]
    found = judge(logits, filled_up(sets))
    shares = torch.from_numpy(logits).double().softmax(1).numpy()
    best5 = np.argsort(-logits, axis=1)[:, :5]
    for i, right in enumerate(sets):
        assert found.correct[i] == (logits[i].argmax() in right)
        assert found.in_five[i] == bool(set(best5[i]) & set(right))
        assert found.loss[i] == pytest.approx(-np.log(shares[i, right].sum()), abs=1e-12)


def test_blocks_change_nothing(logits, monkeypatch):
    labels = np.arange(300) % 12
    whole, among = judge(logits, labels), best_among(logits, [7, 3, 5])
    monkeypatch.setattr(outcomes, "BLOCK", 50)
    parts = judge(logits, labels)
    for name in ("predicted", "confidence", "correct", "ahead", "loss"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name
    assert np.array_equal(among, best_among(logits, [7, 3, 5]))
    assert np.array_equal(among, np.array([3, 5, 7])[logits[:, [3, 5, 7]].argmax(1)])
