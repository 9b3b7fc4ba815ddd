"""Ridge regression to class targets in closed form, for every l2 from one eigendecomposition.

Section 4.1 of the paper, as `big_vision/evaluators/fewshot_lsr.py` computes it: standardised
features, a constant feature of 100 for the bias, targets of -1 and +1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitcli.evals.fewshot.arrays import (
    Floats,
    Ints,
    class_sums,
    evenly_spaced,
    mean_and_std,
    row_parts,
    rows_per_part,
    to_array,
    to_float64,
    to_int64,
)

BIAS = 100.0  # value of the constant feature: large, so that l2 hardly shrinks its weight
STD_FLOOR = 1e-5  # as big_vision: a constant feature becomes 0 instead of NaN
RIDGE_L2 = 1024.0
L2_CANDIDATES = tuple(2.0**power for power in range(20))
# Leave-one-out takes at most so many images, evenly spaced. The accuracy is then known to about
# 1 %; the difference of two values of l2, which mostly agree, is known much better.
MAX_LEFT_OUT = 2000
MAX_FLOAT64_SCORES = 2**20  # more scores are compared in float32


@dataclass(frozen=True)
class L2Choice:
    """A value of l2 and how it was chosen.

    Attributes:
        candidates: the values that were compared.
        accuracies: (L,) accuracy of each on images left out, in 0..1; None if every class has one
            image, so that none can be left out.
        images: number of images that were left out.
    """

    l2: float
    candidates: tuple[float, ...]
    accuracies: Floats | None
    images: int


@dataclass(frozen=True)
class Ridge:
    """A fitted classifier; its scores are `[standardised features, 100] @ weights`.

    Attributes:
        weights: (D+1, K); the last row belongs to the constant feature.
        mean, std: (D,) of the training images; std includes `STD_FLOOR`.
    """

    weights: Floats
    mean: Floats
    std: Floats

    def scores(self, features: ArrayLike) -> Floats:
        """(n, D) -> (n, K): regression scores; the largest is the prediction."""
        x = (to_float64(features) - self.mean) / self.std  # (n, D)
        return np.asarray(x @ self.weights[:-1] + BIAS * self.weights[-1])

    def predict(self, features: ArrayLike) -> Ints:
        """(n, D) -> (n,)."""
        x = to_array(features)
        parts = [self.scores(x[rows]).argmax(axis=1) for rows in row_parts(x, *self.weights.shape)]
        return np.concatenate(parts).astype(np.int64)

    def linear(self, temperature: float = 1.0) -> tuple[Floats, Floats]:
        """(K, D) weight and (K,) bias of the linear layer that computes scores / temperature."""
        weight = self.weights[:-1].T / self.std  # (K, D)
        bias = BIAS * self.weights[-1] - weight @ self.mean
        return weight / temperature, bias / temperature


class RidgePath:
    """Ridge regression of (n,) labels on (n, D) features, for any l2.

    Attributes:
        eigenvalues: (r,) of the normal matrix X^T X, or of X X^T if that is smaller.
        basis: (D+1, r) such that the weights are basis @ (targets / (eigenvalues + l2)).
        targets: (r, K).
    """

    # Everything is float64: the constant feature gives the normal matrix an eigenvalue of about
    # 10^4 n, beside which float32 loses the small ones. Neither the (n, K) targets nor a second
    # copy of the features is ever in memory: X^T Y needs only sums per class.

    def __init__(self, features: ArrayLike, labels: ArrayLike, num_classes: int) -> None:
        self.x, self.labels = to_array(features), to_int64(labels)
        self.num_classes = num_classes
        n, d = self.x.shape
        self.mean, std = mean_and_std(self.x)
        self.std = std + STD_FLOOR
        self.row_basis: Floats | None = None  # (n, r) eigenvectors of X X^T
        if n > d:
            gram, sums = np.zeros((d + 1, d + 1)), np.zeros((num_classes, d + 1))
            for rows in row_parts(self.x):
                a = self.standardised(rows)
                gram += a.T @ a
                sums += class_sums(a, self.labels[rows], num_classes)
            eigenvalues, self.basis = np.linalg.eigh(gram)
            self.targets = self.basis.T @ _signed(sums)
        else:
            # The dual form, (X X^T + l2)^-1: few-shot has fewer images than features.
            a = self.standardised(slice(None))
            eigenvalues, self.row_basis = np.linalg.eigh(a @ a.T)
            self.basis = a.T @ self.row_basis
            self.targets = _signed(class_sums(self.row_basis, self.labels, num_classes))
        self.eigenvalues = np.clip(eigenvalues, 0, None)  # rounding makes some slightly negative

    def standardised(self, rows: Any) -> Floats:
        """(m, D+1): standardised features of these images, with the constant feature."""
        a = (to_float64(self.x[rows]) - self.mean) / self.std
        return np.pad(a, ((0, 0), (0, 1)), constant_values=BIAS)

    def fit(self, l2: float = RIDGE_L2) -> Ridge:
        """The classifier of this l2; one matrix product."""
        weights = self.basis @ (self.targets / (self.eigenvalues + l2)[:, None])  # (D+1, K)
        return Ridge(weights, self.mean, self.std)

    def left_out_scores(self, l2: float, rows: Any = slice(None)) -> Floats:
        """(m, K): the scores of each of these images from a fit without it."""
        # Closed form of leave-one-out (Allen, 1974): y - (y - s) / (1 - h) with the leverage h,
        # the diagonal of X (X^T X + l2)^-1 X^T. mean and std stay those of all images.
        scores, leverage = self._scores(l2, *self._project(rows), self.targets)
        y = np.asarray(2.0 * (self.labels[rows][:, None] == np.arange(self.num_classes)) - 1.0)
        return np.asarray(y - (y - scores) / (1 - leverage)[:, None])

    def left_out_correct(self, candidates: Sequence[float], rows: Ints) -> NDArray[np.bool_]:
        """(L, m): whether each of these images is correct in a fit without it, for each l2."""
        # Leaving an image out changes its scores by the same amount for every wrong class, so it
        # is correct if s_true - 2 h exceeds every other s. No division, and no second matrix.
        correct = np.zeros((len(candidates), len(rows)), dtype=np.bool_)
        # Scores are of order 1. float32 orders all but nearly equal ones.
        use_float32 = len(rows) * self.num_classes > MAX_FLOAT64_SCORES
        targets = self.targets.astype(np.float32) if use_float32 else self.targets
        for start in range(0, len(rows), step := rows_per_part(self.num_classes)):
            part = rows[start : start + step]
            labels, each = self.labels[part], np.arange(len(part))
            projected = self._project(part)
            for i, l2 in enumerate(candidates):
                scores, leverage = self._scores(l2, *projected, targets)
                own = scores[each, labels] - 2 * leverage
                scores[each, labels] = -np.inf
                correct[i, start : start + step] = own > scores.max(axis=1)
        return correct

    def _project(self, rows: Any) -> tuple[Floats, Floats]:
        """(m, r) rows of X in the basis, and (m, r) summands of their leverage."""
        if self.row_basis is not None:
            vectors = self.row_basis[rows]
            projected = vectors * self.eigenvalues
            return projected, vectors * projected
        projected = self.standardised(rows) @ self.basis
        return projected, projected**2

    def _scores(
        self, l2: float, projected: Floats, squares: Floats, targets: NDArray[Any]
    ) -> tuple[NDArray[Any], Floats]:
        """(m, K) scores, in the dtype of `targets`, and (m,) leverages."""
        inverse = 1 / (self.eigenvalues + l2)
        return (projected * inverse).astype(targets.dtype) @ targets, squares @ inverse


def choose_ridge_l2(path: RidgePath, candidates: Sequence[float] = L2_CANDIDATES) -> L2Choice:
    """Choose l2 by leave-one-out on the training images; no other image is used."""
    counts = np.bincount(path.labels, minlength=path.num_classes)
    rows = evenly_spaced(np.flatnonzero(counts[path.labels] >= 2), MAX_LEFT_OUT)
    if not len(rows):
        return L2Choice(RIDGE_L2, tuple(candidates), None, 0)
    correct = path.left_out_correct(candidates, rows)
    hits = correct.sum(axis=1)
    best = int(hits.argmax())
    # With few images many values are equally good. All values within one standard error of the
    # best count as equal (the one-standard-error rule of Breiman et al., 1984), where the error
    # is that of the difference: only images on which two values disagree contribute. Among them,
    # take the one nearest to the protocol's 2^10.
    errors = np.sqrt((correct != correct[best]).sum(axis=1))
    equal = [l2 for l2, n, e in zip(candidates, hits, errors, strict=True) if hits[best] - n <= e]
    l2 = min(equal, key=lambda value: abs(np.log(value / RIDGE_L2)))
    return L2Choice(l2, tuple(candidates), hits / len(rows), len(rows))


def ridge_head(path: RidgePath, l2: float) -> tuple[Floats, Floats]:
    """(K, D) weight and (K,) bias of a linear layer that gives probabilities under a softmax."""
    from vitcli.evals.calibration import fit_score_temperature  # loads torch

    # Regression scores only have an order. One temperature, fitted on leave-one-out scores, makes
    # them logits and changes no prediction. With one image per class none can be left out; the
    # spread of the scores over the classes takes the place of the temperature.
    ridge, counts = path.fit(l2), np.bincount(path.labels, minlength=path.num_classes)
    rows = evenly_spaced(np.arange(len(path.labels)), rows_per_part(path.num_classes))
    if counts[counts > 0].min() >= 2:
        scores = path.left_out_scores(l2, rows)
        temperature = fit_score_temperature(scores, path.labels[rows])
    else:
        temperature = float(ridge.scores(path.x[rows]).std(axis=1).mean()) or 1.0
    return ridge.linear(temperature)


def _signed(sums: Floats) -> Floats:
    """(K, r) sums per class -> (r, K): the product with targets of -1 and +1."""
    return np.asarray((2.0 * sums - sums.sum(axis=0)).T)
