"""Linear probe: multinomial logistic regression on frozen features."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vitcli.evals.fewshot.arrays import (
    ABSENT_CLASS_LOGIT,
    Floats,
    Ints,
    argmax_linear,
    mean_and_std,
    to_array,
    to_float64,
    to_int64,
)
from vitcli.evals.fewshot.ridge import STD_FLOOR, L2Choice

LOGISTIC_L2 = 1.0
LOGISTIC_CANDIDATES = tuple(4.0**power for power in range(-2, 7))
NUM_FOLDS = 5
# L-BFGS passes over all images hundreds of times. Beyond so many multiplications per pass,
# stochastic gradient descent is faster.
MAX_LBFGS_OPERATIONS = 2 * 10**9
MAX_ITERATIONS = 1000
SGD_BATCH, SGD_STEPS, SGD_EPOCHS = 1024, 2000, 10


class LinearProbe:
    """Logistic regression on standardised features; the bias is not regularised.

    Minimises the summed cross-entropy plus l2 / 2 |W|^2 (scikit-learn's C is 1 / l2).

    Attributes:
        weight, bias: (K, D) and (K,), for features that are not standardised.
        converged: False if L-BFGS reached its last iteration.
    """

    def __init__(
        self,
        features: ArrayLike,
        labels: ArrayLike,
        num_classes: int,
        l2: float = LOGISTIC_L2,
        *,
        seed: int = 0,
        use_sgd: bool | None = None,
    ) -> None:
        x, y = to_array(features), to_int64(labels)
        if use_sgd is None:
            use_sgd = x.size * num_classes > MAX_LBFGS_OPERATIONS
        mean, std = mean_and_std(x)
        std = std + STD_FLOOR
        # Classes without images have no finite optimum; they get a low bias below.
        present, own = np.unique(y, return_inverse=True)
        self.converged = True
        if len(present) < 2:
            weight, bias = np.zeros((len(present), x.shape[1])), np.zeros(len(present))
        elif use_sgd:
            weight, bias = fit_by_sgd(x, own, mean, std, l2, seed)
        else:
            weight, bias, self.converged = _fit_by_lbfgs((to_float64(x) - mean) / std, own, l2)
        self.weight = np.zeros((num_classes, x.shape[1]))
        self.bias = np.full(num_classes, float(bias.min()) - ABSENT_CLASS_LOGIT)
        # Undo the standardisation, so that the weights apply to features as they are.
        self.weight[present] = weight / std
        self.bias[present] = bias - self.weight[present] @ mean

    def predict(self, features: ArrayLike) -> Ints:
        """(n, D) -> (n,)."""
        return argmax_linear(features, self.weight, self.bias)

    def linear(self) -> tuple[Floats, Floats]:
        """(K, D) weight and (K,) bias of a linear layer under a softmax."""
        return self.weight, self.bias


def choose_logistic_l2(
    features: ArrayLike,
    labels: ArrayLike,
    num_classes: int,
    candidates: Sequence[float] = LOGISTIC_CANDIDATES,
    seed: int = 0,
) -> L2Choice:
    """Choose l2 by stratified cross-validation on the training images; 1 fold of large sets."""
    x, y = to_array(features), to_int64(labels)
    counts = np.bincount(y, minlength=num_classes)
    if counts.max() < 2:
        return L2Choice(LOGISTIC_L2, tuple(candidates), None, 0)
    fold, rng = np.zeros(len(y), dtype=np.int64), np.random.default_rng(seed)
    for c in np.flatnonzero(counts):
        members = np.flatnonzero(y == c)
        # `+ c`: small classes start at different folds, so that the folds get equal sizes.
        fold[rng.permutation(members)] = (np.arange(len(members)) + c) % NUM_FOLDS
    fold[counts[y] < 2] = -1  # never left out: no other image shows the class
    folds = range(1 if x.size * num_classes > MAX_LBFGS_OPERATIONS else NUM_FOLDS)
    hits, images = np.zeros(len(candidates)), 0
    for held_out in folds:
        test, train = fold == held_out, fold != held_out
        images += int(test.sum())
        for i, l2 in enumerate(candidates):
            probe = LinearProbe(x[train], y[train], num_classes, l2, seed=seed)
            hits[i] += (probe.predict(x[test]) == y[test]).sum() if test.any() else 0
    accuracies = hits / max(images, 1)
    best = np.flatnonzero(accuracies == accuracies.max())
    l2 = candidates[best[len(best) // 2]]  # of equal values the middle one: farthest from worse
    return L2Choice(l2, tuple(candidates), accuracies, images)


def _fit_by_lbfgs(x: Floats, labels: Ints, l2: float) -> tuple[Floats, Floats, bool]:
    """(n, D) standardised, (n,) -> (K, D), (K,), whether it converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        found = LogisticRegression(C=1 / l2, max_iter=MAX_ITERATIONS).fit(x, labels)
    weight, bias = found.coef_, found.intercept_
    if len(weight) == 1:  # for two classes scikit-learn returns one difference of logits
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias, not any(issubclass(one.category, ConvergenceWarning) for one in caught)


def fit_by_sgd(
    x: NDArray[np.generic], labels: Ints, mean: Floats, std: Floats, l2: float, seed: int = 0
) -> tuple[Floats, Floats]:
    """(n, D), (n,) -> (K, D), (K,): the same minimum by SGD with Nesterov momentum."""
    n, d = x.shape
    num_classes = int(labels.max()) + 1
    rng = np.random.default_rng(seed)
    size = min(SGD_BATCH, n)
    steps = max(SGD_STEPS, SGD_EPOCHS * n // size)
    centre, scale = (torch.from_numpy(v).float() for v in (mean, std))

    def batch(rows: Ints) -> Tensor:
        return (torch.from_numpy(np.array(x[rows], dtype=np.float32)) - centre) / scale

    # The largest stable learning rate is 1 / curvature. The softmax cross-entropy has at most
    # half the largest eigenvalue of the covariance of the features (Boehning, 1992), plus l2 / n.
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
        rows = np.sort(order[at : at + size])  # sorted: `x` may be mapped from the disk
        at += size
        optimizer.zero_grad()
        logits = F.linear(batch(rows), weight, bias)
        loss = F.cross_entropy(logits, torch.from_numpy(labels[rows]))
        (loss + l2 / (2 * n) * weight.square().sum()).backward()
        optimizer.step()
        schedule.step()
    return weight.detach().double().numpy(), bias.detach().double().numpy()
