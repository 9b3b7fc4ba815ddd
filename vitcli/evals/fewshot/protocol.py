"""Few-shot linear evaluation: section 4.1 of the paper, big_vision's protocol.

So many images of each class are drawn, a ridge classifier is fitted on their features alone, and
the class with the largest score wins (`big_vision/evaluators/fewshot_lsr.py`); the arithmetic is in
`ridge.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from vitcli.errors import VitcliError
from vitcli.evals.fewshot.ridge import (
    DEFAULT_L2,
    MOST_LEFT_OUT,
    PART,
    PATH,
    Floats,
    Ints,
    Ridge,
    RidgePath,
    fit,
    floats,
    ints,
    leave_one_out,
)

__all__ = [
    "Choice",
    "Ridge",
    "RidgePath",
    "choose_l2",
    "draw",
    "fewshot",
    "fit",
    "fit_head",
    "fit_temperature",
    "leave_one_out",
    "ridge_head",
]


@dataclass(frozen=True)
class Choice:
    """A strength, and how it came to be chosen.

    Attributes:
        strengths: those that were tried.
        accuracies: (L,) leave-one-out accuracy of each, in 0..1; None where every class has a
            single image and there is nothing to leave out.
        images: how many were left out, one at a time.
    """

    l2: float
    strengths: tuple[float, ...]
    accuracies: Floats | None
    images: int


def draw(labels: ArrayLike, shots: int | None, seed: int, num_classes: int) -> Ints:
    """Indices of `shots` images of each class, in class order; all there are of a smaller class.

    None takes all of every class.

    One generator permutes every class in turn, so that for the same seed fewer shots are always
    the first of more.
    """
    rng = np.random.default_rng(seed)
    values = np.asarray(labels)
    orders = [rng.permutation(np.flatnonzero(values == c)) for c in range(num_classes)]
    return np.concatenate([order[:shots] for order in orders]).astype(np.int64)


def fewshot(
    features: ArrayLike,
    labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    shots: int = 5,
    seed: int = 0,
    l2: float | Literal["auto"] = DEFAULT_L2,
) -> float:
    """Accuracy (0..1) on the test features of a classifier fitted on `shots` images per class.

    Args:
        features: (n, D), tensors or arrays, of the images to draw from.
        labels: (n,) integers from 0.
        test_features: (m, D).
        test_labels: (m,).
        shots: images per class.
        seed: of the draw, `numpy.random.default_rng(seed)` as the reference has it.
        l2: strength of the ridge penalty, 2^10 in the reference; `auto` has `choose_l2` choose it.

    Raises:
        VitcliError: lengths or widths that do not fit, or values that are not finite.
    """
    x, y, test_x, test_y = (
        floats(features),
        ints(labels),
        floats(test_features),
        ints(test_labels),
    )
    _check(x, y, test_x, test_y, shots, l2)
    num_classes = int(max(y.max(), test_y.max())) + 1
    chosen = draw(y, shots, seed, num_classes)
    path = RidgePath(x[chosen], y[chosen], num_classes)
    ridge = path.fit(choose_l2(path).l2 if l2 == "auto" else l2)
    return float(np.mean(ridge.predict(test_x) == test_y))


def fit_temperature(scores: Floats, labels: ArrayLike) -> float:
    """The T for which softmax(scores / T) gives the true labels the largest likelihood.

    Targets are Platt's, (n + 1) / (n + 2) for the true class, so that scores which are right
    throughout do not ask for certainty. Where no T helps, it ends at the scores' own spread over
    the classes.
    """
    y = ints(labels)
    n, k = scores.shape
    targets = np.full((n, k), 1 / (n + 2) / max(k - 1, 1))
    targets[np.arange(n), y] = (n + 1) / (n + 2)
    spread = float(scores.std(axis=1).mean()) or 1.0

    def loss(log_t: float) -> float:
        z = scores / np.exp(log_t)
        z = z - z.max(axis=1, keepdims=True)
        return float(np.mean(np.log(np.exp(z).sum(axis=1)) - (targets * z).sum(axis=1)))

    # Golden-section search: convex in 1/T, so with one minimum in log T.
    low, high = float(np.log(spread) - 7), float(np.log(spread))
    ratio = (5**0.5 - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def fit_head(
    features: ArrayLike, labels: ArrayLike, num_classes: int, l2: float = DEFAULT_L2
) -> tuple[Floats, Floats]:
    """(K, D) weight and (K,) bias of a dense layer: the ridge classifier with its temperature.

    See `ridge_head`.
    """
    return ridge_head(RidgePath(features, labels, num_classes), l2)


def ridge_head(path: RidgePath, l2: float) -> tuple[Floats, Floats]:
    """(K, D) weight and (K,) bias of a dense layer: the ridge classifier with its temperature.

    Ridge scores only promise an order; one temperature, fitted on leave-one-out scores, turns
    them into probabilities and changes no prediction. With one image of a class there is nothing
    to leave out, and the scores' spread over the classes stands in.
    """
    ridge, counts = path.fit(l2), np.bincount(path.labels, minlength=path.num_classes)
    rows = spread_over(np.arange(len(path.labels)), max(1, PART // path.num_classes))
    if counts[counts > 0].min() >= 2:
        temperature = fit_temperature(path.left_out(l2, rows), path.labels[rows])
    else:
        temperature = float(ridge.scores(path.x[rows]).std(axis=1).mean()) or 1.0
    return ridge.linear(temperature)


def choose_l2(path: RidgePath, strengths: Sequence[float] = PATH) -> Choice:
    """The strength that leave-one-out on the images of `path` speaks for; no other image is seen.

    Of a few images many strengths get the same ones right. Those that stay behind the best by no
    more than one standard error (of the difference, over the images that only one of the two gets
    right) count as equal to it, and of them it is the nearest to 2^10, which is the protocol's.
    """
    counts = np.bincount(path.labels, minlength=path.num_classes)
    rows = spread_over(np.flatnonzero(counts[path.labels] >= 2), MOST_LEFT_OUT)
    if not len(rows):
        return Choice(DEFAULT_L2, tuple(strengths), None, 0)
    right = path.right_left_out(strengths, rows)
    hits = right.sum(axis=1)
    best = int(hits.argmax())
    apart = np.sqrt((right != right[best]).sum(axis=1))
    equal = [s for s, n, e in zip(strengths, hits, apart, strict=True) if hits[best] - n <= e]
    l2 = min(equal, key=lambda strength: abs(np.log(strength / DEFAULT_L2)))
    return Choice(l2, tuple(strengths), hits / len(rows), len(rows))


def spread_over(indices: Ints, most: int) -> Ints:
    """`most` of the indices, evenly from first to last; all where there are no more."""
    count = min(most, len(indices))
    return indices[np.arange(count) * len(indices) // max(count, 1)]


def _check(x: Floats, y: Ints, test_x: Floats, test_y: Ints, shots: int, l2: float | str) -> None:
    if x.ndim != 2 or test_x.ndim != 2 or x.shape[1] != test_x.shape[1]:
        raise VitcliError(f"features must be (n, D), both of one D: {x.shape} and {test_x.shape}")
    for name, a, b in (("labels", x, y), ("test_labels", test_x, test_y)):
        if b.shape != (len(a),):
            raise VitcliError(f"{len(a)} feature rows, but `{name}` has the shape {b.shape}")
        if not len(b) or b.min() < 0:
            raise VitcliError(f"`{name}` must be one or more integers from 0 on")
        if not np.isfinite(a).all():
            raise VitcliError(f"the features that belong to `{name}` are not all finite")
    if shots < 1 or not (l2 == "auto" or (not isinstance(l2, str) and l2 > 0)):
        raise VitcliError(f"shots = {shots} and l2 = {l2}: both must be above 0")
