"""Which mistakes are described, and how often images are named."""

import numpy as np

from vitcli.evals.mistakes import NUM_COLUMNS, find_mistakes
from vitcli.evals.scoring import ImageScores


class NamedImages:
    """A split that counts the names it has given."""

    def __init__(self):
        self.named = 0

    def describe(self, index):
        self.named += 1
        return f"{index}.png"


def test_only_the_mistakes_that_are_shown_are_described():
    n, classes = 600, ("a", "b", "c")
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 3, (2, n))
    loss = rng.random(n)
    correct = labels == predicted
    scores = ImageScores(3, predicted, loss, correct, correct * 1.0, loss)
    names = [classes[k] for k in predicted]
    every, few = NamedImages(), NamedImages()
    all_of = find_mistakes(scores, every, np.arange(n), labels, classes, names)
    some = find_mistakes(scores, few, np.arange(n), labels, classes, names, most=10)
    assert some.wrong == all_of.wrong[:10] and some.confused == all_of.confused
    assert len(all_of.wrong) == int((~correct).sum())
    losses = [-np.log(one.true_probability) for one in all_of.wrong]
    assert np.all(np.diff(losses) <= 1e-12)
    wrong_pairs = {(int(true), name) for true, name in zip(labels, names, strict=True)}
    right = {(true, name) for true, name in wrong_pairs if classes[true] == name}
    assert all_of.num_pairs == len(wrong_pairs - right)
    for pair in all_of.confused:  # brute force
        both = (labels == classes.index(pair.true)) & (predicted == classes.index(pair.predicted))
        assert (pair.images, pair.of) == (both.sum(), (labels == classes.index(pair.true)).sum())
    assert few.named <= 10 + NUM_COLUMNS * len(some.confused) < every.named
