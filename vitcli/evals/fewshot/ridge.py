"""Regularised least squares in closed form, for every strength from one eigendecomposition.

Section 4.1 of the paper, as `big_vision/evaluators/fewshot_lsr.py` computes it: each feature
standardised, a constant feature of 100 for the bias, targets of -1 and +1. Everything is computed
in float64: the constant gives the normal matrix an eigenvalue of 10^4 n, beside which float32 loses
the small ones.

Neither the targets (n, K) nor a second copy of the features is ever made: X^T Y is a matter of sums
over classes, and what has n rows is gone through in parts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BIAS = 100.0  # the value of the constant feature: its weight is then almost unregularised
STD_FLOOR = 1e-5
DEFAULT_L2 = 1024.0
PATH = tuple(2.0**power for power in range(20))  # the strengths that are tried
PART = 2**23  # numbers in memory at once, of what has a row for every image
# Of more images than this, so many that are spread over all of them stand for all when a strength
# is chosen: their share of right answers is known to a percent, and that of two strengths, which
# mostly agree, is compared more sharply.
MOST_LEFT_OUT = 2000
MOST_EXACT = 2**20  # of their scores are computed in float64


@dataclass(frozen=True)
class Ridge:
    """A fitted classifier; scores are `[standardised features, 100] @ weights`.

    Attributes:
        weights: (D+1, K), the last row belongs to the constant feature.
        mean, std: (D,), of the images it was fitted on; std already has 1e-5 added.
    """

    weights: Floats
    mean: Floats
    std: Floats

    def scores(self, features: ArrayLike) -> Floats:
        """(n, D) -> (n, K): regression scores, whose largest is the prediction."""
        x = (floats(features) - self.mean) / self.std  # (n, D)
        return np.asarray(x @ self.weights[:-1] + BIAS * self.weights[-1])

    def predict(self, features: ArrayLike) -> Ints:
        """(n, D) -> (n,): the class with the largest score, without holding all scores."""
        x = to_array(features)
        parts = [self.scores(x[rows]).argmax(axis=1) for rows in parts_of(x, *self.weights.shape)]
        return np.concatenate(parts).astype(np.int64)

    def linear(self, temperature: float = 1.0) -> tuple[Floats, Floats]:
        """(K, D) weight and (K,) bias of the dense layer that gives scores / temperature."""
        weight = self.weights[:-1].T / self.std  # (K, D)
        bias = BIAS * self.weights[-1] - weight @ self.mean
        return weight / temperature, bias / temperature


class RidgePath:
    """Ridge regression on all of `features` (n, D) and `labels` (n,), of any strength.

    With n rows and D + 1 columns the smaller of the two matrices is decomposed: X^T X when
    n >= D + 1, else X X^T. Both give W = V ((e + l2)^-1 N), and a strength costs one product.

    Attributes:
        values: (r,) the eigenvalues e, from 0 on.
        basis: (D+1, r), the V.
        targets: (r, K), the N.
    """

    def __init__(self, features: ArrayLike, labels: ArrayLike, num_classes: int) -> None:
        self.x, self.labels = to_array(features), ints(labels)
        self.num_classes = num_classes
        n, d = self.x.shape
        self.mean = sum_rows(self.x, lambda x: x) / n
        squares = sum_rows(self.x, lambda x: (x - self.mean) ** 2)
        self.std = np.sqrt(squares / n) + STD_FLOOR
        self.left: Floats | None = None  # (n, r), the eigenvectors of X X^T where it is the smaller
        if n > d:
            gram, sums = np.zeros((d + 1, d + 1)), np.zeros((num_classes, d + 1))
            for rows in parts_of(self.x):
                a = self.standardised(rows)
                gram += a.T @ a
                sums += class_sums(a, self.labels[rows], num_classes)
            values, self.basis = np.linalg.eigh(gram)
            self.targets = self.basis.T @ _signed(sums)
        else:
            a = self.standardised(slice(None))
            values, self.left = np.linalg.eigh(a @ a.T)
            self.basis = a.T @ self.left
            self.targets = _signed(class_sums(self.left, self.labels, num_classes))
        self.values = np.clip(values, 0, None)

    def standardised(self, rows: Any) -> Floats:
        """(m, D+1): these images' features, with the constant one."""
        a = (floats(self.x[rows]) - self.mean) / self.std
        return np.pad(a, ((0, 0), (0, 1)), constant_values=BIAS)

    def fit(self, l2: float) -> Ridge:
        """The classifier of strength `l2`."""
        weights = self.basis @ (self.targets / (self.values + l2)[:, None])  # (D+1, K)
        return Ridge(weights, self.mean, self.std)

    def left_out(self, l2: float, rows: Any = slice(None)) -> Floats:
        """(m, K): the score of each of these images from a fit without it, in closed form.

        y_i - (y_i - s_i) / (1 - h_ii) with the hat matrix H = X (X^T X + l2)^-1 X^T; mean and std
        stay those of all images.
        """
        projected, squares = self._projected(rows)
        scores, hat = self._scores(l2, projected, squares, self.targets)
        y = np.asarray(2.0 * (self.labels[rows][:, None] == np.arange(self.num_classes)) - 1.0)
        return np.asarray(y - (y - scores) / (1 - hat)[:, None])

    def right_left_out(self, strengths: Sequence[float], rows: Ints) -> NDArray[np.bool_]:
        """(L, m): which of these images a fit without it gets right, by strength.

        What leaving an image out takes from its own class and gives to the others does not depend
        on which they are: it is right where s_true - 2 h exceeds every other s.
        """
        right = np.zeros((len(strengths), len(rows)), dtype=np.bool_)
        # Scores are of the order of 1: float32 tells all but a hair's breadth apart.
        rough = len(rows) * self.num_classes > MOST_EXACT
        targets = self.targets.astype(np.float32) if rough else self.targets
        for start in range(0, len(rows), step := _step(self.num_classes)):
            part = rows[start : start + step]
            labels, each = self.labels[part], np.arange(len(part))
            projected, squares = self._projected(part)
            for i, l2 in enumerate(strengths):
                scores, hat = self._scores(l2, projected, squares, targets)
                own = scores[each, labels] - 2 * hat
                scores[each, labels] = -np.inf
                right[i, start : start + step] = own > scores.max(axis=1)
        return right

    def _projected(self, rows: Any) -> tuple[Floats, Floats]:
        """(m, r) these rows of X in the basis, and (m, r) what their leverage is a sum of."""
        if self.left is not None:
            left = self.left[rows]
            projected = left * self.values
            return projected, left * projected
        projected = self.standardised(rows) @ self.basis
        return projected, projected**2

    def _scores(
        self, l2: float, projected: Floats, squares: Floats, targets: NDArray[Any]
    ) -> tuple[NDArray[Any], Floats]:
        """(m, K) scores, in the type of `targets`, and (m,) leverages."""
        inverse = 1 / (self.values + l2)
        return (projected * inverse).astype(targets.dtype) @ targets, squares @ inverse


def fit(features: ArrayLike, labels: ArrayLike, num_classes: int, l2: float = DEFAULT_L2) -> Ridge:
    """Ridge regression on all of `features` (n, D) and `labels` (n,); see `RidgePath`."""
    return RidgePath(features, labels, num_classes).fit(l2)


def leave_one_out(
    features: ArrayLike, labels: ArrayLike, num_classes: int, l2: float = DEFAULT_L2
) -> Floats:
    """(n, K): the score of each image from a fit without it; see `RidgePath.left_out`."""
    return RidgePath(features, labels, num_classes).left_out(l2)


def class_sums(rows: Floats, labels: Ints, num_classes: int) -> Floats:
    """(n, D) and (n,) -> (K, D): the sum of the rows of each class."""
    from scipy.sparse import csr_array

    n = len(labels)
    members = csr_array((np.ones(n), (labels, np.arange(n))), shape=(num_classes, n))
    return np.asarray(members @ rows)


def _signed(sums: Floats) -> Floats:
    """(K, r) sums by class -> (r, K): the product with targets of -1 and +1."""
    return np.asarray((2.0 * sums - sums.sum(axis=0)).T)


def parts_of(x: NDArray[Any], *more: int) -> Iterator[slice]:
    """Slices of the rows of `x` that are small enough, with `more` further numbers a row."""
    step = _step(max(x.shape[1], *more, 1))
    yield from (slice(start, start + step) for start in range(0, len(x), step))


def _step(width: int) -> int:
    return max(1, PART // max(width, 1))


def sum_rows(x: NDArray[Any], of: Any) -> Floats:
    """(D,): the sum over all rows of `of` them, in float64."""
    return np.asarray(sum(of(floats(x[rows])).sum(axis=0) for rows in parts_of(x)))


def to_array(values: Any) -> NDArray[Any]:
    """A tensor on any device, in any type, or something array-like -> an array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        return np.asarray(values.double() if values.is_floating_point() else values)
    return np.asarray(values)


def floats(values: Any) -> Floats:
    """Anything array-like as float64."""
    return np.asarray(to_array(values), dtype=np.float64)


def ints(values: Any) -> Ints:
    """Anything array-like as int64."""
    return np.asarray(to_array(values), dtype=np.int64)
