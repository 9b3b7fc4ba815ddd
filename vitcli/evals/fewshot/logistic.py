"""Linear probes: logistic regression on frozen features, and the nearest class mean."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vitcli.evals.fewshot.knn import unit
from vitcli.evals.fewshot.protocol import Choice, fit_temperature, spread_over
from vitcli.evals.fewshot.ridge import (
    PART,
    STD_FLOOR,
    Floats,
    Ints,
    class_sums,
    floats,
    ints,
    parts_of,
    sum_rows,
    to_array,
)

LOGISTIC_L2 = 1.0
LOGISTIC_PATH = tuple(4.0**power for power in range(-2, 7))  # the strengths that are tried
FOLDS = 5
# L-BFGS goes through all images hundreds of times: beyond so many multiplications each time,
# gradient descent on parts of them is sooner done.
MOST_LBFGS = 2 * 10**9
MAX_ITERATIONS = 1000
SGD_BATCH, SGD_STEPS, SGD_EPOCHS = 1024, 2000, 10
NEVER = 100.0  # logits by which a class without images lies below all others


class ClassMeans:
    """The nearest class mean: the class whose mean of unit-length features has the least angle.

    Linear in the features but for their length, so that a dense layer gives the same predictions.

    Attributes:
        means: (K, D), each of length 1; 0 for a class without images.
    """

    def __init__(self, features: ArrayLike, labels: ArrayLike, num_classes: int) -> None:
        self.x, self.labels, self.num_classes = to_array(features), ints(labels), num_classes
        self.sums = np.zeros((num_classes, self.x.shape[1]))
        for rows in parts_of(self.x):
            z = unit(self.x[rows]).double().numpy()
            self.sums += class_sums(z, self.labels[rows], num_classes)
        self.counts = np.bincount(self.labels, minlength=num_classes)
        self.means = _normalised(self.sums)

    def predict(self, features: ArrayLike) -> Ints:
        """(n, D) -> (n,)."""
        return argmax_of(features, *self._bare_head())

    def linear(self) -> tuple[Floats, Floats]:
        """(K, D) weight and (K,) bias of a dense layer with the same predictions.

        One temperature for all, fitted on the similarities to means without the image itself,
        makes probabilities of them; 1 where every class has a single image.
        """
        weight, bias = self._bare_head()
        most = max(1, PART // max(self.x.shape[1], self.num_classes))
        rows = spread_over(np.flatnonzero(self.counts[self.labels] >= 2), most)
        temperature = 1.0
        if len(rows):
            temperature = fit_temperature(self._left_out(rows), self.labels[rows])
        some = floats(self.x[spread_over(np.arange(len(self.x)), most)])
        length = float(np.linalg.norm(some, axis=1).mean()) or 1.0
        return weight / (temperature * length), bias

    def _left_out(self, rows: Ints) -> Floats:
        """(m, K): cosine of each of these images to the means of the others."""
        z, y = unit(self.x[rows]).double().numpy(), self.labels[rows]
        similar = z @ self.means.T
        similar[np.arange(len(rows)), y] = (z * _normalised(self.sums[y] - z)).sum(axis=1)
        return np.asarray(similar)

    def _bare_head(self) -> tuple[Floats, Floats]:
        return self.means, np.where(self.counts > 0, 0.0, -NEVER)


class Logistic:
    """Multinomial logistic regression on standardised features, the bias without a penalty.

    Minimises the sum of the cross-entropies plus l2 / 2 |W|^2 (scikit-learn's C is 1 / l2): by
    scikit-learn's L-BFGS, and for large sets by gradient descent with Nesterov's momentum.

    Attributes:
        weight: (K, D), for features as they are; bias: (K,).
        converged: whether L-BFGS came to its end; descent always says yes.
    """

    def __init__(
        self,
        features: ArrayLike,
        labels: ArrayLike,
        num_classes: int,
        l2: float = LOGISTIC_L2,
        *,
        seed: int = 0,
        descend: bool | None = None,
    ) -> None:
        x, y = to_array(features), ints(labels)
        if descend is None:
            descend = x.size * num_classes > MOST_LBFGS
        mean = sum_rows(x, lambda a: a) / len(x)
        std = np.sqrt(sum_rows(x, lambda a: (a - mean) ** 2) / len(x)) + STD_FLOOR
        there, own = np.unique(y, return_inverse=True)
        self.converged = True
        if len(there) < 2:
            weight, bias = np.zeros((len(there), x.shape[1])), np.zeros(len(there))
        elif descend:
            weight, bias = descend_logistic(x, own, mean, std, l2, seed)
        else:
            weight, bias, self.converged = _lbfgs((floats(x) - mean) / std, own, l2)
        self.weight = np.zeros((num_classes, x.shape[1]))
        self.bias = np.full(num_classes, float(bias.min()) - NEVER)
        self.weight[there] = weight / std
        self.bias[there] = bias - self.weight[there] @ mean

    def predict(self, features: ArrayLike) -> Ints:
        """(n, D) -> (n,)."""
        return argmax_of(features, self.weight, self.bias)

    def linear(self) -> tuple[Floats, Floats]:
        """(K, D) weight and (K,) bias of a dense layer under a softmax."""
        return self.weight, self.bias


def choose_logistic_l2(
    features: ArrayLike,
    labels: ArrayLike,
    num_classes: int,
    strengths: Sequence[float] = LOGISTIC_PATH,
    seed: int = 0,
) -> Choice:
    """The strength with the best accuracy on held-out images of the training set.

    Five parts of it are held out in turn, of large sets one; each has its share of every class.
    Of several that are equally good the one in the middle.
    """
    x, y = to_array(features), ints(labels)
    counts = np.bincount(y, minlength=num_classes)
    if counts.max() < 2:
        return Choice(LOGISTIC_L2, tuple(strengths), None, 0)
    fold, rng = np.zeros(len(y), dtype=np.int64), np.random.default_rng(seed)
    for c in np.flatnonzero(counts):
        members = np.flatnonzero(y == c)
        fold[rng.permutation(members)] = (np.arange(len(members)) + c) % FOLDS
    fold[counts[y] < 2] = -1  # nobody else could teach its class
    folds = range(1 if x.size * num_classes > MOST_LBFGS else FOLDS)
    right, seen = np.zeros(len(strengths)), 0
    for held in folds:
        test, train = fold == held, fold != held
        seen += int(test.sum())
        for i, l2 in enumerate(strengths):
            probe = Logistic(x[train], y[train], num_classes, l2, seed=seed)
            right[i] += (probe.predict(x[test]) == y[test]).sum() if test.any() else 0
    accuracies = right / max(seen, 1)
    best = np.flatnonzero(accuracies == accuracies.max())
    return Choice(strengths[best[len(best) // 2]], tuple(strengths), accuracies, seen)


def _lbfgs(x: Floats, labels: Ints, l2: float) -> tuple[Floats, Floats, bool]:
    """(n, D) standardised, (n,) -> (K, D), (K,) and whether it converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always", ConvergenceWarning)
        found = LogisticRegression(C=1 / l2, max_iter=MAX_ITERATIONS).fit(x, labels)
    weight, bias = found.coef_, found.intercept_
    if len(weight) == 1:  # of two classes scikit-learn gives their difference
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias, not any(issubclass(one.category, ConvergenceWarning) for one in met)


def descend_logistic(
    x: NDArray[np.generic], labels: Ints, mean: Floats, std: Floats, l2: float, seed: int = 0
) -> tuple[Floats, Floats]:
    """(n, D), (n,) -> (K, D), (K,): the same minimum, met by descent on parts of the images.

    The rate comes down along a cosine from the inverse of the largest curvature there is: half the
    largest eigenvalue of the features' covariance, and the penalty.
    """
    n, d = x.shape
    num_classes = int(labels.max()) + 1
    rng = np.random.default_rng(seed)
    size = min(SGD_BATCH, n)
    steps = max(SGD_STEPS, SGD_EPOCHS * n // size)
    centre, scale = (torch.from_numpy(v).float() for v in (mean, std))

    def batch(rows: Ints) -> Tensor:
        return (torch.from_numpy(np.array(x[rows], dtype=np.float32)) - centre) / scale

    sample = batch(np.sort(rng.choice(n, min(n, 8 * SGD_BATCH), replace=False)))
    curvature = float(torch.linalg.eigvalsh(sample.T @ sample / len(sample))[-1]) / 2 + l2 / n
    weight = torch.zeros(num_classes, d, requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=1 / curvature, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order, at = rng.permutation(n), 0
    for _ in range(steps):
        if at + size > n:
            order, at = rng.permutation(n), 0
        rows = np.sort(order[at : at + size])
        at += size
        optimizer.zero_grad()
        logits = F.linear(batch(rows), weight, bias)
        loss = F.cross_entropy(logits, torch.from_numpy(labels[rows]))
        (loss + l2 / (2 * n) * weight.square().sum()).backward()
        optimizer.step()
        schedule.step()
    return tuple(v.detach().double().numpy() for v in (weight, bias))  # type: ignore[return-value]


def argmax_of(features: ArrayLike, weight: Floats, bias: Floats) -> Ints:
    """(n, D) -> (n,): the largest logit of a dense layer, without holding all logits."""
    x = to_array(features)
    parts = [
        (floats(x[rows]) @ weight.T + bias).argmax(axis=1) for rows in parts_of(x, len(weight))
    ]
    return np.concatenate(parts).astype(np.int64)


def _normalised(rows: Floats) -> Floats:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0))
